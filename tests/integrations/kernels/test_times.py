from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from cur.integrations.kernels import times

MEASURED = times.measured
CASE = {"a": 1.0, "b": 2.0}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "kernels.json"
    monkeypatch.setattr(times, "place", lambda: path)
    return path


def test_times_are_kept_beside_those_of_other_cases_and_machines(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times.read() == {}
    times.write("one", CASE)
    times.write("two", CASE)
    assert times.read() == {"one": CASE, "two": CASE}
    monkeypatch.setattr(times, "_machine", lambda: "another")
    assert times.read() == {}
    times.write("three", CASE)
    assert times.read() == {"three": CASE}
    monkeypatch.undo()
    assert len(json.loads(file.read_text())) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "\x00\xff", '{"here": 5}', '{"here": {"one": 3}}', '{"here": {"one": {"a": "b"}}}']
)
def test_a_file_that_is_broken_is_as_none(file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_machine", lambda: "here")
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    assert times.read() == {}
    times.write("two", CASE)
    assert times.read() == {"two": CASE}


def test_a_place_that_cannot_be_written_to_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(times, "place", lambda: tmp_path / "file" / "cur" / "kernels.json")
    times.write("one", CASE)
    assert times.read() == {}
    monkeypatch.setattr(times, "place", lambda: None)
    times.write("one", CASE)
    assert times.read() == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_only_be_read(file: Path) -> None:
    file.parent.mkdir()
    file.parent.chmod(0o500)
    times.write("one", CASE)
    assert times.read() == {}


def test_the_file_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert times.place() == tmp_path / "cur" / "kernels.json"


def test_copies_are_timed_in_turns_and_what_is_hopeless_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    calls: list[str] = []

    def run(name: str, seconds: float):
        def product(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            now[0] += seconds
            return x

        return product

    runs = {"fast": [run("f1", 1.0), run("f2", 3.0)], "slow": [run("s", 2.0)], "hopeless": [run("h", 9.0)]}
    found = MEASURED(runs, torch.ones(1, 2))
    assert found == {"fast": 2.0, "slow": 2.0, "hopeless": 9.0}
    assert calls.count("h") == 4
    assert calls.count("f1") - 4 == calls.count("f2") > 1
    assert calls[-3:] == ["f1", "f2", "s"]
