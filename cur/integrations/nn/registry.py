"""The types of compressed layers by the names that plans and checkpoints have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from cur.integrations.nn.base import CompressedLinear

__all__ = ["LAYOUTS", "Described", "cells", "layer_class", "ranks_of", "register"]

LAYOUTS: dict[str, type[CompressedLinear]] = {}
"""Layer type of each layout. A type of your own is added by :func:`register`, and then known to plans, checkpoints,
conversions, reports and healing. Layers of a type that is no :class:`~cur.integrations.nn.FactoredLinear` are made by a
method of your own: an entry of a plan (`plan/methods.py`) and its maker (`factor/`)."""

_Type = TypeVar("_Type", bound="type[CompressedLinear]")


def register(layer_type: _Type) -> _Type:
    """Make a layer type known under its layout; a class decorator.

    Parameters
    ----------
    layer_type : _Type
        The class of the layer type.

    Returns
    -------
    _Type
        The class, as it is.

    Raises
    ------
    ValueError
        If another type has the layout.
    """
    known = LAYOUTS.setdefault(layer_type.layout, layer_type)
    if known is not layer_type:
        raise ValueError(
            f"`layout` {layer_type.layout!r} of {layer_type.__name__} is that of {known.__name__}; choose another name"
        )
    return layer_type


def layer_class(layout: str) -> type[CompressedLinear]:
    """Return the layer type of a layout; a ValueError names the known ones.

    Parameters
    ----------
    layout : str
        The name of the layout.

    Raises
    ------
    ValueError
        If no layer type has that layout.
    """
    try:
        return LAYOUTS[layout]
    except KeyError:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}") from None


class Described(Protocol):
    """What is known of a compressed layer wherever it is mentioned: in a plan, a report, a checkpoint, a model."""

    @property
    def layout(self) -> str:
        """Name of the layer type."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the dense layer."""

    @property
    def ranks(self) -> tuple[int, int | None]:
        """Rank, or number of kept neurons; and the rank of what belongs to these, if that is factored as well."""


def cells(layer: Described) -> dict[str, str]:
    """Return what tables, cards and pages say of a layer: its shape, layout and rank, in the words of its type.

    Parameters
    ----------
    layer : Described
        The layer: its shape, layout and ranks.

    Examples
    --------
    >>> from cur.integrations.plan.methods import NeuronsEntry
    >>> cells(NeuronsEntry(name="down", shape=(6, 24), neurons=20, inner_rank=4))
    {'shape': '6 x 24', 'layout': 'inputs', 'rank': '20, 4'}
    """
    return layer_class(layer.layout).cells(*layer.shape, *layer.ranks)


def ranks_of(layer: Described) -> str:
    """Return the rank of a layer as tables have it.

    Parameters
    ----------
    layer : Described
        The layer: its shape, layout and ranks.
    """
    return cells(layer)["rank"]
