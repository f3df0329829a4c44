"""One budget of parameters for many layers: which rank each gets, and which stay dense.

Every layer offers its error at each rank, in one unit for all layers; :func:`cur.ranks.allocate` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cur import ranks
from cur._lib.versions import versions
from cur.integrations.measure.moments import Moments
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.size import model_size
from cur.integrations.model.usage import model_name
from cur.integrations.nn import is_table
from cur.integrations.plan.config import METHODS, BudgetConfig
from cur.integrations.plan.dense import dense_remark
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.file_size import ByteCosts
from cur.integrations.plan.methods import NeuronsBeforeEntry, NeuronsEntry
from cur.integrations.plan.neuron_curves import neuron_curves
from cur.integrations.plan.plan import Plan, fingerprint
from cur.integrations.plan.rate_distortion import SMALLEST, Cut, LayerCurve, NeuronCurve, smallest_of, unit

__all__ = ["error_curves", "joint_curves", "plan_budget"]


# Share of the predicted loss that removing neurons must save in all. What the calibration text never asks of a neuron
# is not in the prediction: SmolLM2-135M is better off without where they are predicted to save 3 percent of it, and on
# other text where it is 16 percent.
_LEAST_GAIN = 0.2

# Of an even share of the budget, what a layer, or layers with neurons between them, keep at least if errors are
# relative. Outputs that a few tokens with enormous inputs dominate have a small error at rank 1, and whatever else the
# layer does would be lost.
_LEAST_SHARE = 0.75


def error_curves(
    model: nn.Module,
    statistics: Statistics,
    config: BudgetConfig,
    names: Sequence[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> list[LayerCurve]:
    """Compute the error of every layer at every rank.

    All that takes time in :func:`plan_budget`; of the configuration it depends on `method`, `gradients` and `damping`
    alone, and not on the budget.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        Statistics that cover the layers.
    config : BudgetConfig
        The configuration, which has the budget.
    names : sequence of str
        The names of the layers.
    progress : callable, optional
        Called as ``progress(done, total)`` after every layer.

    Returns
    -------
    list of LayerCurve
        A curve for each layer, in the order of `names`.

    Raises
    ------
    ValueError
        If the statistics lack what is needed.
    NumericalError
        If a weight is NaN or infinite.
    """
    moments = Moments(statistics)
    curves = []
    for done, name in enumerate(names, start=1):
        module = model.get_submodule(name)
        W, kind = finite_weight(module, name).to(torch.float64), smallest_of(module)
        H, G = moments.weights(name, W, gradients=config.gradients, damping=config.damping)
        m, n = W.shape
        # What is kept of a table are its own rows, the columns of the weight.
        X, rows, columns = (W.mT, G, H) if kind.by_inputs else (W, H, G)
        squares = METHODS[config.method].square_errors(X, row_weights=rows, column_weights=columns)
        curves.append(LayerCurve.of(name, (m, n), squares, unit(float(squares[0]), gradients=config.gradients), kind))
        if progress is not None:
            progress(done, len(names))
    return curves


def joint_curves(
    model: nn.Module,
    statistics: Statistics,
    config: BudgetConfig,
    names: Sequence[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> list[NeuronCurve]:
    """Compute the error at every number of neurons of the layers that have some between them, if the budget is for it.

    The complement of :func:`error_curves`, under the same conditions.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        Statistics that cover the layers.
    config : BudgetConfig
        The configuration, which has the budget.
    names : sequence of str
        The names of the layers.
    progress : callable, optional
        Called as ``progress(done, total)`` after every group of layers.

    Returns
    -------
    list of NeuronCurve
        A curve for each layer that reads neurons; empty if no neurons may be removed.
    """
    if not config.neurons or config.method != "best":
        return []
    options: dict[str, Any] = {"gradients": config.gradients, "damping": config.damping, "progress": progress}
    names = [name for name in names if not is_table(model.get_submodule(name))]
    return neuron_curves(model, Moments(statistics), names, **options)


def plan_budget(
    model: nn.Module,
    statistics: Statistics,
    config: BudgetConfig,
    curves: Sequence[LayerCurve],
    neurons: Sequence[NeuronCurve] = (),
    dense: Mapping[str, str] | None = None,
) -> Plan:
    """Share the budget among layers; those that are worth their parameters stay dense and have no entry.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        The statistics that the curves come from.
    config : BudgetConfig
        The configuration, which has the budget.
    curves : sequence of LayerCurve
        The results of :func:`error_curves` for the targeted layers.
    neurons : sequence of NeuronCurve
        The results of :func:`joint_curves`: options that remove neurons from a group of these layers.
    dense : mapping of str to str, optional
        A sentence by the name of each layer that nothing could be gained or measured of. Default: none.

    Returns
    -------
    Plan
        The plan, with the predicted cost of each layer. With gradients the sum is an estimate of the increase of the
        loss in nats per token while that is small; otherwise it has no meaning beyond this allocation.

    Raises
    ------
    ValueError
        If the budget cannot be met, or needs no compression.
    """
    targeted = sum(m * n for m, n in (curve.shape for curve in curves))
    whole = model_size(model).parameters
    on_disk = None if config.size is None else ByteCosts(model, [curve.name for curve in curves])
    prices = on_disk or _Numbers()
    options = _options(curves, neurons, prices)
    least = int(sum(option.costs.min() for option in options))
    if on_disk is not None and config.size is not None:
        budget = _size_budget(config.size, on_disk, least=least, dense=dense or {})
    else:
        budget = _budget(config, targeted, whole, least=least, dense=dense or {})
    if not config.gradients:
        options = _with_floor(options, budget)
    chosen = _shares(options, budget)
    alone = _options(curves, (), prices)
    if neurons and sum(option.costs.min() for option in alone) <= budget:
        if not config.gradients:
            alone = _with_floor(alone, budget)
        without = _shares(alone, budget)
        if _lost(options, chosen) >= (1.0 - _LEAST_GAIN) * _lost(alone, without):
            options, chosen = alone, without
    made = {
        entry.name: entry
        for option, number in zip(options, chosen, strict=True)
        for entry in option.entries(int(number), config)
    }
    entries = tuple(made[curve.name] for curve in curves if curve.name in made)
    return Plan(
        entries=entries,
        fingerprint=fingerprint(model),
        model=model_name(model),
        seed=config.seed,
        calibration=statistics.text_hash or None,
        calibration_tokens=statistics.tokens,
        calibration_precision=statistics.precision,
        own_text=statistics.own_text,
        correction=config.correction,
        angular=statistics.angular,
        versions=versions(),
        targeted_parameters=targeted,
        model_parameters=whole,
        dense=dense or {},
    )


@dataclass(frozen=True, eq=False)
class _Options:
    """What one layer, or layers with neurons between them, can take.

    Attributes
    ----------
    names : sequence of str
        The names of the layers; of those around neurons the consumer comes first.
    shapes : sequence of (int, int)
        The numbers of outputs and inputs of each layer.
    neurons : array of int, shape (k,)
        The number of neurons kept by each option; 0 for all.
    ranks : array of int, shape (k, layers)
        The rank of each layer, or of its part for the kept neurons, in each option; 0 for whole.
    predicted : array, shape (k, layers)
        The predicted error of each option, for each layer.
    costs : array, shape (k,)
        The cost of each option, of all these layers together.
    layout : str
        The layout of a layer that is factored by itself.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    neurons: np.ndarray[Any, Any]
    ranks: np.ndarray[Any, Any]
    predicted: np.ndarray[Any, Any]
    costs: np.ndarray[Any, Any]
    layout: str = SMALLEST.layout

    @property
    def errors(self) -> np.ndarray[Any, Any]:
        """Of all these layers together."""
        total: np.ndarray[Any, Any] = self.predicted.sum(axis=1)
        return total

    def at_least(self, share: float) -> _Options:
        """Return those options that keep a share of the whole, and the next one below."""
        below = self.costs[self.costs <= share * self.costs.max()]
        kept = self.costs >= below.max(initial=0)
        parts = {name: getattr(self, name)[kept] for name in ("neurons", "ranks", "predicted", "costs")}
        return replace(self, **parts)

    def entries(self, number: int, config: BudgetConfig) -> Iterator[PlanEntry]:
        """Yield what one of the options makes of the layers; one left dense has no entry."""
        count = int(self.neurons[number])
        for place, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            rank = int(self.ranks[number, place])
            common: dict[str, Any] = {
                "name": name,
                "shape": shape,
                "predicted": float(self.predicted[number, place]),
                "gradients": config.gradients,
                "damping": config.damping,
            }
            kept: dict[str, Any] = {"neurons": count, "inner_rank": rank or None}
            if count and place:
                yield NeuronsBeforeEntry(consumer=self.names[0], **kept, **common)
            elif count:
                yield NeuronsEntry(**kept, **common)
            elif rank:
                yield METHODS[config.method](rank=rank, layout=self.layout, **common)


def _shares(options: Sequence[_Options], budget: int) -> tuple[int, ...]:
    """Return which option each takes, so that the sum of errors is least."""
    return ranks.allocate([option.errors for option in options], [option.costs for option in options], budget)


def _with_floor(options: Sequence[_Options], budget: int) -> list[_Options]:
    """Return the options that leave all about :data:`_LEAST_SHARE` of an even share, less if the budget is small."""
    share = _LEAST_SHARE * budget / sum(float(option.costs.max()) for option in options)
    while True:
        some = [option.at_least(share) for option in options]
        if sum(option.costs.min() for option in some) <= budget:
            return some
        share /= 2.0


def _lost(options: Sequence[_Options], chosen: Sequence[int]) -> float:
    return sum(float(option.errors[number]) for option, number in zip(options, chosen, strict=True))


class _Numbers:
    """Counts parameters, where :class:`ByteCosts` counts bytes."""

    def options(self, curve: LayerCurve) -> np.ndarray[Any, Any]:
        """Return what one layer takes at each rank, and dense."""
        return curve.costs

    def neurons(self, curve: NeuronCurve) -> np.ndarray[Any, Any]:
        """Return what layers take for each number of neurons kept between them."""
        return curve.costs

    def cut(self, curve: NeuronCurve, cut: Cut) -> list[np.ndarray[Any, Any]]:
        """Return what kept neurons leave of each of these layers, at each rank, and whole."""
        return [layer.costs for layer in cut.layers]


def _options(
    curves: Sequence[LayerCurve], neurons: Sequence[NeuronCurve], prices: _Numbers | ByteCosts
) -> list[_Options]:
    """Return the options of layers that choose alone, and of those that have neurons between them."""
    by_name = {curve.name: curve for curve in curves}
    grouped = {name for curve in neurons for name in curve.names}
    found = []
    for curve in curves:
        if curve.name not in grouped:
            rank = _as_ranks(np.arange(len(curve.errors)), curve)[:, None]
            none = np.zeros(len(rank), dtype=np.int64)
            errors, costs = curve.errors[:, None], prices.options(curve)
            found.append(_Options([curve.name], [curve.shape], none, rank, errors, costs, curve.kind.layout))
    for group in neurons:
        alone = [by_name[name] for name in group.names]
        forms: list[tuple[Any, ...]] = [(0, *_together(alone, [prices.options(curve) for curve in alone]))]
        some = np.arange(1, len(group.errors) + 1)
        whole = np.zeros((len(some), len(alone)), dtype=np.int64)
        lost = np.zeros(whole.shape)
        lost[:, 0] = group.errors
        forms.append((some, whole, lost, prices.neurons(group)))
        for cut in group.cuts:
            rank, lost, costs = _together(cut.layers, prices.cut(group, cut))
            lost[:, 0] += cut.error
            forms.append((cut.count, rank, lost, costs))
        counts = np.concatenate([np.broadcast_to(count, len(rank)) for count, rank, _, _ in forms])
        rank, lost, costs = (np.concatenate(part) for part in zip(*(form[1:] for form in forms), strict=True))
        found.append(_Options(group.names, group.shapes, counts, rank, lost, costs))
    return found


def _together(
    curves: Sequence[LayerCurve], costs: Sequence[np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ranks, errors and costs of what several layers do each for itself.

    Of the many combinations those that some multiplier would choose: allocation by one would never take another.
    """
    choices = ranks.combinations([curve.errors for curve in curves], costs)
    rank = np.stack([_as_ranks(choices[:, i], curve) for i, curve in enumerate(curves)], axis=1)
    lost = np.stack([curve.errors[choices[:, i]] for i, curve in enumerate(curves)], axis=1)
    return rank, lost, np.asarray(sum(cost[choices[:, i]] for i, cost in enumerate(costs)))


def _as_ranks(options: np.ndarray[Any, Any], curve: LayerCurve) -> np.ndarray[Any, Any]:
    """Return the rank of options of a curve, the last of which is to leave the layer whole, as 0."""
    return np.where(options == len(curve.errors) - 1, 0, options + 1)


def _budget(config: BudgetConfig, targeted: int, whole: int, *, least: int, dense: Mapping[str, str]) -> int:
    """Return the number of parameters that the targeted layers may keep."""
    if config.keep is not None:
        budget, given = int(config.keep * targeted), f"`keep` must be at least {least / targeted:.4f}"
        got = f"{config.keep}"
    else:
        asked = config.parameters or 0
        budget = asked - (whole - targeted)
        given, got = f"`parameters` must be at least {whole - targeted + least:,}", f"{asked:,}"
        if asked >= whole:
            raise ValueError(
                f"`parameters` must be below {whole:,}, what the model has now; got {got}: there is nothing to do"
            )
    if budget < least:
        raise ValueError(
            f"{given}, the least that the targeted layers can be brought to (rank 1 or one neuron); got {got}"
            f"{_beside(dense)}"
        )
    return budget


def _size_budget(size: int, on_disk: ByteCosts, *, least: int, dense: Mapping[str, str]) -> int:
    """Return the bytes that the targeted layers may take."""
    if size >= on_disk.dense():
        raise ValueError(
            f"`size` must be below {on_disk.dense():,}, the bytes that the model takes now; got {size:,}: there is "
            "nothing to do"
        )
    if size < on_disk.fixed + least:
        raise ValueError(
            f"`size` must be at least {on_disk.fixed + least:,} bytes, of which {on_disk.fixed:,} belong to what is "
            f"not targeted (the rest is rank 1 or one neuron); got {size:,}{_beside(dense)}"
        )
    return size - on_disk.fixed


def _beside(dense: Mapping[str, str]) -> str:
    """Return which targets stay dense and why, as the end of a sentence."""
    remark = dense_remark(dense).rstrip(".")
    return f"; {remark[:1].lower()}{remark[1:]}" if remark else ""
