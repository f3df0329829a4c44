"""Removing neurons between layers: what it costs, and the replacements of the layers around them."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur._driver.certify import evaluation_rounding
from cur._lib.array import unit_roundoff
from cur.integrations.factor.layer import as_json, interpolative_layer, plain_certificate, report_on
from cur.integrations.factor.methods import Made, Task, maker
from cur.integrations.measure.moments import Moments, x_norm
from cur.integrations.measure.propagation import InputMoments
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.neurons import neuron_groups
from cur.integrations.nn import (
    CompressedLinear,
    InterpolativeLinear,
    KeptInputs,
    KeptOutputs,
    dense_weight,
    learn_as_,
)
from cur.integrations.plan.entry import PlanEntry, PlanError
from cur.integrations.plan.methods import NeuronsBeforeEntry, NeuronsEntry
from cur.integrations.plan.neuron_curves import double_weight, neuron_order
from cur.integrations.report.data import LayerReport
from cur.weighted.inputs import fit, own_inputs
from cur.weighted.truncation import weighted_svd

__all__ = ["FittedBefore", "fit_before", "keep_neurons"]


@dataclass(frozen=True, eq=False)
class FittedBefore:
    """A producer of neurons, fitted to its inputs before the layer that reads the neurons is made.

    Attributes
    ----------
    full_width : nn.Module
        The layer with all neurons. Rows that are known to be kept already have their final rank.
    inner : InterpolativeLinear or None
        These rows as a factored layer, if there is an inner rank.
    places : Tensor or None
        The indices of these rows, if some producer of the neurons has an inner rank; otherwise the next layer chooses
        them.
    seconds : float
        The seconds that the fit took.
    """

    full_width: nn.Module
    inner: InterpolativeLinear | None
    places: Tensor | None
    seconds: float


@torch.no_grad()
def fit_before(
    model: nn.Module,
    name: str,
    entries: Mapping[str, PlanEntry],
    moments: Moments,
    propagated: InputMoments,
    *,
    correction: float,
    fitted: Mapping[str, FittedBefore],
) -> FittedBefore:
    """Fit a producer of neurons to its inputs.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is not changed.
    name : str
        The name of the layer.
    entries : mapping
        The plan's entries, by the names of their layers.
    moments, propagated, correction
        The statistics and the correction, as for :func:`~cur.integrations.factor.layer.factorize`.
    fitted : mapping
        The results of this function for the other producers of the same neurons, by name.

    Returns
    -------
    FittedBefore
        The fitted layer with all neurons, and its kept rows where these are known.
    """
    start = time.perf_counter()
    entry, module = entries[name], model.get_submodule(name)
    assert isinstance(entry, NeuronsBeforeEntry)
    W = double_weight(model, name)
    M, wanted = propagated.problem(W, correction=correction, damping=entry.damping)
    solved = torch.linalg.solve(M, wanted, left=False)
    full_width = copy.deepcopy(module)
    weight, bias, _ = dense_weight(full_width, name)
    weight.copy_(solved)
    sides = {other.name: other for other in _all_before(entry.consumer, entries)}
    if all(other.inner_rank is None for other in sides.values()):
        return FittedBefore(full_width, None, None, time.perf_counter() - start)
    # All producers must keep the same rows: the first one to be fitted decides.
    places = next((fitted[other].places for other in sides if other in fitted), None)
    if places is None:
        consumer = entries[entry.consumer]
        assert isinstance(consumer, NeuronsEntry)
        found = neuron_order(model, moments, consumer.name, gradients=consumer.gradients, damping=consumer.damping)
        places = found.kept(consumer.neurons)
    if entry.inner_rank is None:
        return FittedBefore(full_width, None, places, time.perf_counter() - start)
    here = places.to(W.device)
    H = moments.outputs(name, W, damping=entry.damping)[here][:, here] if entry.gradients else None
    some = None if bias is None else bias[here]
    inner = _factored(solved[here], entry.inner_rank, H, M, dtype=weight.dtype, bias=some)
    # The next layer is fitted to what these rows will give, and not to what they gave before they were factored.
    weight[here] = _product(inner).to(weight)
    return FittedBefore(full_width, inner, places, time.perf_counter() - start)


def _factored(X: Tensor, rank: int, H: Any, G: Any, *, dtype: torch.dtype, bias: Tensor | None) -> InterpolativeLinear:
    near = weighted_svd(X, row_weights=H, column_weights=G).truncate(rank).interpolative()
    return interpolative_layer(near, dtype=dtype, bias=bias)


def _product(layer: InterpolativeLinear) -> Tensor:
    """Return the weight of a factored layer, multiplied out in float64."""
    left, right = layer.two_factors()
    return left.double() @ right.double()


@torch.no_grad()
def keep_neurons(
    model: nn.Module,
    entry: NeuronsEntry,
    before: Sequence[NeuronsBeforeEntry],
    moments: Moments,
    *,
    propagated: InputMoments | None = None,
    correction: float = 0.0,
    fitted: Mapping[str, FittedBefore] | None = None,
) -> dict[str, tuple[CompressedLinear, LayerReport]]:
    """Choose the neurons to keep, cut their producers to them, and fit the next layer to them.

    Where the plan has an inner rank, the remaining weight is factored at that rank.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is not changed.
    entry : NeuronsEntry
        The entry of the next layer, which reads the neurons.
    before : sequence of NeuronsBeforeEntry
        The entries of the layers that produce the neurons.
    moments, propagated, correction
        The statistics of the next layer and the correction, as for :func:`~cur.integrations.factor.layer.factorize`.
    fitted : mapping, optional
        The producers that were fitted to their inputs, by name; of others their own rows are kept.

    Returns
    -------
    dict
        The replacement of each layer and the report on it, by name; the entries of the next layer are fitted.

    Raises
    ------
    NumericalError
        If a weight is NaN or infinite.
    ValueError
        If the statistics do not cover the next layer.
    PlanError
        If `before` is not the set of all layers that produce its neurons.
    """
    start = time.perf_counter()
    names = [part.name for part in before]
    if set(neuron_groups(model, [entry.name, *names]).get(entry.name, ())) != set(names) or not names:
        raise PlanError(
            f"the plan removes neurons between {', '.join(names) or 'no layer'} and {entry.name}, which are not the "
            "layers around some; cut all of the layers that give them, or none"
        )
    fitted = fitted or {}
    places, columns = _consumer(model, entry, moments, propagated, correction, fitted)
    kept = torch.zeros(entry.shape[1], dtype=torch.bool, device=places.device)
    kept[places] = True
    done: dict[str, tuple[CompressedLinear, LayerReport]] = {}
    parts: list[NeuronsEntry | NeuronsBeforeEntry] = [entry, *before]
    for part in parts:
        module = model.get_submodule(part.name)
        weight = finite_weight(module, part.name)
        _, bias, transposed = dense_weight(module, part.name)
        here, mask = places.to(weight.device), kept.to(weight.device)
        layer: KeptInputs | KeptOutputs
        if isinstance(part, NeuronsEntry):
            layer = KeptInputs.from_part(columns, mask, bias=bias, transposed=transposed)
        else:
            some = None if bias is None else bias[here]
            rows = _before(model, part, here, moments, fitted.get(part.name))
            layer = KeptOutputs.from_part(rows, mask, bias=some, transposed=transposed)
        layer.train(module.training)
        learn_as_(layer, module)
        earlier = fitted[part.name].seconds if part.name in fitted else 0.0
        own = isinstance(layer, KeptOutputs) and part.name not in fitted and part.inner_rank is None
        wide, near, rounding = weight.to(torch.float64), layer.weight.to(torch.float64), 0.0
        if layer.inner_rank is not None:
            near = layer.spread(_product(layer.part))
            factors = [factor.to(near) for factor in layer.part.two_factors()]
            rounding = evaluation_rounding(*factors, u=unit_roundoff(near.dtype, near))
        done[part.name] = (
            layer,
            report_on(
                [(wide, wide - near)],
                part,
                layer,
                norm=x_norm(moments.statistics, part.name).to(wide),
                certificate=as_json(plain_certificate(wide, near, rounding)),
                rounding=rounding,
                rows=tuple(places.tolist()) if own else (),
                columns=(),  # those of the next layer are fitted, no longer the weight's own
                seconds=time.perf_counter() - start + earlier,
            ),
        )
        start = time.perf_counter()
    return done


def _consumer(
    model: nn.Module,
    entry: NeuronsEntry,
    moments: Moments,
    propagated: InputMoments | None,
    correction: float,
    fitted: Mapping[str, FittedBefore],
) -> tuple[Tensor, Tensor | InterpolativeLinear]:
    """Return the neurons to keep, and the columns of the next layer that are fitted to them."""
    W = double_weight(model, entry.name)
    H, G = moments.weights(entry.name, W, gradients=entry.gradients, damping=entry.damping)
    if propagated is None:
        found = own_inputs(W, row_weights=H, column_weights=G)
        places, columns, M = found.kept(entry.neurons), found.truncate(entry.neurons), found.moment
    else:
        M, cross = propagated.problem(W, correction=correction, damping=entry.damping)
        known = [early.places for early in fitted.values() if early.places is not None]
        if known:
            places = known[0].to(W.device)
        else:
            # The error of a layer of all inputs fitted to these moments, and what removing some of them adds to it.
            best = torch.linalg.solve(M, cross, left=False)
            places = own_inputs(best, row_weights=H, column_weights=M).kept(entry.neurons)
        columns = fit(cross, M, places)
    weight, bias, _ = dense_weight(model.get_submodule(entry.name), entry.name)
    if entry.inner_rank is None:
        return places, columns.to(weight.dtype)
    inputs = M[places][:, places]
    return places, _factored(columns, entry.inner_rank, H, inputs, dtype=weight.dtype, bias=bias)


def _before(
    model: nn.Module, entry: NeuronsBeforeEntry, places: Tensor, moments: Moments, fitted: FittedBefore | None
) -> Tensor | InterpolativeLinear:
    """Return the rows of a producer that belong to the kept neurons."""
    if fitted is not None and fitted.inner is not None:
        return fitted.inner
    module = model.get_submodule(entry.name) if fitted is None else fitted.full_width
    weight, bias, _ = dense_weight(module, entry.name)
    if entry.inner_rank is None:
        return weight.detach()[places]
    W = weight.detach().to(torch.float64)
    H, G = moments.weights(entry.name, W, gradients=False, damping=entry.damping)
    if entry.gradients:
        H = moments.outputs(entry.name, W, damping=entry.damping)[places][:, places]
    some = None if bias is None else bias[places]
    return _factored(W[places], entry.inner_rank, H, G, dtype=weight.dtype, bias=some)


@maker(NeuronsEntry)
def _keep(task: Task, entry: NeuronsEntry, propagated: InputMoments | None) -> Made:
    before = _all_before(entry.name, task.entries)
    fitted = {part.name: task.begun[part.name] for part in before if part.name in task.begun}
    done = keep_neurons(
        task.model, entry, before, task.moments, propagated=propagated, correction=task.correction, fitted=fitted
    )
    return Made(done, done[entry.name][0].for_all_inputs)  # while its producers still give all neurons


@maker(NeuronsBeforeEntry)
def _begin(task: Task, entry: NeuronsBeforeEntry, propagated: InputMoments | None) -> Made:
    if propagated is None:
        raise PlanError(f"{entry.name} is made together with {entry.consumer}; make that one")
    # Of full width for now: the wanted outputs of the next layer depend on the other rows, too.
    begun = fit_before(
        task.model,
        entry.name,
        task.entries,
        task.moments,
        propagated,
        correction=task.correction,
        fitted=task.begun,
    )
    task.begun[entry.name] = begun
    return Made({}, begun.full_width)


def _all_before(consumer: str, entries: Mapping[str, PlanEntry]) -> list[NeuronsBeforeEntry]:
    """Return the entries of all producers of a layer's neurons."""
    return [entry for entry in entries.values() if isinstance(entry, NeuronsBeforeEntry) and entry.consumer == consumer]
