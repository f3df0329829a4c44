"""Measure the core: speed against SciPy and against the products that cannot be avoided, accuracy, tolerances, growth.

    python benchmarks/core.py [--only NAME ...] [--seeds 200]
    python benchmarks/core.py --against DIR

prints a table per question and writes ``benchmarks/results/core_NAME.json``. All times are medians and are reported as
ratios within one run. About 20 minutes on 2 cores. The second line answers one question alone: how long the drivers
take here, over those of the source tree `DIR`, such as a `git worktree` of an earlier version; 3 minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg.interpolative as scipy_id
import scipy.sparse
import scipy.sparse.linalg
import versions
from environment import environment
from threadpoolctl import threadpool_limits

import cur

RESULTS = Path(__file__).parent / "results"


def median_time(f: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def decaying(m: int, n: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Return a matrix with the spectrum of a language model's weights, ``(i + 5)**-0.35``, in random directions."""
    rng = np.random.default_rng(seed)
    r = min(m, n)
    spectrum = (np.arange(1, r + 1) + 5.0) ** -0.35
    # Gaussian factors are orthogonal enough at these sizes
    left = rng.standard_normal((m, r), dtype=dtype) * (spectrum / math.sqrt(m)).astype(dtype)
    return left @ rng.standard_normal((r, n), dtype=dtype) / dtype(math.sqrt(n))


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """4000 x 1000, k = 100, float64, against SciPy's interpolative decomposition, which gives columns and no error."""
    A = decaying(4000, 1000, np.float64)
    scipy_time = median_time(lambda: scipy_id.interp_decomp(A, 100))
    rows = []
    for name, f, target in (
        ("deim_cur, certified", lambda: cur.deim_cur(A, rank=100), 5),
        ('cur(select="lupp"), certified', lambda: cur.cur(A, rank=100, select="lupp"), None),
        ("interpolative, certified", lambda: cur.interpolative(A, rank=100), None),
        ('select(select="lupp"), indices alone', lambda: cur.select(A, rank=100), 25),
    ):
        seconds = median_time(f, 15)
        rows.append(
            {"what": name, "seconds": seconds, "times faster than SciPy": scipy_time / seconds, "target": target}
        )
    return [{"what": "scipy.linalg.interpolative.interp_decomp", "seconds": scipy_time}, *rows]


def floor(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of `cur(rank=256)`, float32, over the three products it cannot avoid: sketch, projection, core."""
    rows = []
    for m, n in ((4096, 4096), (14336, 4096)):
        A = decaying(m, n, np.float32)
        rng = np.random.default_rng(1)
        X, Y = (rng.standard_normal((size, 266), dtype=np.float32) for size in (n, m))
        C = np.ascontiguousarray(Y[:, :256])
        # alternating, so that a busy moment of the machine does not fall on one of the two only
        floors, times = [], []
        for _ in range(5):
            floors.append(median_time(lambda: (A @ X, A.T @ Y, A.T @ C), 1))
            times.append(median_time(lambda: cur.cur(A, rank=256), 1))
        ratio = statistics.median(t / f for t, f in zip(times, floors, strict=True))
        rows.append(
            {
                "shape": f"{m} x {n}",
                "products, s": statistics.median(floors),
                "cur, s": statistics.median(times),
                "ratio": ratio,
                "target": 2.5,
            }
        )
    return rows


def paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Factor the 30 matrices that the paper compresses in Llama-3.1-8B, r = 256, float32, on all cores.

    Either each matrix has all cores in turn, or each core its own matrix and BLAS no threads. The products that no
    method avoids, with the matrix and twice with its transpose, are timed one after another.
    """
    cores = len(os.sched_getaffinity(0))
    columns = ("seconds, one after another", f"seconds, {cores} at a time", "products, s")
    rows = []
    for m, n in ((4096, 4096), (1024, 4096), (14336, 4096)):
        matrices = [decaying(m, n, np.float32, seed) for seed in range(10)]
        X, Y = (np.ones((k, 256), dtype=np.float32) for k in (n, m))
        factor = functools.partial(cur.deim_cur, rank=256)
        in_turn = median_time(lambda: [factor(A) for A in matrices], 3)
        products = median_time(lambda: [(A @ X, A.T @ Y, A.T @ Y) for A in matrices], 3)
        with threadpool_limits(1), ThreadPoolExecutor(cores) as pool:
            at_once = median_time(lambda: list(pool.map(factor, matrices)), 3)
        rows.append({"shape": f"10 of {m} x {n}", **dict(zip(columns, (in_turn, at_once, products), strict=True))})
    totals = {name: sum(row[name] for row in rows) for name in columns}
    return [*rows, {"shape": "all 30", **totals, "target": 15.0}]


def named_matrices(n: int = 1000) -> dict[str, np.ndarray]:
    i = np.arange(1.0, n + 1)
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.random(n)), np.sort(rng.random(n)) + 1.5
    c, s = math.cos(1.2), math.sin(1.2)
    kahan = (s ** np.arange(n))[:, None] * (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    snn = sum(
        ((2.0 if j < 50 else 1.0) / (j + 1))
        * (scipy.sparse.random(n, 1, 0.025, rng=rng) @ scipy.sparse.random(1, n, 0.025, rng=rng))
        for j in range(300)
    )
    return {
        "lehmer": np.minimum.outer(i, i) / np.maximum.outer(i, i),
        "circul": np.stack([np.roll(i, j) for j in range(n)]),
        "chan": np.eye(n) - np.tril(np.ones((n, n)), -1),
        "fiedler": np.abs(i[:, None] - i[None, :]),
        "kahan": kahan,
        "hilbert": 1 / (i[:, None] + i[None, :] - 1),
        "cauchy": 1 / (x[:, None] + y[None, :]),
        "kernel 1/abs(x-y)": 1 / np.abs(x[:, None] - y[None, :]),
        "sparse non-negative": snn.toarray(),
    }


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Relative Frobenius errors at fixed k against the truncated SVD, n = 1000."""
    targets = {
        ("lehmer", 150): 7.2e-4, ("lehmer", 350): 1.84e-4, ("circul", 150): 7.05e-2, ("chan", 200): 9.13e-2,
        ("fiedler", 150): 2.73e-4,
    }  # fmt: skip
    rows = []
    for name, A in named_matrices().items():
        s = np.linalg.svd(A, compute_uv=False)
        total = np.linalg.norm(A)
        ranks = [k for (matrix, k) in targets if matrix == name] or [10, 50, 150]
        for k in ranks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", cur.RankWarning)
                result = cur.deim_cur(A, rank=k, subspace="exact")
                rough = cur.deim_cur(A, rank=k, subspace="randomised")
            error = float(np.linalg.norm(A - result.toarray()) / total)
            best = float(np.linalg.norm(s[result.rank :]) / total)
            rows.append(
                {
                    "matrix": name,
                    "k": k,
                    "rank": result.rank,
                    "error": error,
                    "certified": result.certificate.relative,
                    "truncated SVD": best,
                    "over SVD": error / best if best > 1e-14 else None,
                    "target": targets.get((name, k)),
                    "error, randomised subspace": float(np.linalg.norm(A - rough.toarray()) / total),
                }
            )
    return rows


def power(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Show what power iterations bring: error of the optimal core over that of the truncated SVD."""
    rng = np.random.default_rng(0)
    m, n, k = 1536, 1024, 128
    left, right = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (m, n))
    i = np.arange(1, n + 1)
    rows = []
    for name, s in {"(i + 5)^-0.35": (i + 5.0) ** -0.35, "i^-0.5": i**-0.5, "i^-1": 1.0 / i, "0.99^i": 0.99**i}.items():
        A = (left * s) @ right.T
        best = np.linalg.norm(s[k:]) / np.linalg.norm(s)
        row: dict[str, Any] = {"spectrum": name}
        settings: dict[str, dict[str, Any]] = {"exact": {"subspace": "exact"}}
        settings |= {f"{q} power iterations": {"power_iterations": q} for q in (0, 1, 2)}
        settings["lupp"] = {"select": "lupp"}
        for setting, keywords in settings.items():
            errors = [cur.cur(A, rank=k, rng=seed, **keywords).certificate.relative for seed in range(5)]
            row[setting] = statistics.mean(errors) / float(best)
        rows.append(row)
    return rows


def selectors(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every selector on dense and sparse matrices: error over the truncated SVD (median of 5 seeds), and time.

    The sparse matrix answers the question that "CURing Large Models" leaves open, how compact matrix decomposition
    (`cmd`) compares with DEIM.
    """
    rng = np.random.default_rng(0)
    graph = scipy.sparse.random(20000, 5000, 0.002, rng=rng, format="csr")
    # degrees of a power law, as in the graphs that the method was made for
    scale_rows, scale_columns = (rng.pareto(2.0, size) + 0.1 for size in graph.shape)
    graph = scipy.sparse.diags_array(scale_rows) @ graph @ scipy.sparse.diags_array(scale_columns)
    matrices = {
        "weights-like 1500 x 1000": decaying(1500, 1000, np.float64),
        "sparse power law 20000 x 5000": graph.tocsr(),
    }
    k = 60
    rows = []
    for name, A in matrices.items():
        top = np.linalg.svd(A, compute_uv=False)[:k] if isinstance(A, np.ndarray) else scipy.sparse.linalg.svds(A, k)[1]
        norm = np.linalg.norm if isinstance(A, np.ndarray) else scipy.sparse.linalg.norm
        best = math.sqrt(1 - float(np.sum(top**2)) / float(norm(A)) ** 2)
        for select, known in cur.selection.SELECTORS.items():
            if known.dense and not isinstance(A, np.ndarray):
                continue
            errors, times = [], []
            for seed in range(5):
                start = time.perf_counter()
                result = cur.cur(A, rank=k, select=select, rng=seed)
                times.append(time.perf_counter() - start)
                errors.append(result.certificate.relative / best)
            rows.append(
                {
                    "matrix": name,
                    "select": select,
                    "error over SVD": statistics.median(errors),
                    "worst of 5": max(errors),
                    "seconds": statistics.median(times),
                }
            )
    return rows


def tolerance(options: argparse.Namespace) -> list[dict[str, Any]]:
    """7 matrices x 3 tolerances x seeds, dense and as an operator: misses of the tolerance, SciPy beside.

    The matrices are a little larger than the first sketch of a search, which has 448 rows.
    """
    n = 540
    rng = np.random.default_rng(0)
    i = np.arange(1.0, n + 1)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    x = np.sort(rng.random(n))
    matrices = {
        "hilbert": 1 / (i[:, None] + i[None, :] - 1),
        "cauchy": 1 / (x[:, None] + x[None, :] + 0.01),
        "gaussian kernel": np.exp(-(((i[:, None] - i[None, :]) / 30.0) ** 2)),
        "0.8^i": (left * 0.8**i) @ right,
        "0.9^i": (left * 0.9**i) @ right,
        "i^-4": (left * i**-4) @ right,
        "rank 20 + noise": (left * np.where(i <= 20, 1.0, 1e-8)) @ right,
    }
    rows = []
    for name, A in matrices.items():
        total = float(np.linalg.norm(A))
        operator = scipy.sparse.linalg.aslinearoperator(A)
        tails = np.sqrt(np.cumsum(np.linalg.svd(A, compute_uv=False)[::-1] ** 2))[::-1]
        for tol in (1e-2, 1e-4, 1e-6):
            errors: dict[str, list[float]] = {}
            ranks = []
            for seed in range(options.seeds):
                results = {
                    "cur": cur.cur(A, tol=tol, rng=seed),
                    "cur, operator": cur.cur(operator, tol=tol, rng=seed),
                    "interpolative": cur.interpolative(A, tol=tol, rng=seed),
                    "interpolative, operator": cur.interpolative(operator, tol=tol, rng=seed),
                }
                ranks.append(results["cur"].rank)
                for what, result in results.items():
                    errors.setdefault(what, []).append(float(np.linalg.norm(A - result.toarray())) / total)
                if seed < max(1, options.seeds // 10):
                    for what, B in (("SciPy", A), ("SciPy, operator", operator)):
                        errors.setdefault(what, []).append(scipy_error(B, A, tol, seed) / total)
                if seed == 0:
                    excess = excess_rank(A, results["cur"], tol)
            rows.append(
                {
                    "matrix": name,
                    "tol": tol,
                    "rank": statistics.median(ranks),
                    "rank of the truncated SVD": int(np.argmax(np.append(tails[1:], 0.0) <= tol * total)) + 1,
                    "indices that could go": excess,
                    "misses": {what: sum(e > tol for e in values) for what, values in errors.items()},
                    "cases": {what: len(values) for what, values in errors.items()},
                    "worst error / tol": {what: max(values) / tol for what, values in errors.items()},
                }
            )
    return rows


def scipy_error(B: Any, A: np.ndarray, tol: float, seed: int) -> float:
    """Return the Frobenius error of SciPy's interpolative decomposition at a relative precision."""
    k, order, coefficients = scipy_id.interp_decomp(B, tol, rng=np.random.default_rng(seed))
    approximation = scipy_id.reconstruct_matrix_from_id(A[:, order[:k]], order, coefficients)
    return float(np.linalg.norm(A - approximation))


def excess_rank(A: np.ndarray, result: cur.CUR, tol: float) -> int:
    """Return how many of the last indices could have been left out."""
    total = np.linalg.norm(A)
    for k in range(result.rank - 1, 0, -1):
        C, R = A[:, result.columns[:k]], A[result.rows[:k], :]
        if np.linalg.norm(A - C @ cur.linking.optimal(A, C, R) @ R) > tol * total:
            return result.rank - 1 - k
    return result.rank - 1


def growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Exponents of time against m, n and k; peak memory of a stream against its number of rows."""
    rows = []
    for name, shapes in {
        "m": [(m, 1000, 50) for m in (4000, 8000, 16000, 32000)],
        "n": [(1000, n, 50) for n in (4000, 8000, 16000, 32000)],
        "k": [(4000, 4000, k) for k in (50, 100, 200, 400)],
    }.items():
        times = []
        for m, n, k in shapes:
            A = np.random.default_rng(0).standard_normal((m, n))
            times.append(median_time(lambda: cur.cur(A, rank=k)))
        sizes = [dict(zip("mnk", shape, strict=True))[name] for shape in shapes]
        slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
        rows.append({"against": name, "sizes": sizes, "seconds": times, "exponent": slope})
    for m in (20_000, 80_000, 320_000):
        X = np.random.default_rng(0).standard_normal((30, 400))
        rng = np.random.default_rng(1)
        tracemalloc.start()
        cur.subspace.stream((rng.standard_normal((2000, 30)) @ X for _ in range(m // 2000)), 20)
        rows.append({"stream of rows": m, "peak memory, MiB": tracemalloc.get_traced_memory()[1] / 2**20})
        tracemalloc.stop()
    return rows


QUESTIONS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "speed": speed,
    "floor": floor,
    "paper": paper,
    "accuracy": accuracy,
    "power": power,
    "selectors": selectors,
    "tolerance": tolerance,
    "growth": growth,
}


def against(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the drivers over that in another source tree, calls in turns: median of the ratios of neighbours."""
    return versions.compare(Path(__file__).resolve().parents[1], options.against)


def show(name: str, rows: list[dict[str, Any]], description: str) -> None:
    print(f"\n## {name}: {description}", flush=True)
    for row in rows:
        print("   ", ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions to answer")
    parser.add_argument("--seeds", type=int, default=200, help="seeds per matrix and tolerance")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="compare with the drivers of this source tree alone"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    questions = QUESTIONS if options.against is None else {"against": against}
    for name in options.only if options.against is None else questions:
        rows = questions[name](options)
        show(name, rows, (questions[name].__doc__ or "").splitlines()[0])
        text = json.dumps({"rows": rows, **environment()}, indent=1)
        (options.out / f"core_{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
