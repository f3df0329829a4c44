"""How many bytes a compressed checkpoint takes on disk, before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["ByteCosts"]

# The longest description of a tensor in the header of a safetensors file, but for its name and numbers.
_ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')
# Length of the header, its metadata and padding, the guard that `save_pretrained` of a compressed model writes; a file.
_FILE = 8 + len('{"__metadata__":{"format":"pt"}}') + 8
_GUARD = 150
_SHARD = 5 * 10**9
_ORDER_ITEM = 8


class ByteCosts:
    """What the weight files of a checkpoint will take: its tensors, and the headers that describe them.

    An upper bound, above the truth by a few bytes for each tensor.

    Parameters
    ----------
    model : nn.Module
        The dense model. Tied weights are stored once.
    names : sequence of str
        Layers that may be factored.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        targeted = {f"{name}.weight" for name in names}
        self._weights = {name: model.get_parameter(f"{name}.weight") for name in names}
        state = _stored(model)
        total = sum(tensor.nbytes for tensor in state.values())
        self._digits = 2 * len(str(total))
        others = {key: tensor for key, tensor in state.items() if key not in targeted}
        self.fixed = _FILE * (1 + total // _SHARD) + _GUARD
        self.fixed += sum(tensor.nbytes + self._entry(key, tensor.shape) for key, tensor in others.items())

    def dense(self) -> int:
        """Return the bytes of the dense checkpoint."""
        return self.fixed + sum(self._dense(name) for name in self._weights)

    def options(self, name: str, shape: tuple[int, int], costs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the bytes of one layer for each rank, and dense, from the numbers it takes.

        Parameters
        ----------
        name : str
            One of `names`.
        shape : tuple of int
            Outputs m and inputs n.
        costs : array
            Numbers at the ranks 1, 2, ... in the layout "interpolative"; the last is for the dense layer.
        """
        weight = self._weights[name]
        m, n = shape
        parts = {"R.weight": (m, n), "T.weight": (m, m), "order": (m,), "weight": (0,)}
        headers = sum(self._entry(f"{name}.{part}", sizes) for part, sizes in parts.items())
        bytes_ = costs * weight.element_size() + _ORDER_ITEM * m + headers
        bytes_[-1] = self._dense(name)
        return bytes_

    def neurons(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], costs: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Return the bytes of layers for each number of neurons kept between them, from the numbers they take.

        Parameters
        ----------
        names : sequence of str
            Of `names`, the layer behind the neurons first.
        shapes : sequence of (int, int)
            Outputs m and inputs n of each.
        costs : array
            Numbers in all of them.
        """
        width = shapes[0][1]
        headers = 0
        for factor, name, shape in zip("C" + "R" * len(names), names, shapes, strict=False):
            parts = {f"{factor}.weight": shape, "kept": (width,), "weight": (0,)}
            headers += sum(self._entry(f"{name}.{part}", sizes) for part, sizes in parts.items())
            headers += len("R.")  # of the name of a bias, of which all entries are counted
        return costs * max(self._weights[name].element_size() for name in names) + width * len(names) + headers

    def _dense(self, name: str) -> int:
        weight = self._weights[name]
        return weight.nbytes + self._entry(f"{name}.weight", weight.shape)

    def _entry(self, key: str, shape: Sequence[int]) -> int:
        return _ENTRY + len(json.dumps(key)) - 2 + len(",".join(map(str, shape))) + self._digits


def _stored(model: nn.Module) -> Mapping[str, Tensor]:
    """Return what is stored of a model: of tensors that share their memory the first."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for key, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0 or tensor.is_meta:
            found[key] = tensor
        seen.add(place)
    return found
