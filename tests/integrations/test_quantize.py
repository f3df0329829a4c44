from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur import NumericalError
from cur.healing import HealingConfig, heal
from cur.integrations import BudgetConfig, CompressConfig, Statistics, collect, compress, dense_export, load_into, save
from cur.integrations.convert import convert_
from cur.integrations.files.reading import CheckpointError
from cur.integrations.measure.text import batches
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import CompressedLinear, GridLinear, IntegerGrid, compressed_modules, factored, layer_class
from cur.integrations.quantize import (
    asked_grids,
    grid_of,
    measured_with,
    quantizable,
    quantize_,
    read_grids,
    save_quantized,
)
from cur.integrations.store.format import CURConfig
from cur.integrations.store.inspect import summarize
from tests.models import FAMILIES, batch, make

MakeModel = Callable[..., PreTrainedModel]
TARGETS = {"llama": ("q_proj", "gate_proj"), "gpt2": ("c_attn", "c_fc"), "opt": ("q_proj", "fc1")}
FACTORS = {"cur": {"R", "U", "C"}, "folded": {"R", "CU"}, "interpolative": {"R", "T"}}


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(windows).logits
    return found


def measured(model: PreTrainedModel, windows: Tensor) -> Statistics:
    return collect(model, windows.split(2), modules=quantizable(model), moments="full")


def squeezed(
    model: PreTrainedModel, windows: Tensor, layout: str, targets: tuple[str, ...] = TARGETS["llama"]
) -> PreTrainedModel:
    compress(model, windows, CompressConfig(layers=2, rank=8, layout=layout, targets=targets))
    return model


@pytest.fixture
def neurons(llama: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
    """A model some of whose layers keep neurons, whole and of a lower rank, and others are whole."""
    compress(llama, windows, BudgetConfig(keep=0.6, own_text=0))
    layers = compressed_modules(llama).values()
    assert {layer.layout for layer in layers} >= {"interpolative", "inputs", "outputs"}
    assert {layer.inner_rank is None for layer in layers if layer.layout == "outputs"} == {True, False}
    return llama


def weights_of(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Return what each layer multiplies its inputs with, of kept neurons alone."""
    layers = {name: model.get_submodule(name) for name in names}
    return {
        name: (layer.part if layer.layout in ("inputs", "outputs") else layer).weight.detach().double().clone()
        if isinstance(layer, CompressedLinear)
        else (layer.weight.T if hasattr(layer, "nf") else layer.weight).detach().double().clone()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layout", factored())
def test_rounded_layers_are_saved_and_loaded(
    kind: str, layout: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    model = squeezed(make_model(kind), windows, layout, TARGETS[kind])
    before, names = logits(model, windows), quantizable(model)
    dense = [name for name in names if name not in compressed_modules(model)]
    assert dense
    found = quantize_(model, measured(model, windows))
    assert list(found.errors) == names
    assert list(compressed_modules(model)) == names
    assert 0.25 * found.before < found.after < 0.45 * found.before  # short rows, each with a step in float32
    after = logits(model, windows)
    assert 0 < float((after - before).norm()) < 0.03 * float(before.norm())
    save(model, None, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "cur_model.safetensors")
    first = next(name for name in names if name not in dense)
    for key in FACTORS[layout]:
        assert stored[f"{first}.{key}.integers"].dtype == torch.int8
    assert stored[f"{dense[0]}.W.integers"].dtype == torch.int8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again, windows), after)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.int8}
    torch.testing.assert_close(logits(half, windows).float(), after, rtol=0, atol=0.05 * float(after.abs().max()))
    dense_export(again, None, tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, GridLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain, windows), after, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), windows), after)


def test_experts(tmp_path: Path) -> None:
    model, tokens = make("mixtral"), batch("mixtral")
    compress(model, [tokens], CompressConfig(layers=1, rank=6, targets=FAMILIES["mixtral"].targets))
    names = quantizable(model)
    assert any("experts" in name for name in names)
    quantize_(model)
    with torch.no_grad():
        after = model(**tokens).logits
    save(model, None, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, after)


def test_layers_that_keep_neurons(neurons: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    before = logits(neurons, windows)
    quantize_(neurons, measured(neurons, windows))
    after = logits(neurons, windows)
    assert 0 < float((after - before).norm()) < 0.03 * float(before.norm())
    save(neurons, None, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), windows), after)


@pytest.mark.parametrize("layout", factored())
def test_without_statistics_every_entry_goes_to_the_nearest_multiple(
    layout: str, llama: PreTrainedModel, windows: Tensor
) -> None:
    model = squeezed(llama, windows, layout)
    before = {name: part.weight.detach().clone() for name, part in model.named_modules() if type(part) is nn.Linear}
    quantize_(model)
    rounded = {name: part for name, part in model.named_modules() if isinstance(part, GridLinear)}
    assert len(rounded) >= 39
    for name, part in rounded.items():
        weight = before[name.removesuffix(".W")]
        assert bool((part.integers.abs().amax(1) == 127).all())
        assert bool(((weight - part.weight).abs() <= part.scale * (0.5 + 1e-4)).all())


def test_errors_are_those_of_the_outputs_and_smaller_with_statistics(neurons: PreTrainedModel, windows: Tensor) -> None:
    names, statistics = quantizable(neurons), measured(neurons, windows)
    before = weights_of(neurons, names)
    found = {}
    for known in (statistics, None):
        model = copy.deepcopy(neurons)
        said = quantize_(model, known).errors
        after = weights_of(model, names)
        errors = []
        for name in names:
            G = statistics.second_moment(name)
            change = after[name] - before[name]
            errors.append(float(((change @ G) * change).sum() / ((before[name] @ G) * before[name]).sum()) ** 0.5)
            if known is not None:
                assert said[name] == pytest.approx(errors[-1], rel=1e-3)
        found[known is None] = torch.tensor(errors)
    assert bool((found[False] < found[True]).float().mean() > 0.9)
    assert float(found[False].median()) < 0.7 * float(found[True].median())


def test_whole_weights_keep_the_bound_of_babai(llama: PreTrainedModel, windows: Tensor) -> None:
    # Half a step times the root of the sum of squares of the pivots, row by row (arXiv 2507.18553).
    names, statistics = quantizable(llama), measured(llama, windows)
    before = weights_of(llama, names)
    quantize_(llama, statistics, damping=0.01)
    kept = broken = 0
    for name in names:
        W = llama.get_submodule(name).W
        if bool((W.integers.abs() == 127).sum(1).gt(1).any()):
            continue  # perhaps cut off at the largest integer
        G = statistics.second_moment(name)
        G = G + 0.01 * float(G.diagonal().mean()) * torch.eye(len(G), dtype=torch.float64)
        change, step = (W.weight.double() - before[name]) / W.scale.double(), torch.linalg.cholesky(G).diagonal()
        bound = step.square().sum().sqrt() / 2
        assert bool((((change @ G) * change).sum(1).sqrt() <= bound * (1 + 1e-4)).all())
        nearest = before[name] / W.scale.double()
        nearest = nearest.round() - nearest
        broken += int((((nearest @ G) * nearest).sum(1).sqrt() > bound).sum())
        kept += 1
    assert kept > 5
    assert broken > 0  # by rounding to the nearest multiple


def test_coefficients_are_fitted_to_rounded_rows(llama: PreTrainedModel, windows: Tensor) -> None:
    model = squeezed(llama, windows, "interpolative")
    statistics = measured(model, windows)
    before = {name: (part.R.weight.detach().double(), part.T.weight.detach().double()) for name, part in pairs(model)}
    quantize_(model, statistics)
    lost = torch.zeros(2, dtype=torch.float64)
    for name, part in pairs(model):
        G, (R, T) = statistics.second_moment(name), before[name]
        rounded, step = part.R.weight.double(), T.abs().amax(1, keepdim=True) / 127
        for place, coefficients in enumerate((part.T.weight.double(), (T / step).round() * step)):
            change = coefficients @ rounded - T @ R
            lost[place] += ((change @ G) * change).sum()
    assert lost[0] < 0.77 * lost[1]


def pairs(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in compressed_modules(model).items() if part.layout == "interpolative"]


def test_inputs_that_never_come(llama: PreTrainedModel, windows: Tensor) -> None:
    statistics = measured(llama, windows)
    name = "model.layers.2.mlp.down_proj"
    statistics.products[name].zero_()
    before = llama.get_submodule(name).weight.detach().clone()
    assert quantize_(llama, statistics).errors[name] == 0.0
    W = llama.get_submodule(name).W
    assert bool(((before - W.weight).abs() <= W.scale * (0.5 + 1e-4)).all())


def test_gradients_that_never_come_and_inputs_that_are_dead(llama: PreTrainedModel, windows: Tensor) -> None:
    known, name = gradients(llama, windows), "model.layers.2.mlp.down_proj"
    known.output_products[name].zero_()
    other = "model.layers.3.mlp.down_proj"
    known.products[other][4] = known.products[other][:, 4] = 0
    found = quantize_(llama, known, grid=IntegerGrid(4, 8, symmetric=False), damping=0)
    assert name not in found.predicted
    assert other in found.predicted
    assert bool(torch.isfinite(logits(llama, windows)).all())


def test_factors_need_damping_where_tokens_are_few(llama: PreTrainedModel, windows: Tensor) -> None:
    model = squeezed(llama, windows, "folded")
    known = collect(model, [{"input_ids": windows[:1, :4]}], modules=quantizable(model), moments="full")
    with pytest.raises(NumericalError, match=r"raise (it|`damping`)"):
        quantize_(model, known, damping=0)
    quantize_(model, known, damping=0.01)


def test_a_row_of_zeros_stays_one(llama: PreTrainedModel, windows: Tensor) -> None:
    name = "model.layers.2.mlp.down_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight[3] = 0.0
    quantize_(llama, measured(llama, windows))
    weight = llama.get_submodule(name).weight
    assert bool((weight[3] == 0).all())
    assert bool(torch.isfinite(weight).all())


def test_layers_that_share_a_weight_are_left_out(llama: PreTrainedModel) -> None:
    blocks = llama.model.layers
    blocks[1].mlp.up_proj.weight = blocks[2].mlp.up_proj.weight
    shared = {f"model.layers.{index}.mlp.up_proj" for index in (1, 2)}
    names = quantizable(llama)
    assert len(names) == 7 * len(blocks) - 2
    assert not shared & set(names)
    assert "lm_head" not in names


def test_what_cannot_be_rounded_is_refused_and_unchanged(llama: PreTrainedModel, windows: Tensor) -> None:
    statistics = measured(llama, windows)
    model = squeezed(copy.deepcopy(llama), windows, "cur")
    del statistics.products["model.layers.2.mlp.up_proj"]  # type: ignore[attr-defined]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="up_proj"):
        quantize_(model, statistics)
    statistics = measured(llama, windows)
    statistics.products["model.layers.4.mlp.up_proj"] = torch.eye(3, dtype=torch.float64)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"has 3 inputs of model.layers.4.mlp.up_proj, which has 32: measure"):
        quantize_(model, statistics)
    with pytest.raises(ValueError, match="`damping` must be a number that is at least 0, got -1"):
        quantize_(model, damping=-1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.get_submodule("model.layers.4.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"the weight model.layers.4.mlp.up_proj.W holds NaN"):
        quantize_(model)
    assert not any(isinstance(part, GridLinear) for part in model.modules())
    statistics.products["model.layers.0.mlp.up_proj"][0, 0] = float("nan")
    with pytest.raises(
        NumericalError, match=r"model.layers.0.mlp.\w+_proj.W cannot be rounded .* `column_weights` must be"
    ):
        quantize_(llama, statistics)
    with pytest.raises(TypeError, match="`model` must be a module, got function"):
        quantize_(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are offloaded; load the model"):
        quantize_(copy.deepcopy(llama).to("meta"))
    llama.hf_quantizer = object()
    with pytest.raises(ValueError, match="the model is quantized by object"):
        quantize_(llama)
    assert not any(isinstance(part, GridLinear) for part in llama.modules())
    with pytest.raises(ValueError, match="no stack of blocks with linear layers"):
        quantizable(nn.Sequential(nn.ReLU()))
    assert quantizable(nn.Sequential(nn.Linear(3, 3))) == ["0"]  # no transformer: wherever they are


def test_what_is_rounded_can_neither_be_rounded_nor_converted_nor_healed(
    llama: PreTrainedModel, windows: Tensor
) -> None:
    student = squeezed(copy.deepcopy(llama), windows, "cur")
    quantize_(student)
    with pytest.raises(ValueError, match=r"q_proj is rounded to int8 already; start from the checkpoint"):
        quantize_(student)
    with pytest.raises(ValueError, match="rounded to int8; convert the checkpoint that it was made from"):
        convert_(student, "folded")
    with pytest.raises(ValueError, match="rounded to int8; heal the checkpoint that it was made from"):
        heal(student, llama, windows, HealingConfig(steps=1, batch_size=2, held_out=2))
    assert student.hf_quantizer.is_trainable  # adapters beside them
    assert not student.hf_quantizer.is_qat_trainable


def test_summary_and_damage(neurons: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    save(neurons, None, tmp_path / "before")
    quantize_(neurons, measured(neurons, windows))
    save(neurons, None, tmp_path / "model")
    before, after = summarize(tmp_path / "before"), summarize(tmp_path / "model")
    assert (after.parameters, after.dense_parameters) == (before.parameters, before.dense_parameters)
    assert all(layer.grid is not None for layer in after.layers)
    assert not any(layer.grid is not None for layer in before.layers)
    assert {layer.layout for layer in after.layers} == {"interpolative", "inputs", "outputs", "whole"}
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{len(before.layers)} linear layers hold a weight of lower rank" in card
    assert "rounded to int8" in card
    weights = tmp_path / "model" / "cur_model.safetensors"
    state = load_file(weights)
    key = next(key for key in state if key.endswith("R.integers"))
    save_file({**state, key: state[key][:, 1:].contiguous()}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} would be"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    name = next(name for name, spec in config["modules"].items() if "int8" in spec)
    for wrong in (False, 1, "yes"):
        with pytest.raises(CheckpointError, match=f"describes {name} as .*perhaps `int8`: true"):
            CURConfig({name: {**config["modules"][name], "int8": wrong}})
    with pytest.raises(CheckpointError, match="describes x as"):
        CURConfig({"x": {"layout": "whole", "rank": 4, "inner_rank": 2, "int8": True}})


GRIDS = [
    IntegerGrid(8, 16, symmetric=False),
    IntegerGrid(6),
    IntegerGrid(5, 8),
    IntegerGrid(4, 16, symmetric=False),
    IntegerGrid(3, 8, symmetric=False),
]


def gradients(model: PreTrainedModel, windows: Tensor) -> Statistics:
    names = quantizable(model)
    return collect(model, windows.split(2), modules=names, moments="full", gradients=names)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid_is_saved_and_loaded(
    grid: IntegerGrid, neurons: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    before, names = logits(neurons, windows), quantizable(neurons)
    found = quantize_(neurons, measured(neurons, windows), grid=grid)
    after = logits(neurons, windows)
    assert 0 < float((after - before).norm()) < 2.0 ** (3 - grid.bits) * float(before.norm())
    assert {layer.grid for layer in compressed_modules(neurons).values()} == {grid}
    assert found.grids == dict.fromkeys(names, grid.spec())
    save(neurons, None, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["format_version"] == 4
    stored = load_file(tmp_path / "model" / "cur_model.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if key.endswith("scale")} <= {torch.float16, torch.bfloat16}
    counted = sum(t.nbytes for key, t in stored.items() if any(key.startswith(f"{name}.") for name in names))
    assert counted == found.after
    summary = summarize(tmp_path / "model")
    planned = sum(
        layer_class(layer.layout).nbytes(*layer.shape, *layer.ranks, dtype=torch.float32, grid=layer.grid)
        for layer in summary.layers
    )
    assert planned == counted  # the small model has no biases
    assert summary.grids == str(grid)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again, windows), after)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    torch.testing.assert_close(logits(half, windows).float(), after, rtol=0, atol=0.05 * float(after.abs().max()))
    again.save_pretrained(tmp_path / "again")
    twice = load_file(next((tmp_path / "again").glob("*.safetensors")))
    assert all(torch.equal(twice[key], stored[key]) for key in twice if key.endswith(("integers", "scale", "zeros")))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), windows), after)


@pytest.mark.parametrize("layout", factored())
def test_factors_that_groups_do_not_divide(layout: str, llama: PreTrainedModel, windows: Tensor) -> None:
    model = squeezed(llama, windows, layout)  # of rank 8, in groups of 16, beside whole rows of 32 and 48
    before, grid = logits(model, windows), IntegerGrid(5, 16, symmetric=False)
    quantize_(model, gradients(model, windows), grid=grid)
    assert float((logits(model, windows) - before).norm()) < 0.2 * float(before.norm())


def test_output_gradients_and_text_lose_less(llama: PreTrainedModel, windows: Tensor) -> None:
    grid, before = IntegerGrid(3, 16, symmetric=False), logits(llama, windows).log_softmax(-1)
    known, lost = gradients(llama, windows), {}
    ways: dict[str, Any] = {
        "nearest": {},
        "inputs": {"statistics": measured(llama, windows)},
        "both": {"statistics": known},
        "text": {"statistics": known, "text": [{"input_ids": part} for part in windows.split(2)]},
    }
    for way, options in ways.items():
        model = copy.deepcopy(llama)
        found = quantize_(model, grid=grid, **options)
        assert bool(found.predicted) == (way in ("both", "text"))
        assert all(loss >= 0 for loss in found.predicted.values())
        assert not found.notes
        after = logits(model, windows).log_softmax(-1)
        lost[way] = float((before.exp() * (before - after)).sum(-1).mean())
    assert lost["text"] < lost["inputs"] < lost["nearest"]
    assert lost["both"] < lost["inputs"]


@pytest.mark.parametrize("layout", [*factored(), "neurons"])
def test_compressed_layers_are_fitted_along_the_blocks(
    layout: str, make_model: MakeModel, windows: Tensor, request: pytest.FixtureRequest
) -> None:
    model = (
        request.getfixturevalue("neurons") if layout == "neurons" else squeezed(make_model("llama"), windows, layout)
    )
    grid, before = IntegerGrid(3, 16, symmetric=False), logits(model, windows).log_softmax(-1)
    known, lost = gradients(model, windows), {}
    for text in (None, [{"input_ids": part} for part in windows.split(2)]):
        rounded = copy.deepcopy(model)
        quantize_(rounded, known, grid=grid, text=text)
        after = logits(rounded, windows).log_softmax(-1)
        lost[text is None] = float((before.exp() * (before - after)).sum(-1).mean())
    assert lost[False] < lost[True]


def test_predictions_are_those_of_second_order(llama: PreTrainedModel, windows: Tensor) -> None:
    known = gradients(llama, windows)
    name = "model.layers.2.mlp.up_proj"
    W = llama.get_submodule(name).weight.detach().double()
    found = quantize_(llama, known, grid={name: IntegerGrid(4, 8)})
    assert list(found.grids) == list(found.errors) == list(compressed_modules(llama)) == [name]
    E = llama.get_submodule(name).weight.double() - W
    H, G = known.output_moment(name), known.second_moment(name)
    assert found.predicted[name] == pytest.approx(float(torch.trace(H @ E @ G @ E.T)) / 2, rel=1e-3)


def test_grids_of_layers_are_read_from_what_was_written(
    llama: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    names = quantizable(llama)
    grids = {name: IntegerGrid(4, 16) if "mlp" in name else IntegerGrid() for name in names if "q_proj" not in name}
    llama.save_pretrained(tmp_path / "dense")
    found = quantize_(llama, None, grid=grids)
    save_quantized(llama, None, tmp_path / "model", found, source=tmp_path / "dense")
    assert read_grids(tmp_path / "model" / "quantization.json") == grids
    assert {name: layer.grid for name, layer in compressed_modules(llama).items()} == grids
    assert summarize(tmp_path / "model").grids == "4 bits in groups of 16, int8"
    file = tmp_path / "grids.json"
    for content, said in (
        ({}, "has no `grids`"),
        ({"grids": []}, "has no `grids`"),
        ({"grids": {"x": {"bits": 4}}}, "has no grid for x: a grid must have"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=said):
            read_grids(file)


def test_models_whose_blocks_cannot_be_walked_say_so(windows: Tensor) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    batches = [torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    known = collect(model, batches, modules=["0", "2"], moments="full")
    found = quantize_(model, known, grid=IntegerGrid(4, 8), text=batches)
    assert found.notes == (
        "Layers are not fitted to what rounded ones before them give: Sequential is no transformer.",
    )


def test_checkpoints_that_contradict_themselves(llama: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    quantize_(llama, measured(llama, windows), grid=IntegerGrid(4, 16, symmetric=False))
    save(llama, None, tmp_path / "model")
    weights = tmp_path / "model" / "cur_model.safetensors"
    state = load_file(weights)
    for part in ("integers", "scale", "zeros"):
        key = f"model.layers.1.mlp.up_proj.W.{part}"
        save_file({**state, key: state[key][:, 1:].contiguous()}, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{key} would be"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        (tmp_path / "model" / "account.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=f"W.{part} of shape"):
            summarize(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    name, spec = next(iter(config["modules"].items()))
    for change in ({"grid": {**spec["grid"], "bits": 7}}, {"shape": [32]}, {"shape": None}, {"int8": True}):
        with pytest.raises(CheckpointError, match=f"describes {name} as .*a `grid`"):
            CURConfig({name: {**spec, **change}})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"text": []}, "`text` needs `statistics`"),
        ({"correction": 2}, "`correction` must be a number between 0 and 1, got 2"),
        ({"correction": None}, "`correction` must be a number between 0 and 1, got None"),
        ({"damping": "0.1"}, "`damping` must be a number that is at least 0, got '0.1'"),
        ({"grid": {}}, "`grid` is an empty mapping"),
        ({"grid": 4}, r"`grid` must be an IntegerGrid, .* got 4; grid_of\(4\) is one"),
        ({"grid": {"model.layers.0.mlp.up_proj": {"bits": 4}}}, "`grid` must be an IntegerGrid, or one by the name"),
        ({"grid": {"lm_head": IntegerGrid()}}, "`grid` names lm_head, whose weight is that of model.embed_tokens"),
    ],
)
def test_wrong_options_change_nothing(llama: PreTrainedModel, options: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        quantize_(llama, **options)
    assert not compressed_modules(llama)


def test_no_batch_is_no_text(llama: PreTrainedModel, windows: Tensor) -> None:
    with pytest.raises(ValueError, match="`text` is empty"):
        quantize_(llama, measured(llama, windows), text=[])


@pytest.mark.parametrize(
    ("said", "grid"),
    [
        ({}, IntegerGrid()),
        ({"bits": 4}, IntegerGrid(4, 64, symmetric=False)),
        ({"bits": 8, "group": 32}, IntegerGrid(8, 32)),
        ({"bits": 3, "group": "row", "symmetric": True}, IntegerGrid(3)),
    ],
)
def test_usual_grids(said: dict[str, Any], grid: IntegerGrid) -> None:
    assert grid_of(**said) == grid
    with pytest.raises(
        ValueError, match="`group` must be a multiple of 8 such as 64, or row for one step a row, got 'column'"
    ):
        grid_of(4, "column")


def damaged(place: Path, config: Callable[[Any], None] | None = None, **tensors: Any) -> None:
    """Change the description or stored tensors of a checkpoint, without the hashes that would notice."""
    (place / "account.json").unlink(missing_ok=True)
    if config is not None:
        data = json.loads((place / "config.json").read_text())
        config(data["quantization_config"]["modules"])
        (place / "config.json").write_text(json.dumps(data))
    if tensors:
        weights = place / "cur_model.safetensors"
        state = load_file(weights)
        for part, change in tensors.items():
            key = f"model.layers.1.mlp.up_proj.W.{part}"
            if change is None:
                del state[key]
            else:
                state[key] = change(state[key])
        save_file(state, weights, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "loads", "inspects"),
    {
        "symmetric": (lambda m: m[NAME]["grid"].update(symmetric=True), {}, "zeros, which", "zeros, which"),
        "shape": (lambda m: m[NAME].update(shape=[47, 32]), {}, "is 47 x 32, which is 48 x 32", "of shape"),
        "rank": (lambda m: m[NAME].update(rank=31), {}, "must be its smaller side, got 31", "has rank 31"),
        "no zeros": (None, {"zeros": None}, "lacks", "lacks"),
        "integers": (None, {"integers": lambda x: x.to(torch.int32)}, None, "stored as I32"),
        "steps": (None, {"scale": lambda x: x.to(torch.int16)}, None, "stored as I16"),
        "NaN": (None, {"scale": lambda x: x * float("nan")}, "scale holds NaN", None),
    }.values(),
)
def test_damage_to_what_is_packed_is_named(
    config: Any,
    tensors: dict[str, Any],
    loads: str | None,
    inspects: str | None,
    llama: PreTrainedModel,
    tmp_path: Path,
) -> None:
    quantize_(llama, grid=IntegerGrid(4, 16, symmetric=False))
    save(llama, None, tmp_path / "model")
    damaged(tmp_path / "model", config, **tensors)
    if loads is not None:
        with pytest.raises(CheckpointError, match=loads):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if inspects is not None:
        with pytest.raises(CheckpointError, match=inspects):
            summarize(tmp_path / "model")


@pytest.mark.parametrize("modules", [["a"], {"a": None}, None])
def test_descriptions_of_no_modules_are_refused(modules: Any) -> None:
    with pytest.raises(CheckpointError, match=r"must describe modules by name|describes a as None"):
        CURConfig(modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_have_their_dtype_again(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 8)).to(dtype)

    model, tokens = build(), torch.arange(12).reshape(3, 4)
    compress(model, [tokens], CompressConfig(layers="all", targets=["0"], rank=6))
    quantize_(model, grid=grid_of(4, 8))
    save(model, tmp_path / "small")
    again = load_into(nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 8)), tmp_path / "small")
    assert again(tokens).dtype == dtype
    assert torch.equal(again(tokens), model(tokens))


def test_what_was_arranged_goes_with_its_layer(llama: PreTrainedModel, windows: Tensor) -> None:
    quantize_(llama, grid=grid_of(4, 16))
    layer = llama.get_submodule(NAME).W
    logits(llama, windows)
    alive = weakref.ref(layer._product)
    gc.disable()
    try:
        llama.get_submodule(NAME).W = nn.Identity()
        del layer
        assert alive() is None
    finally:
        gc.enable()


def test_tokens_that_are_none_are_refused() -> None:
    table = nn.Sequential(nn.Embedding(50, 32))
    compress(table, [torch.arange(12).reshape(3, 4)], CompressConfig(layers="all", targets=["0"], rank=6))
    quantize_(table, grid=grid_of(4, 8))
    for token in (-1, 50):
        with pytest.raises(IndexError):
            table(torch.tensor([token]))


def test_steps_that_half_precision_does_not_hold() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).half()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.raises(NumericalError, match=r"the steps of 0.W do not fit into float16; load the model in float32"):
        quantize_(model, grid=grid_of(4, 8))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_tables_and_heads_are_rounded_on_request(family: str, windows: Tensor) -> None:
    model: Any = make(family, seed=0, blocks=2)
    dense = copy.deepcopy(model)
    known = vocabulary(model)
    assert known
    assert not known.keys() & set(quantizable(model))
    assert quantizable(model, tables=True) == [*quantizable(model), *known]
    grids = asked_grids(model, grid_of(4, 16), grid_of(8))
    modules, graded = measured_with(model, grids)
    assert set(modules) == grids.keys() | {other for tied in known.values() for other in tied}
    assert set(graded) == grids.keys() - {"lm_head"}
    statistics = collect(model, windows.split(2), modules=modules, moments="full", gradients=graded)
    found = quantize_(model, statistics, grid=grid_of(4, 16), tables=grid_of(8), text=batches(windows, batch_size=2))
    assert found.grids == {name: grid.spec() for name, grid in grids.items()}
    assert found.errors.keys() == found.predicted.keys() == grids.keys()
    assert all(found.errors[name] < 0.01 for name in known)
    assert found.before == sum(dense.get_submodule(name).weight.nbytes for name in grids) + sum(
        part.bias.nbytes for name in grids if (part := dense.get_submodule(name))._parameters.get("bias") is not None
    )
    assert (logits(model, windows) - logits(dense, windows)).norm() < 0.5 * logits(dense, windows).norm()
    with pytest.raises(ValueError, match="is rounded to"):
        quantizable(model)


def test_grids_of_tables_by_name_and_what_is_refused() -> None:
    model = make("llama", seed=0, blocks=2)
    q = "model.layers.0.self_attn.q_proj"
    assert asked_grids(model, {q: grid_of(8), "model.embed_tokens": grid_of(6, 16)}).keys() == {q, "model.embed_tokens"}
    with pytest.raises(ValueError, match=r"`grid` names lm_head, whose weight is that of model\.embed_tokens"):
        quantize_(model, grid={"lm_head": grid_of(8)})
    with pytest.raises(ValueError, match=r"`grid` has a grid of model\.embed_tokens already; leave out `tables`"):
        quantize_(model, grid={"model.embed_tokens": grid_of(8)}, tables=grid_of(6))
    with pytest.raises(TypeError, match="`tables` must be an IntegerGrid or None, got 8"):
        quantize_(model, tables=8)
    with pytest.raises(ValueError, match="`tables` must be None: the model has no table of tokens"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), tables=grid_of(8))
    assert not compressed_modules(model)


def test_rounded_tables_are_neither_converted_nor_rounded_again(tmp_path: Path) -> None:
    model = make("llama", seed=0, blocks=2)
    found = quantize_(model, grid={"model.embed_tokens": grid_of(6, 16)})
    with pytest.raises(ValueError, match="is rounded to 6 bits in groups of 16; convert the checkpoint"):
        convert_(model, layout="auto")
    save_quantized(model, None, tmp_path / "out", found)
    assert read_grids(tmp_path / "out" / "quantization.json") == {"model.embed_tokens": grid_of(6, 16)}
    with pytest.raises(ValueError, match="is rounded to 6 bits in groups of 16 already"):
        quantize_(model, tables=grid_of(8))
