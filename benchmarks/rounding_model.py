"""Rounding of a whole model: how far it predicts otherwise than the dense one, by method, bits and group.

SmolLM2-135M-Instruct, taken off the grid that it is shipped on (``off_grid.py``); all linear layers of all blocks.
Second moments of inputs and of gradients of outputs on 48 windows of 512 tokens from all over WikiText-2 ``valid.txt``.
Then, over windows of 1024 tokens of WikiText-2 ``test.txt`` and of the CPython language reference, each on its own and
in float32: the divergence of the distribution of the next token from the dense model's, and how often the most likely
token is the same. Methods are in ``rounding_methods.py``; all of them begin with the same weights, text and moments.

    python benchmarks/rounding.py model [--bits 4 ...] [--groups 64 ...] [--only METHOD ...] [--windows 6] [--again]

prints a table and writes ``benchmarks/results/rounding_model.json``, after every row, and ``docs/rounding.svg``. Rows
that are there already, of the same calibration and of as many windows or more, are kept unless ``--again`` is given.
The calibration is kept in ``--cache`` and read from there the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.baselines import magnitudes
from benchmarks.divergence import References
from benchmarks.environment import add_precision, environment
from benchmarks.off_grid import SEED, SPREAD, leave_grid_
from benchmarks.rounding_methods import DAMPING, METHODS, Known, Made, int4_of_torchao, sharing
from benchmarks.rounding_picture import draw
from cur._lib.interval import interval
from cur.integrations import (
    Statistics,
    batches,
    collect,
    decoder_layers,
    linear_modules,
    load_model,
    read_text,
    token_windows,
)
from cur.integrations.model.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rounding_model.json"
CACHE = ROOT / "benchmarks" / "cache"
PICTURE = ROOT / "docs" / "rounding.svg"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

# Bits and group, in the order in which they are measured.
SETTINGS = ((4, 64), (3, 64), (8, 64), (2, 64), (6, 64), (5, 64), (4, 32), (4, 128), (3, 32), (3, 128))
BITS, GROUPS = (sorted({setting[place] for setting in SETTINGS}) for place in (0, 1))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="rounding.py model", description=(__doc__ or "").splitlines()[0])
    add_setup(parser, RESULTS, PICTURE)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS, help="bits to measure")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, choices=GROUPS, help="groups to measure")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to measure")
    options = parser.parse_args(arguments)
    known, reference, facts = set_up(options)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **facts,
        "damping": DAMPING,
        "int4 of torchao": int4_of_torchao(),
        **environment(),
    }
    for bits, group in SETTINGS:
        if bits not in options.bits or group not in options.groups:
            continue
        for title in options.only:
            earlier = row_of(kept(options.out, result), title, bits, group)
            if earlier is not None and earlier["windows"] >= options.windows and not options.again:
                continue
            row = measured(known, reference, title, bits, group)
            row["windows"] = options.windows
            write(options.out, result, row)
            print("\r" + said(row), flush=True)
    rows = kept(options.out, result)
    for row in rows:
        print(said(row))
    draw({**result, "rows": rows}, options.picture)
    print(f"written: {options.out}, {options.picture}")


def add_setup(parser: argparse.ArgumentParser, out: Path, picture: Path) -> None:
    """Add the options of what is measured, on which text and with what."""
    parser.add_argument("--model", help="directory of a Llama; default: SmolLM2-135M-Instruct")
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--windows", type=int, default=6, help="windows of each text to score")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window to score")
    parser.add_argument("--calibration", type=int, default=48, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--again", action="store_true", help="measure what is in the results again")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of passes through the model")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory that keeps the calibration")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--picture", type=Path, default=picture)
    add_precision(parser)


def set_up(options: argparse.Namespace) -> tuple[Known, References, dict[str, Any]]:
    """Take the model off its grid and calibrate it; returns that, its predictions, and the facts for the results."""
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")
    torch.set_num_threads(options.threads)
    dense, tokenizer, source = load_model(options.model, dtype=torch.float32)
    leave_grid_(dense)
    names = linear_modules(dense, "all-linear", blocks=range(len(decoder_layers(dense))))
    windows = token_windows(
        tokenizer,
        read_text(options.wikitext / "valid.txt"),
        length=min(512, options.length),
        count=options.calibration,
        spread=True,
        name="valid.txt",
    )
    precision = Precision.of(dense, options.precision).name
    digest = hashlib.sha256(windows.numpy().tobytes() + f"{source} {SEED} {SPREAD} {precision}".encode()).hexdigest()
    facts = {
        "model": source,
        "spread": SPREAD,
        "seed": SEED,
        "weights": sum(dense.get_submodule(name).weight.numel() for name in names),
        "calibration": {
            "file": "valid.txt",
            "windows": len(windows),
            "length": windows.shape[1],
            "products": precision,
            "hash": digest[:12],
        },
        "length": options.length,
    }
    held_out = {
        name: token_windows(tokenizer, text, length=options.length, count=options.windows, name=name)
        for name, text in {
            "WikiText-2": read_text(options.wikitext / "test.txt"),
            "language reference": "\n\n".join(topics.values()),
        }.items()
    }
    known = calibrated(dense, windows, names, options.cache, digest[:12], precision)
    return known, References(dense, held_out, count("dense")), facts


def calibrated(model: Any, windows: Tensor, names: list[str], cache: Path, digest: str, precision: str) -> Known:
    """Measure second moments of inputs and output gradients, and magnitudes of inputs, or read them."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"rounding-{digest}.statistics.safetensors"
    if not file.exists():
        given = list(batches(windows, batch_size=1))
        collect(
            model,
            given,
            modules=names,
            moments="full",
            gradients=names,
            precision=precision,
            progress=count("calibrate"),
        ).save(file)
    statistics = Statistics.load(file)
    beside = cache / f"rounding-{digest}.magnitudes.safetensors"
    if not beside.exists():
        first = [group[0] for group in sharing(statistics, names)]
        save_file(magnitudes(model, windows, first, progress=count("magnitudes")), beside)
    return Known(model, names, statistics, load_file(beside), windows)


def measured(known: Known, reference: References, title: str, bits: int, group: int) -> dict[str, Any]:
    """Round the model, and compare what it predicts with the dense one, window by window."""
    (model, stored), seconds = timed(lambda: METHODS[title](known, bits, group))
    found = compared(reference, model, f"{title}, {bits} bits, groups of {group}")
    return {"method": title, "bits": bits, "group": group, "bytes": stored, "seconds": seconds, **found}


def timed(run: Callable[[], Made]) -> tuple[Made, float]:
    """Call a function on one thread; returns what it made and the seconds of the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.process_time()
    made = run()
    seconds = time.process_time() - begin
    torch.set_num_threads(threads)
    return made, seconds


def compared(reference: References, model: Any, title: str) -> dict[str, Any]:
    """Compare what a model predicts with the dense one, window by window."""
    found = reference.compare(model, count(title))
    return {
        "kl": {text: values["kl"] for text, values in found.items()},
        "same": {text: values["same"] for text, values in found.items()},
    }


def said(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    parts = []
    for text, values in row["kl"].items():
        mean, half = interval(values)
        parts.append(f"{text}: {mean:.4f} ± {half:.4f}, same {interval(row['same'][text])[0]:.3f}")
    return (
        f"{row['bits']} bits, {row['group']:3}  {row['method']:24} {row['bytes'] / 2**20:6.1f} MiB "
        f"{row['seconds']:6.1f} s  {'; '.join(parts)}"
    )


def kept(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that are there, of the same model, calibration and length of windows."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(found.get(key) == result[key] for key in ("model", "spread", "seed", "damping", "calibration", "length"))
    rows: list[dict[str, Any]] = found["rows"] if same else []
    return rows


def row_of(rows: list[dict[str, Any]], title: str, bits: int, group: int) -> dict[str, Any] | None:
    """Return the row of a method at a setting, if there is one."""
    return next((row for row in rows if (row["method"], row["bits"], row["group"]) == (title, bits, group)), None)


def write(path: Path, result: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row in its place among those that are there, in one step."""
    rows = kept(path, result)
    earlier = row_of(rows, row["method"], row["bits"], row["group"])
    rows = [*(other for other in rows if other is not earlier), row]
    order = list(METHODS)
    rows.sort(key=lambda row: (-row["bits"], row["group"], order.index(row["method"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def count(what: str) -> Callable[[int, int | None], Any]:
    """Make a function that shows how far a stage is."""
    return lambda done, total: print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)
