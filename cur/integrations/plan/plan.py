"""The plan: which layers of a model are replaced, at which rank and in which layout.

A plan is data. It can be printed, saved as JSON, edited by hand and replayed on the same architecture;
nothing is decided while layers are swapped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cur._lib.atomic import replace_file
from cur.integrations.files.reading import read_object
from cur.integrations.model.pointwise import LinearConvolution
from cur.integrations.model.unrolling import unrolled
from cur.integrations.nn import dense_weight
from cur.integrations.plan.entry import METHODS, PlanEntry, PlanError, read_entry, refuse_unknown, require
from cur.integrations.plan.methods import SUBSPACES
from cur.scores import IMPORTANCES, LINKS

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

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Of the method ``"cur"``; the others, whose weights have a large range, compute in float64."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision of one compression.

    Parameters
    ----------
    entries : tuple of PlanEntry
        The entries, one for each layer to replace.
    fingerprint : str
        The :func:`fingerprint` of the dense model that the plan is for.
    model : str
        The place that the dense model came from, for the reader.
    seed : int
        The seed of every random choice.
    precision : str
        The dtype that factorizations compute in, one of :data:`PRECISIONS`.
    calibration : str or None
        SHA-256 of the calibration tokens, or None when it is not known.
    calibration_tokens : int
        The number of tokens that the model was measured on.
    calibration_precision : str
        The precision of matrix products in the passes over that text, ``"float32"`` for instance; empty where it is not
        known.
    angular : mapping of int to float
        Angular distance between the outputs of layer i - 1 and layer i, in units of pi.
    versions : mapping of str to str
        Versions of the libraries that made the plan.
    own_text : float
        The amount of text that the model wrote itself to be measured on as well, as a multiple of the text it was
        given.
    correction : float
        The share, from 0 to 1, of the error in a layer's inputs, left by compressed layers before it, that the layer
        corrects; 0 corrects nothing. Anything else needs the text again when the plan is applied.
    targeted_parameters : int or None
        Numbers in the dense weights of all layers that share a budget, those included that stay dense; None for a plan
        without a budget.
    model_parameters : int or None
        Numbers in the whole dense model, likewise.
    dense : mapping of str to str
        Why targets stay dense that nothing could be gained or measured of: a sentence by the name of each.
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
    dense: Mapping[str, str] = field(default_factory=dict)

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
        named = {entry.name: entry for entry in self.entries}
        for entry in self.entries:
            entry.check_among(named)

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
        return any(entry.needs_moments for entry in self.entries)

    # A plan says neither how gradients were come by nor how many windows were in a pass.
    gradient_checkpointing = False
    batch_size = 1

    def as_done(self, layers: Iterable[Any]) -> Plan:
        """Return the plan with the ranks that were found, from objects with a `rank` in the order of its entries.

        Parameters
        ----------
        layers : iterable
            Objects with a ``rank``, in the order of the entries.
        """
        entries = (entry.found(done.rank) for entry, done in zip(self.entries, layers, strict=True))
        return replace(self, entries=tuple(entries))

    @property
    def needs_gradients(self) -> bool:
        """Whether second moments of the gradients at outputs are needed to carry it out."""
        return any(entry.needs_gradients for entry in self.entries)

    def check(self, model: nn.Module) -> None:
        """Check that the plan was made for a model of this architecture and these shapes.

        Parameters
        ----------
        model : nn.Module
            The model that the plan should be for.

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
                    raise PlanError(
                        f"the plan names {entry.name}, which this model does not have: it is for another model"
                    )
                module = modules[entry.name]
                shape = tuple(dense_weight(module, entry.name)[0].shape)
                if not entry.layer_type.replaces(module):
                    raise PlanError(
                        f"the plan stores {entry.name} in the layout {entry.layout!r}, which is not for a "
                        f"{type(module).__name__}; choose another"
                    )
                if shape != entry.shape:
                    raise PlanError(
                        f"the plan expects {entry.name} of shape {entry.shape}, this model has {shape}: it is "
                        "for another model"
                    )
                entry.check_model(model)
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
            **({"dense": dict(self.dense)} if self.dense else {}),
            "entries": [entry.to_dict() for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a plan from JSON types.

        Parameters
        ----------
        data : mapping
            The plan, as JSON types.

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
        refuse_unknown(data, known | {"format_version", "kept", "model_kept"}, "the plan")  # both follow from the rest
        require(data, ("entries", "fingerprint"), "the plan")
        values = {key: value for key, value in data.items() if key in known}
        if version == 1:  # which knew only none, or as much as was given
            values["own_text"] = float(values.get("own_text", 0.0))
        values["entries"] = tuple(read_entry(entry) for entry in data["entries"])
        values["angular"] = {int(layer): float(value) for layer, value in data.get("angular", {}).items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Parameters
        ----------
        path : path
            The path of the file to write.
        """
        with replace_file(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a JSON file; see :meth:`from_dict`.

        Parameters
        ----------
        path : path
            The path of the file to read.

        Raises
        ------
        PlanError
            If the file does not hold a plan that can be applied.
        """
        data = read_object(path, remedy="make it again, or name another", error=PlanError)
        try:
            return cls.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = error if isinstance(error, ValueError) else f"malformed ({error!r})"
            raise PlanError(f"{path} cannot be applied: {reason}; make it again, or name another") from error


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names and shapes of all parameters: what one architecture and size share.

    Weights and dtype do not enter, so that a plan made in float32 can be replayed on the same model in
    bfloat16.

    Parameters
    ----------
    model : nn.Module
        The model to hash, whose values do not matter.
    """
    with unrolled(model):  # whether experts lie in one parameter or in many does not matter
        convolutions = {
            f"{name}.linear": part for name, part in model.named_modules() if isinstance(part, LinearConvolution)
        }
        shapes = []
        for name, parameter in model.named_parameters():
            place, _, key = name.rpartition(".")
            if (part := convolutions.get(place)) is not None:  # by the names and shapes that they have themselves
                name, parameter = f"{place.removesuffix('.linear')}.{key}", getattr(part, key)
            shapes.append((name, list(parameter.shape)))
        shapes.sort()
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def is_multiple(value: Any) -> bool:
    """Tell whether a value is a finite number that is at least 0, and no truth value.

    Parameters
    ----------
    value : Any
        The value to look at.

    Returns
    -------
    bool
        Whether it is such a number.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf
