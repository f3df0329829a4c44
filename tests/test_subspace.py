"""Leading singular subspaces, and what is certified about them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from cur import NumericalError, cur, subspace
from tests.backends import to_numpy, use
from tests.families import FAMILIES, geometric, orthonormal, with_spectrum


def lost(A, basis):
    return np.linalg.norm(A - basis @ (basis.conj().T @ A))


@pytest.mark.parametrize("family", ["geometric", "complex_geometric", "rank_deficient", "zero"])
def test_exact_and_randomised_in_every_library(backend, family, rng):
    A = FAMILIES[family](30, 20, rng)
    A = A.astype(backend.dtype(A.dtype.name))
    matrix = backend.asarray(A)
    methods = [subspace.randomised] + ([subspace.exact] if backend.is_dense else [])
    eps = np.finfo(A.dtype).eps
    for method in methods:
        found = method(matrix, 6)
        V, W = to_numpy(found.V), to_numpy(found.W)
        assert V.shape == (30, 6)
        assert W.shape == (20, 6)
        np.testing.assert_allclose(V.conj().T @ V, np.eye(6), atol=50 * eps)
        np.testing.assert_allclose(W.conj().T @ W, np.eye(6), atol=50 * eps)
        np.testing.assert_allclose(V.conj().T @ A, found.s[:6, None] * W.conj().T, atol=50 * eps)
        tail = found.tail(6)
        if backend.name == "operator":
            assert tail is None
        else:
            assert max(lost(A, V), lost(A.conj().T, W)) <= tail
        assert found.is_exact == (method is subspace.exact)
        assert (found.sigma_next(6) is None) == (not found.is_exact)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FAMILIES)), st.integers(1, 6), st.integers(0, 2))
def test_tail_is_an_upper_bound(seed, family, rank, power_iterations):
    A = FAMILIES[family](24, 17, np.random.default_rng(seed))
    for found in (
        subspace.exact(A, rank),
        subspace.randomised(A, rank, power_iterations=power_iterations, rng=seed),
    ):
        for k in (1, rank):
            assert lost(A, found.V[:, :k]) <= found.tail(k) * (1 + 1e-12)
            assert lost(A.conj().T, found.W[:, :k]) <= found.tail(k) * (1 + 1e-12)


def test_power_iterations_help(rng):
    A = FAMILIES["slow_decay"](200, 150, rng)
    errors = [lost(A, subspace.randomised(A, 10, power_iterations=q, rng=1).V) for q in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2] >= np.linalg.norm(1 / np.arange(11, 151)) * (1 - 1e-12)


def test_lanczos_finds_the_singular_vectors(rng):
    S = scipy.sparse.random_array((120, 80), density=0.1, rng=rng, format="csr")
    s = np.linalg.svd(S.toarray())[1]
    for matrix in (S, scipy.sparse.linalg.aslinearoperator(S)):
        found = subspace.lanczos(matrix, 6)
        np.testing.assert_allclose(found.s[:6], s[:6], rtol=1e-8)
        assert lost(S.toarray(), found.V) == pytest.approx(np.linalg.norm(s[6:]), rel=1e-6)
    assert subspace.lanczos(S, 80).V.shape == (120, 80)  # beyond what ARPACK can do
    with pytest.raises(TypeError, match=r"'lanczos'` is for scipy.sparse matrices and LinearOperator"):
        subspace.lanczos(S.toarray(), 3)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (5, 5), (2, 2), (40, 1), (1, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("family", ["random", "zero", "flat", "rank_deficient", "repeated_columns"])
def test_lanczos_at_every_rank_and_scale(shape, dtype, family, rng):
    A = FAMILIES[family](*shape, rng) * (1 - 1j if "complex" in dtype else 1)
    for scale in (1.0, 1e-30, 1e30) if dtype in ("float32", "complex64") else (1.0, 1e-200, 1e150):
        B = (A * scale).astype(dtype)
        expected = np.linalg.svd(A)[1]
        for rank in range(1, min(shape) + 1):
            for S in (scipy.sparse.csr_array(B), scipy.sparse.linalg.aslinearoperator(B)):
                found = subspace.lanczos(S, rank)
                tolerance = 100 * np.finfo(dtype).eps
                np.testing.assert_allclose(found.V.conj().T @ found.V, np.eye(rank), atol=tolerance)
                np.testing.assert_allclose(found.s[:rank] / scale, expected[:rank], atol=tolerance**0.75)


def test_lanczos_that_does_not_converge(monkeypatch, rng):
    def fail(*args, **options):
        raise scipy.sparse.linalg.ArpackNoConvergence("no convergence", [], [])

    monkeypatch.setattr(scipy.sparse.linalg, "svds", fail)
    with pytest.raises(NumericalError, match=r"Lanczos did not converge for `rank` 3: .*; use subspace='randomised'"):
        subspace.lanczos(scipy.sparse.csr_array(geometric(30, 20, rng)), 3)


def test_numerical_rank(rng):
    A = FAMILIES["rank_deficient"](30, 20, rng)
    for matrix, rank, expected in ((A, 20, 10), (A, 7, 10), (np.zeros((5, 4)), 4, 1), (np.eye(7), 5, 7)):
        assert subspace.exact(matrix, rank).numerical_rank(matrix) == expected


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(120_000, 6), (6, 120_000), (700, 400)])
def test_long_sides_in_single_precision_hide_no_directions(name, shape, rng):
    """Singular values of 1e-5 of the largest are not rounding, however long the columns are."""
    with use(name) as backend:
        left, right = (orthonormal(side, 6, rng) for side in shape)
        A = backend.asarray(((left * np.logspace(0, -5, 6)) @ right.T).astype(np.float32))
        for method in (subspace.exact, subspace.randomised):
            assert method(A, 6).numerical_rank(A) == 6
        if shape[0] >= shape[1]:
            found = subspace.stream([to_numpy(A)[i : i + 50_000] for i in range(0, shape[0], 50_000)], 6)
            assert found.numerical_rank() == 6


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(120_000, 6), (6, 120_000), (250, 200)])
def test_roundings_that_agree_are_no_directions(name, shape, dtype, rng):
    """Repeated rows, columns and constants, which are where LAPACK's long sums are most biased."""
    m, n = shape
    few = rng.uniform(size=(m, 2))
    with use(name) as backend:
        for rank, A in (
            (1, np.full(shape, 0.1)),
            (1, np.tile(rng.uniform(size=(1, n)), (m, 1))),
            (1, np.tile(rng.uniform(size=(m, 1)), (1, n))),
            (2, few[:, np.arange(n) % 2]),
            (2, few @ rng.uniform(size=(2, n))),
        ):
            matrix = backend.asarray(A.astype(dtype))
            for method in (subspace.exact, subspace.randomised):
                assert method(matrix, 5).numerical_rank(matrix) == rank
            if m >= n and name == "numpy":
                parts = [A[i : i + m // 3].astype(dtype) for i in range(0, m, m // 3)]
                assert subspace.stream(parts, 5).numerical_rank() == rank


@pytest.mark.parametrize("kind", ["sparse", "operator", "dask"])
def test_exact_needs_a_dense_matrix(kind):
    from tests.backends import BACKENDS

    with pytest.raises(TypeError, match=r"needs a dense matrix in memory; use 'lanczos' or 'randomised'"):
        subspace.exact(BACKENDS[kind].asarray(np.eye(4)), 2)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([name for name in sorted(FAMILIES) if not name.startswith("complex")]),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 8),
)
def test_one_pass_over_any_cut_is_certified(seed, family, heights, rank):
    A = FAMILIES[family](sum(heights), 12, np.random.default_rng(seed))
    ends = list(itertools.accumulate(heights, initial=0))
    blocks = [A[i:j] for i, j in itertools.pairwise(ends)]
    found = subspace.stream(blocks, rank)
    assert found.shape == A.shape
    for k in (1, rank):
        Q = found.W[:, :k]
        assert lost(A.T, Q) <= found.left_by(Q) * (1 + 1e-9)
    np.testing.assert_array_equal(found.R, A[found.rows])
    assert len(set(found.rows.tolist())) == len(found.rows) <= rank
    assert found.total == pytest.approx(np.linalg.norm(A))


def test_one_pass_is_nearly_as_good_as_the_whole(rng):
    A = with_spectrum(600, 80, 0.7 ** np.arange(80), rng)
    found = subspace.stream((A[i : i + 50] for i in range(0, 600, 50)), 12)
    best = np.linalg.norm(0.7 ** np.arange(12, 80))
    Q = found.W[:, :12]
    assert lost(A.T, Q) <= found.left_by(Q) <= 1.05 * best
    R = A[found.rows]
    assert np.linalg.norm(A - A @ np.linalg.pinv(R) @ R) <= 10 * best


def test_sources_of_a_stream_agree(tmp_path, rng):
    da = pytest.importorskip("dask.array")
    A = geometric(60, 12, rng)
    path = tmp_path / "A.bin"
    A.tofile(path)
    mapped = np.memmap(path, dtype=A.dtype, shape=A.shape, mode="r")
    expected = subspace.stream(A, 5)
    for source in (mapped, da.from_array(A, chunks=(20, 5)), scipy.sparse.coo_array(A), lambda: iter([A])):
        assert subspace.stream(source, 5).rows.tolist() == expected.rows.tolist()


@pytest.mark.parametrize(
    ("blocks", "error", "text"),
    [
        ([], ValueError, "must yield at least one block of rows; it ended at once"),
        (
            [np.ones((2, 3)), np.ones((2, 4))],
            ValueError,
            r"`blocks\[1\]` must have as many columns as the blocks before, 3",
        ),
        ([np.ones((2, 3)), np.full((2, 3), np.nan)], ValueError, r"`blocks\[1\]` must be finite"),
        ([np.ones((2, 3)), np.ones(3)], ValueError, r"`blocks\[1\]` must have two dimensions"),
        ([[1.0, 2.0]], TypeError, r"`blocks\[0\]` must be an array.*got list"),
        (3, TypeError, "`blocks` must be a matrix, an iterable of blocks of rows, or a callable"),
        (scipy.sparse.linalg.aslinearoperator(np.eye(3)), TypeError, "a LinearOperator does not"),
    ],
)
def test_bad_streams(blocks, error, text):
    with pytest.raises(error, match=text):
        subspace.stream(blocks, 2)


@pytest.mark.parametrize("kind", ["sparse", "operator"])
@pytest.mark.parametrize("shape", [(4000, 1200), (700, 2500)])
def test_flat_spectra_are_iterated_on(kind, shape, rng):
    """Without, columns and rows of a sparse random matrix are as good as drawn at random."""
    S = scipy.sparse.random_array(shape, density=4e-3, rng=rng, format="csr", data_sampler=rng.standard_normal)
    A = S if kind == "sparse" else scipy.sparse.linalg.aslinearoperator(S)
    size = np.linalg.norm(S.data)

    def kept(**options):
        C, U, R = cur(A, rank=25, **options).factors
        return 1 - (np.linalg.norm(S.toarray() - (C @ U) @ R) / size) ** 2

    assert kept() == kept(power_iterations=4) > 1.3 * kept(power_iterations=0)
    assert subspace.randomised(A, 25).is_flat()


@pytest.mark.parametrize("family", ["geometric", "slow_decay", "low_rank_plus_noise", "rank_deficient"])
def test_decaying_spectra_are_not_flat(family, rng):
    A = scipy.sparse.csr_array(FAMILIES[family](400, 300, rng))
    assert not subspace.randomised(A, 12).is_flat()
    assert not subspace.randomised(np.eye(20), 15).is_flat()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
def test_bases_and_what_they_leave_out_at_every_size(dtype, form, rng):
    """Squares that vanish made a bound of zero, and products that overflow an error."""
    X = rng.standard_normal((40, 25))
    make = {"dense": np.asarray, "sparse": scipy.sparse.csr_array, "operator": scipy.sparse.linalg.aslinearoperator}
    functions = {
        "dense": (subspace.exact, subspace.randomised),
        "sparse": (subspace.lanczos, subspace.randomised),
        "operator": (subspace.lanczos, subspace.randomised),
    }
    for power in (-43, -25, 25, 37) if dtype is np.float32 else (-305, -170, 170, 307):
        A = (X * np.longdouble(10) ** power).astype(dtype)
        relative = (A.astype(np.longdouble) / np.longdouble(10) ** power).astype(np.float64)
        for function in functions[form]:
            found = function(make[form](A), 3)
            left = np.linalg.norm(relative - relative @ found.W @ found.W.T)
            assert found.s[0] / 10.0**power == pytest.approx(np.linalg.norm(relative, 2), rel=0.1)
            assert found.numerical_rank(make[form](A)) == min(found.s.size, 25 if found.is_exact else found.s.size)
            if form != "operator":
                assert found.tail(3) >= left * np.longdouble(10) ** power
            if form != "operator" and power < 300:
                assert found.tail(3) / 10.0**power == pytest.approx(left, rel=0.02)
                assert found.total / 10.0**power == pytest.approx(np.linalg.norm(relative), rel=1e-6)
