from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cur.integrations import CompressConfig, compress
from cur.integrations.nn import IntegerGrid
from cur.integrations.quantize import quantize_
from cur.integrations.report.speed import layer_speeds


def test_layers_of_one_kind_are_timed_once(llama: PreTrainedModel, windows: Tensor) -> None:
    compress(llama, windows, CompressConfig(layers=2, rank=8, targets=("q_proj",)))
    before = layer_speeds(llama)
    assert [(speed.layout, speed.rank, speed.grid, speed.tokens) for speed in before] == [
        ("cur", "8", "", 1),
        ("cur", "8", "", 512),
    ]
    quantize_(llama, grid=IntegerGrid(4, 16, symmetric=False))
    state = {key: value.clone() for key, value in llama.state_dict().items()}
    speeds = layer_speeds(llama, tokens=(3,))
    assert {speed.layout for speed in speeds} == {"cur", "whole"}
    assert sum(speed.count for speed in speeds) == 7 * len(llama.model.layers)
    for speed in speeds:
        assert speed.grid == "4 bits in groups of 16"
        assert speed.kernels == ("multiplied out",)  # what is fastest in tests
        assert min(speed.seconds, speed.dense) > 0
        assert speed.to_dict()["kernels"] == ["multiplied out"]
    assert all(torch.equal(value, state[key]) for key, value in llama.state_dict().items())
