"""What of a compressed model a training loop may change."""

from __future__ import annotations

from torch import Tensor, nn

from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.nn import compressed_modules, grids_of

__all__ = ["trainable"]


def trainable(model: nn.Module, /) -> dict[str, Tensor]:
    """Name the parameters of the compressed layers that may learn, in every layout; nothing is changed.

    In the layout ``"cur"`` these are the cores ``U``, between columns and rows of the dense weight that stay. In the
    others it is the factor that a core would be part of; a training loop changes all of it, where
    :func:`cur.healing.heal` keeps to the span of what was there. Layers before neurons that were removed have none.

    Parameters
    ----------
    model : nn.Module
        A model with compressed layers.

    Returns
    -------
    dict of str to nn.Parameter
        Parameters by their names in the model, at least one.

    Raises
    ------
    ValueError
        If the model has no compressed layer, none of which anything may learn, an adapter, or one that is offloaded.

    Examples
    --------
    >>> from torch import nn
    >>> from cur.integrations.nn import CURLinear
    >>> model = nn.Sequential(CURLinear(6, 4, 2), nn.Linear(4, 4))
    >>> {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
    {'0.U.weight': (2, 2)}
    """
    refuse_adapters(model)
    layers = compressed_modules(model)
    if not layers:
        raise ValueError("`model` has no compressed layer; compress it first, or train it like any other")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    learning = [
        what.factor for layer in layers.values() if layer.grid is None and (what := layer.trainable()) is not None
    ]
    found = {names[id(factor)]: factor for factor in learning}
    if not found:
        grids = grids_of(layers.values())
        kinds = ", ".join(sorted({layer.layout for layer in layers.values()}))
        why = f"is rounded to {grids}" if grids else f"has compressed layers of the layouts {kinds} alone"
        source = ", or train the checkpoint that it was made from, and round it then" if grids else ""
        raise ValueError(f"`model` {why}, of which nothing learns; put an adapter of PEFT beside its layers{source}")
    offloaded = [name for name, factor in found.items() if factor.is_meta]
    if offloaded:
        raise ValueError(f"{', '.join(offloaded[:5])} of `model` are offloaded; load the model onto a device")
    return found
