"""The two-sided drivers on every library, family and dtype."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import cur
from cur import RankWarning
from cur.selection import SELECTORS
from tests.backends import BACKENDS, to_numpy, use
from tests.families import DTYPES, FAMILIES, cast, frobenius, geometric, random, remainder, spectral


def true_error(A, result):
    return remainder(A, *(to_numpy(f) for f in result.factors))


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        return function(*args, **options)


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
@pytest.mark.parametrize("family", ["geometric", "complex_geometric", "rank_deficient", "graded"])
def test_factors_are_slices_and_the_certificate_holds_in_every_library(every_backend, family, dtype, rng):
    A = cast(FAMILIES[family](34, 21, rng), every_backend.dtype(dtype))
    matrix = every_backend.asarray(A)
    result = cur.deim_cur(matrix, rank=5)
    rows, columns = to_numpy(result.rows), to_numpy(result.columns)
    np.testing.assert_array_equal(to_numpy(result.C), A[:, columns])
    np.testing.assert_array_equal(to_numpy(result.R), A[rows, :])
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 5
    assert frobenius(true_error(A, result)) <= result.certificate.value
    assert result.certificate.dtype == str(A.dtype)
    if every_backend.is_dense:
        assert {type(f) for f in (*result.factors, result.rows, result.columns)} == {type(matrix)}
    if every_backend.name == "sparse":
        assert scipy.sparse.issparse(result.C)
        assert scipy.sparse.issparse(result.R)


@pytest.mark.parametrize(
    ("select", "dtype"), [*((name, "float64") for name in SELECTORS), ("deim", "complex128"), ("lupp", "complex128")]
)
def test_the_same_seed_chooses_the_same_indices_in_every_library(backend, select, dtype, rng):
    if backend.name == "operator" and "entries" in SELECTORS[select].reads:
        pytest.skip("an operator shows no entries")
    if backend.name == "sparse" and SELECTORS[select].dense:
        pytest.skip("updates a dense matrix")
    A = cast(geometric(40, 25, rng), dtype)
    expected = cur.cur(A, rank=6, select=select, rng=4, subspace="randomised")
    found = cur.cur(backend.asarray(A), rank=6, select=select, rng=4, subspace="randomised")
    assert to_numpy(found.rows).tolist() == expected.rows.tolist()
    assert to_numpy(found.columns).tolist() == expected.columns.tolist()
    assert frobenius(true_error(A, found)) <= found.certificate.value


def test_strict_results_stay_on_the_device(rng):
    with use("array-api-strict") as backend:
        A = backend.asarray(random(12, 9, rng))
        both, one = cur.cur(A, rank=3, link="cross", oversample=2), cur.interpolative(A, rank=3)
        arrays = (both.C, both.U, both.R, both.rows, both.columns, one.skeleton, one.coefficients, one.chosen)
        assert [value.device for value in arrays] == [A.device] * len(arrays)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_family_or_dtype_breaks_a_certificate(family, dtype, rng):
    for shape in ((30, 20), (6, 40), (1, 7), (7, 1), (1, 1)):
        A = cast(FAMILIES[family](*shape, rng), dtype)
        for rank in {1, min(shape) // 2 or 1, min(shape)}:
            result = quietly(cur.deim_cur, A, rank=rank)
            E = true_error(A, result)
            known = result.certificate
            assert frobenius(E) <= known.value
            assert known.projection is not None
            assert frobenius(E) <= known.projection
            if known.sorensen_embree is not None:
                assert spectral(E) <= known.sorensen_embree


@pytest.mark.parametrize("select", SELECTORS)
def test_transposing_swaps_rows_and_columns(select, rng):
    if SELECTORS[select].draws or "sketch" in SELECTORS[select].reads:
        pytest.skip("draws, or chooses columns from rows")
    A = geometric(30, 30, rng)
    one = cur.cur(A, rank=6, select=select, subspace="exact")
    other = cur.cur(A.T.copy(), rank=6, select=select, subspace="exact")
    assert one.rows.tolist() == other.columns.tolist()
    assert one.columns.tolist() == other.rows.tolist()
    np.testing.assert_allclose(one.U, other.U.T, rtol=1e-8)


def test_permuting_permutes(rng):
    A = geometric(30, 22, rng)
    p, q = rng.permutation(30), rng.permutation(22)
    one = cur.deim_cur(A, rank=6, subspace="exact")
    other = cur.deim_cur(A[p][:, q], rank=6, subspace="exact")
    assert p[other.rows].tolist() == one.rows.tolist()
    assert q[other.columns].tolist() == one.columns.tolist()


def test_u_is_the_frobenius_minimiser(rng):
    A = random(20, 15, rng)
    C, U, R = cur.deim_cur(A, rank=4)
    best = np.linalg.norm(A - C @ U @ R)
    for _ in range(20):
        assert np.linalg.norm(A - C @ (U + 1e-4 * rng.standard_normal(U.shape)) @ R) > best
    np.testing.assert_allclose(U, np.linalg.pinv(C) @ A @ np.linalg.pinv(R), rtol=1e-9)


def test_rank_above_the_numerical_rank_warns_once_with_both_numbers(rng):
    A = FAMILIES["rank_deficient"](30, 20, rng)
    with pytest.warns(RankWarning, match="rank 15 was asked for, but the numerical rank is 10") as caught:
        result = cur.deim_cur(A, rank=15)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.rank == 10


def test_separate_counts(rng):
    A = random(30, 20, rng)
    result = cur.deim_cur(A, rank=(7, 4))
    assert result.U.shape == (4, 7)
    assert frobenius(true_error(A, result)) <= result.certificate.value
    result = cur.cur(A, rank=4, oversample=3)
    assert result.U.shape == (4, 7)
    assert cur.cur(A, rank=(6, 4), link="cross").U.shape == (4, 6)


def test_cross_core_interpolates_on_the_cross_and_reports_gamma(rng):
    A = geometric(40, 30, rng)
    result = cur.cur(A, rank=6, link="cross")
    approximation = result.toarray()
    np.testing.assert_allclose(approximation[result.rows], A[result.rows], atol=1e-8)
    np.testing.assert_allclose(approximation[:, result.columns], A[:, result.columns], atol=1e-8)
    Q = np.linalg.qr(result.C)[0]
    assert result.certificate.gamma == pytest.approx(1 / np.linalg.svd(Q[result.rows])[1][-1])
    assert frobenius(true_error(A, result)) <= result.certificate.cross


@pytest.mark.parametrize("name", ["torch", "jax", "numpy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precisions_are_factored_in_single(name, dtype, rng):
    import jax.numpy as jnp
    import torch

    A = rng.standard_normal((20, 12)).astype(np.float32)
    if name == "numpy" and dtype == "bfloat16":
        pytest.skip("NumPy has no bfloat16")
    matrix = {
        "torch": lambda: torch.tensor(A).to(getattr(torch, dtype)),
        "jax": lambda: jnp.asarray(A, dtype=dtype),
        "numpy": lambda: A.astype(dtype),
    }[name]()
    result = cur.deim_cur(matrix, rank=4)
    assert result.certificate.dtype == "float32"
    exact = np.asarray(to_numpy(matrix.float() if name == "torch" else matrix), dtype=np.float32)
    np.testing.assert_array_equal(to_numpy(result.C), exact[:, to_numpy(result.columns)])
    assert frobenius(true_error(exact, result)) <= result.certificate.value


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "longdouble"])
def test_other_dtypes_are_factored_in_double(dtype, rng):
    A = rng.integers(0, 2 if dtype == "bool" else 100, (20, 12)).astype(dtype)
    for matrix in (A, scipy.sparse.csr_array(A)):
        result = cur.deim_cur(matrix, rank=4)
        assert result.certificate.dtype == "float64"
        assert frobenius(true_error(A.astype(float), result)) <= result.certificate.value


def test_memory_layouts_do_not_matter(rng):
    A = random(20, 12, rng)
    expected = cur.deim_cur(A, rank=4)
    frozen = A.copy()
    frozen.flags.writeable = False
    big = np.zeros((40, 36))
    big[::2, ::3] = A
    for other in (np.asfortranarray(A), frozen, big[::2, ::3], A[::-1][::-1]):
        result = cur.deim_cur(other, rank=4)
        assert result.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(result.U, expected.U, rtol=1e-10)
    repeated = np.broadcast_to(A[:1], (20, 12))
    with pytest.warns(RankWarning):
        assert frobenius(true_error(repeated, cur.deim_cur(repeated, rank=2))) < 1e-14


def test_arguments_are_left_alone(rng):
    A, w = random(20, 12, rng), rng.uniform(size=12)
    before = A.copy(), w.copy()
    cur.cur(A, rank=4, column_weights=w, importance=np.abs(A))
    np.testing.assert_array_equal(A, before[0])
    np.testing.assert_array_equal(w, before[1])


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_huge_and_tiny_entries(every_backend, size, rng):
    if not every_backend.precise:
        size = 1e25 if size > 1 else 1e-25
    A = geometric(30, 20, rng)
    result = cur.deim_cur(every_backend.asarray(A * size), rank=5)
    approximation = to_numpy(result.toarray()) / size
    error = np.linalg.norm(A - approximation)
    assert 0.5 * error <= result.certificate.value / size
    assert error <= 1.0001 * result.certificate.value / size
    np.testing.assert_array_equal(
        to_numpy(result.C), (A * size).astype(result.certificate.dtype)[:, to_numpy(result.columns)]
    )


def test_cores_that_overflow_are_an_error(rng):
    with pytest.raises(cur.NumericalError, match="`A` has entries so small that U"):
        cur.deim_cur(random(10, 8, rng) * 1e-310, rank=3)


def test_inputs_that_require_gradients_are_detached(rng):
    import jax
    import torch

    A = torch.tensor(random(12, 9, rng), requires_grad=True)
    w = torch.ones(9, dtype=torch.float64, requires_grad=True)
    result = cur.deim_cur(A, rank=3, column_weights=w)
    assert not any(f.requires_grad for f in result.factors)
    gradient = jax.grad(lambda X: cur.deim_cur(X, rank=3).U.sum())(jax.numpy.asarray(random(12, 9, rng), dtype="f"))
    assert not gradient.any()


@pytest.mark.parametrize("norm", ["fro", 2])
@pytest.mark.parametrize("subspace", ["exact", "randomised"])
def test_certificate_in_either_norm(norm, subspace, rng):
    for family in ("geometric", "slow_decay", "flat", "graded", "hilbert", "complex_random"):
        A = FAMILIES[family](40, 30, rng)
        result = quietly(cur.deim_cur, A, rank=8, norm=norm, subspace=subspace)
        E = true_error(A, result)
        assert result.certificate.norm == norm
        assert (frobenius(E) if norm == "fro" else spectral(E)) <= result.certificate.value
        if norm == 2:
            assert result.certificate.scale <= np.linalg.norm(A, 2) * (1 + 1e-12)


def test_importance_guides_the_choice_and_nothing_else(rng):
    A, scores = random(30, 20, rng), np.zeros((30, 20))
    scores[[3, 17], [5, 11]] = [2.0, 1.0]
    result = cur.deim_cur(A, rank=2, importance=scores)
    assert result.rows.tolist() == [3, 17]
    assert result.columns.tolist() == [5, 11]
    np.testing.assert_array_equal(result.C, A[:, [5, 11]])
    assert frobenius(true_error(A, result)) <= min(result.certificate.value, result.certificate.projection)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "dia", "bsr"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_every_sparse_format(form, kind, rng):
    A = FAMILIES["spikes"](30, 20, rng)
    matrix = (scipy.sparse.csr_matrix if kind == "matrix" else scipy.sparse.csr_array)(A).asformat(form)
    result = cur.deim_cur(matrix, rank=4, rng=1)
    np.testing.assert_array_equal(result.C.toarray(), A[:, result.columns])
    assert frobenius(true_error(A, result)) <= result.certificate.value


def test_duplicate_entries_of_sparse_matrices_are_summed():
    A = scipy.sparse.coo_array(([1.0, 1.0, 1.0, 5.0], ([0, 0, 1, 2], [0, 0, 1, 2])), shape=(5, 5))
    assert cur.deim_cur(A, rank=2).certificate.value == pytest.approx(1.0)


@pytest.mark.parametrize("select", ["deim", "lupp"])
def test_dask_arrays_are_never_computed_as_a_whole(select, rng):
    """On a distributed scheduler, with chunks in both directions; nothing returned or persisted is of the size of A."""
    da = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")
    import dask

    A = geometric(400, 300, rng)
    sizes = []
    with (
        warnings.catch_warnings(),
        dask.config.set({"distributed.worker.memory.target": False, "distributed.scheduler.dashboard.link": ""}),
    ):
        warnings.simplefilter("ignore")  # of the cluster's own sockets, when it closes
        with (
            distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as c,
            distributed.Client(c) as client,
        ):
            gather = client.gather

            def spy(futures, *args, **options):
                found = gather(futures, *args, **options)
                stack = [found]
                while stack:
                    item = stack.pop()
                    if isinstance(item, (list, tuple)):
                        stack.extend(item)
                    elif hasattr(item, "nbytes"):
                        sizes.append(int(item.nbytes))
                return found

            client.gather = spy
            result = cur.cur(da.from_array(A, chunks=(90, 70)), rank=8, select=select)
            C = to_numpy(result.C)
    assert sizes, "the spy saw nothing"
    assert max(sizes) <= 400 * 20 * 8 < A.nbytes / 5
    np.testing.assert_array_equal(C, A[:, result.columns])
    E = A - C @ result.U @ A[result.rows]
    assert np.linalg.norm(E) <= result.certificate.value


def test_every_kind_of_matrix_is_named_in_the_backends():
    assert {"numpy", "torch", "jax", "array-api-strict", "dask", "sparse", "operator", "cupy"} <= set(BACKENDS)


def test_the_bound_that_takes_products_can_be_left_out(rng):
    A = rng.standard_normal((30, 20))
    with_it, without = (cur.cur(A, rank=5, importance=np.abs(A), bounds=bounds).certificate for bounds in (True, False))
    assert with_it.projection >= with_it.value
    assert without == replace(with_it, projection=None)
    # Where it costs nothing it is there.
    assert cur.cur(A, rank=5, bounds=False).certificate == cur.cur(A, rank=5).certificate
