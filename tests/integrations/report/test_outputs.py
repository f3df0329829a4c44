from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, activations

from cur.bounds import LIPSCHITZ
from cur.integrations import CompressConfig, compress
from cur.integrations.report.outputs import activation_of, spectral_norm_bound
from tests.models import batch, make

FUNCTIONS = {
    "silu": [nn.SiLU(), activations.SiLUActivation(), activations.QuickGELUActivation()],
    "gelu": [nn.GELU(), activations.GELUActivation()],
    "gelu_tanh": [
        nn.GELU(approximate="tanh"),
        activations.NewGELUActivation(),
        activations.FastGELUActivation(),
        activations.GELUTanh(),
    ],
    "relu": [nn.ReLU()],
    "tanh": [nn.Tanh()],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constants_hold_for_the_activations_of_models(name: str) -> None:
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    for function in FUNCTIONS[name]:
        assert activation_of(function) == name
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        steepest = float(slope.abs().max())
        assert 0.999 * LIPSCHITZ[name] <= steepest <= LIPSCHITZ[name]
    assert activation_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("kind", "following"), [("llama", "silu"), ("gpt2", "gelu_tanh"), ("opt", "relu")])
def test_the_change_is_that_of_the_layer_and_obeys_the_theorem(
    kind: str, following: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model(kind)
    dense = copy.deepcopy(model)
    targets = {"llama": ("q_proj", "gate_proj"), "gpt2": ("c_attn", "c_fc"), "opt": ("q_proj", "fc1")}[kind]
    report = compress(model, windows, CompressConfig(layers=2, rank=6, targets=targets, batch_size=4))
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in report.layers:
        part = dense.get_submodule(layer.name)
        part.register_forward_hook(lambda _, args, out, name=layer.name: kept.update({name: (args[0], out)}))
    with torch.no_grad():
        dense(windows[:4])  # the first batch of the calibration
    act = {"silu": nn.functional.silu, "gelu_tanh": activations.NewGELUActivation(), "relu": nn.functional.relu}
    assert report.layers
    for layer in report.layers:
        assert layer.output is not None
        first = layer.name.endswith(targets[0])
        assert layer.output.activation == ("identity" if first else following)
        function = (lambda value: value) if first else act[following]
        x, y = (value.reshape(-1, value.shape[-1]) for value in kept[layer.name])
        with torch.no_grad():
            other = model.get_submodule(layer.name)(x)
            change = (function(y) - function(other)).norm(dim=1)
        assert layer.output.change == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
        assert layer.output.size == pytest.approx(float(function(y).norm(dim=1).square().mean().sqrt()), rel=1e-4)
        assert 0 < layer.output.change <= layer.output.bound
        assert 0 < layer.output.worst <= 1


def test_padding_counts_for_nothing() -> None:
    fed = batch("bert", count=4)
    fed["attention_mask"][:, 14:] = 0
    short = {key: value[:, :14] for key, value in fed.items()}
    reports = [
        compress(make("bert"), [given], CompressConfig(layers=2, rank=6, targets=("intermediate.dense",)))
        for given in (fed, short)
    ]
    assert reports[0].layers
    for one, other in zip(reports[0].layers, reports[1].layers, strict=True):
        assert one.output is not None
        assert other.output is not None
        assert one.output.change == pytest.approx(other.output.change, rel=1e-3)
        assert one.output.activation == "gelu"


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_norms_are_bounded_closely(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-20, 1e10):
        E = scale * torch.randn(shape, dtype=dtype, generator=generator)
        exact = float(torch.linalg.matrix_norm(E.double(), 2))
        assert exact <= spectral_norm_bound(E) <= exact * (1 + 1e-9)
    assert spectral_norm_bound(torch.zeros(shape, dtype=dtype)) == 0
