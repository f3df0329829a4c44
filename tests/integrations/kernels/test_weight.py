from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cur.integrations.kernels import GridWeight
from tests.integrations.kernels.grids import BITS, SHAPES, make


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_numbers_are_steps_times_what_is_left_of_integers_without_zeros(m: int, n: int, symmetric: bool) -> None:
    for group in (group for group in (32, 64, 128, n) if group <= n):
        for bits in BITS:
            weight = make(m, n, bits=bits, group=group, symmetric=symmetric)
            owner = torch.arange(n) // group
            zeros = 0 if weight.zeros is None else weight.zeros.double()[:, owner]
            expected = (weight.integers.double() - zeros) * weight.scale.double()[:, owner]
            assert torch.equal(weight.dense(torch.float64), expected)
            # A number is rounded once: integers and steps have few digits, so single precision holds it.
            assert torch.equal(weight.dense(torch.float32).double(), expected)
            assert torch.equal(weight.dense(torch.bfloat16), expected.bfloat16())


def test_rows_are_those_of_the_whole() -> None:
    weight = make(12, 50, group=32)
    assert torch.equal(weight.rows(3, 7).dense(torch.float32), weight.dense(torch.float32)[3:7])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 9}, "bits"),
        ({"group": 0}, "group"),
        ({"group": 51}, "group"),
        ({"scale": torch.ones(4, 3)}, "scale"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, "zeros"),
        ({"zeros": None}, "integers"),
        ({"integers": torch.zeros(4, 50, dtype=torch.int32)}, "integers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}` must"):
        replace(make(4, 50, group=32), **change)  # type: ignore[arg-type]


def test_a_weight_without_rows_is_one() -> None:
    weight = GridWeight(torch.zeros(0, 8, dtype=torch.int8), torch.ones(0, 1), None, 4, 8)
    assert weight.dense(torch.float32).shape == (0, 8)
