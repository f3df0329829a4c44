from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cur.integrations.files.directory import check_target, new_directory

WRITING = """
import sys, time
from cur.integrations.files.directory import new_directory

with new_directory(sys.argv[1]) as scratch:
    (scratch / "file").write_text("half")
    print("x", flush=True)
    time.sleep(60)
"""


def writing(target: Path) -> subprocess.Popen[str]:
    """Start a process that is in the midst of writing a directory."""
    # Not by os.fork: other tests in this process may have started threads that do not survive it.
    child = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "x\n"
    return child


def killed(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


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


def test_what_a_link_stands_for_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, place in (("link", "there"), ("dangling", "new")):
        (tmp_path / name).symlink_to(tmp_path / place)
        with new_directory(tmp_path / name) as scratch:
            (scratch / "file").write_text("whole")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / place / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_places_where_nothing_can_be_written_are_told_of_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"lies below .*file, which is a file"):
        check_target(tmp_path / "file" / "inside" / "model")
    check_target(tmp_path / "new" / "parents" / "model")
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may write everywhere
    with pytest.raises(PermissionError, match="may not be written to; name another path"):
        check_target(tmp_path / "model")


@pytest.mark.parametrize("place", ["dense", "."])
def test_the_dense_model_is_not_replaced(place: str, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "file").write_text("weights")
    with pytest.raises(FileExistsError, match="holds the dense model, which would be gone"):
        check_target(tmp_path / place, overwrite=True, needed=dense)
    check_target(tmp_path / "dense" / "small", overwrite=True, needed=dense)
    check_target(tmp_path / "small", overwrite=True, needed="hub/id")


def written_twice(target: Path) -> None:
    """Finish one directory while another of the same name is being written."""
    with new_directory(target) as late:
        (late / "file").write_text("late")
        with new_directory(target) as first:
            (first / "file").write_text("first")


def test_what_another_run_wrote_in_the_meantime_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(FileExistsError, match="was written by another run in the meantime, and stays as it is"):
        written_twice(target)
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with new_directory(target, overwrite=True) as later:
        (later / "file").write_text("later")
    assert (target / "file").read_text() == "later"
