"""How many bytes a compressed checkpoint takes on disk, before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from cur.integrations.plan.rate_distortion import Cut, LayerCurve, NeuronCurve

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

    def options(self, curve: LayerCurve) -> np.ndarray[Any, Any]:
        """Return the bytes of one layer at each rank of its curve, in the layout "interpolative", and dense."""
        bytes_ = self._factored(curve.name, curve) + self._entry(f"{curve.name}.weight", (0,))
        bytes_[-1] = self._dense(curve.name)
        return bytes_

    def neurons(self, curve: NeuronCurve) -> np.ndarray[Any, Any]:
        """Return the bytes of layers for each number of neurons kept between them."""
        sides = zip(curve.names, _children(curve), curve.shapes, strict=True)
        headers = sum(
            self._kept(name, curve) + self._entry(f"{name}.{child}.weight", shape) for name, child, shape in sides
        )
        size = max(self._weights[name].element_size() for name in curve.names)
        return curve.costs * size + headers

    def cut(self, curve: NeuronCurve, cut: Cut) -> list[np.ndarray[Any, Any]]:
        """Return the bytes of what kept neurons leave of each of these layers, at each rank, and whole."""
        found = []
        for name, child, layer in zip(curve.names, _children(curve), cut.layers, strict=True):
            bytes_ = self._factored(f"{name}.inner", layer)
            bytes_[-1] = layer.costs[-1] * self._weights[name].element_size()
            bytes_[-1] += self._entry(f"{name}.{child}.weight", layer.shape)
            found.append(bytes_ + self._kept(name, curve))
        return found

    def _factored(self, key: str, curve: LayerCurve) -> np.ndarray[Any, Any]:
        m, n = curve.shape
        parts = {"R.weight": (m, n), "T.weight": (m, m), "order": (m,)}
        headers = sum(self._entry(f"{key}.{part}", sizes) for part, sizes in parts.items())
        return curve.costs * self._weights[curve.name].element_size() + _ORDER_ITEM * m + headers

    def _kept(self, name: str, curve: NeuronCurve) -> int:
        """Return the bytes that say which neurons a layer keeps, and of the longer name of its bias."""
        width = curve.shapes[0][1]
        headers = self._entry(f"{name}.kept", (width,)) + self._entry(f"{name}.weight", (0,)) + len("inner.")
        return width + headers

    def _dense(self, name: str) -> int:
        weight = self._weights[name]
        return weight.nbytes + self._entry(f"{name}.weight", weight.shape)

    def _entry(self, key: str, shape: Sequence[int]) -> int:
        return _ENTRY + len(json.dumps(key)) - 2 + len(",".join(map(str, shape))) + self._digits


def _children(curve: NeuronCurve) -> str:
    """Return what holds the numbers of each of the layers."""
    return "C" + "R" * len(curve.producers)


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
