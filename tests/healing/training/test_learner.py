from __future__ import annotations

from typing import Any

import pytest
import torch

from cur.healing import HealingConfig
from cur.healing.pair.cores import Coordinates, Core
from cur.healing.training.learner import Learner
from cur.integrations.nn import CURLinear

SIDE, TOKENS, CURVATURE = 4, 10, 3.0


def learner_of(count: int, **options: Any) -> Learner:
    """Make a learner of layers that are the identity, in coordinates that are their entries over SIDE."""
    eye = torch.eye(SIDE, dtype=torch.float64)
    layers = {f"{i}": CURLinear.from_factors(eye, eye.clone(), eye) for i in range(count)}
    each = {name: Coordinates(Core(name, layer), eye, 1.0, damping=1e-9) for name, layer in layers.items()}
    return Learner(each, HealingConfig(**{"warmup": 0, "betas": (0.0, 0.95), **options}))


def bowl(learner: Learner) -> float:
    """Return a loss whose price is CURVATURE for every layer: with a slope, which must not count."""
    moved = [c.core.value - c.core.start for c in learner.coordinates.values()]
    return sum(float(CURVATURE * change.square().sum() + change.sum()) for change in moved)


@pytest.mark.parametrize("count", [1, 5])
def test_the_price_is_the_curvature_and_the_model_is_left_as_it_is(count: int) -> None:
    learner = learner_of(count)
    before = [c.core.factor.detach().clone() for c in learner.coordinates.values()]
    learner.measure_price(lambda: bowl(learner))
    assert learner.price == pytest.approx(CURVATURE * count, rel=1e-5)
    assert all(torch.equal(c.core.factor, was) for c, was in zip(learner.coordinates.values(), before, strict=True))


def test_the_rate_follows_from_the_model() -> None:
    one, many = learner_of(1), learner_of(9)
    for learner in (one, many):
        learner.measure_price(lambda learner=learner: bowl(learner))  # type: ignore[misc]
    loss = 1e-3
    numbers = SIDE**2
    expected = (TOKENS / (TOKENS + numbers) * loss / CURVATURE) ** 0.5
    assert one.rate(0, loss, TOKENS) == pytest.approx(expected, rel=1e-5)
    assert many.rate(0, loss, TOKENS) == pytest.approx(
        expected * (1 / 9 * (TOKENS + numbers) / (TOKENS + 9 * numbers)) ** 0.5, rel=1e-5
    )
    assert one.rate(0, loss / 4, TOKENS) == pytest.approx(expected / 2, rel=1e-5)
    assert one.rate(0, 1e6, TOKENS) < 1
    assert learner_of(1, betas=(0.9, 0.95)).rate(0, loss, 10**6) == pytest.approx(0.1 * 0.1)  # momentum, no price
    assert 0 < learner_of(1).rate(0, loss, TOKENS) < 0.1  # without a price, no further than what is tried


def test_what_came_is_the_best_until_something_beats_it() -> None:
    learner = learner_of(1)
    learner = Learner(learner.coordinates, learner.config, before=1.0)
    core = learner.coordinates["0"].core
    core.write_(2 * core.start)
    assert not learner.judge(1.5)
    learner.write_best_()
    assert torch.equal(core.value, core.start)
    core.write_(2 * core.start)
    assert learner.judge(0.5)
    core.write_(3 * core.start)
    learner.write_best_()
    assert torch.equal(core.value, 2 * core.start)
