from __future__ import annotations

import pytest
import torch

from cur.integrations.nn import LAYOUTS, InterpolativeLinear, KeptInputs, KeptOutputs, compressed_modules, factored

NEURONS, N, M = 6, 5, 4
KEPT = torch.tensor([True, False, False, True, True, False])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def sides(*, bias: bool = True) -> tuple[KeptOutputs, KeptInputs]:
    count = int(KEPT.sum())
    before = KeptOutputs.from_part(random(count, N), KEPT, bias=random(count) if bias else None)
    return before, KeptInputs.from_part(random(M, count), KEPT, bias=random(M) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_together_they_are_the_dense_layers_with_zeros(bias: bool) -> None:
    before, behind = sides(bias=bias)
    x = random(2, 3, N)
    neurons = before.to_linear()(x)
    assert torch.all(neurons[..., ~KEPT] == 0)
    torch.testing.assert_close(neurons[..., KEPT], before(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(behind(before(x)), behind.to_linear()(neurons), rtol=0, atol=1e-12)
    for layer in (before, behind):
        left, right = layer.two_factors()
        assert torch.equal(left @ right, layer.weight)
        assert (layer.bias_tensor() is None) != bias


def test_numbers_are_those_of_kept_neurons() -> None:
    for layer in sides(bias=False):
        stored = sum(p.numel() for p in layer.parameters())
        assert layer.parameter_count(layer.out_features, layer.in_features, layer.rank) == stored


@pytest.mark.parametrize("side", [0, 1])
def test_state_round_trip_through_the_meta_device(side: int) -> None:
    layer = sides()[side]
    empty = LAYOUTS[layer.layout](layer.in_features, layer.out_features, layer.rank, device="meta", dtype=torch.float64)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.kept, KEPT)
    assert torch.equal(empty.weight, layer.weight)


@pytest.mark.parametrize("side", [0, 1])
def test_there_is_no_other_layout(side: int) -> None:
    layer = sides()[side]
    assert layer.to_layout(layer.layout) is layer
    for layout in factored():
        with pytest.raises(ValueError, match=f"must stay '{layer.layout}', got '{layout}'"):
            layer.to_layout(layout)


@pytest.mark.parametrize(("layout", "most", "what"), [("outputs", M, "the outputs"), ("inputs", N, "the inputs")])
def test_count_out_of_range(layout: str, most: int, what: str) -> None:
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"`rank` must be between 1 and {most}, {what} of a .*, got {count}"):
            LAYOUTS[layout](N, M, count)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_kept_may_be_factored(bias: bool) -> None:
    count, inner = int(KEPT.sum()), 2
    options = {"bias": bias, "dtype": torch.float64}
    before = KeptOutputs.from_part(InterpolativeLinear(N, count, inner, **options), KEPT)
    behind = KeptInputs.from_part(InterpolativeLinear(count, M, inner, **options), KEPT)
    x = random(2, 3, N)
    torch.testing.assert_close(behind(before(x)), behind.to_linear()(before.to_linear()(x)), rtol=0, atol=1e-12)
    for layer in (before, behind):
        assert (layer.rank, layer.inner_rank) == (count, inner)
        assert layer.stored == sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
        assert (layer.bias_tensor() is not None) == bias
        assert list(compressed_modules(torch.nn.ModuleDict({"one": layer}))) == ["one"]
        sizes = (layer.in_features, layer.out_features, layer.rank)
        empty = LAYOUTS[layer.layout](*sizes, inner_rank=inner, device="meta", **options)
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(empty.weight, layer.weight)
        with pytest.raises(ValueError, match=r"`inner_rank` must be None or between 1 and 3 .* got 4"):
            LAYOUTS[layer.layout](*sizes, inner_rank=4)
    with pytest.raises(ValueError, match=r"`inner_rank` must be None in the layout .interpolative."):
        InterpolativeLinear(N, M, 2, inner_rank=1)
