"""What a compressed checkpoint holds, read from its configuration and the headers of its weights alone."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cur import ranks
from cur.integrations.account import check_hashes
from cur.integrations.checkpoint import CheckpointError, read_config
from cur.integrations.nn import FACTORED, LAYOUTS

__all__ = ["CheckpointSummary", "LayerSummary", "summarize"]

# What may hold the rows that belong to kept neurons, and their bias.
_PARTS = ("R", "inner")


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One compressed layer: its name, shape (outputs, inputs), layout, rank and the dtype of its factors.

    And the rank of what is kept of a layer that gave up neurons, where that is of a lower one.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    rank: int
    dtype: str
    inner_rank: int | None = None

    @property
    def int8(self) -> bool:
        """Whether its factors are rounded to eight bits."""
        return self.dtype == "I8"

    @property
    def parameters(self) -> int:
        """Numbers in the factors."""
        return int(LAYOUTS[self.layout].numbers(*self.shape, self.rank, self.inner_rank))

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weight they stand for."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A compressed checkpoint.

    Attributes
    ----------
    directory : str
        Where it lies.
    format_version : int
        Version of the format.
    layers : tuple of LayerSummary
        Its compressed layers; one that has several names appears once.
    parameters : int
        Numbers in all tensors, of floating dtype or rounded to int8; steps of what is rounded do not count.
    dense_parameters : int
        The same if every compressed layer were dense.
    file_bytes : int
        Bytes of the weight files.
    """

    directory: str
    format_version: int
    layers: tuple[LayerSummary, ...]
    parameters: int
    dense_parameters: int
    file_bytes: int

    def in_layout(self, layout: str) -> int:
        """Return the numbers that the factors of all factored layers would take in one layout at their ranks."""
        factored = [layer for layer in self.layers if layer.layout in FACTORED]
        return sum(ranks.parameters(*layer.shape, layer.rank, layout=layout) for layer in factored)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON types."""
        layers = [
            {**asdict(layer), "shape": list(layer.shape), "parameters": layer.parameters} for layer in self.layers
        ]
        return {**asdict(self), "layers": layers, "layouts": {name: self.in_layout(name) for name in FACTORED}}


def summarize(directory: str | os.PathLike[str]) -> CheckpointSummary:
    """Read the summary of a compressed checkpoint.

    Raises
    ------
    CheckpointError
        If the directory is no compressed checkpoint, or its files are corrupt, contradict each other, or are not what
        was written.
    """
    config = read_config(directory)
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no weight files")
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                for name in list(handle.keys()):
                    part = handle.get_slice(name)
                    tensors[name] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch it again") from error
    check_hashes(directory)
    layers = tuple(_layer(name, spec, tensors) for name, spec in config.modules.items() if "shared_with" not in spec)
    # Of neurons that were given up the entries of the bias are gone, too.
    biases = sum(
        layer.shape[0] - layer.rank
        for layer in layers
        if layer.layout == "outputs" and not tensors.keys().isdisjoint(f"{layer.name}.{part}.bias" for part in _PARTS)
    )
    steps = {f"{name.removesuffix('integers')}scale" for name in tensors if name.endswith(".integers")}
    parameters = sum(
        math.prod(shape)
        for name, (shape, dtype) in tensors.items()
        if (dtype.startswith(("F", "BF")) and name not in steps) or name.endswith(".integers")
    )
    return CheckpointSummary(
        directory=str(directory),
        format_version=config.format_version,
        layers=layers,
        parameters=parameters,
        dense_parameters=parameters + sum(layer.dense_parameters - layer.parameters for layer in layers) + biases,
        file_bytes=sum(file.stat().st_size for file in files),
    )


def _layer(name: str, spec: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]) -> LayerSummary:
    layout, rank, inner = spec["layout"], spec["rank"], spec.get("inner_rank")
    weight = "integers" if spec.get("int8") else "weight"
    # What tells the rank, the outputs, the inputs and the inner rank: a tensor and its axis.
    places = {
        "cur": (("R.weight", 0), ("C.weight", 0), ("R.weight", 1)),
        "folded": (("R.weight", 0), ("CU.weight", 0), ("R.weight", 1)),
        "interpolative": (("R.weight", 0), ("order", 0), ("R.weight", 1)),
        "outputs": (("R.weight", 0), ("kept", 0), ("R.weight", 1)),
        "inputs": (("C.weight", 1), ("C.weight", 0), ("kept", 0)),
        "whole": (("W.weight", 0), ("W.weight", 0), ("W.weight", 1)),
        "outputs, factored": (("inner.order", 0), ("kept", 0), ("inner.R.weight", 1), ("inner.R.weight", 0)),
        "inputs, factored": (("inner.R.weight", 1), ("inner.order", 0), ("kept", 0), ("inner.R.weight", 0)),
    }[layout if inner is None else f"{layout}, factored"]
    keys = [(f"{name}.{key.replace('weight', weight)}", axis) for key, axis in places]
    try:
        stored, m, n, *factored = (tensors[key][0][axis] for key, axis in keys)
        dtype = next(tensors[key][1] for key, _ in keys if key.endswith(f".{weight}"))
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks {error.args[0]}, a factor of {name}") from None
    if layout == "whole":
        stored = min(m, n)
    for what, said, found in zip(("rank", "inner rank"), (rank, inner), (stored, *factored), strict=False):
        if found != said:
            raise CheckpointError(f"`config.json` says {name} has {what} {said}, the stored weights have {found}")
    return LayerSummary(name=name, shape=(m, n), layout=layout, rank=rank, inner_rank=inner, dtype=dtype)
