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
    whole = weight.group == weight.shape[1] and weight.is_symmetric
    return whole and dtype in (torch.float32, torch.bfloat16, torch.float16) and _adds_up()


@kernel(
    "integers, a step for each token",
    prepare=lambda weight, dtype: (weight.integers.T, weight.scale[:, 0].float()),
    takes=_takes,
    held=lambda weight, dtype: weight.integers.numel(),
    exact=False,
)
def _by_token(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Multiply with integers, of which a row has one step, inputs that are rounded to integers."""
    integers, steps = weight
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    rounded = torch.round(wide / largest).to(torch.int8)
    return torch._int_mm(rounded, integers).float().mul_(largest).mul_(steps).to(x.dtype)
