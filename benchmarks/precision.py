"""Measure what each precision costs on this processor, and what it changes.

Products of one layer with and without their gradient, and forward passes of SmolLM2-135M-Instruct in every dtype of its
weights and precision of its products that ``precision`` can name; int8 layers; and what bfloat16 changes in what is
measured: perplexity, and the divergence of the next token's distribution from that in float32.

    python benchmarks/precision.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/precision.py

The second imitates a processor without units for half precision on one that has them. Each prints its table and writes
it under its own name into ``benchmarks/results/precision.json``. Every figure is the least of some tries in one run;
only ratios within a run mean anything. Some 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from environment import environment, processor
from torch import nn

from cur.integrations import Reference, load_model, perplexity, token_windows
from cur.integrations.model.precision import Precision, slowdown
from cur.integrations.quantize import quantize_

RESULTS = Path(__file__).resolve().parent / "results" / "precision.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUTS, INPUTS, TOKENS = 1536, 576, 512
TRIES = 5


def least(work: Callable[[], Any], tries: int = TRIES) -> float:
    """Return the least time of some tries after one; two where one takes seconds."""
    work()
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
        if len(times) > 1 and times[-1] > 5:
            break
    return min(times)


def products() -> list[dict[str, Any]]:
    """Time a layer of the model forward, and with its gradient."""
    rows = []
    for name, dtype in DTYPES.items():
        layer = nn.Linear(INPUTS, OUTPUTS, bias=False).to(dtype)
        x = torch.randn(TOKENS, INPUTS, dtype=dtype, requires_grad=True)
        gradient = torch.randn(TOKENS, OUTPUTS, dtype=dtype)
        with torch.no_grad():
            forward = least(lambda layer=layer, x=x: layer(x))
        both = least(lambda layer=layer, x=x, g=gradient: torch.autograd.grad(layer(x), (x, layer.weight), g))
        rows.append({"products in": name, "forward, ms": 1e3 * forward, "with gradient, ms": 1e3 * both})
    return rows


@torch.no_grad()
def passes(model: Any, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Time forward passes in every dtype of the weights and precision of the products."""
    rows = []
    for stored, dtype in DTYPES.items():
        model = model.to(dtype)
        for name in ("float32", "bfloat16", "float16") if stored == "float16" else ("float32", "bfloat16"):
            if stored == "float16" and name == "bfloat16":
                continue
            with Precision.of(model, name).products():
                seconds = least(lambda: model(windows[:1, :TOKENS]), tries=3)
            chosen = name == Precision.of(model).name
            rows.append({"weights": stored, "products": name, "tokens/s": TOKENS / seconds, "auto": chosen})
            print(rows[-1], flush=True)
    model = model.to(torch.float32)
    quantize_(model)
    for name in ("float32", "bfloat16"):
        with Precision.of(model, name).products():
            seconds = least(lambda: model(windows[:1, :TOKENS]), tries=3)
        chosen = name == Precision.of(model).name
        rows.append({"weights": "int8", "products": name, "tokens/s": TOKENS / seconds, "auto": chosen})
        print(rows[-1], flush=True)
    return rows


def differences(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Compare what is measured in bfloat16 with the same in float32."""
    found: dict[str, Any] = {"windows": len(windows), "length": windows.shape[1]}
    found["perplexity"] = {name: perplexity(model, windows, precision=name).value for name in ("float32", "bfloat16")}
    diverged = Reference(model, windows, precision="float32").compare(model, precision="bfloat16")
    found["divergence, nats"] = diverged.mean
    found["its standard error, over windows"] = statistics.stdev(diverged.kl) / len(windows) ** 0.5
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to compare on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    result: dict[str, Any] = {
        "processor": processor(),
        "units": capability,
        "bfloat16 over float32": slowdown(torch.bfloat16, torch.get_num_threads()),
        "float16 over float32": slowdown(torch.float16, torch.get_num_threads()),
        "products": products(),
    }
    print(json.dumps(result, indent=1), flush=True)
    model, tokenizer, source = load_model()
    windows = token_windows(tokenizer, "\n\n".join(topics.values()), length=TOKENS, count=options.windows)
    if result["bfloat16 over float32"] < 1:  # where it is emulated it takes twenty times as long, for the same figures
        result["differences"] = differences(model, windows)
        print(result["differences"], flush=True)
    result["passes"] = passes(model, windows)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"processors": {}}
    known["processors"][f"{processor()}, {capability}"] = result
    known |= {"question": (__doc__ or "").splitlines()[0], "model": source, "tokens": TOKENS, **environment()}
    known["layer"] = [OUTPUTS, INPUTS]
    options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
