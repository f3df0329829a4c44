"""What users may hand in: a clear error, the model as it was, and whatever was written before untouched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur import NumericalError
from cur.integrations import BudgetConfig, CompressConfig, Plan, collect, compress, make_plan, save
from cur.integrations.compress import carry_out_
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.experts import is_experts
from cur.integrations.nn import compressed_modules
from cur.integrations.plan.plan import PlanError
from tests.models import batch, make

SMALL = CompressConfig(layers=2, rank=6)


def untouched(model: PreTrainedModel, before: PreTrainedModel) -> None:
    state = before.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not compressed_modules(model)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")


def test_text_of_one_token(llama: PreTrainedModel) -> None:
    before = copy.deepcopy(llama)
    for config in (SMALL, BudgetConfig(keep=0.8, gradients=False, own_text=0)):
        with pytest.raises(ValueError, match="`batches` holds one token"):
            compress(llama, torch.tensor([[5]]), config)
    untouched(llama, before)


def test_no_text_at_all(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="`calibration` is empty"):
        compress(llama, [], SMALL)


def test_activations_that_overflow_in_bfloat16(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    model = llama.to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    before = copy.deepcopy(model)
    with pytest.raises(NumericalError, match=r"'model\.layers\.1\.mlp\.\w+' is the first to overflow"):
        compress(model, windows, SMALL)
    untouched(model, before)


def test_a_dead_input_feature(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with torch.no_grad():
        for block in llama.model.layers:
            block.input_layernorm.weight[3] = 0.0  # feature 3 of what q, k and v see is zero on every text
            block.post_attention_layernorm.weight[3] = 0.0
    report = compress(llama, windows, replace(SMALL, rank=30, importance="activation", layout="interpolative"))
    assert all(layer.rank <= 31 and 3 not in layer.columns for layer in report.layers)
    with torch.no_grad():
        assert torch.isfinite(llama(windows).logits).all()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("stage", ["calibrate", "decompose"])
def test_an_interrupted_run(stage: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make(kind)
    before = copy.deepcopy(model)

    def interrupt(name: str, done: int, total: int | None) -> None:
        if name == stage and (done or stage == "calibrate"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, [batch(kind)], CompressConfig(layers=2, rank=5, targets="all-linear"), progress=interrupt)
    untouched(model, before)
    assert kind != "mixtral" or sum(map(is_experts, model.modules())) == 4


def test_a_plan_for_another_model(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    model = make_model("llama")
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(5)]
    blocks = [f"model.layers.{index}" for index in range(5)]
    statistics = collect(model, [windows], modules=names, layers=blocks)
    plan = make_plan(model, statistics, replace(SMALL, targets=("q_proj",)))
    other = make_model("gpt2")
    before = copy.deepcopy(other)
    with pytest.raises(PlanError, match="for another model"):
        carry_out_(other, plan, statistics)
    untouched(other, before)
    with pytest.raises(ValueError, match=r"the statistics are of .*: model\.layers\.0\.self_attn\.q_proj is not in"):
        statistics.check(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(precision="float16"), "`precision` must be one of float32, float64, got 'float16'"),
        (lambda data: data.update(seed=-1), "`seed` must be an integer that is at least 0, got -1"),
        (lambda data: data["entries"].append(data["entries"][0]), "more than once"),
    ],
)
def test_an_edited_plan_that_makes_no_sense(
    change: Any, message: str, llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    data = compress(llama, windows, SMALL).plan.to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_failed_run_leaves_an_earlier_checkpoint_alone(
    make_model: Callable[..., PreTrainedModel],
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama")
    save(model, None, tmp_path / "model", report=compress(model, windows, SMALL))
    with torch.no_grad():
        expected = model(windows).logits
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    monkeypatch.setattr("cur.integrations.report.page.report_page", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    other = make_model("llama", seed=1)
    report = compress(other, windows, SMALL)
    with pytest.raises(KeyboardInterrupt):
        save(other, None, tmp_path / "model", report=report, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(windows).logits, expected)


def test_statistics_that_are_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    torch.save({"square_sums": {}}, path)  # a pickle is refused, not opened
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(path)
