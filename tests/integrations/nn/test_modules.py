from __future__ import annotations

import copy

import pytest
from torch import nn

from cur.integrations.nn import LAYOUTS, CURLinear, FoldedLinear, compressed_modules, dense_weight, layer_class, swap_

M, N, RANK = 7, 11, 3


def test_layouts_by_name() -> None:
    assert all(layer_class(name) is cls and cls.layout == name for name, cls in LAYOUTS.items())
    with pytest.raises(
        ValueError, match="`layout` must be one of cur, folded, interpolative, outputs, inputs, whole, got 'x'"
    ):
        layer_class("x")


def test_dense_weight_refuses_other_modules_by_name() -> None:
    class Quantized(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"block\.q_proj is a Quantized"):
        dense_weight(Quantized(2, 2), "block.q_proj")


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
