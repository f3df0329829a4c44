"""What layers become when a product is added to their weight."""

from __future__ import annotations

import pytest
import torch

from cur.integrations.nn import LAYOUTS, CompressedLinear, IntegerGrid
from tests.integrations.nn.test_registry import EVERY as FORMS
from tests.integrations.nn.test_registry import layer_of

CHANGEABLE = [(layout, factored) for layout, factored in FORMS if not LAYOUTS[layout].by_inputs]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def made(
    layout: str, *, factored: bool, m: int = 9, n: int = 7, dtype: torch.dtype = torch.float64
) -> CompressedLinear:
    layer = layer_of(layout, m, n, factored=factored, dtype=dtype, bias=True)
    generator = torch.Generator().manual_seed(1)
    for part in layer.parameters():
        part.data.copy_(torch.randn(part.shape, generator=generator))
    return layer


@pytest.mark.parametrize(("layout", "factored"), CHANGEABLE)
@pytest.mark.parametrize("rank", [1, 3, 30])
@pytest.mark.parametrize("scaled", [False, True])
def test_outputs_are_those_of_both(layout: str, factored: bool, rank: int, scaled: bool) -> None:
    layer = made(layout, factored=factored)
    inside = layer.applied
    left, right = random(inside.out_features, rank), random(rank, inside.in_features)
    scale = random(inside.out_features) if scaled else None
    x = random(5, inside.in_features)
    with torch.no_grad():
        bias = layer(torch.zeros_like(x))
        expected = layer(x) - bias + x @ right.T @ left.T
        expected = bias + (expected if scale is None else scale * expected)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        found = layer.plus(left, right, scale=scale)
        torch.testing.assert_close(found(x), expected)
    assert type(found) is type(layer)
    assert found.shape == layer.shape
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    # It is what its description says, so it can be saved.
    again = type(layer).from_spec(found.spec(), 7, 9, bias=True, dtype=torch.float64)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x))


@pytest.mark.parametrize(("layout", "factored"), FORMS)
def test_nothing_is_added_to_a_rounded_weight(layout: str, factored: bool) -> None:
    layer = layer_of(layout, 9, 7, factored=factored, grid=IntegerGrid())
    inside = layer.applied
    with pytest.raises(ValueError, match="nothing can be added to the weight of the layer, which is rounded to int8"):
        layer.plus(torch.zeros(inside.out_features, 1), torch.zeros(1, inside.in_features))


@pytest.mark.parametrize("layout", [layout for layout, kind in LAYOUTS.items() if not kind.by_inputs])
def test_half_precision_is_rounded_once(layout: str) -> None:
    layer = made(layout, factored=False, dtype=torch.bfloat16)
    inside = layer.applied
    left, right = random(inside.out_features, 1).float(), random(1, inside.in_features).float()
    with torch.no_grad():
        found = layer.plus(left, right)
        expected = inside.weight.float() + left @ right
        assert {part.dtype for part in found.parameters()} == {torch.bfloat16}
        error = (found.applied.weight.float() - expected).abs().max()
        assert error <= 20 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@pytest.mark.parametrize(("layout", "called"), [("embedding", "EmbeddingFactors"), ("table", "WholeTable")])
def test_nothing_is_added_to_a_table(layout: str, called: str) -> None:
    with pytest.raises(ValueError, match=f"nothing can be added to .* which is an? {called}"):
        layer_of(layout, 9, 7, factored=False).plus(torch.zeros(9, 1), torch.zeros(1, 7))


def test_the_core_stays_a_core() -> None:
    layer = made("cur", factored=False)
    found = layer.plus(random(9, 2), random(2, 7))
    assert found.rank == layer.rank + 2
    r = layer.rank
    assert torch.equal(found.U.weight[:r, :r], layer.U.weight)
    assert torch.equal(found.R.weight[:r], layer.R.weight)
    assert torch.equal(found.C.weight[:, :r], layer.C.weight)


def test_a_type_that_cannot_says_so() -> None:
    class Fixed(CompressedLinear):
        layout = "fixed"

        @classmethod
        def largest_rank(cls, m: int, n: int) -> int:
            return min(m, n)

        def _make_(self, **place: object) -> None:
            self.d = torch.nn.Parameter(torch.ones(self.out_features))

    with pytest.raises(ValueError, match="nothing can be added to the weight of the layer, which is a Fixed"):
        Fixed(4, 4, 1).plus(torch.ones(4, 1), torch.ones(1, 4))
