"""Measure what rounding to few bits loses: in single layers, and in a whole model that lies on no grid.

    python benchmarks/rounding.py layers [--model DIR] [--wikitext DIR] [--without-model]
    python benchmarks/rounding.py model [--bits 4 ...] [--groups 64 ...] [--only METHOD ...] [--windows 6] [--again]

Each prints its table and writes ``benchmarks/results/rounding.json`` or ``benchmarks/results/rounding_model.json``;
what it measures is said in ``rounding_layers.py`` and ``rounding_model.py``. Rounding is timed on one thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy is loaded

import sys

from benchmarks import rounding_layers, rounding_model

PARTS = {"layers": rounding_layers.main, "model": rounding_model.main}


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part not in PARTS:
        sys.exit(f"{__doc__}\nthe first word must be one of {', '.join(PARTS)}, got {part or 'none'}")
    PARTS[part](sys.argv[2:])


if __name__ == "__main__":
    main()
