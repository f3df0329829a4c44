"""Importances and links by their entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cur import scores
from cur.weights import Weight, matrix
from tests.backends import to_numpy
from tests.families import random


@dataclass
class Layer:
    """What was measured of a layer; whatever was not is not there."""

    norms: np.ndarray
    moments: Weight
    gradients: np.ndarray


def measured(n, m, rng):
    X, G = random(n, 3 * n, rng), random(m, 3 * m, rng)
    return Layer(np.linalg.norm(X, axis=1), matrix(X @ X.T), G @ G.T), X


@pytest.mark.parametrize("name", scores.IMPORTANCES)
def test_importances_are_what_their_formulas_say(name, rng):
    W, (known, X) = random(7, 5, rng), measured(5, 7, rng)
    norms = np.linalg.norm(X, axis=1)
    values, vectors = np.linalg.eigh(X @ X.T)
    expected = {
        "wanda": np.abs(W) * norms,
        "magnitude": np.abs(W),
        "weights": W,
        "activation": W @ np.diag(norms),
        "covariance": W @ (vectors * np.sqrt(values)) @ vectors.T,
    }
    np.testing.assert_allclose(scores.IMPORTANCES[name].score(W, known), expected[name], rtol=1e-10)


@pytest.mark.parametrize("name", scores.LINKS)
def test_links_weigh_by_what_their_formulas_say(name, rng):
    E, (known, X) = random(7, 5, rng), measured(5, 7, rng)
    weights = scores.LINKS[name].weights(E, known)
    if weights is None:
        found = np.linalg.norm(E)
    else:
        found = np.linalg.norm(E * np.sqrt(weights) if isinstance(weights, np.ndarray) else weights.apply(E, 1))
    norms = np.linalg.norm(X, axis=1)
    expected = {"optimal": E, "activation": E * norms, "covariance": E @ X}
    assert found == pytest.approx(np.linalg.norm(expected[name]), rel=1e-10)


@pytest.mark.parametrize("entry", [*scores.IMPORTANCES.values(), *scores.LINKS.values()], ids=lambda entry: entry.name)
def test_what_is_needed_is_said(entry, rng):
    """Nothing is looked at that was not asked for, and everything that was."""
    W, (known, _) = random(7, 5, rng), measured(5, 7, rng)
    seen = set()

    class Watched:
        def __getattr__(self, name):
            seen.add(name)
            return getattr(known, name)

    function = entry.score if isinstance(entry, scores.Importance) else entry.weights
    function(W, Watched())
    assert seen == set(entry.needs)


@pytest.mark.parametrize("name", scores.IMPORTANCES)
def test_an_importance_with_a_link_is_the_weight_under_it(name, rng):
    entry = scores.IMPORTANCES[name]
    if entry.link is None:
        pytest.skip("is no weighted weight")
    W, (known, _) = random(7, 5, rng), measured(5, 7, rng)
    weights = scores.LINKS[entry.link].weights(W, known)
    if weights is None:
        weighted = W
    else:
        weighted = W * np.sqrt(weights) if isinstance(weights, np.ndarray) else weights.apply(W, 1)
    score = entry.score(W, known)
    np.testing.assert_allclose(score @ score.T, weighted @ weighted.T, rtol=1e-10)


def test_names_and_needs_are_checked():
    with pytest.raises(ValueError, match=r"`name` must be one that none of wanda, .* has, got 'wanda'; choose another"):
        scores.importance("wanda", "")
    with pytest.raises(ValueError, match=r"`name` must be one that none of optimal, .* has, got 'optimal'"):
        scores.link("optimal", "")
    with pytest.raises(ValueError, match="`needs` must name some of norms, moments, gradients, got 'angles'"):
        scores.link("new", "", needs="angles")


def test_wanda(dense, rng):
    W, x = rng.standard_normal((7, 5)), rng.uniform(size=5)
    found = scores.wanda(dense.asarray(W), dense.asarray(x))
    np.testing.assert_allclose(to_numpy(found), np.abs(W) * x, rtol=1e-6)
    for bad in (np.full(5, np.nan), -x, np.full(5, np.inf)):
        with pytest.raises(ValueError, match=r"`x_norm` must be finite and non-negative.*check the calibration"):
            scores.wanda(W, bad)
    with pytest.raises(ValueError, match=r"`x_norm` must have one entry per column of `W`, shape \(5,\)"):
        scores.wanda(W, rng.uniform(size=7))


def test_wanda_of_integers_and_lists(rng):
    W = np.array([[-128, 2], [3, 4]], dtype=np.int8)
    np.testing.assert_array_equal(scores.wanda(W, np.array([1, 2])), [[128, 4], [3, 8]])
    with pytest.raises(TypeError, match="`W` must be a dense array; got list"):
        scores.wanda(W.tolist(), np.ones(2))
    with pytest.raises(TypeError, match="`x_norm` must be a plain array; got MaskedArray"):
        scores.wanda(W, np.ma.masked_greater(np.ones(2), 0))
