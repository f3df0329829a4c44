"""The theorems, and that the tests of them can fail."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.sparse.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bounds import BOUNDS, search
from cur import bounds, cur, deim, interpolative
from cur.linking import cross, optimal
from tests.families import orthonormal, random, with_spectrum


def test_no_bound_fails_in_a_random_search():
    """`benchmarks/bounds.py` tries 20,000 cases; these are the first few of another seed."""
    tallies = search(800, 7)
    assert tallies["refused"].cases < 100
    for name in BOUNDS[:4]:
        assert tallies[name].cases > 50, name
    for name, tally in tallies.items():
        assert tally.violations == [], name
    assert np.median(tallies["projection (B1)"].ratios) <= 10
    assert np.median(tallies["certificate"].ratios) <= 1.05


@pytest.mark.parametrize(
    ("name", "false", "caught"),
    [
        ("projection_bound", lambda p, q, x, y: math.hypot(x, y), "projection (B1)"),
        ("projection_bound", lambda p, q, x, y: min(p, q) * math.hypot(x, y), "projection (B1)"),
        ("cross_bound", lambda gamma, error: error, "cross (B2)"),
    ],
    ids=["without eta", "the smaller eta", "without gamma"],
)
def test_the_random_search_finds_false_bounds(name, false, caught, monkeypatch):
    monkeypatch.setattr(f"cur._driver.certify.{name}", false)
    assert search(800, 8)[caught].violations


def any_basis(seed: int, shrink: float) -> tuple[np.ndarray, ...]:
    """A matrix, bases that need not be singular vectors, and more indices than basis vectors."""
    rng = np.random.default_rng(seed)
    m, n = rng.integers(4, 30, 2)
    k = int(rng.integers(1, min(m, n)))
    A = with_spectrum(m, n, np.exp(-shrink * np.arange(min(m, n))), rng, is_complex=seed % 2 == 0)
    V, W = orthonormal(m, k, rng), orthonormal(n, k, rng)
    rows = rng.permutation(m)[: rng.integers(k, m + 1)]
    columns = rng.permutation(n)[: rng.integers(k, n + 1)]
    return A, V, W, rows, columns


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_projection_bound_holds_for_any_bases_and_indices(seed, shrink):
    A, V, W, rows, columns = any_basis(seed, shrink)
    C, R = A[:, columns], A[rows]
    E = A - C @ np.linalg.pinv(C) @ A @ np.linalg.pinv(R) @ R
    row_part, column_part = A - A @ W @ W.conj().T, A - V @ (V.conj().T @ A)
    for order in (None, 2):
        found = bounds.projection_bound(
            bounds.eta(V[rows]),
            bounds.eta(W[columns]),
            np.linalg.norm(row_part, order),
            np.linalg.norm(column_part, order),
        )
        assert np.linalg.norm(E, order) <= found * (1 + 1e-9) + 1e-12


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_sorensen_embree_holds_for_singular_vectors(seed, k):
    rng = np.random.default_rng(seed)
    A = with_spectrum(20, 15, np.sort(rng.uniform(size=15))[::-1] ** 3, rng)
    X, s, Yh = np.linalg.svd(A)
    rows, columns = deim(X[:, :k]), deim(Yh[:k].T)
    C, R = A[:, columns], A[rows]
    E = A - C @ optimal(A, C, R) @ R
    eta = bounds.eta(X[rows, :k]), bounds.eta(Yh[:k, columns].T)
    assert np.linalg.norm(E, 2) <= bounds.sorensen_embree(*eta, s[k]) * (1 + 1e-10)
    sharper = bounds.projection_bound(*eta, s[k], s[k])
    assert np.linalg.norm(E, 2) <= sharper * (1 + 1e-10)
    assert sharper <= bounds.sorensen_embree(*eta, s[k])


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(0, 5))
def test_cross_bound_holds_for_any_rows_and_columns(seed, k, more):
    rng = np.random.default_rng(seed)
    A = with_spectrum(20, 15, np.exp(-rng.uniform(0, 1) * np.arange(15)), rng)
    columns, rows = rng.permutation(15)[:k], rng.permutation(20)[: k + more]
    C = A[:, columns]
    Q = np.linalg.qr(C)[0]
    E = A - C @ cross(A[np.ix_(rows, columns)]) @ A[rows]
    gamma = bounds.eta(Q[rows])
    for order in (None, 2):
        found = bounds.cross_bound(gamma, np.linalg.norm(A - Q @ (Q.T @ A), order))
        assert np.linalg.norm(E, order) <= found * (1 + 1e-7)


def adversarial(t: float) -> tuple[np.ndarray, ...]:
    """Theorem (B1) is nearly an equality here: one basis vector all but vanishes at its index, and the residual hides
    where the oblique projector amplifies it.
    """
    v = np.array([t, np.sqrt(1 - t**2)])
    u = np.array([-np.sqrt(1 - t**2), t])
    # the row space is exact (one column chosen of two parallel ones), all the error is that of the rows
    A = np.outer(v, [1.0, 0.0]) + 1e-3 * np.outer(u, [0.0, 1.0])
    return A, v[:, None], np.array([[1.0], [0.0]]), np.array([0]), np.array([0])


@pytest.mark.parametrize("t", [1e-1, 1e-2, 1e-3])
def test_a_family_breaks_false_bounds_and_not_the_true_one(t):
    """The mutations are kept: each drops what a hurried reader might drop, and each must be caught."""
    A, V, W, rows, columns = adversarial(t)
    C, R = A[:, columns], A[rows]
    error = np.linalg.norm(A - C @ optimal(A, C, R) @ R)
    row_part = np.linalg.norm(A - A @ W @ W.T)
    column_part = np.linalg.norm(A - V @ (V.T @ A))
    eta = bounds.eta(V[rows]), bounds.eta(W[columns])
    assert eta[0] == pytest.approx(1 / t)
    assert error <= bounds.projection_bound(*eta, row_part, column_part) * (1 + 1e-12)
    without_eta = bounds.projection_bound(1.0, 1.0, row_part, column_part)
    smaller_eta = bounds.projection_bound(min(eta), min(eta), row_part, column_part)
    only_columns = eta[1] * row_part
    best_rank = np.linalg.svd(A, compute_uv=False)[1]
    if t <= 1e-2:
        assert error > without_eta
        assert error > smaller_eta
    assert error > only_columns or t > 1e-2
    assert bounds.sorensen_embree(*eta, best_rank) >= error


def test_eta(dense, rng):
    V = orthonormal(20, 4, rng)
    rows = np.array([3, 8, 1, 19, 7])
    assert bounds.eta(dense.asarray(V[rows])) == pytest.approx(1 / np.linalg.svd(V[rows])[1][-1], rel=1e-4)
    assert bounds.eta(V[:3]) == math.inf
    assert bounds.eta(np.zeros((4, 2))) == math.inf
    assert bounds.projection_bound(math.inf, 2.0, 1.0, 0.0) == 2.0


def test_the_sketch_fails_no_more_often_than_it_says(rng):
    """(B4) at a failure chance that can be counted; a factor of 1 would fail half of the time."""
    chance, trials = 0.05, 2000
    # a norm along one direction is seen worst
    for ratio, count in ((0.3, 40), (1e-3, 40), (1e-3, 3), (1.0, 3)):
        X = with_spectrum(30, 20, ratio ** np.arange(20), rng)
        sketched = np.linalg.norm(rng.standard_normal((trials, count, 30)) / math.sqrt(count) @ X, axis=(1, 2))
        true = np.linalg.norm(X)
        assert np.mean(true > bounds.sketch_factor(count, chance) * sketched) <= chance
        assert np.mean(true < bounds.sketch_shrinkage(count, chance) * sketched) <= chance
        assert 0.3 < np.mean(true > sketched) < 0.7


def test_sketch_size_and_factor_agree():
    for chance in (1e-2, 1e-6, 1e-12):
        for inflation in (1.1, 1.25, 2.0):
            count = bounds.sketch_size(chance, inflation)
            assert bounds.sketch_factor(count, chance) <= inflation
            assert bounds.sketch_factor(count - 2, chance) > inflation
    for function in (bounds.sketch_factor, bounds.sketch_shrinkage):
        with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
            function(0, 1e-6)


@pytest.mark.parametrize("count", [1, 2, 321, 10**6])
@pytest.mark.parametrize("chance", [0.5, 1e-6, 5e-324])
def test_sketch_factors_have_the_chance_asked_for(count, chance):
    """(B4) in 50 digits, but for the rounding of doubles."""
    with localcontext(prec=50):
        level = -2 * Decimal(chance).ln() / count
        for factor in (bounds.sketch_factor(count, chance), bounds.sketch_shrinkage(count, chance)):
            if factor == math.inf:
                continue
            t = Decimal(factor) ** -2
            assert abs((t - 1 - t.ln()) / level - 1) < 1e-9


@pytest.mark.parametrize("driver", [cur, interpolative])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_an_operator_is_relative_to_the_norm_of_the_matrix(driver, weighted, rng):
    """And not to that of the part that was chosen, which is small where the spectrum is flat."""
    A = rng.standard_normal((500, 450))
    options = {"column_weights": rng.uniform(0.5, 2.0, 450)} if weighted else {}
    weights = np.sqrt(options.get("column_weights", np.ones(450)))
    for shape in (A.shape, (90, 80)):  # of which every row is seen
        part, roots = A[: shape[0], : shape[1]], weights[: shape[1]]
        options = {name: value[: shape[1]] for name, value in options.items()}
        result = driver(scipy.sparse.linalg.aslinearoperator(part), rank=5, **options)
        norm = np.linalg.norm(part * roots)
        true = np.linalg.norm((part - result.toarray()) * roots) / norm
        certificate = result.certificate
        assert 0.8 * norm < certificate.scale <= norm
        assert true <= certificate.relative < (1.6 if certificate.kind == "probabilistic" else 1 + 1e-9) * true


def test_reusing_the_sketch_would_estimate_low(rng):
    """Why the sketch is drawn after the choice: the same Gaussian sees none of what it did not choose."""
    from scipy.sparse.linalg import aslinearoperator

    A = with_spectrum(600, 120, 1.0 / np.arange(1, 121), rng)
    result = cur(aslinearoperator(A), rank=20, failure_probability=1e-3)
    assert result.certificate.kind == "probabilistic"
    assert result.certificate.failure_probability == 1e-3
    error = np.linalg.norm(A - result.toarray())
    assert error <= result.certificate.value <= 1.5 * error


def test_certificate_says_what_it_means(rng):
    A = with_spectrum(20, 15, 0.5 ** np.arange(15), rng)
    certificate = cur(A, rank=5).certificate
    assert str(certificate) == (
        f"The error in the Frobenius norm is at most {certificate.value:.4g}, {certificate.relative:.3g} of the norm "
        "of the matrix (computed from the factors, rounding included; float64)."
    )
    assert "except with probability 1.0e-06" in str(
        bounds.Certificate("fro", 1.0, "probabilistic", 1e-6, "float64", 2.0)
    )
    assert bounds.Certificate("fro", 0.0, "exact", 0.0, "float64", 0.0).relative == 0.0
    assert bounds.Certificate("fro", 1.0, "exact", 0.0, "float64", 0.0).relative == math.inf
    twice = certificate.scaled(2.0)
    assert (twice.value, twice.relative) == (2 * certificate.value, certificate.relative)
    assert twice.eta_rows == certificate.eta_rows


def test_certificate_includes_the_rounding_of_the_factors():
    """Without (B5) the value would fall below the error of exactly reproduced matrices."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(50):
        A = rng.standard_normal((12, 4)).astype(np.float32)
        result = cur(A, rank=4)
        error = np.linalg.norm(A.astype(float) - result.C.astype(float) @ result.U.astype(float) @ result.R)
        assert error <= result.certificate.value
        missed += error > result.certificate.value - result.certificate.rounding
    assert missed > 0


ACTIVATIONS = {
    "identity": lambda t: t,
    "relu": lambda t: np.maximum(t, 0),
    "tanh": np.tanh,
    "silu": lambda t: t * scipy.special.expit(t),
    "gelu": lambda t: t * (1 + scipy.special.erf(t / np.sqrt(2))) / 2,
    "gelu_tanh": lambda t: t * (1 + np.tanh(np.sqrt(2 / np.pi) * (t + 0.044715 * t**3))) / 2,
}


@pytest.mark.parametrize("name", bounds.LIPSCHITZ)
def test_the_output_of_a_layer_behind_an_activation(name: str, rng: np.random.Generator) -> None:
    act = ACTIVATIONS[name]
    for _ in range(50):
        m, n = rng.integers(1, 20, 2)
        W, E = rng.standard_normal((2, m, n)) * 10.0 ** rng.integers(-3, 2, (2, 1, 1))
        X = rng.standard_normal((n, 30)) * rng.exponential(3, (1, 30))
        change = np.linalg.norm(act(W @ X) - act((W + E) @ X), axis=0)
        spectral = np.linalg.norm(E, 2)
        for moved, x in zip(change, X.T, strict=True):
            assert moved <= bounds.layer_output_bound(spectral, float(np.linalg.norm(x)), activation=name) * (1 + 1e-9)
        weighted = np.linalg.norm(E @ X) / np.sqrt(X.shape[1])  # ||E G^(1/2)||_F
        bound = bounds.layer_output_bound(float(weighted), activation=name)
        assert np.sqrt((change**2).mean()) <= bound * (1 + 1e-9)
        if name == "identity":
            assert np.sqrt((change**2).mean()) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("name", bounds.LIPSCHITZ)
def test_lipschitz_constants_are_reached(name: str) -> None:
    t = np.arange(-10, 10, 1e-4)
    slopes = np.abs(np.diff(ACTIVATIONS[name](t))) / 1e-4
    assert 0.9999 * bounds.LIPSCHITZ[name] <= slopes.max() <= bounds.LIPSCHITZ[name] * (1 + 1e-9)


def test_activations_that_are_not_known() -> None:
    assert bounds.layer_output_bound(2.0, 3.0, activation=0.5) == 3.0
    assert bounds.layer_output_bound(0.0, math.inf) == 0.0
    with pytest.raises(ValueError, match=r"`activation` must be one of identity, relu, .*got 'swish'"):
        bounds.layer_output_bound(1.0, activation="swish")
    with pytest.raises(ValueError, match="`error` must be a number that is at least 0; got -1"):
        bounds.layer_output_bound(-1.0)
    with pytest.raises(ValueError, match="`size` must be"):
        bounds.layer_output_bound(1.0, math.nan)


@pytest.mark.parametrize("shape", [(900, 700), (300, 2000)])
@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_sketches_of_operators_are_made_in_parts(shape, at_once, rng, monkeypatch):
    """Of 337 vectors, as long as the matrix has rows, only some are held at once, and the certificate stays."""
    A = random(*shape, rng)
    widths = []

    def matmat(transposed, X):
        widths.append(X.shape[1])
        return (A.T if transposed else A) @ X

    operator = scipy.sparse.linalg.LinearOperator(
        shape,
        matvec=lambda x: A @ x,
        rmatvec=lambda x: A.T @ x,
        matmat=lambda X: matmat(False, X),
        rmatmat=lambda X: matmat(True, X),
        dtype=float,
    )
    whole = cur(operator, rank=4)
    assert max(widths) >= min(300, shape[0])
    widths.clear()
    monkeypatch.setattr("cur._driver.certify.BLOCK_ENTRIES", 1)
    monkeypatch.setattr("cur._driver.certify.LEAST_AT_ONCE", at_once)
    result = cur(operator, rank=4)
    assert max(widths) <= max(at_once, 14)
    assert np.linalg.norm(A - result.toarray()) <= result.certificate.value * (1 + 1e-12)
    assert result.certificate.value == pytest.approx(whole.certificate.value, rel=0.2)


def test_relative_errors_of_matrices_whose_norm_is_beyond_the_range():
    certificate = bounds.Certificate("fro", 1e300, "exact", 0.0, "float64", math.inf)
    assert 0 < certificate.relative < 1e-8
    assert dataclasses.replace(certificate, value=math.inf).relative == math.inf
