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
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from environment import environment

from cur import ranks
from cur.integrations import (
    BudgetConfig,
    Plan,
    PlanEntry,
    Statistics,
    apply_plan_,
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
from cur.integrations.budget import error_curves, plan_budget
from cur.integrations.plan import fingerprint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "budget.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

KEEP = (0.9, 0.8, 0.6)
UNIFORM = {"SVD-LLM, two factors": "folded", "SVD-LLM, rows and coefficients": "interpolative"}
BUDGETS: dict[str, dict[str, Any]] = {
    "`--method best`": {},
    "`--method best --no-gradients`": {"gradients": False},
    "`--method rows`": {"method": "rows"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1024 tokens to score")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares of parameters to keep")
    parser.add_argument("--only", nargs="+", default=[*UNIFORM, *BUDGETS], help="methods to measure")
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
    for method in options.only:
        start = time.perf_counter()
        plan_for = _planner(method, dense, statistics, names)
        prepared = time.perf_counter() - start
        for keep in options.keep:
            plan = plan_for(keep)
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            apply_plan_(model, plan, statistics, progress=_bar(f"{method}, {keep}"))
            result["rows"].append(
                {
                    "method": method,
                    "keep": keep,
                    "kept": plan.kept,
                    "model kept": plan.model_kept,
                    "layers left dense": len(names) - len(plan.entries),
                    "seconds": {"plan": prepared, "decompose": time.perf_counter() - start},
                    "predicted": sum(entry.predicted or 0.0 for entry in plan.entries) or None,
                    "perplexity": _perplexities(model, held_out, f"{method}, {keep}"),
                }
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result)
    print(f"written: {options.out}")


def _statistics(model: Any, windows: torch.Tensor, names: list[str], file: Path | None) -> Statistics:
    if file is not None and file.exists():
        return Statistics.load(file)
    given = list(batches(windows, batch_size=4))
    statistics = collect(model, given, modules=names, moments="full", progress=_count("calibrate"))
    statistics = collect_gradients(model, given, statistics, modules=names, progress=_count("gradients"))
    if file is not None:
        statistics.save(file)
    return statistics


def _planner(method: str, model: Any, statistics: Statistics, names: list[str]) -> Callable[[float], Plan]:
    """Return the function from a share of parameters to a plan."""
    if method in UNIFORM:
        return lambda keep: _uniform(model, names, keep, UNIFORM[method])
    changes = BUDGETS[method]
    curves = error_curves(model, statistics, BudgetConfig(keep=0.5, **changes), names, progress=_count(method))
    return lambda keep: plan_budget(model, statistics, BudgetConfig(keep=keep, **changes), curves)


def _uniform(model: Any, names: list[str], keep: float, layout: str) -> Plan:
    entries = []
    for name in names:
        m, n = model.get_submodule(name).weight.shape
        rank = ranks.rank_for(m, n, keep * m * n, layout=layout)
        damping = BudgetConfig(keep=keep).damping
        entries.append(PlanEntry(name=name, shape=(m, n), rank=rank, layout=layout, method="weighted", damping=damping))
    return Plan(
        entries=tuple(entries),
        fingerprint=fingerprint(model),
        targeted_parameters=sum(entry.dense_parameters for entry in entries),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _perplexities(model: Any, held_out: dict[str, torch.Tensor], what: str) -> dict[str, float]:
    values = {}
    for name, windows in held_out.items():
        values[name] = perplexity(model, windows, progress=_count(f"{what}: {name}")).value
        print(f"-> {values[name]:.2f}", file=sys.stderr, flush=True)
    return values


def _count(what: str) -> Any:
    return lambda done, total: print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)


def _bar(what: str) -> Any:
    return lambda stage, done, total: _count(f"{what}: {stage}")(done, total)


def _print(result: dict[str, Any]) -> None:
    print(f"\ndense: {result['dense']}")
    for row in result["rows"]:
        values = " / ".join(f"{value:.2f}" for value in row["perplexity"].values())
        print(f"{row['keep']}  {row['method']:40} {values}")


if __name__ == "__main__":
    main()
