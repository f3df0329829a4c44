"""Checkpoints of tables and heads on grids: stored once, loaded by `from_pretrained`, and multiplied out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from cur.integrations import dense_export, load_into, save
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import CompressedLinear, IntegerGrid, WholeLinear, WholeTable, compressed_modules
from cur.integrations.quantize import grid_of, quantize_
from cur.integrations.store.checkpoint import CheckpointError
from cur.integrations.store.inspect import summarize
from tests.models import VOCABULARY, batch, make

EIGHT, SIX = grid_of(8), IntegerGrid(6, 16, symmetric=False)
FAMILIES = ["llama", "mistral", "gpt2", "gemma3", "phi"]
IDS = torch.arange(14).reshape(2, 7)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def rounded(family: str, grid: IntegerGrid, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model and what it was made from; tables and heads alone are rounded."""
    model = make(family, seed=0, **changes)
    dense = copy.deepcopy(model)
    quantize_(model, grid=dict.fromkeys(vocabulary(model), grid))
    return model, dense


@pytest.mark.parametrize("grid", [EIGHT, SIX])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_read_to_the_bit(family: str, grid: IntegerGrid, tmp_path: Path) -> None:
    model, dense = rounded(family, grid)
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert tied == (family in ("llama", "gpt2", "gemma3"))
    save(model, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(table, WholeTable)
    assert isinstance(head, WholeLinear)
    assert (head.W.integers is table.W.integers) == (head.W.scale is table.W.scale) == tied
    stored = load_file(tmp_path / "out" / "cur_model.safetensors")
    integers = [tensor for name, tensor in stored.items() if name.endswith("W.integers")]
    assert [tuple(tensor.shape) for tensor in integers] == [(VOCABULARY, grid.row_bytes(32))] * (1 if tied else 2)
    summary = summarize(tmp_path / "out")
    parameters = sum(part.numel() for part in dense.parameters())
    assert (summary.parameters, summary.dense_parameters) == (parameters, parameters)
    assert len(summary.layers) == (1 if tied else 2)
    made = again.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(made, model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_tying_again_changes_nothing(family: str, tmp_path: Path) -> None:
    model, _ = rounded(family, SIX)
    expected = logits(model)
    for each in (model, copy.deepcopy(model)):
        each.tie_weights()
        assert torch.equal(logits(each), expected)
        assert each.get_output_embeddings().W.integers is each.get_input_embeddings().W.integers
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    again.tie_weights()
    assert torch.equal(logits(again), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert half.get_output_embeddings().W.scale is half.get_input_embeddings().W.scale
    assert logits(half).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_body_alone_is_loaded_and_a_head_around_it(family: str, tmp_path: Path) -> None:
    model, _ = rounded(family, SIX)
    save(model, None, tmp_path / "out")
    body: Any = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(body(input_ids=IDS)[0], model.base_model(input_ids=IDS)[0])
    if family == "llama":
        body.save_pretrained(tmp_path / "body")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_what_layers_multiply_out_to(family: str, tmp_path: Path) -> None:
    model, dense = rounded(family, SIX)
    expected = {name: layer.to_dense().weight for name, layer in compressed_modules(model).items()}
    before = logits(model)
    dense_export(model, None, tmp_path / "dense")
    assert torch.equal(logits(model), before)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not compressed_modules(again)
    for name, weight in expected.items():
        assert torch.equal(again.get_parameter(f"{name}.weight"), weight)
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    dense.save_pretrained(tmp_path / "was")
    assert size == (tmp_path / "was" / "model.safetensors").stat().st_size
    assert torch.allclose(logits(again), before, rtol=1e-5, atol=1e-5)
    model.dequantize()
    model.tie_weights()
    assert torch.equal(logits(model), logits(again))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.resize_token_embeddings(VOCABULARY + 3).num_embeddings == VOCABULARY + 3


@pytest.mark.parametrize("names", [["model.embed_tokens", "lm_head"], ["model.embed_tokens"], ["lm_head"]])
def test_tables_and_heads_keep_their_size(names: list[str], tmp_path: Path) -> None:
    model = make("mistral", seed=0)
    quantize_(model, grid=dict.fromkeys(names, EIGHT))
    expected = logits(model)
    save(model, None, tmp_path / "out")
    for each in (model, copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        with pytest.raises(ValueError, match=f"`new_num_tokens` must stay {VOCABULARY}, got 120"):
            each.resize_token_embeddings(120)
        with pytest.raises(ValueError, match=f"`new_num_tokens` must stay {VOCABULARY}"):
            each.resize_token_embeddings(pad_to_multiple_of=64)
        assert torch.equal(logits(each), expected)
        assert each.resize_token_embeddings(VOCABULARY) is each.get_input_embeddings()
        assert each.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_tables_that_an_encoder_and_a_decoder_share(family: str, tmp_path: Path) -> None:
    changes = {"scale_embedding": True} if family == "bart" else {}
    model = make(family, seed=0, **changes)
    shared = vocabulary(model)
    assert len(shared) == 1
    quantize_(model, grid=dict.fromkeys(shared, SIX))
    assert len({id(layer.W.integers) for layer in compressed_modules(model).values()}) == 1
    text = {key: value.contiguous() for key, value in batch(family, count=2).items()}
    save(model, None, tmp_path / "out")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    dense_export(model, None, tmp_path / "dense")
    multiplied = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = model(**text).logits
        assert torch.equal(again(**text).logits, expected)
        assert torch.allclose(multiplied(**text).logits, expected, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "out" / "cur_model.safetensors")
    assert sum(name.endswith("W.integers") for name in stored) == 1


def test_a_head_with_a_bias_of_its_own(tmp_path: Path) -> None:
    model = make("bert", seed=0)
    assert model.get_output_embeddings().bias is not None
    quantize_(model, grid=dict.fromkeys(vocabulary(model), SIX))
    save(model, None, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    again.tie_weights()
    assert torch.equal(logits(again), logits(model))


class Plain(nn.Module):
    """A module that is no transformer, with a head before the table that it is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 20)
        self.table = nn.Embedding(20, 16)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(tokens))
        return found


def test_a_module_of_any_kind(tmp_path: Path) -> None:
    model = Plain()
    quantize_(model, grid={"table": SIX})
    save(model, tmp_path / "out")
    again: Any = load_into(Plain(), tmp_path / "out")
    tokens = torch.arange(20)
    assert torch.equal(again(tokens), model(tokens))
    assert again.head.W.integers is again.table.W.integers
    stored = load_file(tmp_path / "out" / "cur_model.safetensors")
    assert sum(name.endswith("integers") for name in stored) == 1


def test_a_description_of_what_is_not_shared_is_refused(tmp_path: Path) -> None:
    model, _ = rounded("llama", EIGHT)
    save(model, None, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"shared_with": "model.embed_tokens"', '"shared_with": "model.norm"'))
    with pytest.raises(CheckpointError, match=r"shares lm_head with model\.norm, which it does not describe"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_of_it_learns() -> None:
    model, _ = rounded("llama", EIGHT)
    layers = [layer for layer in compressed_modules(model).values() if isinstance(layer, CompressedLinear)]
    assert layers
    assert not any(part.requires_grad for layer in layers for part in layer.parameters())
