"""Rounding of single layers: weighted errors and seconds of nearest rounding and of nearest plane.

Matrices of normal numbers under weights of flat and of decaying spectra, and layers of SmolLM2-135M-Instruct with
second moments of a little text, taken off the grid that they are shipped on (``off_grid.py``). Errors are in the norm
of both weights; seconds are those of one thread.

    python benchmarks/rounding.py layers [--model DIR] [--wikitext DIR] [--without-model]

prints a table and writes ``benchmarks/results/rounding.json``. About a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.off_grid import leave_grid_
from cur.rounding import round_to_grid

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rounding.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

SIZES = ((192, 64), (384, 192), (576, 576), (1536, 576), (576, 1536))
BITS = (2, 3, 4, 8)
GROUP = 64
DAMPING = 0.01
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCK = 14
Problem = tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def made(rng: np.random.Generator) -> Iterator[Problem]:
    """Yield matrices of normal numbers with weights that are nearly flat, or of decaying spectrum."""
    for m, n in SIZES:
        for name, moment in (("flat", flat), ("decaying", decaying)):
            W = rng.standard_normal((m, n)).astype(np.float32)
            yield f"{name} {m} x {n}", W, moment(m, rng), moment(n, rng)


def flat(n: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return second moments of a few independent inputs."""
    X = rng.standard_normal((n, 4 * n))
    return X @ X.T / (4 * n)


def decaying(n: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return second moments whose eigenvalues fall like the index, of channels of very different sizes."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    d = np.exp(0.5 * rng.standard_normal(n))
    G = (Q / np.arange(1, n + 1.0)) @ Q.T * (d * d[:, None])
    return (G + G.T) / 2


def of_the_model(options: argparse.Namespace) -> Iterator[Problem]:
    """Yield layers of one block, off the grid that they are shipped on, with second moments of a little text."""
    import torch

    from cur.integrations import batches, collect, decoder_layers, load_model, read_text, token_windows

    torch.set_num_threads(1)
    model, tokenizer, _ = load_model(options.model, dtype=torch.float32)
    leave_grid_(model)
    text = read_text(options.wikitext / "valid.txt")
    windows = token_windows(tokenizer, text, length=512, count=options.windows, name="valid.txt")
    name, _ = decoder_layers(model)[BLOCK]
    names = [f"{name}.{layer}" for layer in LAYERS]
    statistics = collect(model, list(batches(windows, batch_size=1)), modules=names, moments="full", gradients=names)
    for layer, full in zip(LAYERS, names, strict=True):
        W = model.get_submodule(full).weight.detach().float().numpy()
        H, G = statistics.output_moment(full).double().numpy(), statistics.second_moment(full).double().numpy()
        yield f"{layer} {W.shape[0]} x {W.shape[1]}", W, H, G


def measured(problem: Problem, bits: int) -> dict[str, Any]:
    """Round one layer in three ways and return errors and seconds."""
    name, W, H, G = problem
    damped = [X + DAMPING * np.trace(X) / len(X) * np.eye(len(X)) for X in (H, G)]
    ways: dict[str, dict[str, Any]] = {
        "nearest": {},
        "one": {"column_weights": G},
        "both": {"row_weights": H, "column_weights": G},
    }
    row: dict[str, Any] = {"layer": name, "bits": bits}
    for way, weights in ways.items():
        begin = time.process_time()
        result = round_to_grid(W, bits=bits, group=GROUP, damping=DAMPING, **weights)
        row[f"seconds, {way}"] = time.process_time() - begin
        E = W.astype(np.float64) - result.toarray()
        row[way] = float(np.sqrt(np.sum((damped[0] @ E) * (E @ damped[1]))))
        row[f"clipped, {way}"] = result.clipped
    return row


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="rounding.py layers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory of a model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens")
    parser.add_argument("--without-model", action="store_true", help="matrices of random numbers alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    problems = [*made(rng)]
    if not options.without_model:
        if not options.wikitext.is_dir():
            sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR, or --without-model")
        problems += of_the_model(options)
    print(f"{'layer':28}{'bits':>5}{'one/nearest':>13}{'both/one':>10}{'seconds: one':>14}{'both':>7}{'ratio':>7}")
    rows = []
    for problem in problems:
        for bits in BITS if "x 64" in problem[0] or problem[0].split()[0] in LAYERS else (3, 4):
            row = measured(problem, bits)
            rows.append(row)
            one, both = row["seconds, one"], row["seconds, both"]
            print(
                f"{row['layer']:28}{bits:5}{row['one'] / row['nearest']:13.3f}{row['both'] / row['one']:10.3f}"
                f"{one:14.2f}{both:7.2f}{both / one:7.1f}",
                flush=True,
            )
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "group": GROUP,
        "damping": DAMPING,
        "windows": None if options.without_model else options.windows,
        "layers": rows,
        **environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")
