from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from cur.integrations.nn import (
    LAYOUTS,
    CompressedLinear,
    CURLinear,
    FoldedLinear,
    InterpolativeLinear,
    KeptInputs,
    KeptOutputs,
    compressed_modules,
    dense_weight,
    is_linear,
    layer_class,
    stand_in,
    swap_,
)

M, N, RANK = 7, 11, 3


def test_layouts_by_name() -> None:
    assert all(layer_class(name) is cls and cls.layout == name for name, cls in LAYOUTS.items())
    known = "embedding, cur, folded, interpolative, outputs, inputs, whole, table"
    with pytest.raises(ValueError, match=f"`layout` must be one of {known}, got 'x'"):
        layer_class("x")


def test_swap_replaces_a_shared_layer_under_every_parent() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(N, M)), "b": nn.Sequential(nn.Linear(N, M))})
    model["b"][0] = model["a"][0]
    new = CURLinear(N, M, RANK)
    swap_(model, {"a.0": new})
    assert model["a"][0] is new
    assert model["b"][0] is new
    assert list(compressed_modules(model)) == ["a.0"]


def test_swap_leaves_the_rest_alone() -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.ReLU(), nn.Linear(M, M))
    before = copy.copy(model._modules)
    swap_(model, {"0": FoldedLinear(N, M, RANK)})
    assert isinstance(model[0], FoldedLinear)
    assert [model[1], model[2]] == [before["1"], before["2"]]


class _Equal(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class _Scaled(nn.Linear):
    scale = 2.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(input)


class _Grouped(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gd,gdo->...go", input, self.weight.view(2, self.in_features, -1))


class _Scores(nn.Linear):
    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(input)
        return scores.topk(2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_that_gives_what_linear_gives_is_one(bias: bool, device: str, dtype: torch.dtype) -> None:
    layer = _Equal(6, 4, bias=bias, device=device, dtype=dtype)
    assert is_linear(layer)
    weight, found, transposed = dense_weight(layer, "layer")
    assert (tuple(weight.shape), found is not None, transposed) == ((4, 6), bias, False)
    with torch.device("meta"):  # as while a model is opened
        assert is_linear(_Equal(7, 4, bias=bias, dtype=dtype))


@pytest.mark.parametrize("kind", [_Scaled, _Grouped, _Scores])
def test_a_subclass_that_does_more_is_none(kind: type[nn.Linear]) -> None:
    with pytest.raises(TypeError, match=f"layer is a {kind.__name__}; .*exclude it from the targets"):
        dense_weight(kind(6, 4), "layer")
    assert not is_linear(kind(6, 4))


def test_settings_of_a_subclass_count() -> None:
    layer = _Scaled(6, 4)
    layer.scale = 1.0
    assert is_linear(layer)
    assert not is_linear(_Scaled(6, 4))


@pytest.mark.parametrize("kind", [CURLinear, FoldedLinear, InterpolativeLinear, KeptOutputs, KeptInputs])
def test_the_bias_can_be_read_of_every_layer(kind: type[CompressedLinear]) -> None:
    """Mamba adds the bias of a layer that it does not call; initialisation sets others."""
    layer = kind(6, 4, 2)
    assert torch.equal(layer.bias, layer.bias_tensor())
    assert kind(6, 4, 2, bias=False).bias is None
    assert torch.equal(copy.deepcopy(layer).bias, layer.bias)


@pytest.mark.parametrize(
    "how", [parametrizations.weight_norm, parametrizations.spectral_norm, prune.random_unstructured]
)
def test_a_layer_whose_weight_is_computed_is_none(how: Callable[..., object]) -> None:
    layer = nn.Linear(6, 4)
    how(layer, "weight", **({"amount": 0.5} if how is prune.random_unstructured else {}))
    assert not is_linear(layer)
    with pytest.raises(TypeError, match=r"the weight of layer is computed from \S+.*make it a parameter first"):
        dense_weight(layer, "layer")


@pytest.mark.parametrize("kind", [CURLinear, FoldedLinear, InterpolativeLinear, KeptOutputs, KeptInputs])
def test_the_argument_has_the_name_that_linear_layers_have(kind: type[CompressedLinear]) -> None:
    layer = kind(6, 4, 2)
    x = torch.ones(3, layer.applied.in_features)
    for part in layer.parameters():
        nn.init.ones_(part)
    assert torch.equal(layer(input=x), layer(x))


def test_factors_are_not_initialised_by_rules_for_dense_layers() -> None:
    spec = CURLinear(N, M, RANK).spec()
    made = stand_in(nn.Linear(N, M), "layer", spec)
    assert len(list(made.modules())) > 1
    assert all(getattr(part, "_is_hf_initialized", False) for part in made.modules())
