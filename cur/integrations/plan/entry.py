"""What happens to one linear layer: the base of the entries of a plan, and the methods that a plan can name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cur._lib.errors import CURError, warn
from cur.integrations.nn import IntegerGrid, layer_class

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

    from cur.integrations.nn import CompressedLinear

__all__ = ["METHODS", "PlanEntry", "PlanError", "read_entry", "refuse_unknown", "register_method", "require"]

METHODS: dict[str, tuple[type[PlanEntry], ...]] = {}
"""By the name of each method the kinds of entries that have it; one of your own is added by :func:`register_method`."""

# What is written of every entry, in this order, whether or not it means anything for the method.
_WRITTEN: dict[str, Any] = {
    "name": "",
    "shape": [],
    "rank": 0,
    "layout": "cur",
    "method": "cur",
    "importance": "wanda",
    "link": "optimal",
    "subspace": "exact",
    "gradients": False,
    "damping": 0.0,
    "consumer": None,
    "inner_rank": None,
    "predicted": None,
}

_Entry = TypeVar("_Entry", bound="type[PlanEntry]")


class PlanError(CURError, ValueError):
    """A plan cannot be read, or does not fit the model."""


class _Former(type):
    """For one release, lets the base be called with the fields of every method, as when it was all of them."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        if cls is not PlanEntry:
            return super().__call__(*args, **given)
        warn(
            "PlanEntry(...) is what entries of all methods have in common now; make one of "
            "cur.integrations.plan.methods, or read_entry(...) from its fields",
            DeprecationWarning,
        )
        return read_entry(given)


@dataclass(frozen=True, kw_only=True)
class PlanEntry(metaclass=_Former):
    """What happens to one linear layer; the base of one class for each method.

    A method is one such class, made known by :func:`register_method`, with its own fields and rules, and a function
    that makes its layers, made known to :mod:`cur.integrations.factor`.

    Parameters
    ----------
    name : str
        Dotted name of the module in the model.
    shape : tuple of int
        Outputs m and inputs n of the layer.
    layout : str
        The layout of the factors, one of those that the method has.
    predicted : float or None
        What the plan expects the layer to cost: with gradients the increase of the loss in nats per token, to second
        order; without, the squared relative error of its outputs. For the method "cur" the squared error that no
        factorization of the rank goes below, relative and with every input feature counted by its norm. For the reader.
    grid : IntegerGrid or None
        The grid of few bits that what is stored is rounded to; None where it is not.

    Raises
    ------
    PlanError
        If a value is none that the method has.
    """

    method: ClassVar[str]
    """Its name in plans."""
    fits_inputs: ClassVar[bool] = False
    """Whether its layers may be fitted to the inputs that compressed layers before them give."""
    of_weight: ClassVar[bool] = True
    """Whether its rank is one of the weight, so that the weight's singular values can be shown beside it."""
    keys: ClassVar[Mapping[str, str]] = {}
    """Names of fields in the JSON, where they are others."""

    name: str
    shape: tuple[int, int]
    layout: str
    predicted: float | None = None
    grid: IntegerGrid | None = None

    def __post_init__(self) -> None:
        """Check what every entry has, and then what its method has."""
        shape: tuple[Any, ...] = self.shape  # read from JSON, it may be anything
        if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
            raise PlanError(f"`shape` of {self.name} must be two positive integers, got {self.shape!r}")
        if self.layout not in self.layouts():
            raise PlanError(
                f"`layout` of {self.name} must be one of {', '.join(self.layouts())} for the method {self.method!r}, "
                f"got {self.layout!r}"
            )
        if self.grid is not None and not isinstance(self.grid, IntegerGrid):
            raise PlanError(f"`grid` of {self.name} must be an IntegerGrid or None, got {self.grid!r}")
        self.check()

    def __getattr__(self, name: str) -> Any:
        """Return what entries of every method had a field for, for one release."""
        if name not in _WRITTEN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warn(f"entries of the method {self.method!r} have no field `{name}` any more", DeprecationWarning)
        return self.neurons if name == "rank" else _WRITTEN[name]

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Name the layouts that it can have.

        Returns
        -------
        sequence of str
            The names of the layouts.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise a PlanError if a value of its own is out of range."""

    def check_among(self, entries: Mapping[str, PlanEntry]) -> None:
        """Raise a PlanError if it does not belong together with the other entries of a plan, by name.

        Parameters
        ----------
        entries : mapping of str to PlanEntry
            All entries of the plan, by the names of their layers.
        """

    def check_model(self, model: nn.Module) -> None:
        """Raise a PlanError if it cannot be carried out on a model that has such a layer.

        Parameters
        ----------
        model : nn.Module
            The dense model that the plan is for.
        """

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the modules whose inputs it is made by, its own first."""
        return (self.name,)

    @property
    def layer_type(self) -> type[CompressedLinear]:
        """The type of the layer that it asks for."""
        return layer_class(self.layout)

    @property
    def ranks(self) -> tuple[int, int | None]:
        """The rank of the layer that it asks for, and the inner rank."""
        raise NotImplementedError

    def found(self, rank: int) -> Self:
        """Return the entry as applied, with the rank that was found.

        Parameters
        ----------
        rank : int
            The rank that the factorization found.
        """
        return self

    @property
    def made_with(self) -> str:
        """The name of the entry that it is made together with, by default its own."""
        return self.name

    @property
    def needs_moments(self) -> bool:
        """Whether full second moments of inputs are needed to carry it out."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether second moments of output gradients are."""
        return False

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return in one sentence, for a model card, what was done by these entries of the method.

        Parameters
        ----------
        entries : sequence
            The entries of this method in the plan.
        """
        return f"{len(entries)} layers were made by the method `{cls.method}`."

    @property
    def parameters(self) -> int:
        """Numbers kept in the factors (the bias, which stays, is not counted)."""
        return int(self.layer_type.parameter_count(*self.shape, *self.ranks))

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense weight."""
        return self.shape[0] * self.shape[1]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of what is stored of the layer, the bias left out.

        Parameters
        ----------
        dtype : torch.dtype
            The dtype of the dense weight.
        """
        return int(self.layer_type.nbytes(*self.shape, *self.ranks, dtype=dtype, grid=self.grid))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON types, with ``parameters`` for the reader's information.

        A field that not every entry is written with is left out where it has its default.
        """
        values = ((key, getattr(self, one.name), one.default) for key, one in _keys(type(self)).items())
        own = {key: value for key, value, default in values if key in _WRITTEN or value != default}
        if self.grid is not None:
            own["grid"] = self.grid.spec()
        return {
            **_WRITTEN,
            **own,
            "shape": list(self.shape),
            "method": self.method,
            "parameters": self.parameters,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanEntry:
        """Read an entry of any method; see :func:`read_entry`.

        Parameters
        ----------
        data : mapping
            The fields of an entry, as JSON types.

        Returns
        -------
        PlanEntry
            The entry, of the class of its method.
        """
        return read_entry(data)


def register_method(entry_type: _Entry) -> _Entry:
    """Make a kind of entry known under its method, beside those of other layouts; a class decorator.

    Parameters
    ----------
    entry_type : _Entry
        The class of the entries.

    Returns
    -------
    _Entry
        The class, as it is.

    Raises
    ------
    ValueError
        If another kind has the method and one of the layouts.
    """
    known = [kind for kind in METHODS.get(entry_type.method, ()) if kind is not entry_type]
    for kind in known:
        if taken := set(kind.layouts()) & set(entry_type.layouts()):
            raise ValueError(
                f"`method` {entry_type.method!r} of {entry_type.__name__} is that of {kind.__name__} in the layout "
                f"{min(taken)!r}; choose another name"
            )
    METHODS[entry_type.method] = (*known, entry_type)
    return entry_type


def read_entry(data: Mapping[str, Any]) -> PlanEntry:
    """Make the entry of its method from the fields of all methods, as JSON types.

    Fields that the method does not have must be as they are written of it. ``parameters`` follows from the rest and is
    not read, so that a rank can be edited alone.

    Parameters
    ----------
    data : mapping
        The fields of an entry, as JSON types.

    Returns
    -------
    PlanEntry
        The entry, of the class of its method.

    Raises
    ------
    PlanError
        If the method, the layout or a field is unknown, a field is missing, or a value is out of range.
    """
    name = data.get("name", "?")
    method, layout = (data.get(key, _WRITTEN[key]) for key in ("method", "layout"))
    if not isinstance(method, str) or method not in METHODS:
        raise PlanError(f"`method` of {name} must be one of {', '.join(METHODS)}, got {method!r}")
    kinds = METHODS[method]
    kind = next((kind for kind in kinds if layout in kind.layouts()), None)
    if kind is None:
        known = ", ".join(name for kind in kinds for name in kind.layouts())
        raise PlanError(f"`layout` of {name} must be one of {known} for the method {method!r}, got {layout!r}")
    own = _keys(kind)
    refuse_unknown(data, {*_WRITTEN, *own, "parameters"}, f"entry {name!r}")
    require(data, [key for key, one in own.items() if one.default is MISSING and key != "layout"], f"entry {name!r}")
    for key in _WRITTEN.keys() - own.keys() - {"method"}:
        if data.get(key, _WRITTEN[key]) != _WRITTEN[key]:
            theirs = " or ".join(repr(name) for name, kinds in METHODS.items() if any(key in _keys(k) for k in kinds))
            raise PlanError(
                f"`{key}` of {name} is for the method {theirs} alone, got {data[key]!r}; in the layout {layout!r} of "
                f"{method!r} it must be {json.dumps(_WRITTEN[key])}"
            )
    if not isinstance(data["shape"], (list, tuple)):
        raise PlanError(f"`shape` of {name} must be two positive integers, got {data['shape']!r}")
    values = {one.name: data[key] for key, one in own.items() if key in data}
    if values.get("grid") is not None:
        try:
            values["grid"] = IntegerGrid.from_spec(values["grid"])
        except ValueError as error:
            raise PlanError(f"`grid` of {name} is none: {error}") from error
    return kind(**{**values, "layout": layout, "shape": tuple(data["shape"])})


def _keys(kind: type[PlanEntry]) -> dict[str, Field[Any]]:
    """Return the fields of a kind of entries by their names in the JSON."""
    return {kind.keys.get(one.name, one.name): one for one in fields(kind)}


def refuse_unknown(data: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raise a PlanError for fields that nothing here knows.

    Parameters
    ----------
    data : mapping
        The fields to look through.
    known : set of str
        The names that are known.
    what : str
        The name that errors use for the fields' owner.

    Raises
    ------
    PlanError
        If a field is not known.
    """
    if unknown := sorted(set(data) - known):
        raise PlanError(f"{what} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def require(data: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    """Raise a PlanError for fields that are missing.

    Parameters
    ----------
    data : mapping
        The fields to look through.
    names : sequence of str
        The names that must be there.
    what : str
        The name that errors use for the fields' owner.

    Raises
    ------
    PlanError
        If a field is missing.
    """
    if missing := [name for name in names if name not in data]:
        raise PlanError(f"{what} lacks {', '.join(missing)}")
