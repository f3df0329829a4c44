"""Damaged files of a checkpoint: one sentence that names the file, in every command, before anything is built."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cur.cli.app import app
from cur.integrations import load_model
from cur.integrations.blockwise import load_streamed
from cur.integrations.blockwise.journal import Journal
from cur.integrations.files.configuration import check_config

READ = ["--windows", 2, "--window-length", 16]


def cur(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model, its compressed checkpoint, and text."""
    place = tmp_path_factory.mktemp("made")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, 100)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).save_pretrained(place / "dense")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        place / "dense"
    )
    (place / "text.txt").write_text(" ".join(f"w{4 + index % 96}" for index in range(100)))
    out = ["--out", place / "small"]
    done = cur("compress", place / "dense", "--text", place / "text.txt", *READ, "--layers", 1, "--rank", 4, *out)
    assert done.exit_code == 0, done.stderr
    return place


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    """A copy of the compressed checkpoint, to be damaged."""
    place = tmp_path / "small"
    place.mkdir()
    for file in (made / "small").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def commands(small: Path, made: Path, out: Path) -> dict[str, list[object]]:
    text = ["--text", made / "text.txt"]
    return {
        "inspect": ["inspect", small],
        "against": ["inspect", made / "small", "--against", small],
        "export": ["export", small, "--out", out],
        "convert": ["convert", small, "--out", out],
        "quantize": ["quantize", small, *text, *READ, "--out", out],
        "heal": ["heal", small, "--teacher", made / "dense", *text, "--out", out],
        "evaluate": ["evaluate", small, *text, *READ],
        "block by block": ["evaluate", small, *text, *READ, "--low-memory"],
        "teacher": ["heal", made / "small", "--teacher", small, *text, "--out", out],
        "compress": ["compress", small, *text, *READ, "--layers", 1, "--rank", 4, "--out", out],
        "plan": ["plan", small, *text, *READ, "--layers", 1, "--rank", 4, "--out", out],
    }


def refused(done: Any, file: Path | str) -> None:
    assert done.exit_code == 2, (done.exit_code, done.stdout, done.stderr, done.exception)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert str(file) in lines[0]
    assert "again" in lines[0] or "delete" in lines[0]
    assert done.stdout == ""


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], str]:
    def damage(small: Path) -> str:
        path = small / "config.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return "config.json"

    return damage


def written(name: str, words: bytes) -> Callable[[Path], str]:
    def damage(small: Path) -> str:
        (small / name).write_bytes(words)
        return name

    return damage


def flipped(small: Path) -> str:
    file = small / "cur_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return file.name


def cut(small: Path, end: int) -> str:
    file = small / "cur_model.safetensors"
    file.write_bytes(file.read_bytes()[:end])
    return file.name


DAMAGES: dict[str, Callable[[Path], str]] = {
    "a list": written("config.json", b"[1, 2]"),
    "a number": written("config.json", b"7"),
    "noise": written("config.json", b"\xff\xfe\x00"),
    "nothing": written("config.json", b""),
    "dtype": config(lambda c: c.update(dtype=7)),
    "a dtype that is none": config(lambda c: c.update(dtype="nn")),
    "weights": config(lambda c: c.update(transformers_weights=["a"])),
    "architectures": config(lambda c: c.update(architectures="Llama")),
    "method": config(lambda c: c.update(quantization_config="cur")),
    "method, a list": config(lambda c: c.update(quantization_config=[1])),
    "no modules": config(lambda c: c["quantization_config"].update(modules={})),
    "modules": config(lambda c: c["quantization_config"].update(modules=[])),
    "name of the weights": config(lambda c: c["quantization_config"].update(weights=3)),
    "weights elsewhere": config(lambda c: c["quantization_config"].update(weights="../a.safetensors")),
    "a million layers": config(lambda c: c.update(num_hidden_layers=1_000_000)),
    "layers": config(lambda c: c.update(num_hidden_layers="many")),
    "fewer than no layers": config(lambda c: c.update(num_hidden_layers=-1)),
    "an end that is missing": lambda small: cut(small, -7),
    "almost everything missing": lambda small: cut(small, 4),
    "a flipped bit": flipped,
    "account": written("account.json", b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_refuses_what_is_damaged(damage: str, small: Path, made: Path, tmp_path: Path) -> None:
    name = DAMAGES[damage](small)
    before = sorted(tmp_path.iterdir())
    began = time.monotonic()
    for command, words in commands(small, made, tmp_path / "out").items():
        done = cur(*words)
        refused(done, name)
        assert "config.json" not in done.stderr or "Traceback" not in done.stderr, command
    assert time.monotonic() - began < 60, "a million layers took hours to build"
    assert sorted(tmp_path.iterdir()) == before
    for load in (load_model, load_streamed):
        with pytest.raises(ValueError, match=name):
            load(small)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_tokenizer_that_is_damaged(name: str, small: Path, made: Path, tmp_path: Path) -> None:
    for words in (b"\xff{", b"[]"):
        (small / name).write_bytes(words)
        for command, given in commands(small, made, tmp_path / "out").items():
            if command not in ("inspect", "against", "heal"):  # which do not read it: the teacher's is taken
                refused(cur(*given), small / name)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


SIZES: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 10**7},
    "vocabulary": {"vocab_size": 10**9},
    "feed-forward": {"intermediate_size": 10**9},
    "negative": {"hidden_size": -4},
    "a text": {"hidden_size": "32"},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 7},
    "more layers": {"num_hidden_layers": 5},
    "activation": {"hidden_act": "nope"},
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_are_compared_with_the_weights_before_memory_is_taken(what: str, made: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(made / "dense", dense)
    config(lambda c: c.update(SIZES[what]))(dense)
    text, out = ["--text", made / "text.txt"], ["--out", tmp_path / "out"]
    for words in (
        ["compress", dense, *text, *READ, "--layers", 1, "--rank", 4, *out],
        ["compress", dense, *text, *READ, "--layers", 1, "--rank", 4, "--low-memory", *out],
        ["plan", dense, *text, *READ, "--layers", 1, "--rank", 4, *out],
        ["evaluate", dense, *text, *READ],
        ["heal", made / "small", "--teacher", dense, *text, *out],
    ):
        done = cur(*words)
        assert done.exit_code == 2, (words, done.exception)
        lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1
        assert str(dense) in lines[0]
        assert [path.name for path in tmp_path.iterdir()] == ["dense"], words


def test_weights_of_other_quantizers(made: Path, tmp_path: Path) -> None:
    """Block by block they would be taken as they stand, without their scales."""
    dense = tmp_path / "dense"
    shutil.copytree(made / "dense", dense)
    cases = (("fp8", True, "is not undone block by block"), ("nope", False, "transformers does not know"))
    for method, low, said in cases:
        config(lambda c, m=method: c.update(quantization_config={"quant_method": m}))(dense)
        for words in (["evaluate", dense], ["compress", dense, "--layers", 1, "--rank", 4, "--out", tmp_path / "out"]):
            done = cur(*words, "--text", made / "text.txt", *READ, *(["--low-memory"] if low else []))
            assert done.exit_code == 2, done.exception
            assert f"quantized by '{method}', which {said}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


RECORDS = {
    "plan.json": ("inspect", "heal without a teacher", "carry out"),
    "report.json": ("inspect", "convert"),
}


@pytest.mark.parametrize("words", [b"\xff\xfe", b"{", b"[]", b"{}"])
@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_damaged(name: str, words: bytes, small: Path, made: Path, tmp_path: Path) -> None:
    (small / name).write_bytes(words)
    text = ["--text", made / "text.txt"]
    known = commands(small, made, tmp_path / "out")
    known["heal without a teacher"] = ["heal", small, *text, "--out", tmp_path / "out"]
    known["carry out"] = ["compress", made / "dense", "--plan", small / name, *text, "--out", tmp_path / "out"]
    for command in RECORDS[name]:
        refused(cur(*known[command]), small / name)
    assert not (tmp_path / "out").exists()


def test_a_state_and_a_journal_that_are_damaged(small: Path, made: Path, tmp_path: Path) -> None:
    heal = ["heal", small, "--teacher", made / "dense", "--text", made / "text.txt", "--steps", 1]
    heal += ["--window-length", 16, "--held-out", 1, "--batch-size", 1, "--out", tmp_path / "out"]
    state = tmp_path / "out.healing" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"\xff" * 100)
    done = cur(*heal)
    assert done.exit_code == 2
    assert f"{state} is damaged" in done.stderr
    journal = tmp_path / ".out.run" / "inputs.json"
    journal.parent.mkdir()
    journal.write_bytes(b"\xff\xfe")
    assert Journal(tmp_path / "out").begun_with("precision") is None  # what cannot be read was not finished


def test_configurations_that_are_sound(made: Path, tmp_path: Path) -> None:
    assert check_config(made / "dense")["num_hidden_layers"] == 3
    for sound in (
        {"dtype": None, "num_experts": 128, "vision_config": {"depth": 2, "num_layers": [1, 2]}},
        {"torch_dtype": "bfloat16", "quantization_config": None},
        {"num_hidden_layers": 200},  # blocks may share their weights
    ):
        (tmp_path / "config.json").write_text(json.dumps(sound))
        check_config(tmp_path)
