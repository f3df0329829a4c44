from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur import NumericalError, ranks
from cur._lib.maxvol import LARGEST
from cur.integrations import (
    BudgetConfig,
    Plan,
    Statistics,
    batches,
    carry_out_,
    collect,
    collect_gradients,
    compress,
    decoder_layers,
    linear_modules,
    make_plan,
    save,
)
from cur.integrations.nn import InterpolativeLinear, compressed_modules

VARIANTS = list(itertools.product(("best", "rows"), (True, False)))


def inside(model: PreTrainedModel) -> list[str]:
    return linear_modules(model, "all-linear", blocks=range(len(decoder_layers(model))))


def numbers(model: PreTrainedModel, names: list[str]) -> int:
    """Numbers in the weights of layers, factored or not."""
    modules = [model.get_submodule(name) for name in names]
    return sum(p.numel() for module in modules for key, p in module.named_parameters() if not key.endswith("bias"))


@pytest.fixture
def statistics(llama: PreTrainedModel, windows: torch.Tensor) -> Statistics:
    given = list(batches(windows, batch_size=3))
    found = collect(llama, given, modules=inside(llama), moments="full")
    return collect_gradients(llama, given, found, modules=inside(llama))


@pytest.mark.parametrize(("method", "gradients"), VARIANTS)
@pytest.mark.parametrize("keep", [0.5, 0.8, 0.93])
def test_the_budget_is_met_and_never_exceeded(
    llama: PreTrainedModel, statistics: Statistics, keep: float, method: str, gradients: bool
) -> None:
    names, dense = inside(llama), numbers(llama, inside(llama))
    whole = sum(p.numel() for p in llama.parameters())
    report = compress(llama, statistics, BudgetConfig(keep=keep, method=method, gradients=gradients))
    left = numbers(llama, names)
    assert (keep - 0.01) * dense <= left <= keep * dense
    assert report.plan.kept == pytest.approx(left / dense)
    assert report.plan.model_kept == pytest.approx(1 - (dense - left) / whole)
    assert report.after.parameters == report.before.parameters - (dense - left)


def test_a_budget_for_the_whole_model(llama: PreTrainedModel, statistics: Statistics) -> None:
    whole = sum(p.numel() for p in llama.parameters())
    report = compress(llama, statistics, BudgetConfig(parameters=whole - 5000))
    assert whole - 5000 - 400 <= report.after.parameters <= whole - 5000


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "qwen2"])
def test_every_architecture(kind: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    model = make_model(kind)
    names, dense = inside(model), numbers(model, inside(model))
    compress(model, windows, BudgetConfig(keep=0.7))
    assert 0.69 * dense <= numbers(model, names) <= 0.7 * dense
    with torch.no_grad():
        assert torch.isfinite(model(windows).logits).all()


@pytest.mark.parametrize(("method", "gradients"), VARIANTS)
def test_a_plan_replayed_gives_the_same_model(
    llama: PreTrainedModel, statistics: Statistics, windows: torch.Tensor, tmp_path: Path, method: str, gradients: bool
) -> None:
    replayed = copy.deepcopy(llama)
    report = compress(llama, statistics, BudgetConfig(keep=0.7, method=method, gradients=gradients))
    report.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == report.plan
    carry_out_(replayed, plan, statistics)
    with torch.no_grad():
        assert torch.equal(llama(windows).logits, replayed(windows).logits)


def test_saved_and_loaded_it_computes_the_same(
    llama: PreTrainedModel, statistics: Statistics, windows: torch.Tensor, tmp_path: Path
) -> None:
    report = compress(llama, statistics, BudgetConfig(keep=0.7))
    save(llama, None, tmp_path / "small", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(llama(windows).logits, loaded(windows).logits)
    assert "nearest of their rank" in (tmp_path / "small" / "README.md").read_text()


def test_the_prediction_is_the_weighted_error(llama: PreTrainedModel, statistics: Statistics) -> None:
    dense = copy.deepcopy(llama)
    config = BudgetConfig(keep=0.7, damping=0.0)
    report = compress(llama, statistics, config)
    assert report.plan.entries
    for entry in report.plan.entries:
        layer = llama.get_submodule(entry.name)
        D = dense.get_parameter(f"{entry.name}.weight").detach().double() - layer.weight.detach().double()
        H, G = statistics.output_moment(entry.name), statistics.second_moment(entry.name)
        if entry.layout == "outputs":  # the next layer makes up for the neurons that are removed
            D, H = D[layer.kept], H[layer.kept][:, layer.kept]
        cost = float(torch.sum((H @ D) * (D @ G))) / 2
        assert entry.predicted == pytest.approx(cost, rel=1e-3, abs=1e-9)


def test_the_prediction_is_the_increase_of_the_loss_while_that_is_small(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    """With labels drawn from the dense model the expected increase is the Kullback-Leibler divergence from it."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 101, (64, 24), generator=generator)
    dense = copy.deepcopy(llama)
    report = compress(llama, text, BudgetConfig(keep=0.97))
    with torch.no_grad():
        expected, got = (model(text).logits.double().log_softmax(-1) for model in (dense, llama))
    divergence = float((expected.exp() * (expected - got)).sum(-1).mean())
    predicted = sum(entry.predicted or 0.0 for entry in report.plan.entries)
    assert divergence / 3 <= predicted <= divergence * 3


@pytest.mark.parametrize("gradients", [True, False])
def test_it_is_better_than_uniform_ranks(llama: PreTrainedModel, windows: torch.Tensor, gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    text, held_out = torch.randint(3, 101, (2, 32, 24), generator=generator)
    models = {name: copy.deepcopy(llama) for name in ("shared", "uniform")}
    names = inside(llama)
    given = list(batches(text, batch_size=8))
    statistics = collect_gradients(llama, given, collect(llama, given, modules=names, moments="full"), modules=names)
    config = BudgetConfig(keep=0.8, gradients=gradients)
    plan = make_plan(llama, statistics, config)
    entry = plan.entries[0]
    entries = []
    for name in names:
        m, n = llama.get_submodule(name).weight.shape
        rank = ranks.rank_for(m, n, 0.8 * m * n, layout="interpolative")
        entries.append(replace(entry, name=name, shape=(m, n), rank=rank, gradients=False))
    carry_out_(models["shared"], plan, statistics)
    carry_out_(models["uniform"], replace(plan, entries=tuple(entries)), statistics)
    divergence = {}
    with torch.no_grad():
        expected = llama(held_out).logits.log_softmax(-1)
        for name, model in models.items():
            got = model(held_out).logits.log_softmax(-1)
            divergence[name] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence["shared"] < 0.9 * divergence["uniform"]


def test_rows_are_rows_of_the_weights(llama: PreTrainedModel, statistics: Statistics) -> None:
    dense = copy.deepcopy(llama)
    report = compress(llama, statistics, BudgetConfig(keep=0.7, method="rows"))
    assert report.layers
    for layer in report.layers:
        new = llama.get_submodule(layer.name)
        assert isinstance(new, InterpolativeLinear)
        weight = dense.get_parameter(f"{layer.name}.weight").detach()
        assert torch.equal(new.R.weight, weight[list(layer.rows)])
        assert torch.equal(new.weight[list(layer.rows)], weight[list(layer.rows)])


def test_best_loses_less_than_rows(llama: PreTrainedModel, statistics: Statistics) -> None:
    best, rows = (make_plan(llama, statistics, BudgetConfig(keep=0.7, method=m)) for m in ("best", "rows"))
    assert sum(e.predicted or 0 for e in best.entries) < sum(e.predicted or 0 for e in rows.entries)


def test_coefficients_stay_moderate(llama: PreTrainedModel, statistics: Statistics) -> None:
    compress(llama, statistics, BudgetConfig(keep=0.6, neurons=False))
    layers = compressed_modules(llama)
    assert layers
    for layer in layers.values():
        assert isinstance(layer, InterpolativeLinear)
        assert layer.T is not None
        # Up to the rounding of the coefficients to the dtype of the layer.
        assert float(layer.T.weight.detach().abs().max()) <= LARGEST * (1 + 2 * torch.finfo(torch.float32).eps)


def test_ranks_can_be_edited_before_the_swap(llama: PreTrainedModel, statistics: Statistics) -> None:
    plan = make_plan(llama, statistics, BudgetConfig(keep=0.7))
    edited = replace(plan, entries=(replace(plan.entries[0], rank=3),))
    carry_out_(llama, edited, statistics)
    assert {name: layer.rank for name, layer in compressed_modules(llama).items()} == {plan.entries[0].name: 3}


def test_progress_of_every_stage(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    config, count = BudgetConfig(keep=0.8, batch_size=3), len(inside(llama))
    compress(
        llama, windows, config, progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total))
    )
    assert list(seen) == ["sample", "calibrate", "plan", "neurons", "decompose"]
    assert seen["sample"][-1] == (2, 2)  # a quarter of 6, rounded up
    assert seen["plan"][-1] == (count, count)
    assert seen["neurons"][-1] == (len(decoder_layers(llama)),) * 2


def test_without_gradients_there_is_no_backward_pass(
    llama: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", None)
    report = compress(llama, windows, BudgetConfig(keep=0.8, gradients=False))
    assert report.plan.entries
    assert not any(entry.gradients for entry in report.plan.entries)


def test_without_gradients_every_layer_keeps_a_part(llama: PreTrainedModel, statistics: Statistics) -> None:
    name = inside(llama)[-1]
    usual = statistics.products[name]
    outlier = torch.ones(len(usual), dtype=usual.dtype)  # as of a first token that dwarfs all others
    products = {**statistics.products, name: usual + 1e8 * usual.trace() * torch.outer(outlier, outlier)}
    config = BudgetConfig(keep=0.8, gradients=False, neurons=False)
    plan = make_plan(llama, replace(statistics, products=products), config)
    assert name in {entry.name for entry in plan.entries}
    for entry in plan.entries:
        m, n = entry.shape
        assert entry.parameters >= 0.75 * 0.8 * m * n - (m + n)


@pytest.mark.parametrize("neurons", [True, False])
@pytest.mark.parametrize("unit", ["keep", "size"])
def test_the_floor_refuses_no_budget(llama: PreTrainedModel, statistics: Statistics, unit: str, neurons: bool) -> None:
    def plan(**share: Any) -> Plan:
        return make_plan(llama, statistics, BudgetConfig(gradients=False, neurons=neurons, **share))

    with pytest.raises(ValueError, match="must be at least") as refused:
        plan(**{unit: 1e-4 if unit == "keep" else 100})
    found = re.search(r"must be at least ([\d.,]+\d)", str(refused.value))
    assert found is not None
    least = float(found[1].replace(",", ""))
    for more in (1.0, 1.05, 1.1, 1.3, 1.6):
        share = {"keep": min(least * more + 1e-4, 0.99)} if unit == "keep" else {"size": int(least * more)}
        assert plan(**share).entries


def test_budgets_that_cannot_be_met(llama: PreTrainedModel, statistics: Statistics) -> None:
    whole = sum(p.numel() for p in llama.parameters())
    with pytest.raises(
        ValueError, match=r"`keep` must be at least 0\.0\d+, the least .* \(rank 1 or one neuron\); got 0.01"
    ):
        compress(llama, statistics, BudgetConfig(keep=0.01))
    with pytest.raises(ValueError, match=r"`parameters` must be at least [\d,]+, the least .*; got 100"):
        compress(llama, statistics, BudgetConfig(parameters=100))
    with pytest.raises(ValueError, match=rf"`parameters` must be below {whole:,}, what the model has now"):
        compress(llama, statistics, BudgetConfig(parameters=whole))
    assert not compressed_modules(llama)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, TypeError, "one of `keep`, `parameters`, `size`, `bits`, `tol` must be given, got none"),
        ({"keep": 0.5, "parameters": 9}, TypeError, "one of .* must be given, got keep=0.5, parameters=9"),
        ({"keep": 1.0}, ValueError, "`keep` must be between 0 and 1, both excluded.*got 1.0"),
        ({"keep": 0}, ValueError, "`keep` must be between 0 and 1"),
        ({"keep": float("nan")}, ValueError, "`keep` must be between 0 and 1"),
        ({"keep": "half"}, ValueError, "`keep` must be between 0 and 1.*got 'half'"),
        ({"parameters": 1.5}, ValueError, "`parameters` must be a positive integer, got 1.5"),
        ({"keep": 0.5, "batch_size": 0}, ValueError, "`batch_size` must be a positive integer, got 0"),
        ({"keep": 0.5, "method": "luck"}, ValueError, "`method` must be one of best, rows, got 'luck'"),
        ({"keep": 0.5, "damping": -1.0}, ValueError, "`damping` must be at least 0, got -1.0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BudgetConfig(**values)


def test_statistics_that_do_not_serve(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    diagonal = collect(llama, [windows], modules=inside(llama))
    with pytest.raises(ValueError, match="no second moments"):
        compress(llama, diagonal, BudgetConfig(keep=0.8))
    full = collect(llama, [windows], modules=inside(llama), moments="full")
    with pytest.raises(ValueError, match="no gradients"):
        compress(llama, full, BudgetConfig(keep=0.8))


def test_weights_that_are_not_finite(llama: PreTrainedModel, statistics: Statistics) -> None:
    name = inside(llama)[-1]
    with torch.no_grad():
        llama.get_parameter(f"{name}.weight")[0, 0] = np.inf
    with pytest.raises(NumericalError, match=name):
        compress(llama, statistics, BudgetConfig(keep=0.8))
    assert not compressed_modules(llama)


def test_inputs_that_are_always_zero(llama: PreTrainedModel, statistics: Statistics) -> None:
    products = {name: product.clone() for name, product in statistics.products.items()}
    dead = [name for name in products if name.endswith("layers.2.mlp.down_proj")]
    products[dead[0]].zero_()
    report = compress(llama, replace(statistics, products=products), BudgetConfig(keep=0.8))
    assert {entry.name: entry.ranks[0] for entry in report.plan.entries}[dead[0]] == 1
