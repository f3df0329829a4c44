from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import cur.healing.training.loop
from cur import NumericalError
from cur.healing import HealingConfig, HealingReport, heal
from cur.healing.training.natural import search

Run = Callable[..., HealingReport]


@pytest.fixture
def run(
    teacher: PreTrainedModel,
    make_student: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    settings: Callable[..., HealingConfig],
) -> Run:
    """Heal a student by natural steps alone: ``run(held_out=0)``."""

    def make(*, student: Any = None, given: Any = windows, layout: str = "cur", **options: Any) -> HealingReport:
        config = settings(**{"steps": 0, "natural_steps": 1, **options})
        return heal(student or make_student(teacher, layout=layout), teacher, given, config)

    return make


@pytest.mark.parametrize("least", [0.01, 0.2, 0.3, 1.0, 3.0])
def test_the_length_is_within_a_factor_of_two_of_the_best(least: float) -> None:
    seen: list[float] = []

    def loss(length: float) -> float:
        seen.append(length)
        return (length - least) ** 2

    found, length = search(loss, loss(0.0))
    assert found == loss(length) < loss(0.0)
    assert least / 2 <= length <= 2 * least
    assert len(seen) <= 9


def test_where_nothing_is_less_nothing_is_done() -> None:
    assert search(lambda length: length, 0.0) == (0.0, 0.0)


def test_it_needs_no_least_squares(run: Run, settings: Callable[..., HealingConfig]) -> None:
    report = run(closed_form=False)
    assert report.curve[0]["loss"] < 0.97 * report.before["loss"]
    assert math.isfinite(report.seconds["natural steps"])
    with pytest.raises(ValueError, match="nothing would be healed"):
        settings(steps=0, closed_form=False)
    with pytest.raises(ValueError, match="nothing would be healed"):
        settings(steps=0, closed_form=False, scope="block", natural_steps=3)


@pytest.mark.parametrize("layout", ["cur", "folded", "interpolative"])
def test_every_layout_takes_two(layout: str, run: Run) -> None:
    losses = []
    for steps in (1, 2):
        report = run(layout=layout, natural_steps=steps, closed_form=False)
        losses += [report.before["loss"], report.curve[0]["loss"]]
    assert losses[3] < losses[1] < 0.98 * losses[0]


def test_text_that_is_short_or_comes_as_batches_is_seen_once(
    run: Run, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    learn = cur.healing.training.loop.Comparison.learn

    def watch(self: Any, batch: Any, taught: Any) -> dict[str, float]:
        seen.append(len(batch["input_ids"]))
        return learn(self, batch, taught)

    monkeypatch.setattr(cur.healing.training.loop.Comparison, "learn", watch)
    some = windows[:8]
    for given in (some, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in some.split(4)]):
        seen.clear()
        run(given=given, held_out=0)
        assert seen == [4, 4]


def test_memory_can_be_saved_for_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    checkpointing = cur.integrations.model.running.checkpointing
    monkeypatch.setattr(
        cur.healing.training.loop,
        "checkpointing",
        lambda blocks, passes: asked.append(bool(blocks)) or checkpointing(blocks, passes),
    )
    found = [run(gradient_checkpointing=saving).curve[0]["loss"] for saving in (False, True)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert asked == [False, False, True, True]  # for the natural step, and for the loop of the others


def test_a_length_at_which_the_loss_is_not_finite_is_too_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    look, calls = cur.healing.training.loop.Comparison.look, []

    def broken(self: Any, batch: Any, taught: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:  # of what is held out: before anything, at length 0, at the first length
            raise NumericalError("the loss is not finite")
        return look(self, batch, taught)

    monkeypatch.setattr(cur.healing.training.loop.Comparison, "look", broken)
    report = run(closed_form=False)
    assert len(calls) > 4
    assert report.curve[0]["loss"] < report.before["loss"]


def test_a_gradient_that_is_not_finite_changes_nothing(
    run: Run, student: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: part.clone() for name, part in student.state_dict().items()}
    learn = cur.healing.training.loop.Comparison.learn

    def broken(self: Any, batch: Any, taught: Any) -> dict[str, float]:
        figures = learn(self, batch, taught)
        list(self.pair.cores.values())[-1].factor.grad.fill_(torch.nan)
        return figures

    monkeypatch.setattr(cur.healing.training.loop.Comparison, "learn", broken)
    with pytest.raises(NumericalError, match=r"not finite, in a natural step; the cores are what they were"):
        run(student=student, closed_form=False)
    for name, part in student.state_dict().items():
        assert torch.equal(part, before[name])
