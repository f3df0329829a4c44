"""Products of integers: inputs are rounded to eight bits, each token in steps of its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cur.integrations.kernels.entry import kernel
from cur.integrations.kernels.weight import GridWeight

__all__: list[str] = []


@functools.cache
def _adds_up() -> bool:
    """Tell whether products of large integers are right here: some processors let their sums of two overflow."""
    if not hasattr(torch, "_int_mm"):
        return False
    large = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(large, large.T) == 64 * 127 * 127).all() and (torch._int_mm(-large, large.T) < 0).all())


def _takes(weight: GridWeight, dtype: torch.dtype) -> bool:
    return weight.group == weight.shape[1] and dtype in (torch.float32, torch.bfloat16, torch.float16) and _adds_up()


def _prepare(weight: GridWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the integers, turned, the steps, and what the integers of a row are too large by."""
    steps = weight.scale[:, 0].float()
    if weight.zeros is None:
        return weight.integers.T, steps, None
    # Bytes with a sign have half of the range of those without.
    return (weight.integers.short() - 128).to(torch.int8).T, steps, weight.zeros[:, 0].float() - 128


@kernel(
    "integers, a step for each token",
    prepare=_prepare,
    takes=_takes,
    held=lambda weight, dtype: weight.integers.numel(),
    exact=False,
)
def _by_token(weight: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
    """Multiply with integers, of which a row has one step, inputs that are rounded to integers."""
    integers, steps, zeros = weight
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    rounded = torch.round(wide / largest).to(torch.int8)
    y = torch._int_mm(rounded, integers).float()
    if zeros is not None:
        y.sub_(rounded.sum(1, keepdim=True, dtype=torch.float32) * zeros)
    return y.mul_(largest).mul_(steps).to(x.dtype)
