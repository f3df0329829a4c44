"""Rounding of tables and heads, and what it is expected to cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cur.integrations import collect
from cur.integrations.factor import tables
from cur.integrations.factor.tables import TABLE_GRIDS, head_losses, round_table, table_losses, token_shares
from cur.integrations.nn import IntegerGrid, WholeLinear, WholeTable
from tests.models import VOCABULARY, make

GRID = IntegerGrid(4, 16, symmetric=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", TABLE_GRIDS)
def test_a_part_of_the_rows_at_a_time_is_all_of_them(grid: IntegerGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding.from_pretrained(random(30, 24))
    whole = round_table("table", table, grid, damping=0.1)
    monkeypatch.setattr(tables, "_AT_ONCE", 7 * 24)
    parts = round_table("table", table, grid, damping=0.1)
    assert isinstance(whole.layer, WholeTable)
    assert torch.equal(whole.layer.weight, parts.layer.weight)
    assert whole.error == pytest.approx(parts.error)
    relative = float((whole.layer.weight - table.weight).norm() / table.weight.norm())
    assert whole.error == pytest.approx(relative, rel=1e-5)
    assert 0 < relative < 4 * 2.0**-grid.bits


def test_steps_of_all_parts_have_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_AT_ONCE", 8 * 24)
    W = random(16, 24)
    W[:8] *= 1e-6  # steps that only bfloat16 has
    made = round_table("table", nn.Embedding.from_pretrained(W), IntegerGrid(4, 8, symmetric=False), damping=0.1)
    assert made.layer.W.stored_scale().dtype == torch.bfloat16


def test_errors_of_a_head_make_up_for_each_other_under_its_inputs() -> None:
    model = make("mistral", seed=0)
    ids = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, ids.split(1), modules=["lm_head", "model.embed_tokens"], moments="full")
    head: Any = model.lm_head
    G = statistics.second_moment("lm_head")

    def lost(layer: Any) -> float:
        E = (layer.weight - head.weight).detach().double()
        return float(((E @ G) * E).sum())

    plain = round_table("lm_head", head, GRID, damping=0.1)
    fitted = round_table("lm_head", head, GRID, statistics, damping=0.1)
    assert isinstance(fitted.layer, WholeLinear)
    assert lost(fitted.layer) < 0.9 * lost(plain.layer)
    size = float(((head.weight.detach().double() @ G) * head.weight.detach()).sum())
    assert fitted.error == pytest.approx((lost(fitted.layer) / size) ** 0.5, rel=1e-4)


def divergence(dense: Any, other: Any, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("bits", [6, 8])
def test_what_a_head_costs_is_what_predictions_lose(bits: int) -> None:
    model: Any = make("mistral", seed=0)
    ids = torch.randint(VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, ids.split(4), modules=["lm_head"], moments="full")
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().softmax(-1)
    grid = IntegerGrid(bits, 16, symmetric=False)
    rounded = copy.deepcopy(model)
    rounded.lm_head.weight.data = round_table("lm_head", model.lm_head, grid, statistics, damping=0.1).layer.weight
    measured = divergence(model, rounded, ids)
    G = statistics.second_moment("lm_head")
    near = head_losses(model.lm_head.weight, G, (p * (1 - p)).mean((0, 1)), grids=[grid])[grid]
    above = head_losses(model.lm_head.weight, G, p.mean((0, 1)), grids=[grid])[grid]
    assert measured / 2 < near < 2 * measured
    assert near < above


def test_what_a_table_costs_follows_from_gradients() -> None:
    W, B = random(40, 16), random(16, 16, seed=1)
    shares = token_shares(torch.arange(40))
    found = table_losses(W, B @ B.T, shares, grids=[GRID])
    E = (round_table("t", nn.Embedding.from_pretrained(W), GRID, damping=0.1).layer.weight - W).double()
    expected = 0.5 * float((shares[:, None] * (E @ B.double()) ** 2).sum())
    assert found[GRID] == pytest.approx(expected, rel=1e-6)
    assert table_losses(W, B @ B.T, shares, grids=[GRID], times=3.0)[GRID] == pytest.approx(9 * expected, rel=1e-6)
    losses = list(table_losses(W, B @ B.T, shares).values())
    assert losses[1:] == sorted(losses[1:])


def test_losses_are_estimated_from_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    W, shares = random(4000, 16), token_shares(torch.arange(4000) ** 2)
    whole = table_losses(W, torch.eye(16), shares, grids=[GRID])[GRID]
    monkeypatch.setattr(tables, "_ROWS", 400)
    some = table_losses(W, torch.eye(16), shares, grids=[GRID])[GRID]
    assert some == pytest.approx(whole, rel=0.1)
    assert some != whole


def test_shares_leave_something_for_tokens_that_never_came() -> None:
    for counts in ([0, 0, 0], [4, 2, 1], [1, 1, 0], [5, 0, 0]):
        shares = token_shares(torch.tensor(counts))
        assert float(shares.sum()) == pytest.approx(1)
        assert bool((shares >= 0).all())
