from __future__ import annotations

import pytest
import torch
from torch import nn

from cur.integrations.nn import CURLinear, GridLinear, IntegerGrid, InterpolativeLinear, KeptInputs, WholeLinear

M, N = 4, 6


def factor(m: int, n: int, *, bias: bool = False) -> GridLinear:
    generator = torch.Generator().manual_seed(m + n)
    integers = torch.randint(-127, 128, (m, n), generator=generator, dtype=torch.int8)
    scale = torch.rand(m, 1, generator=generator) + 0.5
    return GridLinear.from_integers(integers, scale, torch.randn(m, generator=generator) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_it_applies_what_the_integers_stand_for(bias: bool) -> None:
    layer = factor(M, N, bias=bias)
    assert torch.equal(layer.weight, layer.integers.float() * layer.scale)
    plain = nn.Linear(N, M, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if bias:
            plain.bias.copy_(layer.bias)
    x = torch.randn(3, N)
    assert torch.equal(layer(x), plain(x))
    assert not any(p.requires_grad for p in layer.parameters())


def test_integers_stay_in_another_dtype() -> None:
    layer = factor(M, N)
    before = layer.integers.clone()
    layer.to(torch.bfloat16)
    assert layer.integers.dtype == torch.int8
    assert torch.equal(layer.integers, before)
    assert layer.weight.dtype == layer(torch.zeros(1, N, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("m", "n"), [(M, N), (N, M)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_layer(m: int, n: int, bias: bool) -> None:
    W = factor(m, n, bias=bias)
    layer = WholeLinear.from_rounded(W)
    left, right = layer.two_factors()
    assert left.shape == (m, layer.rank)
    assert torch.equal(left @ right, W.weight)
    x = torch.randn(3, n)
    assert torch.equal(layer(x), W(x))
    assert torch.equal(layer.to_dense()(x), W(x))
    assert layer.stored == m * n
    assert layer.to_layout("whole") is layer
    with pytest.raises(ValueError, match="`layout` of a whole layer must stay 'whole', got 'cur'"):
        layer.to_layout("cur")


@pytest.mark.parametrize(
    ("kind", "options"),
    [(CURLinear, {}), (InterpolativeLinear, {}), (KeptInputs, {}), (KeptInputs, {"inner_rank": 2}), (WholeLinear, {})],
)
def test_state_round_trip_through_the_meta_device(kind: type, options: dict[str, int]) -> None:
    layer = kind(N, M, 4, **options)
    linear = {name: part for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    layer.round_({name: factor(*part.weight.shape, bias=part.bias is not None) for name, part in linear.items()})
    assert not any(isinstance(part, nn.Linear) for part in layer.modules())
    assert "int8" in str(layer)
    empty = kind(N, M, 4, **options, grid=IntegerGrid(), device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.weight, layer.weight)
    assert all(part.dtype == torch.int8 for name, part in empty.named_parameters() if name.endswith("integers"))


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_decide_the_dtype(bias: bool) -> None:
    # Who trains adapters widens parameters and hidden states, but no buffers.
    layer = factor(5, 7, bias=bias).to(torch.bfloat16)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
    assert torch.equal(layer(x), expected)
    layer.float()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
