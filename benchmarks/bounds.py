"""Search for a matrix on which a bound fails: every bound against the true error, over families, dtypes and options.

    python benchmarks/bounds.py [--cases 20000] [--seed 0]

prints a table and writes ``benchmarks/results/bounds.json``. The true error is computed in a wider precision than the
factorization: double for single, extended for double. About 5 minutes on one core for 20,000 cases.
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

from cur import CUR, RankWarning, cur, interpolative
from tests.families import DTYPES, FAMILIES, SHAPES, cast, exact_product, frobenius, spectral, wide

RESULTS = Path(__file__).parent / "results" / "bounds.json"
SELECTORS = ("deim", "lupp", "qdeim", "osinsky", "ldeim", "leverage", "norm", "uniform")
BOUNDS = ("certificate", "projection (B1)", "sorensen_embree (S)", "cross (B2)")


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
    """Choose family, shape, dtype, rank and options of one case."""
    m, n = SHAPES[rng.integers(len(SHAPES))]
    return {
        "family": str(rng.choice(list(FAMILIES))),
        "shape": (m, n),
        "dtype": str(rng.choice(DTYPES)),
        "rank": int(rng.integers(1, min(m, n) + 1)),
        "driver": str(rng.choice(["cur", "cur", "cur", "interpolative"])),
        "select": str(rng.choice(SELECTORS)),
        "link": str(rng.choice(["optimal", "optimal", "cross"])),
        "subspace": str(rng.choice(["auto", "exact", "randomised"])),
        "norm": ("fro", 2)[rng.integers(2)],
        "seed": int(rng.integers(2**31)),
    }


def run_case(case: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Factor one matrix; return (bound, its value, the true error, whether that stands above rounding)."""
    rng = np.random.default_rng(case["seed"])
    A = cast(FAMILIES[case["family"]](*case["shape"], rng), case["dtype"])
    options = {key: case[key] for key in ("rank", "select", "subspace")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        if case["driver"] == "interpolative":
            result = interpolative(A, rng=case["seed"], **options)
        else:
            result = cur(A, link=case["link"], norm=case["norm"], rng=case["seed"], **options)
    E = wide(A) - exact_product(*result.factors)
    certificate = result.certificate
    in_norm = frobenius(E) if certificate.norm == "fro" else spectral(E)
    above = frobenius(E) > 100 * certificate.rounding
    found = [("certificate", certificate.value, in_norm, above)]
    if certificate.projection is not None:
        # of a one-sided factorization the bound speaks of columns alone, in the Frobenius norm
        found.append(("projection (B1)", certificate.projection, in_norm, above))
    if isinstance(result, CUR):
        if certificate.sorensen_embree is not None:
            found.append(("sorensen_embree (S)", certificate.sorensen_embree, spectral(E), above))
        if certificate.cross is not None:
            found.append(("cross (B2)", certificate.cross, in_norm, above))
    return found


def search(cases: int, seed: int) -> dict[str, Tally]:
    """Try `cases` random cases and tally every bound."""
    rng = np.random.default_rng(seed)
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    for _ in range(cases):
        case = draw_case(rng)
        for name, bound, error, above in run_case(case):
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
