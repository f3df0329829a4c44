"""Modules that are no transformers models, taken the whole way: measured, compressed, rounded, stored and loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

from cur.cli.app import app
from cur.integrations import (
    BudgetConfig,
    CompressConfig,
    Statistics,
    collect,
    compress,
    dense_export,
    load_into,
    make_plan,
    save,
    used_as,
)
from cur.integrations.compress import carry_out_
from cur.integrations.nn import EmbeddingFactors, compressed_modules, dense_weight
from cur.integrations.plan.plan import Plan
from cur.integrations.quantize import quantizable, quantize_
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.inspect import summarize
from tests.models import make
from tests.modules import (
    click_loss,
    denoiser,
    denoiser_batch,
    denoising_loss,
    image_batch,
    images,
    tower,
    tower_batch,
)

ROOT = Path(__file__).parents[2]
EVERYTHING = ("all-linear", "all-embeddings")
PAPER = CompressConfig(layers="all", targets="all-linear", rank=7)
BUILD: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "tower": (tower, tower_batch),
    "denoiser": (denoiser, denoiser_batch),
    "images": (images, image_batch),
}


def output(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor
        if isinstance(batch, dict):
            found = model(**batch)
        else:
            found = model(*batch) if isinstance(batch, tuple) else model(batch)
    return found


def error(dense: nn.Module, model: nn.Module, batch: Any) -> float:
    one, two = output(dense, batch), output(model, batch)
    return float(torch.linalg.norm(one - two) / torch.linalg.norm(one))


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize(
    "config", [PAPER, BudgetConfig(keep=0.6), BudgetConfig(keep=0.6, method="rows", targets="all-linear")]
)
def test_any_module_is_compressed_by_the_paper_and_to_a_budget(kind: str, config: Any) -> None:
    build, batch = BUILD[kind]
    model, dense = build(), build()
    report = compress(model, [batch(seed) for seed in range(3)], config)
    assert compressed_modules(model).keys() == {entry.name for entry in report.plan.entries}
    assert report.after.parameters == sum(p.numel() for p in model.parameters()) < report.before.parameters
    assert report.layers
    if isinstance(config, BudgetConfig):
        assert report.plan.kept is not None
        assert report.plan.kept <= 0.6
    assert 0 < error(dense, model, batch(9)) < 1
    assert all(layer.output is None or layer.output.worst <= 1 for layer in report.layers)


def test_convolutions_stay_dense_with_a_note() -> None:
    model = images()
    report = compress(model, [image_batch()], PAPER)
    assert report.plan.dense == {"features.0": "features.0 is a Conv2d, which is no linear layer"}
    assert type(model.features[0]) is nn.Conv2d
    assert model.head is model.fc2  # a module with two names is replaced under both


@pytest.mark.parametrize(
    "given",
    [
        tower_batch(),
        list(tower_batch()),
        dict(zip(("dense", "tokens", "bag"), tower_batch(), strict=True)),
        {"dense": tower_batch()[0], "tokens": tower_batch()[1], "bag": tower_batch()[2], "labels": torch.ones(32)},
    ],
    ids=["tuple", "list", "mapping", "labels"],
)
def test_batches_of_every_form_give_the_same(given: Any) -> None:
    plain = collect(tower(), [tower_batch()], modules=["top.0", "tables.0"])
    other = collect(tower(), [given], modules=["top.0", "tables.0"])
    assert torch.equal(plain.square_sums["top.0"], other.square_sums["top.0"])
    assert plain.samples == other.samples == 32


def test_one_tensor_or_mapping_is_one_batch() -> None:
    one, other = images(), images()
    first = compress(one, image_batch(), PAPER)
    second = compress(other, [image_batch()], PAPER)
    assert first.plan.calibration == second.plan.calibration
    assert torch.equal(output(one, image_batch(1)), output(other, image_batch(1)))
    compress(model := denoiser(), denoiser_batch(), PAPER)
    assert compressed_modules(model)


def test_the_hash_does_not_depend_on_batches_but_on_the_samples() -> None:
    def text_hash(batches: list[Any]) -> str:
        return collect(tower(), batches, modules=["top.0"]).text_hash

    whole = tower_batch()
    assert text_hash([tuple(part[:10] for part in whole), tuple(part[10:] for part in whole)]) == text_hash([whole])
    changed = (whole[0], whole[1], whole[2].flip(0))
    assert text_hash([changed]) != text_hash([whole])


def test_a_forward_is_called_with_the_batch_as_it_is() -> None:
    seen: list[Any] = []

    def forward(module: nn.Module, batch: Any) -> Any:
        seen.append(batch)
        return module(batch["inputs"]["x"])

    batch = {"inputs": {"x": image_batch()}, "labels": torch.zeros(16)}
    report = compress(images(), [batch], PAPER, forward=forward)
    assert report.layers
    assert seen
    assert set(seen[0]) == {"inputs", "labels"}
    model = images()
    compress(model, [batch], PAPER, forward=forward)
    assert not [name for name in vars(model) if name.startswith("_cur_usage")]


def test_a_loss_gives_gradients_and_what_the_module_does_not_take() -> None:
    batches = [{**denoiser_batch(seed), "noise": torch.randn(4, 16, 12)} for seed in range(3)]
    config = BudgetConfig(keep=0.6)
    with_loss = compress(denoiser(), batches, config, loss=denoising_loss)
    assert with_loss.plan.entries[0].gradients
    assert not any("loss" in note for note in with_loss.notes)
    with pytest.raises(TypeError, match="Denoiser does not take 'noise'; it takes image, time, label"):
        compress(denoiser(), batches, config)


def test_without_a_loss_a_budget_goes_by_outputs_and_says_so(tmp_path: Path) -> None:
    model = tower()
    report = compress(model, [tower_batch()], BudgetConfig(keep=0.6))
    assert not report.plan.entries[0].gradients
    assert any("pass `loss(output, batch)`" in note for note in report.notes)
    save(model, tmp_path / "small", report=report)
    assert report.notes[0] in (tmp_path / "small" / "README.md").read_text()
    assert CompressionReport.load(tmp_path / "small" / "report.json").notes == report.notes
    with pytest.raises(TypeError, match=r"Tower has none; pass the loss of another module \(`loss\(output, batch\)`\)"):
        collect(tower(), [tower_batch()], modules=[], gradients=["top.0"])


def test_gradients_are_those_of_the_loss() -> None:
    model, batch = tower(), tower_batch()
    names = ["bottom.2", "top.0", "tables.1"]
    with used_as(model, loss=click_loss):
        found = collect(model, [batch], modules=names, gradients=names)
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: outputs.update({name: y}) or y.clone()
        )
        for name in names
    ]
    loss = click_loss(model.eval()(*batch), batch) * len(batch[0])
    for handle in handles:
        handle.remove()
    for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        expected = gradient.double().T @ gradient.double()
        torch.testing.assert_close(found.output_products[name], expected, rtol=1e-4, atol=1e-10)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("reduced", ["mean", "none"])
def test_a_loss_is_the_mean_or_one_number_for_each_sample(reduced: str) -> None:
    def loss(out: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        target = (batch[0][:, 0] > 0).float()
        return nn.functional.binary_cross_entropy_with_logits(out, target, reduction=reduced)

    model = tower()
    with used_as(model, loss=loss):
        found = collect(model, [tower_batch()], modules=[], gradients=["top.0"])
    with used_as(model, loss=click_loss):
        expected = collect(model, [tower_batch()], modules=[], gradients=["top.0"])
    torch.testing.assert_close(found.output_products["top.0"], expected.output_products["top.0"], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, batch: out[:3], r"one number for each of them.*got shape \(3,\)"),
        (lambda out, batch: 1.0, "got float"),
        (lambda out, batch: out.detach().mean(), r"got shape \(\) without a gradient"),
    ],
)
def test_a_loss_of_another_form_is_refused(loss: Any, message: str) -> None:
    model = tower()
    with pytest.raises(ValueError, match=message):
        compress(model, [tower_batch()], BudgetConfig(keep=0.6), loss=loss)
    assert not compressed_modules(model)


def test_blocks_are_chosen_by_angle_and_by_position() -> None:
    batches = [denoiser_batch(seed) for seed in range(3)]
    chosen = {}
    for choose in ("angular", "position", "last"):
        config = CompressConfig(layers=2, choose=choose, targets=("fc1", "mix"), rank=4)
        report = compress(denoiser(), batches, config, blocks="layers")
        chosen[choose] = sorted({int(entry.name.split(".")[1]) for entry in report.plan.entries})
        assert bool(report.plan.angular) == (choose != "last")
        assert len(chosen[choose]) == 2
        assert set(chosen[choose]) <= {1, 2, 3}
    assert chosen["last"] == [2, 3]


def test_blocks_may_be_named() -> None:
    batches = [denoiser_batch()]
    config = CompressConfig(layers=1, targets=("fc1",), rank=4, choose="last")
    names = [f"layers.{index}" for index in range(4)]
    report = compress(denoiser(), batches, config, blocks=names)
    assert [entry.name for entry in report.plan.entries] == ["layers.2.fc1"]
    with pytest.raises(ValueError, match=r"`blocks` must name a module that holds blocks.*it has no 'levels\.0'"):
        compress(denoiser(), batches, config, blocks=["levels.0"])
    with pytest.raises(ValueError, match="there is nothing inside"):
        compress(denoiser(), batches, config, blocks="levels")


def test_named_modules_need_no_blocks() -> None:
    report = compress(tower(), [tower_batch()], CompressConfig(targets=("top.0", "tables.2"), rank=3))
    assert [(entry.name, entry.layout) for entry in report.plan.entries] == [
        ("tables.2", "embedding"),
        ("top.0", "cur"),
    ]


def test_layers_are_fitted_along_a_chain_of_blocks() -> None:
    batches = [denoiser_batch(seed) for seed in range(4)]
    fitted, plain, dense = denoiser(), denoiser(), denoiser()
    report = compress(fitted, batches, BudgetConfig(keep=0.5, correction=1.0), blocks="layers")
    assert report.plan.correction == 1.0
    assert not any("not fitted" in note for note in report.notes)
    compress(plain, batches, BudgetConfig(keep=0.5, correction=0.0), blocks="layers")
    assert error(dense, fitted, batches[0]) < error(dense, plain, batches[0])


def test_blocks_that_are_no_chain_are_not_fitted_and_it_is_said() -> None:
    class Skips(type(denoiser())):  # type: ignore[misc]
        def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
            hidden = self.patches(image).flatten(2).mT
            condition = self.time(time[:, None]) + self.label(label)
            for layer in self.layers:
                hidden = layer(hidden, condition=condition) + hidden
            return self.out(hidden)

    report = compress(Skips(), [denoiser_batch()], BudgetConfig(keep=0.6), blocks="layers")
    assert report.plan.correction == 0.0
    assert any("not fitted to what compressed ones before them give: the blocks of" in note for note in report.notes)


def test_tables_are_layers_of_the_budget_where_they_are_asked_for() -> None:
    batches = [tower_batch(seed) for seed in range(4)]
    linear = compress(tower(), batches, BudgetConfig(keep=0.6), loss=click_loss)
    assert not [entry for entry in linear.plan.entries if entry.layout == "embedding"]
    model = tower()
    report = compress(model, batches, BudgetConfig(keep=0.5, targets=EVERYTHING), loss=click_loss)
    tables = {name for name, layer in compressed_modules(model).items() if isinstance(layer, EmbeddingFactors)}
    assert tables
    assert report.plan.targeted_parameters == sum(
        dense_weight(module, name)[0].numel()
        for name, module in tower().named_modules()
        if type(module) in (nn.Linear, nn.Embedding, nn.EmbeddingBag)
    )
    assert report.plan.kept is not None
    assert report.plan.kept <= 0.5
    model.train()
    model(*batches[0]).sum().backward()
    assert all(model.get_submodule(f"{name}.A").weight.grad is not None for name in tables)


def test_a_size_on_disk_is_kept(tmp_path: Path) -> None:
    model = tower()
    report = compress(model, [tower_batch(seed) for seed in range(4)], BudgetConfig(size=9000, targets=EVERYTHING))
    save(model, tmp_path / "small", report=report)
    written = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert 7000 < written <= 9000


def test_often_used_rows_count_more() -> None:
    draw = torch.Generator().manual_seed(0)
    dense = nn.Sequential(nn.Embedding(50, 10), nn.Flatten(), nn.Linear(10, 3))
    tokens = torch.where(torch.rand(400, 1, generator=draw) < 0.9, 7, torch.randint(0, 50, (400, 1), generator=draw))
    compress(best := copy.deepcopy(dense), [tokens], BudgetConfig(targets="all-embeddings", keep=0.3))
    compress(rows := copy.deepcopy(dense), [tokens], BudgetConfig(targets="all-embeddings", keep=0.3, method="rows"))
    for small in (best, rows):
        table: Any = small[0]
        lost = torch.linalg.norm((table.weight - dense[0].weight).detach(), dim=1)
        assert float(lost[7]) < 0.05 * float(lost.mean())
    kept: Any = rows[0]
    columns = kept.B.weight.T
    assert all(bool((dense[0].weight == column).all(dim=1).any()) for column in columns)


def test_apply_a_plan_again() -> None:
    batches = [tower_batch(seed) for seed in range(2)]
    one, other = tower(), tower()
    config = BudgetConfig(keep=0.5, targets=EVERYTHING, gradients=False)
    names = ["tables.0", "tables.1", "tables.2", "history", "bottom.0", "bottom.2", "top.0", "top.2"]
    statistics = collect(one, batches, modules=names, moments="full")
    plan = Plan.from_dict(json.loads(json.dumps(make_plan(one, statistics, config).to_dict())))
    carry_out_(one, plan, statistics)
    carry_out_(other, plan, statistics)
    assert torch.equal(output(one, batches[0]), output(other, batches[0]))


def test_statistics_of_tables_are_stored(tmp_path: Path) -> None:
    found = collect(tower(), [tower_batch()], modules=["tables.0", "tables.2", "top.0"], moments="full")
    assert found.lookups == ("tables.0", "tables.2")
    expected = torch.bincount(tower_batch()[1][:, 0], minlength=60).double()
    assert torch.equal(found.square_sums["tables.0"], expected)
    found.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert again.lookups == found.lookups
    assert torch.equal(again.second_moment("tables.2"), found.second_moment("tables.2"))
    assert again.second_moment("tables.2").shape == (90,)


@pytest.mark.parametrize("layout", ["cur", "folded", "interpolative"])
def test_rounded_modules_are_near_and_come_back(layout: str, tmp_path: Path) -> None:
    batches = [tower_batch(seed) for seed in range(3)]
    model = tower()
    compress(model, batches, CompressConfig(layers="all", targets=EVERYTHING, rank=5, layout=layout))
    before = copy.deepcopy(model)
    statistics = collect(model, batches, modules=quantizable(before), moments="full")
    found = quantize_(model, statistics)
    assert found.after < 0.6 * found.before
    assert max(found.errors.values()) < 0.05
    assert error(before, model, batches[0]) < 0.02
    assert {name for name, layer in compressed_modules(model).items() if layer.grid is None} == set()
    save(model, tmp_path / "int8")
    again = load_into(tower(seed=1), tmp_path / "int8")
    assert torch.equal(output(again, batches[0]), output(model, batches[0]))


def test_a_module_that_was_not_compressed_can_be_rounded() -> None:
    model, dense = denoiser(), denoiser()
    quantize_(model)
    assert {layer.layout for layer in compressed_modules(model).values()} == {"whole"}
    assert error(dense, model, denoiser_batch()) < 0.05


@pytest.mark.parametrize("kind", BUILD)
def test_a_new_process_loads_the_same_bit_by_bit(kind: str, tmp_path: Path) -> None:
    build, batch = BUILD[kind]
    model = build()
    targets = EVERYTHING if kind != "images" else "all-linear"
    report = compress(model, [batch(seed) for seed in range(2)], BudgetConfig(keep=0.6, targets=targets))
    with torch.no_grad():  # what is not compressed is stored as well, buffers too
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
    save(model, tmp_path / "small", report=report)
    code = (
        "import sys, torch; from cur.integrations import load_into; from tests import modules; "
        f"model = load_into(modules.{build.__name__}(seed=5), sys.argv[1]).eval(); "
        f"batch = modules.{batch.__name__}(9); "
        "call = (lambda: model(**batch)) if isinstance(batch, dict) else "
        "(lambda: model(*batch)) if isinstance(batch, tuple) else (lambda: model(batch)); "
        "torch.save(call().detach(), sys.argv[2])"
    )
    made = tmp_path / "output"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "small"), str(made)], cwd=ROOT, check=True, timeout=300)
    assert torch.equal(torch.load(made), output(model, batch(9)))
    summary = summarize(tmp_path / "small")
    assert {layer.name for layer in summary.layers} == compressed_modules(model).keys()
    assert f"load_into({type(model).__name__}(...)" in (tmp_path / "small" / "README.md").read_text()
    assert Plan.load(tmp_path / "small" / "plan.json").entries == report.plan.entries


def test_a_batch_that_is_not_the_arguments_says_what_to_pass() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(image_batch(), torch.zeros(16)), batch_size=8)
    model = images()
    with pytest.raises(TypeError, match=r"Images cannot be run on a batch \(.*\); .* pass `forward\(module, batch\)`"):
        compress(model, loader, PAPER)
    compress(model, loader, PAPER, forward=lambda module, batch: module(batch[0]))
    assert compressed_modules(model)
    with pytest.raises(TypeError, match="a batch must be a tensor, or hold tensors"):
        compress(images(), ["text"], PAPER)
    with pytest.raises(ValueError, match="`calibration` is empty"):
        compress(images(), [], PAPER)
    with pytest.raises(ValueError, match="a batch holds no sample"):
        compress(images(), [image_batch()[:0]], PAPER)
    with pytest.raises(TypeError, match="`forward` must be callable, got str"):
        compress(images(), [image_batch()], PAPER, forward="forward")  # type: ignore[arg-type]


def test_gradients_with_less_memory_are_the_same() -> None:
    batches = [{**denoiser_batch(seed), "noise": torch.randn(4, 16, 12)} for seed in range(2)]
    plain, again = denoiser(), denoiser()
    config = BudgetConfig(keep=0.6, neurons=False)
    one = compress(plain, batches, config, loss=denoising_loss)
    two = compress(again, batches, dataclasses.replace(config, gradient_checkpointing=True), loss=denoising_loss)
    assert [entry.name for entry in one.plan.entries] == [entry.name for entry in two.plan.entries]
    torch.testing.assert_close(output(plain, denoiser_batch(7)), output(again, denoiser_batch(7)))


class Headed(nn.Module):
    """A transformers model inside of a module, whose configuration the module has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make("llama", blocks=4).model
        self.config = self.body.config
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])


def test_a_transformers_model_inside_of_a_module(tmp_path: Path) -> None:
    windows = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": windows, "attention_mask": torch.ones_like(windows), "labels": torch.arange(6) % 3}]
    torch.manual_seed(0)
    model = Headed()
    report = compress(
        model,
        batches,
        BudgetConfig(keep=0.6),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch["labels"]),
    )
    assert report.plan.kept is not None
    assert report.plan.kept <= 0.6
    save(model, tmp_path / "small", report=report)
    torch.manual_seed(1)
    again = load_into(Headed(), tmp_path / "small")
    assert torch.equal(output(again, windows), output(model, windows))


def test_attention_of_torch_itself(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        return nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 4), nn.Linear(16, 5))

    tokens = torch.randint(0, 50, (8, 10), generator=torch.Generator().manual_seed(0))
    for config in (
        CompressConfig(layers=2, targets=("linear1",), rank=6),
        CompressConfig(layers="all", targets="all-linear", rank=6, layout="folded"),
        BudgetConfig(keep=0.6),
    ):
        model = build(0)
        compress(model, tokens, config)
        layers = compressed_modules(model)
        assert layers
        assert not any("self_attn" in name for name in layers)
        model.eval()
        with torch.no_grad():  # the fast path reads weights and biases off the layers
            fast = model(tokens)
        torch.testing.assert_close(fast, model(tokens), rtol=1e-4, atol=1e-5)
    quantize_(model, collect(model, [tokens], modules=quantizable(model), moments="full", partial=True))
    save(model, tmp_path / "int8")
    assert torch.equal(output(load_into(build(1), tmp_path / "int8"), tokens), output(model, tokens))


def test_what_is_for_transformers_alone_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tower()
    report = compress(model, [tower_batch()], PAPER)
    with pytest.raises(TypeError, match="`model` must be one of transformers' own, got Tower; of another module"):
        dense_export(model, None, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    save(model, tmp_path / "small", report=report)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "small")], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "top.0" in shown.stdout
    for command in (["convert"], ["export"]):
        done = CliRunner().invoke(app, [*command, str(tmp_path / "small"), "--out", str(tmp_path / "other")])
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        assert len(done.stderr) < 600


def test_layers_whose_weight_is_computed_stay_dense_with_a_sentence() -> None:
    model = tower()
    parametrizations.weight_norm(model.top[0])
    with pytest.raises(ValueError, match=r"names no linear layer: the weight of top\.0 is computed"):
        compress(model, [tower_batch()], CompressConfig(targets=("top.0",), rank=2))
    report = compress(model, [tower_batch()], BudgetConfig(keep=0.6), loss=click_loss)
    assert "the weight of top.0 is computed from parametrizations.weight" in report.plan.dense["top.0"]


@pytest.mark.parametrize("blocks", [5, ["layers.0", 3], [["layers.0"], [3]], [3]])
def test_blocks_that_are_no_names_are_refused(blocks: Any) -> None:
    config = CompressConfig(layers=1, targets=("fc1",), rank=4, choose="last")
    with pytest.raises(TypeError, match=r"`blocks` must be the name of a module.*pass dotted names"):
        compress(denoiser(), [denoiser_batch()], config, blocks=blocks)


@pytest.mark.parametrize("given", [None, 3])
def test_calibration_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="`calibration` must be a tensor or an iterable of batches, got"):
        compress(tower(), given, BudgetConfig(keep=0.6))
