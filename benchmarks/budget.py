"""Compare what methods keep of a model at the same number of parameters, without training.

SmolLM2-135M-Instruct, all linear layers of all blocks, the share of their parameters that is kept: 0.9, 0.8, 0.6.
Calibration on windows of 512 tokens of WikiText-2 ``valid.txt``. Perplexity over windows of 1024 tokens of WikiText-2
``test.txt`` and of the CPython language reference, each window on its own, float32 on the CPU.

The baselines are written from their formulas, with the same second moments, damping and float64 factorizations:

- SVD-LLM (arXiv 2403.07378): the nearest matrix under the second moments of the inputs, stored as two factors, the
  same share in every layer;
- the same stored as rows and coefficients (PIFA, arXiv 2501.19090), which allows a higher rank.

    python benchmarks/budget.py [--wikitext DIR] [--windows 40] [--statistics FILE]

prints a table and writes ``benchmarks/results/budget.json``. With ``--statistics`` the calibration is kept in that
file, and read from it the next time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from environment import environment

from cur import ranks
from cur.integrations import (
    BudgetConfig,
    Statistics,
    batches,
    collect,
    collect_gradients,
    decoder_layers,
    linear_modules,
    load_model,
    perplexity,
    read_text,
    token_windows,
)
from cur.integrations.budget import LayerCurve, plan_budget
from cur.integrations.moments import Moments
from cur.own_rows import OwnRows, own_rows
from cur.truncation import WeightedSVD, weighted_svd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "budget.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

KEEP = (0.9, 0.8, 0.6)
DAMPING = BudgetConfig(keep=0.5).damping


@dataclass(frozen=True)
class Method:
    """How the weights are approximated, and how ranks are chosen: by the budget, or uniform in a layout."""

    approximate: Callable[..., WeightedSVD | OwnRows]
    gradients: bool
    uniform: str | None = None


METHODS = {
    "SVD-LLM, two factors": Method(weighted_svd, gradients=False, uniform="folded"),
    "SVD-LLM, rows and coefficients": Method(weighted_svd, gradients=False, uniform="interpolative"),
    "`--method best --no-gradients`": Method(weighted_svd, gradients=False),
    "`--method best`": Method(weighted_svd, gradients=True),
    "`--method rows`": Method(own_rows, gradients=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1024 tokens to score")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares of parameters to keep")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to measure")
    parser.add_argument("--statistics", type=Path, help="file that keeps the calibration")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")

    dense, tokenizer, source = load_model()
    names = linear_modules(dense, "all-linear", layers=range(len(decoder_layers(dense))))
    text = read_text(options.wikitext / "valid.txt")
    calibration = token_windows(tokenizer, text, length=512, count=options.calibration, name="valid.txt")
    texts = {
        "WikiText-2": read_text(options.wikitext / "test.txt"),
        "language reference": "\n\n".join(topics.values()),
    }
    held_out = {
        name: token_windows(tokenizer, text, length=1024, count=options.windows, name=name)
        for name, text in texts.items()
    }
    start = time.perf_counter()
    statistics = _statistics(dense, calibration, names, options.statistics)
    result: dict[str, Any] = {
        "question": "Which method keeps most of a model at the same number of parameters, without training?",
        "model": source,
        "calibration": {
            "file": "valid.txt",
            "windows": len(calibration),
            "length": 512,
            "sha256": statistics.text_hash,
            "seconds": time.perf_counter() - start,
        },
        "evaluation": {"windows": options.windows, "length": 1024},
        **environment(),
    }
    result["dense"] = _perplexities(dense, held_out, "dense")
    result["rows"] = []
    model = copy.deepcopy(dense)
    key, shared, seconds = None, {}, 0.0
    for title in options.only:
        method = METHODS[title]
        if key != (method.approximate, method.gradients):
            key = method.approximate, method.gradients
            shared.clear()
            start = time.perf_counter()
            shared = _approximate_all(dense, names, statistics, method, title)
            seconds = time.perf_counter() - start
        for keep in options.keep:
            chosen, predicted = _ranks(dense, statistics, shared, method, keep)
            result["rows"].append(
                {
                    "method": title,
                    "keep": keep,
                    "kept": _swap(model, dense, shared, chosen, method.uniform or "interpolative"),
                    "layers left dense": len(names) - len(chosen),
                    "seconds": seconds,
                    "predicted": predicted,
                    "perplexity": _perplexities(model, held_out, f"{title}, {keep}"),
                }
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result)
    print(f"written: {options.out}")


def _approximate_all(
    model: Any, names: list[str], statistics: Statistics, method: Method, title: str
) -> dict[str, WeightedSVD | OwnRows]:
    """Approximate every layer at all ranks, as :func:`cur.integrations.compress` does."""
    moments = Moments(statistics)
    found = {}
    for done, name in enumerate(names, start=1):
        W = model.get_submodule(name).weight.detach().double()
        H, G = moments.weights(name, W, gradients=method.gradients, damping=DAMPING)
        found[name] = method.approximate(W, row_weights=H, column_weights=G)
        _count(title)(done, len(names))
    return found


def _ranks(
    model: Any, statistics: Statistics, shared: dict[str, Any], method: Method, keep: float
) -> tuple[dict[str, int], float | None]:
    """Return the rank of every layer that is not left dense, and the predicted loss."""
    if method.uniform is not None:
        shapes = {name: one.shape for name, one in shared.items()}
        return {n: ranks.rank_for(*s, keep * s[0] * s[1], layout=method.uniform) for n, s in shapes.items()}, None
    curves = [
        LayerCurve.of(name, one.shape, one.square_errors, gradients=method.gradients) for name, one in shared.items()
    ]
    plan = plan_budget(model, statistics, BudgetConfig(keep=keep, gradients=method.gradients), curves)
    predicted = sum(entry.predicted or 0.0 for entry in plan.entries) if method.gradients else None
    return {entry.name: entry.rank for entry in plan.entries}, predicted


@torch.no_grad()
def _swap(model: Any, dense: Any, shared: dict[str, Any], chosen: dict[str, int], layout: str) -> float:
    """Put the products of the factors into a model, what compressed layers compute; return the share kept."""
    kept, whole = 0, 0
    for name, one in shared.items():
        weight = model.get_submodule(name).weight
        whole += weight.numel()
        if name in chosen:
            weight.copy_(one.truncate(chosen[name]).toarray())
            kept += ranks.parameters(*one.shape, chosen[name], layout=layout)
        else:
            weight.copy_(dense.get_submodule(name).weight)
            kept += weight.numel()
    return kept / whole


def _statistics(model: Any, windows: torch.Tensor, names: list[str], file: Path | None) -> Statistics:
    if file is not None and file.exists():
        return Statistics.load(file)
    given = list(batches(windows, batch_size=4))
    statistics = collect(model, given, modules=names, moments="full", progress=_count("calibrate"))
    statistics = collect_gradients(model, given, statistics, modules=names, progress=_count("gradients"))
    if file is not None:
        statistics.save(file)
    return statistics


def _perplexities(model: Any, held_out: dict[str, torch.Tensor], what: str) -> dict[str, float]:
    values = {}
    for name, windows in held_out.items():
        values[name] = perplexity(model, windows, progress=_count(f"{what}: {name}")).value
        print(f"-> {values[name]:.2f}", file=sys.stderr, flush=True)
    return values


def _count(what: str) -> Any:
    return lambda done, total: print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    print(f"\ndense: {result['dense']}")
    for row in result["rows"]:
        values = " / ".join(f"{value:.2f}" for value in row["perplexity"].values())
        print(f"{row['keep']}  {row['method']:40} {values}")


if __name__ == "__main__":
    main()
