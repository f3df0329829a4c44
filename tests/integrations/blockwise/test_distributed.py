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

from cur.integrations import CompressConfig, compress, load_model, perplexity, save
from cur.integrations.blockwise import compress_blockwise, load_streamed, perplexity_blockwise
from cur.integrations.model.precision import Precision

RANK = """
import os, signal, sys
import torch
from cur.integrations import CompressConfig
from cur.integrations.blockwise import compress_blockwise, load_streamed

directory, out, victim, moment = sys.argv[1:]
torch.set_num_threads(1)
windows = torch.randint(3, 101, (6, 24), generator=torch.Generator().manual_seed(7))

def watch(stage, done, total):
    if os.environ["RANK"] == victim and (stage, done) == ("calibrate", int(moment)):
        os.kill(os.getpid(), signal.SIGKILL)

config = CompressConfig(layers=3, rank=4, batch_size=1)
report = compress_blockwise(load_streamed(directory), windows, out, config, precision="float32", max_shard_size="20kB",
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
    report = compress_blockwise(load_streamed(directory), windows, one, config, max_shard_size="20kB")

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
    from cur.integrations.blockwise import distributed as module

    said: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module.torch.cuda, "set_device", lambda place: said.append(("device", str(place))))
    monkeypatch.setattr(module.dist, "init_process_group", lambda name, **_: said.append(("backend", name)))
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(module.dist, "all_reduce", lambda total: total.mul_(2))
    own = torch.arange(3.0, dtype=torch.float64)
    with module.ProcessGroup().joined(torch.device(device)) as group:
        assert str(group.device) == device
        group.device = torch.device("cpu")  # the sums themselves need a device that is there
        assert torch.equal(group._sum(own), 2 * own)
    assert torch.equal(own, torch.arange(3.0, dtype=torch.float64))
    assert said == [*([("device", device)] if device != "cpu" else []), ("backend", backend)]


def test_more_processes_than_batches(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cur.integrations.blockwise.calibrate import Calibration
    from cur.integrations.blockwise.distributed import ProcessGroup
    from cur.integrations.blockwise.journal import Journal

    monkeypatch.setenv("WORLD_SIZE", "3")
    directory = checkpoint("llama")
    with pytest.raises(ValueError, match=r"3 processes share 2 batches.*lower `batch_size`"):
        Calibration(
            load_streamed(directory),
            [windows[:3], windows[3:]],
            [],
            journal=Journal(directory.parent / "out"),
            group=ProcessGroup(),
            full=False,
            precision=Precision.on(torch.device("cpu"), torch.float32, "float32"),
        )


AGREED = """
import os, sys
import torch
from cur.integrations import CompressConfig
from cur.integrations.model import precision
from cur.integrations.blockwise import ProcessGroup, compress_blockwise, load_streamed

directory, out = sys.argv[1:]
torch.set_num_threads(1)
first = os.environ["RANK"] == "0"
precision.slowdown = lambda half, threads=None: 0.5 if first else 20.0
windows = torch.randint(3, 101, (4, 12), generator=torch.Generator().manual_seed(7))
config = CompressConfig(layers=2, rank=4)

def tell(line):
    os.write(1, f"{line}\\n".encode())  # whole, whatever the other process writes meanwhile

def run(name, **options):
    said = []
    report = compress_blockwise(load_streamed(directory), windows, f"{out}/{name}", config, announce=said.append,
                                **options)
    tell(f"{name} {report.precision} {said}")

with ProcessGroup().joined():
    run("auto")
    run("named", precision="bfloat16")
    precision._is_able = lambda device: first
    try:
        run("unable", precision="bfloat16")
    except ValueError as error:
        tell(f"refused {error}")
"""


def test_processes_on_different_processors_agree_on_a_precision(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, script = checkpoint("llama"), tmp_path / "agreed.py"
    script.write_text(AGREED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [*command, str(script), str(directory), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(filter(None, done.stdout.splitlines()))
    assert [line.partition("[")[0] for line in lines[:4]] == ["auto float32 "] * 2 + ["named bfloat16 "] * 2
    told = [line for line in lines if "The processes run on different processors" in line]
    assert len(told) == 1  # by the process that leads
    assert "fastest are 1 in bfloat16, 1 in float32" in told[0]
    assert sum("products in bfloat16" in line for line in lines[2:4]) == 1
    assert lines[4:] == ["refused `precision` 'bfloat16' is not to be had on the device 'cpu'; ask for float32"] * 2
    assert not (tmp_path / "unable").exists()


def test_a_run_goes_on_in_the_precision_in_which_it_was_begun(
    checkpoint: Callable[[str], Path], windows: torch.Tensor
) -> None:
    directory = checkpoint("llama")
    out, config = directory.parent / "out", CompressConfig(layers=2, rank=4)

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "decompose":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_blockwise(load_streamed(directory), windows, out, config, precision="bfloat16", progress=stop)
    with pytest.raises(ValueError, match=r"`precision` must be bfloat16 or auto, got 'float32'"):
        compress_blockwise(load_streamed(directory), windows, out, config, precision="float32")
    # What is faster here would be float32.
    assert compress_blockwise(load_streamed(directory), windows, out, config).precision == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_block_by_block_as_in_memory_in_every_precision(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path], windows: torch.Tensor
) -> None:
    directory, config = checkpoint("llama"), CompressConfig(layers=2, rank=4)
    whole, parts = directory.parent / "whole", directory.parent / "parts"
    loaded = load_model(directory, dtype=dtype)
    report = compress(loaded.model, windows, config, precision=name)
    save(loaded.model, loaded.tokenizer, whole, report=report)
    streamed = load_streamed(directory, dtype=dtype)
    compress_blockwise(streamed, windows, parts, config, precision=name)
    assert filecmp.cmp(whole / "cur_model.safetensors", parts / "cur_model.safetensors", shallow=False)
    values = [
        perplexity(loaded.model, windows, precision=name).value,
        perplexity_blockwise(load_streamed(parts, dtype=dtype), windows, precision=name).value,
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
