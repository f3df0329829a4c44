from __future__ import annotations

from dataclasses import dataclass

import pytest

from cur.healing import HealingConfig
from cur.integrations import BudgetConfig
from cur.settings.former import former


@former(gone=3)
@dataclass(frozen=True)
class Config:
    size: int = 1


def test_a_former_field_with_its_only_value_warns() -> None:
    with pytest.warns(DeprecationWarning, match="`gone` is gone, it is always 3 now; leave it out"):
        assert Config(size=2, gone=3) == Config(2)  # type: ignore[call-arg]


def test_a_former_field_with_another_value_is_refused() -> None:
    with pytest.raises(ValueError, match="`gone` is gone, it is always 3 now, got 4; leave it out"):
        Config(gone=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda **options: BudgetConfig(keep=0.8, **options), "allocation", "loss"),
        (HealingConfig, "final_rate", 0.0),
        (HealingConfig, "weight_decay", 0.0),
        (HealingConfig, "clip", 1.0),
        (HealingConfig, "damping", 0.01),
    ],
)
def test_what_configurations_had(make: type, field: str, value: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"`{field}` is gone"):
        assert make(**{field: value}) == make()
    with pytest.raises(ValueError, match=f"`{field}` is gone"):
        make(**{field: "d-rank"})
