"""Checkpoints of every kind, as they lie on disk: small, random, with a tokenizer of one token per word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 100
TEXT = " ".join(f"w{4 + (7 * index) % 91}" for index in range(600))

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LLAMA = {**_BERT, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {"num_key_value_heads": 2, "head_dim": 8}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(*, more: int = 0) -> Any:
    """Return a tokenizer of a hundred words, and perhaps more than that."""
    named = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words = {**named, **{f"w{index}": index for index in range(4, VOCABULARY + more)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _llama(**changes: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**_LLAMA, **changes})


def _gemma() -> Any:
    config = hf.Gemma3Config(
        text_config={**_LLAMA, **_TEXT},
        vision_config={**_SIGHT, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return hf.Gemma3ForConditionalGeneration(config)


KINDS: dict[str, Callable[[], Any]] = {
    "causal": lambda: hf.LlamaForCausalLM(_llama()),
    "tied": lambda: hf.LlamaForCausalLM(_llama(tie_word_embeddings=True)),
    "bfloat16": lambda: hf.LlamaForCausalLM(_llama()).bfloat16(),
    "float16": lambda: hf.LlamaForCausalLM(_llama()).half(),
    "learned positions": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1)
    ),
    "classifier": lambda: hf.LlamaForSequenceClassification(_llama(num_labels=3)),
    "encoding classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT, num_labels=3)),
    "token classifier": lambda: hf.BertForTokenClassification(hf.BertConfig(**_BERT, num_labels=5)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "encoder": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "decoder without head": lambda: hf.LlamaModel(_llama()),
    "vision-language": _gemma,
}
"""The models, each of the class that its checkpoint has to keep."""

AUTO = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoding classifier": "AutoModelForSequenceClassification",
    "token classifier": "AutoModelForTokenClassification",
    "masked": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
    "decoder without head": "AutoModel",
    "vision-language": "AutoModelForImageTextToText",
}
"""The class by which the model card loads them."""


def write(kind: str, directory: Path, *, more: int = 0, **options: Any) -> Path:
    """Write a checkpoint."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.15)
    model.tie_weights()
    model.save_pretrained(directory, **options)
    tokenizer(more=more).save_pretrained(directory)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a checkpoint in one file."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found
