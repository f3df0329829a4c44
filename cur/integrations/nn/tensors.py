"""What a layer type stores, as data: sizes, counts and bytes of its layers follow from this without making one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

__all__ = ["StoredTensor", "Stores", "rounded"]


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

    def count(self, sizes: Mapping[str, Any]) -> Any:
        """Return its number of entries; an array for sizes that are arrays.

        Parameters
        ----------
        sizes : mapping
            The sizes of the layer, by name.
        """
        return math.prod(sizes[axis] for axis in self.axes)


Stores: TypeAlias = Mapping[str, StoredTensor]
"""Tensors by their names in the state of a layer."""


def rounded(tensors: Stores) -> Stores:
    """Return what is stored where every factor is an :class:`~cur.integrations.nn.Int8Linear`.

    Parameters
    ----------
    tensors : Stores
        The tensors that the layer stores otherwise.
    """
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        factor = key.removesuffix(".weight")
        if factor == key:
            found[key] = tensor
        else:
            found[f"{factor}.integers"] = StoredTensor(tensor.axes, torch.int8)
            found[f"{factor}.scale"] = StoredTensor((tensor.axes[0], "one"))
    return found
