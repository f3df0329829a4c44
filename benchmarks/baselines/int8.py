"""Weight-only int8: every row of a matrix as integers from -127 to 127 and one scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["round_", "rounded"]


def rounded(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (int8, the shape of `W`) and scales (a column) whose product is nearest to `W`, row by row.

    The largest magnitude of a row is 127 times its scale, so that no entry is off by more than half a scale.
    """
    scale = W.abs().amax(1, keepdim=True) / 127
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(W / safe).to(torch.int8), scale


@torch.no_grad()
def round_(model: nn.Module, names: Sequence[str]) -> int:
    """Round all linear layers at and below the named modules, in place, and return the bytes that they take then.

    A scale takes two bytes. The layers go on computing with what the integers stand for.
    """
    stored = 0
    for name in names:
        for part in model.get_submodule(name).modules():
            if type(part) is nn.Linear:
                integers, scale = rounded(part.weight)
                part.weight.copy_(integers * scale)
                stored += integers.numel() + 2 * scale.numel()
    return stored
