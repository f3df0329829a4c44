"""What a compressed checkpoint holds, read from its configuration and the headers of its weights alone."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cur.integrations.files.hashes import check_hashes
from cur.integrations.files.reading import CheckpointError
from cur.integrations.model.stored_tensors import names_in_model, without_weights
from cur.integrations.nn import IntegerGrid, factored, grids_of, layer_class
from cur.integrations.nn.base import spec_grid
from cur.integrations.nn.tensors import PackedTensor, StoredTensor
from cur.integrations.store.checkpoint import read_config

__all__ = ["CheckpointSummary", "LayerSummary", "summarize"]


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One compressed layer: its name, shape (outputs, inputs), layout, rank and the dtype of its factors.

    Where neurons were removed and the rest was factored as well, also the inner rank.

    Parameters
    ----------
    name : str
        The name of the layer.
    shape : (int, int)
        The numbers of outputs m and inputs n of the layer.
    layout : str
        The layout in which the factors are stored.
    rank : int
        The rank of the layer, or the number of neurons kept.
    dtype : str
        The dtype of the factors.
    inner_rank : int, optional
        The rank of the kept part; None if it is whole.
    grid : IntegerGrid, optional
        The grid of rounded factors; None if they are not rounded.
    """

    name: str
    shape: tuple[int, int]
    layout: str
    rank: int
    dtype: str
    inner_rank: int | None = None
    grid: IntegerGrid | None = None

    @property
    def ranks(self) -> tuple[int, int | None]:
        """Rank and inner rank."""
        return self.rank, self.inner_rank

    @property
    def parameters(self) -> int:
        """Numbers in the factors."""
        return int(layer_class(self.layout).parameter_count(*self.shape, *self.ranks))

    @property
    def dense_parameters(self) -> int:
        """The number of parameters of the dense weight."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A compressed checkpoint.

    Attributes
    ----------
    directory : str
        The directory that the checkpoint lies in.
    format_version : int
        The version of the checkpoint format.
    layers : tuple of LayerSummary
        The compressed layers; one that has several names appears once.
    parameters : int
        Numbers in all tensors, of floating dtype or rounded; steps of what is rounded do not count, and neither do
        buffers, which a model has besides its parameters.
    dense_parameters : int
        The number of parameters if every compressed layer were dense.
    file_bytes : int
        The sum of the bytes of all weight files.
    """

    directory: str
    format_version: int
    layers: tuple[LayerSummary, ...]
    parameters: int
    dense_parameters: int
    file_bytes: int

    @property
    def grids(self) -> str:
        """What layers are rounded to, in words; empty if none is."""
        return grids_of(self.layers)

    def in_layout(self, layout: str) -> int:
        """Return the number of parameters that all factored layers would take in one layout at their ranks.

        Parameters
        ----------
        layout : str
            The name of the layout.
        """
        kind = layer_class(layout)
        return sum(
            int(kind.parameter_count(*layer.shape, *layer.ranks))
            for layer in self.layers
            if layout in layer_class(layer.layout).conversions()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON types."""
        layers = [
            {
                **asdict(replace(layer, grid=None)),
                "shape": list(layer.shape),
                "parameters": layer.parameters,
                "grid": None if layer.grid is None else layer.grid.spec(),
            }
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers, "layouts": {name: self.in_layout(name) for name in factored()}}


def summarize(directory: str | os.PathLike[str]) -> CheckpointSummary:
    """Read the summary of a compressed checkpoint.

    Parameters
    ----------
    directory : path
        The directory of a compressed checkpoint.

    Returns
    -------
    CheckpointSummary
        The summary of its layers and sizes.

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
    # Of removed neurons the entries of the bias are gone, too.
    biases = 0
    for layer in layers:
        stored = (tensors.get(f"{layer.name}.{bias}") for bias in layer_class(layer.layout).bias_names)
        biases += sum(layer.shape[0] - math.prod(bias[0]) for bias in stored if bias is not None)
    inside = {
        f"{layer.name}.{key}"
        for layer in layers
        if layer.grid is not None
        for key in layer_class(layer.layout).tensors(factored=layer.inner_rank is not None, grid=layer.grid)
    }
    buffers, computed = _besides(Path(directory), tensors)
    parameters = computed + sum(
        math.prod(shape)
        for name, (shape, dtype) in tensors.items()
        if name not in buffers and name not in inside and dtype.startswith(("F", "BF"))
    )
    parameters += sum(layer.parameters for layer in layers if layer.grid is not None)
    return CheckpointSummary(
        directory=str(directory),
        format_version=config.format_version,
        layers=layers,
        parameters=parameters,
        dense_parameters=parameters + sum(layer.dense_parameters - layer.parameters for layer in layers) + biases,
        file_bytes=sum(file.stat().st_size for file in files),
    )


def _besides(directory: Path, names: Collection[str]) -> tuple[set[str], int]:
    """Return the stored tensors that are buffers of the model, and the number of parameters that it computes itself.

    Of a class that transformers does not have, neither is known.
    """
    model = without_weights(directory)
    if model is None:
        return set(), 0
    targets = {name: target for name, (target, _) in names_in_model(model, names).items()}
    known = {name for name, _ in model.named_buffers()}
    parameters = dict(model.named_parameters())
    computed = set(model._keys_to_ignore_on_save or ()) & parameters.keys() - set(targets.values())
    buffers = {name for name, target in targets.items() if target in known}
    return buffers, sum(parameters[name].numel() for name in computed - model.all_tied_weights_keys.keys())


def _layer(name: str, spec: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]) -> LayerSummary:
    kind = layer_class(spec["layout"])
    grid = spec_grid(spec)
    stored = kind.tensors(factored="inner_rank" in spec, grid=grid)
    own = {key: tensors[f"{name}.{key}"] for key in stored if f"{name}.{key}" in tensors}
    try:
        sizes = kind.sized({key: shape for key, (shape, _) in own.items()}, spec)
        dtype = own[next(iter(stored))][1]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks {name}.{error.args[0]}, a factor of {name}") from None
    m, n = sizes["outputs"], sizes["inputs"]
    found = {"rank": kind.largest_rank(m, n), **sizes}
    for key in ("rank", "inner_rank"):
        if key in spec and found[key] != spec[key]:
            what = key.replace("_", " ")
            raise CheckpointError(
                f"`config.json` says {name} has {what} {spec[key]}, the stored weights have {found[key]}"
            )
    if not 1 <= spec["rank"] <= kind.largest_rank(m, n):
        raise CheckpointError(
            f"`config.json` says {name} has rank {spec['rank']}, the largest of {m} x {n} is {kind.largest_rank(m, n)}"
        )
    every = kind.sizes(m, n, spec["rank"], spec.get("inner_rank"))
    for key, tensor in stored.items():
        wanted = tensor.shape(every)
        if 0 not in wanted:  # a factor without entries is not stored
            _check_part(f"{name}.{key}", tensor, wanted, own.get(key))
    factors = tuple(f"{name}.{key.removesuffix('scale')}" for key in stored if key.endswith(".scale"))
    known = {f"{name}.{key}" for key in (*stored, *kind.bias_names)}
    if unknown := [key for key in tensors if factors and key.startswith(factors) and key not in known]:
        raise CheckpointError(
            f"the checkpoint has {unknown[0]}, which {name} does not have on a grid of {grid}: the configuration and "
            "the checkpoint do not belong together"
        )
    return LayerSummary(
        name=name,
        shape=(m, n),
        layout=kind.layout,
        rank=spec["rank"],
        inner_rank=spec.get("inner_rank"),
        dtype=dtype,
        grid=grid,
    )


def _check_part(
    name: str, tensor: StoredTensor, wanted: tuple[int, ...], found: tuple[tuple[int, ...], str] | None
) -> None:
    """Refuse a stored tensor that is missing, or not of the shape and kind that its layer has."""
    if found is None:
        raise CheckpointError(f"the checkpoint lacks {name}: it is corrupt; fetch it again")
    shape, dtype = found
    if shape != wanted:
        raise CheckpointError(
            f"`config.json` asks for {name} of shape {wanted}, the stored one is {shape}: the checkpoint is corrupt; "
            "fetch it again"
        )
    if isinstance(tensor, PackedTensor):
        kinds = ("F", "BF") if tensor.part == "scale" else "I8" if tensor.dtype == torch.int8 else "U8"
        if not dtype.startswith(kinds):
            raise CheckpointError(f"{name} is stored as {dtype}: the checkpoint is corrupt; fetch it again")
