"""Small checkpoints on disk, with a tokenizer of one token per word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 101

TARGETS = {
    "llama": ("q_proj", "k_proj", "gate_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_fc"),
}


@pytest.fixture
def checkpoint(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[[str], Path]:
    """The function that writes a checkpoint in several shards: ``checkpoint("llama")``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    def write(kind: str) -> Path:
        words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
        words.pre_tokenizer = Whitespace()
        directory = tmp_path / kind
        make_model(kind).save_pretrained(directory, max_shard_size="20kB")
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(directory)
        return directory

    return write
