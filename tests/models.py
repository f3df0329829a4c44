"""Tiny random models of many families and kinds, the text that they are fed, and their checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
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
    """One family: its config, targets in its blocks, and the class that loads it."""

    config: type
    options: Mapping[str, Any]
    targets: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    feed: str = "text"


FAMILIES: dict[str, Family] = {
    "llama": Family(
        hf.LlamaConfig, dict(**_GROUPED, tie_word_embeddings=True), ("q_proj", "k_proj", "gate_proj", "down_proj")
    ),
    "mistral": Family(hf.MistralConfig, dict(**_GROUPED, head_dim=8), ("q_proj", "up_proj")),
    "qwen2": Family(hf.Qwen2Config, _GROUPED, ("q_proj", "gate_proj")),  # biases of q, k, v alone
    "qwen3": Family(hf.Qwen3Config, dict(**_GROUPED, head_dim=16), ("q_proj", "o_proj")),  # heads wider than the state
    "gemma3": Family(hf.Gemma3TextConfig, dict(**_GROUPED, head_dim=8, sliding_window=8), ("q_proj", "gate_proj")),
    "phi": Family(hf.PhiConfig, _GROUPED, ("q_proj", "self_attn.dense", "fc1", "fc2")),
    "phi3": Family(hf.Phi3Config, _GROUPED, ("qkv_proj", "gate_up_proj")),  # fused
    "gpt2": Family(
        hf.GPT2Config,
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, **_TOKENS),
        ("attn.c_attn", "c_fc"),
    ),
    "gpt_neox": Family(
        hf.GPTNeoXConfig, dict(**_TEXT, **_TOKENS), ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
    ),
    "opt": Family(
        hf.OPTConfig,
        dict(
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
        hf.MixtralConfig,
        dict(**_GROUPED, num_local_experts=4),
        ("q_proj", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "qwen2_moe": Family(
        hf.Qwen2MoeConfig,
        dict(
            **_GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        ),
        ("experts.gate_up_proj", "shared_expert.gate_proj"),
    ),
    "gpt_oss": Family(  # experts transposed, with biases
        hf.GptOssConfig,
        dict(**_GROUPED, num_local_experts=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "bert": Family(
        hf.BertConfig, dict(**_TEXT, pad_token_id=0), ("query", "intermediate.dense"), "AutoModelForMaskedLM"
    ),
    "roberta": Family(hf.RobertaConfig, dict(**_TEXT, **_TOKENS), ("value", "output.dense"), "AutoModelForMaskedLM"),
    "vit": Family(
        hf.ViTConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        ("q_proj", "fc1"),
        "AutoModelForImageClassification",
        "images",
    ),
    "t5": Family(
        hf.T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 4,  # generation takes the longer stack for the length of the decoder's cache
            "num_decoder_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        ("SelfAttention.q", "EncDecAttention.k", "wi"),
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    "bart": Family(  # a buffer that is stored
        hf.BartConfig,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            **_TOKENS,
        },
        ("self_attn.q_proj", "encoder_attn.v_proj", "fc1"),
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    "fsmt": Family(  # tokens before samples, and masks that it makes where it keeps no cache
        hf.FSMTConfig,
        {
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
            "langs": ["en", "de"],
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            **_TOKENS,
        },
        ("self_attn.q_proj", "encoder_attn.v_proj", "fc1"),
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    "exaone_moe": Family(  # a buffer in each router
        hf.ExaoneMoeConfig,
        dict(**_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1),
        ("q_proj", "experts.down_proj"),
    ),
    "whisper": Family(
        hf.WhisperConfig,
        _SPEECH,
        ("self_attn.q_proj", "encoder_attn.v_proj", "fc1"),
        "AutoModelForSpeechSeq2Seq",
        "speech",
    ),
}

_MOE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, **_TOKENS}

UNUSUAL: dict[str, Family] = {
    # two stacks, through which the model goes several times
    "hrm_text": Family(hf.HrmTextConfig, dict(**_GROUPED, head_dim=8), ()),
    # blocks of two classes in one list
    "olmo_hybrid": Family(
        hf.OlmoHybridConfig,
        dict(
            **_GROUPED,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
        ),
        (),
    ),
    # blocks that return lists
    "openai-gpt": Family(
        hf.OpenAIGPTConfig, {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}, ()
    ),
    # four streams of hidden states
    "gemma3n_text": Family(
        hf.Gemma3nTextConfig,
        dict(
            **_GROUPED,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        (),
    ),
    # a state in the place of a cache of keys and values, and a projection whose weight is read and not called
    "mamba": Family(hf.MambaConfig, {"state_size": 8, "time_step_rank": 4, **_SIZES}, ()),
    # a state in a list
    "rwkv": Family(
        hf.RwkvConfig, {"context_length": 64, "attention_hidden_size": 32, "intermediate_size": 48, **_SIZES}, ()
    ),
    # linear layers of a class of its own, and biases that a block with two norms reads
    "falcon": Family(hf.FalconConfig, {"num_attention_heads": 4, "bias": True, **_SIZES}, ()),
    # a router that is a subclass of a linear layer and returns a tuple
    "phimoe": Family(hf.PhimoeConfig, dict(**_GROUPED, num_local_experts=4), ()),
    # the heads of attention as parameters with three axes, and tokens before samples
    "xlnet": Family(hf.XLNetConfig, {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48, **_SIZES}, ()),
    # initialisation that sets the bias of a layer
    "recurrent_gemma": Family(hf.RecurrentGemmaConfig, dict(**_GROUPED, lru_width=32, attention_window_size=8), ()),
    # embeddings that are scaled in place
    "ctrl": Family(
        hf.CTRLConfig, {"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 48, "n_positions": 64, **_SIZES}, ()
    ),
    # a prompt of its own before the text, so that nothing of a text is a window as well
    "cpmant": Family(
        hf.CpmAntConfig,
        {
            "dim_ff": 48,
            "dim_head": 8,
            "num_attention_heads": 4,
            "prompt_types": 4,
            "prompt_length": 4,
            "segment_types": 8,
            **_SIZES,
        },
        (),
    ),
    # one block under the names of several
    "zamba2": Family(
        hf.Zamba2Config,
        {
            **_GROUPED,
            "layer_types": ["mamba", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "mamba_ngroups": 1,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
            "chunk_size": 8,
            "num_key_value_heads": 4,
        },
        (),
    ),
}
"""Families that are built otherwise than most, by what is unusual of them."""


def make(name: str, *, seed: int = 0, blocks: int | None = None, **changes: Any) -> PreTrainedModel:
    """Return a small random model of a family, in evaluation mode; `changes` are made to its configuration."""
    family = {**FAMILIES, **UNUSUAL}[name]
    if blocks is not None:
        changes["n_layer" if name == "gpt2" else "num_hidden_layers"] = blocks
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(hf, family.auto).from_config(family.config(**{**family.options, **changes}))
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


# Checkpoints, each of the class that it has to keep, with a tokenizer of one token per word.

WORDS = 100
TEXT = " ".join(f"w{4 + (7 * index) % 91}" for index in range(600))

_BERT: dict[str, Any] = {**_TEXT, "vocab_size": WORDS, "intermediate_size": 64, "pad_token_id": 0}
_LLAMA = {**_BERT, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(*, more: int = 0) -> Any:
    """Return a tokenizer of a hundred words, and perhaps more than that."""
    named = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words = {**named, **{f"w{index}": index for index in range(4, WORDS + more)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _llama(**changes: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**_LLAMA, **changes})


def _gemma() -> Any:
    config = hf.Gemma3Config(
        text_config={**_LLAMA, **_GEMMA},
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
        hf.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1)
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
