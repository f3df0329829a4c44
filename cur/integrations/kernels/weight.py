"""Weights on a grid: integers of a few bits, and a step and a zero for each group of a row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["GridWeight"]

_BITS = (2, 8)


@dataclass(frozen=True, eq=False)
class GridWeight:
    """A weight ``(q - zero) step``, m x n, before it is arranged for any kernel.

    Attributes
    ----------
    integers : Tensor, shape (m, n)
        The integers q: uint8 from 0 to ``2**bits - 1``, or int8 of at most ``2**(bits - 1) - 1`` in size where there
        are no zeros.
    scale : Tensor, shape (m, number of groups)
        The step of each group, of a floating-point dtype. A group is `group` neighbours along a row; the last of a row
        may be shorter.
    zeros : Tensor or None, shape (m, number of groups)
        The integers that stand for 0, uint8; None where they are all 0.
    bits : int
        The number of bits of an integer: 2, 3, 4, 5, 6 or 8.
    group : int
        The length of a group: at most n, which is a whole row.

    Raises
    ------
    ValueError
        If a shape, a dtype, the bits or the group do not fit to the others.
    """

    integers: Tensor
    scale: Tensor
    zeros: Tensor | None
    bits: int
    group: int

    def __post_init__(self) -> None:
        m, n = self.integers.shape
        if not _BITS[0] <= self.bits <= _BITS[1]:
            raise ValueError(f"`bits` must be between {_BITS[0]} and {_BITS[1]}, got {self.bits}; round to one of them")
        if not 1 <= self.group <= max(n, 1):
            raise ValueError(
                f"`group` must be between 1 and {n}, the length of a row, got {self.group}; a whole row is {n}"
            )
        shape = (m, -(-n // self.group))
        for name, tensor in (("scale", self.scale), ("zeros", self.zeros)):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}` must have a number for each group, {shape[0]} x {shape[1]}, got {tuple(tensor.shape)}; "
                    f"groups of {self.group} divide rows of {n}"
                )
        wanted = torch.int8 if self.zeros is None else torch.uint8
        if self.integers.dtype != wanted:
            raise ValueError(
                f"`integers` must be {wanted} {'without' if self.zeros is None else 'with'} `zeros`, got "
                f"{self.integers.dtype}; convert them"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers m of outputs and n of inputs."""
        m, n = self.integers.shape
        return m, n

    @property
    def is_symmetric(self) -> bool:
        """Whether the integer 0 stands for 0 everywhere."""
        return self.zeros is None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Multiply the weight out.

        Parameters
        ----------
        dtype : torch.dtype
            The dtype of the result. Numbers are formed in it or in that of the steps, whichever is wider, and rounded
            once.

        Returns
        -------
        Tensor
            The weight, of shape (m, n).
        """
        wide = torch.promote_types(dtype, self.scale.dtype)
        n, group = self.shape[1], self.group
        whole = n - n % group
        parts = [self._part(0, whole, group, wide)] if whole else []
        if whole < n:
            parts.append(self._part(whole, n, n - whole, wide))
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return weight.to(dtype)

    def _part(self, start: int, stop: int, group: int, dtype: torch.dtype) -> Tensor:
        """Return columns that whole groups of a length make up, multiplied out."""
        first, count = start // self.group, (stop - start) // group
        q = self.integers[:, start:stop].to(dtype).reshape(-1, count, group)
        if self.zeros is not None:
            q = q - self.zeros[:, first : first + count, None].to(dtype)
        return (q * self.scale[:, first : first + count, None].to(dtype)).flatten(1)

    def rows(self, start: int, stop: int) -> GridWeight:
        """Return some rows of the weight, of which nothing is copied.

        Parameters
        ----------
        start, stop : int
            The first row, and the one after the last.

        Returns
        -------
        GridWeight
            The rows.
        """
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, integers=self.integers[start:stop], scale=self.scale[start:stop], zeros=zeros)
