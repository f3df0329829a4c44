"""Multiplying out: the whole weight once, or some rows at a time in every product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cur.integrations.kernels.entry import kernel
from cur.integrations.kernels.weight import GridWeight

__all__ = ["BLOCK", "into_inputs"]

# Entries that are multiplied out at a time: a MiB in single precision, which caches of the second level hold.
BLOCK = 1 << 18


def _floating(weight: GridWeight, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _half(weight: GridWeight, dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _in_single(weight: GridWeight, dtype: torch.dtype) -> Tensor:
    return weight.dense(torch.float32)


def _itself(weight: GridWeight, dtype: torch.dtype) -> GridWeight:
    return weight


def _bytes_of_integers(weight: GridWeight, dtype: torch.dtype) -> int:
    return weight.integers.numel()


@kernel(
    "multiplied out",
    prepare=GridWeight.dense,
    takes=_floating,
    held=lambda weight, dtype: weight.integers.numel() * dtype.itemsize,
    plain=True,
    expands=True,
)
def _whole(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply with the dense weight, which is held in the dtype of the inputs."""
    return nn.functional.linear(x, weight)


@kernel(
    "multiplied out, in float32",
    prepare=_in_single,
    takes=_half,
    held=lambda weight, dtype: weight.integers.numel() * 4,
    plain=True,
    expands=True,
)
def _whole_in_single(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply in single precision with the dense weight: faster than in half where a processor has no units for it."""
    return nn.functional.linear(x.float(), weight).to(x.dtype)


@kernel("rows multiplied out in turn", prepare=_itself, takes=_floating, held=_bytes_of_integers, plain=True)
def _in_blocks(weight: GridWeight, x: Tensor) -> Tensor:
    """Multiply out some rows at a time, and with them."""
    m, n = weight.shape
    y = x.new_empty(x.shape[0], m)
    rows = max(1, BLOCK // max(n, 1))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        y[:, start:stop] = x @ weight.rows(start, stop).dense(x.dtype).T
    return y


@kernel("rows multiplied out in turn, in float32", prepare=_itself, takes=_half, held=_bytes_of_integers, plain=True)
def _in_blocks_in_single(weight: GridWeight, x: Tensor) -> Tensor:
    """Multiply out some rows at a time, and with them in single precision."""
    return _in_blocks(weight, x.float()).to(x.dtype)


def into_inputs(weight: GridWeight, gradient: Tensor) -> Tensor:
    """Take a gradient of outputs back to the inputs, some rows at a time.

    Parameters
    ----------
    weight : GridWeight
        The weight, m x n.
    gradient : Tensor
        The gradient with respect to the outputs, of shape (t, m).

    Returns
    -------
    Tensor
        The gradient with respect to the inputs, of shape (t, n).
    """
    m, n = weight.shape
    found = gradient.new_zeros(gradient.shape[0], n)
    rows = max(1, BLOCK // max(n, 1))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        found.addmm_(gradient[:, start:stop], weight.rows(start, stop).dense(gradient.dtype))
    return found
