"""Methods at a size: ours, GPTQ with bits shared by predicted loss, and the types of GGUF files."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rounding_methods import DAMPING, Known, by_plane
from cur import ranks
from cur.integrations import BudgetConfig, Statistics, batches, collect
from cur.integrations.compress import carry_out_
from cur.integrations.measure.generated_text import own_text
from cur.integrations.nn import IntegerGrid, WholeLinear
from cur.integrations.plan.budget import Forms
from cur.integrations.plan.grid_errors import expected_errors, pivots
from cur.integrations.plan.make import Layers, budget_forms

__all__ = ["METHODS", "Ours"]

OWN_TEXT = 0.25
"""The default of ``cur compress``."""

Made = tuple[Any, float, dict[str, Any]]
"""The model, the bytes that its layers take, and what else is said of it."""


class Ours:
    """What our method uses: the text of all methods and what the model wrote itself, statistics of both, the forms."""

    def __init__(self, known: Known, cache: Path, digest: str) -> None:
        self.known = known
        self._file = cache / f"frontier-{digest}.statistics.safetensors"

    @functools.cached_property
    def text(self) -> list[Any]:
        """The batches that layers are measured on and fitted to."""
        given = list(batches(self.known.windows, batch_size=1))
        precision = self.known.statistics.precision
        return [*given, *own_text(self.known.dense, given, share=OWN_TEXT, batch_size=1, seed=0, precision=precision)]

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Second moments on both."""
        if not self._file.exists():
            names = self.known.names
            precision = self.known.statistics.precision
            found = collect(
                self.known.dense, self.text, modules=names, moments="full", gradients=names, precision=precision
            )
            replace(found, own_text=OWN_TEXT).save(self._file)
        return Statistics.load(self._file)

    @functools.cached_property
    def forms(self) -> Forms:
        """What layers can take."""
        return budget_forms(
            self.known.dense, self.statistics, BudgetConfig(bits=4.0), Layers(self.known.dense, self.statistics)
        )


def ours(of: Ours, bits: float) -> Made:
    """Return what ``cur compress --bits`` makes."""
    model = copy.deepcopy(of.known.dense)
    plan = replace(of.forms, config=BudgetConfig(bits=bits)).plan()
    carry_out_(model, plan, of.statistics, text=of.text, precision=of.statistics.precision)
    chosen: dict[str, dict[str, str]] = {}
    for entry in plan.entries:
        left, _, kind = entry.name.rpartition(".")
        block = next(part for part in left.split(".") if part.isdecimal())
        said = f"{entry.grid.bits if entry.grid else 16} bits"
        if entry.method == "weighted":
            said += f", rank {entry.ranks[0]}"
        if entry.method == "neurons":
            said += f", {entry.ranks[0]} neurons"
        chosen.setdefault(kind, {})[block] = said
    stored = sum(entry.nbytes(torch.float32) for entry in plan.entries)
    stored += 4 * (plan.targeted_parameters or 0) - 4 * plan.dense_parameters  # layers that stay dense
    predicted = sum(entry.predicted or 0.0 for entry in plan.entries)
    return (
        model,
        float(stored),
        {"predicted": predicted, "methods": Counter(e.method for e in plan.entries), "forms": chosen},
    )


SHARED = tuple(IntegerGrid(bits, 64, symmetric=False) for bits in (2, 3, 4, 5, 6, 8))


def shared_gptq(of: Ours, bits: float) -> Made:
    """Return GPTQ whose bits are shared so that the loss that it is predicted to cost is least."""
    known = of.known
    errors, costs = [], []
    latest: tuple[Any, Any] = (None, None)
    for name in known.names:
        W = known.weight(name)
        shared = known.statistics.products[name]
        if latest[0] is not shared:
            latest = shared, pivots(known.statistics.second_moment(name), DAMPING, name)
        # errors of rows do not make up for each other: each counts by its own gradient
        errors.append(0.5 * expected_errors(W, known.statistics.output_moment(name).diagonal(), latest[1], SHARED))
        costs.append(np.array([stored(name, W.shape, grid) for grid in SHARED]))
    chosen = ranks.allocate(errors, costs, bits * sum(known.weight(name).numel() for name in known.names) / 8)
    model, total = copy.deepcopy(known.dense), 0
    for name, place, cost in zip(known.names, chosen, costs, strict=True):
        rounded = by_plane(known, name, SHARED[place].bits, 64, outputs=False)
        model.get_submodule(name).weight.data.copy_(rounded)
        total += int(cost[place])
    predicted = sum(float(error[place]) for error, place in zip(errors, chosen, strict=True))
    return model, float(total), {"predicted": predicted}


def stored(name: str, shape: Sequence[int], grid: IntegerGrid) -> int:
    """Return the bytes of a weight on a grid."""
    m, n = shape
    return int(WholeLinear.nbytes(m, n, min(m, n), dtype=torch.float32, grid=grid))


def gguf_type(of: Ours, kind: str) -> Made:
    """Return a type of GGUF files, by the ``gguf`` package."""
    from gguf import GGMLQuantizationType, quants

    model, total = copy.deepcopy(of.known.dense), 0
    for name in of.known.names:
        weight = model.get_submodule(name).weight
        W = weight.detach().numpy()
        if kind == "IQ4_NL":
            values, size = iq4_nl(W, np.array(quants.IQ4_NL.kvalues, dtype=np.float32))
        else:
            packed = quants.quantize(W, getattr(GGMLQuantizationType, kind))
            values, size = quants.dequantize(packed, getattr(GGMLQuantizationType, kind)), packed.nbytes
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        total += size
    return model, float(total), {}


def iq4_nl(W: Any, levels: Any, block: int = 32) -> tuple[Any, int]:
    """Return the numbers of the type IQ4_NL, which the package only reads: 16 uneven levels, a step for each block.

    The step is the best of some around that which puts the largest entry at the end of the levels, in squares of
    errors weighted by squares of entries, as llama.cpp weighs them without an importance matrix.
    """
    X = W.reshape(-1, block).astype(np.float32)
    largest = X[np.arange(len(X)), np.abs(X).argmax(1)][:, None]
    middles = (levels[1:] + levels[:-1]) / 2
    best, lost = np.zeros_like(X), np.full((len(X), 1), np.inf, dtype=np.float32)
    for shift in range(-7, 8):
        step = largest / (levels[0] + shift)
        step = np.where(step == 0, 1, step)
        q = levels[np.searchsorted(middles, X / step)]
        # for these levels the step of least squares
        step = (X**2 * X * q).sum(1, keepdims=True) / np.maximum((X**2 * q * q).sum(1, keepdims=True), 1e-30)
        values = step.astype(np.float16).astype(np.float32) * q
        loss = (X**2 * (values - X) ** 2).sum(1, keepdims=True)
        best, lost = np.where(loss < lost, values, best), np.minimum(loss, lost)
    return best.reshape(W.shape), len(X) * (2 + block // 2)


METHODS: dict[str, tuple[Sequence[float | str], Callable[[Ours, Any], Made]]] = {
    "ours": ((4.3, 3.3, 2.4, 5.3, 2.8, 3.8, 6.3, 7.1), ours),
    "GPTQ, shared bits": ((4.3, 3.3, 2.8, 5.3), shared_gptq),
    "GGUF": (("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), gguf_type),
}
"""Settings, in the order in which they are measured, and the method, by title."""
