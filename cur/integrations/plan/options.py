"""What layers can take: ranks, neurons, grids of few bits or to stay as they are, each with its error and its cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cur import ranks
from cur.integrations.nn import CompressedLinear, KeptInputs, KeptOutputs, WholeLinear, WholeTable
from cur.integrations.plan.config import METHODS, BudgetConfig
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.file_size import Numbers
from cur.integrations.plan.grid_errors import FACTORS, GRIDS
from cur.integrations.plan.methods import NeuronsBeforeEntry, NeuronsEntry, RoundedEntry
from cur.integrations.plan.rate_distortion import Cut, LayerCurve, NeuronCurve

__all__ = ["Options", "layer_options"]

Vector = np.ndarray[Any, Any]

# Of the ranks of a layer, and of the numbers of neurons, so many are tried with every grid.
_RANKS, _COUNTS = 24, 16
_LEAST_NEURONS = 0.3

# Factors lose several times what the whole weight does: few bits and fine groups are not for them.
_FOR_FACTORS = tuple(place for place, grid in enumerate(GRIDS) if grid.group == 64 and grid.bits > 2)


@dataclass(frozen=True, eq=False)
class Options:
    """What one layer, or layers with neurons between them, can take.

    Attributes
    ----------
    names : sequence of str
        The names of the layers; of those around neurons the consumer comes first.
    shapes : sequence of (int, int)
        The numbers of outputs and inputs of each layer.
    layouts : sequence of str
        The layout of each layer where it is factored by itself.
    tied : sequence of tuple of str
        The names of the modules that share the weight of each layer.
    neurons : array of int, shape (k,)
        The number of neurons kept by each option; 0 for all.
    ranks : array of int, shape (k, layers)
        The rank of each layer, or of its part for the kept neurons, in each option; 0 for whole.
    grids : array of int, shape (k, layers)
        The place of each layer's grid among :data:`~cur.integrations.plan.grid_errors.GRIDS`; -1 for none.
    predicted : array, shape (k, layers)
        The predicted error of each option, for each layer.
    costs : array, shape (k,)
        The cost of each option, of all these layers together.
    least : int
        The least that a budget must have for these layers: what the cheapest option takes, or, of layers that may be
        rounded, whole ones on the coarsest grid, below which little is left of them.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    layouts: Sequence[str]
    tied: Sequence[tuple[str, ...]]
    neurons: Vector
    ranks: Vector
    grids: Vector
    predicted: Vector
    costs: Vector
    least: int

    @property
    def errors(self) -> Vector:
        """Of all these layers together."""
        total: Vector = self.predicted.sum(axis=1)
        return total

    def at_least(self, share: float) -> Options:
        """Return those options that keep a share of the whole, and the next one below.

        Parameters
        ----------
        share : float
            The share of the largest cost.
        """
        below = self.costs[self.costs <= share * self.costs.max()]
        kept = self.costs >= below.max(initial=0)
        parts = {name: getattr(self, name)[kept] for name in ("neurons", "ranks", "grids", "predicted", "costs")}
        return replace(self, **parts)

    def entries(self, number: int, config: BudgetConfig) -> Iterator[PlanEntry]:
        """Yield what one of the options makes of the layers; one left dense has no entry.

        Parameters
        ----------
        number : int
            The place of the option.
        config : BudgetConfig
            The configuration, which has the method.

        Yields
        ------
        PlanEntry
            The entry of a layer.
        """
        count = int(self.neurons[number])
        for place, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            rank, at = int(self.ranks[number, place]), int(self.grids[number, place])
            grid = None if at < 0 else GRIDS[at]
            common: dict[str, Any] = {
                "name": name,
                "shape": shape,
                "predicted": float(self.predicted[number, place]),
                "gradients": config.gradients,
                "grid": grid,
            }
            if not count and not rank and grid is not None:
                ends = self.layouts[place] in (WholeTable.layout, WholeLinear.layout)
                common["layout"] = self.layouts[place] if ends else WholeLinear.layout
                if self.layouts[place] == WholeLinear.layout:  # a head: gradients of all tokens would be measured
                    common["gradients"] = False
                yield RoundedEntry(tied=self.tied[place], **common)
                continue
            common["damping"] = config.damping
            kept: dict[str, Any] = {"neurons": count, "inner_rank": rank or None}
            if count and place:
                yield NeuronsBeforeEntry(consumer=self.names[0], **kept, **common)
            elif count:
                yield NeuronsEntry(**kept, **common)
            elif rank:
                yield METHODS[config.method](rank=rank, layout=self.layouts[place], **common)


def layer_options(curves: Sequence[LayerCurve], neurons: Sequence[NeuronCurve], prices: Numbers) -> list[Options]:
    """Return the options of layers that choose alone, and of those that have neurons between them.

    Parameters
    ----------
    curves : sequence of LayerCurve
        The curves of all layers.
    neurons : sequence of NeuronCurve
        The curves of groups of these layers.
    prices : Numbers
        Says what each option costs.

    Returns
    -------
    list of Options
        Options of layers that choose alone, in order, and then of the groups.
    """
    by_name = {curve.name: curve for curve in curves}
    grouped = {name for curve in neurons for name in curve.names}
    found = []
    for curve in curves:
        if curve.name not in grouped:
            one = _alone(curve, prices)
            none = np.zeros(len(one.costs), dtype=np.int64)
            found.append(_form(none, _Form.of(one)).options([curve], prices))
    for group in neurons:
        own = [by_name[name] for name in group.names]
        forms = [_form(0, _together([_alone(curve, prices) for curve in own]))]
        on_grids = all(len(curve.rounded) for curve in own)
        forms += _fewer_on_grids(group, own, prices) if on_grids else _fewer(group, own, prices)
        found.append(_all(forms).options(own, prices))
    return found


@dataclass(frozen=True, eq=False)
class _Choices:
    """What one layer can take by itself: ranks (0 for whole), places of grids (-1 for none), errors and costs."""

    ranks: Vector
    grids: Vector
    errors: Vector
    costs: Vector


@dataclass(frozen=True, eq=False)
class _Form:
    """Options of several layers together, as :class:`Options` has them, and of how many neurons."""

    ranks: Vector
    grids: Vector
    predicted: Vector
    costs: Vector
    neurons: Any = 0

    @classmethod
    def of(cls, one: _Choices) -> _Form:
        return cls(one.ranks[:, None], one.grids[:, None], one.errors[:, None], one.costs)

    def options(self, curves: Sequence[LayerCurve], prices: Numbers) -> Options:
        least = int(self.costs.min())
        if all(len(curve.rounded) for curve in curves):
            whole = (_on_grids(_whole(curve), curve, min(curve.shape), curve.rounded, prices) for curve in curves)
            least = sum(int(each.costs.min()) for each in whole)
        return Options(
            [curve.name for curve in curves],
            [curve.shape for curve in curves],
            [curve.kind.layout for curve in curves],
            [curve.tied for curve in curves],
            self.neurons,
            self.ranks,
            self.grids,
            self.predicted,
            self.costs,
            least,
        )


def _form(neurons: Any, form: _Form) -> _Form:
    """Return a form with the number of neurons that its options keep."""
    return replace(form, neurons=np.broadcast_to(neurons, form.costs.shape))


def _all(forms: Sequence[_Form]) -> _Form:
    names = ("ranks", "grids", "predicted", "costs", "neurons")
    return _Form(**{name: np.concatenate([getattr(form, name) for form in forms]) for name in names})


def _alone(curve: LayerCurve, prices: Numbers) -> _Choices:
    """Return what a layer can take by itself."""
    top = len(curve.errors) - 1
    some = np.arange(1, top + 1)
    whole = _Choices(
        np.zeros(1, np.int64), np.full(1, -1), np.zeros(1), np.array([prices.whole(curve.name, curve.shape)])
    )
    if not len(curve.rounded):
        if not top:
            return whole
        costs = prices.stored(curve.kind, curve.name, curve.shape, some)
        return _chain([_Choices(some, np.full(top, -1), curve.errors[:-1], costs), whole])
    found = [whole, _on_grids(_whole(curve), curve, min(curve.shape), curve.rounded, prices)]
    if top:
        some = np.unique(np.linspace(1, top, _RANKS).astype(np.int64))
        for at in _FOR_FACTORS:
            costs = prices.stored(curve.kind, curve.name, curve.shape, some, None, GRIDS[at])
            errors = curve.errors[some - 1] + FACTORS * curve.rounded[at]
            found.append(_Choices(some, np.full(len(some), at), errors, costs))
    return _chain(found)


def _on_grids(kind: type[CompressedLinear], curve: LayerCurve, rank: int, errors: Vector, prices: Numbers) -> _Choices:
    """Return a layer on each grid, with all that it keeps."""
    offered = np.flatnonzero(np.isfinite(errors))
    costs = [prices.stored(kind, curve.name, curve.shape, rank, None, GRIDS[place]) for place in offered]
    return _Choices(np.zeros(len(offered), np.int64), offered, errors[offered], np.array(costs))


def _whole(curve: LayerCurve) -> type[CompressedLinear]:
    """Return the type of a layer that is kept whole."""
    return curve.kind if issubclass(curve.kind, WholeTable) else WholeLinear


def _chain(parts: Sequence[_Choices]) -> _Choices:
    names = ("ranks", "grids", "errors", "costs")
    return _Choices(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _together(choices: Sequence[_Choices]) -> _Form:
    """Return what several layers do each for itself.

    Of the many combinations those that some multiplier would choose: allocation by one would never take another.
    """
    taken = ranks.combinations([one.errors for one in choices], [one.costs for one in choices])
    stacked = {
        name: np.stack([getattr(one, name)[taken[:, place]] for place, one in enumerate(choices)], axis=1)
        for name in ("ranks", "grids", "errors", "costs")
    }
    return _Form(stacked["ranks"], stacked["grids"], stacked["errors"], stacked["costs"].sum(axis=1))


def _fewer(group: NeuronCurve, curves: Sequence[LayerCurve], prices: Numbers) -> list[_Form]:
    """Return layers of fewer neurons, at every number of them, and at some with what is left of a lower rank."""
    some = np.arange(1, len(group.errors) + 1)
    whole = np.zeros((len(some), len(curves)), dtype=np.int64)
    lost = np.zeros(whole.shape)
    lost[:, 0] = group.errors
    kinds = _kinds(curves)
    costs = sum(prices.stored(kind, curve.name, curve.shape, some) for kind, curve in zip(kinds, curves, strict=True))
    found = [_form(some, _Form(whole, whole - 1, lost, np.asarray(costs)))]
    for cut in group.cuts:
        form = _together([_cut(*one, cut, prices) for one in zip(kinds, curves, cut.layers, strict=True)])
        form.predicted[:, 0] += cut.error
        found.append(_form(cut.count, form))
    return found


def _cut(kind: type[CompressedLinear], curve: LayerCurve, inside: LayerCurve, cut: Cut, prices: Numbers) -> _Choices:
    """Return what is left of a layer at each rank, and whole."""
    top = len(inside.errors) - 1
    some = np.arange(1, top + 1)
    costs = prices.stored(kind, curve.name, curve.shape, cut.count, some) if top else np.zeros(0)
    all_of_it = prices.stored(kind, curve.name, curve.shape, cut.count)
    return _Choices(np.append(some, 0), np.full(top + 1, -1), inside.errors, np.append(costs, all_of_it))


def _fewer_on_grids(group: NeuronCurve, curves: Sequence[LayerCurve], prices: Numbers) -> list[_Form]:
    """Return layers of fewer neurons on grids, at some numbers of neurons.

    Of what rounding a whole layer loses, the neurons that are kept have their share.
    """
    width = len(group.errors) + 1
    counts = np.unique(np.linspace(max(1, _LEAST_NEURONS * width), width - 1, _COUNTS).astype(np.int64))
    found = []
    for count in counts.tolist():
        form = _together(
            [
                _on_grids(kind, curve, count, curve.rounded * count / width, prices)
                for kind, curve in zip(_kinds(curves), curves, strict=True)
            ]
        )
        form.predicted[:, 0] += group.errors[count - 1]
        found.append(_form(count, form))
    return found


def _kinds(curves: Sequence[LayerCurve]) -> list[type[CompressedLinear]]:
    """Return the types of layers around neurons, their consumer first."""
    return [KeptOutputs if place else KeptInputs for place in range(len(curves))]
