from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cur.cli.app import app


@pytest.fixture
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(str(number * 7 % 101) for number in range(600)))
    return file


def command(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout if code == 0 else " ".join(result.stderr.split())


def test_compress_and_evaluate(directory: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--layers", "1", "--rank", "4", "--text", text, "--windows", "4", "--window-length", "16", "--json"]
    whole = json.loads(command("compress", directory, "--out", directory.parent / "whole", *options))
    # A machine on which nothing fits: the choice is made by itself.
    monkeypatch.setattr("cur.integrations.blockwise.memory.available_memory", lambda: 1000)
    parts = json.loads(command("compress", directory, "--out", directory.parent / "parts", *options))
    assert "write" in parts["seconds"]
    assert "write" not in whole["seconds"]
    assert [layer["rows"] for layer in parts["layers"]] == [layer["rows"] for layer in whole["layers"]]
    weights = [(directory.parent / name / "cur_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]

    scored = ["--text", text, "--windows", "4", "--window-length", "16", "--json"]
    values = [
        json.loads(command("evaluate", directory.parent / "parts", how, *scored))["value"]
        for how in ("--in-memory", "--low-memory")
    ]
    assert values[0] == values[1]


def test_a_plan_statistics_and_held_out_text(directory: Path, text: Path) -> None:
    place = directory.parent
    given = [directory, "--text", text, "--windows", "4", "--window-length", "16", "--stats", place / "stats"]
    command("plan", *given, "--layers", "1", "--rank", "4", "--out", place / "plan.json")
    rest = ["--plan", place / "plan.json", "--json"]
    reports = [
        json.loads(command("compress", *given, *rest, "--out", place / how.strip("-"), how))
        for how in ("--in-memory", "--low-memory")
    ]
    assert [layer["rows"] for layer in reports[0]["layers"]] == [layer["rows"] for layer in reports[1]["layers"]]
    weights = [(place / name / "cur_model.safetensors").read_bytes() for name in ("in-memory", "low-memory")]
    assert weights[0] == weights[1]


def test_what_does_not_go_together(directory: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = directory.parent / "out"
    said = command("compress", "--low-memory", "--out", out, code=2)
    assert "are read; name a directory or a hub id as MODEL" in said
    said = command("compress", directory, "--low-memory", "--out", out, "--text", text, "--keep", "0.8", code=2)
    assert "of a budget need the whole model in memory" in said or "too short" in said
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no such device" in command("compress", directory, "--device", "cuda", "--out", out, code=2)
    assert "must be cpu, cuda or the like" in command("evaluate", directory, "--device", "nowhere", code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave out --in-memory" in command("compress", directory, "--in-memory", "--out", out, code=2)
    assert "runs in one process" in command("evaluate", directory, code=2)
