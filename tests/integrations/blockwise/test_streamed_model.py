from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.shards import Shards

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Twice(LlamaForCausalLM):
    """A model that uses one matrix in two blocks."""

    _tied_weights_keys: ClassVar = {"model.layers.2.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}


def streamed(model: PreTrainedModel, directory: Path) -> StreamedModel:
    model.save_pretrained(directory)
    meta = type(model).from_pretrained(directory, device_map="meta").eval()
    return StreamedModel(meta, None, Shards(directory), torch.device("cpu"))  # type: ignore[arg-type]


def falcon() -> PreTrainedModel:
    # A module around blocks fills buffers inside them.
    shape = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SHAPE, **shape, ssm_multipliers=[0.5, 0.25, 0.125, 2.0, 4.0]))


def gemma() -> PreTrainedModel:
    # A model inside the model fills buffers by attributes of its own.
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    sparsity = {"activation_sparsity_pattern": [0.0] * 3, "num_kv_shared_layers": 0}
    kinds = {"layer_types": ["full_attention"] * 3, "altup_num_inputs": 2}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**SHAPE, **own, **sparsity, **kinds))


@pytest.mark.parametrize("make", [falcon, gemma])
def test_buffers_that_no_checkpoint_stores_are_those_of_the_model_in_memory(make: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    parts = streamed(model, tmp_path)
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_non_persistent_buffers())
    found = dict(parts.model.named_non_persistent_buffers())
    assert found.keys() == whole.keys()
    assert len(whole) > 0
    for name, buffer in whole.items():
        assert torch.equal(found[name], buffer), name


def test_a_block_comes_with_the_weights_of_others_that_it_uses(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    parts = streamed(model, tmp_path)
    for index in (2, 0, 2):
        parts.load_block(index)
        block = parts.blocks[index][1]
        assert torch.equal(block.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr,arg-type]
        assert not any(part.is_meta for part in block.parameters())
        parts.free_block(index)
        assert all(part.is_meta for _, block in parts.blocks for part in block.parameters())
