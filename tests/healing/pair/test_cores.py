from __future__ import annotations

import pytest
import torch

from cur._lib.errors import NumericalError
from cur.healing.pair.cores import Coordinates, Core
from cur.integrations.nn import CompressedLinear, CURLinear, KeptInputs, factored

M, N, RANK = 9, 14, 4


def layer_of(layout: str, *, graded: float = 1.0) -> CompressedLinear:
    generator = torch.Generator().manual_seed(0)
    C, U, R, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((M, RANK), (RANK, RANK), (RANK, N), (M,))
    )
    scale = torch.logspace(0, -graded, RANK, dtype=torch.float64)
    return CURLinear.from_factors(C * scale, U, R * scale[:, None], bias=bias).to_layout(layout)


@pytest.mark.parametrize("layout", factored())
def test_a_core_is_what_lies_between_left_and_right(layout: str) -> None:
    layer = layer_of(layout)
    core = Core("layer", layer)
    left, right = core.left.clone(), core.right.clone()
    assert torch.allclose(left @ core.start @ right, layer.weight, rtol=1e-10, atol=1e-10)
    U = torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    core.write_(U)
    assert torch.allclose(layer.weight, left @ U @ right, rtol=1e-10, atol=1e-10)
    assert torch.equal(core.value, U)


@pytest.mark.parametrize("layout", factored())
def test_gradients_are_those_of_the_core(layout: str) -> None:
    layer = layer_of(layout)
    core = Core("layer", layer)
    x = torch.randn(20, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(U: torch.Tensor) -> torch.Tensor:
        return (x @ (core.left @ U @ core.right).T + layer.bias_tensor()).square().sum()

    U = core.start.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(U), U)
    layer(x).square().sum().backward()
    found = core.take_gradient()
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert core.factor.grad is None
    assert not core.take_gradient().any()


def test_a_core_that_is_not_finite_is_not_written() -> None:
    layer = layer_of("cur")
    before = layer.weight.clone()
    with pytest.raises(NumericalError, match="the core of layer is not finite"):
        Core("layer", layer).write_(torch.full((RANK, RANK), torch.nan))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("metric", [False, True])
def test_equal_steps_in_whitened_coordinates_change_the_output_equally(metric: bool) -> None:
    layer = layer_of("cur", graded=3.0)
    core = Core("layer", layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, N, dtype=torch.float64, generator=generator)
    factor = torch.randn(M, M, dtype=torch.float64, generator=generator)
    H = factor @ factor.T if metric else torch.eye(M, dtype=torch.float64)
    z, y = x @ core.right.T, layer(x)

    def size(output: torch.Tensor) -> float:
        return float(torch.einsum("ti,ij,tj->", output, H, output).detach()) / len(x)

    coordinates = Coordinates(core, z.T @ z / len(x), size(y), damping=1e-12, metric=H if metric else None)
    for place in ((0, 0), (RANK - 1, RANK - 1), (0, RANK - 1)):
        step = torch.zeros(RANK, RANK)
        step[place] = 0.01
        coordinates.write_(step)
        # One of r^2 coordinates: the mean square change is (0.01 / r)^2 of the mean square output.
        assert size(layer(x) - y) == pytest.approx((0.01 / RANK) ** 2 * size(y), rel=1e-3)


@pytest.mark.parametrize("kept", [5, 12])
def test_the_core_of_a_layer_behind_neurons(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, bias = torch.randn(M, kept, generator=generator), torch.randn(M, generator=generator)
    layer = KeptInputs.from_part(columns.clone(), torch.arange(N) < kept, bias=bias)
    core = Core("layer", layer)
    assert core.rank == M
    x = torch.randn(20, kept, generator=generator)
    U = torch.eye(M).requires_grad_(True)
    (expected,) = torch.autograd.grad((x @ (U @ columns).T + bias).square().sum(), U)
    layer(x).square().sum().backward()
    torch.testing.assert_close(core.take_gradient(), expected, rtol=1e-4, atol=1e-3)
    U = torch.randn(M, M, generator=generator)
    core.write_(U)
    torch.testing.assert_close(layer.C.weight.detach(), U @ columns, rtol=1e-4, atol=1e-5)
