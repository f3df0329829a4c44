"""Compare what methods keep of a model at the same number of parameters.

SmolLM2-135M-Instruct, dense as it is shipped (what that is, is in ``off_grid.py``); all linear layers of all blocks,
the share of their parameters that is kept: 0.9, 0.8, 0.6. Calibration on windows of 512 tokens from all over WikiText-2
``valid.txt``; ours, and baselines with "own text", on a quarter of that which the model wrote itself besides.
Perplexity over windows of 1024 tokens of WikiText-2 ``test.txt`` and of the CPython language reference, each window on
its own, float32 on the CPU.

The baselines (`benchmarks/baselines`) are written from their papers' formulas, in float64 and with the same
calibration.

    python benchmarks/quality.py [--wikitext DIR] [--windows 40] [--only METHOD ...] [--keep 0.9 0.8 0.6] [--again]

prints a table and writes ``benchmarks/results/quality.json`` and ``docs/quality.svg``. Rows that are there already, of
the same calibration and of as many windows or more, are kept unless ``--again`` is given. ``--cache DIR`` keeps the
calibration there, and reads it from there the next time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.baselines import (
    activation_scaled,
    cur_factors,
    dynamic_ranks,
    effective_rank,
    fisher_weighted,
    measure,
    nearest,
    reconstruct_,
    refit,
    whitened,
)
from benchmarks.environment import add_precision, environment, precision_of
from cur import ranks
from cur.healing import HealingConfig, heal
from cur.integrations import (
    BudgetConfig,
    Statistics,
    batches,
    collect,
    decoder_layers,
    linear_modules,
    load_model,
    perplexity,
    read_text,
    token_windows,
)
from cur.integrations.compress import carry_out, planned
from cur.integrations.measure.generated_text import own_text, sample_windows
from cur.integrations.measure.text import evenly
from cur.integrations.nn import Int8Linear
from cur.integrations.quantize import quantizable, quantize_
from cur.integrations.sources import InMemory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PICTURE = ROOT / "docs" / "quality.svg"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

KEEP = (0.9, 0.8, 0.6)
DEFAULT = BudgetConfig(keep=0.5)
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# Calibration texts: what is given, and the same with what the model wrote itself.
GIVEN, BOTH = "given", "both"
# Windows for the squared gradients of FWSVD and the magnitudes of ASVD, which need few.
DIAGONAL_WINDOWS = 16
HEALING_LENGTH = 256
# Windows on which rows of more are scored as well, so that they can be compared with others.
FEW = 8


Made = tuple[Any, int]
"""The compressed model and the bytes of its targeted layers; a number that is not rounded to int8 takes two."""


@dataclass
class Known:
    """What methods may use: the dense model, what calibration says of it, and the rest of the text."""

    dense: Any
    windows: dict[str, Tensor]
    rest: Tensor
    statistics: dict[str, Statistics]
    names: list[str]
    precision: str
    memory: dict[str, Any] = field(default_factory=dict)
    made: dict[float, Made] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What a method says of itself besides, for its row."""

    def weight(self, name: str) -> Tensor:
        """Return a weight in float64."""
        return self.dense.get_submodule(name).weight.detach().double()

    def moment(self, name: str, text: str) -> Tensor:
        """Return the second moment of a layer's inputs on a calibration text, damped as for every method."""
        G = self.statistics[text].second_moment(name)
        return G + DEFAULT.damping * float(G.diagonal().mean()) * torch.eye(len(G), dtype=G.dtype)

    @cached_property
    def diagonals(self) -> Any:
        """Squared gradients of rows and magnitudes of inputs."""
        return measure(self.dense, self.windows[GIVEN][:DIAGONAL_WINDOWS], self.names, progress=count("diagonals"))

    @cached_property
    def fresh(self) -> Tensor:
        """Windows to heal on, none of which was calibrated on: of the given text and the model's own, evenly mixed."""
        config = HealingConfig()
        windows = config.steps * config.batch_size + config.held_out
        own = round(windows * DEFAULT.own_text / (1 + DEFAULT.own_text))
        given = self.rest.reshape(-1, HEALING_LENGTH)
        if len(given) < windows - own:
            sys.exit(f"healing needs {windows - own} windows that are not calibrated on; ask for less --calibration")
        given = given[evenly(windows - own, len(given))]
        written = sample_windows(
            self.dense,
            count=own,
            length=HEALING_LENGTH,
            seed=DEFAULT.seed + 1,
            precision=self.precision,
            progress=count("sample"),
        )
        places = torch.cat([torch.arange(0.5, len(part)) / len(part) for part in (given, written)])
        return torch.cat([given, written])[places.argsort(stable=True)]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of every layer."""
        return {name: tuple(self.dense.get_submodule(name).weight.shape) for name in self.names}

    def uniform(self, keep: float, layout: str) -> dict[str, int]:
        """Return the ranks that keep the same share of every layer."""
        return {name: ranks.rank_for(m, n, keep * m * n, layout=layout) for name, (m, n) in self.shapes().items()}

    def once(self, key: str, make: Callable[[str], Any]) -> dict[str, Any]:
        """Make something of every layer, or recall what the method before made under the same key."""
        if key not in self.memory:
            self.memory.clear()
            self.memory[key] = {}
            for done, name in enumerate(self.names, start=1):
                self.memory[key][name] = make(name)
                count(key)(done, len(self.names))
        found: dict[str, Any] = self.memory[key]
        return found


def layer_by_layer(layout: str, product: Callable[[Known, str, int], Tensor]) -> Callable[[Known, float], Made]:
    """Make a method that gives every layer the same share, on its own."""

    def run(known: Known, keep: float) -> Made:
        chosen = known.uniform(keep, layout)
        return _with(known, {name: product(known, name, rank) for name, rank in chosen.items()}, chosen, layout)

    return run


def svd_llm(layout: str, text: str = GIVEN) -> Callable[[Known, float], Made]:
    """Make SVD-LLM in a layout: as two factors, or as rows and coefficients, which is PIFA."""
    return layer_by_layer(layout, lambda known, name, rank: _whitened(known, name, rank, text))


def d_rank(known: Known, keep: float) -> Made:
    """Return D-Rank."""
    spectra = [known.once(f"whitened {GIVEN}", _whiten(known, GIVEN))[name][1] for name in known.names]
    shapes = list(known.shapes().values())
    effective = [effective_rank(values) for values in spectra]
    found = dynamic_ranks(effective, shapes, keep * sum(m * n for m, n in shapes))
    chosen = dict(zip(known.names, found, strict=True))
    return _with(known, {name: _whitened(known, name, rank, GIVEN) for name, rank in chosen.items()}, chosen, "folded")


def mpifa(known: Known, keep: float, text: str = GIVEN) -> Made:
    """Return MPIFA."""
    chosen = known.uniform(keep, "interpolative")
    factors = known.once(f"whitened {text}", _whiten(known, text))
    model = copy.deepcopy(known.dense)

    def fit(name: str, student: Tensor, cross: Tensor) -> Tensor:
        rank = chosen[name]
        _, values, right = factors[name]
        left, right = refit(
            known.weight(name), values[:rank, None].sqrt() * right[:rank], student, cross, damping=DEFAULT.damping
        )
        return left @ right

    blocks = [name for name, _ in decoder_layers(model)]
    reconstruct_(model, known.dense, known.windows[text], blocks, GROUPS, fit, progress=count("reconstruct"))
    shapes = known.shapes()
    return model, 2 * sum(ranks.parameters(*shapes[n], rank, layout="interpolative") for n, rank in chosen.items())


def ours(text: str = BOTH, **options: Any) -> Callable[[Known, float], Made]:
    """Make our method, as ``cur compress`` has it."""

    def run(known: Known, keep: float) -> Made:
        model = copy.deepcopy(known.dense)
        given = list(batches(known.windows[text], batch_size=4))
        source = InMemory(model, given, statistics=known.statistics[text], precision=known.precision, progress=_stage)
        statistics, plan = planned(source, BudgetConfig(keep=keep, **options))
        carry_out(source, plan, statistics)
        chosen = {entry.name: entry.parameters for entry in plan.entries}
        return model, 2 * sum(chosen.get(name, m * n) for name, (m, n) in known.shapes().items())

    return run


def best(known: Known, keep: float) -> Made:
    """Return our method as it is by default, made once for its own row and for those that go on from it."""
    if keep not in known.made:
        known.made[keep] = ours()(known, keep)
    model, stored = known.made[keep]
    return copy.deepcopy(model), stored


def healed(method: Callable[[Known, float], Made]) -> Callable[[Known, float], Made]:
    """Make a method whose cores are trained against the dense model, on text that it was not calibrated on.

    100 steps of 4 windows of 256 tokens, all else as it is by default.
    """

    def run(known: Known, keep: float) -> Made:
        model, stored = method(known, keep)
        report = heal(model, known.dense, known.fresh, HealingConfig(precision=known.precision), progress=_healing)
        known.facts["healing"] = {
            "numbers": report.trainable,
            "before": report.before["kl"],
            "divergence": {str(int(found["step"])): found["kl"] for found in report.curve},
            "seconds": report.seconds,
        }
        return model, stored

    return run


def _healing(status: Any) -> None:
    count(status.stage)(status.step, status.steps)


def _stage(stage: str, done: int, total: int | None) -> None:
    count(stage)(done, total)


def int8(method: Callable[[Known, float], Made]) -> Callable[[Known, float], Made]:
    """Make a method whose factors, and the layers it leaves dense, are rounded to int8, as ``cur quantize`` has it.

    Of bytes, the steps of the rows count two each.
    """

    def run(known: Known, keep: float) -> Made:
        model, _ = method(known, keep)
        given, names = batches(known.windows[GIVEN], batch_size=4), quantizable(model)
        statistics = collect(
            model, given, modules=names, moments="full", precision=known.precision, progress=count("inputs")
        )
        quantize_(model, statistics, progress=count("round"))
        factors = [part for part in model.modules() if isinstance(part, Int8Linear)]
        return model, sum(part.integers.numel() + 2 * part.scale.numel() for part in factors)

    return run


def nothing(known: Known, keep: float) -> Made:
    """Return the model as it is."""
    return copy.deepcopy(known.dense), 2 * sum(m * n for m, n in known.shapes().values())


METHODS: dict[str, Callable[[Known, float], Made]] = {
    "truncated SVD": layer_by_layer("folded", lambda k, name, rank: _product(nearest(k.weight(name), rank))),
    "FWSVD": layer_by_layer(
        "folded", lambda k, name, rank: _product(fisher_weighted(k.weight(name), k.diagonals.fisher[name], rank))
    ),
    "ASVD": layer_by_layer(
        "folded", lambda k, name, rank: _product(activation_scaled(k.weight(name), k.diagonals.magnitude[name], rank))
    ),
    "CURing": layer_by_layer(
        "cur", lambda k, name, rank: _product(cur_factors(k.weight(name), k.statistics[GIVEN].x_norm(name), rank))
    ),
    "SVD-LLM": svd_llm("folded"),
    "D-Rank": d_rank,
    "PIFA": svd_llm("interpolative"),
    "MPIFA": mpifa,
    "PIFA, own text": svd_llm("interpolative", BOTH),
    "MPIFA, own text": functools.partial(mpifa, text=BOTH),
    "ours, `--method best`": best,
    "ours, `--method best`, int8": int8(best),
    "ours, `--method best`, healed": healed(best),
    "ours, `--method rows`": ours(method="rows"),
    "ours, `--no-neurons`": ours(neurons=False),
    "ours, `--no-gradients`": ours(gradients=False),
    "ours, `--own-text 0`": ours(GIVEN),
    "ours, `--correction 0`": ours(correction=0.0),
    "dense, int8": int8(nothing),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=40, help="windows of 1024 tokens to score")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares of parameters to keep")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to measure")
    parser.add_argument("--again", action="store_true", help="measure what is in the results again")
    parser.add_argument("--cache", type=Path, help="directory that keeps the calibration")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_precision(parser)
    options = parser.parse_args()

    dense, tokenizer, source = load_model()
    names = linear_modules(dense, "all-linear", blocks=range(len(decoder_layers(dense))))
    windows, rest = calibration_windows(tokenizer, options.wikitext, options.calibration)
    held_out = {
        name: token_windows(tokenizer, text, length=1024, count=options.windows, name=name)
        for name, text in {
            "WikiText-2": read_text(options.wikitext / "test.txt"),
            "language reference": "\n\n".join(topics.values()),
        }.items()
    }
    kept = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.exists() else []
    precision = precision_of(dense, options, kept[0]["products"] if kept else None)
    known, seconds = calibrate(dense, windows, rest, names, options.cache, precision)
    hashes = {name: _digest(part) for name, part in known.windows.items()}
    result = _earlier(options.out, hashes)
    result.update(
        {
            "question": "Which method keeps most of a model at the same number of parameters?",
            "model": source,
            "few windows": FEW,
            "calibration": {
                "file": "valid.txt",
                "windows": len(windows),
                "own": len(known.windows[BOTH]) - len(windows),
                "length": 512,
                "hashes": hashes,
                "seconds": {**result.get("calibration", {}).get("seconds", {}), **seconds},
            },
            "linear_parameters": sum(dense.get_submodule(name).weight.numel() for name in names),
            "parameters": sum(parameter.numel() for parameter in dense.parameters()),
            **environment(),
        }
    )
    dense_at = result.setdefault("dense", {"perplexity": {name: {} for name in held_out}})["perplexity"]
    if any(
        str(number) not in dense_at[name]
        for name in held_out
        for number in {options.windows, min(FEW, options.windows)}
    ):
        for name, found in perplexities(dense, held_out, "dense", precision).items():
            dense_at[name].update(found)
        _write(options.out, result)
    for title in options.only:
        for keep in (1.0,) if title.startswith("dense") else options.keep:
            earlier = [row for row in result["rows"] if (row["method"], row["keep"]) == (title, keep)]
            if not options.again and any(row["windows"] >= options.windows for row in earlier):
                continue
            known.facts.clear()
            start = time.perf_counter()
            model, stored = METHODS[title](known, keep)
            took = time.perf_counter() - start
            scores = perplexities(model, held_out, f"{title}, {keep}", precision)
            row = {
                "method": title,
                "keep": keep,
                "bytes": stored,
                "seconds": took,
                "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "windows": options.windows,
                "products": precision,
                "perplexity": {text: values[str(options.windows)] for text, values in scores.items()},
                "perplexity of few": {text: values[str(min(FEW, options.windows))] for text, values in scores.items()},
                **known.facts,
            }
            del model
            result["rows"] = [other for other in result["rows"] if other not in earlier] + [row]
            _write(options.out, result)
    _print(result)
    draw(result, PICTURE)
    print(f"written: {options.out}, {PICTURE}")


def calibration_windows(tokenizer: Any, wikitext: Path, number: int) -> tuple[Tensor, Tensor]:
    """Return windows of 512 tokens from all over the calibration text, and the others."""
    if not wikitext.is_dir():
        sys.exit(f"{wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")
    text = read_text(wikitext / "valid.txt")
    every = token_windows(tokenizer, text, length=512, name="valid.txt")
    windows = token_windows(tokenizer, text, length=512, count=number, spread=True, name="valid.txt")
    return windows, every[~(every[:, None] == windows).all(dim=-1).any(dim=1)]


def calibrate(
    model: Any, windows: Tensor, rest: Tensor, names: list[str], cache: Path | None, precision: str
) -> tuple[Known, dict[str, float]]:
    """Let the model write text; measure second moments of inputs and output gradients on both texts, or read them."""
    written = _file(cache, f"own-{_digest(windows)}-{DEFAULT.own_text}-{precision}.safetensors")
    seconds: dict[str, float] = {}
    if written is not None and written.exists():
        own = load_file(written)["windows"]
    else:
        start = time.perf_counter()
        given = batches(windows, batch_size=4)
        texts = own_text(
            model,
            given,
            share=DEFAULT.own_text,
            batch_size=4,
            seed=DEFAULT.seed,
            precision=precision,
            progress=count("sample"),
        )
        own = torch.cat([batch["input_ids"] for batch in texts])
        seconds["sample"] = time.perf_counter() - start
        if written is not None:
            save_file({"windows": own}, written)
    parts = []
    for name, part in (("given", windows), ("own", own)):
        file = _file(cache, f"{name}-{_digest(part)}-{precision}.statistics.safetensors")
        if file is not None and file.exists():
            parts.append(Statistics.load(file))
            continue
        start = time.perf_counter()
        given = list(batches(part, batch_size=4))
        watch = count(f"calibrate, {name}")
        statistics = collect(
            model, given, modules=names, moments="full", gradients=names, precision=precision, progress=watch
        )
        seconds[name] = time.perf_counter() - start
        parts.append(statistics)
        if file is not None:
            statistics.save(file)
    both = {GIVEN: windows, BOTH: torch.cat([windows, own])}
    return Known(model, both, rest, {GIVEN: parts[0], BOTH: _together(*parts)}, names, precision), seconds


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]


def _file(cache: Path | None, name: str) -> Path | None:
    return None if cache is None else cache / name


def _together(one: Statistics, other: Statistics) -> Statistics:
    """Return the statistics of two texts as if measured at once; layers that share a sum go on doing so.

    They do not say that some of it is the model's own, which is among the batches already and not to be written again.
    """
    made: dict[tuple[int, int], Tensor] = {}

    def add(a: Any, b: Any) -> dict[str, Any]:
        return {
            name: made.setdefault((id(a[name]), id(b[name])), a[name] + b[name])
            if isinstance(a[name], Tensor)
            else a[name] + b[name]
            for name in a
        }

    kinds = ("square_sums", "products", "output_products", "counts", "output_counts")
    sums = {kind: add(getattr(one, kind), getattr(other, kind)) for kind in kinds}
    totals = {"tokens": one.tokens + other.tokens, "samples": one.samples + other.samples}
    return dataclasses.replace(one, **sums, **totals)


def perplexities(
    model: nn.Module, held_out: dict[str, Tensor], what: str, precision: str
) -> dict[str, dict[str, float]]:
    """Score a model on every text: on all windows, and on the first :data:`FEW`, by how many they are."""
    values: dict[str, dict[str, float]] = {}
    for name, windows in held_out.items():
        nll, tokens, done = 0.0, 0, 0
        values[name] = {}
        for part in filter(len, (windows[:FEW], windows[FEW:])):
            found = perplexity(model, part, precision=precision, progress=count(f"{what}: {name}"))
            nll, tokens, done = nll + found.nll, tokens + found.tokens, done + len(part)
            values[name][str(done)] = math.exp(nll / tokens)
        print(f"-> {values[name][str(done)]:.2f}", file=sys.stderr, flush=True)
    return values


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity over the dense model's against the bytes of the linear layers, a panel for each text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    matplotlib.rcParams["svg.hashsalt"] = "cur"
    texts = result["dense"]["perplexity"]
    figure, panels = plt.subplots(1, len(texts), figsize=(10, 5), sharex=True, layout="constrained")
    # all but the greys, which stand for the dense model
    palette = [color for place, color in enumerate(matplotlib.colormaps["tab20"].colors) if place not in (14, 15)]
    colors = {title: palette[place % len(palette)] for place, title in enumerate(METHODS)}
    for panel, (text, dense) in zip(panels, texts.items(), strict=True):
        for title in METHODS:
            rows = sorted((row for row in result["rows"] if row["method"] == title), key=lambda row: row["bytes"])
            ratios = [row["perplexity"][text] / dense[str(row["windows"])] for row in rows]
            points = [(row["bytes"] / 2**20, ratio) for row, ratio in zip(rows, ratios, strict=True) if ratio < 100]
            if points:
                own = title.startswith("ours")
                style: dict[str, Any] = {"linewidth": 2.2, "marker": "o"} if own else {"linewidth": 1, "marker": "."}
                panel.plot(*zip(*points, strict=True), label=title.replace("`", ""), color=colors[title], **style)
        panel.axhline(1, color="grey", linestyle=":", label="dense")
        panel.set_yscale("log")
        panel.set_yticks([1, 1.2, 1.5, 2, 3, 5, 10, 20, 50])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.autoscale(axis="y")
        panel.set_xlabel("MiB of the linear layers (two bytes a number, or int8)")
        panel.set_title(text)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity / that of the dense model")
    lines = {line.get_label(): line for panel in panels for line in panel.lines}
    figure.legend(lines.values(), lines.keys(), fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def count(what: str) -> Callable[[int, int | None], Any]:
    """Make a function that shows how far a stage is."""
    return lambda done, total: print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)


def _whiten(known: Known, text: str) -> Callable[[str], Any]:
    return lambda name: whitened(known.weight(name), known.moment(name, text))


def _whitened(known: Known, name: str, rank: int, text: str) -> Tensor:
    left, values, right = known.once(f"whitened {text}", _whiten(known, text))[name]
    product: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return product


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[1]


def _with(known: Known, products: dict[str, Tensor], chosen: dict[str, int], layout: str) -> Made:
    """Put products of factors into a copy of the model: what a layer of these factors computes."""
    model = copy.deepcopy(known.dense)
    for name, product in products.items():
        model.get_submodule(name).weight.data.copy_(product)
    shapes = known.shapes()
    return model, 2 * sum(ranks.parameters(*shapes[name], rank, layout=layout) for name, rank in chosen.items())


def _earlier(path: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """Return the results that are there; of another calibration, those of the dense model."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("calibration", {}).get("hashes") != hashes:
        found = {key: value for key, value in found.items() if key == "dense"}
    found.setdefault("rows", [])
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    order = {title: place for place, title in enumerate(METHODS)}
    result["rows"].sort(key=lambda row: (order.get(row["method"], len(order)), -row["keep"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _print(result: dict[str, Any]) -> None:
    dense = result["dense"]["perplexity"]
    print(f"\ndense: {dense}")
    for row in result["rows"]:
        values = " / ".join(f"{value:.2f}" for value in row["perplexity"].values())
        lost = " / ".join(
            f"{math.log(value / dense[text][str(row['windows'])]):.3f}" for text, value in row["perplexity"].items()
        )
        print(f"{row['keep']}  {row['method']:28} {values:24} ln ratio {lost}")


if __name__ == "__main__":
    main()
