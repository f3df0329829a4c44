from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from cur.integrations import choose_blocks
from cur.integrations.plan.blocks import inner_blocks, shares


def test_the_smallest_inside() -> None:
    distances = {0: 0.0, 1: 0.4, 2: 0.1, 3: 0.3, 4: 0.1, 5: 0.0}
    assert choose_blocks(distances, 1) == [2]
    assert choose_blocks(distances, 3) == [2, 3, 4]
    assert choose_blocks(distances, 4) == [1, 2, 3, 4]


def test_ends_of_every_stack_are_left_out() -> None:
    assert inner_blocks([4, 3]) == [1, 2, 5]
    assert choose_blocks(dict.fromkeys(range(7), 0.0), 3, stacks=[4, 3]) == [1, 2, 5]
    with pytest.raises(ValueError, match="`count` must be between 1 and 3"):
        choose_blocks(dict.fromkeys(range(7), 0.0), 4, stacks=[4, 3])


def test_stages_have_the_ends_of_their_network_alone() -> None:
    assert inner_blocks([[2, 2, 3], 3]) == [1, 2, 3, 4, 5, 8]
    distances = {0: 0.0, 1: 0.5, 2: 0.1, 3: 0.4, 4: 0.2, 5: 0.2, 6: 0.0}
    assert choose_blocks(distances, 2, stacks=[[2, 2, 3]]) == [2, 4]
    assert choose_blocks(distances, 2, stacks=[[2, 2, 3]], by="position") == [2, 5]
    pairs = {0: 0.0, 2: 0.3, 4: 0.2, 5: 0.0}  # runs lie in one stage, and not at the ends of the network
    assert choose_blocks(pairs, 2, stacks=[[2, 2, 3]], span=2) == [4, 5]
    assert shares(3, [[2, 2, 3], 3]) == [2, 1]


def test_some_blocks_alone_may_be_chosen() -> None:
    distances = dict.fromkeys(range(6), 0.0)
    assert choose_blocks(distances, 2, among={2, 4, 5}) == [2, 4]
    assert choose_blocks(None, 1, by="last", stacks=[6], among={2, 3}) == [3]
    with pytest.raises(ValueError, match="`count` must be between 1 and 2"):
        choose_blocks(distances, 3, among={2, 4, 5})
    assert shares(2, [6, 6], among={2, 4}) == [2, 0]


def test_last_and_random() -> None:
    assert choose_blocks(None, 2, by="last", stacks=[6]) == [3, 4]
    assert choose_blocks(None, 2, by="last", stacks=[4, 4]) == [5, 6]
    draws = [choose_blocks(None, 3, by="random", stacks=[10], seed=seed) for seed in range(20)]
    assert draws[0] == choose_blocks(None, 3, by="random", stacks=[10], seed=0)
    assert len({tuple(draw) for draw in draws}) > 5
    assert all(draw == sorted(set(draw)) and len(draw) == 3 and set(draw) <= set(range(1, 9)) for draw in draws)


@pytest.mark.parametrize("stacks", [[9], [6, 5]])
@pytest.mark.parametrize("span", [2, 3])
def test_runs_have_the_smallest_sum(span: int, stacks: list[int]) -> None:
    rng = np.random.default_rng(span)
    firsts = np.cumsum([0, *stacks])
    for _ in range(20):
        distances = {
            int(first + index): float(rng.random())
            for first, length in zip(firsts, stacks, strict=False)
            for index in range(length - span + 1)
        }
        inner = set(inner_blocks(stacks))
        runs = [set(range(index, index + span)) for index in distances if set(range(index, index + span)) <= inner]
        for number in (1, 2):
            possible = [chosen for chosen in combinations(runs, number) if len(set().union(*chosen)) == span * number]
            if not possible:
                with pytest.raises(ValueError, match="leave room for runs"):
                    choose_blocks(distances, span * number, span=span, stacks=stacks)
                continue
            best = min(possible, key=lambda chosen: sum(distances[min(run)] for run in chosen))
            assert choose_blocks(distances, span * number, span=span, stacks=stacks) == sorted(set().union(*best))


def test_each_stack_has_its_share() -> None:
    assert shares(2, [3, 3]) == [1, 1]
    assert shares(4, [12, 4]) == [3, 1]
    assert shares(1, [4, 12]) == [1, 0]
    assert shares(4, [6, 6], 2) == [2, 2]
    assert shares(8, [6, 6], 4) == [4, 4]
    assert sum(shares(6, [6, 5], 3)) == 6
    assert sum(shares(6, [4, 4], 3)) == 0  # no room for a run of three


@pytest.mark.parametrize(
    ("distances", "count", "options", "message"),
    [
        ({0: 0.1, 1: 0.1, 2: 0.1}, 2, {}, "`count` must be between 1 and 1 for a model of 3 blocks"),
        ({0: 0.1, 1: 0.1, 2: 0.1}, 0, {}, "got 0"),
        ({0: 0.1}, 1, {}, "between 1 and 0"),
        ({1: 0.1, 2: 0.1, 3: 0.1}, 1, {}, "one entry per block"),
        ({0: 0.1, 1: float("nan"), 2: 0.1}, 1, {}, r"not for block\(s\) \[1\]"),
        ({0: 0.1, 1: 0.1, 2: 0.1}, 1, {"by": "luck"}, "must be one of angular, position, random, last, got 'luck'"),
        (None, 1, {}, "one of `distances` and `stacks`"),
        (dict.fromkeys(range(5), 0.1), 3, {"span": 2}, "a multiple of `span`, 2,"),
        (None, 2, {"by": "last", "span": 2, "stacks": [6]}, "`span` must be at least 1, and 1 unless"),
    ],
)
def test_refusals(distances: dict[int, float] | None, count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_blocks(distances, count, **options)


@pytest.mark.parametrize(
    ("distances", "count", "options", "expected"),
    [
        (dict.fromkeys(range(6), 0.1), 2, {}, [3, 4]),
        ({0: 0.1, 1: 0.01, 2: 0.1, 3: 0.1, 4: 0.1}, 1, {}, [1]),
        ({0: 0.1, 1: 0.05, 2: 0.06, 3: 0.1, 4: 0.1}, 1, {}, [2]),
        (dict.fromkeys(range(9), 0.1), 2, {"stacks": [5, 4]}, [3, 7]),
        (dict.fromkeys(range(5), 0.1), 2, {"span": 2}, [3, 4]),
    ],
)
def test_by_position_later_blocks_count_less(
    distances: dict[int, float], count: int, options: dict[str, Any], expected: list[int]
) -> None:
    assert choose_blocks(distances, count, by="position", **options) == expected
