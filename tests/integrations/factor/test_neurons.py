from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur.integrations import (
    BudgetConfig,
    Plan,
    Statistics,
    batches,
    collect,
    collect_gradients,
    compress,
    decoder_layers,
    dense_export,
    linear_modules,
    make_plan,
    save,
)
from cur.integrations.compress import carry_out_, measure
from cur.integrations.convert import convert_
from cur.integrations.factor.neurons import FittedBefore, fit_before, keep_neurons
from cur.integrations.files.reading import CheckpointError
from cur.integrations.measure.moments import Moments
from cur.integrations.measure.propagation import InputMoments
from cur.integrations.model.neurons import neuron_groups
from cur.integrations.nn import KeptInputs, KeptOutputs, compressed_modules
from cur.integrations.plan.budget import error_curves, joint_curves, plan_budget
from cur.integrations.plan.entry import PlanEntry, PlanError, read_entry
from cur.integrations.plan.rate_distortion import NeuronCurve
from cur.integrations.store.inspect import summarize
from tests.models import make

MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def statistics(llama: PreTrainedModel, windows: Tensor) -> Statistics:
    given = list(batches(windows, batch_size=3))
    names = linear_modules(llama, "all-linear", blocks=range(len(decoder_layers(llama))))
    return collect_gradients(llama, given, collect(llama, given, modules=names, moments="full"), modules=names)


def _not_factored(entry: PlanEntry) -> PlanEntry:
    return replace(entry, inner_rank=None) if entry.method == "neurons" else entry


def in_feed_forward(keep: float) -> BudgetConfig:
    return BudgetConfig(keep=keep, targets=MLP)


def kept(model: PreTrainedModel) -> dict[str, KeptInputs | KeptOutputs]:
    return {
        name: layer for name, layer in compressed_modules(model).items() if isinstance(layer, (KeptInputs, KeptOutputs))
    }


def whole(plan: Plan) -> Plan:
    """Leave what belongs to kept neurons whole."""
    return replace(plan, entries=tuple(map(_not_factored, plan.entries)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma3"])
def test_the_neurons_of_feed_forward_networks_are_found(name: str) -> None:
    model = make(name)
    blocks = decoder_layers(model)
    groups = neuron_groups(model, linear_modules(model, "all-linear", blocks=range(len(blocks))))
    assert len(groups) == len(blocks)
    for consumer, producers in groups.items():
        width = consumer.rpartition(".")[0]
        assert "mlp" in consumer
        assert all(producer.startswith(width) for producer in producers)


class Feed(nn.Module):
    """A feed-forward network of which something is special."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.scale = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        if self.kind == "normalised":  # each neuron depends on all
            z = nn.functional.layer_norm(z, (12,))
        elif self.kind == "reversed":
            z = z.flip(-1)
        elif self.kind == "scaled":  # something of the width of all
            z = z * self.scale
        y: Tensor = self.down(z.relu())
        return y + z[..., :8] if self.kind == "beside" else y


@pytest.mark.parametrize("kind", ["plain", "normalised", "reversed", "scaled", "beside"])
def test_only_neurons_that_nothing_else_needs(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Feed(kind)})
    found = neuron_groups(model, ["mlp.up", "mlp.down"])
    assert found == ({"mlp.down": ("mlp.up",)} if kind == "plain" else {})


def test_not_where_one_of_the_layers_is_left_out(llama: PreTrainedModel) -> None:
    names = linear_modules(llama, ("up_proj", "down_proj"), blocks=range(len(decoder_layers(llama))))
    assert neuron_groups(llama, names) == {}


def test_a_budget_takes_them_where_they_pay(llama: PreTrainedModel, statistics: Statistics) -> None:
    models = {neurons: copy.deepcopy(llama) for neurons in (True, False)}
    cost = {}
    for neurons, model in models.items():
        report = compress(model, statistics, replace(in_feed_forward(0.6), neurons=neurons))
        assert 0.99 * 0.6 <= (report.plan.kept or 0) <= 0.6
        cost[neurons] = sum(entry.predicted or 0.0 for entry in report.plan.entries)
    assert kept(models[True])
    assert not kept(models[False])
    assert cost[True] < cost[False]


def test_a_budget_takes_none_where_they_save_little(llama: PreTrainedModel, statistics: Statistics) -> None:
    config = in_feed_forward(0.6)
    names = linear_modules(llama, MLP, blocks=range(len(decoder_layers(llama))))
    curves = error_curves(llama, statistics, config, names)
    joint = joint_curves(llama, statistics, config, names)

    def lost(neurons: Sequence[NeuronCurve]) -> tuple[float, bool]:
        entries = plan_budget(llama, statistics, config, curves, neurons).entries
        return sum(entry.predicted or 0.0 for entry in entries), any(entry.method == "neurons" for entry in entries)

    without, _ = lost([])
    found = []
    for price in np.geomspace(0.1, 10, 41):
        found.append(lost([replace(curve, errors=price * curve.errors, cuts=()) for curve in joint]))
    assert {left for left, used in found if not used} == {without}
    assert 0.7 * without < max(left for left, used in found if used) <= 0.8 * without


def test_rows_are_the_models_own_and_columns_fit(llama: PreTrainedModel, statistics: Statistics) -> None:
    dense = copy.deepcopy(llama)
    plan = whole(make_plan(llama, statistics, in_feed_forward(0.5)))
    carry_out_(llama, plan, statistics)
    layers = kept(llama)
    assert layers
    for name, layer in layers.items():
        W = dense.get_submodule(name).weight.detach()
        if isinstance(layer, KeptOutputs):
            torch.testing.assert_close(layer.R.weight.detach(), W[layer.kept], rtol=0, atol=0)
            behind = layers[next(entry.made_with for entry in plan.entries if entry.name == name)]
            assert torch.equal(behind.kept, layer.kept)
        else:
            G = statistics.second_moment(name)
            G = G + 1e-4 * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)
            wanted = (W.double() @ G)[:, layer.kept]
            torch.testing.assert_close(
                layer.C.weight.double() @ G[layer.kept][:, layer.kept], wanted, rtol=1e-4, atol=1e-5
            )


def test_the_fit_to_what_arrives_is_better(llama: PreTrainedModel, windows: Tensor) -> None:
    divergence = {}
    with torch.no_grad():
        expected = llama(windows).logits.log_softmax(-1)
        for correction in (0.0, 0.5):
            model = copy.deepcopy(llama)
            compress(model, windows, replace(in_feed_forward(0.4), correction=correction, own_text=0))
            got = model(windows).logits.log_softmax(-1)
            divergence[correction] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence[0.5] < divergence[0.0]


def test_kept_rows_are_fitted_to_what_arrives(llama: PreTrainedModel, windows: Tensor) -> None:
    dense = copy.deepcopy(llama)
    given, config = list(batches(windows, batch_size=4)), in_feed_forward(0.4)
    statistics = measure(llama, given, config)
    plan = whole(make_plan(llama, statistics, config))
    report = carry_out_(llama, plan, statistics, text=given)
    producers = {name: layer for name, layer in kept(llama).items() if isinstance(layer, KeptOutputs)}
    assert any(".0." not in name for name in producers)
    inputs: dict[str, list[Tensor]] = {name: [] for name in producers}
    for model in (dense, llama):
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0]))
            for name, to in inputs.items()
        ]
        with torch.no_grad():
            model(windows)
        for hook in hooks:
            hook.remove()
    rows = {done.name: done.rows for done in report.layers}
    for name, layer in producers.items():
        X, Z = (x.flatten(0, -2).double() for x in inputs[name])
        W = dense.get_submodule(name).weight.detach().double()[layer.kept]
        moments = InputMoments(Z.T @ Z / len(Z), X.T @ Z / len(Z))
        M, B = moments.problem(W, correction=0.5, damping=report.plan.entries[0].damping)
        fitted = torch.linalg.solve(M, B, left=False)
        torch.testing.assert_close(
            layer.R.weight.detach().double(), fitted, rtol=1e-2, atol=1e-3 * float(W.abs().max())
        )
        assert ".0." in name or float((fitted - W).norm()) > 0.02 * float(W.norm())
        assert rows[name] == ()  # no longer the model's own


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_reloaded_exported(name: str, tmp_path: Path) -> None:
    model = make(name).eval()
    ids = torch.randint(3, model.config.vocab_size, (4, 12))
    given, config = list(batches(ids, batch_size=2)), BudgetConfig(keep=0.5, gradients=False)
    statistics = measure(model, given, config)
    plan = make_plan(model, statistics, config)
    # The first half of the layers around neurons of a lower rank, whatever the budget says.
    around = [entry.name for entry in plan.entries if entry.method == "neurons"]
    half = around[: len(around) // 2]
    assert {entry.layout for entry in plan.entries if entry.name in half} == {"inputs", "outputs"}
    entries = [
        replace(entry, inner_rank=5 if entry.name in half else None) if entry.name in around else entry
        for entry in plan.entries
    ]
    report = carry_out_(model, replace(plan, entries=tuple(entries)), statistics, text=given)
    assert {name for name, layer in kept(model).items() if layer.inner_rank == 5} == set(half)
    save(model, None, tmp_path / "small", report=report)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
        dense_export(again, None, tmp_path / "dense")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-5)
    summary = summarize(tmp_path / "small")
    assert {layer.name: (layer.inner_rank, layer.parameters) for layer in summary.layers} == {
        layer.name: (layer.inner_rank, layer.parameters_after) for layer in report.layers
    }
    assert summary.parameters == sum(p.numel() for p in again.parameters())
    assert summary.dense_parameters == sum(p.numel() for p in dense.parameters())
    # A layer of neurons has one layout; the factored ones change theirs.
    before = {name: layer.layout for name, layer in kept(again).items()}
    convert_(again, "folded")
    assert {name: layer.layout for name, layer in kept(again).items()} == before
    with pytest.raises(ValueError, match="must stay 'outputs', got 'folded'"):
        next(layer for layer in kept(again).values() if layer.layout == "outputs").to_layout("folded")


def test_a_plan_is_edited_in_all_its_layers(llama: PreTrainedModel, statistics: Statistics, tmp_path: Path) -> None:
    plan = whole(make_plan(llama, statistics, in_feed_forward(0.5)))
    consumer = next(entry.name for entry in plan.entries if entry.layout == "inputs")
    data = plan.to_dict()
    group = [entry for entry in data["entries"] if consumer in (entry["name"], entry["consumer"])]
    group[0]["rank"] = 7
    with pytest.raises(PlanError, match="same neurons, so change both"):
        Plan.from_dict(data)
    without = [entry for entry in plan.entries if entry.made_with != consumer or entry.name == consumer]
    with pytest.raises(PlanError, match=r"must hold, beside .*down_proj, the layers before"):
        replace(plan, entries=tuple(without))
    gate = next(entry for entry in plan.entries if entry.made_with == consumer != entry.name)
    fewer = replace(plan, entries=tuple(entry for entry in plan.entries if entry is not gate))
    with pytest.raises(PlanError, match="cut all of the layers that give them, or none"):
        carry_out_(llama, fewer, statistics)
    assert not compressed_modules(llama)
    for entry in group:
        entry["rank"] = 7
    carry_out_(llama, Plan.from_dict(json.loads(json.dumps(data))), statistics)
    assert [layer.rank for name, layer in kept(llama).items() if name in [entry["name"] for entry in group]] == [7] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 97}, "between 1 and 96, the largest of 96 x 32 in the layout .outputs., got 97"),
        ({"consumer": None}, "`consumer` of gate must name the next layer"),
        ({"inner_rank": 33}, "`inner_rank` of gate must be null or an integer between 1 and 32"),
        ({"inner_rank": 0}, "`inner_rank` of gate must be null or an integer between 1 and 32"),
        (
            {"layout": "folded", "consumer": None, "method": "weighted", "rank": 20, "inner_rank": 4},
            "`inner_rank` of gate is for the method 'neurons' alone, got 4",
        ),
        (
            {"layout": "folded", "consumer": None, "rank": 20},
            "`layout` of gate must be one of inputs, outputs for the method 'neurons', got 'folded'",
        ),
    ],
)
def test_entries_that_no_plan_has(changes: dict[str, object], message: str) -> None:
    good = {"name": "gate", "shape": (96, 32), "rank": 40, "layout": "outputs", "method": "neurons", "consumer": "down"}
    read_entry(good)
    with pytest.raises(PlanError, match=message):
        read_entry({**good, **changes})


def test_a_checkpoint_that_marks_other_neurons(llama: PreTrainedModel, statistics: Statistics, tmp_path: Path) -> None:
    compress(llama, statistics, in_feed_forward(0.5))
    save(llama, None, tmp_path / "small")
    file = tmp_path / "small" / "cur_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".kept"))
    tensors[key] = torch.ones_like(tensors[key])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"marks .* neurons, where .* are stored: the checkpoint is corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_checkpoint_whose_inner_ranks_are_wrong(
    llama: PreTrainedModel, statistics: Statistics, tmp_path: Path
) -> None:
    compress(llama, statistics, in_feed_forward(0.6))
    save(llama, None, tmp_path / "small")
    file, config = tmp_path / "small" / "cur_model.safetensors", tmp_path / "small" / "config.json"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("inner.order"))
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"order is not a permutation of the outputs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    save_file(tensors, file, metadata={"format": "pt"})
    good = json.loads(config.read_text())
    for value, message in (
        (1, r"would be .* but the stored weights are"),
        (10**4, "`inner_rank` must be"),
        ("x", "inn"),
    ):
        data = copy.deepcopy(good)
        data["quantization_config"]["modules"][key.removesuffix(".inner.order")]["inner_rank"] = value
        config.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        with pytest.raises((CheckpointError, ValueError)):
            summarize(tmp_path / "small")


@pytest.mark.parametrize("scope", ["model", "block"])
def test_healing_moves_the_layer_behind_alone(llama: PreTrainedModel, windows: Tensor, scope: str) -> None:
    from cur.healing import HealingConfig, Objectives, heal

    student = copy.deepcopy(llama)
    compress(student, windows, replace(in_feed_forward(0.4), own_text=0))
    assert any(layer.inner_rank for layer in kept(student).values() if layer.layout == "inputs")
    before = {
        name: layer.state_dict() for name, layer in copy.deepcopy(student).named_modules() if name in kept(student)
    }
    # Without held-out text the last state is kept, be it better or not.
    objectives = Objectives(kl=0.0 if scope == "block" else 1.0, hidden=1.0, modules=1.0)
    config = HealingConfig(
        scope=scope, objectives=objectives, steps=5, batch_size=1, held_out=0, closed_form_windows=4, metric_windows=2
    )
    heal(student, llama, windows, config)
    for name, layer in kept(student).items():
        moves = {"inputs": "C.weight" if layer.inner_rank is None else "inner.R.weight"}.get(layer.layout)
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name][key]) == (key != moves)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_little_of_both_loses_what_the_plan_says(
    llama: PreTrainedModel, statistics: Statistics, gradients: bool
) -> None:
    dense = copy.deepcopy(llama)
    config = replace(in_feed_forward(0.6), gradients=gradients)
    names = linear_modules(llama, MLP, blocks=range(len(decoder_layers(llama))))
    curves, groups = (make(llama, statistics, config, names) for make in (error_curves, joint_curves))
    plan = plan_budget(llama, statistics, config, curves, groups)
    without = plan_budget(llama, statistics, config, curves, [replace(group, cuts=()) for group in groups])
    total, other = (sum(entry.predicted or 0.0 for entry in one.entries) for one in (plan, without))
    assert total < 0.98 * other
    carry_out_(llama, plan, statistics)
    layers = kept(llama)
    both = [entry for entry in plan.entries if entry.ranks[1]]
    assert {entry.layout for entry in both} == {"inputs", "outputs"}

    def square(name: str, error: Tensor, rows: Tensor | slice = slice(None)) -> float:
        H, G = (
            moment + config.damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
            for moment in (statistics.output_moment(name), statistics.second_moment(name))
        )
        H = H[rows][:, rows] if gradients else torch.eye(len(error), dtype=torch.float64)
        return float((H @ error @ G * error).sum())

    for entry in both:
        layer, W = layers[entry.name], dense.get_submodule(entry.name).weight.detach().double()
        error = W - layer.weight.detach().double()
        found = (
            square(entry.name, error) if entry.layout == "inputs" else square(entry.name, error[layer.kept], layer.kept)
        )
        expected = 0.5 * found if gradients else found / square(entry.name, W)
        assert entry.predicted == pytest.approx(expected, rel=2e-2)
        assert torch.linalg.matrix_rank(layer.part.weight.double(), rtol=1e-5) == entry.inner_rank
        assert sum(p.numel() for p in layer.parameters()) == entry.parameters


def test_layers_behind_see_rows_of_the_rank_that_they_get(llama: PreTrainedModel, statistics: Statistics) -> None:
    plan = make_plan(llama, statistics, in_feed_forward(0.6))
    entries = {entry.name: entry for entry in plan.entries}
    name = next(entry.name for entry in plan.entries if entry.layout == "outputs" and entry.inner_rank)
    behind = entries[entries[name].made_with]
    beside = next(
        other for other in entries if entries[other].made_with == behind.name and other not in (name, behind.name)
    )
    entries[beside] = replace(entries[beside], inner_rank=None)
    G = statistics.second_moment(name)
    fitted: dict[str, FittedBefore] = {}
    for each in (name, beside):
        propagated = InputMoments(G, G)
        fitted[each] = fit_before(llama, each, entries, Moments(statistics), propagated, correction=0.5, fitted=fitted)
    one, other = fitted[name], fitted[beside]
    assert one.inner is not None
    assert one.places is not None
    assert other.inner is None
    assert torch.equal(one.places, other.places)
    assert len(one.places) == behind.neurons
    stays = torch.ones(entries[name].shape[0], dtype=torch.bool)
    stays[one.places] = False
    W, seen = (module.weight.detach() for module in (llama.get_submodule(name), one.full_width))
    # What arrives is what the dense model has, so the fit alone changes nothing; the rank does.
    torch.testing.assert_close(seen[stays], W[stays], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[one.places], one.inner.weight.detach(), rtol=1e-5, atol=1e-6)
    assert float((seen[one.places] - W[one.places]).norm()) > 0.02 * float(W.norm())
    torch.testing.assert_close(other.full_width.weight, llama.get_submodule(beside).weight, rtol=1e-4, atol=1e-5)


def test_layers_before_neurons_count_the_seconds_of_their_fit(llama: PreTrainedModel, statistics: Statistics) -> None:
    plan = make_plan(llama, statistics, in_feed_forward(0.6))
    entries = {entry.name: entry for entry in plan.entries}
    behind = next(entry for entry in plan.entries if entry.layout == "inputs")
    before = [entry for entry in plan.entries if entry.made_with == behind.name and entry is not behind]
    fitted: dict[str, FittedBefore] = {}
    for entry in before:
        G = statistics.second_moment(entry.name)
        made = fit_before(
            llama, entry.name, entries, Moments(statistics), InputMoments(G, G), correction=0.5, fitted=fitted
        )
        assert made.seconds > 0
        fitted[entry.name] = replace(made, seconds=100.0)
    done = keep_neurons(llama, behind, before, Moments(statistics), fitted=fitted)
    assert {name: report.seconds > 100.0 for name, (_, report) in done.items()} == {
        behind.name: False,
        **dict.fromkeys(fitted, True),
    }


def test_the_certificate_is_of_the_factors_that_are_stored(llama: PreTrainedModel, windows: Tensor) -> None:
    llama.to(torch.bfloat16)
    dense = copy.deepcopy(llama)
    report = compress(llama, windows, replace(in_feed_forward(0.6), own_text=0))
    inside = [layer for layer in report.layers if layer.inner_rank]
    assert inside
    for done in inside:
        layer, W = kept(llama)[done.name], dense.get_submodule(done.name).weight.detach().double()
        left, right = (factor.detach().double() for factor in layer.inner.two_factors())
        true = float(torch.linalg.norm(W - layer.spread(left @ right)))
        assert true <= done.certificate["value"] <= true * (1 + 1e-9)
