"""Measure how fast compressed models and layers run, each layout beside dense, in one run.

Layers of 4096 x 4096 and 14336 x 4096 (outputs x inputs), and smaller ones down to 192 x 576, at keep 0.8 and 0.5, on
1, 64 and 512 tokens at once; and the real model, SmolLM2-135M-Instruct with all its linear layers at keep 0.8 and 0.5:
prefill and decode.

    python benchmarks/inference.py [--only layers] [--threads N] [--dtype float32]

prints tables and writes ``benchmarks/results/inference.json``. Dense and compressed are timed in turns, and the median
of the ratios of their times is taken.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment

from cur import ranks
from cur.integrations import embedded_text, linear_modules, load_model, token_windows
from cur.integrations.model.targets import decoder_layers
from cur.integrations.nn import LAYOUTS, dense_weight, factored, swap_
from cur.integrations.plan.layouts import choose_layout

RESULTS = Path(__file__).resolve().parent / "results" / "inference.json"
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (4096, 1024),
    (1024, 4096),
    (2048, 2048),
    (1024, 1024),
    (1536, 576),
    (576, 1536),
    (576, 576),
    (192, 576),
)
KEEPS = (0.8, 0.5)
TOKENS = (1, 64, 512)
# Of `1 / keep`, what the saved numbers promise; asked of 1 and 64 tokens at once.
WANTED = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["layers", "model"], help="the other part is kept from an earlier run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="least time spent on each comparison")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    layers, model = kept.get("layers", []), kept.get("model", [])
    with torch.inference_mode():
        if options.only != "model":
            layers = [row for shape in SHAPES for row in measure_layers(shape, dtype=dtype, least=options.seconds)]
        if options.only != "layers":
            model = measure_model(dtype)
    result = {
        "question": __doc__.splitlines()[0],
        "threads": options.threads,
        "dtype": options.dtype,
        "wanted": WANTED,
        "layers": layers,
        "model": model,
        **environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


def measure_layers(shape: tuple[int, int], *, dtype: torch.dtype, least: float) -> list[dict[str, Any]]:
    """Time one layer in every layout at every budget and number of tokens."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(n, m, bias=False).to(dtype)
    rows = []
    for keep in KEEPS:
        for layout, kind in ((layout, LAYOUTS[layout]) for layout in factored()):
            rank = ranks.rank_for(m, n, keep * m * n, layout=layout)
            layer = kind(n, m, rank, bias=False).to(dtype)
            if layout == "interpolative":
                # Rows as DEIM chooses them, here and there: the gather must not be given an easy order.
                layer.order = torch.randperm(m, generator=generator)
            for tokens in TOKENS:
                x = torch.randn(tokens, n, generator=generator).to(dtype)
                ratio, before, after = compare(lambda: dense(x), lambda: layer(x), least=least)
                row = {
                    "shape": f"{m} x {n}",
                    "keep": keep,
                    "layout": layout,
                    "rank": rank,
                    "tokens": tokens,
                    "dense, ms": 1e3 * before,
                    "ms": 1e3 * after,
                    "speed-up": ratio,
                    "promised": 1 / keep,
                    "chosen by auto": layout == choose_layout(shape, rank=rank),
                }
                rows.append(row)
                print(
                    f"{row['shape']:>13} keep {keep} {layout:>13} {tokens:>4} tokens: "
                    f"{ratio:5.2f}x of {1 / keep:.2f}x ({1e3 * before:.2f} ms dense)",
                    flush=True,
                )
    return rows


def compare(dense: Callable[[], Any], compressed: Callable[[], Any], *, least: float) -> tuple[float, float, float]:
    """Return the median ratio of times, taken in turns, and the median time of each."""
    for _ in range(2):
        dense()
        compressed()
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while time.perf_counter() - start < least or len(times[0]) < 7:
        for run, kept in zip((dense, compressed), times, strict=True):
            begin = time.perf_counter()
            run()
            kept.append(time.perf_counter() - begin)
    ratio = statistics.median(one / other for one, other in zip(*times, strict=True))
    return ratio, statistics.median(times[0]), statistics.median(times[1])


def measure_model(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time prefill and decoding of the real model; of its compressed form only the shapes matter here."""
    dense, tokenizer, source = load_model(None, dtype=dtype)
    window = token_windows(tokenizer, embedded_text("calibrate"), length=512, count=1)
    names = linear_modules(dense, "all-linear", blocks=range(len(decoder_layers(dense))))
    rows = []
    for keep in KEEPS:
        for layout, kind in ((layout, LAYOUTS[layout]) for layout in factored()):
            model = copy.deepcopy(dense)
            layers = {}
            for name in names:
                weight, bias, _ = dense_weight(model.get_submodule(name), name)
                m, n = weight.shape
                rank = ranks.rank_for(m, n, keep * m * n, layout=layout)
                layers[name] = kind(n, m, rank, bias=bias is not None).to(dtype)
            swap_(model, layers)
            model.eval()
            row: dict[str, Any] = {"model": source, "keep of linear layers": keep, "layout": layout}
            before, after = (sum(p.numel() for p in one.parameters()) for one in (dense, model))
            row["parameters kept"] = after / before
            for what, run in (("prefill", _prefill), ("decode", _decode)):
                ratio, slow, fast = compare(lambda: run(dense, window), lambda: run(model, window), least=4.0)
                row[f"{what}, speed-up"] = ratio
                tokens = window.shape[1] if what == "prefill" else _NEW
                row[f"{what}, tokens/s"], row[f"{what}, dense tokens/s"] = tokens / fast, tokens / slow
            rows.append(row)
            print(row, flush=True)
    return rows


_NEW = 16


def _prefill(model: Any, window: torch.Tensor) -> None:
    model(window, logits_to_keep=1)


def _decode(model: Any, window: torch.Tensor) -> None:
    model.generate(
        window[:, :16],
        attention_mask=torch.ones_like(window[:, :16]),
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
    )


if __name__ == "__main__":
    main()
