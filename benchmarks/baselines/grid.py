"""Rounding to the nearest number of a grid over the whole range of each group, and what a grid takes to store."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grid", "by_groups", "grid_bytes", "round_to_nearest", "whole_range"]

STEP_BYTES = 2
"""Steps are stored in half precision."""


class Grid(NamedTuple):
    """Steps and zeros of the groups of a matrix, float64, shape (m, n / group, 1), and the largest integer."""

    steps: Tensor
    zeros: Tensor
    most: int


def whole_range(W: Tensor, *, bits: int, group: int) -> Grid:
    """Return the grid whose ends are the least and the largest number of each group, 0 among its numbers.

    Steps are rounded to half precision, zeros are integers.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight, float64.
    bits : int
        The bits of an integer.
    group : int
        How many neighbours in a row share a step, a divisor of n.
    """
    parts = W.reshape(len(W), -1, group)
    least = parts.amin(-1, keepdim=True).clamp(max=0.0)
    most = parts.amax(-1, keepdim=True).clamp(min=0.0)
    levels = 2**bits - 1
    tiny = torch.finfo(torch.float16).tiny
    steps = ((most - least) / levels).clamp(min=tiny).half().double()
    return Grid(steps, (-least / steps).round().clamp(0, levels), levels)


def by_groups(W: Tensor, group: int, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Round all groups of rows, of which the last may be shorter, by a function of what a length divides and it."""
    whole = W.shape[1] // group * group
    parts = [(W[:, :whole], group), (W[:, whole:], W.shape[1] - whole)]
    return torch.cat([rounded(part, length) for part, length in parts if part.shape[1]], 1)


def round_to_nearest(W: Tensor, *, bits: int, group: int) -> Tensor:
    """Return the nearest numbers on the grid over the whole range of each group, shape (m, n).

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight, float64.
    bits : int
        The bits of an integer.
    group : int
        How many neighbours in a row share a step; the last group of a row may be shorter.
    """

    def rounded(part: Tensor, length: int) -> Tensor:
        steps, zeros, most = whole_range(part, bits=bits, group=length)
        x = part.reshape(len(part), -1, length)
        return (((x / steps + zeros).round().clamp(0, most) - zeros) * steps).reshape(part.shape)

    return by_groups(W, group, rounded)


def grid_bytes(m: int, n: int, *, bits: int, group: int, zero_bits: int) -> float:
    """Return the bytes of an m x n matrix of integers, with a step and a zero for each group."""
    groups = m * -(-n // group)
    return m * n * bits / 8 + groups * (STEP_BYTES + zero_bits / 8)
