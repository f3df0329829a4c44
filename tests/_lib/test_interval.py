from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cur._lib.interval import interval


@pytest.mark.parametrize("count", [2, 5, 40])
@pytest.mark.parametrize("share", [0.9, 0.95])
def test_it_is_students(count: int, share: float, rng: np.random.Generator) -> None:
    values = rng.normal(3, 2, count)
    mean, half = interval(values.tolist(), share=share)
    low, high = stats.t.interval(share, count - 1, values.mean(), stats.sem(values))
    assert math.isclose(mean, values.mean())
    assert math.isclose(mean - half, low)
    assert math.isclose(mean + half, high)


def test_one_value_has_none() -> None:
    assert interval([2.0]) == (2.0, math.inf)
