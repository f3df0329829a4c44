from __future__ import annotations

import errno
import filecmp
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cur.integrations import BudgetConfig, CompressConfig, batches
from cur.integrations.blockwise import JournalError, StreamedModel, compress_blockwise, load_streamed
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.journal import Journal

CONFIG = CompressConfig(layers=2, rank=4, batch_size=2)

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from cur.integrations import CompressConfig
from cur.integrations.blockwise import compress_blockwise, load_streamed

directory, seed = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
windows = torch.randint(3, 101, (6, 24), generator=torch.Generator().manual_seed(7))

def run(name):
    config = CompressConfig(layers=2, rank=4, batch_size=2)
    compress_blockwise(load_streamed(directory), windows, directory.parent / name, config, max_shard_size="20kB")

start = time.perf_counter()
run("at-once")
seconds = time.perf_counter() - start
draw, finished = random.Random(seed), 0
for _ in range(8):
    child = os.fork()
    if child == 0:
        run("in-pieces")
        os._exit(0)
    time.sleep(draw.uniform(0.1, 0.9) * seconds)
    os.kill(child, signal.SIGKILL)
    finished += os.waitpid(child, 0)[1] == 0
    if finished:
        break
    assert not (directory.parent / "in-pieces").exists()
if not finished:
    run("in-pieces")
"""


@pytest.fixture
def directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def compressed(directory: Path, windows: torch.Tensor, name: str = "out", *, stop: int | None = None) -> Path:
    """Compress, or stop as if by Ctrl-C when that many blocks are measured."""
    loads = 0

    def watch(stage: str, done: int, total: int | None) -> None:
        nonlocal loads
        if stop is not None and (stage != "calibrate" or done >= 3 * stop + 1):
            raise KeyboardInterrupt

    compress_blockwise(load_streamed(directory), windows, directory.parent / name, CONFIG, progress=watch)
    return directory.parent / name


def same_weights(one: Path, other: Path) -> None:
    for file in one.glob("*.safetensors*"):
        assert filecmp.cmp(file, other / file.name, shallow=False)


@pytest.mark.parametrize("seed", [0])
def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_files(directory: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((directory.parent / "at-once").glob("*.safetensors"))) > 3
    same_weights(directory.parent / "at-once", directory.parent / "in-pieces")
    assert {path.name for path in directory.parent.iterdir()} == {"llama", "at-once", "in-pieces"}


def test_finished_blocks_are_not_measured_again(
    directory: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compressed(directory, windows, "at-once")
    with pytest.raises(KeyboardInterrupt):
        compressed(directory, windows, stop=3)
    loaded: list[int] = []
    original = StreamedModel.load_block
    monkeypatch.setattr(StreamedModel, "load_block", lambda self, index: (loaded.append(index), original(self, index)))
    out = compressed(directory, windows)
    assert loaded[:2] == [3, 4]
    same_weights(expected, out)


@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_corrected_layers_go_on_from_those_that_were_stored(
    directory: Path, windows: torch.Tensor, keep: float
) -> None:
    config = BudgetConfig(keep=keep, gradients=False, own_text=0, batch_size=2)

    def run(name: str, progress: Callable[[str, int, int | None], object] | None = None) -> Path:
        compress_blockwise(load_streamed(directory), windows, directory.parent / name, config, progress=progress)
        return directory.parent / name

    expected = run("at-once")
    stages: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int | None) -> None:
        stages.append((stage, done))
        if stage == "decompose" and total is not None and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out", stop)
    files = sorted((directory.parent / ".out.run" / "factors").iterdir())
    assert 0 < len(files) < 5
    written = [file.stat().st_mtime_ns for file in files]
    seen: list[list[int]] = []

    def watch(stage: str, done: int, total: int | None) -> None:
        if stage == "write" and done == 0:
            seen.append([file.stat().st_mtime_ns for file in files])

    same_weights(expected, run("out", watch))
    assert seen == [written]


@pytest.mark.parametrize("what", ["statistics", "states"])
def test_a_damaged_file_of_the_run_is_made_again(directory: Path, windows: torch.Tensor, what: str) -> None:
    expected = compressed(directory, windows, "at-once")
    with pytest.raises(KeyboardInterrupt):
        compressed(directory, windows, stop=3)
    files = sorted((directory.parent / ".out.run" / what).rglob("*.safetensors"))
    data = bytearray(files[-1].read_bytes())
    data[-3] ^= 1
    files[-1].write_bytes(data)
    same_weights(expected, compressed(directory, windows))


def test_two_runs_on_one_directory(directory: Path, windows: torch.Tensor) -> None:
    journal = Journal(directory.parent / "out")
    journal.begin({})
    with pytest.raises(JournalError, match="another run is writing to the same directory"):
        compressed(directory, windows)
    journal.remove()
    compressed(directory, windows)


def test_a_run_with_other_inputs_is_not_continued(directory: Path, windows: torch.Tensor) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(directory, windows, stop=1)
    with pytest.raises(JournalError, match="unfinished run with another calibration text"):
        compressed(directory, windows.flip(0))
    with pytest.raises(JournalError, match="unfinished run with another configuration"):
        compress_blockwise(load_streamed(directory), windows, directory.parent / "out", CompressConfig(layers=1))
    # The hidden states that lie there are those of passes of two windows.
    given = batches(windows, batch_size=3)
    with pytest.raises(JournalError, match="unfinished run with another number of windows in a pass"):
        compress_blockwise(load_streamed(directory), given, directory.parent / "out", CONFIG)
    file = sorted(directory.glob("model-*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(JournalError, match=r"unfinished run with another checkpoint.*delete .*\.out\.run"):
        compressed(directory, windows)


def test_a_full_disk_loses_nothing(directory: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compressed(directory, windows, "at-once")
    original, written = HiddenStates.write, 0

    def write(self: HiddenStates, *args: object) -> None:
        nonlocal written
        written += 1
        if written > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "write", write)
        with pytest.raises(OSError, match=r"no space left.*start the same command again: it goes on"):
            compressed(directory, windows)
    assert not (directory.parent / "out").exists()
    same_weights(expected, compressed(directory, windows))
