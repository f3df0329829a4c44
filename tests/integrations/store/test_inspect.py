from __future__ import annotations

from cur.integrations.store.inspect import CheckpointSummary, LayerSummary


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
