"""Repeat the experiments of "CURing Large Models" (arXiv 2501.04211) at the scale of a small model, without healing.

SmolLM2-135M-Instruct, dense as it is shipped (what that is, is in ``off_grid.py``). Unless a row says otherwise: ten
blocks of smallest angular distance, their ``q_proj k_proj gate_proj``, rank at most 128 and at most break-even, WANDA
and DEIM, plain U, calibration on 64 windows of 512 tokens of WikiText-2 ``valid.txt``. Perplexity over the first 8
windows of 1024 tokens of WikiText-2 ``test.txt`` and of the CPython language reference, each window on its own.
Products of all passes are in bfloat16 where the processor has units for it, which moves the perplexities by less than
the choices that are compared.

    python benchmarks/paper.py [--wikitext DIR] [--only NAME ...]

prints a table per question and writes ``benchmarks/results/paper.json``; questions that are not asked again keep their
rows. About 30 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from environment import add_precision, environment, precision_of

from cur import cur, ranks, scores
from cur.integrations import (
    batches,
    choose_blocks,
    collect,
    decoder_layers,
    load_model,
    perplexity,
    read_text,
    token_windows,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper.json"
PICTURE = ROOT / "docs" / "paper.svg"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

TARGETS = ("q_proj", "k_proj", "gate_proj")
LAYERS = 10
RANK = 128
WINDOWS = 64
SELECTIONS = ("random", "magnitude", "DEIM on W", "WANDA", "activation", "covariance")


@dataclass(frozen=True)
class Inputs:
    """Calibration: norms of input features over all tokens, roots of second moments, angular distances of blocks."""

    norms: dict[str, torch.Tensor]
    roots: dict[str, torch.Tensor]
    angular: dict[int, float]
    seconds: float


class Bench:
    """The model, its texts, and what was measured on them."""

    def __init__(self, options: argparse.Namespace, kept: str | None) -> None:
        self.model, self.tokenizer, self.source = load_model()
        self.precision = precision_of(self.model, options, kept)
        self.dense = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.blocks = [name for name, _ in decoder_layers(self.model)]
        reference = "\n\n".join(topics.values())
        self.texts = {"WikiText-2": read_text(options.wikitext / "test.txt"), "language reference": reference}
        self.held_out = {
            name: token_windows(self.tokenizer, text, length=1024, count=options.windows, name=name)
            for name, text in self.texts.items()
        }
        self.calibration = token_windows(
            self.tokenizer, read_text(options.wikitext / "valid.txt"), length=512, count=256, name="valid.txt"
        )
        self.inputs = self.measure(self.calibration[:WINDOWS], moments="full")

    def measure(self, windows: torch.Tensor, moments: str = "diagonal") -> Inputs:
        """Calibrate on windows."""
        names = [f"{block}.{path}" for block in self.blocks for path in ("self_attn.q_proj", "mlp.gate_proj")]
        start = time.perf_counter()
        found = collect(
            self.model,
            batches(windows, batch_size=4),
            modules=names,
            layers=self.blocks,
            moments=moments,
            precision=self.precision,
        )
        seconds = time.perf_counter() - start
        roots = {name: _root(found.second_moment(name)) for name in names} if moments == "full" else {}
        return Inputs({name: found.x_norm(name) for name in names}, roots, found.angular, seconds)

    def layer_names(self, blocks: Sequence[int], targets: Sequence[str] = TARGETS) -> list[str]:
        """Return the layers of these blocks, in order."""
        places = {"q_proj": "self_attn", "k_proj": "self_attn", "gate_proj": "mlp"}
        return [f"{self.blocks[i]}.{places[target]}.{target}" for i in blocks for target in targets]

    def chosen(self, count: int = LAYERS) -> list[int]:
        """Return the blocks of smallest angular distance."""
        return choose_blocks(self.inputs.angular, count)

    def row(self, names: Sequence[str], *, inputs: Inputs | None = None, **how: Any) -> dict[str, Any]:
        """Approximate these layers, score the model, and put the weights back."""
        inputs = inputs or self.inputs
        start = time.perf_counter()
        errors, weighted = [], []
        with torch.no_grad():
            for name in names:
                W = self.dense[f"{name}.weight"]
                source = name.replace("k_proj", "q_proj")  # they share their input
                norm = inputs.norms[source].to(W)
                near = approximate(W, norm, inputs.roots.get(source), **how)
                errors.append(float(torch.linalg.norm(W - near) / torch.linalg.norm(W)))
                weighted.append(float(torch.linalg.norm((W - near) * norm) / torch.linalg.norm(W * norm)))
                self.model.get_submodule(name).weight.copy_(near)
        seconds = time.perf_counter() - start
        try:
            scores = self.score()
        finally:
            with torch.no_grad():
                for name in names:
                    self.model.get_submodule(name).weight.copy_(self.dense[f"{name}.weight"])
        return {
            "perplexity": scores,
            "error": statistics.mean(errors) if errors else 0.0,
            "weighted error": statistics.mean(weighted) if weighted else 0.0,
            "seconds": seconds,
        }

    def score(self) -> dict[str, float]:
        """Return the perplexity of both texts."""
        return {
            name: perplexity(self.model, windows, precision=self.precision).value
            for name, windows in self.held_out.items()
        }


def _root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def approximate(
    W: torch.Tensor,
    norm: torch.Tensor,
    root: torch.Tensor | None,
    *,
    selection: str = "WANDA",
    weighted: bool = False,
    rank: int = RANK,
    beyond_break_even: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """Return the product C U R for one weight."""
    limit = min(W.shape) if beyond_break_even else ranks.break_even(*W.shape)
    guide = {
        "magnitude": lambda: W.abs(),
        "DEIM on W": lambda: W if weighted else None,
        "WANDA": lambda: scores.wanda(W, norm),
        # with the weighted core the weighted matrix is what guides anyway
        "activation": lambda: None if weighted else W * norm,
        "covariance": lambda: None if root is None else W @ root.to(W),
    }.get(selection, lambda: None)
    factors = cur(
        W,
        rank=min(rank, limit),
        select="uniform" if selection == "random" else "deim",
        importance=guide(),
        column_weights=norm**2 if weighted else None,
        subspace="exact",
        rng=seed,
    )
    near: torch.Tensor = factors.toarray()
    return near


def selection(bench: Bench) -> Iterator[dict[str, Any]]:
    """Choose indices: which importance guides DEIM, and which norm U minimises."""
    names = bench.layer_names(bench.chosen())
    for how in SELECTIONS:
        for weighted in (False, True):
            row = bench.row(names, selection=how, weighted=weighted)
            yield {"selection": how, "U": "weighted" if weighted else "plain", **row}
    for seed in (1, 2):
        yield {"selection": f"random, seed {seed}", "U": "plain", **bench.row(names, selection="random", seed=seed)}


def weights(bench: Bench) -> Iterator[dict[str, Any]]:
    """Compress weights: query, key and gate, each and together."""
    for targets in (("q_proj",), ("k_proj",), ("gate_proj",), ("q_proj", "k_proj"), TARGETS):
        names = bench.layer_names(bench.chosen(), targets)
        saved = sum(bench.dense[f"{name}.weight"].numel() - _stored(bench, name, RANK) for name in names)
        yield {"weights": ", ".join(targets), "numbers saved": saved, **bench.row(names)}


def _stored(bench: Bench, name: str, rank: int) -> int:
    m, n = bench.dense[f"{name}.weight"].shape
    return ranks.parameters(m, n, min(rank, ranks.break_even(m, n)))


def layers(bench: Bench) -> Iterator[dict[str, Any]]:
    """Choose blocks: by angular distance, the last, or random ones."""
    inner = range(1, len(bench.blocks) - 1)
    rng = np.random.default_rng(0)
    order = rng.permutation(inner).tolist()
    for count in (2, 5, 10, 15, 20):
        for how, chosen in {
            "angular": bench.chosen(count),
            "last": list(inner)[-count:],
            "random": sorted(order[:count]),
        }.items():
            yield {"blocks": count, "choice": how, **bench.row(bench.layer_names(chosen))}


def rank(bench: Bench) -> Iterator[dict[str, Any]]:
    """Vary the rank: perplexity against it, and the smallest that keeps perplexity within one percent."""
    names = bench.layer_names(bench.chosen())
    effective: dict[str, list[float]] = {}
    for name in names:
        s = torch.linalg.svdvals(bench.dense[f"{name}.weight"])
        effective.setdefault(name.rsplit(".", 1)[-1], []).append(float(ranks.effective_rank(s.numpy())))
    for target, values in effective.items():
        yield {
            "effective rank of": target,
            "least": min(values),
            "median": statistics.median(values),
            "most": max(values),
        }
    for most in (32, 64, 96, 128, 192, 256):
        yield {"rank at most": most, "stored as": "break-even at most", **bench.row(names, rank=most)}
    dense = bench.score()["WikiText-2"]
    low, high = RANK, 576  # the first is too few, the second is the full rank
    while high - low > 16:
        middle = (low + high) // 2
        row = bench.row(names, rank=middle, beyond_break_even=True)
        yield {"rank at most": middle, "stored as": "whatever it takes", **row}
        low, high = (low, middle) if row["perplexity"]["WikiText-2"] <= 1.01 * dense else (middle, high)
    yield {"smallest rank within 1 percent": high}


def calibration(bench: Bench) -> Iterator[dict[str, Any]]:
    """Calibrate: how many windows, and from which domain."""
    names = bench.layer_names(bench.chosen())
    squares: dict[str, torch.Tensor] = {}
    seconds, first = 0.0, 0
    for last in (8, 16, 32, 64, 128, 256):
        found = bench.measure(bench.calibration[first:last])
        seconds, first = seconds + found.seconds, last
        squares = {name: squares.get(name, 0.0) + norm**2 for name, norm in found.norms.items()}
        inputs = Inputs({name: value.sqrt() for name, value in squares.items()}, {}, {}, seconds)
        yield {"calibrated on": "valid.txt", "windows": last, "seconds to measure": seconds} | bench.row(
            names, inputs=inputs
        )
    # behind the windows that are scored
    text = token_windows(bench.tokenizer, bench.texts["language reference"], length=512, count=80 + WINDOWS)
    found = bench.measure(text[80:])
    row = bench.row(names, inputs=found)
    yield {"calibrated on": "language reference", "windows": WINDOWS, "seconds to measure": found.seconds} | row


QUESTIONS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "selection": selection,
    "weights": weights,
    "layers": layers,
    "rank": rank,
    "calibration": calibration,
}


def draw(questions: dict[str, list[dict[str, Any]]], dense: dict[str, float], path: Path) -> None:
    """Draw perplexity over the dense model's against blocks, rank and calibration text, for the first text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "cur"
    text, whole = next(iter(dense.items()))
    curves: list[tuple[str, str, dict[str, list[dict[str, Any]]]]] = [
        ("blocks", "blocks compressed", _by(questions["layers"], "choice")),
        ("rank at most", "rank at most", _by(questions["rank"], "stored as")),
        ("windows", "calibration windows", _by(questions["calibration"], "calibrated on")),
    ]
    figure, panels = plt.subplots(1, len(curves), figsize=(11, 3.6), layout="constrained")
    for panel, (key, label, groups) in zip(panels, curves, strict=True):
        for name, rows in groups.items():
            points = sorted((row[key], row["perplexity"][text] / whole) for row in rows)
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set_yscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("perplexity / that of the dense model")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _by(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if key in row:
            groups.setdefault(row[key], []).append(row)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens to score")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions to answer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_precision(parser)
    options = parser.parse_args()
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"questions": {}}
    bench = Bench(options, result["evaluation"]["products"] if "evaluation" in result else None)
    result |= {
        "model": bench.source,
        "evaluation": {"windows": options.windows, "length": 1024, "products": bench.precision},
        "dense": bench.score(),
        "seconds to calibrate": bench.inputs.seconds,
        **environment(),
    }
    print(f"dense: {_short(result['dense'])}", flush=True)
    for name in options.only:
        print(f"\n## {QUESTIONS[name].__doc__}", flush=True)
        rows = []
        for row in QUESTIONS[name](bench):
            rows.append(row)
            print("   ", ", ".join(f"{key}: {_short(value)}" for key, value in row.items()), flush=True)
        result["questions"][name] = rows
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["questions"].keys() >= {"layers", "rank", "calibration"}:
        draw(result["questions"], result["dense"], PICTURE)
    print(f"written: {options.out}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(_short(v) for v in value.values())
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


if __name__ == "__main__":
    main()
