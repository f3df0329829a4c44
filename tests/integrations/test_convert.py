from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur.integrations import CompressConfig, compress, save
from cur.integrations.convert import convert_
from cur.integrations.layouts import choose_layout
from cur.integrations.nn import LAYOUTS, CURLinear, FoldedLinear, InterpolativeLinear, compressed_modules
from cur.integrations.report import model_size

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "inference.json"


def logits(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows).logits
    return found


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_the_function_stays_the_same(
    first: str, last: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model("gpt2").double()
    config = CompressConfig(layers=2, rank=6, targets=("c_attn", "c_proj"), layout=first, precision="float64")
    compress(model, windows, config)
    expected = logits(model, windows)
    assert set(convert_(model, last).values()) == {last}
    assert {layer.layout for layer in compressed_modules(model).values()} == {last}
    found = logits(model, windows)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    save(model, None, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again, windows), found)


def test_auto_serves_the_purpose(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama, windows, CompressConfig(layers=2, rank=6, layout="cur"))
    before = model_size(llama).parameters
    convert_(llama)
    assert {type(layer) for layer in compressed_modules(llama).values()} == {FoldedLinear}
    assert model_size(llama).parameters < before
    convert_(llama, purpose="training")
    assert {type(layer) for layer in compressed_modules(llama).values()} == {CURLinear}


def test_auto_takes_what_was_measured_to_be_faster_than_dense() -> None:
    measured = json.loads(RESULTS.read_text())["layers"]
    assert measured
    for row in measured:
        m, n = (int(side) for side in row["shape"].split(" x "))
        if row["layout"] == choose_layout((m, n), rank=row["rank"]) and m * n >= 1 << 20:
            assert row["speed-up"] > 1.0, row


def test_auto_in_a_configuration(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    for options, kind in (
        ({}, FoldedLinear),
        ({"purpose": "training"}, CURLinear),
        ({"rank": 31}, InterpolativeLinear),
    ):
        model = make_model("llama")
        compress(model, windows, CompressConfig(**{"layers": 2, "rank": 6, "layout": "auto", **options}))
        found = {type(layer) for layer in compressed_modules(model).values()}
        assert kind in found
        assert len(found) == 1 or options == {"rank": 13}


def test_refusals(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="`model` has no compressed layers"):
        convert_(llama)
    with pytest.raises(ValueError, match="`layout` must be one of auto, cur, folded, interpolative, got 'lu'"):
        convert_(llama, "lu")
    with pytest.raises(ValueError, match="`purpose` must be one of inference, training, got 'fun'"):
        convert_(llama, purpose="fun")
