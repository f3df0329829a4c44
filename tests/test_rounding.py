"""Rounding to a grid by nearest plane: against the formula, GPTQ, nearest rounding, and the bounds that it claims."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur._lib.grid import Grid
from cur._lib.plane import Triangle, nearest_plane
from cur._lib.semidefinite import unit_lower
from cur._lib.steps import FACTORS, least, ranges, stored
from cur.rounding import Rounded, round_to_grid
from cur.weights import diagonal, factor, matrix
from tests.backends import BACKENDS, to_numpy, use
from tests.families import FAMILIES, frobenius, remainder

REAL = [name for name in FAMILIES if not name.startswith("complex")]


def moment(n: int, rng: np.random.Generator, *, rank: int | None = None, spread: float = 1.0) -> np.ndarray:
    """Second moments of correlated inputs of different sizes."""
    X = rng.standard_normal((n, rank or 2 * n)) @ np.diag(np.linspace(1, 0.1, rank or 2 * n))
    X = X + rng.standard_normal((1, X.shape[1]))
    X = X * np.exp(spread * rng.standard_normal(n))[:, None]
    return X @ X.T / X.shape[1]


def parts(result: Rounded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, steps and zeros of each entry, in double precision."""
    integers = to_numpy(result.integers).astype(float)
    steps = np.repeat(to_numpy(result.steps).astype(float), result.group, axis=1)
    zeros = np.zeros_like(steps) if result.zeros is None else np.repeat(to_numpy(result.zeros), result.group, axis=1)
    return integers, steps, zeros


def levels(result: Rounded) -> tuple[int, int]:
    half = 2 ** (result.bits - 1) - 1
    return (-half, half) if result.zeros is None else (0, 2 * half + 1)


def weighted(E: np.ndarray, H: np.ndarray | None, G: np.ndarray | None) -> float:
    """The weighted norm, by square roots in extended precision where weights are diagonal."""
    for weight, axis in ((H, 0), (G, 1)):
        if weight is None:
            continue
        if weight.ndim == 1:
            root = np.sqrt(weight.astype(np.longdouble))
            E = E * (root[:, None] if axis == 0 else root[None, :])
        else:
            values, vectors = np.linalg.eigh(weight)
            F = vectors * np.sqrt(np.maximum(values, 0))
            E = F.T @ E if axis == 0 else E @ F
    return frobenius(E)


def nearest_error(A: np.ndarray, result: Rounded, H: np.ndarray | None, G: np.ndarray | None) -> float:
    """What rounding to the nearest number of the same grid leaves."""
    _, steps, zeros = parts(result)
    q = np.clip(np.rint(A / steps + zeros), *levels(result))
    return weighted(A - (q - zeros) * steps, H, G)


def plain_error(A: np.ndarray, result: Rounded, H: np.ndarray | None, G: np.ndarray | None) -> float:
    """What rounding to the nearest number of a grid over the whole range of each group leaves."""
    low, high = levels(result)
    X = A.reshape(len(A), -1, result.group)
    bottom, top = np.minimum(X.min(axis=2), 0), np.maximum(X.max(axis=2), 0)
    step = np.maximum(top, -bottom) / high if low < 0 else (top - bottom) / high
    step = np.where(step > 0, step, 1).astype(to_numpy(result.steps).dtype).astype(float)
    zero = np.zeros_like(step) if low < 0 else np.clip(np.rint(-bottom / step), low, high)
    step, zero = (np.repeat(part, result.group, axis=1) for part in (step, zero))
    q = np.clip(np.rint(A / step + zero), low, high)
    return weighted(A - (q - zero) * step, H, G)


def by_formula(A: np.ndarray, result: Rounded, H: np.ndarray, G: np.ndarray) -> np.ndarray:
    """The integers of nearest plane on the grid of a result, entry by entry."""
    K, B = np.linalg.cholesky(H), np.linalg.cholesky(G)
    _, steps, zeros = parts(result)
    E, integers = np.zeros_like(A), np.zeros_like(A)
    for i in reversed(range(A.shape[0])):
        for j in reversed(range(A.shape[1])):
            owed = sum(E[i, k] * B[k, j] for k in range(j + 1, A.shape[1]))
            owed += sum(K[k, i] * (E[k] @ B)[j] for k in range(i + 1, A.shape[0])) / K[i, i]
            q = np.clip(np.rint((A[i, j] + owed / B[j, j]) / steps[i, j] + zeros[i, j]), *levels(result))
            integers[i, j] = q
            E[i, j] = A[i, j] - (q - zeros[i, j]) * steps[i, j]
    return integers


def by_gptq(A: np.ndarray, result: Rounded, G: np.ndarray) -> np.ndarray:
    """The integers of GPTQ as it was published, by the inverse of the moment; from the last column to the first."""
    flip = slice(None, None, -1)
    U = np.linalg.cholesky(np.linalg.inv(G[flip, flip])).T
    _, steps, zeros = (X[:, flip] for X in parts(result))
    W, integers = A[:, flip].copy(), np.zeros_like(A)
    for j in range(A.shape[1]):
        integers[:, j] = np.clip(np.rint(W[:, j] / steps[:, j] + zeros[:, j]), *levels(result))
        error = (W[:, j] - (integers[:, j] - zeros[:, j]) * steps[:, j]) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return integers[:, flip]


@pytest.mark.parametrize("shape", [(7, 6), (1, 8), (8, 1), (5, 12), (13, 4)])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_formula_entry_by_entry(shape, bits, symmetric, rng):
    m, n = shape
    A, H, G = rng.standard_normal(shape), moment(m, rng, spread=0.1), moment(n, rng, spread=0.1)
    group = n // 2 if n % 2 == 0 else n
    options = {"bits": bits, "group": group, "symmetric": symmetric}
    count = 0
    for rows, columns in ((H, G), (None, G), (H, None), (np.diag(H), G)):
        result = round_to_grid(A, row_weights=rows, column_weights=columns, **options)
        eye = [np.eye(m) if rows is None else np.diag(rows) if rows.ndim == 1 else rows]
        eye.append(np.eye(n) if columns is None else columns)
        expected = by_formula(A, result, *eye)
        taken = to_numpy(result.integers).astype(float)
        if np.array_equal(taken, expected):
            count += 1
        else:  # nearest rounding lost less
            assert result.error == pytest.approx(nearest_error(A, result, rows, columns))
    assert count >= 1


def test_gptq_is_the_case_without_row_weights(rng):
    for _ in range(5):
        A, G = rng.standard_normal((20, 24)), moment(24, rng)
        result = round_to_grid(A, bits=4, group=8, column_weights=G)
        np.testing.assert_array_equal(to_numpy(result.integers), by_gptq(A, result, G))


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("weights", ["rows", "columns", "both", "diagonal", "none", "singular"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_bounds_and_nearest_rounding(family, weights, bits, rng):
    """The certificate bounds the true error; nothing is above the bound of nearest plane or above nearest rounding."""
    A = FAMILIES[family](12, 16, rng)
    rank = 5 if weights == "singular" else None
    H = None if weights in ("columns", "none") else moment(12, rng, rank=rank)
    G = None if weights in ("rows", "none") else moment(16, rng, rank=rank)
    if weights == "diagonal":
        H, G = np.diag(H), np.diag(G)
    for symmetric in (False, True):
        result = round_to_grid(
            A, bits=bits, group=8, symmetric=symmetric, dtype="float64", row_weights=H, column_weights=G
        )
        error = weighted(remainder(A, result.toarray(), np.eye(16)).astype(float), H, G)
        slack = 1e-12 * weighted(A, H, G)
        certificate = result.certificate
        assert error <= certificate.value + 1e-3 * slack
        assert certificate.value <= error + 1e5 * slack
        assert certificate.scale <= weighted(A, H, G) * (1 + 1e-10)
        assert error <= nearest_error(A, result, H, G) + slack
        assert error <= plain_error(A, result, H, G) + slack
        alone = round_to_grid(A, bits=bits, group=8, symmetric=symmetric, dtype="float64")
        assert error <= weighted(A - alone.toarray(), H, G) + slack
        assert (result.bound is None) or error <= result.bound + slack
        low, high = levels(result)
        assert to_numpy(result.integers).min() >= low
        assert to_numpy(result.integers).max() <= high


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([5, 6, 8]), m=st.integers(1, 9), n=st.integers(1, 9))
def test_the_bound_of_nearest_plane(seed, bits, m, n):
    rng = np.random.default_rng(seed)
    A, H, G = rng.uniform(-1, 1, (m, n)), moment(m, rng, spread=0.3), moment(n, rng, spread=0.3)
    result = round_to_grid(A, bits=bits, row_weights=H, column_weights=G)
    bound = result.bound
    assert bound is None or result.clipped == 0
    if bound is not None:
        _, steps, _ = parts(result)
        a, b = (np.diag(np.linalg.cholesky(X)) for X in (H, G))
        by_hand = 0.5 * np.linalg.norm(a[:, None] * b[None, :] * steps)
        assert by_hand * (1 - 1e-12) <= bound <= by_hand * (1 + 1e-4)
        assert weighted(A - result.toarray(), H, G) <= bound * (1 + 1e-12)


def test_there_are_cases_with_the_bound_and_without():
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        A, G = rng.uniform(-1, 1, (3, 4)), moment(4, rng, spread=0.1)
        found.append(round_to_grid(A, bits=6, symmetric=True, column_weights=G))
    assert {result.clipped > 0 for result in found} == {True, False}
    assert all((result.bound is None) or result.clipped == 0 for result in found)


def test_a_matrix_on_the_grid_comes_back(rng):
    A = rng.integers(-7, 8, (10, 12)) * 0.25
    A[:, ::6] = 7 * 0.25
    result = round_to_grid(
        A, bits=4, group=6, symmetric=True, row_weights=moment(10, rng), column_weights=moment(12, rng)
    )
    np.testing.assert_array_equal(result.toarray(), A)
    assert result.certificate.value == 0
    assert result.bound > 0


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_shortened_ranges_lose_no_more_than_whole_ones(spread, rng):
    """Not even by nearest plane on both; there are matrices that lose less with the whole."""
    same = 0
    for _ in range(30):
        A, H, G = rng.standard_normal((8, 12)), moment(8, rng, spread=spread), moment(12, rng, spread=spread)
        result = round_to_grid(A, bits=3, group=4, row_weights=H, column_weights=G)
        steps, zeros = least(A, ranges(A, 4, 0, 7), np.ones(12), 0, 7, stored("float16")[0], FACTORS[:1])
        rows, columns = (Triangle(pivots, lower) for lower, pivots, _ in (unit_lower(H), unit_lower(G)))
        whole = math.sqrt(nearest_plane(A, Grid(steps, zeros, 4, 0, 7), rows, columns).loss)
        assert result.error <= whole * (1 + 1e-9)
        same += np.array_equal(steps, result.steps.astype(float))
    assert 0 < same < 30


def test_both_weights_lose_less_than_one_and_that_less_than_nearest(rng):
    A, H, G = rng.standard_normal((60, 40)), moment(60, rng, spread=0.2), moment(40, rng, spread=0.2)
    found = [
        round_to_grid(A, bits=4, group=8, row_weights=rows, column_weights=columns)
        for rows, columns in ((None, None), (None, G), (H, G))
    ]
    nearest, one, both = (weighted(A - result.toarray(), H, G) for result in found)
    assert both < 0.8 * one < 0.8 * 0.8 * nearest


def test_rows_may_change_places_where_their_weight_is_diagonal(rng):
    A, h, G = rng.standard_normal((20, 12)), rng.uniform(0.1, 1, 20), moment(12, rng)
    order = rng.permutation(20)
    one = round_to_grid(A, group=4, row_weights=h, column_weights=G)
    other = round_to_grid(A[order], group=4, row_weights=h[order], column_weights=G)
    np.testing.assert_array_equal(one.integers[order], other.integers)
    assert one.error == pytest.approx(other.error)


def test_groups_of_columns_may_change_places_where_they_are_not_correlated(rng):
    A, H = rng.standard_normal((6, 12)), moment(6, rng)
    G = np.zeros((12, 12))
    for start in range(0, 12, 4):
        G[start : start + 4, start : start + 4] = moment(4, rng)
    order = np.arange(12).reshape(3, 4)[[2, 0, 1]].ravel()
    one = round_to_grid(A, group=4, row_weights=H, column_weights=G)
    other = round_to_grid(A[:, order], group=4, row_weights=H, column_weights=G[np.ix_(order, order)])
    np.testing.assert_array_equal(one.integers[:, order], other.integers)
    np.testing.assert_array_equal(one.steps[:, [2, 0, 1]], other.steps)


def test_larger_than_a_block(rng):
    """Blocks, panels and strips of a matrix that none of them divides."""
    A, H, G = rng.standard_normal((101, 130)), moment(101, rng, spread=0.1), moment(130, rng, spread=0.1)
    result = round_to_grid(A, bits=4, group=26, row_weights=H, column_weights=G)
    assert result.error == pytest.approx(weighted(A - result.toarray(), H, G))
    np.testing.assert_array_equal(to_numpy(result.integers), by_formula(A, result, H, G))


def test_rows_alone_are_the_transposed_problem(rng):
    A, H = rng.standard_normal((12, 1)), moment(12, rng)
    down = round_to_grid(A, bits=5, symmetric=True, row_weights=H)
    assert down.error < nearest_error(A, down, H, None)


@pytest.mark.parametrize("side", ["row_weights", "column_weights"])
def test_what_has_no_weight_is_rounded_to_the_nearest_number(side, rng):
    A = rng.standard_normal((8, 8))
    G = moment(8, rng)
    G[3], G[:, 3] = 0, 0
    result = round_to_grid(A, bits=6, **{side: G})
    integers, steps, zeros = (X if side == "column_weights" else X.T for X in parts(result))
    A = A if side == "column_weights" else A.T
    np.testing.assert_array_equal(integers[:, 3], np.clip(np.rint(A / steps + zeros), 0, 63)[:, 3])


def test_repeated_inputs_make_up_for_each_other(rng):
    """Of three equal inputs the last two have no pivot left: the first takes what they cannot have."""
    A = rng.uniform(-1, 1, (40, 3))
    result = round_to_grid(A, bits=5, symmetric=True, column_weights=np.ones((3, 3)))
    E, step = A - result.toarray(), parts(result)[1][:, 0]
    assert (np.abs(E[:, 1:]) <= step[:, None] / 2 + 1e-12).all()
    free = np.abs(to_numpy(result.integers)[:, 0]) < 15
    assert free.sum() > 10
    assert (np.abs(E.sum(axis=1)) <= step / 2 + 1e-12)[free].all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [10, 30, 50])
def test_fewer_samples_than_inputs(rank, dtype, rng):
    """Singular weights leave much to choose: never worse than without them, and better with damping."""
    X = (rng.standard_normal((60, rank)) * np.exp(rng.standard_normal(60))[:, None]).astype(dtype)
    A = rng.standard_normal((40, 60)).astype(dtype)
    found = [round_to_grid(A, bits=4, column_weights=X @ X.T, damping=damping) for damping in (0.01, 0.0)]
    found.append(round_to_grid(A, bits=4))
    damped, singular, alone = (np.linalg.norm((A - each.toarray()).astype(float) @ X) for each in found)
    assert damped < 0.8 * alone
    assert singular <= alone * (1 + 1e-6)


@pytest.mark.parametrize("weights", [np.zeros(6), np.zeros((6, 6))])
def test_a_weight_of_zero_is_nearest_rounding(weights, rng):
    A = rng.standard_normal((4, 6))
    result = round_to_grid(A, column_weights=weights)
    assert result.certificate.value == 0
    _, steps, zeros = parts(result)
    np.testing.assert_array_equal(result.integers, np.clip(np.rint(A / steps + zeros), 0, 15))


def test_damping_adds_the_mean_eigenvalue(rng):
    A, G = rng.standard_normal((10, 8)), moment(8, rng, rank=3)
    damped = G + 0.1 * np.trace(G) / 8 * np.eye(8)
    one, other = round_to_grid(A, column_weights=G, damping=0.1), round_to_grid(A, column_weights=damped)
    np.testing.assert_array_equal(one.integers, other.integers)
    assert one.error == pytest.approx(other.error) == pytest.approx(weighted(A - one.toarray(), None, damped))


def test_weights_of_every_form(rng):
    A, F, w = rng.standard_normal((9, 7)), rng.standard_normal((7, 20)), rng.uniform(0.1, 2, 7)
    pairs = (
        (F @ F.T, factor(F)),
        (F @ F.T, matrix(F @ F.T)),
        (w, diagonal(w)),
        (w, np.diag(w)),
        (w, w.astype(np.float32).astype(float)),
    )
    for given_as, also in pairs:
        one, other = (round_to_grid(A, bits=3, column_weights=weights) for weights in (given_as, also))
        np.testing.assert_array_equal(one.integers, other.integers)
        assert one.error == pytest.approx(other.error, rel=1e-6)


def test_every_backend(dense, rng):
    A, H, G = rng.standard_normal((7, 8)), moment(7, rng), moment(8, rng)
    expected = round_to_grid(A, group=4, row_weights=H, column_weights=G)
    X, rows, columns = (dense.asarray(part) for part in (A, H, G))
    result = round_to_grid(X, group=4, row_weights=rows, column_weights=columns)
    if dense.precise:
        np.testing.assert_array_equal(to_numpy(result.integers), expected.integers)
        np.testing.assert_array_equal(to_numpy(result.toarray()), expected.toarray())
    R = result.toarray()
    assert type(R) is type(X)
    assert R.dtype == X.dtype
    assert type(result.steps) is type(X)
    xp = importlib.import_module("array_api_compat")
    assert xp.device(R) == xp.device(X)
    np.testing.assert_array_equal(to_numpy(result.steps).astype(float), expected.steps.astype(float))
    assert weighted(to_numpy(X).astype(float) - to_numpy(R), H, G) <= result.certificate.value * (1 + 1e-5)


@pytest.mark.parametrize("library", ["numpy", "torch", "array-api-strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", ["bfloat16", "float16", "float32", "float64"])
def test_every_dtype_of_matrix_and_steps(library, dtype, steps, rng):
    A, G = rng.standard_normal((6, 8)).astype(dtype), moment(8, rng).astype(dtype)
    with use(library):
        X, weights = (BACKENDS[library].asarray(part) for part in (A, G))
        result = round_to_grid(X, bits=8, group=4, dtype=steps, column_weights=weights)
        R = to_numpy(result.toarray())
    assert R.dtype == dtype
    error = weighted(remainder(A, R, np.eye(8)).astype(float), None, G.astype(float))
    assert error <= result.certificate.value
    assert result.certificate.value == pytest.approx(error, rel=1e-5)
    held = to_numpy(result.steps.to(importlib.import_module("torch").float64) if library == "torch" else result.steps)
    narrow = held.astype({"float64": dtype}.get(steps, "float32" if steps == "bfloat16" else steps))
    np.testing.assert_array_equal(held, narrow)
    if library == "torch":
        name = dtype if steps == "float64" else steps
        assert str(result.steps.dtype) == f"torch.{name}"
    if steps == "bfloat16":
        assert (narrow.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e-3, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("weight", [1e-250, 1.0, 1e250])
def test_every_size_in_double_precision(size, weight, rng):
    A, H, G = rng.standard_normal((5, 6)), moment(5, rng), moment(6, rng)
    one = round_to_grid(A, dtype="float64", row_weights=H, column_weights=G)
    result = round_to_grid(A * size, dtype="float64", row_weights=H * weight, column_weights=G * weight)
    np.testing.assert_array_equal(result.integers, one.integers)
    assert result.certificate.relative == pytest.approx(one.certificate.relative)
    if 1e-300 < size * weight < 1e300:
        assert result.error / size / weight == pytest.approx(one.error)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e7, 1e30])
def test_what_half_precision_does_not_reach_is_told_of(size, rng):
    A = rng.standard_normal((5, 6)) * size
    with pytest.raises(ValueError, match=r"^`dtype` must reach the steps of `A`.*reaches from 6.1e-05 to 6.55e"):
        round_to_grid(A)
    assert round_to_grid(A, dtype="bfloat16").certificate.relative < 0.2


def test_groups_too_small_for_half_precision_stand_beside_others(rng):
    A = rng.standard_normal((4, 8))
    A[:, 4:] *= 1e-7
    result = round_to_grid(A, group=4)
    assert np.isfinite(result.toarray()).all()
    assert (np.abs(A - result.toarray())[:, 4:] <= 2.0**-24).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told_of(value, rng):
    A, G = rng.standard_normal((4, 5)), moment(5, rng)
    bad = A.copy()
    bad[1, 2] = value
    with pytest.raises(ValueError, match=r"^`A` must be finite; it holds NaN or inf, 1 of them, the first in row 1"):
        round_to_grid(bad)
    G[1, 2] = value
    broken = dataclasses.replace(diagonal(np.ones(5)), root=G[1])
    for weights in (G, G[1], broken, dataclasses.replace(matrix(np.eye(5)), vectors=G)):
        with pytest.raises(ValueError, match=r"^`column_weights` must be finite"):
            round_to_grid(A, column_weights=weights)


WRONG = {
    "bits of a fraction": ({"bits": 4.5}, TypeError, "`bits` must be an integer; got 4.5"),
    "one bit": ({"bits": 1}, ValueError, "`bits` must be between 2 and 8; got 1"),
    "nine bits": ({"bits": 9}, ValueError, "`bits` must be between 2 and 8; got 9"),
    "group that does not divide": ({"group": 4}, ValueError, "`group` must divide the 6 columns of `A`; got 4; take a"),
    "group of nothing": ({"group": 0}, ValueError, "`group` must divide the 6 columns of `A`; got 0"),
    "group of a truth": ({"group": True}, TypeError, "`group` must be an integer; got True"),
    "dtype of integers": ({"dtype": "int8"}, ValueError, "`dtype` must be one of 'bfloat16', 'float16'.*got 'int8'"),
    "negative damping": ({"damping": -1}, ValueError, "`damping` must be non-negative and finite; got -1"),
    "damping in words": ({"damping": "some"}, TypeError, "`damping` must be a number; got 'some'"),
    "short vector": (
        {"row_weights": np.ones(3)},
        ValueError,
        "`row_weights` must have one weight per row",
    ),
    "small matrix": (
        {"row_weights": np.eye(4)},
        ValueError,
        r"`row_weights` must have .* shape \(5, 5\)",
    ),
    "list": ({"column_weights": [1.0] * 6}, TypeError, "`column_weights` must be an array"),
    "negative weight": ({"column_weights": -np.ones(6)}, ValueError, "`column_weights` must be non-negative"),
    "negative eigenvalue": (
        {"column_weights": np.diag([1.0, 1, -1, 1, 1, 1])},
        ValueError,
        "`column_weights` must have no negative eigenvalue; pass a matrix of second moments",
    ),
    "indefinite without a diagonal": (
        {"column_weights": np.eye(6)[::-1].copy()},
        ValueError,
        "`column_weights` must have no negative eigenvalue",
    ),
    "not symmetric": ({"column_weights": np.triu(np.ones((6, 6)))}, ValueError, "`column_weights` must be symmetric"),
    "complex weight": ({"column_weights": 1j * np.eye(6)}, TypeError, "`column_weights` must be real for a real `A`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case, rng):
    options, kind, text = WRONG[case]
    with pytest.raises(kind, match=f"^{text}"):
        round_to_grid(rng.standard_normal((5, 6)), **options)


def test_weights_of_another_library_are_refused(rng):
    torch = importlib.import_module("torch")
    with pytest.raises(TypeError, match=r"^`column_weights` must be an array of the same library as `A`"):
        round_to_grid(rng.standard_normal((5, 6)), column_weights=torch.ones(6))


def test_the_result_is_frozen_and_says_what_it_is(rng):
    result = round_to_grid(rng.standard_normal((5, 6)), bits=3, group=3)
    assert dataclasses.is_dataclass(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.bits = 4
    assert repr(result).startswith("5 x 6 matrix in 3 bits, asymmetric, groups of 3; The error in the Frobenius norm")
    assert result.integers.dtype == np.uint8
    assert result.zeros.dtype == np.uint8
    assert result.steps.dtype == np.float16
    assert result.steps.shape == (5, 2)
    symmetric = round_to_grid(rng.standard_normal((5, 6)), symmetric=True)
    assert symmetric.integers.dtype == np.int8
    assert symmetric.zeros is None
    assert inspect.signature(round_to_grid).parameters["A"].kind is inspect.Parameter.POSITIONAL_ONLY
