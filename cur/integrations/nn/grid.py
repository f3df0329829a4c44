"""Grids of few bits: what numbers integers stand for, and how the integers are packed into bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BITS", "IntegerGrid", "pack", "unpack"]

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of an integer that lie together, from the lowest on: each part divides a byte."""

BITS = tuple(_PLANES)
"""How many bits an integer can have."""


@dataclass(frozen=True)
class IntegerGrid:
    """The numbers ``(q - zero) * step`` for integers of a few bits, with a step and a zero for each group of a row.

    Parameters
    ----------
    bits : int, default 8
        The bits of an integer: 2, 3, 4, 5, 6 or 8.
    group : int, optional
        How many neighbours in a row share a step, a multiple of 8; the last group of a row may be shorter. By default a
        row has one step.
    symmetric : bool, default True
        Whether 0 lies in the middle of the grid, which then has one number less and no zeros to store.

    Raises
    ------
    ValueError
        If bits or group are none of these.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be packed."""
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"`bits` must be one of {', '.join(map(str, BITS))}, got {self.bits!r}; take 4 or 8")
        if self.group is not None and (type(self.group) is not int or self.group < 8 or self.group % 8):
            raise ValueError(
                f"`group` must be a multiple of 8, so that groups begin at a byte, got {self.group!r}; 64 is usual, "
                "and for one step a row it is None, or row on the command line"
            )
        if type(self.symmetric) is not bool:
            raise ValueError(f"`symmetric` must be True or False, got {self.symmetric!r}")

    @property
    def signed(self) -> bool:
        """Whether integers are stored as they are, int8, and not packed."""
        return self.bits == 8 and self.symmetric

    @property
    def step_dtype(self) -> torch.dtype | None:
        """The dtype of a stored step, of which bfloat16 takes the same bytes; None for that of the layer."""
        return None if self == IntegerGrid() else torch.float16

    @property
    def offset(self) -> int:
        """What the integers of a symmetric grid are raised by before they are packed."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric and not self.signed else 0

    def groups(self, n: Any) -> Any:
        """Return the number of groups in a row of n entries; an array for an array.

        Parameters
        ----------
        n : int or array
            The number of entries of a row.
        """
        return n * 0 + 1 if self.group is None else -(-n // self.group)

    def row_bytes(self, n: Any) -> Any:
        """Return the bytes of the integers of a row of n entries; an array for an array.

        Parameters
        ----------
        n : int or array
            The number of entries of a row.
        """
        return sum(-(-n * bits // 8) for bits in _PLANES[self.bits])

    def bits_per_entry(self, n: int) -> float:
        """Return the bits that an entry of a row of n takes, steps and zeros included, with steps of two bytes.

        Parameters
        ----------
        n : int
            The number of entries of a row.

        Examples
        --------
        >>> IntegerGrid(4, 64, symmetric=False).bits_per_entry(1536)
        4.3125
        """
        zeros = 0 if self.symmetric else self.row_bytes(self.groups(n))
        return float(8 * (self.row_bytes(n) + 2 * self.groups(n) + zeros)) / n

    def spec(self) -> dict[str, Any]:
        """Return the grid as JSON types."""
        return {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}

    @classmethod
    def from_spec(cls, spec: Any) -> IntegerGrid:
        """Read what :meth:`spec` returned.

        Parameters
        ----------
        spec : Any
            The grid as JSON types.

        Returns
        -------
        IntegerGrid
            The grid that it describes.

        Raises
        ------
        ValueError
            If it is none.
        """
        if not isinstance(spec, Mapping) or set(spec) != {"bits", "group", "symmetric"}:
            raise ValueError(f"a grid must have `bits`, `group` and `symmetric`, got {spec!r}")
        return cls(**spec)

    def __str__(self) -> str:
        if self == IntegerGrid():
            return "int8"
        return f"{self.bits} bits" if self.group is None else f"{self.bits} bits in groups of {self.group}"


def pack(integers: Tensor, bits: int) -> Tensor:
    """Pack integers of a few bits along the last axis.

    A row is, for 3, 5 and 6 bits, the lower bits of all its entries and then the higher ones; each of these parts
    begins at a byte, and within a byte earlier entries have lower bits.

    Parameters
    ----------
    integers : Tensor, shape (..., n)
        From 0 to ``2^bits - 1``, uint8.
    bits : int
        The bits of an integer, among :data:`BITS`.

    Returns
    -------
    Tensor
        uint8, with ``IntegerGrid.row_bytes(n)`` entries along the last axis.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    parts, low = [], 0
    for width in _PLANES[bits]:
        each = 8 // width
        part = (integers >> low) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, -part.shape[-1] % each))
        part = part.reshape(*part.shape[:-1], -1, each)
        packed = part[..., 0]
        for place in range(1, each):
            packed = packed | part[..., place] << (place * width)
        parts.append(packed)
        low += width
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0].clone()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the integers that :func:`pack` has packed.

    Parameters
    ----------
    packed : Tensor
        The bytes of rows of n integers, uint8.
    bits : int
        The bits of an integer, among :data:`BITS`.
    n : int
        The number of integers of a row.

    Returns
    -------
    Tensor, shape (..., n)
        uint8.
    """
    found: Tensor | None = None
    low = start = 0
    for width in _PLANES[bits]:
        each, size = 8 // width, -(-n * width // 8)
        part = packed[..., start : start + size]
        if each > 1:
            places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
            part = ((part[..., None] >> places) & (2**width - 1)).flatten(-2)[..., :n]
        found = part if found is None else found | part << low
        start, low = start + size, low + width
    assert found is not None
    return found
