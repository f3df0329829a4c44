"""Rounding to the nearest number of a grid over the whole range of each group, and what a grid takes to store."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grid", "grid_bytes", "round_to_nearest", "whole_range"]

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


def round_to_nearest(W: Tensor, *, bits: int, group: int) -> Tensor:
    """Return the nearest numbers on the grid over the whole range of each group, shape (m, n)."""
    steps, zeros, most = whole_range(W, bits=bits, group=group)
    parts = W.reshape(len(W), -1, group)
    return (((parts / steps + zeros).round().clamp(0, most) - zeros) * steps).reshape(W.shape)


def grid_bytes(m: int, n: int, *, bits: int, group: int, zero_bits: int) -> float:
    """Return the bytes of an m x n matrix of integers, with a step and a zero for each group."""
    groups = m * (n // group)
    return m * n * bits / 8 + groups * (STEP_BYTES + zero_bits / 8)
