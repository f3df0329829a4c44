"""What a model loses at each size: bits, ranks and neurons under one price, beside methods of rounding.

The model, its text and the windows are those of ``rounding.py model``, whose rows of groups of 64 stand beside: nearest
numbers, torchao, HQQ, AWQ and GPTQ, uniform bits. Besides, in ``frontier_methods.py``: GPTQ whose bits are shared by
predicted loss, the types of GGUF files, and ours at 2.4 to 7.1 bits a weight, with a quarter of its text written by the
model itself.

    python benchmarks/frontier.py [--only METHOD ...] [--bits 4.3 ...] [--windows 6] [--again]
    python benchmarks/frontier.py forms

The first prints a table and writes ``benchmarks/results/frontier.json``, after every row, and ``docs/frontier.svg`` and
``docs/forms.svg``; rows that are there are kept. The second compares what rounding is foreseen to lose with what it
loses, in single layers, and writes ``benchmarks/results/forms.json``.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy is loaded

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import frontier_forms
from benchmarks.environment import environment
from benchmarks.frontier_methods import METHODS, Ours
from benchmarks.frontier_picture import draw_forms, draw_frontier
from benchmarks.rounding_model import RESULTS as ROUNDING
from benchmarks.rounding_model import add_setup, compared, set_up, timed
from cur._lib.interval import interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "frontier.json"
PICTURE = ROOT / "docs" / "frontier.svg"
FORMS = ROOT / "docs" / "forms.svg"
SAME = ("model", "spread", "seed", "calibration", "length")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_setup(parser, RESULTS, PICTURE)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to measure")
    parser.add_argument("--bits", type=float, nargs="+", help="bits of a weight to measure; default: all of a method")
    options = parser.parse_args()
    known, reference, facts = set_up(options)
    result = {"question": (__doc__ or "").splitlines()[0], **facts, **environment()}
    ours = Ours(known, options.cache, facts["calibration"]["hash"])
    for title in options.only:
        settings, method = METHODS[title]
        for setting in settings:
            bits = setting if isinstance(setting, float) else None
            if options.bits and bits not in options.bits:
                continue
            label = setting if isinstance(setting, str) else None
            earlier = find(kept(options.out, result), title, setting)
            if earlier is not None and earlier["windows"] >= options.windows and not options.again:
                continue
            (model, stored, more), seconds = timed(lambda method=method, setting=setting: method(ours, setting))
            row = {"method": title, "setting": setting, "bits": 8 * stored / facts["weights"], "bytes": stored}
            row |= {"seconds": seconds, **compared(reference, model, f"{title}, {label or bits}"), **more}
            row["windows"] = options.windows
            write(options.out, result, row)
            print("\r" + said(row), flush=True)
    rows = [*beside(result), *kept(options.out, result)]
    for row in sorted(rows, key=lambda row: row["bytes"]):
        print(said(row))
    draw_frontier({**result, "rows": rows}, options.picture)
    draw_forms(kept(options.out, result), FORMS)
    print(f"written: {options.out}, {options.picture}, {FORMS}")


def beside(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of uniform bits that were measured on the same, in groups of 64."""
    found = [row for row in kept(ROUNDING, result) if row["group"] == 64 and row["method"] not in ("both sides",)]
    return [{**row, "setting": row["bits"], "bits": 8 * row["bytes"] / result["weights"]} for row in found]


def kept(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that are there, of the same model, calibration and length of windows."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: list[dict[str, Any]] = found["rows"] if all(found.get(key) == result[key] for key in SAME) else []
    return rows


def find(rows: list[dict[str, Any]], title: str, setting: Any) -> dict[str, Any] | None:
    """Return the row of a method at a setting, if there is one."""
    return next((row for row in rows if (row["method"], row["setting"]) == (title, setting)), None)


def write(path: Path, result: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row in its place among those that are there, in one step."""
    rows = kept(path, result)
    earlier = find(rows, row["method"], row["setting"])
    rows = [*(other for other in rows if other is not earlier), row]
    order = list(METHODS)
    rows.sort(key=lambda row: (order.index(row["method"]), row["bytes"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def said(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    parts = []
    for text, values in row["kl"].items():
        mean, half = interval(values)
        parts.append(f"{text}: {mean:.4f} ± {half:.4f}, same {interval(row['same'][text])[0]:.3f}")
    size = f"{row['bits']:5.2f} bits {row['bytes'] / 2**20:6.1f} MiB"
    return f"{size}  {row['method']} {row['setting']}  {row['seconds']:6.1f} s  {'; '.join(parts)}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["forms"]:
        frontier_forms.main(sys.argv[2:])
    else:
        main()
