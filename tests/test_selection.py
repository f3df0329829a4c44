"""Selectors of rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

from cur import bounds, cur, deim, interpolative, selection
from cur import select as indices
from tests.backends import to_numpy
from tests.families import FAMILIES, orthonormal, random

SELECTORS = list(selection.SELECTORS.values())


def textbook_deim(V: np.ndarray) -> list[int]:
    """Algorithm 1 of Sorensen and Embree (2016), as it is printed."""
    chosen = [int(np.argmax(np.abs(V[:, 0])))]
    for j in range(1, V.shape[1]):
        c = np.linalg.solve(V[chosen, :j], V[chosen, j])
        chosen.append(int(np.argmax(np.abs(V[:, j] - V[:, :j] @ c))))
    return chosen


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 40), st.booleans())
def test_deim_is_the_textbook_loop(seed, k, more, is_complex):
    V = orthonormal(k + more, k, np.random.default_rng(seed), is_complex=is_complex)
    assert deim(V).tolist() == textbook_deim(V)


def test_deim_is_the_textbook_loop_in_hundreds_of_trials(rng):
    for trial in range(400):
        m = int(rng.integers(2, 120))
        V = orthonormal(m, int(rng.integers(1, min(m, 40) + 1)), rng, is_complex=trial % 4 == 0)
        assert deim(V).tolist() == textbook_deim(V)


def test_a_wrong_update_is_not_the_textbook_loop(rng):
    """The published code subtracts one vector from all later columns; the comparison must notice."""

    def published(V):
        V, chosen = V.copy(), []
        for j in range(V.shape[1]):
            p = int(np.argmax(np.abs(V[:, j])))
            chosen.append(p)
            V[:, j + 1 :] -= V[:, [j]] * V[p, j]
        return chosen

    V = orthonormal(60, 12, rng)
    assert published(V) != textbook_deim(V)


def test_deim_is_the_same_in_every_library(dense, rng):
    for is_complex in (False, True):
        V = orthonormal(50, 9, rng, is_complex=is_complex)
        chosen = deim(dense.asarray(V))
        assert to_numpy(chosen).tolist() == textbook_deim(V)


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_indices_are_distinct_in_range_and_of_the_library(known, dense, rng):
    V = orthonormal(25, 6, rng)
    A = random(25, 9, rng)
    basis = dense.asarray(V)
    for count in (1, 4, 6):
        chosen = known.choose(basis, count, matrix=dense.asarray(A), rng=3)
        assert type(chosen) is type(basis)
        positions = to_numpy(chosen)
        assert positions.dtype.kind == "i"
        assert positions.shape == (count,)
        assert len(set(positions.tolist())) == count
        assert 0 <= positions.min() <= positions.max() < 25


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_same_seed_same_indices(known, rng):
    V, A = orthonormal(40, 5, rng), random(40, 12, rng)
    first, second = (known.choose(V, 5, matrix=A, rng=11).tolist() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_another_seed_other_indices_where_chance_has_a_part(known, rng):
    V, A = orthonormal(40, 5, rng), random(40, 12, rng)
    found = {tuple(known.choose(V, 5, matrix=A, rng=seed).tolist()) for seed in range(10)}
    assert len(found) > 5 if known.draws else len(found) == 1


@pytest.mark.parametrize("known", [known for known in SELECTORS if not known.draws], ids=lambda known: known.name)
def test_nested_choices_begin_with_those_of_smaller_ranks(known, rng):
    """The fact that a search for a rank relies on: one choice serves all ranks."""
    V, A = orthonormal(40, 10, rng), random(40, 12, rng)
    most = known.choose(V, matrix=A).tolist()
    same = [known.choose(V[:, :k], k, matrix=A).tolist() == most[:k] for k in range(1, 11)]
    assert all(same) == known.nested


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_selectors_read_what_they_say(known, rng):
    V, A = orthonormal(20, 4, rng), random(20, 6, rng)
    if "entries" in known.reads:
        with pytest.raises(TypeError, match="`matrix` must be given"):
            known.choose(V, 4)
        with pytest.raises(TypeError, match="`matrix` must have entries"):
            known.choose(V, 4, matrix=scipy.sparse.linalg.aslinearoperator(A))
    others = [{"matrix": A[::-1]} if "entries" not in known.reads else {"matrix": A}]
    if not {"basis", "sketch"} & set(known.reads):
        V, W = np.zeros((20, 4)), np.ones((20, 4))
        assert known.choose(V, 4, **others[0]).tolist() == known.choose(W, 4, **others[0]).tolist()
    else:
        assert known.choose(V, 4, **others[0]).tolist() == known.choose(V, 4, matrix=A).tolist()
        assert known.choose(V, 4, matrix=A).tolist() != known.choose(V[::-1], 4, matrix=A).tolist()
    if known.dense:
        with pytest.raises(TypeError, match="must be a dense array"):
            known.choose(V, 4, matrix=scipy.sparse.csr_array(A))


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_how_many_rows_a_selector_can_choose(known, rng):
    V, A = orthonormal(20, 4, rng), random(20, 6, rng)
    if known.beyond_basis:
        assert len(set(known.choose(V, 9, matrix=A).tolist())) == 9
        return
    with pytest.raises(ValueError, match="`count` must be between 1 and 4, the number of the basis vectors and rows"):
        known.choose(V, 5, matrix=A)


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
def test_rows_of_zeros_are_chosen_last_where_it_is_said(known, rng):
    V, A = np.zeros((60, 3)), np.zeros((60, 5))
    V[10:16], A[10:16] = orthonormal(6, 3, rng), random(6, 5, rng)
    chosen = [known.choose(V, 3, matrix=A, rng=seed).tolist() for seed in range(5)]
    assert all(set(some) <= set(range(10, 16)) for some in chosen) == known.skips_zeros


def test_every_selector_says_in_a_sentence_what_it_does():
    assert SELECTORS
    for known in SELECTORS:
        assert known.summary.endswith(".")
        assert getattr(selection, known.name) is known.choose
        assert known.name in selection.__all__


def test_names_and_facts_of_selectors_are_checked():
    with pytest.raises(ValueError, match="`name` must be one that no selector has yet, got 'deim'; choose another"):
        selection.selector("deim", reads="basis")
    with pytest.raises(ValueError, match="`reads` must name some of basis, sketch, entries, got 'matrix'"):
        selection.selector("new", reads="matrix")


@pytest.mark.parametrize("reads", ["basis", "sketch", "entries", ()])
def test_a_selector_from_outside_serves_every_driver(reads, rng):
    seen = []

    @selection.selector("longest", reads=reads)
    def longest(basis, count=None, /, *, matrix=None, rng=0):
        """Take the longest rows of the basis."""
        seen.append((basis.shape, count))
        return np.argsort(-np.linalg.norm(basis, axis=1), kind="stable")[:count]

    try:
        A = random(14, 9, rng)
        result = cur(A, rank=(4, 3), select="longest")
        assert (result.rows.shape, result.columns.shape) == ((4,), (3,))
        assert np.linalg.norm(A - result.toarray()) <= result.certificate.value
        found = interpolative(A, tol=0.5, select="longest")
        assert np.linalg.norm(A - found.toarray()) <= 0.5 * np.linalg.norm(A)
        rows, columns = indices(A, rank=(4, 3), select="longest")
        assert (rows.tolist(), columns.tolist()) == (result.rows.tolist(), result.columns.tolist())
        S = np.zeros((30, 30))
        S[20:24, 20:24] = random(4, 4, rng)
        empty = cur(
            scipy.sparse.csr_array(S), rank=2, select="longest", bounds=False
        )  # whose empty rows are not left out
        assert empty.R.shape == (2, 30)
        assert (30, 1) in {shape for shape, _ in seen} or reads in ("basis", "sketch")
        assert longest(np.eye(3), 2).tolist() == [0, 1]
    finally:
        del selection.SELECTORS["longest"]
    with pytest.raises(ValueError, match=r"`select` must be one of 'deim', .*; got 'longest'"):
        cur(A, rank=2, select="longest")


@pytest.mark.parametrize("reads", ["basis", "sketch", "entries"])
@pytest.mark.parametrize("returned", [[0, 0], [0, 14], [-1, 0], [0], [0.0, 1.0]])
def test_what_a_selector_from_outside_returns_is_checked(reads, returned, rng):
    selection.selector("toy", reads=reads)(lambda basis, count=None, /, *, matrix=None, rng=0: np.array(returned))
    try:
        with pytest.raises(ValueError, match=r"`select='toy'` must choose 2 distinct positions from 0 to .*, got"):
            cur(random(14, 9, rng), rank=2, select="toy")
    finally:
        del selection.SELECTORS["toy"]


def test_a_selector_from_outside_may_return_a_list(dense, rng):
    selection.selector("toy", reads=())(lambda basis, count=None, /, *, matrix=None, rng=0: list(range(count)))
    try:
        A = dense.asarray(random(8, 5, rng))
        result = cur(A, rank=2, select="toy")
        assert type(result.rows) is type(A)
        assert to_numpy(result.rows).tolist() == [0, 1]
    finally:
        del selection.SELECTORS["toy"]


@pytest.mark.parametrize("select", [selection.deim, selection.qdeim, selection.osinsky, selection.norm])
def test_permuting_permutes(select, rng):
    V, A = orthonormal(30, 6, rng), random(30, 8, rng)
    order = rng.permutation(30)
    assert order[select(V[order], 6, matrix=A[order])].tolist() == select(V, 6, matrix=A).tolist()


@pytest.mark.parametrize("select", [selection.qdeim, selection.deim])
def test_zero_rows_are_chosen_last(select):
    V = np.zeros((8, 3))
    V[[1, 4, 6], [0, 1, 2]] = 1
    assert sorted(select(V).tolist()) == [1, 4, 6]


def test_deim_choices_are_nested(rng):
    V = orthonormal(40, 10, rng)
    for k in range(1, 11):
        assert deim(V, k).tolist() == deim(V).tolist()[:k]
        assert deim(V[:, :k]).tolist() == deim(V).tolist()[:k]


def test_qdeim_does_not_depend_on_the_basis_of_the_space(rng):
    V = orthonormal(40, 6, rng)
    assert selection.qdeim(V).tolist() == selection.qdeim(V @ orthonormal(6, 6, rng)).tolist()


def test_osinsky_keeps_its_bound(rng):
    """The squared error of interpolation is at most count + 1 times the best."""
    for _ in range(30):
        A = random(30, 14, rng) * np.exp(rng.standard_normal(14))
        X, s, _ = np.linalg.svd(A, full_matrices=False)
        k = int(rng.integers(1, 8))
        rows = selection.osinsky(X[:, :k], matrix=A)
        R = A[rows]
        left = A - A @ np.linalg.pinv(R) @ R
        assert np.linalg.norm(left) ** 2 <= (k + 1) * np.sum(s[k:] ** 2) * (1 + 1e-10)


@pytest.mark.parametrize(("dtype", "small", "left"), [("float32", 4e-23, 2e-23), ("float64", 3e-162, 1e-162)])
def test_osinsky_keeps_its_bound_beside_rows_whose_squares_vanish(dtype, small, left):
    """The square of what is left of the last row rounds to zero and that of its distance does not."""
    V = np.array([[0.5**0.5], [0.5**0.5], [small]], dtype)
    E = np.array([[0.0, 1e-3, 0.0], [0.0, -1e-3, 0.0], [0.0, 0.0, left]])
    A = (V.astype(np.float64) @ [[1.0, 0.0, 0.0]] + E).astype(dtype)
    assert selection.osinsky(V, matrix=A).tolist() == [0]


def test_osinsky_takes_rows_of_all_sizes(rng):
    for _ in range(300):
        m = int(rng.integers(3, 12))
        V = orthonormal(m, int(rng.integers(1, m + 1)), rng) * 10.0 ** rng.integers(-30, 1, m)[:, None]
        A = random(m, 6, rng) * 10.0 ** rng.integers(-30, 1, m)[:, None]
        chosen = selection.osinsky(V.astype("float32"), matrix=A.astype("float32")).tolist()
        assert len(set(chosen)) == V.shape[1]


def test_arp_keeps_its_bound_in_the_mean(rng):
    A = random(30, 14, rng)
    X, s, _ = np.linalg.svd(A, full_matrices=False)
    k, squares = 4, []
    for seed in range(200):
        R = A[selection.arp(X[:, :k], rng=seed)]
        squares.append(np.linalg.norm(A - A @ np.linalg.pinv(R) @ R) ** 2)
    assert np.mean(squares) <= (k + 1) * np.sum(s[k:] ** 2)


def test_arp_follows_the_squared_distances():
    V = np.array([[0.6], [0.8], [0.0]])
    counts = np.bincount([int(selection.arp(V, rng=seed)[0]) for seed in range(2000)], minlength=3)
    assert abs(counts[0] / 2000 - 0.36) < 0.04  # four standard deviations
    assert counts[2] == 0


def textbook_ldeim(V: np.ndarray, count: int, vectors: int) -> list[int]:
    """Gidisu and Hochstenbach's method as they wrote it down: DEIM overwrites the vectors, then rows are ranked."""
    U = V[:, :vectors].copy()
    chosen: list[int] = []
    for j in range(vectors):
        chosen.append(int(np.argmax(np.abs(U[:, j]))))
        later = U[:, j + 1 :]
        later -= U[:, : j + 1] @ np.linalg.solve(U[chosen, : j + 1], later[chosen])
    ranked = np.argsort(-np.linalg.norm(U, axis=1), kind="stable")
    return chosen + [int(i) for i in ranked if i not in chosen][: count - vectors]


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(
    ("count", "vectors"), [(1, None), (6, None), (7, None), (12, None), (30, None), (9, 2), (9, 9)]
)
def test_ldeim_is_the_textbook_method(count, vectors, is_complex, rng):
    V = orthonormal(40, 9, rng, is_complex=is_complex)
    used = min(-(-count // 2), 9) if vectors is None else vectors
    assert selection.ldeim(V, count, vectors=vectors).tolist() == textbook_ldeim(V, count, used)


@pytest.mark.parametrize("k", [3, 8, 15])
def test_ldeim_of_a_factorization_uses_half_the_vectors(k, rng):
    A = FAMILIES["geometric"](60, 40, rng)
    V, _, Wh = np.linalg.svd(A, full_matrices=False)
    found = cur(A, rank=k, select="ldeim", subspace="exact")
    assert found.rows.tolist() == textbook_ldeim(V, k, -(-k // 2))
    assert found.columns.tolist() == textbook_ldeim(Wh.T, k, -(-k // 2))
    assert found.rows.tolist() != deim(V[:, :k]).tolist()


def test_ldeim_in_every_library(dense, rng):
    V = orthonormal(30, 6, rng)
    assert to_numpy(selection.ldeim(dense.asarray(V), 10)).tolist() == selection.ldeim(V, 10).tolist()


def test_ldeim_of_vectors_that_interpolation_exhausts():
    V = np.zeros((6, 3))
    V[0, 0] = V[1, 1] = 1.0
    chosen = selection.ldeim(V, 5, vectors=3)
    assert sorted(set(chosen.tolist())) == sorted(chosen.tolist())
    with pytest.raises(ValueError, match="`vectors` must be between 1 and 3, the number of the basis vectors; got 4"):
        selection.ldeim(V, 5, vectors=4)


@pytest.mark.parametrize("name", ["qdeim", "arp", "osinsky"])
def test_small_rows_count_beside_a_large_one(name, rng):
    """Among very many rows each is below the roundoff of a single large one."""
    m = 300
    V = np.zeros((m, 3), dtype=np.float32)
    V[5, 0] = 1.0
    V[100:, 1:] = 1e-5 * rng.standard_normal((200, 2))
    chosen = getattr(selection, name)(V, matrix=V).tolist()
    assert chosen[0] == 5
    assert min(chosen[1:]) >= 100


def test_oversampling_lowers_eta(rng):
    V = orthonormal(100, 10, rng)
    rows = selection.uniform(V, 10, rng=1)
    before = bounds.eta(V[rows])
    values = [bounds.eta(V[selection.oversample(V, rows, extra)]) for extra in (0, 2, 5, 10, 30)]
    assert values[0] == before
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[3] < before / 3
    chosen = selection.oversample(V, rows, 30).tolist()
    assert len(set(chosen)) == 40
    assert chosen[:10] == rows.tolist()


def test_oversampling_in_every_library(dense, rng):
    V = orthonormal(20, 4, rng)
    expected = selection.oversample(V, np.array([0, 1, 2, 3]), 5)
    found = selection.oversample(dense.asarray(V), dense.asarray(np.array([0, 1, 2, 3])), 5)
    assert to_numpy(found).tolist() == expected.tolist()


def test_norm_takes_the_longest_rows(rng):
    A = random(20, 5, rng)
    expected = np.argsort(-np.linalg.norm(A, axis=1))[:4].tolist()
    basis = np.zeros((20, 1))
    assert selection.norm(basis, 4, matrix=A).tolist() == expected
    assert selection.norm(basis, 4, matrix=scipy.sparse.csr_array(A)).tolist() == expected


def test_drawing_survives_weights_that_underflow():
    """A weight may be positive and its share of the total zero."""
    A = np.diag([1e140, 1e-20, 1e-20, 1.0])
    chosen = selection.cmd(np.zeros((4, 1)), 4, matrix=A).tolist()
    assert sorted(chosen) == [0, 1, 2, 3]
    assert chosen[0] == 0
    assert sorted(selection.cmd(np.zeros((3, 1)), 3, matrix=np.zeros((3, 2))).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("known", SELECTORS, ids=lambda known: known.name)
@pytest.mark.parametrize("count", [0, -1, 26])
def test_count_must_be_possible(known, count, rng):
    with pytest.raises(ValueError, match=rf"`count` must be between 1 and \d+, the number of .*; got {count}"):
        known.choose(orthonormal(25, 6, rng), count, matrix=random(25, 6, rng))


@pytest.mark.parametrize("select", [selection.osinsky, selection.norm, selection.cmd])
def test_selectors_that_look_at_the_matrix_ask_for_it(select, rng):
    with pytest.raises(TypeError, match=r"`matrix` must be given for `\w+`.*pass `matrix=A`"):
        select(orthonormal(8, 2, rng))


def test_osinsky_refuses_sparse_matrices(rng):
    with pytest.raises(TypeError, match=r"`matrix` must be a dense array for `osinsky`.*use `arp`"):
        selection.osinsky(orthonormal(8, 2, rng), matrix=scipy.sparse.eye_array(8).tocsr())


@pytest.mark.parametrize(
    ("basis", "error", "text"),
    [
        ([[1.0]], TypeError, "`basis` must be a dense array; got list"),
        (np.ones(3), ValueError, r"`basis` must be a matrix, and not empty; got shape \(3,\)"),
        (np.ones((3, 0)), ValueError, r"got shape \(3, 0\)"),
        (np.ones((3, 2), dtype=int), TypeError, "`basis` must hold floating-point numbers; got dtype int64"),
        (np.full((3, 2), np.nan), ValueError, "`basis` must be finite"),
    ],
)
def test_bad_basis(basis, error, text):
    with pytest.raises(error, match=text):
        deim(basis)


def test_osinsky_compares_ratios_beyond_single_precision():
    """A large residual over a small distance is no number of single precision, and still one row is the best."""
    V = np.array([[1e-10], [1e-10], [0]], dtype=np.float32)
    A = np.array([[1e15, 0], [3e15, 1e15], [0, 1e14]], dtype=np.float32)
    assert selection.osinsky(V, 1, matrix=A).tolist() == selection.osinsky(V.astype(float), 1, matrix=A * 1.0).tolist()
    assert selection.osinsky(V, 1, matrix=A).tolist() == [0]
