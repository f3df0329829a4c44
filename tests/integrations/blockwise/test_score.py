from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur.integrations import Reference, divergence, perplexity, save
from cur.integrations.blockwise import StreamedModel, compare_blockwise, load_streamed, reference_blockwise
from cur.integrations.blockwise.score import perplexity_blockwise
from cur.integrations.quantize import grid_of, quantize_
from tests.models import FAMILIES, make, tokenizer

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = {
    "tied": FAMILIES["llama"].config(**FAMILIES["llama"].options),
    "capped": hf.Gemma2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0
    ),
    "blocks that return tuples": hf.BloomConfig(vocab_size=101, hidden_size=32, n_layer=3, n_head=4),
    "a head of its own": hf.GPTNeoXConfig(**SIZES, intermediate_size=48),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """A model that predicts something else, by its blocks and by its head."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return other


def on_disk(model: PreTrainedModel, directory: Path) -> StreamedModel:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return load_streamed(directory)


def test_models_are_compared_as_in_memory(model: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    other = changed(model)
    expected = divergence(other, model, windows, batch_size=2)
    parts, others = on_disk(model, tmp_path / "dense"), on_disk(other, tmp_path / "other")
    told: list[tuple[int, int | None]] = []
    reference = reference_blockwise(
        parts, windows, batch_size=2, scratch=tmp_path, progress=lambda *done: told.append(done)
    )
    assert told[-1] == (len(windows) * (len(parts.blocks) + 1),) * 2
    assert all(parameter.is_meta for parameter in parts.model.parameters())
    assert compare_blockwise(parts, reference, batch_size=2, scratch=tmp_path).mean == 0.0
    for found in (
        compare_blockwise(others, reference, batch_size=2, scratch=tmp_path),
        compare_blockwise(others, Reference(model, windows), scratch=tmp_path),
        reference.compare(other),
    ):
        assert found.kl == pytest.approx(expected.kl, rel=1e-4)
        assert found.same == expected.same
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert all(parameter.is_meta for one in (parts, others) for parameter in one.model.parameters())


def test_another_vocabulary_is_refused_before_any_pass(
    windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**SIZES, "vocab_size": size})) for size in (101, 110))
    reference = Reference(large, windows)
    parts = on_disk(small, tmp_path / "small")
    monkeypatch.setattr(StreamedModel, "load_outside", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="`reference` must predict the tokens that the model does"):
        compare_blockwise(parts, reference)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tables_and_heads_on_grids_score_as_in_memory(family: str, windows: torch.Tensor, tmp_path: Path) -> None:
    model = make(family, seed=0, blocks=2)
    dense = perplexity(model, windows).value
    quantize_(model, grid=grid_of(8), tables=grid_of(6, 16))
    save(model, None, tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    expected = perplexity(model, windows).value
    found = perplexity_blockwise(load_streamed(tmp_path / "small"), windows, scratch=tmp_path)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(dense, rel=0.1)
    assert expected != dense
