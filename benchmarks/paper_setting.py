"""Measure the paper's setting, with DEIM done right, on a real model: perplexity without healing.

SmolLM2-135M-Instruct, dense as it is shipped (what that is, is in ``off_grid.py``); 10 layers by angular distance,
``q_proj k_proj gate_proj``, WANDA + DEIM, rank at most 128. Calibration: 64 windows of 512 tokens of WikiText-2
``valid.txt``. Perplexity over the first 40 windows of 1024 tokens of WikiText-2 ``test.txt`` and of the CPython
language reference, each window on its own, float32 on the CPU.

    python benchmarks/paper_setting.py [--wikitext DIR]

prints a table and writes ``benchmarks/results/paper_setting.json``. About 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from environment import environment

from cur.integrations import (
    batches,
    collect,
    decoder_layers,
    load_model,
    perplexity,
    read_text,
    token_windows,
)
from cur.integrations.compress import compress
from cur.integrations.plan.config import CompressConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper_setting.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

SETTING = CompressConfig(layers=10, targets=("q_proj", "k_proj", "gate_proj"), rank=128, importance="wanda")
VARIANTS = {
    "WANDA + DEIM, U = C+ W R+": SETTING,
    "WANDA + DEIM, activation-weighted U": replace(SETTING, link="activation"),
}

# Measured with the published CURing code at the same setting, on this protocol.
PUBLISHED = {"WikiText-2": 102.7, "language reference": 76.3}

# Part of the protocol by which the figures from elsewhere were measured.
PRECISION = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1024 tokens to score")
    parser.add_argument("--only", nargs="+", choices=["dense", *VARIANTS], default=["dense", *VARIANTS])
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows that are not measured again are kept")
    options = parser.parse_args()
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")

    dense, tokenizer, source = load_model()
    calibration = token_windows(
        tokenizer, read_text(options.wikitext / "valid.txt"), length=512, count=64, name="valid.txt"
    )
    texts = {
        "WikiText-2": read_text(options.wikitext / "test.txt"),
        "language reference": "\n\n".join(topics.values()),
    }
    held_out = {
        name: token_windows(tokenizer, text, length=1024, count=options.windows, name=name)
        for name, text in texts.items()
    }

    start = time.perf_counter()
    statistics = collect(
        dense,
        batches(calibration, batch_size=SETTING.batch_size),
        modules=[name for name, _ in dense.named_modules() if name.endswith(SETTING.targets)],
        layers=[name for name, _ in decoder_layers(dense)],
        precision=PRECISION,
        progress=_bar("calibrate"),
    )
    calibrate = time.perf_counter() - start

    kept = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else {}
    rows: dict[str, dict[str, Any]] = {}
    for name in ("dense", "published CURing code", *VARIANTS):
        if name == "published CURing code":
            rows[name] = {"perplexity": PUBLISHED, "measured": "elsewhere on this protocol"}
        elif name not in options.only:
            rows |= {name: kept[name]} if name in kept else {}
        elif name == "dense":
            rows[name] = {"perplexity": _measure(dense, held_out, name)}
        else:
            model = copy.deepcopy(dense)
            report = compress(model, statistics, VARIANTS[name], precision=PRECISION)
            rows[name] = {
                "perplexity": _measure(model, held_out, name),
                "parameters": report.after.parameters,
                "seconds": {**report.seconds, "calibrate": calibrate},
                "layers": sorted({int(layer.name.split(".")[2]) for layer in report.layers}),
                "ranks": sorted({layer.rank for layer in report.layers}),
                "mean relative error": sum(layer.relative_error for layer in report.layers) / len(report.layers),
                "mean weighted error": sum(layer.weighted_error for layer in report.layers) / len(report.layers),
            }

    _print(rows, list(held_out))
    result = {
        "question": __doc__.splitlines()[0],
        "model": source,
        "calibration": {"file": "valid.txt", "windows": 64, "length": 512, "sha256": statistics.text_hash},
        "evaluation": {"windows": options.windows, "length": 1024, "precision": PRECISION},
        "rows": rows,
        **environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


def _measure(model: Any, held_out: dict[str, torch.Tensor], what: str) -> dict[str, float]:
    values = {}
    for name, windows in held_out.items():
        values[name] = perplexity(model, windows, precision=PRECISION, progress=_bar(f"{what}: {name}")).value
        print(f"-> {values[name]:.2f}", file=sys.stderr, flush=True)
    return values


def _bar(what: str) -> Any:
    return lambda done, total: print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)


def _print(rows: dict[str, dict[str, Any]], texts: list[str]) -> None:
    print("\n\n| | " + " | ".join(texts) + " |")
    print("|---|" + "---|" * len(texts))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row['perplexity'][text]:.2f}" for text in texts) + " |")


if __name__ == "__main__":
    main()
