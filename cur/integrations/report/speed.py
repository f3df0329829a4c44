"""How fast the compressed layers of a model multiply on this machine, and by which kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.kernels import times
from cur.integrations.nn import CompressedLinear, GridLinear, cells, compressed_modules

__all__ = ["LayerSpeed", "layer_speeds"]

TOKENS = (1, 512)
"""A token that is written, and a text that is read."""


@dataclass(frozen=True, kw_only=True)
class LayerSpeed:
    """The speed of the layers of one kind: of one shape, layout, rank and grid.

    Attributes
    ----------
    shape : str
        Outputs and inputs of the dense layer.
    layout : str
        The layout of the layers.
    rank : str
        Rank, and inner rank if there is one.
    grid : str
        What the factors are rounded to, in words; empty if they are not.
    count : int
        The number of such layers in the model.
    tokens : int
        The number of tokens in a call.
    seconds, dense : float
        The time of a call, and that of the dense layer in the same dtype.
    kernels : tuple of str
        What multiplies the rounded factors.
    """

    shape: str
    layout: str
    rank: str
    grid: str
    count: int
    tokens: int
    seconds: float
    dense: float
    kernels: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {**asdict(self), "kernels": list(self.kernels)}


@torch.no_grad()
def layer_speeds(model: nn.Module, tokens: Sequence[int] = TOKENS) -> list[LayerSpeed]:
    """Time the compressed layers of a model beside dense ones, with random inputs, one call of each kind in turn.

    Parameters
    ----------
    model : nn.Module
        The model with compressed layers.
    tokens : sequence of int, optional
        Numbers of tokens in a call. By default one, and 512.

    Returns
    -------
    list of LayerSpeed
        One for each kind of layers and number of tokens.
    """
    kinds: dict[tuple[str, ...], list[CompressedLinear]] = {}
    for layer in compressed_modules(model).values():
        if not layer.by_inputs:  # a table multiplies nothing but what it has looked up
            said = cells(layer)
            key = (said["shape"], said["layout"], said["rank"], "" if layer.grid is None else str(layer.grid))
            kinds.setdefault(key, []).append(layer)
    found: list[LayerSpeed] = []
    for (shape, layout, rank, grid), layers in kinds.items():
        for count in tokens:
            seconds, dense = _timed(layers, count)
            parts = [part for part in layers[0].modules() if isinstance(part, GridLinear)]
            names = Counter(part.kernel(count) for part in parts)
            found.append(
                LayerSpeed(
                    shape=shape,
                    layout=layout,
                    rank=rank,
                    grid=grid,
                    count=len(layers),
                    tokens=count,
                    seconds=seconds,
                    dense=dense,
                    kernels=tuple(names),
                )
            )
    return found


def _timed(layers: Sequence[CompressedLinear], tokens: int) -> tuple[float, float]:
    """Return the seconds of a call of such layers, and of dense ones."""
    like = next(part for part in layers[0].parameters() if part.is_floating_point())
    part = layers[0].applied
    m, n = part.out_features, part.in_features
    place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    x = torch.randn(tokens, n, **place)
    # as many weights as it takes for none of them to stay in a cache, as in a model, and no more than this one has
    ours: list[Callable[[Tensor], Tensor]] = [layer.applied for layer in layers]
    del ours[times.copies(m * n * like.element_size(), tokens) :]
    dense = [_applied(torch.randn(m, n, **place)) for _ in ours]
    for run in ours:
        run(x)
    found = times.measured({"ours": ours, "dense": dense}, x)
    return found["ours"], found["dense"]


def _applied(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, weight)
