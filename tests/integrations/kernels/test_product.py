from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from cur.integrations.kernels import KERNELS, GridWeight, KernelSettings, Product, choice, limit, times
from tests.integrations.kernels.grids import inputs, make


def forced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let one kernel be the fastest."""
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(times, "measured", lambda runs, x: {one: float(one != name) + 1e-3 for one in runs})


@pytest.fixture(params=["compiled", "multiplied out", "rows multiplied out in turn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    forced(monkeypatch, request.param)
    return str(request.param)


def plain(weight: GridWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def test_it_is_the_product_with_a_bias_for_inputs_of_every_form(kernel: str) -> None:
    weight, bias = make(6, 50, group=32), torch.arange(6.0)
    P = Product(weight, dtype=torch.float32)
    turned = inputs(50, 4).T
    for x in (
        inputs(50),
        inputs(1, 50),
        inputs(2, 3, 50),
        turned,
        inputs(4, 100)[:, ::2],
        inputs(0, 50),
        inputs(2, 0, 50),
    ):
        assert torch.allclose(P(x), plain(weight, x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(P(x, bias), plain(weight, x, bias), rtol=1e-5, atol=1e-5)
        assert P(x).is_contiguous()
    assert P.describe().startswith(kernel)
    with pytest.raises(ValueError, match="`x` must have 50 features"):
        P(inputs(2, 49))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_outputs_have_the_dtype_of_inputs(kernel: str, dtype: torch.dtype) -> None:
    weight = make(6, 50, group=32)
    P, x = Product(weight, dtype=torch.float32), inputs(3, 50, dtype=dtype)
    found, expected = P(x, torch.ones(6)), plain(weight, x, torch.ones(6))
    assert found.dtype == dtype
    assert torch.allclose(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=30 * torch.finfo(dtype).eps)


def test_gradients_are_those_of_the_dense_weight(kernel: str) -> None:
    weight = make(6, 50, group=32)
    P = Product(weight, dtype=torch.float32)
    bias = torch.ones(6, requires_grad=True)
    for shape in ((50,), (2, 3, 50), (0, 50)):
        x = inputs(*shape).requires_grad_()
        found = torch.autograd.grad(P(x, bias).square().sum(), (x, bias))
        expected = torch.autograd.grad(plain(weight, x, bias).square().sum(), (x, bias))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
    x = inputs(3, 50).requires_grad_()
    (once,) = torch.autograd.grad(P(x).pow(3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    (plain_once,) = torch.autograd.grad(plain(weight, x).pow(3).sum(), x, create_graph=True)
    assert torch.allclose(twice, torch.autograd.grad(plain_once.sum(), x)[0], rtol=1e-4, atol=1e-3)


def test_what_was_prepared_without_gradients_serves_where_there_are(kernel: str) -> None:
    with torch.inference_mode():
        weight = make(6, 50, group=32)
        P = Product(weight, dtype=torch.float32)
        P(inputs(2, 50))
    x = inputs(2, 50).requires_grad_()
    P(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(2, 6) @ weight.dense(torch.float32), rtol=1e-4, atol=1e-4)


def test_autocast_multiplies_in_its_dtype(kernel: str) -> None:
    weight = make(6, 50, group=32)
    P, x = Product(weight, dtype=torch.float32), inputs(2, 50).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = P(x, torch.ones(6))
        found.float().sum().backward()
        assert P(x.double()).dtype == torch.float64
    assert found.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    assert torch.allclose(found.float(), plain(weight, x, torch.ones(6)), rtol=0.02, atol=0.1)


class Layer(nn.Module):
    """A layer that packs nothing, with its product beside it."""

    def __init__(self) -> None:
        super().__init__()
        weight = make(6, 50, group=32)
        self.register_buffer("integers", weight.integers)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zeros", weight.zeros)
        self.product = Product(self.grid, dtype=torch.float32)

    def grid(self) -> GridWeight:
        return GridWeight(self.integers, self.scale, self.zeros, 4, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


# Forward-mode derivatives script some of PyTorch's own functions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_tracing_sees_ordinary_operations(kernel: str) -> None:
    layer, x = Layer(), inputs(3, 50)
    expected = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(layer, (x,))
    assert torch.allclose(exported.module()(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(torch.func.vmap(layer)(x), expected, rtol=1e-5, atol=1e-5)
    jacobian = torch.func.jacrev(layer)(x[0])
    assert torch.allclose(jacobian, layer.grid().dense(torch.float32), rtol=1e-5, atol=1e-5)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    assert torch.allclose(tangent, expected, rtol=1e-5, atol=1e-5)
    assert layer.to("meta")(x.to("meta")).shape == (3, 6)


def test_copies_and_pickles_hold_nothing_that_was_prepared(kernel: str) -> None:
    layer, x = Layer(), inputs(3, 50)
    expected, size = layer(x), len(pickle.dumps(Layer()))
    assert layer.product._states
    twin = copy.deepcopy(layer)
    assert not twin.product._states
    assert twin.product.source.__self__ is twin
    assert torch.equal(twin(x), expected)
    assert len(pickle.dumps(layer)) == size
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


def test_weights_are_multiplied_out_within_the_limit_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "multiplied out")
    monkeypatch.setattr(limit, "_taken", {})
    settings = KernelSettings(memory=2 * 6 * 50 * 4)
    made = [Product(make(6, 50, group=32), dtype=torch.float32, settings=settings) for _ in range(3)]
    said = [P.describe() for P in made]
    assert said[:2] == ["multiplied out"] * 2
    assert said[2].startswith(("compiled", "rows"))
    del made[0]
    gc.collect()
    P = Product(make(6, 50, group=32), dtype=torch.float32, settings=settings)
    assert P.describe() == "multiplied out"


def test_by_default_half_of_the_memory_that_is_there_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "_limits", {})
    monkeypatch.setattr(limit, "_taken", {})
    monkeypatch.setattr(limit, "available_memory", lambda: 1000)
    cpu = torch.device("cpu")
    assert limit.is_left(500, cpu, None)
    assert not limit.is_left(501, cpu, None)
    monkeypatch.setattr(limit, "available_memory", lambda: 10**9)
    assert not limit.is_left(501, cpu, None)
    assert limit.is_left(501, cpu, 600)


def test_integers_multiply_only_where_a_user_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "integers, a step for each token"
    forced(monkeypatch, name)
    monkeypatch.setattr("cur.integrations.kernels.integer._adds_up", lambda: True)
    weight = make(16, 64, bits=8, symmetric=True)
    assert KERNELS[name].takes(weight, torch.float32)
    assert Product(weight, dtype=torch.float32, settings=KernelSettings("int8")).describe() == name
    assert name not in Product(weight, dtype=torch.float32).describe()


def test_the_source_is_asked_only_when_something_is_prepared(kernel: str) -> None:
    asked: list[Any] = []
    weight = make(6, 50, group=32)

    def source() -> GridWeight:
        asked.append(None)
        return weight

    P = Product(source, dtype=torch.float32)
    P(inputs(1, 50))
    before = len(asked)
    for _ in range(3):
        P(inputs(1, 50))
    assert len(asked) == before
