"""Layers of a plan on grids: whole weights, and factors that another method has made."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cur.integrations import BudgetConfig, save
from cur.integrations.compress import carry_out_, compress_source, measure
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import IntegerGrid, KeptInputs, WholeLinear, compressed_modules, dense_weight, looks_up
from cur.integrations.plan.entry import PlanError, read_entry
from cur.integrations.plan.make import make_plan
from cur.integrations.plan.methods import NeuronsEntry, RoundedEntry
from cur.integrations.plan.plan import Plan, fingerprint
from cur.integrations.quantize import quantize_
from cur.integrations.report.data import CompressionReport
from cur.integrations.sources import InMemory, as_batches
from tests.models import VOCABULARY, make

Measured: TypeAlias = "tuple[Any, list[Any], Statistics, Plan]"

FOUR = IntegerGrid(4, 16, symmetric=False)


@pytest.fixture(scope="module")
def measured() -> Measured:
    model = make("llama", seed=0, blocks=2)
    windows = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    text = as_batches(windows, 1)
    config = BudgetConfig(keep=0.6, own_text=0.0)
    statistics = measure(model, text, config)
    return model, text, statistics, make_plan(model, statistics, config)


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in f".{name}"
    }


def _whole(model: nn.Module, grid: IntegerGrid, plan: Plan) -> Plan:
    entries = tuple(
        RoundedEntry(name=name, shape=tuple(part.weight.shape), grid=grid, gradients=True)
        for name, part in _linear(model).items()
    )
    return replace(plan, entries=entries)


def test_whole_layers_are_those_of_rounding_a_model(measured: Measured) -> None:
    model, text, statistics, plan = measured
    planned, rounded = copy.deepcopy(model), copy.deepcopy(model)
    report = carry_out_(planned, _whole(model, FOUR, plan), statistics, text=text)
    quantize_(rounded, statistics, grid=FOUR, text=text)
    for name in _linear(model):
        layer = planned.get_submodule(name)
        assert isinstance(layer, WholeLinear)
        assert layer.grid == FOUR
        assert torch.equal(layer.weight, rounded.get_submodule(name).weight)
    assert all(done.grid == FOUR and done.parameters_after == done.parameters_before for done in report.layers)


def test_factors_and_neurons_are_rounded_as_they_are_made(measured: Measured) -> None:
    model, text, statistics, plan = measured
    assert any(isinstance(entry, NeuronsEntry) for entry in plan.entries)
    fine = IntegerGrid(8, 16, symmetric=False)
    made: dict[IntegerGrid | None, torch.Tensor] = {}
    for grid in (None, fine, FOUR):
        compressed = copy.deepcopy(model)
        entries = tuple(replace(entry, grid=grid) for entry in plan.entries)
        report = carry_out_(compressed, replace(plan, entries=entries), statistics, text=text)
        layers = compressed_modules(compressed)
        assert {layer.grid for layer in layers.values()} == {grid}
        assert [done.grid for done in report.layers] == [grid] * len(entries)
        with torch.no_grad():
            made[grid] = compressed(**text[0]).logits
    close, far = (float((made[grid] - made[None]).norm()) for grid in (fine, FOUR))
    assert close < 0.25 * far
    assert close < 0.01 * float(made[None].norm())


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_of_a_plan_with_grids_loads(measured: Measured, tmp_path: Path, whole: bool) -> None:
    model, text, statistics, plan = measured
    compressed = copy.deepcopy(model)
    entries = tuple(replace(entry, grid=FOUR) for entry in plan.entries)
    asked = _whole(model, FOUR, plan) if whole else replace(plan, entries=entries)
    report = carry_out_(compressed, asked, statistics, text=text)
    save(compressed, None, tmp_path / "out", report=report)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**text[0]).logits, compressed(**text[0]).logits)
    assert Plan.load(tmp_path / "out" / "plan.json") == asked
    assert CompressionReport.load(tmp_path / "out" / "report.json").layers == report.layers


def test_what_is_kept_of_inputs_is_rounded_under_their_own_moments(measured: Measured) -> None:
    model, _, statistics, plan = measured
    entries = tuple(replace(entry, grid=FOUR) for entry in plan.entries)
    compressed = copy.deepcopy(model)
    carry_out_(compressed, replace(plan, entries=entries), statistics)
    exact = copy.deepcopy(model)
    carry_out_(exact, plan, statistics)
    name = next(name for name, layer in compressed_modules(compressed).items() if isinstance(layer, KeptInputs))
    rounded, layer = compressed.get_submodule(name), exact.get_submodule(name)
    G, H = statistics.second_moment(name), statistics.output_moment(name)

    def lost(W: torch.Tensor) -> float:
        change = (W - layer.weight).detach().double()
        return float(((H @ change) * (change @ G)).sum())

    step = (layer.part.weight.amax() - layer.part.weight.amin()) / 15
    coarse = layer.spread((layer.part.weight / step).round() * step)
    assert torch.equal(rounded.kept, layer.kept)
    assert lost(rounded.weight) < 0.7 * lost(coarse)


def test_entries_say_their_grid() -> None:
    entry = RoundedEntry(name="q", shape=(16, 32), grid=FOUR, gradients=True)
    data = entry.to_dict()
    assert (data["method"], data["layout"], data["grid"]) == ("rounded", "whole", FOUR.spec())
    assert data["parameters"] == 16 * 32
    assert read_entry(data) == entry
    assert entry.nbytes(torch.float32) == 16 * 16 + 2 * 16 * 2 + 16
    with pytest.raises(PlanError, match="`grid` of q must say what it is rounded to"):
        RoundedEntry(name="q", shape=(16, 32))
    with pytest.raises(PlanError, match=r"`grid` of q is none: .*`bits` must be one of"):
        read_entry({**data, "grid": {"bits": 7, "group": 16, "symmetric": False}})
    with pytest.raises(PlanError, match="`grid` of q must be an IntegerGrid"):
        replace(entry, grid=4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_plan_has_tables_and_heads(family: str, tmp_path: Path) -> None:
    model: Any = make(family, seed=0, blocks=2)
    text = as_batches(torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0)), 1)
    known = vocabulary(model)
    grid = IntegerGrid(6, 16, symmetric=False)
    q = "model.layers.0.self_attn.q_proj"
    entries = [RoundedEntry(name=q, shape=(32, 32), grid=FOUR, gradients=True)]
    for name, tied in known.items():
        shape = tuple(dense_weight(model.get_submodule(name), name)[0].shape)
        layout = "table" if looks_up(model.get_submodule(name)) else "whole"
        entries.append(RoundedEntry(name=name, shape=shape, layout=layout, grid=grid, tied=tied))
    plan = Plan(entries=tuple(entries), fingerprint=fingerprint(model))
    assert all(entry.nbytes(torch.float32) == VOCABULARY * (24 + 2 * 2 + 2) for entry in entries[1:])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    rounded = copy.deepcopy(model)
    report = compress_source(InMemory(model, text), plan)
    quantize_(rounded, measure(rounded, text, plan), grid={entry.name: entry.grid for entry in entries if entry.grid})
    table: Any = model.get_input_embeddings()
    assert torch.equal(table.weight, rounded.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, rounded.lm_head.weight)
    assert (model.lm_head.W.integers is table.W.integers) == (family == "llama")
    done = {layer.name: layer for layer in report.layers}
    assert done.keys() == {entry.name for entry in entries}
    assert all(0 < done[name].relative_error < 0.05 for name in known)
    assert all(done[name].certificate["relative"] == pytest.approx(done[name].relative_error) for name in known)
    save(model, None, tmp_path / "out", report=report)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**text[0]).logits, model(**text[0]).logits)


def test_entries_say_what_is_tied() -> None:
    model = make("llama", seed=0, blocks=2)
    entry = RoundedEntry(
        name="model.embed_tokens", shape=(32, VOCABULARY), layout="table", grid=FOUR, tied=("lm_head",)
    )
    data = json.loads(json.dumps(entry.to_dict()))
    assert data["tied"] == ["lm_head"]
    assert read_entry(data) == entry
    assert "tied" not in replace(entry, tied=()).to_dict()
    Plan(entries=(entry,), fingerprint=fingerprint(model)).check(model)
    with pytest.raises(PlanError, match=r"`tied` of model\.embed_tokens must name the modules that share its weight"):
        Plan(entries=(replace(entry, tied=()),), fingerprint=fingerprint(model)).check(model)
    with pytest.raises(PlanError, match=r"`tied` of model\.embed_tokens must be names of modules, got 'lm_head'"):
        replace(entry, tied="lm_head")
    head = RoundedEntry(name="lm_head", shape=(VOCABULARY, 32), grid=FOUR)
    with pytest.raises(
        PlanError, match=r"`entries` must not hold lm_head, whose weight is that of model\.embed_tokens"
    ):
        Plan(entries=(entry, head), fingerprint=fingerprint(model))
    wrong = Plan(entries=(replace(head, layout="table"),), fingerprint=fingerprint(model))
    with pytest.raises(PlanError, match="in the layout 'table', which is not for a Linear"):
        wrong.check(model)


def test_the_bound_of_rounded_factors_has_the_rounding_of_their_product(measured: Measured) -> None:
    model, text, statistics, plan = measured
    compressed = copy.deepcopy(model)
    entries = tuple(replace(entry, grid=FOUR) for entry in plan.entries)
    report = carry_out_(compressed, replace(plan, entries=entries), statistics, text=text)
    factored = [layer for layer in report.layers if layer.layout == "interpolative"]
    assert factored
    assert all(layer.certificate["rounding"] > 0 for layer in factored)
    assert all(layer.weighted_bound > layer.weighted_error for layer in factored)
