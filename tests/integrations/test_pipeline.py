"""One call from a model to a checkpoint, a plan or a perplexity."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cur.integrations import (
    BudgetConfig,
    CompressConfig,
    CompressionReport,
    Plan,
    compress,
    compress_model,
    divergence,
    evaluate_model,
    load_model,
    perplexity,
    plan_model,
    save,
)
from cur.integrations.pipeline import place
from tests.models import make, write

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
    dense, made = (load_model(directory.parent / name).model for name in ("dense", "out"))
    found, direct = report.divergence, divergence(made, dense, tokens[:2])
    assert found is not None
    assert 0 < found.mean < found.upper
    assert (found.kl, found.same) == (pytest.approx(direct.kl, rel=1e-5), direct.same)
    assert (found.reference_perplexity, found.perplexity) == tuple(report.perplexity.values())
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
    monkeypatch.setattr("cur.integrations.sources.Reference", run)
    with pytest.raises(ValueError, match=message):
        compress_model(directory, directory.parent / "out", **{"text": tokens, **wrong})
    assert [path.name for path in directory.parent.iterdir()] == ["dense"]


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert place("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [place(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


@pytest.fixture
def compressed(directory: Path, tokens: torch.Tensor) -> Path:
    compress_model(directory, directory.parent / "small", CONFIG, text=tokens)
    return directory.parent / "small"


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_model_is_evaluated_against_another(
    directory: Path, compressed: Path, tokens: torch.Tensor, low_memory: bool
) -> None:
    dense, made = load_model(directory).model, load_model(compressed).model
    expected = divergence(made, dense, tokens)
    stages: list[str] = []
    found = evaluate_model(
        compressed,
        lambda _: tokens,
        against=directory,
        low_memory=low_memory,
        batch_size=2,
        progress=lambda stage, *_: stages.append(stage),
    )
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.same == expected.same
    assert {"reference", "evaluate"} <= set(stages)
    assert evaluate_model(directory, tokens, against=directory, low_memory=low_memory).mean == 0.0
    # One of them in memory, the other read from disk.
    for pair in ((made, directory), (compressed, dense)):
        mixed = evaluate_model(pair[0], tokens, against=pair[1], low_memory=low_memory)
        assert mixed.kl == pytest.approx(expected.kl, rel=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
def test_models_of_other_tokens_are_refused_before_any_pass(
    directory: Path, tmp_path: Path, tokens: torch.Tensor, low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("report.divergence.predicting", "report.perplexity.predicting", "blockwise.score._walked"):
        monkeypatch.setattr(f"cur.integrations.{name}", lambda *_: pytest.fail("the model ran"))
    read: Callable[..., Any] = lambda _: tokens  # noqa: E731
    other = shutil.copytree(directory, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (next(word for word, number in vocabulary.items() if number == wanted) for wanted in (10, 11))
    vocabulary[first], vocabulary[second] = 11, 10
    (other / "tokenizer.json").write_text(json.dumps(words))
    met = rf"`against` .* token 10 of the text is '{first}'; to that model .* '{second}'"
    with pytest.raises(ValueError, match=met):
        evaluate_model(directory, read, against=other, low_memory=low_memory)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(ValueError, match="`reference` must predict the tokens that the model does"):
        evaluate_model(directory, read, against=other, low_memory=low_memory)
    encoder = shutil.copytree(directory, tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    make("bert").save_pretrained(encoder)
    for pair in ((directory, encoder), (encoder, directory)):
        with pytest.raises(TypeError, match="perplexity and divergence need a causal language model, BertForMaskedLM"):
            evaluate_model(pair[0], read, against=pair[1], low_memory=low_memory)
