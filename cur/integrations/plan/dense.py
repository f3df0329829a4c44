"""Targets that stay dense, and why: too small to gain anything, tied to others, or never reached by the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.targets import targeted_singly
from cur.integrations.nn import dense_weight, layer_class, layout_for
from cur.integrations.plan.config import BudgetConfig, CompressConfig
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.rate_distortion import SMALLEST

__all__ = [
    "check_reached",
    "dense_remark",
    "few_tokens",
    "refuse_all",
    "refuse_named",
    "refuse_unfit",
    "unfit",
    "unmeasured",
]

_TOLD = 3


def unfit(model: nn.Module, config: CompressConfig | BudgetConfig, names: Iterable[str]) -> dict[str, str]:
    """Say of layers that cannot be replaced with any gain why that is so: too small, or tied to others.

    Where the layout is chosen by speed, a layer that would not get faster has no entry, and nothing is said of it.

    Parameters
    ----------
    model : nn.Module
        The model that the layers belong to; weights need not be in memory.
    config : CompressConfig or BudgetConfig
        The configuration, which says how layers are stored.
    names : iterable of str
        The names of the layers to look at.

    Returns
    -------
    dict of str to str
        A sentence by the name of each layer that has to stay dense.
    """
    layout = config.layout if isinstance(config, CompressConfig) else SMALLEST.layout
    holders = _holders(model)
    found = {}
    for name in names:
        module = model.get_submodule(name)
        m, n = dense_weight(module, name)[0].shape
        if other := holders.get(_address(model.get_parameter(f"{name}.weight")), {name}) - {name}:
            other = {holder or "a parameter of the model itself" for holder in other}
            found[name] = (
                f"the weight of {name} is tied to {', '.join(sorted(other))}: compressing one would leave the other "
                "dense"
            )
        elif layout != "auto" and layer_class(layout_for(module, layout)).rank_within(m, n, m * n - 1) < 1:
            found[name] = f"{name} ({m} x {n}) is too small: no rank saves anything"
    return found


def _holders(model: nn.Module) -> dict[int, set[str]]:
    """Return the modules that hold each parameter, by its address; a module under two names is one module."""
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                holders.setdefault(_address(parameter), set()).add(name)
    return holders


def _address(parameter: Tensor) -> int:
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def few_tokens(statistics: Statistics, entries: Iterable[PlanEntry]) -> tuple[str, ...]:
    """Say of which layers the text holds fewer tokens than they have directions; none if there is no such layer.

    Parameters
    ----------
    statistics : Statistics
        The statistics that the layers are made from.
    entries : iterable of PlanEntry
        The entries of the layers.

    Returns
    -------
    tuple of str
        A sentence, or none.
    """
    few = {
        entry.name: statistics.counts[entry.name]
        for entry in entries
        if 0 < statistics.counts.get(entry.name, 0) < min(entry.shape)
    }
    if not few:
        return ()
    least = min(few, key=lambda name: few[name])
    return (
        f"{len(few)} compressed layers got fewer tokens of text than they have directions ({least}: {few[least]}), so "
        "that what they do on other tokens is not known; give more text.",
    )


def unmeasured(statistics: Statistics, names: Iterable[str], *, gradients: bool = False) -> dict[str, str]:
    """Say of layers that nothing was measured of why that is so.

    Parameters
    ----------
    statistics : Statistics
        The statistics of the model.
    names : iterable of str
        The names of the layers to look at; those that the statistics do not cover are passed over.
    gradients : bool, default False
        Whether gradients at the outputs are needed as well.

    Returns
    -------
    dict of str to str
        A sentence by the name of each layer that the text does not reach.
    """
    found = {}
    for name in names:
        if statistics.counts.get(name) == 0:
            found[name] = f"no input reached {name} on the calibration text"
        elif name in statistics.square_sums and not bool((statistics.square_sums[name] > 0).any()):
            found[name] = f"no input of {name} was ever different from zero on the calibration text"
        elif gradients and statistics.output_counts.get(name) == 0:
            found[name] = f"no gradient reached {name}: the loss does not depend on it"
    return found


def refuse_named(model: nn.Module, config: CompressConfig | BudgetConfig, dense: Mapping[str, str]) -> None:
    """Raise a ValueError if the user named one of the layers that have to stay dense, and no others with it.

    Parameters
    ----------
    model : nn.Module
        The model that the layers belong to.
    config : CompressConfig or BudgetConfig
        The configuration, which has the targets.
    dense : mapping of str to str
        A sentence by the name of each layer that has to stay dense.

    Raises
    ------
    ValueError
        If a target names such a layer by its full name, or matches nothing else.
    """
    named = targeted_singly(model, config.targets)
    if found := [name for name in dense if name in named]:
        raise ValueError(f"{dense[found[0]]}; exclude it")


def refuse_unfit(model: nn.Module, config: CompressConfig | BudgetConfig, names: Sequence[str]) -> None:
    """Raise a ValueError if all layers are too small or tied, or one that the user named by itself.

    Parameters
    ----------
    model : nn.Module
        The model that the layers belong to; weights need not be in memory.
    config : CompressConfig or BudgetConfig
        The configuration, which has the targets.
    names : sequence of str
        The names of the layers that the configuration selects.

    Raises
    ------
    ValueError
        If nothing could be compressed, or not what was named.
    """
    dense = unfit(model, config, names)
    refuse_named(model, config, dense)
    refuse_all(names, dense)


def refuse_all(names: Sequence[str], dense: Mapping[str, str]) -> None:
    """Raise a ValueError if all of some layers have to stay dense.

    Parameters
    ----------
    names : sequence of str
        The names of the layers.
    dense : mapping of str to str
        A sentence by the name of each layer that has to stay dense.

    Raises
    ------
    ValueError
        If no layer is left to compress.
    """
    if names and len(dense) == len(names):
        more = f", and the other {len(names) - 1} targets stay dense likewise" if len(names) > 1 else ""
        raise ValueError(f"{dense[names[0]]}{more}; choose other layers or other text")


def check_reached(statistics: Statistics, names: Iterable[str], *, gradients: bool = False) -> None:
    """Raise a ValueError if nothing was measured of a layer that a plan has an entry for.

    Parameters
    ----------
    statistics : Statistics
        The statistics that the plan is to be carried out with.
    names : iterable of str
        The names of the layers of the plan.
    gradients : bool, default False
        Whether gradients at the outputs are needed as well.

    Raises
    ------
    ValueError
        If the text does not reach one of the layers.
    """
    for sentence in unmeasured(statistics, names, gradients=gradients).values():
        raise ValueError(f"{sentence}, and the plan has an entry for it; give more text, or take it out of the plan")


def dense_remark(dense: Mapping[str, str]) -> str:
    """Return in one sentence which targets stay dense, and why; empty if there are none.

    Parameters
    ----------
    dense : mapping of str to str
        A sentence by the name of each of these layers, as plans have it.
    """
    if not dense:
        return ""
    told = "; ".join(list(dense.values())[:_TOLD])
    more = f"; and so on: `plan.json` has all {len(dense)}" if len(dense) > _TOLD else ""
    return f"Targets that stay dense as nothing could be gained or measured: {told}{more}."
