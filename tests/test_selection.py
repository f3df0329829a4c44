"""Selectors of rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from cur import bounds, cur, deim, selection
from tests.backends import to_numpy
from tests.families import FAMILIES, orthonormal, random

SELECTORS = [getattr(selection, name) for name in selection.__all__ if name != "oversample"]


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


@pytest.mark.parametrize("select", SELECTORS, ids=lambda f: f.__name__)
def test_indices_are_distinct_in_range_and_of_the_library(select, dense, rng):
    V = orthonormal(25, 6, rng)
    A = random(25, 9, rng)
    basis = dense.asarray(V)
    for count in (1, 4, 6):
        chosen = select(basis, count, matrix=dense.asarray(A), rng=3)
        assert type(chosen) is type(basis)
        positions = to_numpy(chosen)
        assert positions.dtype.kind == "i"
        assert positions.shape == (count,)
        assert len(set(positions.tolist())) == count
        assert 0 <= positions.min() <= positions.max() < 25


@pytest.mark.parametrize("select", SELECTORS, ids=lambda f: f.__name__)
def test_same_seed_same_indices(select, rng):
    V, A = orthonormal(40, 5, rng), random(40, 12, rng)
    first, second = (select(V, 5, matrix=A, rng=11).tolist() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("select", [selection.arp, selection.leverage, selection.cmd, selection.uniform])
def test_another_seed_other_indices(select, rng):
    V, A = orthonormal(40, 5, rng), random(40, 12, rng)
    assert len({tuple(select(V, 5, matrix=A, rng=seed).tolist()) for seed in range(10)}) > 5


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


@pytest.mark.parametrize("select", SELECTORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [0, -1, 26])
def test_count_must_be_possible(select, count, rng):
    with pytest.raises(ValueError, match=rf"`count` must be between 1 and \d+, the number of .*; got {count}"):
        select(orthonormal(25, 6, rng), count, matrix=random(25, 6, rng))


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
