from __future__ import annotations

from typing import Any

import pytest
import torch

from cur.integrations.nn.grid import BITS, IntegerGrid, pack, unpack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 7, 8, 13, 64, 65])
def test_what_is_packed_is_unpacked(bits: int, n: int) -> None:
    integers = torch.randint(2**bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    integers[0] = 2**bits - 1
    packed = pack(integers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, IntegerGrid(bits, symmetric=False).row_bytes(n))
    assert torch.equal(unpack(packed, bits, n), integers)
    assert torch.equal(unpack(packed[1], bits, n), integers[1])
    if n % 8 == 0:
        assert packed.shape[1] * 8 == n * bits


def test_a_row_lies_in_its_bytes_as_documented() -> None:
    six = torch.tensor([[0b110001, 0b000010, 0b100011]], dtype=torch.uint8)
    assert pack(six, 6).tolist() == [
        [0b00100001, 0b0011, 0b100011]
    ]  # four lower bits of each, then the two higher ones


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"bits": 7}, "`bits` must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"bits": True}, "`bits` must be one of"),
        ({"bits": "4"}, "`bits` must be one of"),
        ({"group": 12}, "`group` must be a multiple of 8.*got 12; 64 is usual"),
        ({"group": 0}, "`group` must be"),
        ({"group": 64.0}, "`group` must be"),
        ({"symmetric": 1}, "`symmetric` must be True or False, got 1"),
    ],
)
def test_what_cannot_be_packed_is_refused(said: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        IntegerGrid(**said)


@pytest.mark.parametrize("grid", [IntegerGrid(), IntegerGrid(3, 32, symmetric=False), IntegerGrid(2)])
def test_a_grid_is_read_from_json(grid: IntegerGrid) -> None:
    assert IntegerGrid.from_spec(grid.spec()) == grid
    for wrong in ({}, {"bits": 4}, [4, 64, True], {**grid.spec(), "colour": 1}, {**grid.spec(), "bits": 1}):
        with pytest.raises(ValueError, match=r"a grid must have|`bits` must be"):
            IntegerGrid.from_spec(wrong)


@pytest.mark.parametrize(
    ("grid", "n", "bits"),
    [
        (IntegerGrid(8), 512, 8 + 16 / 512),
        (IntegerGrid(4, 64, symmetric=False), 576, 4 + (9 * 16 + 40) / 576),  # nine zeros of 4 bits in five bytes
        (IntegerGrid(4, 64, symmetric=False), 1536, 4 + 20 / 64),
        (IntegerGrid(3, 32), 96, 3 + 16 / 32),
        (IntegerGrid(5, 128, symmetric=False), 256, 5 + (16 + 8) / 128),  # two zeros of 5 bits in two bytes
    ],
)
def test_bits_of_an_entry(grid: IntegerGrid, n: int, bits: float) -> None:
    assert grid.bits_per_entry(n) == pytest.approx(bits)
