"""`heal`: from a compressed model and its teacher to a better compressed model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cur._lib.versions import versions
from cur.healing.config import HealingConfig
from cur.healing.pair.cache import TeacherCache
from cur.healing.pair.cores import Coordinates
from cur.healing.pair.data import Text
from cur.healing.pair.hashing import digest
from cur.healing.pair.moments import MOMENT_SAMPLES, LayerMoments
from cur.healing.pair.pair import TeacherStudentPair, only_cores
from cur.healing.pair.sharing import share_
from cur.healing.report import HealingReport, LayerFit, best_step
from cur.healing.training.closed_form import closed_form_
from cur.healing.training.logs import Log
from cur.healing.training.loop import Comparison, Progress, Status, TrainingUnit, look, saving_memory, summary, train
from cur.healing.training.natural import natural_step_
from cur.healing.training.state import StateFile
from cur.integrations.measure.collect import collect_gradients
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.blocks import chain_fault
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.limits import check_windows
from cur.integrations.model.masks import padding_mask
from cur.integrations.model.precision import Precision, continued
from cur.integrations.model.running import evaluating, model_inputs

__all__ = ["LOG", "fingerprint", "heal"]

STATE = "state.safetensors"
LOG = "log.jsonl"

_PROBE = 8

# Least weight of an output in the metric, relative to the mean.
_FLOOR = 0.1

# What a fingerprint holds of a core.
_PARTS = ("left", "right", "start")


def heal(
    student: nn.Module,
    teacher: nn.Module,
    batches: Tensor | Sequence[Mapping[str, Any]],
    config: HealingConfig | None = None,
    *,
    state: str | Path | None = None,
    cache: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: Progress | None = None,
) -> HealingReport:
    """Win back what compression lost, by training the cores of the compressed layers alone, in place.

    Parameters
    ----------
    student : nn.Module
        A model with compressed layers: a causal language model, or with ``scope="block"`` any other that reads text.
        Their cores change, nothing else does; see :class:`~cur.healing.pair.cores.Core` for what that means in each
        layout.
    teacher : nn.Module
        The dense model that it was made from. It does not change. Every tensor that both have bitwise equal is shared
        from here on: the student's own copy is let go.
    batches : Tensor or sequence of mapping
        Text: token windows (count, length), or batches of ``input_ids`` and ``attention_mask``. The last
        ``config.held_out`` are watched and decide which state is kept, so they should not have been calibrated on.
    config : HealingConfig, optional
        Default: the closed form, a step of natural gradient, then 100 small ones on the teacher's distribution of the
        next token.
    state : path, optional
        Directory for the state and the log (``log.jsonl``). If it holds the state of the same run, healing goes on from
        there and ends with the weights of an uninterrupted run, bit for bit on the same machine with as many threads.
    cache : path, optional
        Directory in which what the teacher says to each batch is kept; can be used again by other runs.
    tensorboard : path, optional
        A directory to write TensorBoard events into.
    progress : callable, optional
        Called with a :class:`~cur.healing.training.loop.Status` after every step.

    Returns
    -------
    HealingReport

    Raises
    ------
    ValueError
        If the teacher has another vocabulary, width or shape of layers than the student, either of them carries an
        adapter, there is too little text, or the directory `state` holds a run in another precision than the one that
        is named.
    NumericalError
        If a loss, a gradient or an activation is not finite; the best state so far is in the student then.
    StateError
        If the directory `state` holds the state of another run.
    OSError
        If the disk is full; the last complete state is still there.
    ImportError
        If TensorBoard is asked for and not installed.

    Examples
    --------
    >>> import copy, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cur.integrations import CompressConfig, compress
    >>> from cur.healing import HealingConfig, heal
    >>> _ = torch.manual_seed(0)
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape)).eval()
    >>> student, windows = copy.deepcopy(teacher), torch.randint(50, (12, 16))
    >>> _ = compress(student, windows[:8], CompressConfig(layers=2, targets=("gate_proj",), rank=8))
    >>> report = heal(student, teacher, windows, HealingConfig(steps=5, held_out=4, precision="float32"))
    >>> report.trainable, report.steps
    (128, 5)
    """
    refuse_adapters(student, "student")
    refuse_adapters(teacher, "teacher")
    config = config or HealingConfig()
    check_windows(student, batches, name="batches")
    text = Text(batches, batch_size=config.batch_size, held_out=config.held_out, seed=config.seed)
    probe = text.batch(0)["input_ids"][:1, :_PROBE]
    if fault := chain_fault(student, {"input_ids": probe}):
        raise ValueError(f"`student` cannot be healed from block to block: {fault}")
    kept = None if state is None else Path(state).expanduser()
    passes = precision_of(student, config, kept)
    config = replace(config, precision=passes.name)
    seconds: dict[str, float] = {}
    with evaluating(student), evaluating(teacher), eager_experts(student), eager_experts(teacher):
        pair = TeacherStudentPair(student, teacher, config, probe=probe)
        log = Log(None if kept is None else kept / LOG, tensorboard)  # what does not fit leaves no file
        run = fingerprint(pair, text)
        if cache is not None:
            pair.cache = TeacherCache(cache, pair.key())
        shared = share_(student, teacher)
        file = None if kept is None else StateFile(kept / STATE, run)
        with only_cores(pair):
            found = None if file is None else file.read()
            if found is None:
                log.write("begin", 0, {"precision": passes.name, "device": str(passes.device)})
            start = _start(pair, text, log, seconds, progress) if found is None else _resumed(pair, found[1])
            units = _units(pair, start)
            begin = time.perf_counter()
            with torch.enable_grad():
                steps, curve = train(
                    pair,
                    units,
                    text,
                    config,
                    log=log,
                    state=file,
                    facts={**start.to_dict(), "precision": passes.name},
                    progress=progress,
                )
            seconds["heal"] = time.perf_counter() - begin
    log.close()
    return HealingReport(
        config=config.to_dict(),
        trainable=sum(core.rank**2 for core in pair.cores.values()),
        fits=tuple(start.fits),
        before=start.before,
        curve=tuple(curve),
        steps=steps,
        best_step=best_step(start.before, curve),
        shared_bytes=shared,
        seconds=seconds,
        versions=versions(),
    )


def precision_of(student: nn.Module, config: HealingConfig, state: Path | None) -> Precision:
    """Return the precision of a run: that of the state it goes on from, if there is one; see :func:`continued`."""
    if state is None:
        return Precision.of(student, config.precision)
    begun_in = StateFile.facts_in(state / STATE).get("precision")
    return Precision.of(student, continued(config.precision, begun_in, state))


@dataclass(frozen=True)
class _Start:
    """What was found before the first step, of the model and of each unit, and the coordinates of the steps."""

    before: dict[str, float]
    each: list[dict[str, float]]
    fits: list[LayerFit]
    coordinates: dict[str, Coordinates]

    def to_dict(self) -> dict[str, Any]:
        return {"before": self.before, "fits": [asdict(fit) for fit in self.fits]}


def _start(
    pair: TeacherStudentPair, text: Text, log: Log, seconds: dict[str, float], progress: Progress | None
) -> _Start:
    """Look at the student as it is, and do all that comes before the steps of the optimizer."""
    config = pair.config
    each = look(pair, [Comparison(pair, block) for block in _blocks(pair)], text)
    before = summary(each)
    log.write("before", 0, before)
    begin = time.perf_counter()
    metrics = _metrics(pair, text)
    fits: list[LayerFit] = []
    if config.closed_form:
        count = len(pair.student.compressed)
        watch = None if progress is None else lambda done, _: progress(Status("closed form", done, count))
        batches = text.spread(config.closed_form_windows)
        fits = closed_form_(
            pair, batches, ridge=config.ridge, correction=config.correction, metrics=metrics, progress=watch
        )
        log.write("closed form", 0, {fit.name: fit.after for fit in fits})
    seconds["closed form"] = time.perf_counter() - begin
    natural = config.natural_steps if config.scope == "model" else 0
    coordinates = _coordinates(pair, text, metrics) if config.steps or natural else {}
    begin = time.perf_counter()
    for number in range(natural):
        with saving_memory(pair):
            found = natural_step_(Comparison(pair, None), coordinates, text, number=number)
        log.write("natural step", 0, {"number": number + 1, **found})
        if progress is not None:
            progress(Status("natural steps", number + 1, natural, loss=found["loss"]))
    seconds["natural steps"] = time.perf_counter() - begin
    return _Start(before, each, fits, coordinates)


def _resumed(pair: TeacherStudentPair, facts: Mapping[str, Any]) -> _Start:
    """Return what was found before the first step, from a state; the coordinates themselves follow from there."""
    fits = [LayerFit(**fit) for fit in facts["fits"]]
    return _Start(facts["before"], [], fits, {})


def _metrics(pair: TeacherStudentPair, text: Text) -> dict[str, Tensor]:
    """Return how much each output of each compressed layer matters to the teacher, by its gradients."""
    names = list(pair.cores)
    if not pair.config.metric_windows or pair.teacher.head is None:  # without predictions all outputs count alike
        return {}
    nothing = Statistics(tokens=0, samples=0, square_sums={}, counts={})
    found = collect_gradients(
        pair.teacher.model,
        text.spread(pair.config.metric_windows),
        nothing,
        modules=names,
        precision=pair.precision.name,
        seed=pair.config.seed,
    )
    metrics = {name: found.output_moment(name) for name in names}
    # A few thousand gradients do not span the outputs of a wide layer; none of them may count for nothing.
    return {name: H + _FLOOR * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype) for name, H in metrics.items()}


def _blocks(pair: TeacherStudentPair) -> list[int | None]:
    return list(pair.student.compressed) if pair.config.scope == "block" else [None]


def _units(pair: TeacherStudentPair, start: _Start) -> list[TrainingUnit]:
    """Return what learns; a resumed run gets its coordinates later, and a run without steps needs none."""
    losses: list[float | None] = [figures["loss"] for figures in start.each] or [None] * len(_blocks(pair))
    return [
        TrainingUnit.of(pair, block, start.coordinates, before=loss)
        for block, loss in zip(_blocks(pair), losses, strict=True)
    ]


def _coordinates(pair: TeacherStudentPair, text: Text, metrics: Mapping[str, Tensor]) -> dict[str, Coordinates]:
    """Return the coordinates of every core, by the moments in the student as it is."""
    moments = LayerMoments(pair, metrics)
    with torch.no_grad(), pair.precision.products(), moments.watching():
        for batch in text.spread(MOMENT_SAMPLES):
            moments.mask = padding_mask(model_inputs(pair.student.model, batch))
            pair.student.finish(batch, stop=pair.last)
    return moments.coordinates()


def fingerprint(pair: TeacherStudentPair, text: Text) -> str:
    """Return a hash of all that decides the result, but for the machine.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    text : Text
        The windows to learn from, and those that are held out.
    """
    tensors = {f"{name}/{part}": getattr(core, part) for name, core in pair.cores.items() for part in _PARTS}
    decides = {name: value for name, value in pair.config.to_dict().items() if name not in ("workers", "save_every")}
    return digest(tensors, decides, text.digest(), pair.key())
