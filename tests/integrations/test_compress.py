from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cur import NumericalError, cur, deim_cur, ranks, scores
from cur.integrations import Statistics, batches, collect, decoder_layers
from cur.integrations.compress import apply_plan_, carry_out_, compress
from cur.integrations.model.size import model_size
from cur.integrations.nn import CURLinear, compressed_modules, factored
from cur.integrations.plan import make as planning
from cur.integrations.plan.config import CompressConfig
from cur.integrations.plan.make import make_plan
from cur.integrations.plan.plan import PlanError
from cur.integrations.sources import InMemory
from cur.scores import IMPORTANCES, LINKS, needs
from cur.selection import SELECTORS

TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "gate_proj"),
    "qwen2": ("q_proj", "k_proj", "gate_proj"),
    "gpt2": ("attn.c_attn", "c_fc"),
    "opt": ("q_proj", "fc1"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),
    "bert": ("query", "intermediate.dense"),
}
SMALL = CompressConfig(layers=2, rank=6)


def measure(model: PreTrainedModel, windows: torch.Tensor) -> Statistics:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if "lm_head" not in name]
    layers = [name for name, _ in decoder_layers(model)]
    return collect(model, batches(windows, batch_size=3), modules=inside, layers=layers)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_architecture(kind: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    model = make_model(kind)
    biases = {name: tensor.clone() for name, tensor in model.named_parameters() if name.endswith("bias")}
    report = compress(model, windows, replace(SMALL, targets=TARGETS[kind]))
    layers = compressed_modules(model)
    assert list(layers) == [layer.name for layer in report.layers]
    assert len(layers) == 2 * len(TARGETS[kind])
    assert model_size(model) == report.after
    assert report.before.parameters - report.after.parameters == sum(
        layer.parameters_before - layer.parameters_after for layer in report.layers
    )
    for name, layer in layers.items():
        assert not layer.training
        bias = layer.bias_tensor()
        if f"{name}.bias" in biases:
            assert bias is not None
            assert torch.equal(bias, biases[f"{name}.bias"])
    with torch.no_grad():
        assert torch.isfinite(model(windows).logits).all()


def test_factors_are_rows_and_columns_of_the_weight(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    dense = copy.deepcopy(llama)
    report = compress(llama, windows, SMALL)
    assert report.layers
    for layer in report.layers:
        weight = dense.get_parameter(f"{layer.name}.weight").detach()
        new = llama.get_submodule(layer.name)
        assert isinstance(new, CURLinear)
        assert torch.equal(new.R.weight, weight[list(layer.rows)])
        assert torch.equal(new.C.weight, weight[:, list(layer.columns)])
        error = torch.linalg.norm(weight - new.weight.detach()) / torch.linalg.norm(weight)
        assert float(error) == pytest.approx(layer.relative_error, rel=1e-4)
        assert float(error) <= layer.certificate["relative"] * (1 + 1e-4)


def test_it_is_wanda_and_deim(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    dense = copy.deepcopy(llama)
    report = compress(llama, statistics, SMALL)
    assert report.layers
    for layer in report.layers:
        weight = dense.get_parameter(f"{layer.name}.weight").detach()
        score = scores.wanda(weight, statistics.x_norm(layer.name).float())
        expected = deim_cur(weight, rank=layer.rank, importance=score, subspace="exact")
        assert layer.rows == tuple(int(i) for i in expected.rows)
        assert layer.columns == tuple(int(j) for j in expected.columns)


def test_layers_are_those_of_smallest_angle(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    inner = sorted(range(1, 4), key=lambda index: statistics.angular[index])[:2]
    report = compress(llama, statistics, SMALL)
    assert {int(layer.name.split(".")[2]) for layer in report.layers} == set(inner)


def test_statistics_and_windows_give_the_same(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    reports = [
        compress(model, given, SMALL)
        for model, given in (
            (make_model("llama"), windows),
            (make_model("llama"), measure(make_model("llama"), windows)),
            (make_model("llama"), batches(windows, batch_size=2)),
        )
    ]
    plans = [report.plan for report in reports]
    for plan in plans[1:]:
        assert plan.angular == pytest.approx(plans[0].angular, rel=1e-12)  # sums over batches of another size
        assert replace(plan, angular={}) == replace(plans[0], angular={})
    assert [layer.rows for layer in reports[0].layers] == [layer.rows for layer in reports[1].layers]
    assert reports[0].plan.calibration is not None
    assert reports[0].plan.calibration_tokens == windows.numel()


@pytest.mark.parametrize("layout", factored())
def test_rank_is_the_smaller_of_asked_and_break_even(
    layout: str, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    report = compress(llama, windows, replace(SMALL, rank=30, layout=layout))
    assert report.layers
    for layer in report.layers:
        assert layer.rank == min(30, ranks.break_even(*layer.shape, layout=layout))
        assert layer.parameters_after < layer.parameters_before
        kept = sum(p.numel() for name, p in llama.get_submodule(layer.name).named_parameters() if "bias" not in name)
        assert kept == layer.parameters_after


def test_layouts_hold_the_same_weights(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    logits = []
    for layout in factored():
        model = make_model("llama")
        compress(model, windows, replace(SMALL, layout=layout))
        with torch.no_grad():
            logits.append(model(windows).logits)
    assert len(logits) > 1
    for other in logits[1:]:
        assert torch.allclose(other, logits[0], rtol=0, atol=1e-3 * float(logits[0].abs().max()))


@pytest.mark.parametrize("kind", ["wanda", "magnitude", "weights"])
def test_importances_choose_differently(kind: str, llama: PreTrainedModel, windows: torch.Tensor) -> None:
    dense = copy.deepcopy(llama)
    report = compress(llama, windows, replace(SMALL, importance=kind, targets=("up_proj",)))
    layer = report.layers[0]
    weight = dense.get_parameter(f"{layer.name}.weight").detach()
    score = {
        "wanda": scores.wanda(weight, measure(dense, windows).x_norm(layer.name).float()),
        "magnitude": weight.abs(),
        "weights": None,
    }[kind]
    assert layer.rows == tuple(int(i) for i in deim_cur(weight, rank=6, importance=score, subspace="exact").rows)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_serves_models(
    name: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    dense, config = make_model("llama"), replace(SMALL, select=name, targets=("gate_proj",))
    report = compress(copy.deepcopy(dense), windows, config)
    statistics = measure(dense, windows)
    for layer in report.layers:
        weight = dense.get_parameter(f"{layer.name}.weight").detach()
        score = scores.wanda(weight, statistics.x_norm(layer.name).float())
        expected = cur(weight, rank=6, select=name, importance=score, subspace="exact")
        assert (layer.rows, layer.columns) == (tuple(expected.rows.tolist()), tuple(expected.columns.tolist()))
        assert layer.relative_error <= layer.certificate["relative"] * (1 + 1e-4)
    within = make_plan(dense, statistics, replace(config, rank=None, tolerance=0.9, layout="interpolative"))
    for entry in within.entries:
        weight = dense.get_parameter(f"{entry.name}.weight").detach()
        score = scores.wanda(weight, statistics.x_norm(entry.name).float())
        assert entry.rank == cur(weight, tol=0.9, select=name, importance=score, subspace="exact", bounds=False).rank
    assert within.entries


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("link", LINKS)
def test_what_is_measured_is_what_is_needed(
    importance: str, link: str, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    config = replace(SMALL, importance=importance, link=link, targets=("gate_proj",))
    assert config.needs_moments == ("moments" in needs(importance, link))
    assert config.needs_gradients == ("gradients" in needs(importance, link))
    source = InMemory(llama, list(batches(windows, batch_size=3)))
    statistics = source.measure(source.check(config), config)
    assert bool(statistics.products) == config.needs_moments
    plan = make_plan(llama, statistics, config)
    assert (plan.needs_moments, plan.needs_gradients) == (config.needs_moments, config.needs_gradients)
    assert len(carry_out_(llama, plan, statistics).layers) == 2


def test_activation_link_lowers_the_weighted_error(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    # The same rows and columns, so that the two cores are optimal for the same choice.
    config = replace(SMALL, importance="magnitude")
    plain = compress(make_model("llama"), windows, config)
    weighted = compress(make_model("llama"), windows, replace(config, link="activation"))
    assert plain.layers
    for one, other in zip(plain.layers, weighted.layers, strict=True):
        assert one.rows == other.rows
        assert one.columns == other.columns
        assert other.weighted_error <= one.weighted_error * (1 + 1e-5)
        assert one.relative_error <= other.relative_error * (1 + 1e-5)
        assert other.certificate["relative"] == pytest.approx(other.weighted_error, rel=1e-3)


def test_subspaces_are_decided_in_the_plan(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    statistics = measure(model, windows)
    assert {entry.subspace for entry in make_plan(model, statistics, SMALL).entries} == {"exact"}
    monkeypatch.setattr(planning, "EXACT_UP_TO", 16)
    plan = make_plan(model, statistics, SMALL)
    assert {entry.shape[0]: entry.subspace for entry in plan.entries} == {
        32: "randomised",
        16: "exact",
        48: "randomised",
    }
    exact, sketched = (
        compress(make_model("llama"), statistics, replace(SMALL, subspace=subspace))
        for subspace in ("exact", "randomised")
    )
    for one, other in zip(exact.layers, sketched.layers, strict=True):
        assert one.certificate["sorensen_embree"] is None or one.certificate["sigma_next"] is not None
        assert other.relative_error <= 2 * one.relative_error


def test_dtype_of_the_model_is_kept(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama.bfloat16(), windows, SMALL)
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}


def test_frozen_weights_stay_frozen(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    llama.requires_grad_(False)
    compress(llama, windows, SMALL)
    assert compressed_modules(llama)
    assert not any(p.requires_grad for p in llama.parameters())


def test_a_plan_can_be_replayed_and_edited(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    model = make_model("llama")
    statistics = measure(model, windows)
    plan = make_plan(model, statistics, SMALL)
    first = replace(plan.entries[0], rank=2)
    edited = replace(plan, entries=(first, *plan.entries[1:3]))
    reports = carry_out_(model, edited, statistics).layers
    assert [report.rank for report in reports] == [2, plan.entries[1].rank, plan.entries[2].rank]
    assert list(compressed_modules(model)) == [entry.name for entry in edited.entries]
    with pytest.raises(PlanError):
        carry_out_(make_model("gpt2"), edited, statistics)


def test_a_plan_is_carried_out_by_the_former_name_for_a_release(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    plan = make_plan(llama, statistics, SMALL)
    with pytest.warns(DeprecationWarning, match="apply_plan_ is carry_out_ now, whose report has the list"):
        reports = apply_plan_(llama, plan, statistics)
    assert [report.name for report in reports] == [entry.name for entry in plan.entries]


def test_progress_covers_both_long_stages(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    seen: list[tuple[str, int, int | None]] = []
    compress(llama, windows, SMALL, progress=lambda *step: seen.append(step))
    assert seen[0] == ("calibrate", 1, 6)
    assert ("calibrate", 6, 6) in seen
    assert seen[-1] == ("decompose", 6, 6)


def test_a_layer_shared_by_two_parents_stays_shared(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    layers = llama.model.layers
    layers[2].mlp.gate_proj = layers[1].mlp.gate_proj
    layers[3].mlp.gate_proj = layers[1].mlp.gate_proj
    report = compress(llama, windows, replace(SMALL, layers=3, targets=("gate_proj",)))
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.gate_proj"]
    assert isinstance(layers[1].mlp.gate_proj, CURLinear)
    assert layers[2].mlp.gate_proj is layers[1].mlp.gate_proj
    assert layers[3].mlp.gate_proj is layers[1].mlp.gate_proj


def test_a_weight_tied_to_another_parameter_stays_dense(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    llama.model.layers[2].mlp.gate_proj.weight = llama.model.layers[1].mlp.up_proj.weight
    name, said = "model.layers.2.mlp.gate_proj", "is tied to model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=f"{name} {said}: .*; exclude it"):
        compress(llama, windows, replace(SMALL, layers="all", targets=(name, "q_proj")))
    assert not compressed_modules(llama)
    report = compress(llama, windows, replace(SMALL, layers="all", targets=("gate_proj",)))
    assert said in report.plan.dense[name]
    assert name not in {layer.name for layer in report.layers}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    bad: float, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model("llama")
    statistics = measure(model, windows)
    name = make_plan(model, statistics, SMALL).entries[-1].name
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[0, 0] = bad
    with pytest.raises(NumericalError, match=f"{name}.* holds NaN or infinity"):
        compress(model, statistics, SMALL)
    assert not compressed_modules(model), "the model must not be half compressed"
    with pytest.raises(NumericalError, match=name):
        compress(model, windows, SMALL)


def test_dead_input_features_lower_the_rank(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    square_sums = {name: tensor.clone() for name, tensor in statistics.square_sums.items()}
    for tensor in square_sums.values():
        tensor[4:] = 0
    report = compress(llama, replace(statistics, square_sums=square_sums), SMALL)
    assert report.layers
    for layer in report.layers:
        assert layer.rank == 4
        assert set(layer.columns) == {0, 1, 2, 3}


def test_no_live_input_feature_at_all(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    dead = {name: torch.zeros_like(tensor) for name, tensor in statistics.square_sums.items()}
    with pytest.raises(ValueError, match=r"no input of model\.layers.* was ever different from zero"):
        compress(llama, replace(statistics, square_sums=dead), SMALL)


def test_a_weight_of_lower_rank_is_kept_exactly(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    name = make_plan(llama, statistics, replace(SMALL, targets=("gate_proj",))).entries[0].name
    weight = llama.get_parameter(f"{name}.weight")
    with torch.no_grad():
        weight.copy_(torch.outer(torch.arange(48.0), torch.ones(32)))
    report = compress(llama, statistics, replace(SMALL, targets=("gate_proj",), importance="weights"))
    done = {layer.name: layer for layer in report.layers}[name]
    assert done.rank == 1
    assert done.relative_error <= 1e-5
    assert {entry.name: entry.rank for entry in report.plan.entries}[name] == 1


def test_rank_above_every_layer_is_refused_before_any_forward_pass(llama: PreTrainedModel) -> None:
    llama.forward = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"`rank` must be at most 32.*q_proj \(32 x 32\), got 33"):
        compress(llama, torch.zeros(1, 4, dtype=torch.int64), replace(SMALL, rank=33))


def test_too_many_layers(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="`layers` must be between 0 and 4 for this model, got 5"):
        compress(llama, windows, replace(SMALL, layers=(1, 5)))
    with pytest.raises(ValueError, match="`layers` must be between 1 and 3 for a model of 5 blocks"):
        compress(llama, windows, replace(SMALL, layers=4))


def test_no_block_can_be_chosen_of_two(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    """The range between 1 and 0 says nothing."""
    model: Any = llama
    del model.model.layers[2:]
    with pytest.raises(ValueError, match=r"chooses among blocks .* the model has 2 in all, got 1; take 'all'"):
        compress(model, windows, replace(SMALL, layers=1))


def test_a_target_that_matches_nothing(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        compress(llama, windows, replace(SMALL, targets=("nonesuch",)))


def test_a_model_can_be_compressed_in_steps_but_not_its_factors(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama, windows, replace(SMALL, layers=3, targets=("q_proj",)))
    compress(llama, windows, replace(SMALL, layers=3, targets=("gate_proj",)))
    assert len(compressed_modules(llama)) == 6
    with pytest.raises(ValueError, match=r"q_proj\.\w is a factor of a layer that is compressed already"):
        compress(llama, windows, replace(SMALL, targets="all-linear"))


def test_statistics_that_do_not_serve(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = measure(llama, windows)
    with pytest.raises(ValueError, match="no angular distances"):
        compress(llama, replace(statistics, angles=None), SMALL)
    with pytest.raises(ValueError, match=r"no statistics of 'model\.layers"):
        compress(llama, replace(statistics, square_sums={}), SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "`layers` must be a positive integer, indices of blocks or .all., got 0"),
        ({"rank": 1.5}, "`rank`"),
        ({"layout": "lu"}, "`layout` must be one of"),
        (
            {"importance": "luck"},
            "`importance` must be one of wanda, magnitude, weights, activation, covariance, got 'luck'",
        ),
        ({"link": "luck"}, "`link` must be one of optimal, activation, covariance, got 'luck'"),
        ({"select": "luck"}, "`select` must be one of deim, lupp, .*, got 'luck'"),
        ({"precision": "float16"}, "`precision`"),
    ],
)
def test_config_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressConfig(**changes)


def test_the_same_run_twice_gives_the_same_indices(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    first, second = (compress(make_model("gpt2"), windows, replace(SMALL, targets=("c_fc",))) for _ in "12")
    assert first.plan == second.plan
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.columns, other.columns)
