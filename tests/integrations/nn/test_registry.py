from __future__ import annotations

from typing import Any

import pytest
import torch

from cur import ranks
from cur.integrations import nn
from cur.integrations.factor.rounding import round_layer
from cur.integrations.nn import LAYOUTS, CompressedLinear, IntegerGrid, cells, factored, layer_class
from cur.integrations.store.format import narrow_

SIZES = [(7, 11), (11, 7), (8, 8)]
EVERY = [
    (layout, inner) for layout, kind in LAYOUTS.items() for inner in (False, True)[: 1 + bool(kind.factored_stores)]
]


GRIDS = [None, IntegerGrid(), IntegerGrid(4, 8, symmetric=False), IntegerGrid(3), IntegerGrid(5, 16, symmetric=False)]


def layer_of(layout: str, m: int, n: int, *, factored: bool, **options: Any) -> CompressedLinear:
    kind = layer_class(layout)
    rank = 5 if kind.smaller else kind.largest_rank(m, n)
    return kind(n, m, rank, inner_rank=3 if factored else None, **options)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize(("layout", "inner"), EVERY)
def test_a_type_says_what_its_layers_store(layout: str, inner: bool, m: int, n: int, grid: IntegerGrid | None) -> None:
    layer = layer_of(layout, m, n, factored=inner, bias=False, grid=grid)
    kind, state = type(layer), layer.state_dict()
    narrow_(state, layer)
    stored = {key: tuple(value.shape) for key, value in state.items()}
    sizes = kind.sizes(m, n, *layer.ranks)
    said = kind.tensors(factored=inner, grid=grid)
    shapes = {key: (tensor.shape(sizes), tensor.dtype) for key, tensor in said.items()}
    assert {key: shape for key, (shape, _) in shapes.items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }
    assert all(state[key].dtype == (dtype or torch.float32) for key, (_, dtype) in shapes.items())
    assert kind.nbytes(m, n, *layer.ranks, dtype=torch.float32, grid=grid) == sum(
        part.nbytes for part in state.values()
    )
    if grid is None:
        assert layer.stored == sum(part.numel() for part in layer.parameters())
    found = kind.sized(stored, layer.spec())
    known = {"outputs": m, "inputs": n, "rank": layer.rank, "inner_rank": layer.inner_rank}
    assert found == {key: known[key] for key in found}
    assert {"outputs", "inputs"} <= found.keys()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("layout", "inner"), EVERY)
def test_a_layer_is_made_again_from_its_spec(layout: str, inner: bool, grid: IntegerGrid | None) -> None:
    layer = layer_of(layout, 7, 11, factored=inner, grid=grid)
    spec = layer.spec()
    assert type(layer).is_spec(spec)
    again = layer_class(spec["layout"]).from_spec(spec, 11, 7)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    names = {key for key in layer.state_dict() if key.rpartition(".")[2] == "bias"}
    assert names <= set(layer.bias_names)
    assert bool(names) == (not layer.by_inputs)  # a table has none
    for change in ({"rank": 0}, {"rank": True}, {"rank": "5"}, {"colour": "blue"}, {"int8": 1}, {"inner_rank": -1}):
        assert not type(layer).is_spec({**spec, **change})
    assert not type(layer).is_spec({"layout": layout})


@pytest.mark.parametrize("layout", factored())
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_ranks_within_numbers_are_those_of_the_core(layout: str, m: int, n: int) -> None:
    kind = layer_class(layout)
    for numbers in (0, 0.5, *range(1, m * n + 20, 3)):
        assert kind.rank_within(m, n, numbers) == ranks.rank_for(m, n, numbers, layout=layout)
    for rank in range(1, min(m, n) + 1):
        assert kind.parameter_count(m, n, rank) == ranks.parameters(m, n, rank, layout=layout)
    with pytest.warns(DeprecationWarning, match=f"{kind.__name__}.numbers is parameter_count now"):
        assert kind.numbers(m, n, 1) == kind.parameter_count(m, n, 1)


@pytest.mark.parametrize(("layout", "inner"), EVERY)
def test_what_is_trained_moves_the_weight_between_left_and_right(layout: str, inner: bool) -> None:
    layer = layer_of(layout, 7, 11, factored=inner, dtype=torch.float64)
    what = layer.trainable()
    if what is None:
        assert layout in ("outputs", "whole", "embedding", "table")
        return
    part = layer.part.weight if layout == "inputs" else layer.weight
    torch.testing.assert_close(what.left @ what.start() @ what.right, part.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS[1:], ids=str)
@pytest.mark.parametrize(("layout", "inner"), EVERY)
def test_its_factors_are_rounded_to_what_it_says(layout: str, inner: bool, grid: IntegerGrid) -> None:
    layer = layer_of(layout, 7, 11, factored=inner)
    done = round_layer("layer", layer, grid, None, damping=0.1).layer
    assert (layer.grid, done.grid) == (None, grid)
    said, state = type(layer).tensors(factored=inner, grid=grid), done.state_dict()
    assert state.keys() - set(layer.bias_names) == said.keys()
    again = type(layer).from_spec(done.spec(), 11, 7)
    again.load_state_dict(state)
    assert torch.equal(again.matrix, done.matrix)


def test_all_say_the_same_of_a_layer() -> None:
    assert cells(layer_of("inputs", 7, 11, factored=True)) == {"shape": "7 x 11", "layout": "inputs", "rank": "5, 3"}
    with pytest.raises(
        ValueError, match="must be one of embedding, cur, folded, interpolative, outputs, inputs, whole"
    ):
        layer_class("lu")


@pytest.mark.parametrize(
    ("name", "layouts"), [("FACTORED", ("cur", "folded", "interpolative")), ("NEURONS", ("outputs", "inputs"))]
)
def test_former_lists_of_layouts_are_asked_of_the_types(name: str, layouts: tuple[str, ...]) -> None:
    with pytest.warns(DeprecationWarning, match=f"{name} is gone"):
        assert getattr(nn, name) == layouts
    with pytest.raises(AttributeError, match="COLOURS"):
        nn.COLOURS  # noqa: B018
