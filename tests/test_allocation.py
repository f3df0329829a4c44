"""`ranks.allocate`; the rest of `cur.ranks` is tested in test_ranks.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cur.ranks import allocate


def total(values: list[np.ndarray], choice: tuple[int, ...]) -> float:
    return float(sum(v[i] for v, i in zip(values, choice, strict=True)))


def random_options(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Options of four matrices: non-increasing errors against concave costs, as ranks have, and a last one apart."""
    rng = np.random.default_rng(seed)
    errors, costs = [], []
    for n in rng.integers(2, 7, size=4):
        ranks = np.arange(1, n + 1)
        errors.append(np.append(np.sort(rng.random(n) ** 3)[::-1], 0.0))
        costs.append(np.append(ranks * (2 * n + 1 - ranks), n * (n + 1)).astype(float))
    return errors, costs


@pytest.mark.parametrize("seed", range(40))
def test_against_all_choices(seed: int) -> None:
    errors, costs = random_options(seed)
    everything = list(itertools.product(*(range(len(e)) for e in errors)))
    spent = np.array([total(costs, choice) for choice in everything])
    lost = np.array([total(errors, choice) for choice in everything])
    for share in (0.3, 0.5, 0.8, 0.95):
        budget = max(share * spent.max(), spent.min())
        choice = allocate(errors, costs, budget)
        cost, error = total(costs, choice), total(errors, choice)
        assert cost <= budget
        # No choice that costs no more than the Lagrangian one is better; filling up only improves on that. What
        # remains is the gap between neighbours of the convex hull: at most what one matrix can change.
        best = lost[spent <= budget].min()
        assert error <= best + max(float(np.ptp(e)) for e in errors)
        # No single exchange within the budget would help any more.
        for index, options in enumerate(errors):
            for option in range(len(options)):
                other = (*choice[:index], option, *choice[index + 1 :])
                assert total(costs, other) > budget or total(errors, other) >= error - 1e-15


@pytest.mark.parametrize("seed", range(20))
def test_convex_errors_at_unit_costs_are_shared_optimally(seed: int) -> None:
    rng = np.random.default_rng(seed)
    squares = [np.sort(rng.random(5))[::-1] for _ in range(4)]
    errors = [np.append(np.cumsum(s[::-1])[::-1], 0.0) for s in squares]
    costs = [np.arange(6)] * 4
    for budget in range(21):
        choice = allocate(errors, costs, budget)
        # The best `budget` directions of all matrices together.
        kept = np.sort(np.concatenate(squares))[::-1][:budget].sum()
        assert total(errors, choice) == pytest.approx(sum(s.sum() for s in squares) - kept)
        assert total(costs, choice) <= budget


def test_a_matrix_that_matters_stays_whole() -> None:
    # Cost 100 whole; low-rank options of the first lose much, those of the others almost nothing.
    ranks = np.arange(1, 10)
    cost = np.append(ranks * (20 - ranks), 100)
    dear = np.append(1e3 * (10.0 - ranks), 0.0)
    cheap = np.append(1e-3 * (10.0 - ranks), 0.0)
    assert allocate([dear, cheap, cheap], [cost] * 3, 200)[0] == 9


def test_nothing_is_spent_on_nothing() -> None:
    assert allocate([np.zeros(3), np.array([1.0, 0.0, 0.0])], [np.array([1, 2, 3])] * 2, 100) == (0, 1)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e9, 1e200])
def test_units_do_not_matter(scale: float) -> None:
    errors, costs = random_options(5)
    budget = 0.7 * sum(c.max() for c in costs)
    assert allocate([e * scale for e in errors], costs, budget) == allocate(errors, costs, budget)


def test_what_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="`budget` must be at least 4, the sum of the smallest costs; got 3"):
        allocate([np.array([1.0, 0.0])] * 2, [np.array([2, 5])] * 2, 3)


def test_options_that_do_not_fit_together() -> None:
    one = np.array([1.0])
    with pytest.raises(ValueError, match="one array per matrix, at least one; got 0 and 0"):
        allocate([], [], 1)
    with pytest.raises(ValueError, match="one array per matrix, at least one; got 1 and 2"):
        allocate([one], [one, one], 1)
    with pytest.raises(ValueError, match=r"vectors of one length.*\(1,\) and \(2,\) at position 1"):
        allocate([one, one], [one, np.array([1.0, 2.0])], 5)
    with pytest.raises(ValueError, match="must be finite; they are not at position 0"):
        allocate([np.array([np.nan])], [one], 5)
