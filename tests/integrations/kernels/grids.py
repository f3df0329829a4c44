"""Random weights on grids, for the tests of kernels."""

from __future__ import annotations

import torch

from cur.integrations.kernels import GridWeight

SHAPES = ((16, 64), (7, 50), (5, 33), (32, 160))
BITS = (2, 3, 4, 5, 6, 8)


def make(m: int, n: int, *, bits: int = 4, group: int | None = None, symmetric: bool = False) -> GridWeight:
    """Return a random weight; its steps are numbers of bfloat16, so that kernels that need that take it."""
    generator = torch.Generator().manual_seed(1000 * m + n + bits)
    group = n if group is None else group
    shape = (m, -(-n // group))
    scale = (torch.rand(shape, generator=generator) / 16 + 0.01).bfloat16().float()
    if symmetric:
        most = 2 ** (bits - 1) - 1
        q = torch.randint(-most, most + 1, (m, n), generator=generator, dtype=torch.int8)
        return GridWeight(q, scale, None, bits, group)
    q = torch.randint(0, 2**bits, (m, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return GridWeight(q, scale, zeros, bits, group)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)
