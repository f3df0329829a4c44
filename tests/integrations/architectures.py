"""Small random models of many families, each made from its transformers config, with what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCABULARY = 101
LENGTH = 24

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_TEXT, **_TOKENS, "num_key_value_heads": 2}
_SPEECH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
    **_TOKENS,
}


@dataclass(frozen=True)
class Family:
    """One family: its config, the class that loads it, and targets in its blocks."""

    config: Callable[[], Any]
    targets: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    feed: str = "text"


FAMILIES: dict[str, Family] = {
    "llama": Family(
        lambda: hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True), ("q_proj", "k_proj", "gate_proj", "down_proj")
    ),
    "mistral": Family(lambda: hf.MistralConfig(**_GROUPED, head_dim=8), ("q_proj", "up_proj")),
    "qwen2": Family(lambda: hf.Qwen2Config(**_GROUPED), ("q_proj", "gate_proj")),  # biases of q, k, v alone
    "qwen3": Family(
        lambda: hf.Qwen3Config(**_GROUPED, head_dim=16), ("q_proj", "o_proj")
    ),  # heads wider than the state
    "gemma3": Family(lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8), ("q_proj", "gate_proj")),
    "phi": Family(lambda: hf.PhiConfig(**_GROUPED), ("q_proj", "self_attn.dense", "fc1", "fc2")),
    "phi3": Family(lambda: hf.Phi3Config(**_GROUPED), ("qkv_proj", "gate_up_proj")),  # fused
    "gpt2": Family(
        lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, **_TOKENS),
        ("attn.c_attn", "c_fc"),
    ),
    "gpt_neox": Family(
        lambda: hf.GPTNeoXConfig(**_TEXT, **_TOKENS), ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
    ),
    "opt": Family(
        lambda: hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            **_TOKENS,
        ),
        ("q_proj", "fc1"),
    ),
    "mixtral": Family(
        lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
        ("q_proj", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "qwen2_moe": Family(
        lambda: hf.Qwen2MoeConfig(
            **_GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        ),
        ("experts.gate_up_proj", "shared_expert.gate_proj"),
    ),
    "gpt_oss": Family(  # experts transposed, with biases
        lambda: hf.GptOssConfig(
            **_GROUPED, num_local_experts=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "bert": Family(
        lambda: hf.BertConfig(**_TEXT, pad_token_id=0), ("query", "intermediate.dense"), "AutoModelForMaskedLM"
    ),
    "roberta": Family(lambda: hf.RobertaConfig(**_TEXT, **_TOKENS), ("value", "output.dense"), "AutoModelForMaskedLM"),
    "vit": Family(
        lambda: hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        ("q_proj", "fc1"),
        "AutoModelForImageClassification",
        "images",
    ),
    "t5": Family(
        lambda: hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=4,  # generation takes the longer stack for the length of the decoder's cache
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
        ("SelfAttention.q", "EncDecAttention.k", "wi"),
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    "whisper": Family(
        lambda: hf.WhisperConfig(**_SPEECH),
        ("self_attn.q_proj", "encoder_attn.v_proj", "fc1"),
        "AutoModelForSpeechSeq2Seq",
        "speech",
    ),
}


def make(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a small random model of a family, in evaluation mode."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(hf, family.auto).from_config(family.config())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # The initial scale of 0.02 leaves so small a model nearly linear, and its biases zero.
                if parameter.ndim in (2, 3):
                    parameter.normal_(std=0.2)
                elif key.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.tie_weights()
    result: PreTrainedModel = model.eval()
    return result


def batch(name: str, *, count: int = 6, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return one batch of what a family is fed."""
    generator = torch.Generator().manual_seed(seed)
    feed = FAMILIES[name].feed
    if feed == "images":
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    if feed == "speech":
        return {"input_features": torch.randn(count, 8, 40, generator=generator), "labels": ids[:, :10]}
    if feed == "pairs":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)[:, :15]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
