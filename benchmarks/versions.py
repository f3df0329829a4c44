"""Time the drivers of two source trees against each other: each in a process of its own, in turns, call by call.

`benchmarks/core.py --against DIR` calls it. Figures of two runs differ by more than those of two versions do, on a
machine that others use as well.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import aslinearoperator

ROUNDS = 11
SHORTEST = 0.05
"""Seconds that a measurement takes at least: shorter calls are repeated."""

PAUSE = 0.2
"""Seconds between calls: threads of a BLAS wait actively for the next product, and take the cores of the other."""


def cases() -> dict[str, Callable[[Any], object]]:
    """Return calls of the drivers of a package, by what they are."""
    rng = np.random.default_rng(0)

    def decaying(m: int, n: int) -> np.ndarray[Any, Any]:
        r = min(m, n)
        spectrum = (np.arange(1, r + 1) + 5.0) ** -0.35
        return (rng.standard_normal((m, r)) * spectrum) @ rng.standard_normal((r, n)) / math.sqrt(m * n)

    A, small = decaying(2000, 1000), decaying(120, 80)
    single = decaying(2048, 2048).astype(np.float32)
    x = np.sort(rng.random(540))
    kernel = 1 / (x[:, None] + x[None, :] + 0.01)
    graph = scipy.sparse.random(20000, 2000, 0.002, rng=rng, format="csr")
    graph = (scipy.sparse.diags_array(rng.pareto(2.0, 20000) + 0.1) @ graph).tocsr()
    weights = np.linspace(0.1, 1, 1000)
    return {
        "deim_cur, 2000 x 1000, rank 100": lambda cur: cur.deim_cur(A, rank=100),
        'cur(select="lupp")': lambda cur: cur.cur(A, rank=100, select="lupp"),
        'cur(select="qdeim")': lambda cur: cur.cur(A, rank=50, select="qdeim"),
        'cur(link="cross")': lambda cur: cur.cur(A, rank=50, link="cross"),
        "cur(column_weights)": lambda cur: cur.cur(A, rank=50, column_weights=weights),
        "cur, float32, 2048 x 2048, rank 128": lambda cur: cur.cur(single, rank=128),
        "interpolative": lambda cur: cur.interpolative(A, rank=100),
        "select": lambda cur: cur.select(A, rank=100),
        "deim_cur, 120 x 80, rank 10": lambda cur: cur.deim_cur(small, rank=10),
        "interpolative, 120 x 80, rank 10": lambda cur: cur.interpolative(small, rank=10),
        "deim_cur(tol=1e-4), 540 x 540": lambda cur: cur.deim_cur(kernel, tol=1e-4),
        "deim_cur(tol=1e-8), 540 x 540": lambda cur: cur.deim_cur(kernel, tol=1e-8),
        "interpolative(tol=1e-8), 540 x 540": lambda cur: cur.interpolative(kernel, tol=1e-8),
        "deim_cur, sparse 20000 x 2000": lambda cur: cur.deim_cur(graph, rank=40),
        "deim_cur, operator": lambda cur: cur.deim_cur(aslinearoperator(A), rank=40),
        "stream_cur": lambda cur: cur.stream_cur([A[i : i + 250] for i in range(0, 2000, 250)], rank=40),
    }


def compare(here: Path, there: Path) -> list[dict[str, Any]]:
    """Return seconds in both trees, and the median of the ratios of calls that followed each other."""
    rows = []
    with _process(here) as new, _process(there) as old:
        for name in cases():
            pairs = []
            for i in range(ROUNDS + 1):
                order = (new, old) if i % 2 == 0 else (old, new)
                times = {process: _ask(process, name) for process in order}
                pairs.append((times[new], times[old]))
            pairs = pairs[1:]  # the first calls load what is needed
            ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            rows.append({"what": name, "seconds": ours, "seconds against": theirs, "ratio": ratio})
    ratios = [row["ratio"] for row in rows]
    rows.append({"what": "median of all", "ratio": statistics.median(ratios), "largest": max(ratios)})
    return rows


@contextmanager
def _process(tree: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": str(tree.resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    time.sleep(PAUSE)
    print(name, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{name!r} failed; its error is above")
    return float(answer)


def _serve() -> None:
    """Read names of cases and write how long each took."""
    import cur

    warnings.simplefilter("ignore")
    calls = cases()
    for line in sys.stdin:
        call, count, begin = calls[line.strip()], 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < SHORTEST:
            call(cur)
            count += 1
        print((time.perf_counter() - begin) / count, flush=True)


if __name__ == "__main__":
    _serve()
