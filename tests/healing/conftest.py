"""A small random teacher, and students compressed from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from cur.healing import HealingConfig
from cur.integrations import CompressConfig, compress

VOCABULARY = 61
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **COMMON,
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=32, **COMMON),
    # Blocks that see three tokens back and blocks that see all, by turns.
    "qwen2": lambda: Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **COMMON,
    ),
}
_TARGETS = ("q_proj", "k_proj", "gate_proj")
TARGETS = {"llama": _TARGETS, "qwen2": _TARGETS, "gpt2": ("c_attn", "c_fc")}


def _make_teacher(kind: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The initial scale of 0.02 leaves so small a model nearly linear, and its biases zero.
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.tie_weights()
    return model.eval()


@pytest.fixture
def make_teacher() -> Callable[..., PreTrainedModel]:
    return _make_teacher


@pytest.fixture
def teacher() -> PreTrainedModel:
    return _make_teacher()


@pytest.fixture
def windows() -> torch.Tensor:
    """Token windows of a source that can be learned: each token depends on the one before. Shape (32, 12)."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(1, 4, (32, 12), generator=generator)
    return 3 + (steps.cumsum(1) * 7) % (VOCABULARY - 3)


@pytest.fixture
def make_student(windows: torch.Tensor) -> Callable[..., PreTrainedModel]:
    """Compress two blocks of a teacher: ``make_student(teacher, layout="folded")``."""

    def make(teacher: PreTrainedModel, *, layout: str = "cur", rank: int = 6) -> PreTrainedModel:
        student = copy.deepcopy(teacher)
        kind = str(teacher.config.model_type)
        compress(student, windows, CompressConfig(layers=2, targets=TARGETS[kind], rank=rank, layout=layout))
        return student

    return make


@pytest.fixture
def student(teacher: PreTrainedModel, make_student: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_student(teacher)


@pytest.fixture
def settings() -> Callable[..., HealingConfig]:
    """A configuration for small models: ``settings(steps=3)``."""

    def make(**changes: Any) -> HealingConfig:
        small = {"steps": 6, "held_out": 4, "evaluate_every": 3, "save_every": 2, "warmup": 2, "precision": "float32"}
        return HealingConfig(**{**small, "natural_steps": 0, **changes})

    return make
