"""From one layout of a compressed model to another."""

from __future__ import annotations

from transformers import PreTrainedModel

from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.nn import compressed_modules, factored, grids_of, learn_as_, swap_
from cur.integrations.plan.layouts import PURPOSES, choose_layout
from cur.integrations.store.format import mark_

__all__ = ["convert_"]


def convert_(model: PreTrainedModel, layout: str = "auto", *, purpose: str = "inference") -> dict[str, str]:
    """Bring every factored layer of a model to a layout, in place; the function stays the same up to rounding.

    Layers of a type with one layout only, such as those that keep some neurons, stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        A model with compressed layers.
    layout : str, default "auto"
        A layout of factored weights, or ``"auto"`` for the one that serves the purpose best, layer by layer; a layer
        that no layout would make faster than dense keeps its own.
    purpose : {"inference", "training"}, default "inference"
        What the layout ``"auto"`` is to serve: fast inference, or training of the core.

    Returns
    -------
    dict of str to str
        The layout of each of these layers now.

    Raises
    ------
    ValueError
        If the layout or the purpose is unknown, or the model has no factored layers, an adapter, or is rounded.
    """
    if layout not in ("auto", *factored()):
        raise ValueError(f"`layout` must be one of auto, {', '.join(factored())}, got {layout!r}")
    if purpose not in PURPOSES:
        raise ValueError(f"`purpose` must be one of {', '.join(PURPOSES)}, got {purpose!r}")
    refuse_adapters(model)
    found = compressed_modules(model)
    possible = set(factored()) if layout == "auto" else {layout}
    layers = {name: layer for name, layer in found.items() if not possible.isdisjoint(layer.conversions())}
    if grids := grids_of(found.values()):
        raise ValueError(
            f"`model` is rounded to {grids}; convert the checkpoint that it was made from, and round it then"
        )
    if not layers:
        why = "none of its compressed layers has another layout" if found else ""
        raise ValueError(f"`model` has no factored layers; {why or 'compress it first'}")
    wanted = {
        name: choose_layout(layer.shape, purpose, rank=layer.rank, among=layer.conversions()) or layer.layout
        if layout == "auto"
        else layout
        for name, layer in layers.items()
    }
    made = {name: layer.to_layout(wanted[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        learn_as_(made[name], layer)
    swap_(model, made)
    mark_(model)
    return wanted
