"""Measure the memory and the time that a model larger than memory takes.

    python benchmarks/scale.py DIRECTORY              # needs 40 GB of disk there, and an hour on one core
    python benchmarks/scale.py DIRECTORY --part depth # depth, width, limit, eight, processes

Checkpoints of random weights (`benchmarks/shapes.py`) are compressed block by block at the setting of "CURing Large
Models": 10 blocks by angular distance, rank 256, query, key and gate projections. Every run is a process of its own,
whose peak is what the system says (``VmHWM``); the part ``limit`` runs with an address space of 3 GB, beyond which the
system gives no memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
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


def child(asked: dict[str, Any]) -> None:
    """Compress a checkpoint, in a process of its own, and print what it took."""
    import torch

    from cur.integrations import CompressConfig
    from cur.integrations.blockwise import Team, compress_blockwise, load_skeleton

    torch.set_num_threads(1)
    begin = time.perf_counter()
    skeleton = load_skeleton(asked["directory"], dtype=torch.bfloat16)
    opened = time.perf_counter() - begin
    windows = torch.randint(
        asked["vocabulary"], (asked["windows"], asked["length"]), generator=torch.Generator().manual_seed(0)
    )
    config = CompressConfig(layers=asked["layers"], rank=asked["rank"], batch_size=asked["batch"])
    report = compress_blockwise(skeleton, windows, asked["out"], config, overwrite=True)
    if Team().leads:
        lines = Path("/proc/self/status").read_text().splitlines()
        status = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        seconds = {"open": opened, **report.seconds, "factorizations alone": sum(one.seconds for one in report.layers)}
        result = {
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "total": round(time.perf_counter() - begin, 1),
            "peak resident, bytes": 1024 * int(status["VmHWM"]),
            "peak address space, bytes": 1024 * int(status["VmPeak"]),
            "parameters": report.before.parameters,
            "after": report.after.parameters,
            "blocks": [entry.name for entry in report.plan.entries][::3],
            "rows": [list(one.rows[:8]) for one in report.layers],
        }
        print("RESULT " + json.dumps(result))


def run(
    directory: Path, shape: dict[str, int], *, limit: int | None = None, processes: int = 1, **options: Any
) -> dict[str, Any]:
    """Start `child` and return what it printed."""
    out = directory.with_name(directory.name + "-out")
    asked = {"windows": 8, "length": 512, "batch": 1, "layers": 10, "rank": 256, **options}
    asked |= {"directory": str(directory), "out": str(out), "vocabulary": shape["vocabulary"]}
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *start, *command[1:]]

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=restrict, env=variables, cwd=ROOT
    )
    shutil.rmtree(out, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"the run failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    print(json.dumps({name: result[name] for name in ("total", "seconds", "peak resident, bytes")}), flush=True)
    return result


def made(place: Path, name: str, shape: dict[str, int]) -> Path:
    """Write a checkpoint if it is not there."""
    directory = place / name
    if not (directory / "config.json").exists():
        begin = time.perf_counter()
        write(directory, shape)
        print(f"{name} written in {time.perf_counter() - begin:.0f} s", flush=True)
    return directory


def grid(place: Path, shapes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Measure small models, each of which is removed afterwards."""
    rows = []
    for shape in shapes:
        directory = made(place, f"grid-{shape['hidden']}-{shape['depth']}", shape)
        result = run(directory, shape, layers=3, rank=64, windows=4, length=256)
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


def whole(place: Path, name: str, *, limit: int | None = None) -> dict[str, Any]:
    """Measure a model of published shape at the paper's setting."""
    shape = SHAPES[name]
    result = run(made(place, name, shape), shape, limit=limit)
    result["tokens"], result["limit, bytes"] = 8 * 512, limit
    return result


def processes(place: Path) -> dict[str, Any]:
    """Compare one process with two."""
    shape = {**BASE, "hidden": 2048, "intermediate": 7168, "heads": 16, "depth": 6}
    directory = made(place, "processes", shape)
    found = {str(count): run(directory, shape, layers=2, windows=16, processes=count) for count in (1, 2)}
    shutil.rmtree(directory)
    times = {count: result["seconds"]["calibrate"] for count, result in found.items()}
    return {
        "calibration, s": times,
        "ratio": round(times["1"] / times["2"], 2),
        "same indices": found["1"]["rows"] == found["2"]["rows"],
        "load of the machine": os.getloadavg()[0],
    }


def extrapolated(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Carry the rates of the 8B run over to larger shapes: work by its count of operations, copies by bytes."""
    base = SHAPES["llama-3.1-8b"]
    flops = 2 * base["depth"] * block_parameters(base) * measured["tokens"]
    rate = flops / measured["seconds"]["calibrate"]
    bytes_8b = 2 * measured["parameters"]
    rows = []
    for name, shape in (("llama-3.1-8b", base), *LARGE.items()):
        numbers = shape["depth"] * block_parameters(shape) + 2 * shape["vocabulary"] * shape["hidden"]
        tokens = 128 * 2048
        work = 2 * shape["depth"] * block_parameters(shape) * tokens
        targets = [matrices(shape)[key] for key in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")]
        ours = [matrices(base)[key] for key in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")]
        # Products of m x n matrices with 256 + few vectors carry the work of a factorization.
        factor = sum(m * n for m, n in targets) / sum(m * n for m, n in ours)
        rows.append(
            {
                "shape": name,
                "weights, GB": round(2e-9 * numbers),
                "one block, GB": round(2e-9 * block_parameters(shape), 2),
                "hidden states, GB": round(6e-9 * tokens * shape["hidden"], 1),
                "calibration, PFLOP": round(1e-15 * work, 1),
                "calibration here, h": round(work / rate / 3600, 1),
                "factorizations here, h": round(measured["seconds"]["factorizations alone"] * factor / 3600, 3),
                "copy here, h": round(measured["seconds"]["write"] * 2 * numbers / bytes_8b / 3600, 2),
            }
        )
    return rows


def main() -> None:
    """Run the parts that are asked for, and store what they find beside the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--part", nargs="*", default=["depth", "width", "limit", "eight", "processes"])
    parser.add_argument("--child", type=json.loads)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    place = options.directory
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
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
            found["limit"] = whole(place, "llama-3.2-3b", limit=LIMIT)
        elif part == "eight":
            found["eight"] = whole(place, "llama-3.1-8b")
        else:
            found["processes"] = processes(place)
        if "eight" in found:
            found["extrapolation"] = extrapolated(found["eight"])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
