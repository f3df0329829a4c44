from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cur.integrations import BudgetConfig, CompressConfig, compress, dense_export, linear_modules, perplexity, save
from cur.integrations.factor.rounding import round_layer
from cur.integrations.nn import EmbeddingFactors, IntegerGrid, dense_weight, is_table, layout_for, looks_up
from cur.integrations.plan.make import candidates
from cur.integrations.store.inspect import summarize
from tests.models import make

N, M, RANK = 30, 7, 3
TOKENS = torch.tensor([[3, 0, 0, 29], [5, 5, 1, 0]])


def factored(dense: nn.Module) -> EmbeddingFactors:
    """Return the table of rank 3 nearest to a dense one."""
    left, s, right = torch.linalg.svd(dense_weight(dense, "table")[0].detach(), full_matrices=False)
    layer = EmbeddingFactors.from_two_factors(left[:, :RANK] * s[:RANK], right[:RANK])
    layer.adopt_(dense)
    return layer


TABLES: dict[str, Any] = {
    "plain": nn.Embedding(N, M),
    "padded": nn.Embedding(N, M, padding_idx=0),
    "sum": nn.EmbeddingBag(N, M, mode="sum"),
    "mean": nn.EmbeddingBag(N, M, mode="mean", padding_idx=0),
    "last": nn.EmbeddingBag(N, M, mode="sum", include_last_offset=True),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gives_what_the_product_of_its_factors_gives(kind: str) -> None:
    dense = TABLES[kind]
    layer = factored(dense)
    other = layer.to_dense()
    assert type(other) is type(dense)
    assert other.padding_idx == dense.padding_idx
    assert layer.weight.shape == dense.weight.shape
    torch.testing.assert_close(layer(TOKENS), other(TOKENS))
    if isinstance(dense, nn.EmbeddingBag):
        assert (other.mode, other.include_last_offset) == (dense.mode, dense.include_last_offset)
        flat, offsets = TOKENS.reshape(-1), torch.tensor([0, 3, 8] if kind == "last" else [0, 3])
        torch.testing.assert_close(layer(flat, offsets), other(flat, offsets))
        assert layer(flat, offsets).shape == (2, M)
    if kind in ("sum", "last"):
        factors = torch.rand(TOKENS.shape)
        torch.testing.assert_close(layer(TOKENS, per_sample_weights=factors), other(TOKENS, per_sample_weights=factors))


@pytest.mark.parametrize("kind", TABLES)
def test_its_description_makes_it_again(kind: str) -> None:
    layer = factored(TABLES[kind])
    spec = layer.spec()
    assert EmbeddingFactors.is_spec(spec)
    again = EmbeddingFactors.from_spec(spec, N, M, bias=False)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(TOKENS), layer(TOKENS))
    for change in ({"bag": "max"}, {"padding": -1}, {"padding": True}, {"last_offset": False}, {"colour": 1}):
        assert not EmbeddingFactors.is_spec({**spec, **change})


@pytest.mark.parametrize("kind", TABLES)
def test_rounded_rows_are_looked_up(kind: str) -> None:
    layer, before = factored(TABLES[kind]), factored(TABLES[kind])
    done = round_layer("table", layer, IntegerGrid(), None, damping=0.1)
    assert done.error < 0.02
    assert layer.grid is None
    layer = done.layer
    assert layer.grid is not None
    torch.testing.assert_close(layer(TOKENS), before(TOKENS), atol=0.05, rtol=0.05)
    torch.testing.assert_close(layer(TOKENS), layer.to_dense()(TOKENS))
    assert {tensor.dtype for tensor in layer.parameters()} == {torch.float32, torch.int8}


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(5, 3, max_norm=1.0),
        nn.EmbeddingBag(5, 3, mode="max"),
        nn.Linear(5, 3),
    ],
)
def test_what_does_more_than_look_up_is_no_table(module: nn.Module) -> None:
    assert not is_table(module)
    assert looks_up(module) is None
    assert layout_for(module, "cur") == "cur"
    if not isinstance(module, nn.Linear):
        with pytest.raises(TypeError, match=r"table is a .*; only nn\.Linear"):
            dense_weight(module, "table")


def test_a_table_of_another_class_is_kept_whole_or_not_at_all() -> None:
    table = type("Other", (nn.Embedding,), {})(5, 3)
    assert not is_table(table)  # so it has no factors
    assert looks_up(table) == 5


def test_its_numbers() -> None:
    layer = factored(TABLES["plain"])
    assert layer.stored == RANK * (N + M)
    assert (layer.num_embeddings, layer.embedding_dim) == (N, M)
    assert looks_up(layer) == N
    assert layer.matrix.shape == (M, N)
    left, right = layer.two_factors()
    expected: Tensor = left @ right
    torch.testing.assert_close(layer.matrix, expected)
    with pytest.raises(ValueError, match="`layout` of a table of embeddings must stay 'embedding', got 'cur'"):
        layer.to_layout("cur")


@pytest.mark.parametrize(
    "config",
    [
        BudgetConfig(keep=0.5, targets="all-embeddings", own_text=0),
        CompressConfig(layers=2, rank=6, targets=("q_proj", "embed_tokens")),
    ],
)
def test_tables_of_transformers_models_are_compressed_where_they_are_targets(config: Any, tmp_path: Path) -> None:
    windows = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(0))
    model = make("llama", blocks=4, tie_word_embeddings=False)
    report = compress(model, windows, config)
    table = model.get_input_embeddings()
    assert isinstance(table, EmbeddingFactors)
    assert report.plan.entries[0].name == "model.embed_tokens"
    assert type(model.lm_head) is nn.Linear
    save(model, None, tmp_path / "small", report=report)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = model(windows).logits
        assert torch.equal(again(windows).logits, expected)
    assert perplexity(again, windows).value == perplexity(model, windows).value
    dense_export(again, None, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.get_input_embeddings()) is nn.Embedding
    with torch.no_grad():
        torch.testing.assert_close(dense(windows).logits, expected, rtol=1e-4, atol=1e-4)
    layers = {layer.name: layer for layer in summarize(tmp_path / "small").layers}
    assert layers["model.embed_tokens"].shape == (32, 101)


def test_tables_that_cannot_be_are_refused_before_anything_runs() -> None:
    windows = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(0))
    config = BudgetConfig(keep=0.6, targets="all-embeddings")
    with pytest.raises(ValueError, match=r"the weight of model\.embed_tokens is tied to lm_head"):
        compress(make("llama", blocks=4, tie_word_embeddings=True), windows, config)
    model = make("llama", blocks=4, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a table of embeddings, which needs the whole model"):
        candidates(model, config, offloaded=True)
    with pytest.raises(ValueError, match="the model has no plain table of embeddings"):
        compress(nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 3), config)
    assert linear_modules(model, "all-embeddings") == ["model.embed_tokens"]
    assert "model.embed_tokens" not in linear_modules(model, "all-linear")


def test_the_argument_has_the_name_that_tables_have() -> None:
    table = EmbeddingFactors(6, 4, 2)
    for part in table.parameters():
        nn.init.ones_(part)
    tokens = torch.tensor([1, 5])
    assert torch.equal(table(input=tokens), table(tokens))
