"""One call from a model to a checkpoint, a plan or a perplexity."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cur.integrations import (
    BudgetConfig,
    CompressConfig,
    CompressionReport,
    Plan,
    compress,
    compress_model,
    evaluate_model,
    load_model,
    perplexity,
    plan_model,
    save,
)
from cur.integrations.pipeline import place
from tests.models import write

CONFIG = CompressConfig(layers=2, rank=4)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write("causal", tmp_path / "dense")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 100, (6, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("low_memory", [False, True])
def test_it_writes_what_the_steps_write(directory: Path, tokens: torch.Tensor, low_memory: bool) -> None:
    said: list[str] = []
    stages: list[str] = []
    report = compress_model(
        directory,
        directory.parent / "out",
        CONFIG,
        text=tokens,
        held_out=tokens[:2],
        low_memory=low_memory,
        announce=said.append,
        progress=lambda stage, *_: stages.append(stage),
    )
    loaded = load_model(directory)
    by_steps = compress(loaded.model, tokens, CONFIG)
    save(loaded.model, loaded.tokenizer, directory.parent / "steps", report=by_steps)
    names = [path.name for path in (directory.parent / "steps").glob("*.safetensors")]
    assert names
    for name in names:
        assert filecmp.cmp(directory.parent / "steps" / name, directory.parent / "out" / name, shallow=False)
    assert set(report.perplexity) == {"before, held-out", "after, held-out"}
    assert report == CompressionReport.load(directory.parent / "out" / "report.json")
    assert report.perplexity["before, held-out"] == pytest.approx(
        perplexity(load_model(directory).model, tokens[:2]).value
    )
    assert any(line.startswith("Products in") for line in said)
    assert {"before", "after", "calibrate", "decompose"} <= set(stages)
    assert evaluate_model(directory.parent / "out", tokens[:2], low_memory=low_memory).value == pytest.approx(
        report.perplexity["after, held-out"]
    )


def test_text_comes_in_many_forms(directory: Path, tokens: torch.Tensor) -> None:
    forms: dict[str, Any] = {
        "windows": tokens,
        "batches": [{"input_ids": tokens[:3]}, {"input_ids": tokens[3:]}],
        "function": lambda tokenizer: [{"input_ids": tokens}],
    }
    plans = {name: plan_model(directory, CONFIG, text=text) for name, text in forms.items()}
    ranks = {name: [(entry.name, entry.ranks) for entry in plan.entries] for name, plan in plans.items()}
    assert len(ranks["windows"]) == 2 * 3
    assert ranks["windows"] == ranks["batches"] == ranks["function"]
    assert len({plan.calibration for plan in plans.values()}) == 1


def test_a_model_in_memory_and_a_plan(directory: Path, tokens: torch.Tensor) -> None:
    loaded = load_model(directory)
    plan = plan_model(loaded, BudgetConfig(keep=0.8, own_text=0), text=tokens)
    assert isinstance(plan, Plan)
    report = compress_model(loaded.model, directory.parent / "out", plan, text=tokens, tokenizer=loaded.tokenizer)
    assert [layer.name for layer in report.layers] == [entry.name for entry in plan.entries]
    assert AutoModelForCausalLM.from_pretrained(directory.parent / "out")(tokens).logits.isfinite().all()
    assert (directory.parent / "out" / "tokenizer.json").exists()


def test_another_text_than_that_of_the_plan_is_told_of(directory: Path, tokens: torch.Tensor) -> None:
    plan, said = plan_model(directory, CONFIG, text=tokens), []
    for text in (tokens, tokens.flip(0)):
        compress_model(directory, directory.parent / "out", plan, text=text, overwrite=True, announce=said.append)
    assert [line for line in said if "another than the one that the plan was made from" in line] == said[-1:]


def test_statistics_are_kept_and_used(directory: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    file = directory.parent / "statistics"
    first = plan_model(directory, CONFIG, text=tokens, statistics=file)
    assert file.exists()
    monkeypatch.setattr("cur.integrations.sources.collect", lambda *_, **__: pytest.fail("measured again"))
    assert plan_model(directory, CONFIG, text=tokens, statistics=file) == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "nowhere"}, "`device` .* must be cpu, cuda or the like, got 'nowhere'"),
        ({"precision": "float8"}, "`precision` must be one of"),
        ({"config": CompressConfig(layers=3)}, "`layers` must be between 1 and 2"),
        ({"config": CONFIG, "text": torch.tensor([[1, 100]])}, "calibration.* 100"),
        ({"config": CONFIG, "held_out": torch.tensor([[1, 100]])}, "held_out.* 100"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    directory: Path, tokens: torch.Tensor, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Any] = lambda *_, **__: pytest.fail("the model ran")  # noqa: E731
    monkeypatch.setattr("cur.integrations.sources.collect", run)
    monkeypatch.setattr("cur.integrations.sources.perplexity", run)
    with pytest.raises(ValueError, match=message):
        compress_model(directory, directory.parent / "out", **{"text": tokens, **wrong})
    assert [path.name for path in directory.parent.iterdir()] == ["dense"]


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert place("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [place(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
