from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cur._lib.versions import versions
from cur.integrations.compress import compress
from cur.integrations.model.size import Size, model_size
from cur.integrations.plan.config import CompressConfig
from cur.integrations.report.card import model_card
from cur.integrations.report.data import CompressionReport
from cur.integrations.report.divergence import Divergence


@pytest.fixture
def report(llama: PreTrainedModel, windows: torch.Tensor) -> CompressionReport:
    return compress(llama, windows, CompressConfig(layers=2, rank=6))


def test_json_round_trip(report: CompressionReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    assert CompressionReport.load(tmp_path / "report.json") == report
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_what_was_compared_is_part_of_the_report(report: CompressionReport, llama: PreTrainedModel) -> None:
    assert "divergence" not in report.to_dict()
    figures = {"before, held-out": 10.0, "after, held-out": 12.34}
    for kl in ((0.1, 0.3), (0.2,)):
        same = tuple(0.5 for _ in kl)
        found = Divergence(
            kl=kl,
            same=same,
            perplexity=12.34,
            reference_perplexity=10.0,
            tokens=48,
            seconds=1.0,
            precision="float32",
        )
        compared = replace(report, divergence=found, perplexity=figures)
        data = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
        assert CompressionReport.from_dict(data) == compared
        assert list(data).index("divergence") < list(data).index("perplexity")
        card = model_card(llama, compared)
        mean = "0.2" if len(kl) == 1 else "0.2 ± 1.271"
        row = f"| KL divergence from the dense model, held-out | | {mean} nats per token |"
        places = [card.find(part) for part in (row, "| Same most likely token", "| perplexity, held-out | 10.00 |")]
        assert -1 < places[0] < places[1] < places[2]
        assert ("Student's t" in card) == (len(kl) > 1)
        with pytest.raises(ValueError, match="the report is malformed"):
            CompressionReport.from_dict({**data, "divergence": {"mean": 1.0}})


def test_stages_are_timed(report: CompressionReport) -> None:
    assert list(report.seconds) == ["calibrate", "plan", "decompose", "outputs", "swap"]
    assert all(value >= 0 for value in report.seconds.values())
    assert sum(layer.seconds for layer in report.layers) <= report.seconds["decompose"]


def test_totals_are_the_sums_of_the_layers(report: CompressionReport) -> None:
    assert report.plan.parameters == sum(layer.parameters_after for layer in report.layers)
    assert report.plan.dense_parameters == sum(layer.parameters_before for layer in report.layers)
    assert report.versions == versions()
    assert {"python", "torch", "transformers"} <= set(report.versions)


def test_size_counts_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("index", torch.zeros(2, dtype=torch.int64))
    assert model_size(model) == Size(parameters=9, bytes=9 * 4 + 2 * 8)


def test_malformed_reports(report: CompressionReport, tmp_path: Path) -> None:
    data = report.to_dict()
    with pytest.raises(ValueError, match="unknown fields: colour"):
        CompressionReport.from_dict({**data, "colour": "blue"})
    with pytest.raises(ValueError, match="the report is malformed"):
        CompressionReport.from_dict({key: value for key, value in data.items() if key != "layers"})
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CompressionReport.load(tmp_path / "report.json")


def test_the_card_names_the_base_model_only_when_the_hub_has_it(
    report: CompressionReport, llama: PreTrainedModel
) -> None:
    named = replace(report, plan=replace(report.plan, model="someone/some-model"))
    assert "base_model: someone/some-model\n" in model_card(llama, named)
    local = replace(report, plan=replace(report.plan, model="/somewhere/model"))
    assert "base_model" not in model_card(llama, local)
    assert "base_model" not in model_card(llama)


def test_a_directory_named_like_a_repository_is_no_base_model_of_the_card(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    report = compress(llama, windows, CompressConfig(layers=1, rank=4))
    plan = replace(report.plan, model="org/name")
    here = replace(report, plan=plan, source="/somewhere/org/name")
    assert "base_model" not in model_card(llama, here)
    assert "base_model: org/name" in model_card(llama, replace(here, source="org/name"))
