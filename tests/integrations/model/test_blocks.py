from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, Qwen2Config

import cur
from cur.integrations import batches
from cur.integrations.model.blocks import BlockCall, BlockWalk, ChainError, after_blocks, chain_fault, unpack
from cur.integrations.model.hooks import hooked

ROOT = Path(cur.__file__).parent


def alternating() -> PreTrainedModel:
    """A model with blocks that see four tokens back and blocks that see all, by turns."""
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def with_tuples() -> PreTrainedModel:
    """A model with blocks that return tuples."""
    config = BloomConfig(vocab_size=101, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def walked(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states before the first block and behind every one, block by block."""
    walk = BlockWalk(model)
    hidden, calls = walk.calls(batch)
    states = [hidden]
    for (_, block), call in zip(walk.blocks, calls, strict=True):
        states.append(call(block, states[-1]))
    return states


@torch.no_grad()
def seen(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The same of the model's own forward pass."""
    states: list[torch.Tensor] = []
    blocks = [block for _, block in BlockWalk(model).blocks]
    hooks = after_blocks(blocks, lambda number, hidden: states.append(hidden) if number == len(states) - 1 else None)

    def note(_: nn.Module, args: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> None:
        states.append(BlockCall.of(args, options)[0])

    with hooked([(blocks[0], "before", note), *hooks]):
        model(**batch, use_cache=False)
    return states


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) > 1 and all(map(torch.equal, ones, others))


@pytest.mark.parametrize("padded", [False, True])
def test_a_walk_goes_the_way_of_the_model(causal_model: PreTrainedModel, windows: torch.Tensor, padded: bool) -> None:
    batch = dict(batches(windows, batch_size=4)[0])
    if padded:
        batch["attention_mask"][1, 15:] = 0
    assert same(walked(causal_model, batch), seen(causal_model, batch))


@pytest.mark.parametrize("make", [alternating, with_tuples])
def test_every_block_is_called_as_its_model_calls_it(make, windows: torch.Tensor) -> None:
    model, batch = make(), {"input_ids": windows[:2]}
    assert same(walked(model, batch), seen(model, batch))


def test_blocks_that_differ_have_arguments_that_differ(windows: torch.Tensor) -> None:
    _, calls = BlockWalk(alternating()).calls({"input_ids": windows[:2]})
    masks = [call.options["attention_mask"] for call in calls]
    assert masks[0] is not None
    assert masks[1] is None or not torch.equal(masks[0], masks[1])


@torch.no_grad()
def test_a_block_is_entered_behind_those_before_it(causal_model: PreTrainedModel, windows: torch.Tensor) -> None:
    batch = {"input_ids": windows[:2]}
    hidden, call = BlockWalk(causal_model).enter(batch, 2)
    states = seen(causal_model, batch)
    assert torch.equal(hidden, states[2])
    assert torch.equal(call(BlockWalk(causal_model).blocks[2][1], hidden), states[3])


@torch.no_grad()
@pytest.mark.parametrize("make", [alternating, with_tuples])
def test_blocks_that_are_passed_compute_nothing(make, windows: torch.Tensor) -> None:
    model, batch = make(), {"input_ids": windows[:2]}
    walk = BlockWalk(model, batch)
    states: list[torch.Tensor] = []
    hooks = after_blocks([block for _, block in walk.blocks], lambda _, hidden: states.append(hidden))
    with walk.passing(2), hooked(hooks):
        model(**batch, use_cache=False)
    before, _ = walk.enter(batch)
    assert torch.equal(states[0], before)
    assert torch.equal(states[1], before)
    assert not torch.equal(states[2], before)
    assert all("forward" not in vars(block) for _, block in walk.blocks)


def test_a_hidden_state_is_put_back_as_it_was_returned() -> None:
    old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for output in (old, (old,), (old, None, "rest"), [old, old]):
        hidden, pack = unpack(output)
        assert hidden is old
        assert type(pack(new)) is type(output)
        assert len(pack(new)) == len(output)
        assert unpack(pack(new))[0] is new


def test_arguments_are_told_apart_however_they_are_given() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    for args, options in (((x, 1), {"a": 2}), ((), {"a": 2, "hidden_states": x}), ((), {"a": 2, "state": x})):
        hidden, call = BlockCall.of(args, options)
        assert hidden is x
        again, named = call.arguments(y)
        assert sum(value is y for value in (*again, *named.values())) == 1
        assert BlockCall.of(again, named) == (y, call)
        assert len(again) == len(args)
        assert named.keys() == options.keys()  # the caller's own stay as they are


class _Between(nn.Module):
    """Blocks between which the hidden state is doubled, or that hand something on beside it."""

    def __init__(self, *, doubles: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Adding() for _ in range(3)])
        self.doubles = doubles

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        state, more = nn.functional.one_hot(input_ids, 5).float(), None
        for layer in self.layers:
            state, more = layer(2.0 * state if self.doubles else state, more)
        return state


class _Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, state: torch.Tensor, more: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        more = self.inner(state) if more is None else more + 1.0
        return state + more, more


@torch.no_grad()
def test_what_blocks_hand_on_beside_the_hidden_state_reaches_the_next() -> None:
    model = _Between(doubles=False).eval()
    batch = {"input_ids": torch.arange(4)[None]}
    walk = BlockWalk(model)
    hidden, calls = walk.calls(batch)
    for (_, block), call in zip(walk.blocks, calls, strict=True):
        hidden = call(block, hidden)
    assert torch.equal(hidden, model(**batch))


def test_what_happens_between_blocks_is_noticed() -> None:
    with pytest.raises(ChainError, match="do not get the hidden state that the one before returned"):
        BlockWalk(_Between(doubles=True).eval()).calls({"input_ids": torch.arange(4)[None]})


def test_the_form_of_a_hidden_state_is_known_nowhere_else() -> None:
    files = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in ROOT.rglob("*.py")}
    assert "isinstance(output, (tuple, list))" in files["integrations/model/blocks.py"]
    known = {"integrations/model/blocks.py"}
    assert {where for where, text in files.items() if "isinstance(output, (tuple, list))" in text} == known
    assert {where for where, text in files.items() if '"hidden_states"' in text} == {"integrations/model/blocks.py"}


def test_the_reason_of_a_block_that_cannot_be_called_is_told(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    def refuse(*_: object) -> None:
        if not entered:
            raise RuntimeError("rotary frequencies\nare for 7 heads")
        entered.pop()

    entered = [1]
    block = llama.base_model.layers[1]
    block.register_forward_pre_hook(refuse)
    fault = chain_fault(llama, {"input_ids": windows})
    assert fault is not None
    assert "rotary frequencies are for 7 heads" in fault


def test_a_block_that_is_not_reached_is_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    walk = BlockWalk(llama)
    llama.base_model.layers = llama.base_model.layers[1:]
    with pytest.raises(ChainError, match=r"no input reaches model\.layers\.0 with the first batch"):
        walk.enter({"input_ids": windows})
