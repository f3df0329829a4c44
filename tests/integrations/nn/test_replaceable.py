from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cur.integrations import BudgetConfig, CompressConfig, compress
from cur.integrations.convert import convert_
from cur.integrations.nn import compressed_modules, is_linear, is_table

ALL = CompressConfig(layers="all", targets="all-linear", rank=3)
X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("again", [lambda net: None, lambda net: convert_(net, "folded")], ids=["compress", "convert"])
def test_hooks_go_over_to_what_replaces_a_layer(again: Callable[[Net], object]) -> None:
    net, seen = Net(), list[str]()
    handle = net.a.register_forward_hook(lambda *_: seen.append("after"))
    net.b.register_forward_pre_hook(lambda _, args, kwargs: seen.append(f"before {len(args)}"), with_kwargs=True)
    net.b.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    net.c.register_full_backward_hook(lambda *_: seen.append("backward"))
    compress(net, [X], ALL)
    again(net)
    assert set(compressed_modules(net)) == {"a", "b", "c"}
    seen.clear()
    net(X).sum().backward()
    assert seen == ["after", "before 1", "always", "backward"]
    handle.remove()
    seen.clear()
    net(X)
    assert seen == ["before 1", "always"]


def test_a_layer_with_a_forward_of_its_own_stays_dense_or_is_refused_by_name() -> None:
    net = Net()
    original = net.c.forward
    net.c.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    assert not is_linear(net.c)
    expected = net.c(X)
    report = compress(net, [X], ALL)
    assert "has a `forward` of its own" in report.plan.dense["c"]
    assert torch.equal(net.c(X), expected)
    net = Net()
    net.c.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="c has a `forward` of its own"):
        compress(net, [X], CompressConfig(layers="all", targets=["c"], rank=3))
    table = nn.Embedding(9, 4)
    table.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_table(table)


@pytest.mark.parametrize("where", ["a list", "a mapping", "an attribute"])
def test_a_layer_that_is_held_outside_of_the_tree_is_named(where: str) -> None:
    net = Net()
    held = {"a list": [net.b], "a mapping": {"x": net.b}, "an attribute": net.b}[where]
    object.__setattr__(net, "beside", held)
    report = compress(net, [X], ALL)
    assert [note for note in report.notes if note.startswith("b lies in `beside` as well, outside of the tree")]
    assert not any("outside of the tree" in note for note in compress(Net(), [X], ALL).notes)


@pytest.mark.parametrize("config", [ALL, BudgetConfig(keep=0.5)], ids=["rank", "budget"])
def test_what_is_frozen_of_a_layer_stays_so(config: CompressConfig | BudgetConfig) -> None:
    net = Net()
    net.a.weight.requires_grad_(False)
    assert net.b.bias is not None
    net.b.bias.requires_grad_(False)
    compress(net, [X], config)
    for step in range(2):
        found = {
            name: {"bias" if key.endswith("bias") else "weight": p.requires_grad for key, p in layer.named_parameters()}
            for name, layer in compressed_modules(net).items()
        }
        expected = {"a": {"weight": False, "bias": True}, "b": {"weight": True, "bias": False}, "c": {"weight": True}}
        assert found
        assert found == {name: expected[name] for name in found}
        if step == 0 and isinstance(config, CompressConfig):
            convert_(net, "folded")
