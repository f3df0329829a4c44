from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cur.integrations.model.blocks import BlockWalk
from cur.integrations.model.hooks import hooked, inputs_of
from cur.integrations.model.pauses import Course, layer_groups, pauses


class Toy(nn.Module):
    """A block with layers that are called together, twice, never, and with a part of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.twice, self.never, self.part = (nn.Linear(3, 3) for _ in range(6))

    def forward(self, hidden: torch.Tensor, turned: bool = False) -> torch.Tensor:
        first, second = (self.k, self.q) if turned else (self.q, self.k)
        added = self.out(first(hidden) * second(hidden))
        self.part(hidden[:, :1])
        return hidden + self.twice(self.twice(added))


def call_of(**options: bool):
    from cur.integrations.model.blocks import BlockCall

    return BlockCall((), options)


@torch.no_grad()
def test_layers_are_grouped_by_the_tensor_they_are_called_with() -> None:
    hidden = torch.randn(2, 4, 3)
    names = ["never", "part", "twice", "out", "k", "q"]
    assert layer_groups(Toy(), call_of(), hidden, names) == [["q", "k"], ["out"]]


@torch.no_grad()
def test_layers_behind_one_that_was_changed_see_what_it_gives(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    walk = BlockWalk(llama)
    entered = [walk.calls({"input_ids": part}) for part in windows.split(2)]
    block = walk.blocks[1][1]
    names = ["self_attn.q_proj", "mlp.down_proj"]
    courses = [Course(calls[1], block, hidden) for hidden, calls in entered]
    with hooked(pauses(block, names)):
        first = [course.to_layer(names[0]) for course in courses]
        block.get_submodule(names[0])(first[0])  # called beside, it does not halt
        block.get_submodule(names[0]).weight.mul_(2)
        second = [course.to_layer(names[1]) for course in courses]
        ends = [course.to_the_end() for course in courses]
    assert entered
    for (hidden, calls), x, y, end in zip(entered, first, second, ends, strict=True):
        with inputs_of(block, names) as seen:
            assert torch.equal(calls[1](block, hidden), end)
        assert torch.equal(seen[names[0]], x)
        assert torch.equal(seen[names[1]], y)


@torch.no_grad()
def test_a_layer_out_of_its_turn_is_an_error() -> None:
    block, hidden = Toy(), torch.randn(2, 4, 3)
    with hooked(pauses(block, ["q"])):
        course = Course(call_of(), block, hidden)
        with pytest.raises(RuntimeError, match=r"out is not called in its turn.*exclude"):
            course.to_layer("out")
        ended = Course(call_of(), block, hidden)
        with pytest.raises(RuntimeError, match=r"q is called more often.*exclude"):
            ended.to_the_end()
    with hooked(pauses(block, [])), pytest.raises(RuntimeError, match="q is not called in its turn"):
        Course(call_of(), block, hidden).to_layer("q")
