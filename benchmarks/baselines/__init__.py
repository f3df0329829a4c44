"""Other ways to shrink linear layers to a number of parameters or of bits, written from the formulas of their papers.

Each file holds one method, in float64, for one matrix ``W`` of m outputs and n inputs. What they need to know of the
model is measured by `measure`. They are for comparison only and are not part of the package.
"""

from benchmarks.baselines.asvd import activation_scaled
from benchmarks.baselines.awq import activation_aware
from benchmarks.baselines.curing import cur_factors
from benchmarks.baselines.d_rank import dynamic_ranks, effective_rank
from benchmarks.baselines.fwsvd import fisher_weighted
from benchmarks.baselines.grid import grid_bytes, round_to_nearest
from benchmarks.baselines.hqq import half_quadratic
from benchmarks.baselines.measure import Diagonals, magnitudes, measure
from benchmarks.baselines.mpifa import reconstruct_, refit
from benchmarks.baselines.pifa import pivot_rows
from benchmarks.baselines.svd import nearest
from benchmarks.baselines.svd_llm import whitened

__all__ = [
    "Diagonals",
    "activation_aware",
    "activation_scaled",
    "cur_factors",
    "dynamic_ranks",
    "effective_rank",
    "fisher_weighted",
    "grid_bytes",
    "half_quadratic",
    "magnitudes",
    "measure",
    "nearest",
    "pivot_rows",
    "reconstruct_",
    "refit",
    "round_to_nearest",
    "whitened",
]
