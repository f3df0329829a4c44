from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cur.cli.app import app
from cur.cli.source import Source
from cur.healing import HealingConfig
from cur.integrations.nn import compressed_modules
from tests.models import TEXT, write

QUICK = ["--window-length", "12", "--steps", "3", "--held-out", "4", "--precision", "float32"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random Llama with a tokenizer, a text that is long enough to learn from, and a compressed checkpoint."""
    base = tmp_path_factory.mktemp("heal")
    words = {"<unk>": 0, **{f"w{index}": index for index in range(1, 60)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=60,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(base / "dense")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(base / "dense")
    (base / "text.txt").write_text(" ".join(f"w{1 + (7 * index) % 59}" for index in range(1500)))
    done = cur(
        "compress", base / "dense", "--text", base / "text.txt", "--out", base / "small", "--windows", 8,
        "--window-length", 12, "--layers", 2, "--rank", 6,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return {name: base / name for name in ("dense", "small", "text.txt")}


def cur(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_checkpoint_is_healed_and_loads(places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "healed"
    done = cur("heal", places["small"], "--text", places["text.txt"], "--out", out, *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 3
    assert report["curve"][-1]["kl"] < report["before"]["kl"]
    healed = AutoModelForCausalLM.from_pretrained(out)
    small = AutoModelForCausalLM.from_pretrained(places["small"])
    for name, layer in compressed_modules(healed).items():
        before = small.get_submodule(name)
        assert torch.equal(layer.C.weight, before.C.weight)
        assert torch.equal(layer.R.weight, before.R.weight)
        assert not torch.equal(layer.U.weight, before.U.weight)
    assert {"healing.json", "healing.jsonl", "plan.json", "report.json", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert not (tmp_path / "healed.healing").exists()


def test_by_blocks(places: dict[str, Path], tmp_path: Path) -> None:
    done = cur(
        "heal", places["small"], "--teacher", places["dense"], "--text", places["text.txt"], "--out", tmp_path / "out",
        *QUICK, "--scope", "block", "--windows", 20, "--state", tmp_path / "state",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "Healed" in done.stdout
    assert (tmp_path / "state" / "log.jsonl").exists()


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
@pytest.mark.parametrize("made", ["--in-memory", "--low-memory"])
def test_the_teacher_is_found_from_anywhere_and_no_other_is(
    made: str, way: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = places["text.txt"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    shutil.copytree(places["dense"], tmp_path / "one" / "model")
    monkeypatch.chdir(tmp_path / "one")
    done = cur(
        "compress", "model", "--text", text, "--out", "small", "--windows", 8, "--window-length", 12, "--layers", 2,
        "--rank", 6, made,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    monkeypatch.chdir(tmp_path / "two")
    # Another model of that name and shape, where the command is typed.
    torch.manual_seed(1)
    LlamaForCausalLM.from_pretrained(places["dense"]).apply(_reset).save_pretrained("model")
    shutil.copyfile(places["dense"] / "tokenizer.json", "model/tokenizer.json")
    shutil.copyfile(places["dense"] / "tokenizer_config.json", "model/tokenizer_config.json")
    heal = ("heal", tmp_path / "one" / "small", "--text", text, *QUICK, way)
    done = cur(*heal, "--out", "healed")
    assert done.exit_code == 0, done.stderr
    done = cur(*heal, "--teacher", "model", "--out", "other")
    assert done.exit_code == 2
    said = " ".join(done.stderr.split())
    assert "the teacher is not the dense model that" in said
    assert str(tmp_path / "one" / "model") in said
    assert not (tmp_path / "two" / "other").exists()
    (tmp_path / "one" / "model").rename(tmp_path / "one" / "moved")
    done = cur(*heal, "--out", "other")
    assert done.exit_code == 2
    assert "which is not there any more; name the dense model with --teacher" in " ".join(done.stderr.split())
    done = cur(*heal, "--teacher", tmp_path / "one" / "moved", "--out", "other")
    assert done.exit_code == 0, done.stderr


def _reset(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.2)


def test_low_memory(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [places["small"], "--teacher", places["dense"], "--text", places["text.txt"], *QUICK, "--json"]
    done = cur("heal", *given, "--out", tmp_path / "asked", "--low-memory")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["config"]["scope"], report["config"]["metric_windows"]) == ("block", 0)
    assert report["curve"][-1]["loss"] < report["before"]["loss"]
    # A machine on which nothing fits: the choice is made by itself.
    monkeypatch.setattr("cur.integrations.blockwise.memory.available_memory", lambda: 1000)
    done = cur("heal", *given, "--out", tmp_path / "chosen")
    assert done.exit_code == 0, done.stderr
    weights = [(tmp_path / name / "cur_model.safetensors").read_bytes() for name in ("asked", "chosen")]
    assert weights[0] == weights[1]
    for more, message in (
        (["--scope", "model"], "--low-memory heals block by block; leave out --scope model"),
        (["--state", tmp_path / "state"], "--state and --cache are not for --low-memory"),
        (["--workers", "2"], "`workers` must be 1"),
    ):
        done = cur("heal", *given, "--out", tmp_path / "out", "--low-memory", *more)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
    names = {path.name for path in (tmp_path / "asked").iterdir()}
    assert {"healing.json", "healing.jsonl", "plan.json", "report.json", "tokenizer.json"} <= names


@pytest.fixture(scope="module")
def random_text(places: dict[str, Path]) -> tuple[Path, torch.Tensor]:
    """A text in which every window of 12 tokens is another, and its tokens."""
    words = np.random.default_rng(0).integers(59, size=1500)
    text = places["dense"].with_name("random.txt")
    text.write_text(" ".join(f"w{1 + int(word)}" for word in words))
    return text, torch.from_numpy(1 + words)


@pytest.mark.parametrize(
    ("windows", "held_out", "expected"),
    [
        (5, 2, [20, 61, 102, 123, 124]),  # the middles of thirds of 123, and the last two
        (5, 0, [12, 37, 62, 87, 112]),
        (3, 8, [122, 123, 124]),
        (125, 8, list(range(125))),
        (None, 8, list(range(125))),
    ],
)
def test_what_is_watched_is_the_end_of_the_text(
    windows: int | None,
    held_out: int,
    expected: list[int],
    places: dict[str, Path],
    random_text: tuple[Path, torch.Tensor],
) -> None:
    path, tokens = random_text
    source = Source(text=path, dataset=None, dataset_config=None, windows=windows, window_length=12)
    found = source.to_heal(PreTrainedTokenizerFast.from_pretrained(places["dense"]), held_out=held_out)
    assert torch.equal(found, tokens[: 125 * 12].view(125, 12)[expected])


def test_what_is_watched_was_not_calibrated_on(places: dict[str, Path], tmp_path: Path) -> None:
    numbers = torch.from_numpy(np.random.default_rng(1).integers(1, 60, size=40_000))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(places["dense"])
    whole: dict[str, Any] = {"text": path, "dataset": None, "dataset_config": None, "windows": None}
    calibrated = Source(**whole, window_length=512).read(tokenizer)  # 64 of 78
    held_out = HealingConfig().held_out
    watched = Source(**whole, window_length=256).to_heal(tokenizer, held_out=held_out)[-held_out:]
    assert len(calibrated) == 64
    seen = {tuple(half.tolist()) for half in calibrated.view(-1, 256)}
    assert seen.isdisjoint(tuple(window.tolist()) for window in watched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scope", "layer"], "`scope` must be one of model, block"),
        (["--steps", "0", "--natural-steps", "0", "--no-closed-form"], "nothing would be healed"),
        (["--scope", "block", "--kl", "1"], "no loss reaches the output"),
        (["--windows", "500"], "--windows must be between 1 and"),
        (["--teacher", "nowhere/at/all"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, places: dict[str, Path], tmp_path: Path) -> None:
    done = cur("heal", places["small"], "--text", places["text.txt"], "--out", tmp_path / "out", *QUICK, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_not_a_student(places: dict[str, Path], tmp_path: Path) -> None:
    done = cur("heal", places["dense"], "--text", places["text.txt"], "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 2
    assert "is not a compressed checkpoint" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("kind", "target"), [("classifier", "q_proj"), ("token classifier", "query")])
def test_what_predicts_no_token_is_healed_by_blocks(kind: str, target: str, tmp_path: Path) -> None:
    source = write(kind, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = cur(
        "compress", source, "--text", text, "--out", tmp_path / "small", "--windows", 4, "--window-length", 12,
        "--layers", 2, "--rank", 4, "--targets", target,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    heal = ["heal", tmp_path / "small", "--text", text, *QUICK]
    done = cur(*heal, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "does not make; heal block by block (`scope='block'`, --scope block)" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "source", "text.txt"]
    for way in (("--scope", "block"), ("--low-memory",)):
        out = tmp_path / way[-1].strip("-")
        done = cur(*heal, *way, "--out", out, "--json")
        assert done.exit_code == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["curve"][-1]["loss"] < report["before"]["loss"]
        names = [json.loads((place / "config.json").read_text())["architectures"] for place in (source, out)]
        assert names[0] == names[1]
