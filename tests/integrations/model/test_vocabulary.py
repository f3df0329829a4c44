"""Which tables and heads of a model can be rounded, and what is said of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cur.integrations.model.vocabulary import vocabulary, why_dense
from tests.models import make


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"model.embed_tokens": ("lm_head",)}),
        ("mistral", {"model.embed_tokens": (), "lm_head": ()}),
        ("gpt2", {"transformer.wte": ("lm_head",)}),
        ("gemma3", {"model.embed_tokens": ("lm_head",)}),
        ("bert", {"bert.embeddings.word_embeddings": ("cls.predictions.decoder",)}),
        ("t5", {"shared": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}),
        ("vit", {}),
    ],
)
def test_tables_by_what_is_tied_to_them(family: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert vocabulary(make(family)) == expected


def test_of_other_modules_all_tables() -> None:
    model = nn.ModuleDict({"users": nn.Embedding(5, 4), "films": nn.Embedding(6, 4), "map": nn.Linear(4, 4)})
    assert vocabulary(model) == {"users": (), "films": ()}
    assert vocabulary(nn.Sequential(nn.Linear(4, 4))) == {}


class Shifted(nn.Embedding):
    """Does more than look up rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_what_stays_is_named() -> None:
    model: Any = make("llama")
    table = Shifted(*model.model.embed_tokens.weight.shape)
    table.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = table
    assert vocabulary(model) == {}
    assert why_dense(model) == ["model.embed_tokens stays as it is: a Shifted does more than look up rows or multiply"]
