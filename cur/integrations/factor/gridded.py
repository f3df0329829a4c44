"""Layers of a plan on grids of few bits: whole weights, and what other methods have made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from cur._driver.certify import evaluation_rounding
from cur._lib.array import unit_roundoff
from cur.bounds import Certificate
from cur.integrations.factor.layer import as_json, plain_certificate, report_on
from cur.integrations.factor.methods import Made, Task, maker
from cur.integrations.factor.rounding import RoundedLayer, round_layer
from cur.integrations.factor.tables import round_table
from cur.integrations.measure.moments import x_norm
from cur.integrations.measure.propagation import InputMoments
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import CompressedLinear, KeptInputs, KeptNeurons, dense_weight, learn_as_, looks_up
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.methods import ROUNDING_DAMPING, RoundedEntry
from cur.integrations.report.data import LayerReport

__all__ = ["on_grids"]

# Entries that are compared at once.
_AT_ONCE = 1 << 22


@maker(RoundedEntry)
@torch.no_grad()
def _whole(task: Task, entry: RoundedEntry, propagated: InputMoments | None) -> Made:
    start = time.perf_counter()
    module = task.model.get_submodule(entry.name)
    assert entry.grid is not None
    if looks_up(module) is not None or entry.name in vocabulary(task.model):
        return _vocabulary(task, entry, module, start)
    W = finite_weight(module, entry.name).to(torch.float64)
    done = round_layer(
        entry.name,
        module,
        entry.grid,
        task.moments.statistics,
        gradients=entry.gradients,
        damping=entry.damping,
        propagated=propagated,
        correction=task.correction,
    ).layer
    done.train(module.training)
    learn_as_(done, module)
    near = done.weight.to(torch.float64)
    report = report_on(
        [(W, W - near)],
        entry,
        done,
        norm=x_norm(task.moments.statistics, entry.name).to(W),
        certificate=as_json(plain_certificate(W, near, 0.0)),
        rounding=0.0,
        rows=(),
        columns=(),
        seconds=time.perf_counter() - start,
    )
    return Made({entry.name: (done, report)}, done)


def _vocabulary(task: Task, entry: RoundedEntry, module: nn.Module, start: float) -> Made:
    """Round a table or a head, of which a part is in double precision at a time."""
    assert entry.grid is not None
    statistics = task.moments.statistics
    done = round_table(entry.name, module, entry.grid, statistics, tied=entry.tied, damping=entry.damping).layer
    learn_as_(done, module)
    W, near = dense_weight(module, entry.name)[0].detach(), done.matrix
    squares = [0.0, 0.0]

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(W)).split(max(_AT_ONCE // W.shape[1], 1)):  # type: ignore[no-untyped-call]
            part = W[rows].double()
            error = part - near[rows].double()
            squares[0] += float(error.square().sum())
            squares[1] += float(part.square().sum())
            yield part, error

    report = report_on(
        parts(),
        entry,
        done,
        norm=x_norm(statistics, entry.name).to(W.device),
        certificate={},
        rounding=0.0,
        rows=(),
        columns=(),
        seconds=time.perf_counter() - start,
    )
    error, size = map(math.sqrt, squares)
    certificate = as_json(Certificate("fro", error, "exact", 0.0, "float64", size, rounding=0.0))
    return Made({entry.name: (done, replace(report, certificate=certificate))}, done)


@torch.no_grad()
def on_grids(task: Task, entry: PlanEntry, made: Made, propagated: InputMoments | None) -> Made:
    """Round the layers that an entry has completed, as far as the plan has a grid for them.

    Parameters
    ----------
    task : Task
        All that the layers of a plan are made from.
    entry : PlanEntry
        The entry whose maker was called.
    made : Made
        The layers that were made, and the replacement to call.
    propagated : InputMoments or None
        Moments of the inputs that the entry's layer gets, where it was fitted to them.

    Returns
    -------
    Made
        The layers on their grids, with reports on what is left of the weights now.
    """
    layers = dict(made.layers)
    replacement = made.replacement
    for name, (layer, report) in made.layers.items():
        grid = task.entries[name].grid
        if grid is None or layer.grid is not None:
            continue
        start = time.perf_counter()
        rounded = _rounded(task, task.entries[name], layer, propagated if name == entry.name else None).layer
        layers[name] = rounded, _after(task, task.entries[name], rounded, report, time.perf_counter() - start)
        if name == entry.name:
            replacement = rounded.among_dense()
    return Made(layers, replacement)


def _rounded(task: Task, entry: PlanEntry, layer: CompressedLinear, propagated: InputMoments | None) -> RoundedLayer:
    """Round a layer that was fitted to its inputs already, so that nothing of their error is corrected again."""
    assert entry.grid is not None
    places = layer.kept if isinstance(layer, KeptNeurons) else None
    inputs = outputs = None
    if isinstance(layer, KeptInputs):
        inputs = places
    elif places is not None:
        outputs = places
    if propagated is not None and inputs is not None:
        propagated = InputMoments(propagated.student[inputs][:, inputs], propagated.cross[inputs][:, inputs])
    return round_layer(
        entry.name,
        layer,
        entry.grid,
        task.moments.statistics,
        gradients=entry.needs_gradients,
        damping=ROUNDING_DAMPING,
        propagated=propagated,
        inputs=inputs,
        outputs=outputs,
    )


def _after(task: Task, entry: PlanEntry, layer: CompressedLinear, report: LayerReport, seconds: float) -> LayerReport:
    """Return the report on a layer whose factors are rounded now."""
    module = task.model.get_submodule(entry.name)
    W = dense_weight(module, entry.name)[0].detach().to(torch.float64)
    near, rounding = _weight(layer)
    found = report_on(
        [(W, W - near)],
        entry,
        layer,
        norm=x_norm(task.moments.statistics, entry.name).to(W),
        certificate=as_json(plain_certificate(W, near, rounding)),
        rounding=rounding,
        rows=report.rows,
        columns=report.columns,
        seconds=report.seconds + seconds,
    )
    return replace(found, spectrum=report.spectrum)


def _weight(layer: CompressedLinear) -> tuple[Tensor, float]:
    """Return what the rounded factors stand for, multiplied out in double precision, and a bound on its rounding."""
    if isinstance(layer, KeptNeurons) and layer.inner_rank is None:
        return layer.weight.to(torch.float64), 0.0
    part = layer.part if isinstance(layer, KeptNeurons) else layer
    left, right = (factor.to(torch.float64) for factor in part.two_factors())
    near = left @ right
    rounding = evaluation_rounding(left, right, u=unit_roundoff(near.dtype, near))
    return (layer.spread(near) if isinstance(layer, KeptNeurons) else near), rounding
