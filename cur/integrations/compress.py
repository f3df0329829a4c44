"""From a model and calibration text to a smaller model: measure, plan, decompose, swap.

:func:`compress` is the four in a row; :func:`measure`, :func:`make_plan` and :func:`carry_out_` are its parts, with a
plan between them. The model is changed only when every factorization has succeeded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from cur.integrations.arriving import Arriving, in_order, spread
from cur.integrations.budget import BudgetConfig
from cur.integrations.calibration import Statistics, collect
from cur.integrations.config import CompressConfig
from cur.integrations.experts import release_, unrolled
from cur.integrations.factorize import factorize
from cur.integrations.layers import block_stacks, decoder_layers
from cur.integrations.limits import check_windows
from cur.integrations.moments import Moments, x_norm
from cur.integrations.nn import CompressedLinear, KeptInputs, dense_weight, swap_
from cur.integrations.origin import changed_modules, kept_digest, origin_of, set_origin_
from cur.integrations.outputs import output_changes
from cur.integrations.plan import PRECISIONS, Plan
from cur.integrations.planning import candidates, make_plan
from cur.integrations.precision import Precision
from cur.integrations.pruning import FittedBefore, fit_before, keep_neurons
from cur.integrations.quantizer import mark_
from cur.integrations.report import CompressionReport, LayerReport, Size, model_size, versions, weight_bytes
from cur.integrations.sampling import own_text
from cur.integrations.spectra import spectrum
from cur.integrations.text import batches

__all__ = [
    "BudgetConfig",
    "CompressConfig",
    "StageProgress",
    "apply_plan_",
    "as_batches",
    "as_done",
    "carry_out_",
    "compress",
    "decompose",
    "make_plan",
    "measure",
    "measure_plan",
]

StageProgress: TypeAlias = "Callable[[str, int, int | None], object]"
"""Called as ``progress(stage, done, total)``: ``sample`` and ``calibrate`` in samples, ``plan`` and
``decompose`` in layers, ``neurons`` in feed-forward networks."""


class Clock:
    """The seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def compress(
    model: PreTrainedModel,
    calibration: Tensor | Iterable[Mapping[str, Tensor]] | Statistics,
    config: CompressConfig | BudgetConfig | None = None,
    *,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> CompressionReport:
    """Replace linear layers of a model by factored ones, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place, and only if everything succeeds.
    calibration : Tensor, iterable of mapping, or Statistics
        Token windows (count, length), batches of ``input_ids`` and ``attention_mask``, or statistics of an
        earlier run, which must cover the targets.
    config : CompressConfig or BudgetConfig, optional
        Blocks and a rank, or a budget of parameters. Default: the paper's setting.
    precision : str, default "auto"
        Of the products in passes over text, as for :func:`~cur.integrations.collect`; the configuration has that of the
        factorizations.
    progress : callable, optional
        See :data:`StageProgress`.

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
    with unrolled(model):
        return _compress(model, calibration, config, precision, progress)


def _compress(
    model: PreTrainedModel,
    calibration: Tensor | Iterable[Mapping[str, Tensor]] | Statistics,
    config: CompressConfig | BudgetConfig,
    precision: str,
    progress: StageProgress | None,
) -> CompressionReport:
    names = candidates(model, config)
    precision = Precision.of(model, precision).name  # one for all passes
    clock = Clock()
    before = model_size(model)
    text: list[Any] | None = None
    with clock.stage("calibrate"):
        if isinstance(calibration, Statistics):
            statistics = calibration
        else:
            text, own = as_batches(calibration, config.batch_size), 0.0
            check_windows(model, text, name="calibration")
            if isinstance(config, BudgetConfig):
                text, own = with_own_text(
                    model, text, config.own_text, seed=config.seed, precision=precision, progress=progress
                )
            statistics = measure(
                model, text, config, modules=names, own_text=own, precision=precision, progress=progress
            )
    with clock.stage("plan"):
        plan = make_plan(model, statistics, config, progress=progress)
    return carry_out_(
        model, plan, statistics, before=before, text=text, precision=precision, clock=clock, progress=progress
    )


def carry_out_(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    *,
    before: Size | None = None,
    text: Sequence[Mapping[str, Tensor]] | None = None,
    precision: str = "auto",
    clock: Clock | None = None,
    progress: StageProgress | None = None,
) -> CompressionReport:
    """Carry out a plan, in place, and report; the model is changed only if every factorization succeeds.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    plan : Plan
        Made for this model, perhaps edited.
    statistics : Statistics
        They must cover the plan's layers.
    before : Size, optional
        Of the dense model, if it is known.
    text : sequence of mapping, optional
        Batches. On the first the change of every layer's output is measured; to all of them layers are fitted, as far
        as the plan says so: each to the inputs that it gets from compressed layers before it.
    precision : str, default "auto"
        Of the products in these passes, as for :func:`compress`.
    clock : Clock, optional
        With the seconds of the stages before.
    progress : callable, optional
        See :data:`StageProgress`.

    Raises
    ------
    PlanError
        If the plan was made for another model.
    NumericalError
        If a weight is NaN or infinite.
    """
    clock = clock or Clock()
    passes = Precision.of(model, precision)
    with unrolled(model):
        before = before or model_size(model)
        with clock.stage("decompose"):
            layers, reports = decompose(model, plan, statistics, progress, text=text, precision=passes.name)
        if text is not None:
            with clock.stage("outputs"):
                changes = output_changes(model, layers, text[0])
                reports = [replace(done, output=changes.get(done.name)) for done in reports]
        with clock.stage("swap"):
            swap_(model, layers)
            release_(model)
            mark_(model)
    origin = replace(origin_of(model), kept=kept_digest(model, changed_modules(model)))
    set_origin_(model, origin)
    before = replace(before, file_bytes=weight_bytes(origin.source) if origin.source else None)
    return CompressionReport(
        plan=as_done(plan, reports),
        layers=tuple(reports),
        before=before,
        after=model_size(model),
        seconds=clock.seconds,
        precision=passes.name,
        versions=versions(),
        source=origin.source,
        kept=origin.kept,
        unread=origin.unread,
    )


def as_batches(calibration: Tensor | Iterable[Mapping[str, Tensor]], batch_size: int) -> list[Any]:
    """Return batches of token windows, or the batches that were given, as a list: two passes may be made over them."""
    if isinstance(calibration, Tensor):
        return list(batches(calibration, batch_size=batch_size))
    given = list(calibration)
    if not given:
        raise ValueError("`calibration` is empty: it must hold at least one batch")
    return given


def with_own_text(
    model: PreTrainedModel,
    given: list[Any],
    share: float,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> tuple[list[Any], float]:
    """Return batches with others that the model writes itself, and the share, 0 if there are none.

    See :func:`~cur.integrations.sampling.own_text`.
    """
    size = max(len(next(iter(batch.values()))) for batch in given)
    watch = None if progress is None else functools.partial(progress, "sample")
    own = own_text(model, given, share=share, batch_size=size, seed=seed, precision=precision, progress=watch)
    return [*given, *own], share if own else 0.0


def measure(
    model: PreTrainedModel,
    given: list[Any],
    config: CompressConfig | BudgetConfig,
    *,
    modules: list[str] | None = None,
    own_text: float = 0.0,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> Statistics:
    """Collect the statistics that a configuration needs.

    Parameters
    ----------
    model : PreTrainedModel
        Not changed.
    given : list
        Batches.
    config : CompressConfig or BudgetConfig
        Says which layers, and whether second moments and gradients are needed.
    modules : list of str, optional
        Layers to measure; by default all that the configuration could choose.
    own_text : float, default 0.0
        How many of the batches the model wrote itself, as a multiple of the others, for the record.
    precision : str, default "auto"
        As for :func:`compress`.
    progress : callable, optional
        See :data:`StageProgress`.
    """
    with unrolled(model):
        names = candidates(model, config) if modules is None else modules
        found = _collect(
            model,
            given,
            names,
            full=isinstance(config, BudgetConfig) or config.needs_moments,
            gradients=config.gradients if isinstance(config, BudgetConfig) else False,
            checkpointing=config.gradient_checkpointing if isinstance(config, BudgetConfig) else False,
            seed=config.seed,
            precision=precision,
            progress=progress,
        )
    return replace(found, own_text=own_text)


def measure_plan(
    model: PreTrainedModel,
    given: list[Any],
    plan: Plan,
    *,
    precision: str = "auto",
    progress: StageProgress | None = None,
) -> Statistics:
    """Collect the statistics that a plan needs, to carry it out.

    On the text that it was made from, with what the model wrote if it was so made, they are those it was made from.

    Raises
    ------
    PlanError
        If the plan was made for another model.
    """
    plan.check(model)
    with unrolled(model):
        found = _collect(
            model,
            given,
            [entry.name for entry in plan.entries],
            full=plan.needs_moments,
            gradients=any(entry.gradients for entry in plan.entries),
            seed=plan.seed,
            precision=precision,
            progress=progress,
        )
    return replace(found, own_text=plan.own_text)


def _collect(
    model: PreTrainedModel,
    given: list[Any],
    names: list[str],
    *,
    full: bool,
    gradients: bool,
    seed: int,
    precision: str,
    progress: StageProgress | None,
    checkpointing: bool = False,
) -> Statistics:
    return collect(
        model,
        given,
        modules=names,
        moments="full" if full else "diagonal",
        layers=[name for name, _ in decoder_layers(model)],
        gradients=names if gradients else (),
        gradient_checkpointing=checkpointing,
        seed=seed,
        precision=precision,
        progress=None if progress is None else functools.partial(progress, "calibrate"),
    )


def apply_plan_(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    *,
    progress: StageProgress | None = None,
) -> list[LayerReport]:
    """Carry out a plan, in place; see :func:`carry_out_`, which reports on the whole model."""
    return list(carry_out_(model, plan, statistics, progress=progress).layers)


def decompose(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    progress: StageProgress | None = None,
    *,
    text: Sequence[Mapping[str, Any]] | None = None,
    precision: str = "auto",
) -> tuple[dict[str, CompressedLinear], list[LayerReport]]:
    """Factor the layers of a plan; return by name what will stand for them, and a report on each.

    With batches of text, layers under a budget are fitted to the inputs that those before them give, as the plan says.
    """
    plan.check(model)
    moments = Moments(statistics)
    layers: dict[str, CompressedLinear] = {}
    reports: dict[str, LayerReport] = {}
    producers: dict[str, FittedBefore] = {}
    entries = {entry.name: entry for entry in plan.entries}

    def make(name: str, arriving: Arriving | None = None) -> Callable[[Tensor], Tensor]:
        if progress is not None:
            progress("decompose", len(layers), len(entries))
        entry = entries[name]
        if entry.consumer is not None and arriving is not None:
            # Of its full width for now: the other rows are needed to say what the layer behind should give.
            producers[name] = fit_before(
                model, name, entries, moments, arriving, correction=plan.correction, fitted=producers
            )
            return producers[name].full_width
        if entry.method == "neurons":
            before = [other for other in plan.entries if other.consumer == name]
            fitted = {other.name: producers[other.name] for other in before if other.name in producers}
            done = keep_neurons(
                model, entry, before, moments, arriving=arriving, correction=plan.correction, fitted=fitted
            )
        else:
            one = factorize(
                model.get_submodule(name),
                entry,
                moments,
                dtype=PRECISIONS[plan.precision],
                seed=plan.seed,
                arriving=arriving,
                correction=plan.correction,
            )
            done = {name: one}
        for each, (layer, report) in done.items():
            layers[each] = layer
            if entry.method != "neurons":  # whose number has nothing to do with singular values
                weight = dense_weight(model.get_submodule(each), each)[0].detach()
                report = replace(report, spectrum=spectrum(weight, x_norm(statistics, each)))
            reports[each] = report
        made = layers[name]
        if isinstance(made, KeptInputs):  # while layers before it still give all neurons
            return lambda x: made(x[..., made.kept])
        return made

    if text is not None and plan.correction > 0 and len(block_stacks(model)) == 1:
        fitted = {name: entry for name, entry in entries.items() if entry.method != "cur"}
        widest = max((entry.shape[1] for entry in fitted.values()), default=1)
        in_order(model, spread(text, widest), list(fitted), make, precision=precision)
        for name, layer in layers.items():  # made while the model was in evaluation mode
            layer.train(model.get_submodule(name).training)
    for name, entry in entries.items():
        if name not in layers:
            make(entry.consumer or name)
    if progress is not None:
        progress("decompose", len(entries), len(entries))
    return {name: layers[name] for name in entries}, [reports[name] for name in entries]


def as_done(plan: Plan, reports: list[LayerReport]) -> Plan:
    """Return a plan with the ranks that were found."""
    entries = (replace(entry, rank=done.rank) for entry, done in zip(plan.entries, reports, strict=True))
    return replace(plan, entries=tuple(entries))
