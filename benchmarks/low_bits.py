"""Measure how fast weights in few bits are multiplied by every kernel, beside the dense product, in one run.

Layers of SmolLM2-135M, and of 2048 and 4096 inputs and outputs, in eight bits with a step for each row and in four
bits in groups of 64 with zeros, on 1, 64 and 512 tokens at once; what a product of several weights gains; and the real
model, SmolLM2-135M-Instruct with all its linear layers rounded to the nearest: prefill and decode.

    python benchmarks/low_bits.py [--only layers] [--threads N]

prints tables and writes ``benchmarks/results/low_bits.json``. Kernels are timed in turns; for few tokens they go round
copies of a weight, which are in no cache when it is their turn, as in a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from inference import _NEW, _decode, _prefill

from cur.integrations import embedded_text, load_model, token_windows
from cur.integrations.kernels import KERNELS, GridWeight, KernelSettings, choice, times
from cur.integrations.quantize import grid_of, quantize_

RESULTS = Path(__file__).resolve().parent / "results" / "low_bits.json"
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))
GRIDS = ((8, None, True), (4, 64, False))
TOKENS = (1, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)
TOGETHER = {
    "q, k, v": ((576, 192, 192), 576),
    "gate, up": ((1536, 1536), 576),
    "q, k, v, wide": ((2048, 512, 512), 2048),
}
DENSE = "multiplied out"
_TURNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=["layers", "together", "model"], help="the others are kept from an earlier run"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times.place = lambda: None  # what others have measured on this machine is not what is asked for here
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with torch.inference_mode():
        for name, measure in (("layers", measure_layers), ("together", measure_together), ("model", measure_model)):
            if options.only in (None, name):
                found[name] = measure()
    found |= {
        "question": __doc__.splitlines()[0],
        "threads": options.threads,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


def random_weight(m: int, n: int, bits: int, group: int | None, symmetric: bool) -> GridWeight:
    """Return a random weight on a grid, with steps that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)
    shape = (m, 1 if group is None else -(-n // group))
    scale = (torch.rand(shape, generator=generator) / 16 + 0.01).bfloat16().float()
    if symmetric:
        most = 2 ** (bits - 1) - 1
        q = torch.randint(-most, most + 1, (m, n), generator=generator, dtype=torch.int8)
        return GridWeight(q, scale, None, bits, n if group is None else group)
    q = torch.randint(0, 2**bits, (m, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return GridWeight(q, scale, zeros, bits, n if group is None else group)


def grid_name(bits: int, group: int | None) -> str:
    """Say what a grid is, in a few words."""
    return f"{bits} bits, " + ("rows" if group is None else f"groups of {group}")


def measure_layers() -> list[dict[str, Any]]:
    """Time every kernel that takes a layer, on every number of tokens."""
    rows = []
    for (m, n), (bits, group, symmetric) in ((shape, grid) for shape in SHAPES for grid in GRIDS):
        weight = random_weight(m, n, bits, group, symmetric)
        for dtype, tokens in ((dtype, tokens) for dtype in DTYPES for tokens in TOKENS):
            seconds = timed(weight, dtype, tokens)
            row: dict[str, Any] = {
                "shape": f"{m} x {n}",
                "grid": grid_name(bits, group),
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "dense, ms": 1e3 * seconds[DENSE],
                "speed-up": {name: seconds[DENSE] / value for name, value in seconds.items()},
            }
            for activations in ("exact", "int8"):
                able = choice.candidates(weight, dtype, tokens, KernelSettings(activations))
                row[activations] = choice.best(able, seconds, weight, dtype).name
            rows.append(row)
            said = ", ".join(f"{kind}: {row[kind]} {row['speed-up'][row[kind]]:.2f}x" for kind in ("exact", "int8"))
            print(f"{row['shape']:>11} {row['grid']:>18} {row['dtype']:>8} {tokens:>3} tokens: {said}", flush=True)
    return rows


def timed(weight: GridWeight, dtype: torch.dtype, tokens: int) -> dict[str, float]:
    """Return the seconds of every kernel that takes a weight."""
    able = choice.candidates(weight, dtype, tokens, KernelSettings("int8"))
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return times.measured({one.name: choice.around(one, weight, dtype, tokens) for one in able}, x)


def measure_together() -> list[dict[str, Any]]:
    """Time the products of weights of the same inputs, one after the other and as one."""
    rows = []
    for (name, (sizes, n)), (bits, group, symmetric) in ((item, grid) for item in TOGETHER.items() for grid in GRIDS):
        weights = [random_weight(m, n, bits, group, symmetric) for m in sizes]
        for dtype in DTYPES:
            one = KERNELS["compiled"]
            apart = [choice.around(one, weight, dtype, 1) for weight in weights]
            joint = choice.around(one, below(weights), dtype, 1)
            count = min(len(joint), *map(len, apart))
            seconds = times.measured(
                {
                    "apart": [lambda x, at=at: [runs[at](x) for runs in apart] for at in range(count)],
                    "joint": [lambda x, at=at: joint[at](x).split(sizes, -1) for at in range(count)],
                },
                torch.ones(1, n, dtype=dtype),
            )
            rows.append(
                {
                    "weights": name,
                    "grid": grid_name(bits, group),
                    "dtype": str(dtype).removeprefix("torch."),
                    "apart, ms": 1e3 * seconds["apart"],
                    "together, ms": 1e3 * seconds["joint"],
                    "speed-up": seconds["apart"] / seconds["joint"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def below(weights: list[GridWeight]) -> GridWeight:
    """Put weights of the same inputs below each other."""
    first = weights[0]
    integers, scale = (torch.cat([getattr(weight, part) for weight in weights]) for part in ("integers", "scale"))
    zeros = None if first.zeros is None else torch.cat([weight.zeros for weight in weights])
    return GridWeight(integers, scale, zeros, first.bits, first.group)


def measure_model() -> list[dict[str, Any]]:
    """Time prefill and decoding of the real model."""
    rows = []
    for dtype in DTYPES:
        dense, tokenizer, source = load_model(None, dtype=torch.float32)
        dense = dense.to(dtype)
        window = token_windows(tokenizer, embedded_text("calibrate"), length=512, count=1)
        for bits in (8, 4):
            model = copy.deepcopy(dense)
            quantize_(model, grid=grid_of(bits))
            row: dict[str, Any] = {"model": source, "grid": str(grid_of(bits)), "dtype": str(dtype)[6:]}
            for what, run in (("prefill", _prefill), ("decode", _decode)):
                slow, fast = in_turns(lambda: run(dense, window), lambda: run(model, window))
                row[f"{what}, speed-up"] = slow / fast
                tokens = window.shape[1] if what == "prefill" else _NEW
                row[f"{what}, tokens/s"], row[f"{what}, dense tokens/s"] = tokens / fast, tokens / slow
            rows.append(row)
            print(row, flush=True)
    return rows


def in_turns(*runs: Callable[[], Any]) -> list[float]:
    """Return the least seconds of each of some calls, in turns, after one to choose kernels and take memory."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + _TURNS):
        for run, seconds in zip(runs, found, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return [min(seconds[1:]) for seconds in found]


if __name__ == "__main__":
    main()
