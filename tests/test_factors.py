"""The result types."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from cur import CUR, Folded, Interpolative, cur, interpolative
from cur._array import lu_pivots
from cur._dominant import LARGEST
from cur.ranks import parameters
from tests.backends import BACKENDS, to_numpy, use
from tests.families import geometric, random

FORMS = {
    "CUR": lambda A: cur(A, rank=5),
    "oversampled": lambda A: cur(A, rank=5, oversample=3),
    "Folded": lambda A: cur(A, rank=5).folded(),
    "Interpolative of columns": lambda A: interpolative(A, rank=5),
    "Interpolative of rows": lambda A: interpolative(A, rank=5, side="rows"),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(params=[name for name in BACKENDS if name not in ("jax", "jax-x64", "cupy")])
def light(request):
    """The libraries that compile nothing."""
    with use(request.param) as found:
        yield found


@pytest.fixture
def A(rng):
    """Complex, so that a transpose is no adjoint."""
    return geometric(24, 16, rng) + 0.1j * geometric(24, 16, rng)


def test_products_from_both_sides(form, backend, A, rng):
    A = A.astype(backend.dtype(A.dtype.name))
    F = form(backend.asarray(A))
    B = to_numpy(F.toarray())
    assert F.shape == B.shape == (24, 16)
    tolerance = 1e-12 if backend.precise else 1e-5
    for shape in ((16,), (16, 3)):
        x = rng.standard_normal(shape).astype(A.dtype)
        np.testing.assert_allclose(to_numpy(F @ backend.companion(x)), B @ x, atol=tolerance * 10)
    if backend.name == "array-api-strict":
        return  # its `@` raises for operands it does not know, where others leave the product to them
    for shape in ((24,), (3, 24)):
        y = rng.standard_normal(shape).astype(A.dtype)
        np.testing.assert_allclose(to_numpy(backend.companion(y) @ F), y @ B, atol=tolerance * 10)


def test_transpose(form, backend, A):
    F = form(backend.asarray(A.astype(backend.dtype(A.dtype.name))))
    np.testing.assert_allclose(
        to_numpy(F.T.toarray()), to_numpy(F.toarray()).T, atol=1e-12 if backend.precise else 1e-5
    )
    assert F.T.shape == (16, 24)
    np.testing.assert_array_equal(to_numpy(F.T.T.toarray()), to_numpy(F.toarray()))


KEYS = (
    (3, 4),
    (-1, -2),
    (slice(2, 9, 3), slice(None)),
    (5, slice(1, 4)),
    (slice(None), 7),
    (slice(None, None, 5), [1, 15]),
    ([4, 0, 4], slice(3)),
    np.ix_([4, 0, 4], [1, 15]),
    ([4, 0, 4], [1, 15, 1]),
    ([[4, 0], [1, 2]], [1, 15]),
    ([[3], [5], [7]], 2),
    (slice(1, 3), [[3, 5], [0, 1]]),
    (np.arange(24) % 2 == 0, 3),
    np.add.outer(np.arange(24), np.arange(16)) % 5 == 0,
    7,
    slice(3, 5),
    [2, 9],
    ...,
    (..., 4),
    (4, ...),
    (slice(0, 0), slice(None)),
    (np.arange(0), np.arange(0)),
)


def test_slices_are_those_of_the_product(form, backend, A):
    F = form(backend.asarray(A.astype(backend.dtype(A.dtype.name))))
    B = to_numpy(F.toarray())
    for key in KEYS if backend.name != "dask" else KEYS[1:3]:
        expected = B[key]
        found = to_numpy(F[key])
        assert found.shape == expected.shape, key
        np.testing.assert_allclose(found, expected, atol=1e-12 if backend.precise else 1e-5)


def test_bad_indices(form, A):
    F = form(A)
    with pytest.raises(IndexError):
        F[24, 0]
    with pytest.raises(IndexError, match="two dimensions; got 3 indices"):
        F[0, 0, 0]
    with pytest.raises(IndexError, match="two dimensions; got 2 indices"):
        F[0, None]
    with pytest.raises(IndexError, match=r"as in NumPy; got shapes \(3,\) and \(2,\); use numpy.ix_ for a block"):
        F[[4, 0, 4], [1, 15]]


def test_counts(form, A):
    F = form(A)
    stored = (F.skeleton, F.coefficients) if isinstance(F, Interpolative) else F.factors
    assert F.parameters == sum(f.size for f in stored)
    assert F.nbytes == sum(f.nbytes for f in stored)
    assert F.dtype == A.dtype
    if isinstance(F, CUR) and F.U.shape == (5, 5):
        assert F.parameters == parameters(24, 16, 5, layout="cur")
    if isinstance(F, Folded):
        assert F.parameters == parameters(24, 16, 5, layout="folded")
    if isinstance(F, Interpolative):
        assert F.parameters == parameters(24, 16, 5, layout="interpolative")


def test_sparse_factors_count_their_entries(rng):
    A = scipy.sparse.random_array((200, 100), density=0.05, rng=rng, format="csr")
    F = cur(A, rank=5)
    assert F.parameters == F.C.nnz + 25 + F.R.nnz < 5 * 300
    assert F.nbytes == 8 * F.parameters


def test_conversions_keep_the_matrix(form, dense, A):
    F = form(dense.asarray(A.astype(dense.dtype(A.dtype.name))))
    B = to_numpy(F.toarray())
    # U of the size 1 / sigma_k magnifies rounding: geometric to the fifth power
    tolerance = (1e-9 if dense.precise else 2e-2) * np.linalg.norm(B)
    others = []
    if isinstance(F, CUR):
        others = [F.folded(), F.interpolative(), F.folded().cur(), F.interpolative().cur(), F.interpolative().folded()]
    elif isinstance(F, Folded):
        others = [F.interpolative(), F.cur(), F.T.interpolative().T, F.interpolative().cur().folded()]
    else:
        others = [F.folded(), F.cur(), F.cur().interpolative(), F.T.T]
    for other in others:
        assert other.rank == 5 or F.rank != 5 or other.rank == min(8, F.factors[-1].shape[0])
        assert np.linalg.norm(to_numpy(other.toarray()) - B) <= tolerance


def test_a_converted_cur_has_its_own_rows_and_columns(rng):
    F = cur(geometric(24, 16, rng), rank=5).folded().cur()
    B = F.toarray()
    np.testing.assert_allclose(F.C, B[:, F.columns], atol=1e-12)
    np.testing.assert_allclose(F.R, B[F.rows], atol=1e-12)
    assert F.certificate is None


@pytest.mark.parametrize("rank", [1, 15, 16])
def test_conversions_near_full_rank(rank, rng):
    F = cur(random(16, 16, rng), rank=rank)
    B = F.toarray()
    for other in (F.interpolative(), F.interpolative().cur(), F.T.interpolative().T):
        np.testing.assert_allclose(other.toarray(), B, atol=1e-7 * np.linalg.norm(B))
    assert F.interpolative().coefficients.shape == (16 - rank, rank)


@pytest.mark.parametrize("imaginary", [0, 1j])
def test_no_coefficient_is_larger_than_one(dense, rng, imaginary):
    left, right = random(60, 24, rng) + imaginary * random(60, 24, rng), random(24, 16, rng)
    Q = np.linalg.qr(left)[0]
    rows = lu_pivots(Q)
    assert np.abs(Q @ np.linalg.inv(Q[rows])).max() > 1.1  # as pivots alone have it
    dtype = dense.dtype(left.dtype.name)
    F = Folded(dense.asarray(left.astype(dtype)), dense.asarray(right.astype(dtype))).interpolative()
    assert np.abs(to_numpy(F.coefficients)).max() <= LARGEST + 1e-4
    assert sorted([*to_numpy(F.chosen), *to_numpy(F.others)]) == list(range(60))
    tolerance = 1e-12 if dense.precise else 1e-4
    np.testing.assert_allclose(to_numpy(F.toarray()), left @ right, atol=tolerance * np.linalg.norm(left @ right))


@pytest.mark.parametrize("left", [np.ones((6, 3)), np.eye(6, 3)])
def test_exchanges_of_rows_that_are_alike_end(left):
    F = Folded(left, np.ones((3, 4))).interpolative()
    assert sorted([*F.chosen, *F.others]) == list(range(6))
    np.testing.assert_allclose(F.toarray(), left @ np.ones((3, 4)), atol=1e-14)


def test_conversion_that_cannot_be():
    with pytest.raises(ValueError, match="rank 4 cannot be stored as 3 rows; transpose it first"):
        Folded(np.ones((3, 4)), np.ones((4, 9))).interpolative()


def test_interpolative_keeps_the_identity_at_the_chosen_ones(backend, A):
    F = interpolative(backend.asarray(A), rank=5)
    chosen, others = to_numpy(F.chosen), to_numpy(F.others)
    np.testing.assert_array_equal(to_numpy(F.projection)[:, chosen], np.eye(5))
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(16))
    np.testing.assert_array_equal(to_numpy(F.skeleton), A.astype(to_numpy(F.projection).dtype)[:, chosen])


def test_save_and_load(form, backend, A, tmp_path):
    F = form(backend.asarray(A.astype(backend.dtype(A.dtype.name))))
    F.save(tmp_path / "factors.npz")
    G = type(F).load(tmp_path / "factors.npz")
    assert type(G) is type(F)
    assert all(isinstance(value, np.ndarray) for value in G.factors)
    np.testing.assert_allclose(G.toarray(), to_numpy(F.toarray()), rtol=1e-12 if backend.precise else 1e-3, atol=1e-6)
    assert list(tmp_path.iterdir()) == [tmp_path / "factors.npz"]
    for name in ("rows", "columns", "chosen", "others", "side"):
        if hasattr(F, name) and name != "side":
            np.testing.assert_array_equal(getattr(G, name), to_numpy(getattr(F, name)))
        elif hasattr(F, name):
            assert G.side == F.side


def test_loading_the_wrong_thing(tmp_path, rng):
    path = tmp_path / "x.npz"
    cur(random(8, 6, rng), rank=2).save(path)
    with pytest.raises(ValueError, match=r"kind CUR; load it with CUR\.load"):
        Folded.load(path)
    np.savez(path, a=1)
    with pytest.raises(ValueError, match="`path` must be a file written by `save`"):
        CUR.load(path)
    np.savez(path, kind=np.array("CUR"), C=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        CUR.load(path)


def test_linear_operator(form, A, rng):
    F = form(A)
    operator = F.aslinearoperator()
    B = F.toarray()
    x, y = rng.standard_normal(16), rng.standard_normal(24)
    np.testing.assert_allclose(operator @ x, B @ x, atol=1e-12)
    np.testing.assert_allclose(operator.H @ y, B.conj().T @ y, atol=1e-12)
    s = scipy.sparse.linalg.svds(operator, k=2, return_singular_vectors=False, rng=rng)
    np.testing.assert_allclose(np.sort(s), np.sort(np.linalg.svd(B)[1][:2]), rtol=1e-8)


def test_linear_operator_of_other_libraries(dense, rng):
    if dense.name == "numpy":
        pytest.skip("NumPy has one")
    with pytest.raises(TypeError, match="needs NumPy or SciPy factors; move the factors to the host"):
        cur(dense.asarray(random(8, 6, rng)), rank=2).aslinearoperator()


def test_results_are_frozen_and_readable(form, A):
    F = form(A)
    with pytest.raises(dataclasses.FrozenInstanceError):
        F.shape_of_things = 1
    assert "24 x 16" in repr(F)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(F)).toarray(), F.toarray())


def test_cur_unpacks(A):
    F = cur(A, rank=5)
    C, U, R = F
    assert (C is F.C, U is F.U, R is F.R, len(F)) == (True, True, True, 3)


def test_numpy_sees_the_matrix_and_not_its_factors(form, light, rng):
    """A square one above all, whose factors would stack to an array of three."""
    A = (random(6, 6, rng) + 0.1j * random(6, 6, rng)).astype(light.dtype("complex128"))
    for rank in (6, 5):
        F = cur(light.asarray(A), rank=6) if rank == 6 else form(light.asarray(A))
        B = to_numpy(F.toarray())
        found = np.asarray(F)
        assert (found.shape, found.dtype, F.ndim) == ((6, 6), A.dtype, 2)
        np.testing.assert_array_equal(found, B)
        assert np.asarray(F, dtype=np.complex64).dtype == np.complex64
        assert np.allclose(F, B)
        np.testing.assert_allclose(np.linalg.norm(F), np.linalg.norm(B))
        assert not np.shares_memory(np.array(F), np.asarray(F))
        with pytest.raises(ValueError, match="`copy` must not be False"):
            np.asarray(F, copy=False)


def test_sums_and_differences(form, light, A):
    A = A.astype(light.dtype(A.dtype.name))
    F = form(light.asarray(A))
    B, tolerance = to_numpy(F.toarray()), 1e-12 if light.precise else 1e-5
    for other in (light.companion(A), F):
        X = A if other is not F else B
        np.testing.assert_allclose(to_numpy(F + other), B + X, atol=tolerance)
        np.testing.assert_allclose(to_numpy(F - other), B - X, atol=tolerance)
    if light.name == "array-api-strict":
        return  # its operators raise for operands they do not know
    np.testing.assert_allclose(to_numpy(light.companion(A) - F), A - B, atol=tolerance)
    np.testing.assert_allclose(to_numpy(light.companion(A) + F), A + B, atol=tolerance)


@pytest.mark.parametrize("kind", ["csr_array", "csc_matrix", "dia_array", "coo_matrix"])
def test_sparse_matrices_go_with_them(form, A, kind):
    F, S = form(A), getattr(scipy.sparse, kind)(np.round(A, 1))
    B, X = F.toarray(), S.toarray()
    np.testing.assert_allclose(S - F, X - B, atol=1e-12)
    np.testing.assert_allclose(F - S, B - X, atol=1e-12)
    np.testing.assert_allclose(S.conj().T @ F, X.conj().T @ B, atol=1e-12)
    np.testing.assert_allclose(F @ S.conj().T, B @ X.conj().T, atol=1e-12)
    assert type(S.conj().T @ F) is np.ndarray


def test_conjugates_and_adjoints(form, light, A):
    F = form(light.asarray(A.astype(light.dtype(A.dtype.name))))
    B = to_numpy(F.toarray())
    tolerance = 1e-12 if light.precise else 1e-5
    np.testing.assert_allclose(to_numpy(F.H.toarray()), B.conj().T, atol=tolerance)
    np.testing.assert_allclose(to_numpy(F.conj().toarray()), B.conj(), atol=tolerance)
    assert type(F.H) is type(F)
    certificate = getattr(F, "certificate", None)
    assert getattr(F.conj(), "certificate", None) == certificate
    assert getattr(F.H, "certificate", None) == (certificate and certificate.transposed())


@pytest.mark.parametrize("scale", [1e-200, 1e-10, 1.0, 1e200])
def test_norms_from_the_factors(form, scale, A):
    F = form(A)
    parts = {name: getattr(F, name) for name in type(F)._numbers}
    first = "C" if "C" in parts else "left" if "left" in parts else "skeleton"
    F = dataclasses.replace(F, **{first: parts[first] * scale})
    B = F.toarray() / scale
    assert F.norm() / scale == pytest.approx(np.linalg.norm(B), rel=1e-13)
    assert F.norm(2) / scale == pytest.approx(np.linalg.norm(B, 2), rel=1e-13)
    assert dataclasses.replace(F, **{name: 0 * part for name, part in parts.items()}).norm() >= 0.0
    with pytest.raises(ValueError, match="`ord` must be one of 'fro', 2; got 1"):
        F.norm(1)


def test_norms_in_every_library(form, light, A):
    F = form(light.asarray(A.astype(light.dtype(A.dtype.name))))
    assert F.norm() == pytest.approx(np.linalg.norm(to_numpy(F.toarray())), rel=1e-12 if light.precise else 1e-5)


def test_other_dtypes(form, light, A):
    F = form(light.asarray(A.astype(light.dtype(A.dtype.name))))
    G = F.astype("complex64")
    assert "complex64" in str(G.dtype)
    np.testing.assert_allclose(to_numpy(G.toarray()), to_numpy(F.toarray()), atol=1e-5)
    assert F.astype(F.dtype) is F
    if G.dtype != F.dtype and hasattr(G, "certificate"):
        assert G.certificate is None
    for dtype in ("float32", "int64"):
        with pytest.raises(TypeError, match="`dtype` must be floating, and complex for a complex matrix; got"):
            F.astype(dtype)


def test_devices(form, rng):
    torch = pytest.importorskip("torch")
    xp = pytest.importorskip("array_api_strict")
    B = random(24, 16, rng)
    F = form(torch.tensor(B))
    assert F.to("cpu").toarray().equal(F.toarray())
    assert all(x.is_meta for x in vars(F.to("meta")).values() if hasattr(x, "is_meta"))
    S = form(xp.asarray(B)).to(xp.Device("device1"))
    assert {x.device for x in vars(S).values() if hasattr(x, "device")} == {xp.Device("device1")}
    N = form(B)
    assert N.to("cpu") is N
    with pytest.raises(ValueError, match="`device` must be 'cpu' for factors of NumPy, SciPy or Dask; got 'cuda'"):
        N.to("cuda")
    for dtype in (torch.float16, np.float32, np.dtype("f4")):
        with pytest.raises(TypeError, match=r"`device` must be a device; got .*; use astype for a dtype"):
            F.to(dtype)


def test_what_would_form_the_product_in_silence_is_refused(form, A):
    F = form(A)
    for function in (lambda: 2 * F, lambda: F * A, lambda: np.abs(F), lambda: F / 2, lambda: np.exp(F)):
        with pytest.raises(TypeError):
            function()


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("options", [{}, {"link": "cross"}, {"norm": 2}, {"rank": (4, 7)}, {"select": "uniform"}])
def test_rows_and_columns_of_a_certificate_change_places(dtype, options, rng):
    """What is said of one side of the matrix is said of that side of whatever is made of the result."""
    A = geometric(24, 16, rng).astype(dtype)
    result = cur(A, **({"rank": (5, 4)} | options))
    certificate = result.certificate
    swapped = dataclasses.replace(certificate, eta_rows=certificate.eta_columns, eta_columns=certificate.eta_rows)
    for found in (result.T, result.H, result.conj().T):
        assert found.certificate == swapped
        assert found.rows.tolist() == result.columns.tolist()
    assert result.conj().certificate == result.T.T.certificate == certificate
    if options.get("select") != "uniform":
        assert certificate.eta_rows != certificate.eta_columns
    assert result.astype("complex64").certificate is None or dtype == "complex64"


def test_etas_are_those_of_the_transposed_matrix(rng):
    A = geometric(24, 16, rng)
    for result, other in (
        (cur(A, rank=5, subspace="exact"), cur(A.T, rank=5, subspace="exact")),
        (interpolative(A, rank=5, subspace="exact"), interpolative(A.T, rank=5, subspace="exact", side="rows")),
    ):
        found, expected = result.T.certificate, other.certificate
        for name in ("eta_rows", "eta_columns"):
            one, two = getattr(found, name), getattr(expected, name)
            assert (one is None and two is None) or one == pytest.approx(two)
    by_rows = interpolative(A, rank=5, side="rows").certificate
    assert by_rows.eta_rows is not None
    assert by_rows.eta_columns is None
