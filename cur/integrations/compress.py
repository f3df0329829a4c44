"""The one way through compression: text, statistics, plan, factors, replacement, report.

The sequence is :func:`compress_to`, from text to a checkpoint: :func:`planned` measures and plans, :func:`carry_out`
factors, replaces and reports, and then the checkpoint is written. Each step is asked of a
:class:`~cur.integrations.sources.Source`, a model that is in memory as a whole, or one of which a block is loaded at a
time: that one never has all of its weights, also when it is compressed, until they are in files. :func:`compress` is
the sequence for a model in memory, without the checkpoint; :func:`~cur.integrations.compress_model` opens the model
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cur._lib.errors import warn
from cur._lib.moved import former_names
from cur._lib.versions import versions
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.usage import used_as
from cur.integrations.nn import held_beside
from cur.integrations.plan.config import Asked, BudgetConfig, CompressConfig
from cur.integrations.plan.dense import check_reached, few_tokens
from cur.integrations.plan.make import budget_forms, make_plan
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport, LayerReport
from cur.integrations.report.divergence import Divergence
from cur.integrations.sources import InMemory, Source, StageProgress, as_batches
from cur.integrations.store.checkpoint import describe
from cur.integrations.tolerance import within_tolerance

__all__ = ["apply_plan_", "carry_out", "carry_out_", "compress", "compress_source", "compress_to", "measure", "planned"]

__getattr__ = former_names(
    __name__,
    (
        "cur.integrations.sources",
        "cur.integrations.plan.config",
        "cur.integrations.plan.make",
        "cur.integrations.factor.making",
    ),
)


def compress(
    model: nn.Module,
    calibration: Tensor | Iterable[Any] | Statistics,
    config: CompressConfig | BudgetConfig | None = None,
    *,
    precision: str = "auto",
    progress: StageProgress | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    blocks: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
) -> CompressionReport:
    """Replace linear layers of a model by factored ones, in place.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place, and only if everything succeeds: one of transformers, or any module.
    calibration : Tensor, iterable, or Statistics
        Token windows (count, length), batches of ``input_ids`` and ``attention_mask``, or statistics of an
        earlier run, which must cover the targets. Of a module that is not one of transformers': batches, each a tensor,
        or tensors in a tuple, a list or a mapping; one tensor or mapping is one batch.
    config : CompressConfig or BudgetConfig, optional
        Blocks and a rank, or a budget of parameters. Default: the paper's setting.
    precision : str, default "auto"
        The precision of matrix products in passes over text, as for :func:`~cur.integrations.collect`; the
        configuration has that of the factorizations.
    progress : callable, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`.
    forward : callable, optional
        Called as ``forward(module, batch)`` to run the model on a batch; by default a batch is its arguments.
    loss : callable, optional
        Called as ``loss(output, batch)``; returns the mean over the samples, or one number for each. Without one, a
        module that is not one of transformers' is compressed to a budget by the errors of outputs alone, and the report
        says so.
    blocks : str, sequence of str or sequence of sequence of str, optional
        The name of the module whose children are the blocks, or the names of the blocks; by default they are looked
        for. Needed where a configuration chooses among blocks alone.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        If a target matches nothing, has a weight that is tied to another parameter, or `rank` exceeds what
        any target allows; before any forward pass.
    NumericalError
        If a weight or an activation is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cur.integrations import CompressConfig, compress
    >>> _ = torch.manual_seed(0)
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
    >>> windows = torch.randint(50, (4, 16))
    >>> report = compress(model, windows, CompressConfig(layers=2, targets=("gate_proj",), rank=8))
    >>> [(layer.rank, layer.parameters_before, layer.parameters_after) for layer in report.layers]
    [(8, 2048, 832), (8, 2048, 832)]
    """
    config = config or CompressConfig()
    statistics = calibration if isinstance(calibration, Statistics) else None
    with used_as(model, forward=forward, loss=loss, blocks=blocks):
        text = None if isinstance(calibration, Statistics) else as_batches(calibration, config.batch_size, model)
        source = InMemory(model, text, statistics=statistics, precision=precision, progress=progress)
        return compress_source(source, config)


def compress_source(source: Source, asked: Asked) -> CompressionReport:
    """Compress a model, wherever it is.

    Parameters
    ----------
    source : Source
        The model, with the text it is measured on.
    asked : CompressConfig, BudgetConfig or Plan
        The configuration to plan by, or the plan to apply.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        If the budget is a tolerance, for which there is no text here.
    """
    if isinstance(asked, BudgetConfig) and asked.tol is not None:
        raise ValueError(
            "`tol` needs text that the model was not measured on, to compare on; call compress_model with a place to "
            "write to, or give `size` or `bits`"
        )
    asked, notes = source.settled(asked)
    statistics, plan = planned(source, asked)
    report = carry_out(source, plan, statistics)
    return replace(report, notes=(*notes, *report.notes))


def compress_to(
    source: Source,
    asked: Asked,
    target: Path,
    *,
    held_out: Tensor | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> CompressionReport:
    """Compress a model into a checkpoint, and report.

    Parameters
    ----------
    source : Source
        The model, with the text it is measured on.
    asked : CompressConfig, BudgetConfig or Plan
        The configuration to plan by, or the plan to apply.
    target : Path
        The path of the directory to create.
    held_out : Tensor, optional
        Windows of tokens on which the compressed model is compared with the dense one, once the checkpoint is there.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file.

    Returns
    -------
    CompressionReport
        The report, as it was saved with the checkpoint.
    """
    compared = None if held_out is None else source.judged(held_out)
    if isinstance(asked, BudgetConfig) and asked.tol is not None:
        report = compress_within(source, asked, compared, windows=0 if held_out is None else len(held_out))
    else:
        report = compress_source(source, asked)
    if not source.leads:
        return report
    report = source.save(report, target, overwrite=overwrite, max_shard_size=max_shard_size)
    if compared is not None and report.divergence is None:
        report = _judged(report, compared(target))
        describe(source.compressed, target, report)
    return report


def _judged(report: CompressionReport, found: Divergence) -> CompressionReport:
    """Return a report with what was found in comparing both models."""
    figures = {"before, held-out": found.reference_perplexity, "after, held-out": found.perplexity}
    return replace(report, divergence=found, perplexity=figures)


def compress_within(
    source: Source,
    asked: BudgetConfig,
    compared: Callable[[Path | None], Divergence] | None,
    *,
    windows: int,
) -> CompressionReport:
    """Compress a model as far as a tolerance allows, of the divergence as it is measured.

    Plans are carried out one after the other, at most three. The first may lose what is usual for the tolerance; what
    was measured of a plan says what the next one may lose. The smallest model that stays within the tolerance is taken.

    Parameters
    ----------
    source : Source
        The model, with the text it is measured on.
    asked : BudgetConfig
        The configuration, which has the tolerance.
    compared : callable or None
        Measures the divergence, see :meth:`Source.judged`.
    windows : int
        The number of windows that it is measured on.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        If there is no held-out text, or no plan stays within the tolerance.
    """
    if compared is None:
        raise ValueError("`tol` needs `held_out` text (--held-out), on which the divergence is measured; name some")
    if windows < 2:
        raise ValueError(
            f"`tol` needs at least 2 windows of `held_out` text (--held-out-windows) for an interval, got {windows}; "
            "ask for more"
        )
    settled, notes = source.settled(asked)
    assert isinstance(settled, BudgetConfig)
    statistics = measured(source, settled)
    with source.clock.stage("plan"):
        forms = budget_forms(source.model, statistics, settled, source.layers(statistics))
    found = within_tolerance(source, forms, statistics, compared)
    report = finish(source, found.plan, statistics, found.layers)
    return _judged(replace(report, notes=(*notes, *report.notes)), found.divergence)


def planned(source: Source, asked: Asked) -> tuple[Statistics, Plan]:
    """Return the statistics that are asked for, and the plan that follows from them, or the one that was given.

    Parameters
    ----------
    source : Source
        The model, wherever it is, with its text.
    asked : Asked
        The configuration to plan by, or the plan to apply.
    """
    statistics = measured(source, asked)
    with source.clock.stage("plan"):
        if isinstance(asked, Plan):
            if asked.calibration not in (None, statistics.text_hash):
                source.announce("The calibration text is another than the one that the plan was made from.")
            return statistics, asked
        if isinstance(asked, BudgetConfig) and asked.tol is not None:
            source.announce("This is a first plan for the tolerance, of which nothing is measured yet.")
        return statistics, make_plan(source.model, statistics, asked, layers=source.layers(statistics))


def measured(source: Source, asked: Asked) -> Statistics:
    """Return the statistics that are asked for: those that are known, else measured.

    Parameters
    ----------
    source : Source
        The model, wherever it is, with its text.
    asked : Asked
        The configuration to plan by, or the plan to apply.
    """
    names = source.check(asked)
    with source.clock.stage("calibrate"):
        return _of_layers(source, asked, names)


def _of_layers(source: Source, asked: Asked, names: Sequence[str]) -> Statistics:
    known = source.known()
    own = 0.0
    share = asked.own_text if known is None else known.own_text
    # Layers are corrected on all text; statistics that are known need none.
    if share and source.text is not None and (known is None or asked.correction > 0):
        own = source.write_text(share, seed=asked.seed)
    if known is not None:
        known.check(source.model)
        return source.use(known, names, asked)
    return source.measure(names, asked, own_text=own)


def measure(
    model: nn.Module,
    text: Sequence[Mapping[str, Tensor]],
    asked: Asked,
    *,
    own_text: float = 0.0,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> Statistics:
    """Collect the statistics that a configuration or a plan needs, of a model in memory.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    text : sequence of mapping
        Batches of ``input_ids`` and ``attention_mask`` to run the model on.
    asked : CompressConfig, BudgetConfig or Plan
        Says which layers, and whether second moments and gradients are needed.
    own_text : float, default 0.0
        The amount of text among the batches that the model wrote itself, as a multiple of the rest; it is only
        recorded.
    precision : str, default "auto"
        The precision of matrix products in the passes, named as for :func:`compress`.
    progress : callable, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`.

    Returns
    -------
    Statistics
        Statistics of the layers that the configuration or plan names.
    """
    source = InMemory(model, list(text), precision=precision, progress=progress)
    return source.measure(source.check(asked), asked, own_text=own_text)


def carry_out(source: Source, plan: Plan, statistics: Statistics) -> CompressionReport:
    """Factor the layers of a plan, put them in place, and report; nothing changes unless all factors are there.

    Parameters
    ----------
    source : Source
        The model, wherever it is, with its text.
    plan : Plan
        The plan to apply.
    statistics : Statistics
        Statistics that cover the plan's layers.

    Returns
    -------
    CompressionReport
        The report on all layers and on the whole model.
    """
    plan.check(source.model)
    check_reached(statistics, [entry.name for entry in plan.entries])
    check_reached(statistics, [entry.name for entry in plan.entries if entry.needs_gradients], gradients=True)
    return finish(source, plan, statistics, source.factor(plan, statistics))


def finish(source: Source, plan: Plan, statistics: Statistics, layers: Sequence[LayerReport]) -> CompressionReport:
    """Put the layers that were made last into their places, and report.

    Parameters
    ----------
    source : Source
        The model, wherever it is.
    plan : Plan
        The plan that the layers were made by.
    statistics : Statistics
        Statistics that cover the plan's layers.
    layers : sequence of LayerReport
        The reports on the layers.

    Returns
    -------
    CompressionReport
        The report on all layers and on the whole model.
    """
    beside = held_beside(source.model, [entry.name for entry in plan.entries])
    after = source.replace_layers()
    return CompressionReport(
        plan=plan.as_done(layers),
        layers=tuple(layers),
        before=source.before,
        after=after,
        seconds=source.clock.seconds,
        precision=source.precision.name,
        versions=versions(),
        source=source.origin.source,
        kept=source.kept(),
        unread=source.origin.unread,
        notes=(*few_tokens(statistics, plan.entries), *_held(beside)),
    )


def _held(beside: Mapping[str, str]) -> tuple[str, ...]:
    """Say which dense layers are held outside of the tree of modules, where none is replaced."""
    return tuple(
        f"{name} lies in `{place}` as well, outside of the tree of modules, where it stays dense; put the new layer "
        "there."
        for name, place in beside.items()
    )


def carry_out_(
    model: nn.Module,
    plan: Plan,
    statistics: Statistics,
    *,
    text: Sequence[Mapping[str, Tensor]] | None = None,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> CompressionReport:
    """Carry out a plan on a model in memory, in place, and report; it changes only if every factorization succeeds.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.
    plan : Plan
        Made for this model, perhaps edited.
    statistics : Statistics
        Statistics that cover the plan's layers.
    text : sequence of mapping, optional
        Batches of ``input_ids`` and ``attention_mask`` to run the model on. On the first the change of every layer's
        output is measured; to all of them layers are fitted, as far as the plan says so: each to the inputs that it
        gets from compressed layers before it.
    precision : str, default "auto"
        The precision of matrix products in these passes, as for :func:`compress`.
    progress : callable, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`.

    Returns
    -------
    CompressionReport
        The report on all layers and on the whole model.

    Raises
    ------
    PlanError
        If the plan was made for another model.
    NumericalError
        If a weight is NaN or infinite.
    """
    given = None if text is None else list(text)
    return carry_out(InMemory(model, given, precision=precision, progress=progress), plan, statistics)


def apply_plan_(
    model: nn.Module,
    plan: Plan,
    statistics: Statistics,
    *,
    progress: StageProgress | None = None,
) -> list[LayerReport]:
    """Carry out a plan, in place: the former name of :func:`carry_out_`, which reports on the whole model.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is changed in place.
    plan : Plan
        The plan to apply.
    statistics : Statistics
        Statistics that cover the plan's layers.
    progress : StageProgress, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`.

    Returns
    -------
    list of LayerReport
        A report on each layer, in the order of the plan.
    """
    warn("apply_plan_ is carry_out_ now, whose report has the list as its `layers`", DeprecationWarning)
    return list(carry_out_(model, plan, statistics, progress=progress).layers)
