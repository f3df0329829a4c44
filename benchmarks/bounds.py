"""Search for a matrix on which a bound fails: every bound against the true error, over families, dtypes and options.

    python benchmarks/bounds.py [--cases 20000] [--seed 0]

prints a table and writes ``benchmarks/results/bounds.json``. Matrices of any size, from 1e-300 to 1e300, with weights
of any size, as arrays, operators and streams of blocks in several precisions; ranks up to the smaller side, whatever
the numerical rank. The true error is computed in exact arithmetic. About 5 minutes on one core for 20,000 cases.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scipy.sparse.linalg import aslinearoperator

from cur import CUR, NumericalError, RankWarning, cur, interpolative, stream_cur
from cur.selection import SELECTORS
from cur.weights import factor
from tests.families import DTYPES, FAMILIES, SHAPES, cast, frobenius, remainder, spectral

RESULTS = Path(__file__).parent / "results" / "bounds.json"
WITHOUT_ENTRIES = [name for name, known in SELECTORS.items() if "entries" not in known.reads]
BOUNDS = ("certificate", "projection (B1)", "sorensen_embree (S)", "cross (B2)", "slices", "refused")
LONG = ((2, 5_000), (2_000, 2))
STRUCTURED = ("constant", "small_integers", "few_rows")


@dataclass
class Tally:
    """How one bound did: cases, violations, and its value over the true error."""

    cases: int = 0
    violations: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, bound: float, error: float, above_rounding: bool, case: dict[str, Any]) -> None:
        self.cases += 1
        if not bound >= error:
            self.violations.append({**case, "bound": bound, "error": error})
        if error > 0 and above_rounding:
            self.ratios.append(bound / error)

    def summary(self) -> dict[str, Any]:
        ratios = np.array(self.ratios)
        finite = ratios[np.isfinite(ratios)]
        return {
            "cases": self.cases,
            "violations": len(self.violations),
            "cases above rounding": len(ratios),
            "infinite bounds": len(ratios) - len(finite),
            "median bound / error": float(np.median(ratios)) if len(ratios) else None,
            "maximum finite bound / error": float(np.max(finite)) if len(finite) else None,
            "examples": self.violations[:5],
        }


def draw_case(rng: np.random.Generator) -> dict[str, Any]:
    """Choose family, shape, dtype, scales, rank and options of one case."""
    m, n = (SHAPES + LONG)[rng.integers(len(SHAPES) + len(LONG))]
    driver = str(rng.choice(["cur", "cur", "cur", "interpolative", "interpolative", "stream", "operator", "tol"]))
    dtype = str(rng.choice(DTYPES))
    family = str(rng.choice(list(FAMILIES) if min(m, n) > 3 or max(m, n) < 100 else ["random", *STRUCTURED]))
    scales = (-44, 37) if dtype in ("float32", "complex64") else (-300, 300)
    return {
        "family": family,
        "shape": (m, n),
        "dtype": dtype,
        "scale": 0 if rng.random() < 0.5 else int(rng.integers(scales[0], scales[1] + 1)),
        "rank": int(rng.integers(1, min(m, n) + 1)),
        "driver": driver,
        "select": str(rng.choice(WITHOUT_ENTRIES if driver == "operator" else list(SELECTORS))),
        "link": str(rng.choice(["optimal", "optimal", "cross"])),
        "subspace": str(
            rng.choice(["auto", "randomised"] if driver == "operator" else ["auto", "exact", "randomised"])
        ),
        "norm": ("fro", 2)[rng.integers(2)],
        "weights": [_draw_weights(rng, driver) for _ in range(2)],
        "cuts": int(rng.integers(1, 5)),
        "seed": int(rng.integers(2**31)),
    }


def _draw_weights(rng: np.random.Generator, driver: str) -> tuple[str, int] | None:
    """Choose the kind of a weight and its power of ten."""
    if driver in ("stream", "operator", "tol") or rng.random() < 0.7:
        return None
    return str(rng.choice(["diagonal", "diagonal", "graded", "factor"])), int(rng.integers(-300, 300))


def _weight(spec: tuple[str, int] | None, size: int, rng: np.random.Generator) -> tuple[Any, np.ndarray | None]:
    """Make a weight, and the factor that the true error is multiplied with, in extended precision."""
    if spec is None or size > 100:
        return None, None
    kind, power = spec
    if kind == "factor":
        F = rng.standard_normal((size, size)) * 10.0 ** (power // 2)
        return factor(F), F.astype(np.longdouble)
    w = rng.uniform(0.1, 1, size)
    if kind == "graded":
        w *= 10.0 ** rng.integers(-12, 1, size)
    w *= 10.0**power
    return w, np.diag(np.sqrt(w.astype(np.longdouble)))


def run_case(case: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Factor one matrix; return (bound, its value, the true error, whether that stands above rounding)."""
    rng = np.random.default_rng(case["seed"])
    A = cast(FAMILIES[case["family"]](*case["shape"], rng), case["dtype"])
    A = A * A.dtype.type(10.0 ** case["scale"])
    if not np.isfinite(A).all():  # the family is not of norm one
        return []
    (H, left), (G, right) = (
        _weight(spec, size, rng) for spec, size in zip(case["weights"], case["shape"], strict=True)
    )
    options = {key: case[key] for key in ("rank", "select", "subspace")}
    weights = {"row_weights": H, "column_weights": G}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        if case["driver"] == "interpolative":
            result = interpolative(A, rng=case["seed"], **options, **weights)
        elif case["driver"] == "stream":
            blocks = np.array_split(A, min(case["cuts"], A.shape[0]))
            for i in range(0, len(blocks), 2):  # the others keep the precision of the case
                blocks[i] = blocks[i].astype(np.result_type(A, np.float64))
            result = stream_cur(blocks, rank=case["rank"])
        elif case["driver"] == "operator":
            result = cur(aslinearoperator(A), rng=case["seed"], **options)
        elif case["driver"] == "tol":
            del options["rank"]
            result = cur(A, tol=10.0 ** -rng.uniform(0, 9), rng=case["seed"], link=case["link"], **options)
        else:
            result = cur(A, link=case["link"], norm=case["norm"], rng=case["seed"], **options, **weights)
    E = remainder(A, *result.factors)
    E = E if left is None else left.T @ E
    E = E if right is None else E @ right
    certificate = result.certificate
    in_norm = frobenius(E) if certificate.norm == "fro" else spectral(E)
    size = frobenius(E)
    if 0 < size < 1e-290 or size > 1e300:  # a certificate is a double
        return []
    # bounds by theorem have the roundoff of singular values under the root
    above = size > 100 * float(np.finfo(result.dtype).eps) ** 0.5 * certificate.scale
    found = [("certificate", certificate.value, in_norm, above)]
    if certificate.projection is not None:
        # of a one-sided factorization the bound speaks of columns alone, in the Frobenius norm
        found.append(("projection (B1)", certificate.projection, in_norm, above))
    if isinstance(result, CUR):
        if certificate.sorensen_embree is not None:
            found.append(("sorensen_embree (S)", certificate.sorensen_embree, spectral(E), above))
        if certificate.cross is not None:
            found.append(("cross (B2)", certificate.cross, in_norm, above))
    if isinstance(result, CUR) and not (
        np.array_equal(result.C, A[:, result.columns]) and np.array_equal(result.R, A[result.rows, :])
    ):
        found.append(("slices", 0.0, 1.0, False))
    return found


def search(cases: int, seed: int) -> dict[str, Tally]:
    """Try `cases` random cases and tally every bound."""
    rng = np.random.default_rng(seed)
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    for _ in range(cases):
        case = draw_case(rng)
        try:
            found = run_case(case)
        except NumericalError:  # U would overflow, or a tolerance is out of reach
            found = [("refused", 0.0, 0.0, False)]
        for name, bound, error, above in found:
            tallies[name].add(bound, error, above, case)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    tallies = search(arguments.cases, arguments.seed)
    rows = {name: tallies[name].summary() for name in BOUNDS if name in tallies}
    titles = ("cases", "violations", "infinite", "median", "maximum")
    print(f"{'bound over true error':22}" + "".join(f"{title:>11}" for title in titles))
    for name, row in rows.items():
        middle, largest = row["median bound / error"], row["maximum finite bound / error"]
        print(
            f"{name:22}{row['cases']:11}{row['violations']:11}{row['infinite bounds']:11}"
            f"{'' if middle is None else f'{middle:.2f}':>11}{'' if largest is None else f'{largest:.3g}':>11}"
        )
        for example in row["examples"]:
            print(f"    violated: {example}")
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "cases": arguments.cases,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "bounds": rows,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    if any(row["violations"] for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
