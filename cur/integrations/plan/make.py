"""From statistics to a plan: which blocks, which layers in them, at which rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from cur import ranks
from cur._lib.errors import NumericalError
from cur._lib.versions import versions
from cur.decompose import cur
from cur.integrations.measure.moments import Moments, x_norm
from cur.integrations.measure.spectra import EXACT_UP_TO, singular_values
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.targets import (
    block_stacks,
    decoder_layers,
    found_stacks,
    holds_linear,
    left_dense,
    linear_modules,
    networks,
)
from cur.integrations.model.unrolling import unrolled
from cur.integrations.model.usage import is_transformer, model_name
from cur.integrations.nn import compressed_modules, dense_weight, is_table, layer_class, layout_for
from cur.integrations.plan.blocks import BY_ANGLE, choose_blocks, inner_blocks, shares
from cur.integrations.plan.budget import Forms, error_curves, joint_curves
from cur.integrations.plan.config import Asked, BudgetConfig, CompressConfig
from cur.integrations.plan.dense import refuse_all, refuse_named, refuse_unfit, unfit, unmeasured
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.guide import guide, link_weights
from cur.integrations.plan.layouts import choose_layout, fastest_rank
from cur.integrations.plan.methods import CUREntry
from cur.integrations.plan.plan import PRECISIONS, Plan, fingerprint
from cur.integrations.plan.rate_distortion import LayerCurve
from cur.integrations.plan.vocabulary_curves import vocabulary_curves

__all__ = [
    "Layers",
    "budget_forms",
    "candidates",
    "chooses_by_angle",
    "chosen_blocks",
    "layer_entries",
    "make_plan",
    "plan_of",
]

T = TypeVar("T")

_DENSE = "start from the dense model that it was made from"


class Layers:
    """The layers of a model with their statistics, as a plan needs them: all at once.

    Block-wise compression has a subclass that loads a block for each group of layers.

    Parameters
    ----------
    model : nn.Module
        The dense model, with its weights.
    statistics : Statistics
        Statistics of the layers that are asked for.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` while the plan is made.
    """

    offloaded = False
    """Whether weights are in memory only while their group is."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Statistics,
        progress: Callable[[str, int, int | None], object] | None = None,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.progress = progress

    def groups(self, names: list[str]) -> Iterator[tuple[list[str], Statistics]]:
        """Yield names of layers, in order, while their weights are in memory, and statistics that cover them.

        Parameters
        ----------
        names : list of str
            The names of the layers, in order.

        Yields
        ------
        list of str, Statistics
            Names of layers that are in memory, and their statistics.
        """
        with unrolled(self.model):
            yield names, self.statistics

    def watch(self, stage: str) -> Callable[[int, int | None], object] | None:
        """Return a callback for the steps of a stage within a group.

        Parameters
        ----------
        stage : str
            The name of the stage.
        """
        return None if self.progress is None else functools.partial(self.progress, stage)

    def gather(self, found: dict[str, T]) -> dict[str, T]:
        """Return what was found for all groups, by their first layers, of all processes that share them.

        Parameters
        ----------
        found : dict of str
            The results of this process, by the first layer of each group.
        """
        return found


def make_plan(
    model: nn.Module,
    statistics: Statistics,
    config: CompressConfig | BudgetConfig | None = None,
    *,
    layers: Layers | None = None,
    progress: Callable[[str, int, int | None], object] | None = None,
) -> Plan:
    """Decide which layers are replaced, and at which rank.

    For a :class:`BudgetConfig` see :func:`~cur.integrations.plan.budget.plan_budget`. For a :class:`CompressConfig` the
    rank of a layer is at most ``min(config.rank, break-even, live input features)``: a feature that was zero on every
    calibration token has no importance, and columns chosen beyond the live ones would be arbitrary.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        Statistics of the whole model; it needs only the second moments that `layers` does not have.
    config : CompressConfig or BudgetConfig, optional
        How to plan; the setting of the paper by default.
    layers : Layers, optional
        The access to layers that are not in memory yet. By default all are in memory.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` while the plan is made.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        As :func:`compress`, or if the statistics have no angular distances or do not cover a target, or if no target,
        or not one that the configuration names by itself, could be compressed: too small, or not reached by the text.
    """
    config = config or CompressConfig()
    layers = layers or Layers(model, statistics, progress)
    if isinstance(config, BudgetConfig):
        return budget_forms(model, statistics, config, layers).plan()
    names, _, dense = _among(model, statistics, config, layers)
    entries = _in_order(
        names,
        layers.gather({group[0]: layer_entries(model, part, config, group) for group, part in layers.groups(names)}),
    )
    with unrolled(model):
        return plan_of(model, statistics, config, [entry for some in entries for entry in some], names, dense)


def budget_forms(model: nn.Module, statistics: Statistics, config: BudgetConfig, layers: Layers) -> Forms:
    """Look at what layers can take within a budget, all that takes time in :func:`make_plan`.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        Statistics of the whole model, as for :func:`make_plan`.
    config : BudgetConfig
        The configuration, which has the budget.
    layers : Layers
        The access to the layers.

    Returns
    -------
    Forms
        What plans follow from.

    Raises
    ------
    ValueError
        As :func:`make_plan`.
    """
    names, targets, dense = _among(model, statistics, config, layers)
    curves = {}
    for group, part in layers.groups(names):
        one = error_curves(model, part, config, group, progress=layers.watch("plan"))
        curves[group[0]] = one, joint_curves(model, part, config, group, progress=layers.watch("neurons"))
    found = _in_order(names, layers.gather(curves))
    with unrolled(model):
        every = _with_dense(model, targets, [curve for one, _ in found for curve in one])
    neurons = [n for _, two in found for n in two]
    vocabulary = [] if layers.offloaded else vocabulary_curves(model, statistics, config)
    known = {curve.name for curve in every}
    return Forms(
        model=model,
        statistics=statistics,
        config=config,
        curves=every,
        neurons=neurons,
        dense=dense,
        vocabulary=[curve for curve in vocabulary if curve.name not in known],
    )


def _among(
    model: nn.Module, statistics: Statistics, config: CompressConfig | BudgetConfig, layers: Layers
) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the layers to decide on, all that are targeted, and a sentence for each that stays dense."""
    with unrolled(model):
        names = candidates(model, config, offloaded=layers.offloaded)
        if isinstance(config, CompressConfig):
            wanted = set(_selected(model, config, chosen_blocks(model, statistics, config)))
            names = [name for name in names if name in wanted]
        dense = unfit(model, config, names) | unmeasured(statistics, names, gradients=config.needs_gradients)
        refuse_named(model, config, dense)
        refuse_all(names, dense)
        targets, names = names, [name for name in names if name not in dense]
        dense = left_dense(model, config.targets, exclude=config.exclude) | dense
    return names, targets, dense


def _with_dense(model: nn.Module, names: list[str], curves: list[LayerCurve]) -> list[LayerCurve]:
    """Return a curve for each of some layers: of those that have none yet, one that leaves them dense."""
    found = {curve.name: curve for curve in curves}
    for name in names:
        if name not in found:
            m, n = dense_weight(model.get_submodule(name), name)[0].shape
            found[name] = LayerCurve.dense(name, (m, n))
    return [found[name] for name in names]


def _in_order(names: list[str], found: dict[str, T]) -> list[T]:
    return [found[name] for name in names if name in found]


def layer_entries(
    model: nn.Module, statistics: Statistics, config: CompressConfig, names: list[str]
) -> list[PlanEntry]:
    """Decide the rank of each of some layers.

    One that would not get smaller within a tolerance, or faster if the layout is "auto", has no entry.

    Parameters
    ----------
    model : nn.Module
        The dense model, with the weights of these layers.
    statistics : Statistics
        Statistics that cover the layers.
    config : CompressConfig
        The configuration to plan by.
    names : list of str
        The names of the layers.

    Returns
    -------
    list of PlanEntry
        An entry for each layer, in the order of `names`.

    Raises
    ------
    ValueError
        If the statistics do not cover a layer.
    """
    moments = Moments(statistics)
    entries: list[PlanEntry] = []
    for name in names:
        module = model.get_submodule(name)
        weight = finite_weight(module, name)
        m, n = weight.shape
        # More directions than there are tokens were not seen, of an expert for one.
        live = min(int((x_norm(statistics, name) > 0).sum()), statistics.counts[name])
        layout = layout_for(module, config.layout)
        if layout == "auto":
            limit = fastest_rank((m, n), config.purpose)
        else:
            limit = layer_class(layout).rank_within(m, n, m * n - 1)
        if limit < 1:
            continue
        limit = min(limit, live)
        if config.largest_rank is not None:
            limit = min(limit, config.largest_rank)
        entry = CUREntry(
            name=name,
            shape=(m, n),
            rank=limit,
            layout=_layout((m, n), limit, layout, config),
            importance=config.importance,
            link=config.link,
            subspace=_subspace(config.subspace, min(m, n)),
            select=config.select,
        )
        W = weight.to(PRECISIONS[config.precision])
        rank = _rank(W, entry, moments, config)
        if rank is not None:
            predicted = _least_error(W, rank, x_norm(statistics, name))
            entries.append(replace(entry, rank=rank, layout=_layout((m, n), rank, layout, config), predicted=predicted))
    return entries


def _layout(shape: tuple[int, int], rank: int, layout: str, config: CompressConfig) -> str:
    if layout != "auto":
        return layout
    return str(choose_layout(shape, config.purpose, rank=rank))  # there is one up to `fastest_rank`


def plan_of(
    model: nn.Module,
    statistics: Statistics,
    config: CompressConfig,
    entries: list[PlanEntry],
    names: list[str],
    dense: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan of these entries, for the layers `names`.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        The statistics that the entries come from.
    config : CompressConfig
        The configuration that the entries come from.
    entries : list of PlanEntry
        The entries of the plan.
    names : list of str
        The names of all layers that were looked at.
    dense : mapping of str to str, optional
        A sentence by the name of each target that nothing could be gained or measured of. Default: none.

    Raises
    ------
    ValueError
        If there is no entry, as no layer would be smaller or faster.
    """
    if not entries and config.tolerance is None:
        raise ValueError(
            f"`layout` 'auto' leaves all {len(names)} layers dense ({names[0]} first): none would be faster factored; "
            "name a layout, for instance 'interpolative', the smallest"
        )
    if not entries:
        raise ValueError(
            f"`tolerance` {config.tolerance} must be larger: no layer gets smaller within it ({names[0]} first of "
            f"{len(names)}); raise it, or choose other layers"
        )
    return Plan(
        entries=tuple(entries),
        fingerprint=fingerprint(model),
        model=model_name(model),
        seed=config.seed,
        precision=config.precision,
        calibration=statistics.text_hash or None,
        calibration_tokens=statistics.tokens,
        calibration_precision=statistics.precision,
        angular=statistics.angular,
        versions=versions(),
        dense=dense or {},
    )


def _rank(W: Tensor, entry: CUREntry, moments: Moments, config: CompressConfig) -> int | None:
    """Return the rank of a layer by the rule of the configuration; None if the layer would not get smaller."""
    if config.tolerance is not None:
        try:
            rank = cur(
                W,
                tol=config.tolerance,
                select=entry.select,
                importance=guide(W, entry, moments),
                column_weights=link_weights(W, entry, moments),
                subspace=entry.subspace,
                bounds=False,
                rng=config.seed,
            ).rank
        except NumericalError:  # rounding is in the way of so small an error
            return None
        return int(rank) if rank <= entry.rank else None
    if config.energy is None and not config.effective_rank:
        return entry.rank
    matrix = guide(W, entry, moments)
    values = singular_values(W if matrix is None else matrix).cpu().numpy()
    if config.energy is not None:
        return min(ranks.energy(values, config.energy), entry.rank)
    return min(max(math.ceil(ranks.effective_rank(values)), 1), entry.rank)


def _least_error(W: Tensor, rank: int, x_norm: Tensor) -> float | None:
    """Return the squared relative error of the outputs that no factorization of the rank goes below.

    With every input feature counted by its norm. None for layers too large for an SVD.
    """
    if min(W.shape) > EXACT_UP_TO:
        return None
    squares = singular_values(W * x_norm.to(W)) ** 2
    total = float(squares.sum())
    return float(squares[rank:].sum()) / total if total > 0 else 0.0


def chosen_blocks(model: nn.Module, statistics: Statistics, config: CompressConfig) -> list[int]:
    """Return the indices of the blocks that are compressed.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        The statistics, with angles if blocks are chosen by them.
    config : CompressConfig
        The configuration, which says how blocks are chosen.

    Raises
    ------
    ValueError
        If blocks are chosen by angles that the statistics do not hold.
    """
    stacks = _stacks(model, config)
    if isinstance(config.layers, str) or not stacks:
        return list(range(sum(map(sum, stacks))))
    if not isinstance(config.layers, int):
        return sorted(set(config.layers))
    if config.choose in BY_ANGLE and not statistics.angular:
        raise ValueError(
            "`statistics` holds no angular distances, by which layers are chosen; collect it with `layers`"
        )
    distances = statistics.angular_spans(config.span) if config.choose in BY_ANGLE else None
    among = _with_layers(model)
    if len(stacks) > 1:
        return _in_each_stack(distances, config, stacks, among)
    return choose_blocks(
        distances,
        config.layers,
        by=config.choose,
        span=config.span,
        stacks=stacks,
        among=among,
        seed=config.seed,
    )


def _with_layers(model: nn.Module) -> set[int]:
    """Return the indices of the blocks that hold linear layers: of convolutions, some may hold none."""
    return {index for index, (_, block) in enumerate(decoder_layers(model)) if holds_linear(block)}


def _in_each_stack(
    distances: Mapping[int, float] | None, config: CompressConfig, stacks: list[list[int]], among: set[int]
) -> list[int]:
    """Return the indices of the blocks that are chosen, in each stack for itself."""
    assert isinstance(config.layers, int)
    chosen: list[int] = []
    first = 0
    counts = shares(config.layers, stacks, config.span, among=among)
    if sum(counts) < config.layers:
        raise ValueError(
            f"`layers` must leave room for runs of {config.span} blocks that do not overlap in stacks of "
            f"{', '.join(str(length) for stack in stacks for length in stack)} blocks, got {config.layers}"
        )
    for stack, count in zip(stacks, counts, strict=True):
        last = first + sum(stack)
        own = None if distances is None else {i - first: d for i, d in distances.items() if first <= i < last}
        if count:
            found = choose_blocks(
                own,
                count,
                by=config.choose,
                span=config.span,
                stacks=[stack],
                among={index - first for index in among},
                seed=config.seed + first,
            )
            chosen += [first + index for index in found]
        first = last
    return chosen


def candidates(model: nn.Module, config: CompressConfig | BudgetConfig, *, offloaded: bool = False) -> list[str]:
    """Name the layers that could be chosen, refusing before any forward pass what could not be compressed.

    With `offloaded`, weights need not be in memory.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    config : CompressConfig or BudgetConfig
        The configuration, which names blocks and targets.
    offloaded : bool, default False
        Whether weights may be out of memory.

    Returns
    -------
    list of str
        The names of the layers.

    Raises
    ------
    ValueError
        If a layer cannot be compressed, or the configuration does not fit the model.
    """
    refuse_adapters(model)
    stacks = _stacks(model, config)
    total = sum(map(sum, stacks))
    inside = list(range(total))
    asked = config.layers if isinstance(config, CompressConfig) and stacks else "all"
    if isinstance(asked, int):
        inside = sorted(_with_layers(model).intersection(inner_blocks(stacks)))
        if not inside:
            raise ValueError(
                f"`layers` as a number chooses among blocks that are not the first or the last, and the model has "
                f"{total} in all, got {asked}; take 'all', or name blocks by their positions"
            )
        if asked > len(inside):
            raise ValueError(
                f"`layers` must be between 1 and {len(inside)} for a model of {total} blocks, whose "
                f"first and last are never chosen, got {asked}"
            )
    elif stacks and not isinstance(asked, (str, int)):
        inside = sorted(set(asked))
        if inside[-1] >= total:
            raise ValueError(f"`layers` must be between 0 and {total - 1} for this model, got {inside[-1]}")
    names = _selected(model, config, inside)
    factored = tuple(f"{name}." for name in compressed_modules(model))
    limit, widest = 0, ""
    for name in names:
        if name.startswith(factored):
            raise ValueError(f"{name} is a factor of a layer that is compressed already; {_DENSE}, or exclude it")
        weight, _, _ = dense_weight(model.get_submodule(name), name)
        if offloaded and is_table(model.get_submodule(name)):
            raise ValueError(
                f"{name} is a table of embeddings, which needs the whole model in memory; leave out block by block "
                "compression (--low-memory), or exclude it"
            )
        if weight.is_meta and not offloaded:
            raise ValueError(f"the weight of {name} is offloaded; load the model onto a device, or exclude it")
        if min(weight.shape) > limit:
            limit, widest = min(weight.shape), f"{name} ({weight.shape[0]} x {weight.shape[1]})"
    refuse_unfit(model, config, names)
    if isinstance(config, CompressConfig) and config.rank is not None and config.rank > limit:
        raise ValueError(
            f"`rank` must be at most {limit}, the smaller side of the largest target {widest}, got {config.rank}"
        )
    return names


def chooses_by_angle(model: nn.Module, asked: Asked) -> bool:
    """Say whether blocks are chosen by how far they turn the hidden state.

    Parameters
    ----------
    model : nn.Module
        The model whose blocks they are.
    asked : Asked
        The configuration to plan by, or the plan to apply.

    Returns
    -------
    bool
        Whether angular distances are needed.
    """
    if not isinstance(asked, CompressConfig) or type(asked.layers) is not int or asked.choose not in BY_ANGLE:
        return False
    return bool(_stacks(model, asked))


def _stacks(model: nn.Module, config: CompressConfig | BudgetConfig) -> list[list[int]]:
    """Return the lengths of the stacks of blocks that targets lie in, by network; none where they may lie anywhere.

    That is where none is found and no blocks are chosen among, and of a module that is no transformer in any case.
    """
    known = {name for name, _ in model.named_modules()}
    named = not isinstance(config.targets, str) and known.issuperset(config.targets)
    if named or isinstance(config, BudgetConfig) or config.layers == "all":
        if not is_transformer(model):
            return []
        return [[len(stack) for stack in network] for network in networks(found_stacks(model))]
    return [[len(stack) for stack in network] for network in networks(block_stacks(model))]


def _selected(model: nn.Module, config: CompressConfig | BudgetConfig, blocks: list[int]) -> list[str]:
    """Name the linear layers of some blocks that a configuration selects; of any place where there are no blocks."""
    try:
        return linear_modules(model, config.targets, exclude=config.exclude, blocks=blocks or None)
    except ValueError as error:
        done = list(compressed_modules(model))
        if not done:
            raise
        raise ValueError(
            f"`model` is compressed already, in {len(done)} layers ({done[0]}, for instance), and layers are not "
            f"compressed twice: {_DENSE}, or choose other layers or targets ({error})"
        ) from error


def _subspace(asked: str, side: int) -> str:
    if asked != "auto":
        return asked
    return "exact" if side <= EXACT_UP_TO else "randomised"
