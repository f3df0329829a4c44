"""Healing of models larger than memory: one block of teacher and student at a time, and hidden states on disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cur._lib.versions import versions
from cur.healing.config import HealingConfig
from cur.healing.heal import fingerprint
from cur.healing.pair.cache import TeacherCache, TeacherOutputs
from cur.healing.pair.cores import Coordinates
from cur.healing.pair.data import Text
from cur.healing.pair.moments import MOMENT_SAMPLES, LayerMoments
from cur.healing.pair.pair import TeacherStudentPair, only_cores
from cur.healing.pair.sharing import check_pair, check_teacher, share_
from cur.healing.pair.stack import Stack
from cur.healing.report import HealingReport, LayerFit, best_step
from cur.healing.saving import save_healed
from cur.healing.training.closed_form import solve_block_
from cur.healing.training.logs import Log
from cur.healing.training.loop import Comparison, Progress, Status, TrainingUnit, look, summary, train
from cur.healing.training.state import StateError, StateFile
from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.journal import Journal
from cur.integrations.blockwise.rehearsal import Rehearsal
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.blockwise.writer import fill
from cur.integrations.files.directory import check_target
from cur.integrations.model.blocks import BlockCall
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.hooks import inputs_of, outputs_of
from cur.integrations.model.limits import check_windows
from cur.integrations.model.masks import padding_mask
from cur.integrations.model.precision import Precision, continued
from cur.integrations.model.running import body, evaluating, model_inputs

__all__ = ["heal_blockwise"]

Batch = Mapping[str, Any]


def heal_blockwise(
    student: StreamedModel,
    teacher: StreamedModel,
    batches: Tensor | Sequence[Batch],
    directory: str | os.PathLike[str],
    config: HealingConfig | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    tensorboard: str | Path | None = None,
    progress: Progress | None = None,
) -> HealingReport:
    """Heal a checkpoint into another without ever holding the student or the teacher.

    The cores are those of :func:`~cur.healing.heal` with the same configuration. Every block is loaded once. In memory
    are a block of the teacher and what the student's differs in, the hidden states of the windows that least squares
    looks at, and those of one batch. On disk beside `directory` lie, while it runs, the hidden states of all batches
    before and behind one block. A run that was ended in any way goes on when it is started again with the same
    arguments: finished blocks are done, and a block in the midst of its steps goes on with them.

    Parameters
    ----------
    student : StreamedModel
        The compressed checkpoint to heal, read block by block.
    teacher : StreamedModel
        The dense model that the student was made from, in the same dtype.
    batches : Tensor or sequence of mapping
        Windows of tokens to learn from, in the forms that :func:`~cur.healing.heal` takes.
    directory : path
        The directory to create.
    config : HealingConfig, optional
        Default: ``HealingConfig(scope="block", metric_windows=0)``. Gradients of the whole model are not to be had, so
        that the outputs of a layer count alike. With `patience`, every block stops by itself.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced; it stays until the new one is complete.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file.
    tensorboard : path, optional
        Directory of TensorBoard events, one below it for each block.
    progress : callable, optional
        Called with a :class:`~cur.healing.training.loop.Status`; the steps of all blocks are counted together.

    Returns
    -------
    HealingReport
        Losses are means over blocks, of which each keeps its own best state.

    Raises
    ------
    ValueError
        As :func:`~cur.healing.heal`, or if the configuration needs more than one block.
    JournalError
        If another run writes to the same directory, or an unfinished one was begun with other inputs.
    ShardError
        If a weight file of one of the checkpoints is damaged.
    NumericalError
        If a loss, a gradient or an activation is not finite; finished blocks are kept.
    OSError
        If the disk is full; what was finished is kept.
    """
    config = config or HealingConfig(scope="block", metric_windows=0)
    _check(config)
    check_pair(student.model, teacher.model)
    check_windows(teacher.model, [batches] if isinstance(batches, Tensor) else batches, name="batches")
    target = check_target(directory, overwrite=overwrite)
    text = Text(batches, batch_size=config.batch_size, held_out=config.held_out, seed=config.seed)
    passes = precision_blockwise(teacher, target, config)
    journal = Journal(target)
    if journal.begun_with("teacher") != teacher.shards.digest():  # a run that goes on was begun with the right one
        rehearsal = Rehearsal(teacher, [text.batch(0)], passes)
        rehearsal.check()
        if fault := rehearsal.chain_fault():
            raise ValueError(f"`student` cannot be healed from block to block: {fault}")
        check_teacher(student.shards.directory, student.model, teacher.kept_digest)
    config = replace(config, precision=passes.name)
    journal.begin(
        {
            "student": student.shards.digest(),
            "teacher": teacher.shards.digest(),
            "text": text.digest(),
            "configuration": {
                name: value for name, value in config.to_dict().items() if name not in ("save_every", "precision")
            },
            "dtype": str(student.dtype),
            "precision": passes.name,
            "versions": versions(),
        }
    )
    try:
        with (
            journal.explaining(target),
            evaluating(student.model),
            evaluating(teacher.model),
            eager_experts(student.model),
            eager_experts(teacher.model),
        ):
            run = _Run(student, teacher, text, config, journal, tensorboard, progress)
            report = run.heal()
            save_healed(
                student.model,
                student.tokenizer,
                target,
                report,
                source=student.shards.directory,
                log=run.log(),
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                weights=run.write(max_shard_size),
            )
    finally:
        journal.release()
    journal.remove()
    return report


def precision_blockwise(teacher: StreamedModel, target: str | os.PathLike[str], config: HealingConfig) -> Precision:
    """Return the precision of a run: that of the unfinished one at the same target, if there is one."""
    journal = Journal(check_target(target, overwrite=True))
    asked = continued(config.precision, journal.begun_with("precision"), journal.directory)
    return Precision.on(teacher.device, teacher.dtype, asked)


def _check(config: HealingConfig) -> None:
    if config.scope != "block":
        raise ValueError(
            f"`scope` must be 'block' where one block is in memory, got {config.scope!r}; a loss through the whole "
            "network needs all of it"
        )
    if config.metric_windows:
        raise ValueError(
            f"`metric_windows` must be 0 where one block is in memory, got {config.metric_windows}: the gradients of "
            "the teacher's loss flow back through all blocks"
        )
    if config.workers > 1:
        raise ValueError(f"`workers` must be 1 where one block is in memory, got {config.workers}")


@dataclass(frozen=True)
class _Healed:
    """What healing did to one block, as it is kept in the journal."""

    trainable: int
    fits: list[LayerFit]
    before: dict[str, float]
    curve: list[dict[str, float]]
    steps: int
    seconds: dict[str, float]

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> _Healed:
        return cls(**{**facts, "fits": [LayerFit(**fit) for fit in facts["fits"]]})


class _Run:
    """A healing under way: the blocks in order, and what lies on disk between them."""

    def __init__(
        self,
        student: StreamedModel,
        teacher: StreamedModel,
        text: Text,
        config: HealingConfig,
        journal: Journal,
        tensorboard: str | Path | None,
        progress: Progress | None,
    ) -> None:
        self.student, self.teacher, self.text, self.config = student, teacher, text, config
        self.passes = Precision.on(teacher.device, teacher.dtype, config.precision)
        self.journal, self.tensorboard, self.progress = journal, tensorboard, progress
        self.states = HiddenStates(journal.directory / "states", teacher.device)
        self.bypass = Bypass(teacher, self.states)
        self.passing = Stack(teacher.model, None)
        self.compressed = Stack(student.model, None).compressed
        self.first, self.last = self.compressed[0], self.compressed[-1]
        self._inner = body(teacher.model)
        # What a step sees, what is watched, what least squares look at, and what the moments are taken over.
        steps = [text.batch(number) for number in range(config.steps * config.accumulate)]
        self.lessons = dict(self._keyed([*steps, *text.held_out()]))
        self.fitting = self._keyed(text.spread(config.closed_form_windows) if config.closed_form else [])
        self.probing = self._keyed(text.spread(MOMENT_SAMPLES) if config.steps else [])
        self.walked = dict([*self.fitting, *self.probing])
        self.carried = self.lessons | self.walked

    def write(self, max_shard_size: int | str) -> Callable[[Path], None]:
        """Return what writes the weight files of the healed student into a directory."""

        def into(place: Path) -> None:
            fill(self.student.model, self.student, place, max_shard_size, replaced=self.factors)

        return into

    def heal(self) -> HealingReport:
        """Heal the blocks that are not healed yet, and report on all."""
        done = [self._finished(index) for index in range(self.last + 1)]
        start = done.index(False) if False in done else self.last + 1
        if 0 < start <= self.last and not self._intact(start):
            start = 0
        with self.bypass.open():
            if start <= self.last:
                self.teacher.load_outside()
                if start == 0:
                    self._begin()
                self.bypass.free_embeddings()
            for index in range(start, self.last + 1):
                self._pass(index)
        self.teacher.free_outside()
        return self._report()

    def factors(self, index: int) -> dict[str, Tensor]:
        """Return the healed factors in a block by name."""
        return load_file(self._file(index)) if index in self.compressed else {}

    def log(self) -> Path:
        """Write the logs of all blocks into one file, each line with its block; returns the file."""
        lines = []
        for index in self.compressed:
            for line in self._log(index).read_text(encoding="utf-8").splitlines():
                lines.append(json.dumps({"block": index, **json.loads(line)}))
        file = self.journal.directory / "log.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return file

    def _keyed(self, batches: Iterable[Batch]) -> list[tuple[str, Batch]]:
        return [(self.bypass.key(model_inputs(self._inner, batch)), batch) for batch in batches]

    def _begin(self) -> None:
        """Store what the embeddings of the teacher return."""
        self.bypass.active, self.bypass.recording = 0, True
        with torch.no_grad(), self.passes.products():
            for batch in self.carried.values():
                self.passing.enter(batch)
        self.bypass.recording = False

    def _finished(self, index: int) -> bool:
        return self.journal.facts(_step(index)) is not None

    def _intact(self, index: int) -> bool:
        """Say whether all that a block is called with is stored and what was written."""
        theirs = [*self.states.places("embedding-"), self.bypass.place(index - 1)]
        wanted = [(place, key) for place in theirs for key in self.carried]
        wanted += [(_ours(index - 1), key) for key in self.walked] if index > self.first else []
        return all(self.states.intact(place, key) for place, key in wanted)

    def _pass(self, index: int) -> None:
        """Load a block, heal it if it is compressed, and store what it returns for every batch."""
        with self.bypass.at(index, recording=False):
            if index >= self.first:
                self.student.load_block(index)
                share_(self.student.blocks[index][1], self.teacher.blocks[index][1])
            if index in self.compressed:
                self._heal(index)
            else:
                with torch.no_grad(), self.passes.products():
                    for batch in self.carried.values():
                        self._teach(index, batch)
                    for key, batch in self.walked.items() if index > self.first else ():
                        self._advance(index, key, batch)
                self.journal.finish(_step(index))
            self.student.free_block(index)
        self.bypass.drop_before(index)
        self.states.drop(_ours(index - 1))

    def _entered(self, index: int, key: str, batch: Batch) -> tuple[Tensor, BlockCall]:
        """Return what the student's block is called with: up to the first compressed one, what the teacher's is."""
        hidden, call = self.passing.enter(batch, index)
        return hidden if index <= self.first else self.states.read(_ours(index - 1), key), call

    def _teach(self, index: int, batch: Batch) -> Tensor:
        """Run the teacher's block on a batch, and store what it returns."""
        hidden, call = self.passing.enter(batch, index)
        self.bypass.recording = True
        try:
            return call(self.teacher.blocks[index][1], hidden)
        finally:
            self.bypass.recording = False

    def _advance(self, index: int, key: str, batch: Batch) -> None:
        """Run the student's block on a batch, and store what it returns."""
        hidden, call = self._entered(index, key, batch)
        self.states.write(_ours(index), key, call(self.student.blocks[index][1], hidden))

    def _heal(self, index: int) -> None:
        directory = self.journal.directory / "steps" / f"{index:04}"
        pair = TeacherStudentPair(self.student.model, self.teacher.model, self.config, probe=None, block=index)
        cache = pair.cache = TeacherCache(directory / "taught", pair.key())
        file = StateFile(directory / "state.safetensors", fingerprint(pair, self.text))
        with only_cores(pair):
            found = self._resumable(index, cache, file)
            log = Log(self._log(index), None if self.tensorboard is None else Path(self.tensorboard) / f"{index:04}")
            coordinates: dict[str, Coordinates] = {}
            if found is None:
                shutil.rmtree(directory, ignore_errors=True)
                self._log(index).unlink(missing_ok=True)
                found, coordinates = self._start(pair, index, cache, log)
            unit = TrainingUnit.of(pair, index, coordinates, before=found["before"].get("loss"))
            begin = time.perf_counter()
            with torch.enable_grad():
                steps, curve = train(
                    pair, [unit], self.text, self.config, log=log, state=file, facts=found, progress=self._watch(index)
                )
            log.close()
            seconds = {**found["seconds"], "heal": time.perf_counter() - begin}
            self._keep(pair, index)
        trainable = sum(core.rank**2 for core in pair.cores.values())
        facts = {**found, "trainable": trainable, "curve": curve, "steps": steps, "seconds": seconds}
        self.journal.finish(_step(index), [self._file(index)], **facts)
        shutil.rmtree(directory, ignore_errors=True)

    def _resumable(self, index: int, cache: TeacherCache, file: StateFile) -> dict[str, Any] | None:
        """Return what was found before the first step of a block, if its steps can be gone on with."""
        try:
            state = file.read()
        except StateError:
            return None
        if state is None or any(cache.read(batch) is None for batch in self.lessons.values()):
            return None
        if not all(self.states.intact(self.bypass.place(index), key) for key in self.carried):
            return None
        if not all(self.states.intact(_ours(index), key) for key in self.walked):
            return None
        return {name: state[1][name] for name in ("before", "fits", "seconds")}

    def _start(
        self, pair: TeacherStudentPair, index: int, cache: TeacherCache, log: Log
    ) -> tuple[dict[str, Any], dict[str, Coordinates]]:
        """Run the teacher, look at the student as it is, solve the closed form, and take coordinates."""
        config = self.config
        begin = time.perf_counter()
        wanted: dict[str, dict[str, Tensor]] = {}
        fitted = dict(self.fitting)
        with torch.no_grad(), pair.precision.products():
            for key, batch in self.carried.items():
                with (
                    outputs_of(self.teacher.model, pair.watched) as modules,
                    inputs_of(self.teacher.model, list(pair.cores)) as seen,
                ):
                    hidden = self._teach(index, batch)
                if key in self.lessons:
                    cache.write(batch, TeacherOutputs({index: hidden}, dict(modules), None))
                if key in fitted:
                    wanted[key] = seen
        before = summary(look(pair, [Comparison(pair, index)], self.text))
        log.write("begin", 0, {"precision": self.passes.name, "device": str(self.passes.device)})
        log.write("before", 0, before)
        fits: list[LayerFit] = []
        moments = LayerMoments(pair, {})
        with torch.no_grad(), pair.precision.products():
            if self.fitting:
                entered = [self._entered(index, key, batch) for key, batch in self.fitting]
                fits, behind = solve_block_(
                    pair,
                    index,
                    [call for _, call in entered],
                    [hidden for hidden, _ in entered],
                    [wanted[key] for key, _ in self.fitting],
                    [padding_mask(model_inputs(self._inner, batch)) for _, batch in self.fitting],
                    ridge=config.ridge,
                    correction=config.correction,
                    metrics={},
                )
                log.write("closed form", 0, {fit.name: fit.after for fit in fits})
                for (key, _), hidden in zip(self.fitting, behind, strict=True):
                    self.states.write(_ours(index), key, hidden)
            # Only now: the next block has to see this one after the closed form.
            for key, batch in self.walked.items():
                if key not in fitted:
                    self._advance(index, key, batch)
            for key, batch in self.probing:
                moments.mask = padding_mask(model_inputs(self._inner, batch))
                hidden, call = self._entered(index, key, batch)
                with moments.watching():
                    call(self.student.blocks[index][1], hidden)
        if self.progress is not None and config.closed_form:
            self.progress(Status("closed form", self.compressed.index(index) + 1, len(self.compressed)))
        coordinates = moments.coordinates()
        facts = {"before": before, "fits": [asdict(fit) for fit in fits]}
        return {**facts, "seconds": {"closed form": time.perf_counter() - begin}}, coordinates

    def _keep(self, pair: TeacherStudentPair, index: int) -> None:
        """Write the factors that learned."""
        tensors = {}
        for name, core in pair.cores.items():
            key = next(key for key, parameter in core.layer.named_parameters() if parameter is core.factor)
            tensors[f"{name}.{key}"] = core.factor.detach().cpu().contiguous()
        file = self._file(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)

    def _watch(self, index: int) -> Progress | None:
        if self.progress is None:
            return None
        tell, done = self.progress, self.compressed.index(index) * self.config.steps

        def watch(status: Status) -> None:
            total = len(self.compressed) * self.config.steps
            tell(replace(status, step=done + status.step, steps=total, seconds_left=None))

        return watch

    def _report(self) -> HealingReport:
        healed = [_Healed.read(self.journal.facts(_step(index)) or {}) for index in self.compressed]
        looks = sorted({look["step"] for one in healed for look in one.curve})
        # A block that stopped early stays as it was at its last look.
        curve = [
            {"step": step, **summary([_without_step(_latest(one.curve, step)) for one in healed])} for step in looks
        ]
        before = summary([one.before for one in healed if one.before])
        return HealingReport(
            config=self.config.to_dict(),
            trainable=sum(one.trainable for one in healed),
            fits=tuple(fit for one in healed for fit in one.fits),
            before=before,
            curve=tuple(curve),
            steps=max(one.steps for one in healed),
            best_step=best_step(before, curve),
            shared_bytes=0,
            seconds={stage: sum(one.seconds[stage] for one in healed) for stage in ("closed form", "heal")},
            versions=versions(),
        )

    def _file(self, index: int) -> Path:
        return self.journal.directory / "cores" / f"{index:04}.safetensors"

    def _log(self, index: int) -> Path:
        return self.journal.directory / "logs" / f"{index:04}.jsonl"


def _step(index: int) -> str:
    return f"block-{index:04}"


def _ours(index: int) -> str:
    """Name the hidden states of the student behind a block."""
    return f"student-{index:04}"


def _latest(curve: Sequence[Mapping[str, float]], step: float) -> Mapping[str, float]:
    return max((look for look in curve if look["step"] <= step), key=lambda look: look["step"])


def _without_step(look: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in look.items() if name != "step"}
