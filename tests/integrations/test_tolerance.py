"""The smallest model within a tolerance: tried and measured before it is written."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cur.integrations import BudgetConfig, Reference, compress
from cur.integrations.compress import compress_to
from cur.integrations.report.data import CompressionReport
from cur.integrations.sources import InMemory, as_batches
from cur.integrations.tolerance import _next
from tests.models import VOCABULARY, make


def _windows(count: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, 48), generator=torch.Generator().manual_seed(seed))


def _compressed(tol: float, out: Path, *, said: list[str] | None = None, held_out: int = 6) -> tuple[Any, Any]:
    model = make("llama", seed=0, blocks=4)
    dense = copy.deepcopy(model)
    source = InMemory(model, as_batches(_windows(12, 1), 1), announce=None if said is None else said.append)
    config = BudgetConfig(tol=tol, own_text=0.0)
    return dense, compress_to(source, config, out, held_out=_windows(held_out, 2) if held_out else None)


@pytest.mark.parametrize("tol", [1e-3, 1e-2])
def test_what_is_written_stays_within_the_tolerance(tol: float, tmp_path: Path) -> None:
    said: list[str] = []
    dense, report = _compressed(tol, tmp_path / "out", said=said)
    tried = [sentence for sentence in said if sentence.startswith("Plan ")]
    assert 1 <= len(tried) <= 3
    assert 0.5 * tol < report.divergence.upper <= tol
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = Reference(dense, _windows(6, 2)).compare(again)
    assert found.upper == pytest.approx(report.divergence.upper, rel=1e-3)
    assert CompressionReport.load(tmp_path / "out" / "report.json").plan == report.plan
    assert {layer.name for layer in report.layers} == {entry.name for entry in report.plan.entries}


def test_more_may_be_lost_for_fewer_bytes(tmp_path: Path) -> None:
    sizes = [_compressed(tol, tmp_path / f"{tol}")[1].after.bytes for tol in (1e-3, 1e-2)]
    assert sizes[1] < 0.95 * sizes[0]


def test_a_tolerance_that_is_not_met_says_what_was_reached_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`tol` 1e-12 was not met: no plan changes a layer|least that was reached is"):
        _compressed(1e-12, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_best_of_the_trials_is_taken_and_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the second plan is said to be too far off, and so is the third: the first is what is written
    uppers = iter([0.005, 0.02, 0.02])
    real = InMemory.on_trial
    plans: list[dict[str, Any]] = []

    def on_trial(self: InMemory, compare: Any) -> Any:
        found = real(self, compare)
        plans.append({name: layer.grid for name, layer in self.made.items()})
        upper = next(uppers)
        return replace(found, kl=(upper,) * found.windows)

    monkeypatch.setattr(InMemory, "on_trial", on_trial)
    _, report = _compressed(0.01, tmp_path / "out")
    assert len(plans) == 3
    assert {layer.name: layer.grid for layer in report.layers} == plans[0] != plans[2]
    assert report.divergence.upper == pytest.approx(0.005)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: again.get_submodule(name).grid for name in plans[0]} == plans[0]


def test_what_allows_everything_is_tried_once(tmp_path: Path) -> None:
    said: list[str] = []
    _compressed(1e6, tmp_path / "out", said=said)
    assert len([sentence for sentence in said if sentence.startswith("Plan ")]) == 1


def test_the_next_plan_follows_the_power_of_those_before() -> None:
    assert _next([(0.02, 0.1)], 0.05) == pytest.approx(0.01)
    # the divergence grows as the root of the loss
    assert _next([(0.04, 0.2), (0.01, 0.1)], 0.05) == pytest.approx(0.0025)
    assert _next([(0.02, math.nan)], 0.05) == pytest.approx(0.02 / 30)
    assert _next([(1e-9, 1e-12)], 0.05) == pytest.approx(3e-8)


def test_a_trial_leaves_the_model_as_it_is() -> None:
    model = make("llama", seed=0, blocks=2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    source = InMemory(model, as_batches(_windows(2, 1), 1))
    source.made = {"model.layers.0.mlp.up_proj": torch.nn.Linear(1, 1)}
    with pytest.raises(RuntimeError, match="halfway"):
        source.on_trial(lambda _: (_ for _ in ()).throw(RuntimeError("halfway")))
    assert {name: bool(torch.equal(value, state[name])) for name, value in model.state_dict().items()} == dict.fromkeys(
        state, True
    )


def test_what_is_missing_is_said_before_any_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`tol` needs `held_out` text"):
        _compressed(0.1, tmp_path / "out", held_out=0)
    with pytest.raises(ValueError, match=r"`tol` needs at least 2 windows of `held_out` text .* got 1; ask"):
        _compressed(0.1, tmp_path / "out", held_out=1)
    with pytest.raises(ValueError, match="`tol` needs text that the model was not measured on"):
        compress(make("llama", blocks=2), _windows(2, 1), BudgetConfig(tol=0.1))
    with pytest.raises(ValueError, match="`tol` needs `gradients`"):
        BudgetConfig(tol=0.1, gradients=False)
    with pytest.raises(ValueError, match=r"`tol` must be a positive number of nats per token.*got 0"):
        BudgetConfig(tol=0)
