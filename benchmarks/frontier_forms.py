"""Compare what rounding is foreseen to lose, in nats a token, with what it loses, in single layers.

For layers of four blocks and 2 to 8 bits in groups of 64: the loss under both moments that the budget foresees, and
that of the rounding that is done. For factors of some ranks: what rounding adds, relative to rounding the whole weight.
And for what rounding leaves: which share of the loss would be left if its best factors of some ranks were added, whose
numbers take 8 bits and a step in groups of 64, beside the share that as many bits more for the weight would leave.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.render import forms
from benchmarks.rounding_model import add_setup, set_up
from cur.integrations.factor.layer import factorize
from cur.integrations.factor.rounding import round_layer
from cur.integrations.measure.moments import Moments, damped
from cur.integrations.nn import IntegerGrid
from cur.integrations.plan.grid_errors import BEYOND, FACTORS, expected_errors, pivots
from cur.integrations.plan.methods import ROUNDING_DAMPING, WeightedEntry

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forms.json"
BLOCKS = (0, 3, 14, 29)
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
BITS = (2, 3, 4, 5, 6, 8)
SHARES = (0.25, 0.4, 0.6)
RESIDUAL_RANKS = (4, 16)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="frontier.py forms", description=(__doc__ or "").splitlines()[0])
    add_setup(parser, RESULTS, RESULTS)
    options = parser.parse_args(arguments)
    options.windows = 1  # nothing is compared with the dense model here
    known, _, facts = set_up(options)
    statistics, moments = known.statistics, Moments(known.statistics)
    rows: list[dict[str, Any]] = []
    for block in BLOCKS:
        for kind in KINDS:
            name = f"model.layers.{block}.{kind}"
            layer, W = known.dense.get_submodule(name), known.weight(name)
            H, G = (of(name).double() for of in (statistics.output_moment, statistics.second_moment))
            sides = [pivots(moment, ROUNDING_DAMPING, name) for moment in (H, G)]
            done = {}
            for bits in BITS:
                grid = IntegerGrid(bits, 64, symmetric=False)
                rounded = round_layer(name, layer, grid, statistics, damping=ROUNDING_DAMPING)
                foreseen = 0.5 * float(expected_errors(W, *sides, [grid])[0])
                done[bits] = float(rounded.predicted or 0.0)
                row = {"layer": name, "bits": bits, "foreseen": foreseen, "done": done[bits]}
                rows.append(row | {"residual": residual(rounded.layer.weight.double() - W, H, G)})
            for share in SHARES:
                entry = WeightedEntry(
                    name=name,
                    shape=(W.shape[0], W.shape[1]),
                    rank=int(share * min(W.shape)),
                    layout="interpolative",
                    gradients=True,
                    damping=1e-4,
                )
                made, _ = factorize(layer, entry, moments, dtype=torch.float64, seed=0)
                cut = loss(made.weight.double() - W, H, G)
                for bits in (3, 4, 6):
                    grid = IntegerGrid(bits, 64, symmetric=False)
                    near = round_layer(name, made, grid, statistics, damping=ROUNDING_DAMPING).layer
                    added = loss(near.weight.double() - W, H, G) - cut
                    rows.append({"layer": name, "bits": bits, "rank": entry.rank, "times": added / done[bits]})
            ratios = [row["done"] / row["foreseen"] for row in rows if row["layer"] == name and "done" in row]
            print(f"{name}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)
    result = {"question": (__doc__ or "").splitlines()[0], **facts, **environment()}
    result |= {"beyond": BEYOND, "factors": FACTORS, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(forms(result))


def residual(change: torch.Tensor, H: torch.Tensor, G: torch.Tensor) -> dict[str, list[float]]:
    """Return by rank the share of the loss that the best factors would leave, and that of as many bits more."""
    m, n = change.shape
    A, B = (torch.linalg.cholesky(damped(moment, 1e-4)) for moment in (H, G))
    squares = torch.linalg.svdvals(A.T @ change @ B).square()
    more = {rank: (8 + 24 / 64) * rank * (m + n) / (m * n) for rank in RESIDUAL_RANKS}
    return {str(rank): [float(squares[rank:].sum() / squares.sum()), 4 ** -more[rank]] for rank in RESIDUAL_RANKS}


def loss(change: torch.Tensor, H: torch.Tensor, G: torch.Tensor) -> float:
    return 0.5 * float(((H @ change) * (change @ G)).sum())
