"""The plan: which layers of a model are replaced, at which rank and in which layout.

A plan is data. It can be printed, saved as JSON, edited by hand and replayed on the same architecture;
nothing is decided while layers are swapped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cur._lib.atomic import replace_file
from cur._lib.errors import CURError
from cur.integrations.files.reading import read_object
from cur.integrations.model.experts import unrolled
from cur.integrations.nn import FACTORED, NEURONS, dense_weight, layer_class

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "FORMAT_VERSION",
    "IMPORTANCES",
    "LINKS",
    "METHODS",
    "PRECISIONS",
    "SUBSPACES",
    "Plan",
    "PlanEntry",
    "PlanError",
    "fingerprint",
    "is_multiple",
]

FORMAT_VERSION = 3
"""Version of the JSON written; a reader refuses newer ones."""

METHODS = ("cur", "weighted", "rows", "neurons")
"""What stands for the weight: chosen columns and rows of it with a core between them; the nearest matrix of the rank
under second moments; chosen rows of it and the best coefficients of the others under second moments; what belongs to
the neurons that are kept between it and the layers before or behind, fitted under second moments."""

IMPORTANCES = ("wanda", "magnitude", "weights", "activation", "covariance")
"""Scores whose leading singular subspaces choose rows and columns: ``|W| ||x||``, ``|W|``, ``W`` itself,
``W diag(||x||)``, ``W E[x x^T]^(1/2)``."""

LINKS = ("optimal", "activation", "covariance")
"""What the core U minimises: ``||W - C U R||_F``, the same times ``diag(||x||)``, or times ``E[x x^T]^(1/2)``."""

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Of the method ``"cur"``; the others, whose weights have a large range, compute in float64."""

SUBSPACES = ("exact", "randomised")
"""Where the singular subspaces come from: an SVD, or a seeded random sketch, for layers too large for one."""


class PlanError(CURError, ValueError):
    """A plan cannot be read, or does not fit the model."""


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """What happens to one linear layer.

    Parameters
    ----------
    name : str
        Dotted name of the module in the model.
    shape : tuple of int
        Outputs m and inputs n of the layer.
    rank : int
        Rows and columns kept.
    layout : str
        ``"cur"``, ``"folded"`` or ``"interpolative"``; for the method ``"neurons"`` ``"inputs"``, or, in the layers
        before, ``"outputs"``.
    method : str
        One of :data:`METHODS`.
    importance : str
        One of :data:`IMPORTANCES`. For the method ``"cur"``.
    link : str
        One of :data:`LINKS`. For the method ``"cur"``.
    subspace : str
        One of :data:`SUBSPACES`. For the method ``"cur"``.
    gradients : bool
        Whether outputs are weighted by the second moments of their gradients. For the other methods.
    damping : float
        Multiple of the mean eigenvalue that is added to second moments. For the other methods.
    consumer : str or None
        For the layout ``"outputs"``: the layer behind, whose entry chooses the neurons and has the same rank.
    inner_rank : int or None
        For the method ``"neurons"``: the rank of what belongs to the kept neurons, if that is factored as well.
    predicted : float or None
        What the plan expects the layer to cost: with gradients the increase of the loss in nats per token, to second
        order; without, the squared relative error of its outputs. For the method "cur" the squared error that no
        factorization of the rank goes below, relative and with every input feature counted by its norm. For the reader.

    Raises
    ------
    PlanError
        If a value is not one of these, or the rank is not one that the layout has for the shape.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    layout: str = "cur"
    method: str = "cur"
    importance: str = "wanda"
    link: str = "optimal"
    subspace: str = "exact"
    gradients: bool = False
    damping: float = 0.0
    consumer: str | None = None
    inner_rank: int | None = None
    predicted: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        shape: tuple[Any, ...] = self.shape  # read from JSON, it may be anything
        if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
            raise PlanError(f"`shape` of {self.name} must be two positive integers, got {self.shape!r}")
        choices = {
            "layout": (*FACTORED, *NEURONS),
            "method": METHODS,
            "importance": IMPORTANCES,
            "link": LINKS,
            "subspace": SUBSPACES,
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise PlanError(f"`{key}` of {self.name} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        m, n = self.shape
        kind = layer_class(self.layout)
        limit = kind.largest_rank(m, n)
        if type(self.rank) is not int or not 1 <= self.rank <= limit:
            raise PlanError(
                f"`rank` of {self.name} must be an integer between 1 and {limit}, the largest of {m} x {n} in the "
                f"layout {self.layout!r}, got {self.rank!r}"
            )
        if (self.method == "neurons") != (self.layout not in FACTORED):
            raise PlanError(
                f"`layout` of {self.name} must be 'inputs' or 'outputs' for the method 'neurons' and for no other, "
                f"got {self.layout!r} for {self.method!r}"
            )
        inner = kind.largest_inner_rank(m, n, self.rank)
        if self.inner_rank is not None and not (type(self.inner_rank) is int and 1 <= self.inner_rank <= inner):
            got = f"got {self.inner_rank!r}"
            if not inner:
                raise PlanError(f"`inner_rank` of {self.name} is for the method 'neurons' alone, {got}")
            raise PlanError(
                f"`inner_rank` of {self.name} must be null or an integer between 1 and {inner}, the largest of what "
                f"belongs to {self.rank} neurons, {got}"
            )
        if (self.layout == "outputs") != isinstance(self.consumer, str):
            raise PlanError(
                f"`consumer` of {self.name} must name the layer behind if the layout is 'outputs', and be null "
                f"otherwise, got {self.consumer!r}"
            )
        if self.method == "rows" and self.layout != "interpolative":
            raise PlanError(
                f"`layout` of {self.name} must be 'interpolative' for the method 'rows', got {self.layout!r}"
            )
        damping: Any = self.damping
        if not isinstance(damping, (int, float)) or not 0.0 <= damping < math.inf:
            raise PlanError(f"`damping` of {self.name} must be a number that is at least 0, got {damping!r}")
        if not isinstance(self.gradients, bool):
            raise PlanError(f"`gradients` of {self.name} must be true or false, got {self.gradients!r}")

    @property
    def parameters(self) -> int:
        """Numbers kept in the factors (the bias, which stays, is not counted)."""
        return int(layer_class(self.layout).numbers(*self.shape, self.rank, self.inner_rank))

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense weight."""
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON types, with ``parameters`` for the reader's information."""
        return {**asdict(self), "shape": list(self.shape), "parameters": self.parameters}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read an entry.

        ``parameters`` follows from the rest and is not read, so that a rank can be edited alone.
        """
        known = {f.name for f in fields(cls)}
        _refuse_unknown(data, known | {"parameters"}, f"entry {data.get('name', '?')!r}")
        _require(data, ("name", "shape", "rank"), f"entry {data.get('name', '?')!r}")
        shape = data["shape"]
        if not isinstance(shape, (list, tuple)):
            raise PlanError(f"`shape` of {data['name']} must be two positive integers, got {shape!r}")
        values = {key: value for key, value in data.items() if key in known}
        return cls(**{**values, "shape": tuple(shape)})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision of one compression.

    Parameters
    ----------
    entries : tuple of PlanEntry
        One for each layer to replace.
    fingerprint : str
        :func:`fingerprint` of the dense model.
    model : str
        Where the dense model came from, for the reader.
    seed : int
        Seed of every random choice.
    precision : str
        One of :data:`PRECISIONS`.
    calibration : str or None
        SHA-256 of the calibration tokens, or None when it is not known.
    calibration_tokens : int
        Their number.
    calibration_precision : str
        Of the products in the passes over them, ``"float32"`` for instance; empty where it is not known.
    angular : mapping of int to float
        Angular distance between the outputs of layer i - 1 and layer i, in units of pi.
    versions : mapping of str to str
        Versions of the libraries that made the plan.
    own_text : float
        How much text the model wrote itself to be calibrated on that, too, as a multiple of what it was given.
    correction : float
        How much of the difference between what layers get in the dense model and what compressed ones before them give
        is corrected, from 0 to 1; 0 fits no layer to that. Needs the text again when the plan is carried out.
    targeted_parameters : int or None
        Numbers in the dense weights of all layers that share a budget, those included that stay dense; None for a plan
        without a budget.
    model_parameters : int or None
        Numbers in the whole dense model, likewise.
    """

    entries: tuple[PlanEntry, ...]
    fingerprint: str
    model: str = ""
    seed: int = 0
    precision: str = "float32"
    calibration: str | None = None
    calibration_tokens: int = 0
    calibration_precision: str = ""
    angular: Mapping[int, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    own_text: float = 0.0
    correction: float = 0.0
    targeted_parameters: int | None = None
    model_parameters: int | None = None

    def __post_init__(self) -> None:
        """Refuse a module that is named twice, and other values that no plan has."""
        if self.precision not in PRECISIONS:
            raise PlanError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise PlanError(f"`seed` must be an integer that is at least 0, got {self.seed!r}")
        if not is_multiple(self.own_text):
            raise PlanError(f"`own_text` must be a finite multiple that is at least 0, got {self.own_text!r}")
        if not 0.0 <= self.correction <= 1.0:
            raise PlanError(f"`correction` must be between 0 and 1, got {self.correction!r}")
        names = [entry.name for entry in self.entries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PlanError(f"`entries` must name a module once, got {', '.join(sorted(twice))} more than once")
        self._check_neurons()

    def _check_neurons(self) -> None:
        """Refuse entries around neurons that do not belong together."""
        behind = {entry.name: entry for entry in self.entries if entry.layout == "inputs"}
        for entry in self.entries:
            if entry.consumer is None:
                continue
            consumer = behind.get(entry.consumer)
            if consumer is None or (consumer.rank, consumer.shape[1]) != (entry.rank, entry.shape[0]):
                got = "none" if consumer is None else f"{consumer.rank} of {consumer.shape[1]}"
                raise PlanError(
                    f"`rank` of {entry.name} must be that of {entry.consumer}, an entry of the layout 'inputs', got "
                    f"{entry.rank} of {entry.shape[0]} and {got}: they have the same neurons, so change both"
                )
        if alone := behind.keys() - {entry.consumer for entry in self.entries}:
            raise PlanError(
                f"`entries` must hold, beside {', '.join(sorted(alone))}, the layers before, whose `consumer` it is"
            )

    @property
    def parameters(self) -> int:
        """Numbers kept in the factors of all entries."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense weights of all entries."""
        return sum(entry.dense_parameters for entry in self.entries)

    @property
    def kept(self) -> float | None:
        """Share of parameters left in the layers that the budget is for; None for a plan without a budget."""
        return self._share(self.targeted_parameters)

    @property
    def model_kept(self) -> float | None:
        """Share of parameters left in the whole model; None for a plan without a budget."""
        return self._share(self.model_parameters)

    def _share(self, whole: int | None) -> float | None:
        return None if not whole else 1.0 - (self.dense_parameters - self.parameters) / whole

    @property
    def needs_moments(self) -> bool:
        """Whether full second moments of inputs are needed to carry it out."""
        return any(entry.method != "cur" or "covariance" in (entry.importance, entry.link) for entry in self.entries)

    # A plan says neither how gradients were come by nor how many windows were in a pass.
    gradient_checkpointing = False
    batch_size = 1

    def as_done(self, layers: Iterable[Any]) -> Plan:
        """Return the plan with the ranks that were found, from objects with a `rank` in the order of its entries."""
        entries = (replace(entry, rank=done.rank) for entry, done in zip(self.entries, layers, strict=True))
        return replace(self, entries=tuple(entries))

    @property
    def needs_gradients(self) -> bool:
        """Whether second moments of the gradients at outputs are needed to carry it out."""
        return any(entry.gradients for entry in self.entries)

    def check(self, model: nn.Module) -> None:
        """Check that the plan was made for a model of this architecture and these shapes.

        Raises
        ------
        PlanError
            If the model lacks a module, a shape differs, or anything else about the architecture does.
        TypeError
            If a module is not a plain linear layer.
        """
        with unrolled(model):
            modules = dict(model.named_modules(remove_duplicate=False))
        for entry in self.entries:
            if entry.name not in modules:
                raise PlanError(f"the plan names {entry.name}, which this model does not have: it is for another model")
            shape = tuple(dense_weight(modules[entry.name], entry.name)[0].shape)
            if shape != entry.shape:
                raise PlanError(
                    f"the plan expects {entry.name} of shape {entry.shape}, this model has {shape}: it is "
                    "for another model"
                )
        if fingerprint(model) != self.fingerprint:
            raise PlanError(
                f"the plan was made for another model ({self.model or 'of unknown origin'}): modules and "
                "shapes differ outside its entries; make a plan for this one"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "precision": self.precision,
            "calibration": self.calibration,
            "calibration_tokens": self.calibration_tokens,
            "calibration_precision": self.calibration_precision,
            "angular": {str(layer): distance for layer, distance in self.angular.items()},
            "versions": dict(self.versions),
            "own_text": self.own_text,
            "correction": self.correction,
            "targeted_parameters": self.targeted_parameters,
            "model_parameters": self.model_parameters,
            "kept": self.kept,
            "model_kept": self.model_kept,
            "entries": [entry.to_dict() for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a plan from JSON types.

        Raises
        ------
        PlanError
            If the format is newer than this package, a field is unknown or missing, or a value is out of
            range.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"a plan must be a JSON object, got {type(data).__name__}")
        version = data.get("format_version")
        if not isinstance(version, int):
            raise PlanError(f"`format_version` of a plan must be an integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise PlanError(
                f"the plan has format version {version}, this package reads up to {FORMAT_VERSION}: upgrade "
                "cur-decomposition"
            )
        known = {f.name for f in fields(cls)}
        _refuse_unknown(data, known | {"format_version", "kept", "model_kept"}, "the plan")  # both follow from the rest
        _require(data, ("entries", "fingerprint"), "the plan")
        values = {key: value for key, value in data.items() if key in known}
        if version == 1:  # which knew only none, or as much as was given
            values["own_text"] = float(values.get("own_text", 0.0))
        values["entries"] = tuple(PlanEntry.from_dict(entry) for entry in data["entries"])
        values["angular"] = {int(layer): float(value) for layer, value in data.get("angular", {}).items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        with replace_file(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a JSON file; see :meth:`from_dict`."""
        data = read_object(path, remedy="make it again, or name another", error=PlanError)
        try:
            return cls.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = error if isinstance(error, ValueError) else f"malformed ({error!r})"
            raise PlanError(f"{path} cannot be carried out: {reason}; make it again, or name another") from error


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names and shapes of all parameters: what one architecture and size share.

    Weights and dtype do not enter, so that a plan made in float32 can be replayed on the same model in
    bfloat16.
    """
    with unrolled(model):  # whether experts lie in one parameter or in many does not matter
        shapes = sorted((name, list(parameter.shape)) for name, parameter in model.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def is_multiple(value: Any) -> bool:
    """Tell whether a value is a finite number that is at least 0, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf


def _refuse_unknown(data: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(data) - known):
        raise PlanError(f"{what} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _require(data: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    if missing := [name for name in names if name not in data]:
        raise PlanError(f"{what} lacks {', '.join(missing)}")
