"""Tables of tokens and output heads share a budget of the whole model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cur.integrations import BudgetConfig, Reference, compress, save
from cur.integrations.compress import carry_out_, compress_to, measure
from cur.integrations.factor.tables import round_table
from cur.integrations.plan.file_size import ByteCosts
from cur.integrations.plan.grid_errors import GRIDS
from cur.integrations.plan.methods import ROUNDING_DAMPING
from cur.integrations.plan.vocabulary_curves import priced_vocabulary, vocabulary_curves
from cur.integrations.sources import InMemory, as_batches

TOKENS = 600


def _model(*, tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, tie_word_embeddings=tied, **sizes)).eval()


def _text() -> torch.Tensor:
    return torch.randint(TOKENS, (8, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_rounds_tables_and_heads_and_is_met(tied: bool, tmp_path: Path) -> None:
    dense = _model(tied=tied)
    size = int(0.2 * ByteCosts(dense, []).dense())
    model = copy.deepcopy(dense)
    report = compress(model, _text(), BudgetConfig(size=size, own_text=0))
    ends = {entry.name: entry for entry in report.plan.entries if "layers" not in entry.name}
    assert set(ends) == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    assert all(entry.grid.bits >= 4 for entry in ends.values())
    assert ends["model.embed_tokens"].tied == (("lm_head",) if tied else ())
    save(model, None, tmp_path / "out", report=report)
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.98 * size <= stored <= size
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(_text()).logits, model(_text()).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_is_carried_out_again_on_what_it_needs(tied: bool) -> None:
    text, config = as_batches(_text(), 1), BudgetConfig(size=10**6, own_text=0)
    size = int(0.2 * ByteCosts(_model(tied=tied), []).dense())
    model = _model(tied=tied)
    plan = compress(model, _text(), replace(config, size=size)).plan
    again = _model(tied=tied)
    statistics = measure(again, text, plan)
    assert "lm_head" not in statistics.output_products  # a square of the vocabulary
    assert "model.embed_tokens" in statistics.output_products
    carry_out_(again, plan, statistics, text=text)
    with torch.no_grad():
        torch.testing.assert_close(again(_text()).logits, model(_text()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_foreseen_is_what_rounding_is_predicted_to_lose(tied: bool) -> None:
    model, config = _model(tied=tied), BudgetConfig(size=1000, own_text=0)
    statistics = measure(model, as_batches(_text(), 1), config)
    curves = vocabulary_curves(model, statistics, config)
    assert [curve.name for curve in curves] == (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])
    for curve in curves:
        for bits in (4, 6, 8):
            place, grid = next((i, grid) for i, grid in enumerate(GRIDS) if (grid.bits, grid.group) == (bits, 64))
            module = model.get_submodule(curve.name)
            done = round_table(curve.name, module, grid, statistics, tied=curve.tied, damping=ROUNDING_DAMPING)
            assert done.predicted is not None
            assert done.predicted / 1.3 <= curve.rounded[place] <= 1.3 * done.predicted


@pytest.mark.parametrize("tied", [True, False])
def test_plans_that_are_tried_leave_tables_and_heads_as_they_are(tied: bool, tmp_path: Path) -> None:
    dense, other = _model(tied=tied), torch.randint(TOKENS, (4, 48), generator=torch.Generator().manual_seed(2))
    model = copy.deepcopy(dense)
    source = InMemory(model, as_batches(_text(), 1))
    report = compress_to(source, BudgetConfig(tol=1e-3, own_text=0), tmp_path / "out", held_out=other)
    assert report.divergence is not None
    assert report.divergence.upper <= 1e-3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Reference(dense, other).compare(again).upper == pytest.approx(report.divergence.upper, rel=1e-3)
    source = InMemory(dense, as_batches(_text(), 1))
    source.made = {"model.embed_tokens": again.get_submodule("model.embed_tokens")}
    seen = []
    source.on_trial(lambda _: seen.append(type(dense.lm_head)))  # type: ignore[arg-type, func-returns-value]
    assert (seen[0] is torch.nn.Linear) != tied
    assert type(dense.lm_head) is torch.nn.Linear
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied


def test_budgets_of_the_layers_alone_leave_them_as_they_are() -> None:
    model = _model(tied=True)
    assert priced_vocabulary(model, BudgetConfig(size=1000)) == {"model.embed_tokens": ("lm_head",)}
    assert priced_vocabulary(model, BudgetConfig(tol=0.1)) == {"model.embed_tokens": ("lm_head",)}
    for config in (
        BudgetConfig(bits=4),
        BudgetConfig(keep=0.5),
        BudgetConfig(size=1000, rounding=False),
        BudgetConfig(size=1000, gradients=False),
        BudgetConfig(size=1000, exclude=("embed_tokens",)),
        BudgetConfig(size=1000, exclude=("lm_head",)),
    ):
        assert priced_vocabulary(model, config) == {}
