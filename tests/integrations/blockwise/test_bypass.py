from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, XLMConfig, XLMWithLMHeadModel

from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HeldStates, HiddenStates
from cur.integrations.blockwise.score import perplexity_blockwise
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.shards import Shards
from cur.integrations.model.blocks import ChainError, unpack
from cur.integrations.model.hooks import hooked
from cur.integrations.model.running import evaluating, model_inputs
from cur.integrations.report.perplexity import perplexity
from tests.models import make

CPU = torch.device("cpu")


def streamed(model: PreTrainedModel, directory: Path) -> StreamedModel:
    """A model whose weights lie in a directory."""
    model.save_pretrained(directory)
    meta = AutoModelForCausalLM.from_pretrained(directory, device_map="meta").eval()
    return StreamedModel(meta, None, Shards(directory), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_block_after_the_other_gives_what_the_model_gives(
    kind: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model(kind)
    parts = streamed(model, tmp_path / "model")
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    key = bypass.key({"input_ids": windows})
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        for index in range(len(parts.blocks)):
            with bypass.at(index):
                assert not any(p.is_meta for p in parts.blocks[index][1].parameters())
                found = parts.model.base_model(input_ids=windows, use_cache=False)[0]
            assert all(p.is_meta for _, block in parts.blocks for p in block.parameters())
            bypass.drop_before(index)
            held = [number for number in range(index + 1) if bypass.states.has(bypass.place(number), key)]
            assert held == [index]
    with evaluating(model):
        assert torch.equal(found, model.base_model(windows, use_cache=False)[0])
    assert all("forward" not in vars(block) for _, block in parts.blocks)


def test_blocks_that_return_tuples_are_passed_as_such(windows: torch.Tensor, tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=101, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    parts = streamed(model, tmp_path / "model")
    found = perplexity_blockwise(parts, windows, batch_size=2, scratch=tmp_path)
    assert found.value == pytest.approx(perplexity(model, windows, batch_size=2).value, rel=1e-12)
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        for index in range(3):
            with bypass.at(index):
                parts.model.base_model(windows[:2], use_cache=False)
        bypass.active = 3
        parts.load_outside()
        # Another batch, which no block was run on: all of its samples reach the end.
        assert parts.model.base_model(windows[:4], use_cache=False)[0].shape == (4, windows.shape[1], 32)


def test_a_model_is_called_as_ever_while_its_blocks_are_bypassed(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    parts = streamed(make_model("llama"), tmp_path / "model")
    inner = parts.model.base_model
    batch = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    batch["attention_mask"][:, 0] = 0  # padding on the left, and no key-value cache is wanted
    expected = model_inputs(inner, batch)
    with Bypass(parts, HiddenStates(tmp_path / "states", CPU)).open():
        found = model_inputs(inner, batch)
    assert expected["use_cache"] is False
    assert found.keys() == expected.keys()
    assert torch.equal(found["position_ids"], expected["position_ids"])


def test_stacks_that_take_turns_are_refused_with_the_first_batch(windows: torch.Tensor, tmp_path: Path) -> None:
    shape = {"vocab_size": 101, "emb_dim": 32, "n_heads": 4, "n_layers": 3, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = streamed(XLMWithLMHeadModel(XLMConfig(**shape)).eval(), tmp_path / "model")
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        said = r"transformer\.ffns\.0 runs before transformer\.attentions\.2 does, .*; load the whole model"
        with bypass.at(0), pytest.raises(ChainError, match=said):
            parts.model.base_model(windows)


def test_tables_that_are_read_stay_in_memory(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    parts = streamed(make_model("llama"), tmp_path / "model")
    inner = parts.model.base_model

    def reading(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        table = inner.get_input_embeddings().weight
        assert table.dtype == torch.float32  # which is known of a table that is gone as well
        seen.append(table[0] + 1)

    seen: list[torch.Tensor] = []
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        with hooked([(inner.rotary_emb, "before", reading)]):
            for index in range(2):
                with bypass.at(index):
                    inner(windows, use_cache=False)
                assert parts.read == {"embed_tokens"}
                assert not inner.get_input_embeddings().weight.is_meta
    assert torch.equal(seen[0], seen[1])


def test_tables_that_are_called_alone_are_let_go_of(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    parts = streamed(make_model("llama"), tmp_path / "model")
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        with bypass.at(0):
            parts.model.base_model(windows, use_cache=False)
        assert parts.read == set()
        assert parts.model.get_input_embeddings().weight.is_meta


def wrapped(
    model: PreTrainedModel, number: int, change: Callable[[nn.Module, tuple[torch.Tensor, ...]], object]
) -> None:
    """Let something happen before a block, as the code of a model may do between two blocks."""
    model.base_model.layers[number].register_forward_pre_hook(change)


@pytest.mark.parametrize("starts", [(2,), (1, 2, 3)])
def test_what_a_model_does_between_blocks_happens_once(
    starts: tuple[int, ...], windows: torch.Tensor, tmp_path: Path
) -> None:
    model = make("llama", blocks=4)
    parts = streamed(model, tmp_path / "model")
    for number in starts:
        for one in (model, parts.model):
            wrapped(one, number, lambda _, args: (args[0] * 1.5 + 1, *args[1:]))
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        for index in range(4):
            with bypass.at(index):
                output = parts.model.base_model(windows, use_cache=False)
            bypass.drop_before(index)
    assert bypass.starts == {0, *starts}
    with evaluating(model):
        assert torch.equal(output[0], model.base_model(windows, use_cache=False)[0])


def test_what_depends_on_several_blocks_is_refused(windows: torch.Tensor, tmp_path: Path) -> None:
    parts = streamed(make("llama", blocks=4), tmp_path / "model")
    first: list[torch.Tensor] = []
    layers = parts.model.base_model.layers
    layers[0].register_forward_hook(lambda _, __, output: first.append(unpack(output)[0]))
    wrapped(parts.model, 2, lambda _, args: (args[0] + first[-1], *args[1:]))
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        for index in range(2):
            with bypass.at(index):
                parts.model.base_model(windows, use_cache=False)
        with (
            bypass.at(2),
            pytest.raises(ChainError, match=r"layers\.2 depends on what several blocks before it returned"),
        ):
            parts.model.base_model(windows, use_cache=False)


def test_what_blocks_leave_in_a_mapping_is_there_for_later_ones(windows: torch.Tensor, tmp_path: Path) -> None:
    model = make("gemma3n_text")
    parts = streamed(model, tmp_path / "model")
    bypass = Bypass(parts, HiddenStates(tmp_path / "states", CPU))
    with bypass.open(), evaluating(parts.model):
        parts.load_outside()
        for index in range(len(parts.blocks)):
            with bypass.at(index):
                found = parts.model.base_model(windows, use_cache=False)[0]
            bypass.drop_before(index)
    assert bypass.states.places("left-")
    with evaluating(model):
        assert torch.equal(found, model.base_model(windows, use_cache=False)[0])


@pytest.mark.parametrize("held", [False, True])
def test_hidden_states_come_back_in_the_form_in_which_they_were_stored(held: bool, tmp_path: Path) -> None:
    states = HeldStates(CPU) if held else HiddenStates(tmp_path, CPU)
    x = torch.randn(2, 3)
    output = (x, None, [x[0], {"k": (x, 2), 1: "text"}], True)
    states.write("place", "batch", output)
    found = states.read("place", "batch")
    assert torch.equal(found[0], x)
    assert torch.equal(found[2][0], x[0])
    assert torch.equal(found[2][1]["k"][0], x)
    assert (found[1], found[3], found[2][1]["k"][1], found[2][1][1]) == (None, True, 2, "text")
    assert type(found) is tuple
    assert type(found[2]) is list
    with pytest.raises(TypeError, match="place returns object; block by block only tensors are kept"):
        states.write("place", "batch", (x, object()))
    found[0].zero_()  # as a block may do in place
    assert torch.equal(states.read("place", "batch")[0], x)
    states.write("place", "other", x)
    states.drop("place", keep="other")
    assert (states.has("place", "batch"), states.has("place", "other")) == (False, True)
    assert states.places("pl") == ["place"]
    assert list(tmp_path.iterdir()) == ([] if held else [tmp_path / "place"])
