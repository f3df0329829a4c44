"""A small random teacher, and students compressed from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cur.healing import HealingConfig
from cur.integrations import CompressConfig, compress
from tests.models import make

VOCABULARY = 61
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_positions": 32},
    # Blocks that see three tokens back and blocks that see all, by turns.
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
_TARGETS = ("q_proj", "k_proj", "gate_proj")
TARGETS = {"llama": _TARGETS, "qwen2": _TARGETS, "gpt2": ("c_attn", "c_fc")}


def _make_teacher(kind: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    return make(kind, seed=seed, vocab_size=VOCABULARY, **CHANGES[kind])


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
