from __future__ import annotations

from pathlib import Path

import pytest

from cur.integrations import CompressConfig, compress, save
from cur.integrations.model.size import model_size
from cur.integrations.store.inspect import CheckpointSummary, LayerSummary, summarize
from tests.models import FAMILIES, batch, make


def test_layouts_keep_different_counts_of_the_same_function() -> None:
    # The paper's setting on Llama-3.1-8B: query, key and gate of ten blocks, r = 256.
    shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096)}
    layers = tuple(
        LayerSummary(name=f"model.layers.{block}.{name}", shape=shape, layout="cur", rank=256, dtype="BF16")
        for block in range(10, 20)
        for name, shape in shapes.items()
    )
    summary = CheckpointSummary(
        directory="x", format_version=1, layers=layers, parameters=1, dense_parameters=1, file_bytes=1
    )
    counts = {"cur": 83_230_720, "folded": 81_264_640, "interpolative": 79_298_560}
    assert {layout: summary.in_layout(layout) for layout in counts} == counts
    assert summary.to_dict()["layouts"] == counts


@pytest.mark.parametrize(("name", "buffer"), [("bart", "final_logits_bias"), ("exaone_moe", "e_score_correction_bias")])
def test_buffers_are_no_parameters(name: str, buffer: str, tmp_path: Path) -> None:
    model = make(name)
    compress(model, [batch(name)], CompressConfig(layers=2, targets=FAMILIES[name].targets, rank=5))
    assert any(key.endswith(buffer) for key, _ in model.named_buffers() if key in model.state_dict())
    save(model, None, tmp_path / "small")
    assert summarize(tmp_path / "small").parameters == model_size(model).parameters == model.num_parameters()
