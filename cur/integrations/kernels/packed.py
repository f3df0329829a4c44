"""PyTorch's own products in half precision with weights in four and in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from cur.integrations.kernels.entry import kernel
from cur.integrations.kernels.weight import GridWeight

__all__: list[str] = []

_HALVES = (torch.bfloat16, torch.float16)

# Beyond, they only take longer than what multiplies out.
_MOST = 64


def _fits_steps(weight: GridWeight, dtype: torch.dtype) -> bool:
    """Tell whether the steps are numbers of a dtype: in another they would be rounded, each for a whole group."""
    return bool(torch.equal(weight.scale.to(dtype).to(weight.scale.dtype), weight.scale))


def _takes_four(weight: GridWeight, dtype: torch.dtype) -> bool:
    m, n = weight.shape
    # The offset (8 - zero) step would be rounded as well.
    return (
        dtype in _HALVES
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and weight.is_symmetric
        and weight.bits <= 4
        and weight.group in (32, 64, 128, 256)
        and n % weight.group == 0
        and m % 16 == 0
        and _fits_steps(weight, dtype)
    )


def _pack_four(weight: GridWeight, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
    # Its integers begin at 0, and 8 stands for 0.
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.integers.int() + 8, 1)
    steps = weight.scale.T.to(dtype)
    return packed, weight.group, torch.stack([steps, torch.zeros_like(steps)], -1).contiguous()


@kernel(
    "torch, 4 bits",
    prepare=_pack_four,
    takes=_takes_four,
    held=lambda weight, dtype: weight.integers.numel() // 2,
    most=_MOST,
)
def _four(packed: tuple[Tensor, int, Tensor], x: Tensor) -> Tensor:
    """Multiply with a weight in four bits."""
    integers, group, steps = packed
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, integers, group, steps)
    return y


def _takes_eight(weight: GridWeight, dtype: torch.dtype) -> bool:
    m, n = weight.shape
    # Of rows that are no multiple of its vectors, it reads past the end.
    return (
        dtype in _HALVES
        and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        and weight.is_symmetric
        and weight.group == n
        and n % 64 == 0
        and m % 16 == 0
        and _fits_steps(weight, dtype)
    )


def _pack_eight(weight: GridWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weight.integers.contiguous(), weight.scale[:, 0].to(dtype).contiguous()


@kernel(
    "torch, 8 bits",
    prepare=_pack_eight,
    takes=_takes_eight,
    held=lambda weight, dtype: weight.integers.numel(),
    most=_MOST,
)
def _eight(packed: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Multiply with a weight in eight bits, whose rows have one step each."""
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x, *packed)
    return y
