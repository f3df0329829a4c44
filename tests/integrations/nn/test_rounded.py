from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from cur.integrations.kernels import KernelSettings
from cur.integrations.nn import (
    CURLinear,
    GridEmbedding,
    GridLinear,
    IntegerGrid,
    InterpolativeLinear,
    KeptInputs,
    WholeLinear,
    set_kernels_,
)

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
    weight = layer.on_grid().dense(torch.float32)
    expected = torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.float())
    assert torch.equal(layer(x), expected)
    layer.float()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


GRIDS = [
    IntegerGrid(),
    IntegerGrid(8, 16, symmetric=False),
    IntegerGrid(6, symmetric=False),
    IntegerGrid(5, 8),
    IntegerGrid(4, 16, symmetric=False),
    IntegerGrid(3, 8, symmetric=False),
    IntegerGrid(2, 32),
]


def on(grid: IntegerGrid, m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[GridLinear, torch.Tensor]:
    """Return a layer of random integers with 16-bit steps, and its matrix."""
    generator = torch.Generator().manual_seed(m + n)
    groups = grid.groups(n)
    low, high = (1 - 2 ** (grid.bits - 1), 2 ** (grid.bits - 1)) if grid.symmetric else (0, 2**grid.bits)
    integers = torch.randint(low, high, (m, n), generator=generator)
    zeros = None if grid.symmetric else torch.randint(2**grid.bits, (m, groups), generator=generator)
    scale = (torch.rand(m, groups, generator=generator) + 0.5).bfloat16().to(dtype)
    owner = torch.zeros(n, dtype=torch.long) if grid.group is None else torch.arange(n) // grid.group
    matrix = (integers - (0 if zeros is None else zeros[:, owner])) * scale.double()[:, owner]
    kind = torch.int8 if grid.symmetric else torch.uint8
    taken = None if zeros is None else zeros.to(torch.uint8)
    return GridLinear.from_integers(integers.to(kind), scale, zeros=taken, grid=grid), matrix


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(5, 32), (3, 21), (1, 1)])
def test_any_grid_applies_what_the_integers_stand_for(grid: IntegerGrid, m: int, n: int) -> None:
    layer, matrix = on(grid, m, n)
    assert torch.equal(layer.weight.double(), matrix)
    x = torch.randn(2, 3, n)
    torch.testing.assert_close(layer(x), (x.double() @ matrix.T).float(), rtol=1e-4, atol=1e-4)
    assert not any(part.requires_grad for part in layer.parameters())
    again = GridLinear(n, m, bias=False, grid=grid, device="meta")
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.weight, layer.weight)
    assert str(grid) in str(layer)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_a_table_are_looked_up(grid: IntegerGrid) -> None:
    layer, matrix = on(grid, 6, 20)
    known = layer.on_grid()
    table = GridEmbedding.from_integers(known.integers, layer.scale, zeros=known.zeros, grid=grid)
    tokens = torch.tensor([[0, 5], [3, 3]])
    assert torch.equal(table(tokens).double(), matrix[tokens])
    assert torch.equal(table.weight, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_parameter_has_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    # Swin v2 casts inputs of a part to the dtype of its first parameter.
    for grid in GRIDS:
        layer, _ = on(grid, 4, 16)
        layer.to(dtype)
        assert next(layer.parameters()).dtype == layer.weight.dtype == dtype
        assert layer.integers.dtype == (torch.int8 if grid == IntegerGrid() else torch.uint8)


def test_steps_are_stored_in_sixteen_bits_where_that_changes_nothing() -> None:
    grid = IntegerGrid(4, 16, symmetric=False)
    layer, _ = on(grid, 4, 32)
    assert layer.stored_scale().dtype == torch.float16
    with torch.no_grad():
        layer.scale[0, 0] = torch.tensor(1e-7).bfloat16()  # between two numbers of float16
    assert layer.stored_scale().dtype == torch.bfloat16
    with torch.no_grad():
        layer.scale[0, 0] = 0.1
    assert layer.stored_scale().dtype == torch.float32
    rows, _ = on(IntegerGrid(), 4, 32)
    assert rows.stored_scale().dtype == torch.float32


def test_what_is_arranged_for_products_is_forgotten_with_the_weight() -> None:
    grid = IntegerGrid(4, 16, symmetric=False)
    layer, matrix = on(grid, 5, 32)
    other, theirs = on(grid, 5, 32)
    with torch.no_grad():
        other.scale.mul_(2)
    x = torch.randn(2, 32)

    def gives(expected: torch.Tensor) -> None:
        torch.testing.assert_close(
            layer(x.to(layer.scale.dtype)).double(), x.double() @ expected.T, rtol=2e-2, atol=0.2
        )

    gives(matrix)
    layer.load_state_dict(other.state_dict())
    gives(2 * theirs)
    layer.scale = torch.nn.Parameter(layer.scale / 2, requires_grad=False)
    gives(matrix)
    layer.to(torch.bfloat16)
    gives(matrix)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert copied._product is None
    assert torch.equal(copied(x.bfloat16()), layer(x.bfloat16()))


def test_what_products_may_do_is_said_for_all_layers() -> None:
    model = nn.Sequential(on(IntegerGrid(4), 8, 8)[0], nn.ReLU(), on(IntegerGrid(), 8, 8)[0])
    model(torch.zeros(1, 8))
    set_kernels_(model, KernelSettings(activations="int8", memory=0))
    for layer in (model[0], model[2]):
        assert layer._product is None
        assert layer.kernels.activations == "int8"
    model(torch.zeros(1, 8))


def test_gradients_flow_when_the_layer_is_gone() -> None:
    layer, matrix = on(IntegerGrid(4, 16, symmetric=False), 5, 32)
    x = torch.randn(2, 32, requires_grad=True)
    y = layer(x).sum()
    del layer
    y.backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).float().expand(2, -1), rtol=1e-4, atol=1e-4)
