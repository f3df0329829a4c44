"""HQQ (half-quadratic quantization, Badri and Shaji 2023): zeros that suit the weights, by shrinking the large errors.

With ``Q_z(W)`` the numbers on a grid with zeros `z`, the sum of ``|W - Q_z(W)|^p`` with p below 1 is made small over
the zeros: large errors of a few weights are let be, for small ones of the others. Split into two variables,

    ``min over z, E of |E|_p^p + beta / 2 |E - (W - Q_z(W))|^2``,

it is solved in turns: `E` by shrinking, ``sign(x) max(|x| - |x|^(p - 1) / beta, 0)`` of ``x = W - Q_z(W)``, and each
zero as the mean of ``q - (W - E) / step`` over its group, with the integers `q` of the turn before; `beta` grows.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.baselines.grid import by_groups, whole_range

__all__ = ["half_quadratic"]

TURNS = 20
BETA, GROWTH = 10.0, 1.01


def half_quadratic(W: Tensor, *, bits: int, group: int, p: float = 0.7) -> Tensor:
    """Return the nearest numbers on a grid of whole ranges whose zeros were optimised, as far as that made errors less.

    Zeros are any numbers, stored in half precision.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight, float64.
    bits : int
        The bits of an integer.
    group : int
        How many neighbours in a row share a step; the last group of a row may be shorter.
    p : float, default 0.7
        As in the paper.
    """
    return by_groups(W, group, lambda part, length: _whole(part, bits, length, p))


def _whole(W: Tensor, bits: int, group: int, p: float) -> Tensor:
    """Round what the group divides."""
    steps, zeros, most = whole_range(W, bits=bits, group=group)
    parts = W.reshape(len(W), -1, group)
    best, least, beta = W, float("inf"), BETA
    for _ in range(TURNS + 1):
        q = (parts / steps + zeros).round().clamp(0, most)
        values = (q - zeros) * steps
        x = parts - values
        size = x.abs()
        loss = float((size**p).sum())
        if loss < least:
            best, least = values, loss
        # where an error is 0 its power is infinite, and it stays 0
        shrunk = x.sign() * (size - size ** (p - 1) / beta).clamp(min=0)
        zeros = (q - (parts - shrunk) / steps).mean(-1, keepdim=True).half().double()
        beta *= GROWTH
    return best.reshape(W.shape)
