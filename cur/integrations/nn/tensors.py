"""What a layer type stores, as data: sizes, counts and bytes of its layers follow from this without making one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from cur.integrations.nn.grid import IntegerGrid

__all__ = ["PackedTensor", "StoredTensor", "Stores", "rounded"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a layer.

    Attributes
    ----------
    axes : tuple of str
        The name of the size along each axis: ``"outputs"``, ``"inputs"``, ``"rank"``, or others that the type has.
    dtype : torch.dtype or None
        The dtype of tensors that are not part of the weight, such as indices; None for the dtype of the layer.
    """

    axes: tuple[str, ...]
    dtype: torch.dtype | None = None

    def shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return its shape; of arrays for sizes that are arrays.

        Parameters
        ----------
        sizes : mapping
            The sizes of the layer, by name.
        """
        return tuple(sizes[axis] for axis in self.axes)

    def count(self, sizes: Mapping[str, Any]) -> Any:
        """Return its number of entries; an array for sizes that are arrays.

        Parameters
        ----------
        sizes : mapping
            The sizes of the layer, by name.
        """
        return math.prod(self.shape(sizes))


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A part of a matrix on a grid, whose axes are those of the matrix.

    Attributes
    ----------
    grid : IntegerGrid
        The grid of the matrix.
    part : str
        ``"integers"``, ``"scale"`` or ``"zeros"``.
    """

    grid: IntegerGrid = field(default_factory=IntegerGrid)
    part: str = "integers"

    def shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the shape of the part."""
        rows, columns = super().shape(sizes)
        groups = self.grid.groups(columns)
        if self.part == "integers":
            return rows, self.grid.row_bytes(columns)
        return rows, groups if self.part == "scale" else self.grid.row_bytes(groups)


Stores: TypeAlias = Mapping[str, StoredTensor]
"""Tensors by their names in the state of a layer."""


def rounded(tensors: Stores, grid: IntegerGrid) -> Stores:
    """Return what is stored where every factor is a :class:`~cur.integrations.nn.GridLinear`.

    Parameters
    ----------
    tensors : Stores
        The tensors that the layer stores otherwise.
    grid : IntegerGrid
        The grid of the factors.
    """
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        factor = key.removesuffix(".weight")
        if factor == key:
            found[key] = tensor
            continue
        integers = torch.int8 if grid.signed else torch.uint8
        found[f"{factor}.integers"] = PackedTensor(tensor.axes, integers, grid)
        found[f"{factor}.scale"] = PackedTensor(tensor.axes, grid.step_dtype, grid, "scale")
        if not grid.symmetric:
            found[f"{factor}.zeros"] = PackedTensor(tensor.axes, torch.uint8, grid, "zeros")
    return found
