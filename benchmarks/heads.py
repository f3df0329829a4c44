"""Compare what layers can take in a budget with what they could if heads of attention gave up dimensions, too.

As MoDeGPT (arXiv 2408.09632) has it: entries of the values are given up together, in the rows of the value projection
and the columns of the output projection, in a basis for each head that makes few of them do; and pairs of entries that
rotary embeddings turn together are, in the rows of the query and the key projections. What is left may be factored as
well. Both are offered to the budget as more forms that layers can take, under the same second moments; the loss that
is predicted for the shared budget says about what they would bring. Nothing is compressed.

SmolLM2-135M-Instruct, calibration as in `benchmarks/quality.py`.

    python benchmarks/heads.py [--wikitext DIR] [--cache DIR] [--keep 0.9 0.8 0.6]

prints a table and writes ``benchmarks/results/heads.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import add_precision, environment
from benchmarks.quality import BOTH, DEFAULT, KEEP, WIKITEXT, calibrate, calibration_windows, count
from cur import ranks, weights
from cur.integrations import Statistics, decoder_layers, linear_modules, load_model
from cur.integrations.model.precision import Precision
from cur.integrations.plan.budget import error_curves, joint_curves
from cur.integrations.plan.rate_distortion import Cut, LayerCurve, NeuronCurve, unit
from cur.weighted.truncation import square_errors

RESULTS = Path(__file__).resolve().parent / "results" / "heads.json"
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)
"""Of dimensions at which what is left may be factored as well."""
SCALE = unit(1.0, gradients=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--cache", type=Path, help="directory that keeps the calibration")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares of parameters to keep")
    add_precision(parser)
    options = parser.parse_args()

    model, tokenizer, source = load_model()
    names = linear_modules(model, "all-linear", blocks=range(len(decoder_layers(model))))
    precision = Precision.of(model, options.precision).name
    windows, rest = calibration_windows(tokenizer, options.wikitext, options.calibration)
    statistics = calibrate(model, windows, rest, names, options.cache, precision)[0].statistics[BOTH]
    curves = error_curves(model, statistics, DEFAULT, names, progress=count("curves"))
    neurons = joint_curves(model, statistics, DEFAULT, names, progress=count("neurons"))
    values, queries = [], []
    for done, (prefix, block) in enumerate(decoder_layers(model), start=1):
        heads = Heads(f"{prefix}.self_attn", block.self_attn, statistics)
        values.append(heads.values())
        queries.append(heads.queries())
        count("heads")(done, len(decoder_layers(model)))
    rows = []
    for what, joint in {
        "a rank for each layer": [],
        "and neurons, as it is": neurons,
        "and dimensions of values": [*neurons, *values],
        "and dimensions of queries": [*neurons, *queries],
        "and both": [*neurons, *values, *queries],
    }.items():
        predicted = {f"{keep:g}": shared(curves, joint, keep) for keep in options.keep}
        rows.append({"forms": what, **predicted})
        print(f"{what:28}", *(f"{value:.4f}" for value in predicted.values()))
    result = {
        "question": "Would heads of attention that give up dimensions help?",
        "model": source,
        "windows": len(windows),
        "precision": precision,
        "rows": rows,
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shared(curves: Sequence[LayerCurve], joint: Sequence[NeuronCurve], keep: float) -> float:
    """Return the predicted loss of the best shared budget.

    :func:`cur.integrations.plan.budget.plan_budget` shares in the same way, but makes no plans of heads.
    """
    alone = {curve.name: curve for curve in curves}
    offers = [(curve.errors, curve.costs) for name, curve in alone.items() if all(name not in j.names for j in joint)]
    for curve in joint:
        forms = [(curve.errors, curve.costs), _together([alone[name] for name in curve.names])]
        for cut in curve.cuts:
            errors, costs = _together(cut.layers)
            forms.append((cut.error + errors, costs))
        offers.append((np.concatenate([form[0] for form in forms]), np.concatenate([form[1] for form in forms])))
    budget = int(keep * sum(m * n for m, n in (curve.shape for curve in curves)))
    chosen = ranks.allocate([errors for errors, _ in offers], [costs for _, costs in offers], budget)
    return sum(float(errors[number]) for (errors, _), number in zip(offers, chosen, strict=True))


def _together(layers: Sequence[LayerCurve]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return errors and costs of what several layers do each for itself."""
    chosen = ranks.combinations([layer.errors for layer in layers], [layer.costs for layer in layers]).T
    errors = sum(layer.errors[some] for layer, some in zip(layers, chosen, strict=True))
    return np.asarray(errors), np.asarray(sum(layer.costs[some] for layer, some in zip(layers, chosen, strict=True)))


class Heads:
    """The attention of one block, with what calibration says of it."""

    def __init__(self, prefix: str, attention: Any, statistics: Statistics) -> None:
        self.prefix, self.width = prefix, attention.head_dim
        self.weights = {part: getattr(attention, part).weight.detach().double() for part in _PROJECTIONS}
        self.outputs = {part: _damped(statistics.output_moment(f"{prefix}.{part}")) for part in _PROJECTIONS}
        self.inputs = {part: _damped(statistics.second_moment(f"{prefix}.{part}")) for part in _PROJECTIONS}
        # query heads that share a head of keys and values
        self.shared = len(self.weights["q_proj"]) // len(self.weights["k_proj"])
        self.count = len(self.weights["k_proj"]) // self.width

    def values(self) -> NeuronCurve:
        """Return what giving up entries of the values offers."""
        own, inverse = self._basis()
        change = torch.block_diag(*(inverse[head // self.shared] for head in range(self.count * self.shared)))
        rows, back = torch.block_diag(*own) @ self.weights["v_proj"], torch.block_diag(*inverse)
        columns, H = self.weights["o_proj"] @ change, self.outputs["o_proj"]
        undone = torch.linalg.inv(change)
        G = undone @ self.inputs["o_proj"] @ undone.T
        H_rows = back.T @ self.outputs["v_proj"] @ back
        groups = self._places(np.arange(self.width)[:, None])
        order, errors = eliminate(columns, H, G, groups)
        cuts = []
        for kept in _counts(len(groups)):
            some = np.sort(order[:kept])
            few = groups[some].ravel()
            moment = G[few][:, few]
            fitted = torch.linalg.solve(moment, (columns @ G)[:, few], left=False)
            layers = (
                _curve(self.prefix, "o_proj", fitted, H, moment),
                _curve(self.prefix, "v_proj", rows[some], H_rows[some][:, some], self.inputs["v_proj"]),
            )
            cuts.append(Cut(kept, SCALE * float(errors[kept]), layers))
        return self._curve("o_proj", "v_proj", errors, cuts)

    def queries(self) -> NeuronCurve:
        """Return what giving up pairs of entries of queries and keys offers.

        The loss is that of the queries, the other rows of which make up for those given up, as far as they can.
        """
        half = self.width // 2
        pairs = np.arange(half)[:, None] + np.array([0, half])
        groups = self._places(pairs)
        keys = (np.arange(self.count)[:, None, None] * self.width + pairs).reshape(len(groups), -1)
        W, H, G = self.weights["q_proj"], self.outputs["q_proj"], self.inputs["q_proj"]
        order, errors = eliminate(W.T, G, H, groups)
        cuts = []
        for kept in _counts(len(groups)):
            some = np.sort(order[:kept])
            few, few_keys = groups[some].ravel(), keys[some].ravel()
            moment, of_keys = H[few][:, few], self.outputs["k_proj"][few_keys][:, few_keys]
            fitted = torch.linalg.solve(moment, (H @ W)[few])
            layers = (
                _curve(self.prefix, "q_proj", fitted, moment, G),
                _curve(self.prefix, "k_proj", self.weights["k_proj"][few_keys], of_keys, self.inputs["k_proj"]),
            )
            cuts.append(Cut(kept, SCALE * float(errors[kept]), layers))
        return self._curve("q_proj", "k_proj", errors, cuts)

    def _basis(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each head of values a basis, and its inverse, in which few entries carry most of the output.

        With `S` the second moment of what arrives at the output projection from its query heads, and `T` what entries
        of it count there, the eigenvectors of ``S^(1/2) T S^(1/2)``, divided by the root of `S`.
        """
        own, inverse = [], []
        for head in range(self.count):
            S = T = torch.zeros(self.width, self.width, dtype=torch.float64)
            for query in range(head * self.shared, (head + 1) * self.shared):
                part = slice(query * self.width, (query + 1) * self.width)
                columns = self.weights["o_proj"][:, part]
                S, T = S + self.inputs["o_proj"][part, part], T + columns.T @ self.outputs["o_proj"] @ columns
            values, vectors = torch.linalg.eigh(S)
            root = (vectors * values.sqrt()) @ vectors.T
            turned = torch.linalg.eigh(root @ T @ root)[1]
            own.append(turned.T @ torch.linalg.inv(root))
            inverse.append(root @ turned)
        return own, inverse

    def _places(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return, for groups of places within a head of keys or values, those in the query heads that share it."""
        queries = np.arange(self.count * self.shared).reshape(self.count, 1, self.shared, 1) * self.width
        return (queries + places[None, :, None, :]).reshape(self.count * len(places), -1)

    def _curve(self, consumer: str, producer: str, errors: np.ndarray[Any, Any], cuts: Sequence[Cut]) -> NeuronCurve:
        both = consumer, producer
        shapes = tuple((int(m), int(n)) for m, n in (self.weights[part].shape for part in both))
        kept = np.arange(1, len(errors) - 1)
        costs = kept * (sum(m * n for m, n in shapes) // (len(errors) - 1))
        first, second = (f"{self.prefix}.{part}" for part in both)
        return NeuronCurve(first, (second,), shapes, SCALE * errors[kept], costs, tuple(cuts))


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def eliminate(
    A: Tensor, H: Tensor, G: Tensor, groups: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give up groups of inputs of a matrix, the cheapest first, as `cur.weighted.inputs` does with single inputs.

    Returns the groups by importance, and the squares of the weighted error with the first 0, 1, ... kept.
    """
    V, inverse = weights.matrix(H).apply(A, 0), torch.linalg.inv(G)
    gone: list[int] = []
    costs: list[float] = []
    left, place = np.arange(len(groups)), np.arange(A.shape[1])
    while len(left):
        at = torch.as_tensor(place[groups[left]])
        Y = V.T[at]
        blocks = inverse[at[:, :, None], at[:, None, :]]
        price = torch.linalg.solve(blocks, Y @ Y.mT).diagonal(dim1=1, dim2=2).sum(1)
        least = int(price.argmin())
        gone.append(int(left[least]))
        costs.append(float(price[least]))
        stay = torch.ones(V.shape[1], dtype=torch.bool)
        stay[at[least]] = False
        spread = torch.linalg.solve(blocks[least], inverse[at[least]][:, stay])
        V = V[:, stay] - V[:, at[least]] @ spread
        inverse = inverse[stay][:, stay] - inverse[stay][:, at[least]] @ spread
        place = place - np.searchsorted(np.sort(at[least].numpy()), place)
        left = np.delete(left, least)
    return np.array(gone[::-1]), np.append(np.cumsum(costs)[::-1], 0.0)


def _curve(prefix: str, part: str, W: Tensor, H: Tensor, G: Tensor) -> LayerCurve:
    squares = square_errors(W, row_weights=H, column_weights=G)
    return LayerCurve.of(f"{prefix}.{part}", (int(W.shape[0]), int(W.shape[1])), squares, SCALE)


def _counts(whole: int) -> list[int]:
    return [round(share * whole) for share in SHARES]


def _damped(moment: Tensor) -> Tensor:
    return moment + DEFAULT.damping * float(moment.diagonal().mean()) * torch.eye(len(moment), dtype=moment.dtype)


if __name__ == "__main__":
    main()
