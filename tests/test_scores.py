"""Importances and links by their entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cur import scores
from cur.importance import Weight, matrix
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
