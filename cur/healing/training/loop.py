"""Gradient healing: the loop, its looks at held-out text, and its states on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from cur._lib.errors import NumericalError
from cur.healing.config import HealingConfig
from cur.healing.pair.cache import TeacherOutputs
from cur.healing.pair.cores import Coordinates
from cur.healing.pair.data import Text
from cur.healing.pair.pair import Loss, TeacherStudentPair
from cur.healing.training.learner import Learner
from cur.healing.training.logs import Log
from cur.healing.training.state import StateFile
from cur.integrations.model.running import checkpointing

__all__ = ["Comparison", "Progress", "Status", "TrainingUnit", "look", "saving_memory", "summary", "train"]


@dataclass(frozen=True)
class Status:
    """Where healing is.

    Attributes
    ----------
    stage : str
        ``"closed form"``, whose steps are blocks, ``"natural steps"`` or ``"heal"``.
    step, steps : int
        The number of steps done, and the number of all steps.
    loss : float or None
        The loss of the last step.
    perplexity : float or None
        The perplexity on the held-out text at the last look.
    seconds_left : float or None
        The seconds that remain at the pace so far.
    """

    stage: str
    step: int
    steps: int
    loss: float | None = None
    perplexity: float | None = None
    seconds_left: float | None = None


Progress: TypeAlias = Callable[[Status], object]
"""Called after every step."""


@dataclass(frozen=True)
class Comparison:
    """The loss of a student beside its teacher: through the whole model, or of one block by itself.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    block : int or None
        Index of the block; None for the whole model.
    """

    pair: TeacherStudentPair
    block: int | None

    def loss(self, batch: Mapping[str, Any], taught: TeacherOutputs, *, learning: bool) -> Loss:
        """Compare student and teacher on a batch.

        Parameters
        ----------
        batch : mapping
            Token ids, and a mask of padding where there is some.
        taught : TeacherOutputs
            The teacher's outputs on the batch, from :meth:`~cur.healing.pair.pair.TeacherStudentPair.teach`.
        learning : bool
            Whether a gradient will be asked for.

        Returns
        -------
        Loss
            The loss and its parts.

        Raises
        ------
        NumericalError
            If the loss is not finite.
        """
        if self.block is None:
            return self.pair.loss(batch, taught, learning=learning)
        return self.pair.block_loss(self.block, batch, taught, learning=learning)

    def learn(self, batch: Mapping[str, Any], taught: TeacherOutputs) -> dict[str, float]:
        """Add the gradient of a batch to those that the student's cores hold; returns the loss and its parts.

        Parameters
        ----------
        batch : mapping
            The batch to learn from.
        taught : TeacherOutputs
            The teacher's outputs on this batch.

        Returns
        -------
        dict of str to float
            The loss and its parts, by name.
        """
        loss = self.loss(batch, taught, learning=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.total.detach()), **loss.parts}

    def look(self, batch: Mapping[str, Any], taught: TeacherOutputs) -> dict[str, float]:
        """Return the loss of a batch and its parts, without a gradient.

        Parameters
        ----------
        batch : mapping
            The batch to compare on.
        taught : TeacherOutputs
            The teacher's outputs on this batch.
        """
        loss = self.loss(batch, taught, learning=False)
        return {"loss": float(loss.total), **loss.parts}


@dataclass(frozen=True)
class TrainingUnit:
    """What learns by itself: the whole model, or one block.

    Parameters
    ----------
    comparison : Comparison
        The loss that is made smaller.
    learner : Learner
        The cores that change, their optimizer and their best state.
    """

    comparison: Comparison
    learner: Learner

    @classmethod
    def of(
        cls,
        pair: TeacherStudentPair,
        block: int | None,
        coordinates: Mapping[str, Coordinates],
        *,
        before: float | None,
    ) -> TrainingUnit:
        """Return what learns in one block, or in the whole model.

        Parameters
        ----------
        pair : TeacherStudentPair
            The student that learns and the teacher it learns from.
        block : int or None
            Index of the block; None for the whole model.
        coordinates : mapping of str to Coordinates
            Coordinates in which each core learns, by the layer's name. A layer that has none gets a place for those
            that a state on disk holds.
        before : float or None
            Held-out loss of the student as it came, which the best state has to beat; None if there was no look.
        """
        names = list(pair.cores) if block is None else pair.inside(block)
        mine = {name: coordinates.get(name) or Coordinates.plain(pair.cores[name]) for name in names}
        return cls(Comparison(pair, block), Learner(mine, pair.config, before=before))


class _Loop:
    """The units, run side by side where there are workers for it."""

    def __init__(
        self, pair: TeacherStudentPair, units: Sequence[TrainingUnit], text: Text, config: HealingConfig
    ) -> None:
        self.pair, self.units, self.text, self.config = pair, units, text, config
        self.pool = ThreadPoolExecutor(config.workers) if config.workers > 1 else None

    def _all(self, work: Callable[[TrainingUnit], Any]) -> list[Any]:
        return list(map(work, self.units) if self.pool is None else self.pool.map(work, self.units))

    def step(self, number: int) -> dict[str, float]:
        """Take one step of every unit; returns losses, their parts and norms, each the mean over units."""
        config = self.config
        found: list[list[dict[str, float]]] = []
        tokens = 0
        try:
            for part in range(config.accumulate):
                batch = self.text.batch(number * config.accumulate + part)
                tokens += _token_count(batch)
                taught = self.pair.teach(batch)
                found.append(self._all(lambda unit: unit.comparison.learn(batch, taught)))  # noqa: B023
            losses = [_mean(each) for each in zip(*found, strict=True)]
            of_unit = dict(zip(map(id, self.units), losses, strict=True))
            steps = self._all(
                lambda unit: unit.learner.step(number, config.accumulate, loss=of_unit[id(unit)]["loss"], tokens=tokens)
            )
        except NumericalError as error:
            self.keep_best()
            raise NumericalError(
                f"{error}, at step {number + 1}; the best state so far is kept. Try a smaller `learning_rate` than "
                f"{config.learning_rate:g}, or `precision` 'float32'"
            ) from error
        return {**_mean(losses), **_mean(steps)}

    def stale(self) -> bool:
        """Say whether no unit has become better for as many looks as the patience allows."""
        return bool(self.config.patience) and all(t.learner.stale >= self.config.patience for t in self.units)

    def keep_best(self) -> None:
        """Put the best state of every unit into the model."""
        for unit in self.units:
            unit.learner.write_best_()

    def measure_prices(self) -> None:
        """Measure for every unit what a step costs, on the first batch."""
        batch = self.text.batch(0)
        taught = self.pair.teach(batch)
        self._all(lambda unit: unit.learner.measure_price(lambda: unit.comparison.look(batch, taught)["loss"]))


def look(pair: TeacherStudentPair, comparisons: Sequence[Comparison], text: Text) -> list[dict[str, float]]:
    """Compare on the held-out text, and return loss and parts of every comparison; an empty list without such text.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    comparisons : sequence of Comparison
        The comparisons to make, of the model or of each block.
    text : Text
        The text, whose held-out windows are used.

    Returns
    -------
    list of dict of str to float
        The loss and its parts by name, for each comparison.
    """
    found: list[list[dict[str, float]]] = []
    for batch in text.held_out():
        taught = pair.teach(batch)
        found.append([comparison.look(batch, taught) for comparison in comparisons])
    return [_mean(looks) for looks in zip(*found, strict=True)]


def summary(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of what :func:`look` found, and the perplexity.

    Parameters
    ----------
    each : sequence of mapping of str to float
        The losses and parts of every comparison, as :func:`look` returns them.
    """
    figures = _mean(each) if each else {}
    if "next_token" in figures:
        figures["perplexity"] = math.exp(min(figures["next_token"], 700.0))
    return figures


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(figures[name] for figures in found) / len(found) for name in found[0]}


def train(
    pair: TeacherStudentPair,
    units: Sequence[TrainingUnit],
    text: Text,
    config: HealingConfig,
    *,
    log: Log,
    state: StateFile | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[int, list[dict[str, float]]]:
    """Take the steps that are left, and leave the best state in the model.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    units : sequence of TrainingUnit
        The units that learn: one for the model, or one for each block. Units know nothing of each other, so neither
        their order nor the number of workers changes the result.
    text : Text
        The windows to learn from, and those that are held out.
    config : HealingConfig
        The configuration: steps, batches, and how often the held-out text is looked at.
    log : Log
        Gets a line for each step and look.
    state : StateFile, optional
        The file that states are written to; if it holds one already, healing goes on from it.
    facts : mapping, optional
        JSON types to be kept in the states.
    progress : callable, optional
        Called with a :class:`Status` after every step.

    Returns
    -------
    int
        Steps taken in all, fewer than asked for after early stopping.
    list of dict
        The looks at the held-out text.

    Raises
    ------
    NumericalError
        If a loss or a gradient is not finite. The best state so far is in the model then, and the last state on disk
        stays.
    StateError
        If the state on disk is damaged or of another run.
    OSError
        If a state cannot be written. The last one stays.
    """
    loop = _Loop(pair, units, text, config)
    curve: list[dict[str, float]] = []
    done = -1
    found = None if state is None else state.read()
    if found is not None:
        tensors, known = found
        for index, unit in enumerate(units):
            unit.learner.restore_(_part(tensors, f"{index}/"), known["tasks"][index])
        done, curve = int(known["step"]), known["curve"]
        log.rewind(done)

    def watch() -> None:
        each = look(pair, [unit.comparison for unit in units], text)
        for unit, figures in zip(units, each, strict=bool(each)):
            unit.learner.judge(figures["loss"])
        if each:
            curve.append({"step": done, **summary(each)})
            log.write("held-out", done, summary(each))

    def keep() -> None:
        if state is None:
            return
        parts = [unit.learner.state() for unit in units]
        tensors = {f"{i}/{name}": value for i, (part, _) in enumerate(parts) for name, value in part.items()}
        state.write(tensors, {**(facts or {}), "step": done, "curve": curve, "tasks": [kept for _, kept in parts]})

    if done < 0:
        done = 0
        watch()
        for unit in units:
            unit.learner.stale = 0  # patience is for steps
        if config.steps:
            loop.measure_prices()
        keep()
    first, begin = done, time.perf_counter()
    with saving_memory(pair):
        while done < config.steps and not loop.stale():
            figures = loop.step(done)
            done += 1
            log.write("step", done, figures)
            if done % config.evaluate_every == 0 or done == config.steps:
                watch()
            if done % config.save_every == 0 or done == config.steps:
                keep()
            if progress is not None:
                left = (time.perf_counter() - begin) / (done - first) * (config.steps - done)
                seen = curve[-1].get("perplexity") if curve else None
                progress(Status("heal", done, config.steps, figures["loss"], seen, left))
    if curve:
        loop.keep_best()
    return done, curve


def _token_count(batch: Mapping[str, Any]) -> int:
    """Return the number of tokens in a batch, without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def saving_memory(pair: TeacherStudentPair) -> AbstractContextManager[None]:
    """Let blocks be run a second time in the backward pass, if the configuration says so.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.

    Returns
    -------
    context manager
        A context in which the student's blocks keep only their inputs for the backward pass, if asked for.
    """
    return checkpointing(_learning(pair) if pair.config.gradient_checkpointing else [], pair.precision)


def _learning(pair: TeacherStudentPair) -> list[torch.nn.Module]:
    """Return the student's blocks through which gradients pass."""
    if pair.config.scope == "block":
        return [pair.student.blocks[index][1] for index in pair.student.compressed]
    return [block for _, block in pair.student.blocks[pair.first :]]


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
