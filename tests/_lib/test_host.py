"""JAX arrays on the host are NumPy's: nothing is compiled."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest

import cur
from cur import bounds, linking, scores, selection, subspace, weighted, weights
from tests.backends import use
from tests.families import geometric

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.xdist_group("jax")

CALLS = {
    "deim_cur": lambda A, put: cur.deim_cur(put(A), rank=5),
    "lupp": lambda A, put: cur.cur(put(A), rank=5, select="lupp", norm=2),
    "importance": lambda A, put: cur.cur(
        put(A), rank=5, importance=put(A**2), column_weights=put(A[0] ** 2), link="cross", oversample=2
    ),
    "interpolative": lambda A, put: cur.interpolative(put(A), tol=1e-1, side="rows"),
    "select": lambda A, put: cur.select(put(A), rank=(4, 3)),
    "exact": lambda A, put: subspace.exact(put(A), 5),
    "randomised": lambda A, put: subspace.randomised(put(A), 5),
    "optimal": lambda A, put: linking.optimal(put(A), put(A[:, :3]), put(A[:4])),
    "qdeim": lambda A, put: selection.qdeim(put(A[:, :6])),
    "ldeim": lambda A, put: selection.ldeim(put(A[:, :6]), 9),
    "oversample": lambda A, put: selection.oversample(put(A[:, :4]), put(np.arange(5)), 3),
    "own_rows": lambda A, put: weighted.own_rows(put(A), column_weights=put(A.T @ A)),
    "own_inputs": lambda A, put: weighted.own_inputs(put(A), row_weights=put(A @ A.T)),
    "weighted_svd": lambda A, put: weighted.weighted_svd(put(A), column_weights=put(A[0] ** 2)),
    "weighted core": lambda A, put: linking.weighted(put(A), put(A[:, :3]), put(A[:4]), None, put(A.T @ A)),
    "cross": lambda A, put: linking.cross(put(A[:5, :5])),
    "diagonal": lambda A, put: weights.diagonal(put(A[0] ** 2)),
    "matrix": lambda A, put: weights.matrix(put(A @ A.T)),
    "factor": lambda A, put: weights.factor(put(A)),
    "wanda": lambda A, put: scores.wanda(put(A), put(A[0] ** 2)),
    "eta": lambda A, put: bounds.eta(put(A[:9, :6])),
}


HEIGHTS = itertools.count(53)
"""What was compiled for a shape before is not compiled again."""


def arrays_of(result):
    parts = (
        result if isinstance(result, tuple) else vars(result).values() if dataclasses.is_dataclass(result) else [result]
    )
    return [part for part in parts if hasattr(part, "shape") and np.ndim(part)]


def compiled(caplog):
    """What was compiled for a shape; functions of single numbers are compiled once."""
    return [text for text in caplog.messages if re.search(r"Compiling.*ShapedArray\(\w+\[\d", text)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("library", ["jax", "jax-x64"])
def test_no_shape_is_compiled_for(call, library, rng, caplog):
    A = geometric(next(HEIGHTS), 31, rng)
    with use(library), jax.log_compiles():
        result = CALLS[call](A, jax.device_put)
        assert not compiled(caplog)
        assert {type(part) for part in arrays_of(result)} <= {type(jax.device_put(A))}
        jax.numpy.sum(jax.device_put(A) ** 3)
        assert compiled(caplog), "what is compiled is not logged any more"


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int32", "bfloat16"])
def test_results_are_numpys(dtype, rng):
    A = np.asarray(jax.device_put(3 * rng.standard_normal((40, 30))).astype(dtype))
    with use("jax"):
        found = cur.cur(jax.device_put(A), rank=4, column_weights=jax.device_put(np.ones(30, dtype="float32")))
        assert found.U.devices() == jax.device_put(A).devices()
        np.testing.assert_array_equal(found.C, A[:, found.columns].astype(found.C.dtype))
        expected = cur.cur(A.astype(found.C.dtype), rank=4, column_weights=np.ones(30))
        assert np.asarray(found.rows).tolist() == expected.rows.tolist()
        assert found.certificate == expected.certificate
