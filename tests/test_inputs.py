"""Every public function that reads a matrix, on every dtype of every library: a right result, or one clear error.

The functions are found by what is exported, so that a new one is tested from the day it is.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import cur
from tests.backends import BACKENDS, to_numpy, use
from tests.families import frobenius, remainder


def readers() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions whose first argument is a matrix, or blocks of one."""
    modules = [(m, getattr(cur, m)) for m in cur.__all__ if inspect.ismodule(getattr(cur, m))]
    for prefix, module in [("", cur), *((f"{name}.", module) for name, module in modules)]:
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters)) in ("A", "blocks"):
                yield prefix + name, function


READERS = dict(readers())
STREAMS = {name for name, f in READERS.items() if next(iter(inspect.signature(f).parameters)) == "blocks"}
IN_MEMORY = {"subspace.exact", "truncation.weighted_svd", "truncation.square_errors", "own_rows"}
IN_MEMORY |= {"own_inputs", "rounding.round_to_grid"}
DENSE = ("numpy", "torch", "jax", "array-api-strict")
REFUSED = {
    **dict.fromkeys(IN_MEMORY, ("dask", "sparse", "operator")),
    **dict.fromkeys(STREAMS, ("operator",)),
    "subspace.lanczos": (*DENSE, "dask"),
}
"""Functions and the libraries that they refuse."""
REAL = {"rounding.round_to_grid"}
"""Functions that refuse complex numbers."""


def call(function: Callable[..., Any], A: Any, C: Any = None, R: Any = None) -> Any:
    """Call by what the signature asks for."""
    parameters = inspect.signature(function).parameters
    given: list[Any] = [A]
    options: dict[str, Any] = {}
    for name, parameter in list(parameters.items())[1:]:
        value = {"C": C, "R": R, "rank": 2, "count": 2}.get(name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            options |= {name: value} if name == "rank" else {}
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            given.append(value)
    return function(*given, **options)


RESULTS = (cur.CUR, cur.Interpolative, cur.rounding.Rounded)
"""Results have shape and dtype like an array."""


def arrays(value: Any) -> Iterator[np.ndarray]:
    """All arrays of numbers in a result."""
    if isinstance(value, tuple):
        for part in value:
            yield from arrays(part)
    elif hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, RESULTS):
        yield to_numpy(value)
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from arrays(part)


NUMPY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"),
    *("float64", "longdouble", "complex64", "complex128", "clongdouble"),
)
CASES = [
    *((library, dtype) for library in ("numpy", "dask", "operator") for dtype in NUMPY_DTYPES),
    *(("sparse", dtype) for dtype in NUMPY_DTYPES if dtype != "float16"),  # which SciPy has none of
    *(("array-api-strict", dtype) for dtype in ("bool", "int8", "int64", "uint64", "float32", "complex64")),
    *(("torch", dtype) for dtype in ("bool", "int8", "int32", "int64", "uint8", "uint16", "uint64")),
    *(("torch", dtype) for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float32", "float64")),
    *(("torch", dtype) for dtype in ("complex32", "complex64", "complex128")),
    # what JAX compiled stays in the process: one worker does it for all
    *(
        pytest.param("jax", dtype, marks=pytest.mark.xdist_group("jax"))
        for dtype in ("bool", "int8", "uint32", "bfloat16", "float8_e5m2", "float32", "complex64")
    ),
]


def numbers(dtype: str) -> np.ndarray:
    """Small integers of rank above two, which every dtype holds exactly."""
    rng = np.random.default_rng(7)
    A = rng.integers(0, 2 if dtype == "bool" else 4, (7, 5)).astype(float)
    return A + 1j * rng.integers(0, 4, A.shape) if "complex" in dtype or dtype == "clongdouble" else A


def matrix(library: str, dtype: str, A: np.ndarray) -> Any:
    if library in ("torch", "jax"):
        xp = importlib.import_module("torch" if library == "torch" else "jax.numpy")
        X = BACKENDS[library].asarray(A.astype(np.complex64 if np.iscomplexobj(A) else np.float32))
        wanted = getattr(xp, "bool_" if (library, dtype) == ("jax", "bool") else dtype)
        return X.to(wanted) if library == "torch" else X.astype(wanted)
    return BACKENDS[library].asarray(A.astype(dtype))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("library", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_right_result_or_one_clear_error(library, dtype, name):
    A = numbers(dtype)
    with use(library):
        X, C, R = (matrix(library, dtype, part) for part in (A, A[:, [0, 3]], A[[1, 6], :]))
        if library == "operator":
            C, R = A[:, [0, 3]], A[[1, 6], :]
        if library in REFUSED.get(name, ()) or (name in REAL and np.iscomplexobj(A)):
            with pytest.raises(TypeError, match=r"^`\w+(='\w+')?` (must|needs|is for)"):
                call(READERS[name], X, C, R)
            return
        result = call(READERS[name], X, C, R)
    found = list(arrays(result))
    assert found
    assert all(np.isfinite(part).all() for part in found)
    certificate = getattr(result, "certificate", None)
    if certificate is not None:
        factors = getattr(result, "factors", None) or (result.toarray(), np.eye(A.shape[1]))
        E = remainder(A, *(to_numpy(f) for f in factors))
        assert frobenius(E) <= certificate.value
        assert certificate.relative < 1
        if isinstance(result, cur.CUR):
            np.testing.assert_array_equal(to_numpy(result.C), A[:, to_numpy(result.columns)])
            np.testing.assert_array_equal(to_numpy(result.R), A[to_numpy(result.rows)])


def test_new_functions_join_by_being_exported():
    assert {"cur", "deim_cur", "interpolative", "select", "stream_cur", "subspace.stream"} <= set(READERS)


class Table:
    """What pandas and polars have in common."""

    def __init__(self, A):
        self.shape, self.columns, self.A = A.shape, list("abcde"), A

    def __iter__(self):
        return iter(self.columns)

    def to_numpy(self):
        return self.A


class Dataset:
    """An array on disk, as of h5py: read by slicing."""

    def __init__(self, A):
        self.shape, self.dtype, self.A = A.shape, A.dtype, A

    def __getitem__(self, key):
        return self.A[key]


def masked_dask(A):
    da = importlib.import_module("dask.array")
    return da.ma.masked_greater(da.from_array(A, chunks=3), 1)


def sparse_chunks(A):
    da = importlib.import_module("dask.array")
    return da.from_array(A, chunks=3).map_blocks(scipy.sparse.csr_array, meta=scipy.sparse.csr_array((0, 0)))


WRONG = {
    "list": (lambda A: A.tolist(), "convert it with numpy.asarray|`blocks.0.` must"),
    "table": (Table, r"got Table; pass its .to_numpy\(\)"),
    "data set": (Dataset, "got Dataset; read it into memory with numpy.asarray, or let stream_cur read it in blocks"),
    "masked": (lambda A: np.ma.masked_greater(A, 1), r"must be a plain array; got MaskedArray.*filled\(\)"),
    "masked in chunks": (masked_dask, r"must be a plain array; got MaskedArray.*filled\(\)"),
    "sparse chunks": (sparse_chunks, "must have chunks of NumPy arrays; got csr_array"),
    "matrix": (np.asmatrix, "got matrix; convert it with numpy.asarray"),
    "meta": (lambda A: importlib.import_module("torch").tensor(A).to("meta"), "must hold values.*meta"),
    "strings": (lambda A: A.astype(str), "must hold real or complex numbers"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_what_holds_no_plain_numbers_is_told_apart(name, kind):
    make, text = WRONG[kind]
    A = numbers("float64")
    X = make(A)
    if kind == "data set" and name in STREAMS:
        found, expected = call(READERS[name], X), call(READERS[name], A)
        assert [part.tolist() for part in arrays(found)] == [part.tolist() for part in arrays(expected)]
        return
    with pytest.raises(TypeError, match=text) as caught:
        call(READERS[name], X, A[:, [0, 3]], A[[1, 6], :])
    assert str(caught.value).startswith(("`A` must", "`blocks"))


@pytest.mark.parametrize("name", [name for name in READERS if name not in STREAMS | {"subspace.lanczos"}])
@pytest.mark.parametrize("transform", ["jit", "vmap", "torch.func.vmap", "torch.func.grad"])
def test_traced_arrays_have_no_values_to_choose_by(name, transform):
    A = numbers("float64").astype(np.float32)
    library = "torch" if transform.startswith("torch") else "jax"
    module = importlib.import_module("torch.func" if library == "torch" else "jax")
    with use(library) as backend:
        C, R = backend.asarray(A[:, [0, 3]]), backend.asarray(A[[1, 6]])
        traced = getattr(module, transform.rsplit(".", 1)[-1])(lambda X: call(READERS[name], X, C, R))
        stack = backend.asarray(np.stack([A, A]) if "vmap" in transform else A)
        with pytest.raises(TypeError, match=r"`A` must hold values.*traced.*outside of the transformation"):
            traced(stack)


def test_gradients_pass_by():
    """The derivative that a library takes while it computes does not keep values from being read."""
    jax = importlib.import_module("jax")
    with use("jax") as backend:
        A = backend.asarray(numbers("float64"))
        slope = jax.grad(lambda X: (cur.deim_cur(X, rank=2).toarray() * X).sum())(A)
        np.testing.assert_allclose(slope, cur.deim_cur(A, rank=2).toarray(), atol=1e-5)


FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-30, 1.0, 1e30, 1e200])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_every_sparse_format_at_every_scale(form, scale, dtype, rng):
    A = scipy.sparse.random_array((30, 20), density=0.2, rng=rng).toarray()
    if abs(np.log10(scale or 1)) > 100 and dtype == "float32":
        pytest.skip("beyond the range of the dtype")
    A = (A * scale).astype(dtype) * (1j if dtype == "complex128" else 1)
    for S in (getattr(scipy.sparse, f"{form}_array")(A), getattr(scipy.sparse, f"{form}_matrix")(A)):
        for result in (cur.deim_cur(S, rank=4), cur.interpolative(S, rank=4), cur.cur(S, rank=4, select="norm")):
            E = remainder(A, *(to_numpy(f) for f in result.factors))
            assert frobenius(E) <= result.certificate.value


def test_scores_and_slices_of_complex_numbers_need_a_complex_matrix():
    A = numbers("float64")
    operator = scipy.sparse.linalg.LinearOperator(
        A.shape, matvec=lambda x: 1j * (A @ x), rmatvec=lambda y: -1j * (A.T @ y), dtype=float
    )
    for matrix, scores in (
        (A, 1j * A),
        (scipy.sparse.csr_array(A), scipy.sparse.coo_array(1j * A)),
        (scipy.sparse.linalg.aslinearoperator(A), scipy.sparse.linalg.aslinearoperator(1j * A)),
        (scipy.sparse.linalg.aslinearoperator(A), operator),
    ):
        with pytest.raises(TypeError, match="`importance` must be real for a real `A`"):
            cur.cur(matrix, rank=2, importance=scores)
    with pytest.raises(TypeError, match="`C` must be real for a real `A`"):
        cur.linking.optimal(A, 1j * A[:, :2], A[:2])
    with pytest.raises(ValueError, match="`R` must hold rows of `A`, each of 5 entries"):
        cur.linking.optimal(A, A[:, :2], A[:2, :3])


def test_views_of_torch_are_read():
    torch = importlib.import_module("torch")
    A = numbers("complex128")
    T = torch.tensor(A)
    for view, plain in ((T.mH, A.conj().T), (T.conj().imag, -A.imag), (T.real.t(), A.real.T)):
        for function in (cur.deim_cur, cur.interpolative, cur.stream_cur):
            result = function(view, rank=2)
            E = remainder(plain, *(to_numpy(f) for f in result.factors))
            assert frobenius(E) <= result.certificate.value


FUNCTIONS = {
    "exact": lambda A: cur.subspace.exact(A, 2),
    "randomised": lambda A: cur.subspace.randomised(A, 2),
    "lanczos": lambda A: cur.subspace.lanczos(scipy.sparse.csr_array(A), 2),
    "sketch": lambda A: cur.subspace.sketch(A, 2),
    "optimal": lambda A: cur.linking.optimal(A, numbers("float64")[:, :2], numbers("float64")[:2]),
    "optimal of columns": lambda A: cur.linking.optimal(numbers("float64") + 0 * A[1, 1], A[:, :2], A[:2]),
    "cross": lambda A: cur.linking.cross(A),
    "eta": lambda A: cur.bounds.eta(A),
    "deim": lambda A: cur.selection.deim(A, 2),
    "weighted_svd": lambda A: cur.weighted.truncation.weighted_svd(A),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", "complex64"])
def test_low_level_functions_refuse_what_is_not_finite(name, value, dtype):
    A = numbers("float64").astype(dtype)
    A[0, 1] = value
    if name == "lanczos" and dtype == "float16":
        pytest.skip("SciPy has no sparse matrices of half precision")
    with pytest.raises(ValueError, match=r"^`(A|C|block|chosen|basis)` must be finite"):
        FUNCTIONS[name](A)


@pytest.mark.parametrize("rank", [2.0, "2", True, np.True_, 0, -1, 6, np.array([1, 2])])
@pytest.mark.parametrize("name", ["exact", "randomised", "lanczos", "stream"])
def test_ranks_of_subspaces_are_checked(name, rank):
    A = numbers("float64")
    if name == "stream" and isinstance(rank, int) and rank > 5:
        rank = -2  # whatever rows may come, any rank may be kept
    function = getattr(cur.subspace, name)
    with pytest.raises((TypeError, ValueError), match=r"^`rank` must be"):
        function(scipy.sparse.csr_array(A) if name == "lanczos" else A, rank)


def test_numbers_beyond_double_precision_are_told_of():
    A = numbers("longdouble").astype(np.longdouble)
    A[0, 0] = np.longdouble(10) ** 1000
    for driver in (cur.deim_cur, cur.interpolative, cur.stream_cur):
        with pytest.raises(ValueError, match=r"must be finite|so large"):
            driver(A, rank=2)


@pytest.mark.parametrize("option", ["norm", "select", "link", "subspace"])
def test_choices_that_are_arrays(option):
    with pytest.raises(ValueError, match=f"^`{option}` must be one of"):
        cur.cur(numbers("float64"), rank=2, **{option: np.array([1, 2])})


def test_parts_of_streams_are_matrices():
    torch, da = importlib.import_module("torch"), importlib.import_module("dask.array")
    A = numbers("float64")
    lazy = da.from_array(A, chunks=3)
    for function in (cur.stream_cur, lambda A, rank: cur.subspace.stream(A, rank)):
        with pytest.raises(TypeError, match="`blocks` must be dense, or sparse of SciPy"):
            function(torch.tensor(A).to_sparse(), rank=2)
        with pytest.raises(ValueError, match="`blocks` must have a known shape"):
            function(lazy[lazy[:, 0] > 0], rank=2)


def test_operators_have_no_entries_to_choose_by():
    A = numbers("float64")
    for function in (cur.selection.norm, cur.selection.cmd, cur.selection.osinsky):
        with pytest.raises(TypeError, match="`matrix` must have entries"):
            function(np.linalg.qr(A[:, :2])[0], 2, matrix=scipy.sparse.linalg.aslinearoperator(A))
    with pytest.raises(TypeError, match="`block` must be the entries"):
        cur.linking.cross(scipy.sparse.linalg.aslinearoperator(A))
