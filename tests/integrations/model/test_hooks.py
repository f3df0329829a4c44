from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cur
from cur.integrations.model.hooks import call_groups, forwards_replaced, hooked, inputs_of, outputs_of
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import checkpointing

ROOT = Path(cur.__file__).parent
HOOKS = "integrations/model/hooks.py"

# A hook of a tensor: it goes with the graph, there is nothing to take away.
OF_TENSORS = {("integrations/measure/gradients.py", "register_hook")}


def test_hooks_are_called_in_order_and_are_gone_afterwards() -> None:
    layer, said = nn.Linear(3, 3), list[str]()

    def doubled(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        said.append("before")
        return (2 * args[0],), options

    def negative(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        said.append("after")
        return -output

    x = torch.randn(4, 3)
    plain = layer(x)
    with hooked([(layer, "after", negative), (layer, "before", doubled)]):
        assert torch.equal(layer(x), -layer.forward(2 * x))
    assert said == ["before", "after"]
    with pytest.raises(RuntimeError, match="shapes"), hooked([(layer, "before", doubled)]):
        layer(x.T)
    assert torch.equal(layer(x), plain)
    assert said == ["before", "after", "before"]


def test_no_hook_stays_when_one_of_them_cannot_be_set() -> None:
    layer = nn.Linear(3, 3)
    hooks: list[Any] = [(layer, "before", lambda *_: pytest.fail("still there")), (None, "after", print)]
    with pytest.raises(AttributeError), hooked(hooks):
        pass
    layer(torch.zeros(1, 3))


def test_what_an_object_computed_by_itself_is_put_back() -> None:
    """As of a layer whose weights accelerate fetches: it has a forward of its own."""
    ours, other = nn.Linear(2, 2), nn.Linear(2, 2)
    own: Any = ours
    own.forward = lambda x: x + 1
    x = torch.zeros(1, 2)
    # The same module twice: the last one comes first.
    wraps = [(module, lambda forward: lambda x: 2 * forward(x)) for module in (ours, other, ours)]
    before = other(x)
    with forwards_replaced(wraps):
        assert torch.equal(ours(x), torch.full((1, 2), 4.0))
        assert torch.equal(other(x), 2 * before)
    assert torch.equal(ours(x), x + 1)
    assert "forward" not in vars(other)
    with checkpointing([ours], Precision.of(ours, "float32")):
        ours(x)
    assert torch.equal(ours(x), x + 1)


def test_what_takes_the_place_of_a_forward_is_asked_for_its_parameters() -> None:
    """What a model is called with follows from the signature of its forward pass."""
    layer = nn.Linear(2, 2)
    with forwards_replaced([(layer, lambda forward: lambda *args, **options: 2 * forward(*args, **options))]):
        assert list(inspect.signature(layer.forward).parameters) == ["input"]
        assert torch.equal(layer(torch.zeros(1, 2)), 2 * layer.bias[None])


def test_inputs_and_outputs_are_those_of_the_last_call() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    with inputs_of(model, ["0", "1"]) as inputs, outputs_of(model, ["0"]) as outputs:
        model(x)
        model(y)
    assert inputs["0"] is y
    assert inputs["1"] is outputs["0"]
    assert call_groups(model, ["1", "0"], lambda: model(x)) == [["0"], ["1"]]


def test_hooks_are_set_and_forwards_replaced_nowhere_else() -> None:
    found = set()
    for file in sorted(ROOT.rglob("*.py")):
        where = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            replaced = node.attr == "forward" and not isinstance(node.ctx, ast.Load)
            if replaced or (node.attr.startswith("register_") and node.attr.endswith("hook")):
                found.add((where, node.attr))
    here = {(where, name) for where, name in found if where == HOOKS}
    assert {name for _, name in here} == {"register_forward_hook", "register_forward_pre_hook", "forward"}
    assert found - here == OF_TENSORS
