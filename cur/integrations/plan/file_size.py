"""How much layers and a compressed checkpoint will take, in parameters or in bytes, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cur.integrations.nn import CompressedLinear, IntegerGrid

__all__ = ["ByteCosts", "LayerBytes", "Numbers"]

# The longest description of a tensor in the header of a safetensors file, without its name and sizes.
_ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')
# Length of the header, its metadata and padding, the guard that `save_pretrained` of a compressed model writes; a file.
_FILE = 8 + len('{"__metadata__":{"format":"pt"}}') + 8
_GUARD = 150
_SHARD = 5 * 10**9


class Numbers:
    """Counts parameters of layers; the base of what counts their bytes."""

    def stored(
        self,
        kind: type[CompressedLinear],
        name: str,
        shape: tuple[int, int],
        rank: Any,
        inner_rank: Any = None,
        grid: IntegerGrid | None = None,
    ) -> Any:
        """Return the parameters of a layer of a type, at a rank or at each of some.

        Parameters
        ----------
        kind : type of CompressedLinear
            The type of the layer.
        name : str
            The name of the layer.
        shape : (int, int)
            The numbers of outputs and inputs of the dense layer.
        rank, inner_rank : int or array
            The rank of the layer and that of its kept part; None for none.
        grid : IntegerGrid or None
            The grid of the layer, on which parameters do not depend; None if it is not rounded.
        """
        return kind.parameter_count(*shape, rank, inner_rank)

    def whole(self, name: str, shape: tuple[int, int]) -> int:
        """Return the parameters of the dense layer.

        Parameters
        ----------
        name : str
            The name of the layer.
        shape : (int, int)
            The numbers of outputs and inputs.
        """
        return shape[0] * shape[1]


class LayerBytes(Numbers):
    """Counts bytes of what is stored of layers.

    Parameters
    ----------
    model : nn.Module
        The dense model that the layers are of.
    names : sequence of str
        The names of the layers that may be replaced.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._weights = {name: model.get_parameter(f"{name}.weight") for name in names}

    def stored(
        self,
        kind: type[CompressedLinear],
        name: str,
        shape: tuple[int, int],
        rank: Any,
        inner_rank: Any = None,
        grid: IntegerGrid | None = None,
    ) -> Any:
        """Return the bytes of a layer of a type, at a rank or at each of some."""
        return kind.nbytes(*shape, rank, inner_rank, dtype=self._weights[name].dtype, grid=grid)

    def whole(self, name: str, shape: tuple[int, int]) -> int:
        """Return the bytes of the dense layer."""
        return int(self._weights[name].nbytes)


class ByteCosts(LayerBytes):
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
        super().__init__(model, names)
        targeted = {f"{name}.weight" for name in names}
        state = _stored(model)
        total = sum(tensor.nbytes for tensor in state.values())
        self._digits = 2 * len(str(total))
        others = {key: tensor for key, tensor in state.items() if key not in targeted}
        self.fixed = _FILE * (1 + total // _SHARD) + _GUARD
        self.fixed += sum(tensor.nbytes + self._entry(key, tensor.shape) for key, tensor in others.items())

    def dense(self) -> int:
        """Return the bytes of the dense checkpoint."""
        return self.fixed + sum(self.whole(name, (0, 0)) for name in self._weights)

    def stored(
        self,
        kind: type[CompressedLinear],
        name: str,
        shape: tuple[int, int],
        rank: Any,
        inner_rank: Any = None,
        grid: IntegerGrid | None = None,
    ) -> Any:
        """Return the bytes of a layer with its headers and that of the guard; the parameters are as above."""
        stored = super().stored(kind, name, shape, rank, inner_rank, grid)
        # Whatever follows from a rank is no longer than the longer side.
        longest = {**dict.fromkeys(kind.sizes(*shape, 1, 1), max(shape)), "outputs": shape[0], "inputs": shape[1]}
        headers = self._entry(f"{name}.weight", (0,)) + max(map(len, kind.bias_names)) - len("bias")
        for key, tensor in kind.tensors(factored=inner_rank is not None, grid=grid).items():
            headers += self._entry(f"{name}.{key}", [longest[axis] for axis in tensor.axes])
        return stored + headers

    def whole(self, name: str, shape: tuple[int, int]) -> int:
        """Return the bytes of the dense layer with its header."""
        weight = self._weights[name]
        return int(weight.nbytes) + self._entry(f"{name}.weight", weight.shape)

    def _entry(self, key: str, shape: Sequence[int]) -> int:
        return _ENTRY + len(json.dumps(key)) - 2 + len(",".join(map(str, shape))) + self._digits


def _stored(model: nn.Module) -> Mapping[str, Tensor]:
    """Return what is stored of a model: of tensors that share their memory the first."""
    found: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        # without memory of their own, tensors are shared that are one object
        place = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0:
            found[key] = tensor
        seen.add(place)
    return found
