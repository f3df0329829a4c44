from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cur.integrations import CompressConfig
from cur.integrations.blockwise import compress_blockwise, load_skeleton
from cur.integrations.precision import Precision

RANK = """
import os, signal, sys
import torch
from cur.integrations import CompressConfig
from cur.integrations.blockwise import compress_blockwise, load_skeleton

directory, out, victim, moment = sys.argv[1:]
torch.set_num_threads(1)
windows = torch.randint(3, 101, (6, 24), generator=torch.Generator().manual_seed(7))

def watch(stage, done, total):
    if os.environ["RANK"] == victim and (stage, done) == ("calibrate", int(moment)):
        os.kill(os.getpid(), signal.SIGKILL)

config = CompressConfig(layers=3, rank=4, batch_size=1)
report = compress_blockwise(load_skeleton(directory), windows, out, config, precision="float32", max_shard_size="20kB",
                            progress=watch)
print("chosen", [layer.rows for layer in report.layers])
"""


def started(directory: Path, out: Path, *, victim: int = -1, moment: int = 0) -> subprocess.CompletedProcess[str]:
    """Start two processes with torchrun; one of them may kill itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = directory.parent / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    arguments: list[Any] = [script, directory, out, victim, moment]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_two_processes_do_what_one_does(checkpoint: Callable[[str], Path], windows: torch.Tensor) -> None:
    directory = checkpoint("llama")
    one, two = directory.parent / "one", directory.parent / "two"
    config = CompressConfig(layers=3, rank=4, batch_size=1)
    report = compress_blockwise(load_skeleton(directory), windows, one, config, max_shard_size="20kB")

    # The first start loses a process in the midst of calibration, the second goes on and finishes.
    lost = started(directory, two, victim=1, moment=18)
    assert lost.returncode != 0
    assert "another process of this run has ended" in lost.stderr
    assert "start the same command again" in " ".join(lost.stderr.split())
    assert not two.exists()
    done = started(directory, two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str([layer.rows for layer in report.layers])) == 2
    for file in one.glob("*.safetensors*"):
        assert filecmp.cmp(file, two / file.name, shallow=False)
    plans = [json.loads((place / "plan.json").read_text())["angular"] for place in (one, two)]
    assert plans[0] == pytest.approx(plans[1], rel=1e-12)
    assert {path.name for path in directory.parent.iterdir()} == {"llama", "one", "two", "rank.py"}


def test_the_command_in_two_processes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory, text = checkpoint("llama"), tmp_path / "text.txt"
    text.write_text(" ".join(str(number * 7 % 101) for number in range(300)))
    options = ["--layers", "2", "--rank", "4", "--windows", "8", "--window-length", "16", "--text", str(text), "--json"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    found = []
    for name, start in (("one", []), ("two", several)):
        command = [sys.executable, *start, "-m", "cur", "compress", str(directory), "--low-memory", *options]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        # One report, from the process that leads.
        found.append(json.loads(done.stdout))
    indices = [[(layer["name"], layer["rows"], layer["columns"]) for layer in report["layers"]] for report in found]
    assert len(indices[0]) == 6
    assert indices[0] == indices[1]
    assert filecmp.cmp(tmp_path / "one" / "cur_model.safetensors", tmp_path / "two" / "cur_model.safetensors", False)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_sums_are_added_up_on_the_device(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cur.integrations.blockwise import team as module

    said: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module.torch.cuda, "set_device", lambda place: said.append(("device", str(place))))
    monkeypatch.setattr(module.dist, "init_process_group", lambda name, **_: said.append(("backend", name)))
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(module.dist, "all_reduce", lambda total: total.mul_(2))
    own = torch.arange(3.0, dtype=torch.float64)
    with module.Team().joined(torch.device(device)) as team:
        assert str(team.device) == device
        team.device = torch.device("cpu")  # the sums themselves need a device that is there
        assert torch.equal(team._sum(own), 2 * own)
    assert torch.equal(own, torch.arange(3.0, dtype=torch.float64))
    assert said == [*([("device", device)] if device != "cpu" else []), ("backend", backend)]


def test_more_processes_than_batches(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cur.integrations.blockwise.calibrate import Calibration
    from cur.integrations.blockwise.journal import Journal
    from cur.integrations.blockwise.team import Team

    monkeypatch.setenv("WORLD_SIZE", "3")
    directory = checkpoint("llama")
    with pytest.raises(ValueError, match=r"3 processes share 2 batches.*lower `batch_size`"):
        Calibration(
            load_skeleton(directory),
            [windows[:3], windows[3:]],
            [],
            journal=Journal(directory.parent / "out"),
            team=Team(),
            full=False,
            precision=Precision.on(torch.device("cpu"), torch.float32, "float32"),
        )
