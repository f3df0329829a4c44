"""AWQ (activation-aware weight quantization, arXiv 2306.00978): inputs that are large get a finer share of the grid.

What layers read is divided by ``s = mean|x|^alpha`` for each input and their columns are multiplied by it, so the
function is the same and the columns of large inputs are rounded more finely. One `s` serves all layers that read the
same, and `alpha` is the number between 0 and 1 with which the outputs of these layers move least. The paper's search
for shorter ranges of the groups is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.baselines.grid import round_to_nearest

__all__ = ["activation_aware"]

ALPHAS = 20
"""The paper's grid: this many values from 0 on, below 1."""


def activation_aware(
    weights: Sequence[Tensor], moment: Tensor, magnitude: Tensor, *, bits: int, group: int
) -> tuple[list[Tensor], float]:
    """Return the weights, rounded under the best scales, with the scales divided out again, and `alpha`.

    Parameters
    ----------
    weights : sequence of Tensor, shape (m, n)
        The weights of layers that read the same, float64.
    moment : Tensor, shape (n, n)
        ``E[x x^T]`` of what they read.
    magnitude : Tensor, shape (n,)
        ``E|x|`` of each input.
    bits : int
        The bits of an integer.
    group : int
        How many neighbours in a row share a step; the last group of a row may be shorter.
    """
    sizes = magnitude.clamp(min=1e-6 * float(magnitude.mean()))
    G = moment.float()  # losses are only compared with one another
    best: list[Tensor] = []
    least, chosen = float("inf"), 0.0
    for alpha in torch.arange(ALPHAS, dtype=torch.float64) / ALPHAS:
        s = sizes**alpha
        s = s / (s.max() * s.min()).sqrt()
        rounded = [round_to_nearest(W * s, bits=bits, group=group) / s for W in weights]
        errors = [(W - Q).float() for W, Q in zip(weights, rounded, strict=True)]
        loss = sum(float(torch.linalg.vecdot(E @ G, E).double().sum()) for E in errors)
        if loss < least:
            best, least, chosen = rounded, loss, float(alpha)
    return best, chosen
