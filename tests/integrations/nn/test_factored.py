from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cur.integrations.nn import (
    LAYOUTS,
    CompressedLinear,
    CURLinear,
    InterpolativeLinear,
    dense_weight,
    factored,
)

M, N, RANK = 7, 11, 3


def factors(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((M, RANK), (RANK, RANK), (RANK, N), (M,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def layer_of(layout: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> CompressedLinear:
    C, U, R, b = factors(dtype)
    return CURLinear.from_factors(C, U, R, bias=b if bias else None).to_layout(layout)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", factored())
def test_every_layout_computes_the_same_function(layout: str, bias: bool) -> None:
    C, U, R, b = factors()
    x = torch.randn(2, 5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x @ (C @ U @ R).T + (b if bias else 0)
    layer = layer_of(layout, bias=bias)
    scale = torch.linalg.norm(C @ U @ R) * torch.linalg.norm(x)
    assert torch.linalg.norm(layer(x) - expected) <= 1e3 * torch.finfo(torch.float64).eps * scale
    assert torch.linalg.norm(layer.to_linear()(x) - expected) <= 1e3 * torch.finfo(torch.float64).eps * scale
    assert (layer.bias_tensor() is None) != bias


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ("cur", RANK * (M + N) + RANK**2),
        ("folded", RANK * (M + N)),
        ("interpolative", RANK * (M + N - RANK)),
    ],
)
def test_layouts_keep_the_numbers_they_promise(layout: str, count: int) -> None:
    assert sum(p.numel() for p in layer_of(layout, bias=False).parameters()) == count


@pytest.mark.parametrize("target", factored())
@pytest.mark.parametrize("layout", factored())
def test_conversions_lose_nothing(layout: str, target: str) -> None:
    layer = layer_of(layout)
    other = layer.to_layout(target)
    assert isinstance(other, LAYOUTS[target])
    assert (other is layer) == (layout == target)
    error = torch.linalg.norm(other.weight - layer.weight)
    assert error <= 1e3 * torch.finfo(torch.float64).eps * torch.linalg.norm(layer.weight)


def test_conversion_to_rows_survives_a_core_without_full_rank() -> None:
    C, U, R, _ = factors()
    U[:, 0] = 0.0
    layer = CURLinear.from_factors(C, U, R)
    other = layer.to_layout("interpolative")
    error = torch.linalg.norm(other.weight - layer.weight)
    assert error <= 1e3 * torch.finfo(torch.float64).eps * torch.linalg.norm(layer.weight)


@pytest.mark.parametrize(("m", "n"), [(3, 8), (8, 3), (1, 4), (4, 1)])
def test_full_rank_layers_of_any_shape(m: int, n: int) -> None:
    rank = min(m, n)
    left = torch.randn(m, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = torch.randn(rank, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert factored()
    for cls in (LAYOUTS[layout] for layout in factored()):
        layer = cls.from_two_factors(left, right)
        assert layer.rank == rank
        assert torch.allclose(layer.weight, left @ right, rtol=0, atol=1e-10)
        assert layer(torch.ones(n, dtype=torch.float64)).shape == (m,)


def test_factors_are_child_linears_and_exact_copies() -> None:
    C, U, R, b = factors(torch.bfloat16)
    layer = CURLinear.from_factors(C, U, R, bias=b)
    assert {name: type(child) for name, child in layer.named_children()} == {
        "R": nn.Linear,
        "U": nn.Linear,
        "C": nn.Linear,
    }
    for child, factor in ((layer.C, C), (layer.U, U), (layer.R, R)):
        assert torch.equal(child.weight, factor)
        assert child.weight.dtype == torch.bfloat16
    assert torch.equal(layer.C.bias, b)


def test_weight_of_half_precision_is_rounded_once() -> None:
    C, U, R, _ = factors(torch.bfloat16)
    exact = C.double() @ U.double() @ R.double()
    weight = CURLinear.from_factors(C, U, R).weight
    assert weight.dtype == torch.bfloat16
    assert torch.all((weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5)


@pytest.mark.parametrize("layout", factored())
def test_state_round_trip_through_the_meta_device(layout: str) -> None:
    layer = layer_of(layout)
    empty = LAYOUTS[layout](N, M, RANK, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.ones(N, dtype=torch.float64)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("layout", factored())
def test_gradients_reach_every_factor(layout: str) -> None:
    layer = layer_of(layout)
    layer(torch.ones(2, N, dtype=torch.float64)).square().sum().backward()
    assert list(layer.parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.any(parameter.grad != 0), name


@pytest.mark.parametrize("layout", factored())
def test_compiles_without_graph_breaks(layout: str) -> None:
    layer = layer_of(layout)
    x = torch.ones(2, N, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_order_stays_int64_when_the_layer_is_cast() -> None:
    layer = layer_of("interpolative").to(torch.bfloat16)
    assert isinstance(layer, InterpolativeLinear)
    assert layer.order.dtype == torch.int64
    assert layer.R.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_made_from_conv1d_goes_back_to_one(bias: bool) -> None:
    C, U, R, b = factors(torch.float32)
    layer = CURLinear.from_factors(C, U, R, bias=b if bias else None, transposed=True)
    dense = layer.to_layout("folded").to_dense()
    assert type(dense) is Conv1D
    x = torch.ones(2, N)
    assert torch.allclose(dense(x), layer(x), rtol=1e-4, atol=1e-4)
    weight, _, transposed = dense_weight(dense, "x")
    assert transposed
    assert weight.shape == (M, N)


def test_mode_follows_a_conversion() -> None:
    assert not layer_of("cur").eval().to_layout("folded").training
    assert layer_of("cur").train().to_layout("folded").training


def test_the_repr_shows_the_rank() -> None:
    assert f"rank={RANK}, bias=True" in repr(layer_of("folded"))


@pytest.mark.parametrize("rank", [0, min(M, N) + 1])
@pytest.mark.parametrize("layout", factored())
def test_rank_out_of_range(layout: str, rank: int) -> None:
    with pytest.raises(ValueError, match=f"`rank` must be between 1 and {min(M, N)}.*got {rank}"):
        LAYOUTS[layout](N, M, rank)


def test_shapes_that_do_not_chain() -> None:
    C, U, R, b = factors()
    with pytest.raises(ValueError, match="must have shapes"):
        CURLinear.from_factors(C, U[:, :2], R)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(7,\)"):
        CURLinear.from_factors(C, U, R, bias=b[:2])
    with pytest.raises(ValueError, match=r"`coefficients` must have shape \(4, 3\)"):
        InterpolativeLinear.from_rows(R, C, torch.arange(M))


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="`layout` must be one of cur, folded, interpolative, got 'lu'"):
        layer_of("cur").to_layout("lu")


@pytest.mark.parametrize("layout", factored())
def test_the_bias_has_its_name_in_a_dense_layer(layout: str) -> None:
    kind: Any = factored()[layout]
    layer = kind(6, 4, 2)
    with torch.no_grad():
        layer.bias_tensor().copy_(torch.arange(4.0))
    assert layer.bias is layer.bias_tensor()
    assert kind(6, 4, 2, bias=False).bias is None
    assert sum(name.endswith("bias") for name in layer.state_dict()) == 1
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = layer.absent
