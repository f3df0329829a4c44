"""Modules that were moved, under their former names for one release."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

from cur._lib.errors import warn

__all__ = ["MOVED", "former_modules", "former_names", "install", "renamed"]

Function = TypeVar("Function", bound=Callable[..., Any])

MOVED: dict[str, tuple[str, ...]] = {
    "cur.integrations.account": (
        "cur.integrations.store.account",
        "cur.integrations.files.hashes",
    ),
    "cur.integrations.adapters": ("cur.integrations.model.adapters",),
    "cur.integrations.arriving": ("cur.integrations.measure.propagation",),
    "cur.integrations.beside": ("cur.integrations.files.beside", "cur.integrations.model.source"),
    "cur.integrations.budget": (
        "cur.integrations.plan.budget",
        "cur.integrations.plan.config",
    ),
    "cur.integrations.calibration": (
        "cur.integrations.measure.collect",
        "cur.integrations.measure.statistics",
    ),
    "cur.integrations.card": ("cur.integrations.report.card",),
    "cur.integrations.checkpoint": (
        "cur.integrations.store.checkpoint",
        "cur.integrations.files.beside",
        "cur.integrations.store.format",
        "cur.integrations.files.reading",
        "cur.integrations.files.directory",
    ),
    "cur.integrations.choice": ("cur.integrations.plan.blocks",),
    "cur.integrations.config": ("cur.integrations.plan.config",),
    "cur.integrations.curves": ("cur.integrations.plan.rate_distortion",),
    "cur.integrations.disk": ("cur.integrations.plan.file_size",),
    "cur.integrations.evaluate": ("cur.integrations.report.perplexity",),
    "cur.integrations.experts": ("cur.integrations.model.experts", "cur.integrations.model.unrolling"),
    "cur.integrations.factorize": (
        "cur.integrations.factor.layer",
        "cur.integrations.model.finite",
        "cur.integrations.plan.guide",
    ),
    "cur.integrations.gradients": (
        "cur.integrations.measure.gradients",
        "cur.integrations.measure.generated_text",
    ),
    "cur.integrations.inspect": ("cur.integrations.store.inspect",),
    "cur.integrations.layers": ("cur.integrations.model.targets", "cur.integrations.nn"),
    "cur.integrations.layouts": (
        "cur.integrations.plan.layouts",
        "cur.integrations.nn.registry",
    ),
    "cur.integrations.limits": ("cur.integrations.model.limits",),
    "cur.integrations.models": ("cur.integrations.model.loading",),
    "cur.integrations.moments": ("cur.integrations.measure.moments",),
    "cur.integrations.neurons": ("cur.integrations.model.neurons",),
    "cur.integrations.opening": ("cur.integrations.model.opening", "cur.integrations.model.classes"),
    "cur.integrations.origin": ("cur.integrations.model.origin",),
    "cur.integrations.outputs": ("cur.integrations.report.outputs",),
    "cur.integrations.page": ("cur.integrations.report.page",),
    "cur.integrations.planning": ("cur.integrations.plan.make",),
    "cur.integrations.precision": ("cur.integrations.model.precision",),
    "cur.integrations.pruning": (
        "cur.integrations.factor.neurons",
        "cur.integrations.plan.neuron_curves",
    ),
    "cur.integrations.quantizer": (
        "cur.integrations.store.format",
        "cur.integrations.files.reading",
    ),
    "cur.integrations.rounding": ("cur.integrations.factor.rounding",),
    "cur.integrations.rows": ("cur.integrations.measure.rows",),
    "cur.integrations.sampling": ("cur.integrations.measure.generated_text",),
    "cur.integrations.spectra": ("cur.integrations.measure.spectra",),
    "cur.integrations.statistics": ("cur.integrations.measure.statistics",),
    "cur.integrations.stored": (
        "cur.integrations.files.configuration",
        "cur.integrations.files.reading",
    ),
    "cur.integrations.tensors": ("cur.integrations.model.stored_tensors",),
    "cur.integrations.text": ("cur.integrations.measure.text",),
    "cur.integrations.blockwise.shards": (
        "cur.integrations.files.shards",
        "cur.integrations.files.header",
    ),
    "cur.integrations.blockwise.skeleton": ("cur.integrations.blockwise.streamed_model",),
    "cur.integrations.blockwise.states": ("cur.integrations.blockwise.hidden_states",),
    "cur.integrations.blockwise.tunnel": ("cur.integrations.blockwise.bypass",),
    "cur.integrations.blockwise.team": ("cur.integrations.blockwise.distributed",),
    "cur.healing.stack": ("cur.healing.pair.stack", "cur.integrations.model.blocks"),
    "cur.healing.cache": ("cur.healing.pair.cache",),
    "cur.healing.sharing": ("cur.healing.pair.sharing",),
    "cur.healing.cores": ("cur.healing.pair.cores",),
    "cur.healing.objectives": ("cur.healing.pair.objectives",),
    "cur.healing.data": ("cur.healing.pair.data",),
    "cur.healing.moments": ("cur.healing.pair.moments",),
    "cur.healing.closed_form": ("cur.healing.training.closed_form", "cur.healing.report"),
    "cur.healing.natural": ("cur.healing.training.natural",),
    "cur.healing.learner": ("cur.healing.training.learner",),
    "cur.healing.train": ("cur.healing.training.loop",),
    "cur.healing.state": ("cur.healing.training.state", "cur.healing.pair.hashing"),
    "cur.healing.logs": ("cur.healing.training.logs",),
    "cur.truncation": ("cur.weighted.truncation",),
    "cur.importance": ("cur.weights", "cur.scores"),
    "cur.integrations.plan.importance": ("cur.integrations.plan.guide",),
    "cur.integrations.nn.int8": ("cur.integrations.nn.rounded",),
    "cur.own_rows": ("cur.weighted.rows",),
    "cur.own_inputs": ("cur.weighted.inputs",),
}
"""By former name the modules in which what was there is now."""

RENAMED: dict[str, dict[str, str]] = {
    "cur.healing.pair.cache": {"Taught": "TeacherOutputs"},
    "cur.healing.pair.pair": {"Pair": "TeacherStudentPair"},
    "cur.healing.training.loop": {"Goal": "Comparison", "Task": "TrainingUnit"},
    "cur.integrations.blockwise.bypass": {"Tunnel": "Bypass"},
    "cur.integrations.blockwise.distributed": {"Team": "ProcessGroup", "TeamError": "ProcessGroupError"},
    "cur.integrations.blockwise.hidden_states": {"States": "HiddenStates"},
    "cur.integrations.blockwise.streamed_model": {"Skeleton": "StreamedModel", "load_skeleton": "load_streamed"},
    "cur.integrations.measure.propagation": {"Arriving": "InputMoments"},
    "cur.integrations.model.blocks": {"Entry": "BlockCall"},
    "cur.integrations.nn.rounded": {"Int8Embedding": "GridEmbedding", "Int8Linear": "GridLinear"},
    "cur.integrations.plan.blocks": {"choose_layers": "choose_blocks"},
}
"""By module, what its names are called that had others before."""


class _Alias(ModuleType):
    """Looks names up in the modules where they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found, place = _find(self.__name__, name, MOVED[self.__name__])
        if not place.endswith(f".{name}"):  # the module said where it has moved, but not under which name
            warn(f"{self.__name__}.{name} has moved to {place}", DeprecationWarning)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `cur.own_rows` is a function now; importing the former module must not take it away.
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: names are looked up when they are asked for."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        warn(f"{fullname} has moved to {' and '.join(MOVED[fullname])}", DeprecationWarning)
        return ModuleSpec(fullname, _Loader())


def _find(former: str, name: str, places: Sequence[str]) -> tuple[Any, str]:
    """Return what a name stands for, and where it is now."""
    for place in places:
        module = import_module(place)
        known = RENAMED.get(place, {}).get(name, name)
        if known in getattr(module, "__all__", ()):
            return getattr(module, known), f"{place}.{known}"
    raise AttributeError(f"module {former!r} has no attribute {name!r}")


def former_names(package: str, places: Sequence[str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module for names that it does not have any more.

    Parameters
    ----------
    package : str
        The module: a package with the name of a former module, or one in which something was renamed.
    places : sequence of str
        The modules in which what was there is now, this one perhaps.
    """

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found, place = _find(package, name, places)
        warn(f"{package}.{name} has moved to {place}", DeprecationWarning)
        return found

    return find


def former_modules(package: str) -> Callable[[str], ModuleType]:
    """Return the ``__getattr__`` of a package for modules that were moved out of it: ``import cur; cur.importance``.

    Parameters
    ----------
    package : str
        The name of the package.

    Returns
    -------
    callable
        The function, which imports a module by its former name, with a warning.
    """

    def find(name: str) -> ModuleType:
        former = f"{package}.{name}"
        if former not in MOVED:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(former)

    return find


def renamed(**options: str) -> Callable[[Function], Function]:
    """Return a decorator that lets a function be called with the former names of options: ``former="new"``.

    Parameters
    ----------
    **options : str
        The new names of options, by their former ones.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def entry(*args: Any, **given: Any) -> Any:
            for former in options.keys() & given.keys():
                now = options[former]
                if now in given:
                    raise TypeError(f"`{former}` is the former name of `{now}`; give one of them")
                warn(f"`{former}` of {function.__name__} is `{now}` now", DeprecationWarning)
                given[now] = given.pop(former)
            return function(*args, **given)

        return cast(Function, entry)

    return decorate


def install() -> None:
    """Let the former names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
