"""How many bytes a compressed checkpoint takes on disk, before it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from cur.integrations.nn import CompressedLinear, KeptInputs, KeptOutputs
from cur.integrations.plan.rate_distortion import Cut, LayerCurve, NeuronCurve

__all__ = ["ByteCosts"]

# The longest description of a tensor in the header of a safetensors file, without its name and sizes.
_ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')
# Length of the header, its metadata and padding, the guard that `save_pretrained` of a compressed model writes; a file.
_FILE = 8 + len('{"__metadata__":{"format":"pt"}}') + 8
_GUARD = 150
_SHARD = 5 * 10**9


class ByteCosts:
    """What the weight files of a checkpoint will take: its tensors, and the headers that describe them.

    An upper bound, above the truth by a few bytes for each tensor.

    Parameters
    ----------
    model : nn.Module
        The dense model. Tied weights are stored once.
    names : sequence of str
        The names of the layers that may be factored.
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
        """Return the bytes of one layer at each rank of its curve, and dense.

        Parameters
        ----------
        curve : LayerCurve
            The curve of the layer.
        """
        some = self._layer(curve.kind, curve.name, curve.shape, np.arange(1, len(curve.costs)))
        return np.append(some, self._dense(curve.name))

    def neurons(self, curve: NeuronCurve) -> np.ndarray[Any, Any]:
        """Return the bytes of layers for each number of neurons kept between them.

        Parameters
        ----------
        curve : NeuronCurve
            The curve of the layers around the neurons.
        """
        count = np.arange(1, len(curve.costs) + 1)
        return np.asarray(sum(self._layer(kind, name, shape, count) for kind, name, shape in _around(curve)))

    def cut(self, curve: NeuronCurve, cut: Cut) -> list[np.ndarray[Any, Any]]:
        """Return the bytes of what kept neurons leave of each of these layers, at each rank, and whole.

        Parameters
        ----------
        curve : NeuronCurve
            The curve of the layers around the neurons.
        cut : Cut
            The remaining parts at one number of neurons kept.
        """
        found = []
        for (kind, name, shape), layer in zip(_around(curve), cut.layers, strict=True):
            some = self._layer(kind, name, shape, cut.count, np.arange(1, len(layer.costs)))
            found.append(np.append(some, self._layer(kind, name, shape, cut.count)))
        return found

    def _layer(
        self, kind: type[CompressedLinear], name: str, shape: tuple[int, int], rank: Any, inner_rank: Any = None
    ) -> Any:
        """Return the bytes of a layer, at each of some ranks, with its headers and that of the guard."""
        stored = kind.nbytes(*shape, rank, inner_rank, dtype=self._weights[name].dtype)
        # Whatever follows from a rank is no longer than the longer side.
        longest = {**dict.fromkeys(kind.sizes(*shape, 1, 1), max(shape)), "outputs": shape[0], "inputs": shape[1]}
        headers = self._entry(f"{name}.weight", (0,)) + max(map(len, kind.bias_names)) - len("bias")
        for key, tensor in kind.tensors(factored=inner_rank is not None).items():
            headers += self._entry(f"{name}.{key}", [longest[axis] for axis in tensor.axes])
        return stored + headers

    def _dense(self, name: str) -> int:
        weight = self._weights[name]
        return weight.nbytes + self._entry(f"{name}.weight", weight.shape)

    def _entry(self, key: str, shape: Sequence[int]) -> int:
        return _ENTRY + len(json.dumps(key)) - 2 + len(",".join(map(str, shape))) + self._digits


def _around(curve: NeuronCurve) -> Iterator[tuple[type[CompressedLinear], str, tuple[int, int]]]:
    """Yield type, name and shape of the layers around neurons, their consumer first."""
    for place, (name, shape) in enumerate(zip(curve.names, curve.shapes, strict=True)):
        yield KeptOutputs if place else KeptInputs, name, shape


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
