"""One budget of parameters for many layers: which rank each gets, and which stay dense.

Every layer offers its error at each rank, in one unit for all layers; :func:`cur.ranks.allocate` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur import ranks
from cur._lib.versions import versions
from cur.integrations.measure.moments import Moments
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.size import model_size
from cur.integrations.model.unrolling import unrolled
from cur.integrations.model.usage import model_name
from cur.integrations.nn import is_table
from cur.integrations.plan.config import METHODS, BudgetConfig
from cur.integrations.plan.dense import dense_remark
from cur.integrations.plan.file_size import ByteCosts, LayerBytes, Numbers
from cur.integrations.plan.grid_errors import expected_errors, pivots
from cur.integrations.plan.methods import ROUNDING_DAMPING
from cur.integrations.plan.neuron_curves import neuron_curves
from cur.integrations.plan.options import Options, layer_options
from cur.integrations.plan.plan import Plan, fingerprint
from cur.integrations.plan.rate_distortion import LayerCurve, NeuronCurve, smallest_of, unit

__all__ = ["SHARE", "Forms", "error_curves", "joint_curves", "plan_budget"]


# Share of the predicted loss that removing neurons must save in all. What the calibration text never asks of a neuron
# is not in the prediction: SmolLM2-135M is better off without where they are predicted to save 3 percent of it, and on
# other text where it is 16 percent.
_LEAST_GAIN = 0.2

# Of an even share of the budget, what a layer, or layers with neurons between them, keep at least if errors are
# relative. Outputs that a few tokens with enormous inputs dominate have a small error at rank 1, and whatever else the
# layer does would be lost.
_LEAST_SHARE = 0.75

SHARE = 0.4
"""Of a tolerance, what layers may be predicted to lose in the first plan for it: on other text than that of the
calibration, and together, they lose two or three times what is predicted."""


def error_curves(
    model: nn.Module,
    statistics: Statistics,
    config: BudgetConfig,
    names: Sequence[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> list[LayerCurve]:
    """Compute the error of every layer at every rank.

    All that takes time in :func:`plan_budget`; of the configuration it depends on `method`, `gradients`, `damping` and
    whether numbers may be rounded, but not on how much may be kept.

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
    moments, rounding = Moments(statistics), _Rounding(statistics, gradients=config.gradients)
    curves = []
    for done, name in enumerate(names, start=1):
        module = model.get_submodule(name)
        W, kind = finite_weight(module, name).to(torch.float64), smallest_of(module)
        on_grids = rounding.errors(name, W) if config.rounds and not is_table(module) else None
        H, G = moments.weights(name, W, gradients=config.gradients, damping=config.damping)
        m, n = W.shape
        # What is kept of a table are its own rows, the columns of the weight.
        X, rows, columns = (W.mT, G, H) if kind.by_inputs else (W, H, G)
        squares = METHODS[config.method].square_errors(X, row_weights=rows, column_weights=columns)
        scale = unit(float(squares[0]), gradients=config.gradients)
        curves.append(LayerCurve.of(name, (m, n), squares, scale, kind, on_grids))
        if progress is not None:
            progress(done, len(names))
    return curves


@dataclass(frozen=True, kw_only=True, eq=False)
class Forms:
    """What the layers of a model can take, from which plans for a budget follow without looking at the layers again.

    Attributes
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
        The results of :func:`joint_curves`.
    dense : mapping of str to str
        A sentence by the name of each layer that nothing could be gained or measured of.
    vocabulary : sequence of LayerCurve
        The curves of tables of tokens and of the output head, where they share the budget.
    """

    model: nn.Module
    statistics: Statistics
    config: BudgetConfig
    curves: Sequence[LayerCurve]
    neurons: Sequence[NeuronCurve]
    dense: Mapping[str, str]
    vocabulary: Sequence[LayerCurve] = ()

    def plan(self, *, loss: float | None = None) -> Plan:
        """Share the budget among the layers, see :func:`plan_budget`.

        Parameters
        ----------
        loss : float, optional
            What all layers may lose, as it is predicted, where the budget is a tolerance.

        Returns
        -------
        Plan
            The plan.
        """
        with unrolled(self.model):
            return plan_budget(
                self.model,
                self.statistics,
                self.config,
                self.curves,
                self.neurons,
                self.dense,
                vocabulary=self.vocabulary,
                loss=loss,
            )


class _Rounding:
    """What rounding layers is expected to cost; layers in a row that share a moment share the work."""

    def __init__(self, statistics: Statistics, *, gradients: bool) -> None:
        self._statistics = statistics
        self._gradients = gradients
        self._latest: tuple[int, Tensor] | None = None

    def errors(self, name: str, W: Tensor) -> Any:
        try:
            return self._errors(name, W)
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error

    def _errors(self, name: str, W: Tensor) -> Any:
        moment = self._statistics.second_moment(name)
        shared = self._statistics.products[name]
        if self._latest is None or self._latest[0] != id(shared):
            self._latest = id(shared), pivots(moment.to(W), ROUNDING_DAMPING, name)
        rows = None
        if self._gradients:
            rows = pivots(self._statistics.output_moment(name).to(W), ROUNDING_DAMPING, name)
        return expected_errors(W, rows, self._latest[1])


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
    options["cuts"] = not config.rounds  # of which none is offered on a grid
    names = [name for name in names if not is_table(model.get_submodule(name))]
    return neuron_curves(model, Moments(statistics), names, **options)


def plan_budget(
    model: nn.Module,
    statistics: Statistics,
    config: BudgetConfig,
    curves: Sequence[LayerCurve],
    neurons: Sequence[NeuronCurve] = (),
    dense: Mapping[str, str] | None = None,
    *,
    vocabulary: Sequence[LayerCurve] = (),
    loss: float | None = None,
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
    vocabulary : sequence of LayerCurve
        The results of :func:`~cur.integrations.plan.vocabulary_curves.vocabulary_curves`, where tables and heads share
        the budget; they are not among the targeted layers, of which shares are told.
    loss : float, optional
        What all layers may lose, as it is predicted, where the budget is a tolerance. By default :data:`SHARE` of that.

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
    if any(len(curve.rounded) for curve in curves) != config.rounds and any(len(curve.errors) > 1 for curve in curves):
        raise ValueError(
            "`curves` must have been made for a budget of the same kind: those for bytes or bits have what rounding "
            "costs, others do not; make them again with this configuration"
        )
    every = [*curves, *vocabulary]
    names = [curve.name for curve in every]
    on_disk = None if config.size is None else ByteCosts(model, names)
    prices: Numbers = on_disk or (LayerBytes(model, names) if config.rounds or config.bits else Numbers())

    def made(options: Sequence[Options], chosen: Sequence[int]) -> Plan:
        found = {
            entry.name: entry
            for option, number in zip(options, chosen, strict=True)
            for entry in option.entries(int(number), config)
        }
        return Plan(
            entries=tuple(found[curve.name] for curve in every if curve.name in found),
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

    options = layer_options(every, neurons, prices)
    if config.tol is not None:
        return made(options, _within(options, SHARE * config.tol if loss is None else loss))
    least = sum(option.least for option in options)
    if on_disk is not None and config.size is not None:
        budget = _size_budget(config.size, on_disk, least=least, rest=_rest(config), dense=dense or {})
    elif config.bits is not None:
        rest = f"{_rest(config)}{' with their steps' if config.rounds else ''}"
        budget = _bits_budget(config.bits, targeted, prices, curves, least=least, rest=rest, dense=dense or {})
    else:
        budget = _budget(config, targeted, whole, least=least, dense=dense or {})
    if not config.gradients:
        options = _with_floor(options, budget)
    chosen = _shares(options, budget)
    alone = layer_options(every, (), prices) if neurons else []
    if neurons and sum(option.costs.min() for option in alone) <= budget:
        if not config.gradients:
            alone = _with_floor(alone, budget)
        without = _shares(alone, budget)
        if _lost(options, chosen) >= (1.0 - _LEAST_GAIN) * _lost(alone, without):
            options, chosen = alone, without
    return made(options, chosen)


def _shares(options: Sequence[Options], budget: int) -> tuple[int, ...]:
    """Return which option each takes, so that the sum of errors is least."""
    return ranks.allocate([option.errors for option in options], [option.costs for option in options], budget)


def _within(options: Sequence[Options], loss: float) -> tuple[int, ...]:
    """Return which option each takes, so that the sum of costs is least where that of errors is no more than a loss."""
    return ranks.allocate([option.costs for option in options], [option.errors for option in options], loss)


def _with_floor(options: Sequence[Options], budget: int) -> list[Options]:
    """Return the options that leave all about :data:`_LEAST_SHARE` of an even share, less if the budget is small."""
    share = _LEAST_SHARE * budget / sum(float(option.costs.max()) for option in options)
    while True:
        some = [option.at_least(share) for option in options]
        if sum(option.costs.min() for option in some) <= budget:
            return some
        share /= 2.0


def _lost(options: Sequence[Options], chosen: Sequence[int]) -> float:
    return sum(float(option.errors[number]) for option, number in zip(options, chosen, strict=True))


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


def _rest(config: BudgetConfig) -> str:
    """Say what the least is that layers can be brought to."""
    return "what grids of 2 bits take" if config.rounds else "rank 1 or one neuron"


def _size_budget(size: int, on_disk: ByteCosts, *, least: int, rest: str, dense: Mapping[str, str]) -> int:
    """Return the bytes that the targeted layers may take."""
    if size >= on_disk.dense():
        raise ValueError(
            f"`size` must be below {on_disk.dense():,}, the bytes that the model takes now; got {size:,}: there is "
            "nothing to do"
        )
    if size < on_disk.fixed + least:
        raise ValueError(
            f"`size` must be at least {on_disk.fixed + least:,} bytes, of which {on_disk.fixed:,} belong to what is "
            f"not targeted (the rest is {rest}); got {size:,}{_beside(dense)}"
        )
    return size - on_disk.fixed


def _bits_budget(
    bits: float,
    targeted: int,
    prices: Numbers,
    curves: Sequence[LayerCurve],
    *,
    least: int,
    rest: str,
    dense: Mapping[str, str],
) -> int:
    """Return the bytes that the targeted layers may take, from the bits for each of their numbers."""
    now = sum(prices.whole(curve.name, curve.shape) for curve in curves)
    if 8 * now <= bits * targeted:
        raise ValueError(
            f"`bits` must be below {8 * now / targeted:g}, what a number of the targeted layers takes now; got {bits}: "
            "there is nothing to do"
        )
    if bits * targeted < 8 * least:
        raise ValueError(
            f"`bits` must be at least {math.ceil(800 * least / targeted) / 100}, {rest}; got {bits}{_beside(dense)}"
        )
    return int(bits * targeted / 8)


def _beside(dense: Mapping[str, str]) -> str:
    """Return which targets stay dense and why, as the end of a sentence."""
    remark = dense_remark(dense).rstrip(".")
    return f"; {remark[:1].lower()}{remark[1:]}" if remark else ""
