"""Measure the memory and the time that a model larger than memory takes.

    python benchmarks/scale.py DIRECTORY                # needs 40 GB of disk there, and an hour on one core
    python benchmarks/scale.py DIRECTORY --part depth   # depth, width, limit, eight, processes
    python benchmarks/scale.py DIRECTORY --part eight --processes 2

Checkpoints of random weights (`benchmarks/shapes.py`) are compressed block by block at the setting of "CURing Large
Models": 10 blocks by angular distance, rank 256, query, key and gate projections, from randomised subspaces. Every run
is a process of its own, whose peak is what the system says (``VmHWM``); the part ``limit`` runs with an address space
of 3 GB, beyond which the system gives no memory. Parts ``limit`` and ``eight`` that were ended in any way go on when
they are started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import environment
from shapes import LARGE, SHAPES, block_parameters, matrices, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
LIMIT = 3 * 10**9
BASE = {"hidden": 1024, "intermediate": 3584, "depth": 8, "heads": 8, "kv": 2, "vocabulary": 4096}
DEPTHS = (8, 16, 32)
WIDTHS = (512, 1024, 2048)
DEVICE = 400e12
"""Operations per second of one accelerator, for the extrapolation: taken, not measured; less than half of what H100
promise in bfloat16."""
HELD = 80
"""Gigabytes of memory of such an accelerator."""
SHOWN_EVERY = 20.0


def child(asked: dict[str, Any]) -> None:
    """Compress a checkpoint, in a process of its own, and print what it took."""
    import torch

    from cur.integrations import CompressConfig
    from cur.integrations.blockwise import ProcessGroup, compress_blockwise, load_streamed

    torch.set_num_threads(asked["threads"])
    begin = time.perf_counter()
    streamed = load_streamed(asked["directory"], dtype=torch.bfloat16)
    opened = time.perf_counter() - begin
    reading = [0, 0.0]
    load = streamed.load_block

    def timed(index: int) -> None:
        start = time.perf_counter()
        load(index)
        reading[0] += 2 * asked["block"]
        reading[1] += time.perf_counter() - start

    streamed.load_block = timed
    windows = torch.randint(
        asked["vocabulary"], (asked["windows"], asked["length"]), generator=torch.Generator().manual_seed(0)
    )
    # For key projections, of 1024 rows, the default is a whole SVD, a third of all the time.
    config = CompressConfig(
        layers=asked["layers"], rank=asked["rank"], subspace="randomised", batch_size=asked["batch"]
    )
    watch = shown(begin) if ProcessGroup().leads else None
    report = compress_blockwise(streamed, windows, asked["out"], config, overwrite=True, progress=watch)
    if ProcessGroup().leads:
        lines = Path("/proc/self/status").read_text().splitlines()
        status = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        seconds = {"open": opened, **report.seconds, "factorizations alone": sum(one.seconds for one in report.layers)}
        chosen = json.dumps([[one.name, one.rows, one.columns] for one in report.layers])
        result = {
            "threads": asked["threads"],
            "precision": report.precision,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "total": round(sum(report.seconds.values()) + opened, 1),
            "read, MB/s": round(1e-6 * reading[0] / reading[1], 1),
            "peak resident, bytes": 1024 * int(status["VmHWM"]),
            "peak address space, bytes": 1024 * int(status["VmPeak"]),
            "parameters": report.before.parameters,
            "after": report.after.parameters,
            "blocks": sorted({int(entry.name.split(".")[2]) for entry in report.plan.entries}),
            "indices, SHA-256": hashlib.sha256(chosen.encode()).hexdigest(),
        }
        print("RESULT " + json.dumps(result))


def shown(begin: float) -> Callable[[str, int, int | None], None]:
    """Return a callback that prints a line now and then, and when a stage begins."""
    latest = ["", 0.0]

    def show(stage: str, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if stage != latest[0] or now - latest[1] > SHOWN_EVERY:
            latest[:] = stage, now
            print(f"{now - begin:7.0f} s  {stage} {done}/{total}", file=sys.stderr, flush=True)

    return show


def run(
    directory: Path,
    shape: dict[str, int],
    *,
    limit: int | None = None,
    processes: int = 1,
    anew: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Start `child` and return what it printed; with `anew`, whatever an earlier run left is thrown away."""
    out = directory.with_name(directory.name + "-out")
    begun = out.with_name(f".{out.name}.run")
    if anew:
        shutil.rmtree(begun, ignore_errors=True)
    asked = {"windows": 8, "length": 512, "batch": 1, "layers": 10, "rank": 256, "threads": 1, **options}
    asked |= {"directory": str(directory), "out": str(out), "vocabulary": shape["vocabulary"]}
    asked["block"] = block_parameters(shape)
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *start, *command[1:]]

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {name: str(asked["threads"]) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    variables = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    found = {"processes": processes, "resumed": begun.exists(), "load before": round(os.getloadavg()[0], 1)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=restrict, env=variables, cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"the run ended with code {done.returncode}; start the same command again and it goes on")
    shutil.rmtree(out)
    result: dict[str, Any] = {**found, **json.loads(lines[-1].removeprefix("RESULT "))}
    print(json.dumps({name: result[name] for name in ("total", "seconds", "peak resident, bytes")}), flush=True)
    return result


def made(place: Path, name: str, shape: dict[str, int]) -> Path:
    """Write a checkpoint if it is not there."""
    directory = place / name
    if not (directory / "config.json").exists():
        # The checkpoint, and at most as much again for the compressed one.
        numbers = shape["depth"] * block_parameters(shape) + 2 * shape["vocabulary"] * shape["hidden"]
        free = shutil.disk_usage(place).free
        if free < 4.2 * numbers:
            raise SystemExit(f"{place} needs {4.2e-9 * numbers:.0f} GB of free disk, it has {1e-9 * free:.0f}")
        begin = time.perf_counter()
        write(directory, shape)
        print(f"{name} written in {time.perf_counter() - begin:.0f} s", flush=True)
    return directory


def grid(place: Path, shapes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Measure small models, each of which is removed afterwards."""
    rows = []
    for shape in shapes:
        directory = made(place, f"grid-{shape['hidden']}-{shape['depth']}", shape)
        result = run(directory, shape, anew=True, layers=3, rank=64, windows=4, length=256)
        rows.append(
            {
                "width": shape["hidden"],
                "depth": shape["depth"],
                "weights, MB": round(2e-6 * result["parameters"], 1),
                "one block, MB": round(2e-6 * block_parameters(shape), 1),
                "peak, MB": round(1e-6 * result["peak resident, bytes"], 1),
            }
        )
        shutil.rmtree(directory)
    return rows


def idle() -> dict[str, Any]:
    """Return what a process takes that has imported everything and done nothing."""
    code = (
        "import cur.integrations.blockwise, transformers.models.llama.modeling_llama\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {"peak, MB": round(1.024e-3 * int(done.stdout.split()[1]), 1)}


def whole(place: Path, name: str, **options: Any) -> dict[str, Any]:
    """Measure a model of published shape at the paper's setting."""
    shape, limit = SHAPES[name], options.get("limit")
    result = run(made(place, name, shape), shape, **options)
    result["tokens"], result["limit, bytes"] = 8 * 512, limit
    return result


def processes(place: Path) -> dict[str, Any]:
    """Compare one process with two, of one thread each."""
    shape = {**BASE, "hidden": 2048, "intermediate": 7168, "heads": 16, "depth": 6}
    directory = made(place, "processes", shape)
    found = {str(n): run(directory, shape, anew=True, layers=2, windows=16, processes=n) for n in (1, 2)}
    shutil.rmtree(directory)
    times = {count: result["seconds"]["calibrate"] for count, result in found.items()}
    return {
        "calibration, s": times,
        "ratio": round(times["1"] / times["2"], 2),
        "same indices": found["1"]["indices, SHA-256"] == found["2"]["indices, SHA-256"],
        "load before": found["1"]["load before"],
    }


def extrapolated(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Carry the rates of the 8B run over to larger shapes: work by its count of operations, reading by bytes.

    An operation of calibration is a multiplication or an addition of a weight and a token; attention scores, 1 percent
    of that at this length, are left out. The weights of blocks are read twice. Products of an m x n matrix with a fixed
    number of vectors carry the work of a factorization.
    """
    base = SHAPES["llama-3.1-8b"]
    tokens = 128 * 2048
    pace = 1e6 * measured["read, MB/s"]
    passes = measured["seconds"]["calibrate"] - 2 * base["depth"] * block_parameters(base) / pace
    rate = 2 * base["depth"] * block_parameters(base) * measured["tokens"] / passes
    targets = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    area = {
        name: sum(math.prod(matrices(shape)[key]) for key in targets)
        for name, shape in (("base", base), ("llama-3.1-8b", base), *LARGE.items())
    }
    rows = []
    for name, shape in (("llama-3.1-8b", base), *LARGE.items()):
        blocks = shape["depth"] * block_parameters(shape)
        numbers = blocks + 2 * shape["vocabulary"] * shape["hidden"]
        work = 2 * blocks * tokens
        rows.append(
            {
                "shape": "Llama" + name.removeprefix("llama").upper(),
                "weights, GB": round(2e-9 * numbers),
                "one block, GB": round(2e-9 * block_parameters(shape), 2),
                "hidden states, GB": round(6e-9 * tokens * shape["hidden"], 1),
                "calibration, PFLOP": round(1e-15 * work, 1),
                "calibration here, h": round(work / rate / 3600, 1),
                "reading here, h": round(4 * blocks / pace / 3600, 2),
                "factorizations here, min": round(
                    measured["seconds"]["factorizations alone"] * area[name] / area["base"] / 60, 1
                ),
                "copy here, h": round(measured["seconds"]["write"] * numbers / measured["parameters"] / 3600, 2),
                "calibration on one GPU, min": round(work / DEVICE / 60, 2),
                "GPUs that hold the weights": math.ceil(2e-9 * numbers / HELD),
            }
        )
    return rows


def main() -> None:
    """Run the parts that are asked for, and store what they find beside the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--part", nargs="*", default=["depth", "width", "limit", "eight", "processes"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="of the part eight")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--child", type=json.loads)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    place = options.directory
    place.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= environment()
    for part in options.part:
        print(part, flush=True)
        if part == "depth":
            found["idle"] = idle()
            found["depth"] = grid(place, [{**BASE, "depth": depth} for depth in DEPTHS])
        elif part == "width":
            heads = [{**BASE, "hidden": d, "intermediate": 7 * d // 2, "heads": d // 128} for d in WIDTHS]
            found["width"] = grid(place, heads)
        elif part == "limit":
            found["limit"] = whole(place, "llama-3.2-3b", limit=LIMIT, threads=options.threads)
        elif part == "eight":
            found["eight"] = whole(place, "llama-3.1-8b", threads=options.threads, processes=options.processes)
        else:
            found["processes"] = processes(place)
        if "eight" in found:
            found["extrapolation"] = extrapolated(found["eight"])
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
