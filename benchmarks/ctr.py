"""Compare what is left of a click model, tables of embeddings and network alike, at the same number of parameters.

The data is synthetic. Every sample has eight fields, one token of each, and four numbers. Tokens are drawn from Zipf's
law (exponent 1.05) on vocabularies of 20 to 10,000, in an order that says nothing. Each token has five latent numbers
and one of its own, all normal; the log-odds of a click are the sum of all products of pairs of latent vectors, the
tokens' own numbers and a linear and a quadratic function of the four numbers, with mean 0 and standard deviation 1.7.
The best possible AUC on such clicks is printed. The model, of the kind of DeepFM and DLRM, has tables of 16 features, a
sum over products of pairs, and a network of 128 and 64 neurons on all features; it is trained by Adam, and tested on
samples that neither training nor calibration has seen.

At each share of the parameters in tables and linear layers:

- the weights' own singular value decomposition, the same share in every layer, the largest that the budget allows;
- that of the centred outputs on the calibration samples, likewise, as "Unified Low-rank Compression Framework for
  Click-through Rate Prediction" (arXiv 2405.18146) does it before it trains again;
- `compress` to the budget: shared by the errors of outputs, shared by a loss, and keeping rows of tables and weights.

No training follows.

    python benchmarks/ctr.py [--seeds 3] [--keep 0.6 0.4 0.25 0.15 0.1]

prints a table and writes ``benchmarks/results/ctr.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks.environment import environment
from cur.integrations import BudgetConfig, compress
from cur.integrations.model.hooks import outputs_of
from cur.integrations.nn import CompressedLinear, EmbeddingFactors, InterpolativeLinear, dense_weight, is_table, swap_

RESULTS = Path(__file__).resolve().parent / "results" / "ctr.json"
SIZES = (10_000, 4_000, 2_000, 1_000, 500, 200, 50, 20)
NUMBERS, LATENT, WIDTH = 4, 5, 16
TRAIN, TEST, CALIBRATION = 200_000, 50_000, 8_192
KEEP = (0.6, 0.4, 0.25, 0.15, 0.1)
TARGETS = ("all-linear", "all-embeddings")


class Clicks:
    """Samples of one random world: tokens, numbers, and whether there was a click."""

    def __init__(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        popular = [1.0 / np.arange(1, size + 1) ** 1.05 for size in SIZES]
        names = [rng.permutation(size) for size in SIZES]
        tokens = np.stack(
            [name[rng.choice(len(p), count, p=p / p.sum())] for name, p in zip(names, popular, strict=True)], axis=1
        )
        latent = [rng.standard_normal((size, LATENT)) for size in SIZES]
        own = [rng.standard_normal(size) for size in SIZES]
        numbers = rng.standard_normal((count, NUMBERS))
        vectors = np.stack([table[tokens[:, field]] for field, table in enumerate(latent)], axis=1)
        pairs = (np.square(vectors.sum(axis=1)) - np.square(vectors).sum(axis=1)).sum(axis=1) / 2
        odds = pairs / pairs.std() + sum(table[tokens[:, field]] for field, table in enumerate(own)) / 4
        odds += numbers @ rng.standard_normal(NUMBERS) / 4 + np.square(numbers) @ rng.standard_normal(NUMBERS) / 8
        self.odds = 1.7 * (odds - odds.mean()) / odds.std()
        self.clicked = rng.random(count) < 1 / (1 + np.exp(-self.odds))
        self.tensors = (
            torch.from_numpy(numbers).float(),
            torch.from_numpy(tokens),
            torch.from_numpy(self.clicked).float(),
        )

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        numbers, tokens, clicked = (tensor[start:stop] for tensor in self.tensors)
        return numbers, tokens, clicked


class ClickModel(nn.Module):
    """Tables, products of pairs, and a network on all features."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in SIZES)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)
        inputs = NUMBERS + WIDTH * len(SIZES)
        layers = [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)]
        self.network = nn.Sequential(*layers)

    def forward(self, numbers: Tensor, tokens: Tensor) -> Tensor:
        vectors = torch.stack([table(tokens[:, field]) for field, table in enumerate(self.tables)], dim=1)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        score: Tensor = pairs + self.network(torch.cat([numbers, vectors.flatten(1)], dim=1))[:, 0]
        return score


def forward(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    score: Tensor = model(batch[0], batch[1])
    return score


def loss(score: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(score, batch[2])


def trained(data: Clicks, seed: int) -> ClickModel:
    """Return a model after two passes over the data."""
    torch.manual_seed(seed)
    model = ClickModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(2):
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed + epoch))
        for some in order.split(1024):
            batch = tuple(tensor[some] for tensor in data.part(0, TRAIN))
            value = loss(forward(model, batch), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return model.eval()


def auc(score: np.ndarray[Any, Any], clicked: np.ndarray[Any, Any]) -> float:
    """Return the chance that a sample with a click has the higher score than one without."""
    ranks, ones = rankdata(score), int(clicked.sum())
    return float((ranks[clicked].sum() - ones * (ones + 1) / 2) / (ones * (len(clicked) - ones)))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if type(part) is nn.Linear or is_table(part)}


def size(model: nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())


@torch.no_grad()
def by_svd(model: ClickModel, keep: float, batch: tuple[Tensor, Tensor, Tensor], *, of_outputs: bool) -> nn.Module:
    """Return the model with the same share of every layer's parameters left, by singular vectors."""
    small = copy.deepcopy(model)
    layers = layers_of(small)
    share = _share(layers, keep)
    with outputs_of(small, layers) as outputs:
        forward(small, batch)
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        W, bias, _ = dense_weight(layer, name)
        m, n = W.shape
        kind = _kind(layer)
        if (rank := _rank(kind, m, n, share)) is None:
            continue
        W = W.double()
        if of_outputs:
            Y = outputs[name].reshape(-1, m).double()
            mean = Y.mean(0) if bias is not None else Y.new_zeros(m)
            U = torch.linalg.eigh((Y - mean).T @ (Y - mean)).eigenvectors.flip(1)[:, :rank]
            left, right = U, U.T @ W
            bias = None if bias is None else (U @ (U.T @ (bias.double() - mean)) + mean).float()
        else:
            U, s, Vh = torch.linalg.svd(W, full_matrices=False)
            left, right = U[:, :rank] * s[:rank], Vh[:rank]
        made[name] = kind.from_two_factors(left.float(), right.float(), bias=bias)
    swap_(small, made)
    return small.eval()


def _kind(layer: nn.Module) -> type[CompressedLinear]:
    return EmbeddingFactors if is_table(layer) else InterpolativeLinear


def _rank(kind: type[CompressedLinear], m: int, n: int, share: float) -> int | None:
    """Return the rank at which a layer has a share of its parameters; None if it stays dense."""
    rank = max(kind.rank_within(m, n, share * m * n), 1)
    return rank if kind.parameter_count(m, n, rank) < m * n else None


def _share(layers: dict[str, nn.Module], keep: float) -> float:
    """Return the largest share of every layer with which all of them together have no more than a budget."""
    shapes = [(_kind(layer), *dense_weight(layer, name)[0].shape) for name, layer in layers.items()]
    budget = keep * sum(m * n for _, m, n in shapes)

    def total(share: float) -> int:
        ranks = [_rank(kind, m, n, share) for kind, m, n in shapes]
        return sum(
            m * n if rank is None else kind.parameter_count(m, n, rank)
            for (kind, m, n), rank in zip(shapes, ranks, strict=True)
        )

    return max((share for share in np.linspace(0.0, 1.0, 2001) if total(float(share)) <= budget), default=0.0)


def by_budget(model: ClickModel, keep: float, batches: list[Any], **options: Any) -> nn.Module:
    """Return the model compressed to a budget."""
    small = copy.deepcopy(model)
    given = options.pop("loss", None)
    config = BudgetConfig(keep=keep, targets=TARGETS, gradients=given is not None, **options)
    compress(small, batches, config, forward=forward, loss=given)
    return small.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="worlds, and models trained in them")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares of parameters to keep")
    options = parser.parse_args()
    start = time.perf_counter()
    found: dict[tuple[str, float], list[tuple[float, int]]] = {}
    possible = []
    for seed in range(options.seeds):
        data = Clicks(seed, TRAIN + TEST)
        model = trained(data, seed)
        batches = [data.part(place, place + 1024) for place in range(0, CALIBRATION, 1024)]
        whole = data.part(0, CALIBRATION)
        held_out, clicked = data.part(TRAIN, TRAIN + TEST), data.clicked[TRAIN:]
        possible.append(auc(data.odds[TRAIN:], clicked))

        def measured(what: str, keep: float, small: nn.Module) -> None:
            with torch.no_grad():
                value = auc(forward(small, held_out).numpy(), clicked)
            found.setdefault((what, keep), []).append((value, size(small)))
            print(f"{seed}  {what:32} {keep:5.2f}  {value:.4f}  {size(small):,}", flush=True)

        measured("dense", 1.0, model)
        for keep in options.keep:
            measured("SVD of the weights", keep, by_svd(model, keep, whole, of_outputs=False))
            measured("SVD of the outputs", keep, by_svd(model, keep, whole, of_outputs=True))
            measured("budget by outputs", keep, by_budget(model, keep, batches))
            measured("budget by the loss", keep, by_budget(model, keep, batches, loss=loss))
            measured("budget, own rows, by the loss", keep, by_budget(model, keep, batches, loss=loss, method="rows"))
    rows = [
        {
            "what": what,
            "keep": keep,
            "auc": float(np.mean([value for value, _ in values])),
            "spread": float(np.std([value for value, _ in values])),
            "parameters": int(np.mean([number for _, number in values])),
        }
        for (what, keep), values in found.items()
    ]
    result = {
        "question": "What is left of a click model at the same number of parameters?",
        "seeds": options.seeds,
        "possible": float(np.mean(possible)),
        "rows": rows,
        "seconds": time.perf_counter() - start,
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"best possible {result['possible']:.4f}; {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
