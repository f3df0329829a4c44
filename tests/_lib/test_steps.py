"""Steps and zeros of grids."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from cur._lib.steps import FACTORS, STORED, least, ranges, stored


@pytest.mark.parametrize("name", STORED)
def test_steps_are_numbers_of_their_dtype(name, rng):
    torch = importlib.import_module("torch")
    rounded, smallest, largest = stored(name)
    X = np.abs(rng.standard_normal(1000)) * 2.0 ** rng.integers(-20, 14, 1000)
    info = torch.finfo(getattr(torch, name))
    assert (smallest, largest) == (info.smallest_normal, info.max)
    normal = X[smallest < X]
    wanted = torch.tensor(normal).to(getattr(torch, name)).double().numpy()
    np.testing.assert_array_equal(rounded(normal), wanted)
    tiny = smallest * np.array([1e-9, 0.3, 0.9])
    assert (rounded(tiny) >= tiny).all()
    assert (torch.tensor(rounded(tiny)).to(getattr(torch, name)).double().numpy() == rounded(tiny)).all()


@pytest.mark.parametrize("levels", [(0, 15), (-7, 7)])
def test_whole_ranges_reach_all_entries(levels, rng):
    W = rng.standard_normal((6, 12)) + 1
    steps, ends = ranges(W, 4, *levels)
    X = W.reshape(6, 3, 4)
    if ends is None:
        np.testing.assert_allclose(steps * 7, np.abs(X).max(axis=2))
    else:
        np.testing.assert_allclose(ends, np.minimum(X.min(axis=2), 0))
        np.testing.assert_allclose(ends + 15 * steps, X.max(axis=2))


def test_groups_of_zeros_have_the_smallest_step(rng):
    W = rng.standard_normal((3, 6))
    W[1, 3:] = 0
    steps, _ = ranges(W, 3, -7, 7)
    assert steps[1, 1] == np.delete(steps.ravel(), 3).min()
    assert (ranges(np.zeros((2, 4)), 2, 0, 15)[0] == 1).all()


@pytest.mark.parametrize("levels", [(0, 3), (0, 15), (-1, 1), (-7, 7)])
def test_the_best_of_the_parts_that_are_tried(levels, rng):
    W, weights = rng.standard_normal((50, 12)), rng.uniform(0, 1, 12)
    whole = ranges(W, 4, *levels)

    def lost(factors: np.ndarray) -> np.ndarray:
        steps, zeros = least(W, whole, weights, *levels, np.asarray, factors)
        steps = np.repeat(steps, 4, axis=1)
        zeros = np.zeros_like(steps) if zeros is None else np.repeat(zeros, 4, axis=1)
        q = np.clip(np.rint(W / steps + zeros), *levels)
        return (weights * (W - (q - zeros) * steps) ** 2).reshape(50, 3, 4).sum(axis=2)

    each = np.array([lost(FACTORS[i : i + 1]) for i in range(len(FACTORS))])
    np.testing.assert_allclose(lost(FACTORS), each.min(axis=0))
    assert (each.argmin(axis=0) > 0).any()
