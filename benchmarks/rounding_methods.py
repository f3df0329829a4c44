"""Methods that round the weights of all blocks to a grid: each makes a model of rounded numbers, and says its bytes.

Bytes are those of the integers, of a step in half precision for each group and of what stands for 0 there: an integer
of as many bits, a number in half precision (HQQ), or nothing in symmetric grids (torchao). Where a group does not
divide the inputs of a layer, the last group of each row is shorter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import activation_aware, grid_bytes, half_quadratic, round_to_nearest
from cur.integrations import Statistics, batches
from cur.integrations.quantize import grid_of, quantize_
from cur.rounding import round_to_grid

__all__ = ["DAMPING", "METHODS", "Known", "Made", "by_plane", "int4_of_torchao"]

DAMPING = 0.01
"""Of second moments, relative to their mean eigenvalue, for GPTQ and both sides alike."""

Made = tuple[Any, float]
"""The model with rounded weights, and the bytes that its layers take as integers."""


@dataclass(frozen=True)
class Known:
    """What methods may use: the dense model off its grid, and what calibration says of it.

    Attributes
    ----------
    dense : PreTrainedModel
        Float32.
    names : list of str
        The linear layers of the blocks.
    statistics : Statistics
        Second moments of inputs and of gradients of outputs.
    magnitude : mapping of str to Tensor
        Mean magnitudes of the inputs of the first of the layers that read the same.
    windows : Tensor, shape (count, length)
        The text of the statistics.
    """

    dense: Any
    names: list[str]
    statistics: Statistics
    magnitude: Mapping[str, Tensor]
    windows: Tensor

    def weight(self, name: str) -> Tensor:
        """Return a weight in float64."""
        weight: Tensor = self.dense.get_submodule(name).weight
        return weight.detach().double()

    def by_input(self) -> list[list[str]]:
        """Return the layers that read the same, together."""
        return sharing(self.statistics, self.names)


def sharing(statistics: Statistics, names: list[str]) -> list[list[str]]:
    """Group layers that read the same: statistics have one tensor for them."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(statistics.products[name]), []).append(name)
    return list(groups.values())


def missing(inputs: int, group: int) -> int:
    """Return how many inputs a row lacks for whole groups."""
    return -inputs % group


def layer_by_layer(
    rounded: Callable[[Known, str, int, int], Tensor], *, zero_bits: int | None = None
) -> Callable[[Known, int, int], Made]:
    """Make a method that rounds every layer on its own; zeros are integers unless their bits are told."""

    def run(known: Known, bits: int, group: int) -> Made:
        model, stored = copy.deepcopy(known.dense), 0.0
        for name in known.names:
            weight = model.get_submodule(name).weight
            weight.data.copy_(rounded(known, name, bits, group))
            stored += grid_bytes(*weight.shape, bits=bits, group=group, zero_bits=zero_bits or bits)
        return model, stored

    return run


def by_plane(known: Known, name: str, bits: int, group: int, *, outputs: bool) -> Tensor:
    """Return nearest plane under the moments of the inputs, which is GPTQ, or under those of both sides."""
    W, G = known.dense.get_submodule(name).weight.detach(), known.statistics.second_moment(name)
    n = len(G)
    more = missing(n, group)
    # whole groups of zeros and of inputs of a mean size, whose errors nothing else makes up for
    beside = float(G.diagonal().mean()) * torch.eye(more, dtype=G.dtype)
    found = round_to_grid(
        nn.functional.pad(W, (0, more)),
        bits=bits,
        group=group,
        row_weights=known.statistics.output_moment(name) if outputs else None,
        column_weights=torch.block_diag(G, beside),
        damping=DAMPING,
    )
    values: Tensor = found.toarray()[:, :n]
    return values


def awq(known: Known, bits: int, group: int) -> Made:
    """Return AWQ, whose scales, one for each input of layers that read the same, take two bytes each."""
    model, stored = copy.deepcopy(known.dense), 0.0
    for names in known.by_input():
        first = names[0]
        moment, magnitude = known.statistics.second_moment(first), known.magnitude[first]
        weights = [known.weight(name) for name in names]
        rounded, _ = activation_aware(weights, moment, magnitude, bits=bits, group=group)
        for name, Q in zip(names, rounded, strict=True):
            model.get_submodule(name).weight.data.copy_(Q)
            stored += grid_bytes(*Q.shape, bits=bits, group=group, zero_bits=bits)
        stored += 2 * len(magnitude)
    return model, stored


def torchao(known: Known, bits: int, group: int) -> Made:
    """Return what torchao's weight-only configurations make: int8 by rows, fewer bits by groups, symmetric both."""
    from torchao import quantization as ao

    model, stored = copy.deepcopy(known.dense), 0.0
    for name in known.names:
        weight = model.get_submodule(name).weight
        m, n = weight.shape
        size = n if bits == 8 else group
        if bits == 8:
            config: Any = ao.Int8WeightOnlyConfig()
        else:
            config = ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=ao.PerGroup(size))
        layer = nn.Linear(n, m, bias=False)
        # zeros change no step of a symmetric grid
        layer.weight = nn.Parameter(nn.functional.pad(weight.detach(), (0, missing(n, size))), requires_grad=False)
        ao.quantize_(layer, config)
        weight.data.copy_(layer.weight.dequantize()[:, :n])
        stored += grid_bytes(m, n, bits=bits, group=size, zero_bits=0)
    return model, stored


def int4_of_torchao() -> str | None:
    """Say why torchao's own configuration for four bits cannot be measured here in float32, None if it can."""
    try:
        from torchao import quantization as ao

        ao.quantize_(nn.Linear(128, 128, bias=False), ao.Int4WeightOnlyConfig())
    except Exception as error:  # noqa: BLE001 - kernels, devices and packages raise what they like
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def block_after_block(known: Known, bits: int, group: int) -> Made:
    """Return what ``cur quantize --bits`` makes by default: block after block, fitted to the inputs that come."""
    model, rounded = (copy.deepcopy(known.dense) for _ in range(2))
    found = quantize_(
        rounded,
        known.statistics,
        grid=grid_of(bits, group, symmetric=False),
        text=batches(known.windows, batch_size=1),
        precision=known.statistics.precision,
    )
    for name in known.names:
        model.get_submodule(name).weight.data.copy_(rounded.get_submodule(name).weight)
    return model, float(found.after)


METHODS: dict[str, Callable[[Known, int, int], Made]] = {
    "nearest": layer_by_layer(lambda k, name, bits, group: round_to_nearest(k.weight(name), bits=bits, group=group)),
    "torchao": torchao,
    "HQQ": layer_by_layer(
        lambda k, name, bits, group: half_quadratic(k.weight(name), bits=bits, group=group), zero_bits=16
    ),
    "AWQ": awq,
    "GPTQ": layer_by_layer(partial(by_plane, outputs=False)),
    "both sides": layer_by_layer(partial(by_plane, outputs=True)),
    "ours, block after block": block_after_block,
}
