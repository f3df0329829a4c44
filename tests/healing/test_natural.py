from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import cur.healing.train
from cur import NumericalError
from cur.healing import HealingConfig, heal
from cur.healing.natural import search


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


def test_it_needs_no_least_squares(
    teacher: PreTrainedModel,
    make_student: Callable[..., Any],
    windows: torch.Tensor,
    settings: Callable[..., HealingConfig],
) -> None:
    report = heal(make_student(teacher), teacher, windows, settings(steps=0, natural_steps=1, closed_form=False))
    assert report.curve[0]["loss"] < 0.97 * report.before["loss"]
    assert math.isfinite(report.seconds["natural steps"])
    with pytest.raises(ValueError, match="nothing would be healed"):
        settings(steps=0, closed_form=False)
    with pytest.raises(ValueError, match="nothing would be healed"):
        settings(steps=0, closed_form=False, scope="block", natural_steps=3)


def test_a_gradient_that_is_not_finite_changes_nothing(
    teacher: PreTrainedModel,
    make_student: Callable[..., Any],
    windows: torch.Tensor,
    settings: Callable[..., HealingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(teacher)
    before = {name: part.clone() for name, part in student.state_dict().items()}
    learn = cur.healing.train.Goal.learn

    def broken(self: Any, batch: Any, taught: Any) -> dict[str, float]:
        figures = learn(self, batch, taught)
        list(self.pair.cores.values())[-1].factor.grad.fill_(torch.nan)
        return figures

    monkeypatch.setattr(cur.healing.train.Goal, "learn", broken)
    with pytest.raises(NumericalError, match=r"not finite, in a natural step; the cores are what they were"):
        heal(student, teacher, windows, settings(natural_steps=1, closed_form=False))
    for name, part in student.state_dict().items():
        assert torch.equal(part, before[name])
