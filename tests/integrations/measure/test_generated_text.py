"""Windows that a model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from cur.integrations import BudgetConfig, Statistics, batches, make_plan
from cur.integrations.compress import compress_source, measure
from cur.integrations.measure.generated_text import own_text, sample_windows, writing_fault
from cur.integrations.sources import InMemory
from tests.models import make


def test_every_token_is_drawn_from_what_the_model_predicts(llama: PreTrainedModel) -> None:
    """The cache of the model, and inversion of its predictions at known heights."""
    windows = sample_windows(llama, count=5, length=12, seed=3, batch_size=2)
    assert windows.shape == (5, 12)
    with torch.no_grad():
        below = llama(input_ids=windows).logits.double().softmax(-1).cumsum(-1)
    for number, window in enumerate(windows):
        heights = np.random.default_rng((3, number)).random(12)
        for position, token in enumerate(window.tolist()[1:], start=1):
            steps = torch.cat([torch.zeros(1, dtype=torch.float64), below[number, position - 1]])
            assert steps[token] - 1e-5 <= heights[position] <= steps[token + 1] + 1e-5


def test_windows_start_with_any_token_but_special_ones(llama: PreTrainedModel) -> None:
    first = sample_windows(llama, count=400, length=1, batch_size=400)[:, 0]
    config = llama.config
    assert not {config.bos_token_id, config.eos_token_id, config.pad_token_id} & set(first.tolist())
    assert len(set(first.tolist())) > 0.9 * (config.vocab_size - 3)


def test_the_seed_decides(llama: PreTrainedModel) -> None:
    ours, same, other = (sample_windows(llama, count=2, length=9, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, other)
    assert torch.equal(sample_windows(llama, count=1, length=9)[0], ours[0])


def test_the_mode_of_the_model_is_restored(llama: PreTrainedModel) -> None:
    llama.train()
    sample_windows(llama, count=1, length=3)
    assert llama.training


@pytest.mark.parametrize("name", ["count", "length", "batch_size"])
def test_numbers_are_positive(llama: PreTrainedModel, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, got 0"):
        sample_windows(llama, **{"count": 1, "length": 2, name: 0})


@pytest.mark.parametrize(("share", "count"), [(1.0, 5), (0.25, 2), (0.01, 1)])
def test_own_text_is_a_share_of_what_was_given(llama: PreTrainedModel, share: float, count: int) -> None:
    given = batches(torch.zeros(5, 7, dtype=torch.int64), batch_size=2)
    extra = own_text(llama, given, share=share, batch_size=3, seed=0)
    assert [len(batch["input_ids"]) for batch in extra] == ([3, 2] if count == 5 else [count])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in extra]), sample_windows(llama, count=count, length=7))
    assert own_text(llama, given, share=0, batch_size=3, seed=0) == []


def test_models_that_write_no_text_are_calibrated_on_the_given_one(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    given = batches(torch.zeros(1, 4, dtype=torch.int64), batch_size=1)
    assert own_text(make_model("bert"), given, share=1, batch_size=1, seed=0) == []


def test_batches_without_tokens_are_left_alone(llama: PreTrainedModel) -> None:
    assert own_text(llama, [{"inputs_embeds": torch.zeros(1, 4, 32)}], share=1, batch_size=1, seed=0) == []


def test_plans_say_what_was_measured_not_what_was_asked(llama: PreTrainedModel, tmp_path: Path) -> None:
    windows = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(0))
    given, config = list(batches(windows, batch_size=3)), BudgetConfig(keep=0.7, own_text=0.5)
    source = InMemory(llama, given)
    own = source.write_text(config.own_text, seed=0)
    assert own == 0.5
    measure(llama, source.text, config, own_text=own).save(tmp_path / "statistics")
    statistics = Statistics.load(tmp_path / "statistics")
    assert make_plan(llama, statistics, BudgetConfig(keep=0.7)).own_text == 0.5
    assert make_plan(llama, measure(llama, given, config), config).own_text == 0.0
    assert InMemory(llama, given).write_text(0.0, seed=0) == 0.0


@pytest.mark.parametrize("value", [True, -1.0, float("inf"), "0.5", None])
def test_shares_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="`own_text` must be a finite multiple that is at least 0, got"):
        BudgetConfig(keep=0.5, own_text=value)


@pytest.mark.parametrize("name", ["mamba", "openai-gpt"])
def test_a_model_that_keeps_what_it_read_in_another_way(name: str) -> None:
    """What a state or nothing is kept of is drawn from the same predictions as of a whole text."""
    model = make(name)
    windows = sample_windows(model, count=3, length=9, seed=5)
    with torch.no_grad():
        below = model(input_ids=windows).logits.double().softmax(-1).cumsum(-1)
    for number, window in enumerate(windows):
        heights = np.random.default_rng((5, number)).random(9)
        for position, token in enumerate(window.tolist()[1:], start=1):
            steps = torch.cat([torch.zeros(1, dtype=torch.float64), below[number, position - 1]])
            assert steps[token] - 1e-4 <= heights[position] <= steps[token + 1] + 1e-4


def test_settings_of_the_model_do_not_change_what_it_writes(llama: PreTrainedModel) -> None:
    plain = sample_windows(llama, count=2, length=12)
    settings = GenerationConfig(repetition_penalty=5.0, eos_token_id=int(plain[0, 3]), max_length=4, num_beams=3)
    llama.generation_config = settings
    assert torch.equal(sample_windows(llama, count=2, length=12), plain)
    assert llama.generation_config is settings


def test_a_model_that_cannot_write_is_told(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writing_fault(llama) is None

    def broken(*_: object, **__: object) -> None:
        raise IndexError("index -1 is out of bounds")

    monkeypatch.setattr(llama, "generate", broken)
    said: list[str] = []
    text = torch.randint(5, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    source = InMemory(llama, batches(text, batch_size=2), announce=said.append)
    report = compress_source(source, BudgetConfig(keep=0.8))
    assert report.plan.own_text == 0.0
    assert report.notes == tuple(said)
    assert "LlamaForCausalLM does not go on with a text here (index -1 is out of bounds)" in said[0]
