from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cur.integrations.files.directory import new_directory

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by fork")


def writing(target: Path) -> int:
    """Start a process that is in the midst of writing a directory; return its number."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with new_directory(target) as scratch:
            (scratch / "file").write_text("half")
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return child


def killed(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def partial(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.endswith(".partial"))


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model [1]"
    killed(writing(target))
    killed(writing(tmp_path / "other"))
    assert len(partial(tmp_path)) == 2
    with new_directory(target) as scratch:
        assert partial(tmp_path) == sorted([scratch.name, partial(tmp_path)[-1]])
        (scratch / "file").write_text("whole")
    assert [name.startswith(".other.") for name in partial(tmp_path)] == [True]
    assert (target / "file").read_text() == "whole"


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    child = writing(target)
    try:
        with new_directory(target):
            assert len(partial(tmp_path)) == 2
        assert len(partial(tmp_path)) == 1
    finally:
        killed(child)


def test_what_was_to_be_replaced_is_removed_when_its_successor_is_there(tmp_path: Path) -> None:
    old = tmp_path / ".model.abc.old"
    old.mkdir()
    with new_directory(tmp_path / "model"):
        assert old.exists(), "the only copy there is"
    with new_directory(tmp_path / "model", overwrite=True):
        assert not old.exists()
