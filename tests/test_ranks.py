"""Counting parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur import ranks

sides = st.integers(1, 3000)


@given(sides, sides, st.floats(0, 1.2), st.sampled_from(ranks.LAYOUTS))
def test_rank_for_is_the_largest_that_fits(m, n, share, layout):
    budget = share * m * n
    r = ranks.rank_for(m, n, budget, layout=layout)
    assert 0 <= r <= min(m, n)
    assert r == 0 or ranks.parameters(m, n, r, layout=layout) <= budget
    if r < min(m, n):
        assert ranks.parameters(m, n, r + 1, layout=layout) > budget


@given(sides, sides)
def test_break_even_is_the_formula(m, n):
    r = ranks.break_even(m, n)
    root = (math.sqrt(m * m + 6 * m * n + n * n) - (m + n)) / 2
    assert abs(r - root) <= 1
    assert ranks.parameters(m, n, r) < m * n or r == 0


def test_published_ranks_at_eighty_percent():
    assert [ranks.rank_for(4096, 4096, 0.8 * 4096**2, layout=layout) for layout in ranks.LAYOUTS] == [1399, 1638, 2264]


@given(sides, sides)
def test_interpolative_always_pays(m, n):
    for r in {0, 1, min(m, n) - 1}:
        if r < min(m, n):
            assert ranks.parameters(m, n, r, layout="interpolative") < m * n


def test_unknown_layout():
    with pytest.raises(ValueError, match="`layout` must be one of 'cur', 'folded', 'interpolative'; got 'dense'"):
        ranks.parameters(2, 2, 1, layout="dense")


def test_energy():
    s = np.array([3.0, 2.0, 1.0])
    assert [ranks.energy(s, f) for f in (0.5, 0.64, 0.65, 0.92, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert ranks.energy(np.zeros(3), 0.9) == 1
    # a cumulative sum from the front would say 1: the tail is below the rounding of the total
    assert ranks.energy(np.array([1.0, 1e-9]), 1.0) == 2
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\]; got 0"):
        ranks.energy(s, 0)


def test_effective_rank():
    assert ranks.effective_rank(np.ones(7)) == pytest.approx(7)
    assert ranks.effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    assert ranks.effective_rank(np.zeros(4)) == 0.0
