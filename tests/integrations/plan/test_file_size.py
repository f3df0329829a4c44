from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cur.integrations import BudgetConfig, compress, save
from cur.integrations.plan.file_size import ByteCosts
from tests.models import batch, make


def on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """A model whose numbers outweigh the headers that describe them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_size_is_met_within_a_percent_and_never_exceeded(
    share: float, dtype: torch.dtype, wide: PreTrainedModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(wide).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    size = int(share * on_disk(tmp_path / "dense"))
    tokens = torch.randint(0, 101, (6, 24), generator=torch.Generator().manual_seed(1))
    compress(model, tokens, BudgetConfig(size=size, rounding=False, gradients=False, own_text=0))
    save(model, None, tmp_path / "model")
    assert 0.99 * size <= on_disk(tmp_path / "model") <= size


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_other_families(name: str, rounding: bool, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    size = int((0.45 if rounding else 0.8) * on_disk(tmp_path / "dense"))
    compress(model, [batch(name)], BudgetConfig(size=size, rounding=rounding, gradients=rounding, own_text=0))
    save(model, None, tmp_path / "model")
    # So small a model is a fifth headers, whose names alone differ from what was foreseen.
    assert 0.95 * size <= on_disk(tmp_path / "model") <= size
    again = type(model).from_pretrained(tmp_path / "model").state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize("tied", [True, False])
def test_block_by_block_counts_tied_weights_once(tied: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        streamed = LlamaForCausalLM(config)
    streamed.tie_weights()
    assert ByteCosts(streamed, []).dense() == ByteCosts(LlamaForCausalLM(config), []).dense()


def test_what_cannot_be_met(wide: PreTrainedModel, tmp_path: Path) -> None:
    tokens = torch.randint(0, 101, (2, 24))
    wide.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"`size` must be at least [\d,]+ bytes, of which [\d,]+ belong"):
        compress(wide, tokens, BudgetConfig(size=1000, gradients=False, own_text=0))
    above = ByteCosts(wide, []).dense()
    assert on_disk(tmp_path / "dense") <= above <= 1.02 * on_disk(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"`size` must be below .*: there is nothing to do"):
        compress(wide, tokens, BudgetConfig(size=above + 10, gradients=False, own_text=0))
