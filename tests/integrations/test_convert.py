from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cur.integrations import (
    CompressConfig,
    collect,
    compress,
    decoder_layers,
    linear_modules,
    make_plan,
    save,
)
from cur.integrations.convert import convert_
from cur.integrations.model.size import model_size
from cur.integrations.nn import compressed_modules, factored
from cur.integrations.plan.layouts import choose_layout, fastest_rank

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "inference.json"


def logits(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows).logits
    return found


@pytest.mark.parametrize("last", factored())
@pytest.mark.parametrize("first", factored())
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


@pytest.fixture
def wide() -> PreTrainedModel:
    """Return a model of layers that are large enough to be faster factored: 640 x 640, 320 x 640 and 1280 x 640."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 640, "intermediate_size": 1280, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, num_hidden_layers=3, **sizes)).eval()


def layouts(model: PreTrainedModel) -> dict[str, str]:
    return {name.rpartition(".")[2]: layer.layout for name, layer in compressed_modules(model).items()}


def test_auto_serves_the_purpose(wide: PreTrainedModel, windows: torch.Tensor) -> None:
    targets = ("q_proj", "k_proj", "o_proj", "gate_proj")
    compress(wide, windows, CompressConfig(layers=1, rank=130, targets=targets, layout="cur"))
    before = model_size(wide).parameters
    faster = {"q_proj": "folded", "o_proj": "folded", "gate_proj": "interpolative"}
    convert_(wide)
    assert layouts(wide) == faster | {"k_proj": "cur"}  # of which no layout is
    assert model_size(wide).parameters < before
    convert_(wide, purpose="training")
    assert set(layouts(wide).values()) == {"cur"}


def test_auto_leaves_dense_what_no_layout_makes_faster(wide: PreTrainedModel, windows: torch.Tensor) -> None:
    statistics = collect(
        wide,
        [windows],
        modules=linear_modules(wide, "all-linear", blocks=range(3)),
        layers=[name for name, _ in decoder_layers(wide)],
    )
    for options in ({"rank": 300}, {"energy": 0.999}):
        config = CompressConfig(layers=1, layout="auto", **options)
        found = {entry.name.rpartition(".")[2]: entry for entry in make_plan(wide, statistics, config).entries}
        assert set(found) == {"q_proj", "gate_proj"}
        for entry in found.values():
            assert entry.layout == choose_layout(entry.shape, rank=entry.rank)
    training = make_plan(wide, statistics, CompressConfig(layers=1, layout="auto", rank=90, purpose="training"))
    assert [(entry.layout, entry.rank) for entry in training.entries] == [("cur", 90)] * 3


def test_auto_finds_nothing_to_do_in_a_small_model(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`layout` 'auto' leaves all 6 layers dense .*name a layout"):
        compress(llama, windows, CompressConfig(layers=2, rank=6, layout="auto"))
    compress(llama, windows, CompressConfig(layers=2, rank=6, layout="cur"))
    assert set(convert_(llama).values()) == {"cur"}


@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (1024, 4096), (4096, 1024), (2048, 2048), (14336, 4096)])
def test_every_rank_up_to_the_fastest_has_a_layout(shape: tuple[int, int]) -> None:
    limit = fastest_rank(shape)
    assert 0 < limit < min(shape)
    assert all(choose_layout(shape, rank=rank) for rank in range(1, limit + 1))
    assert all(choose_layout(shape, rank=rank) is None for rank in range(limit + 1, min(shape) + 1))


def test_auto_takes_what_was_measured_to_be_faster_than_dense() -> None:
    measured = json.loads(RESULTS.read_text())["layers"]
    assert measured
    for row in measured:
        m, n = (int(side) for side in row["shape"].split(" x "))
        if row["layout"] == choose_layout((m, n), rank=row["rank"]):
            assert row["speed-up"] > 1.0, row


def test_refusals(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="`model` has no factored layers"):
        convert_(llama)
    with pytest.raises(ValueError, match="`layout` must be one of auto, cur, folded, interpolative, got 'lu'"):
        convert_(llama, "lu")
    with pytest.raises(ValueError, match="`purpose` must be one of inference, training, got 'fun'"):
        convert_(llama, purpose="fun")
