from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, XLMConfig, XLMWithLMHeadModel

from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.score import perplexity_blockwise
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.shards import Shards
from cur.integrations.model.blocks import ChainError
from cur.integrations.model.running import evaluating, model_inputs
from cur.integrations.report.perplexity import perplexity

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
