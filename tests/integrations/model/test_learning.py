"""What may learn of a compressed model, and that a loop over it does learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from cur.integrations import BudgetConfig, CompressConfig, compress, trainable
from cur.integrations.nn import compressed_modules, factored
from cur.integrations.quantize import quantize_


def loop(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Train as the how-to page says."""
    model.requires_grad_(False)
    learning = trainable(model)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layout", [*factored(), "neurons", "experts"])
def test_a_loop_over_it_trains_and_changes_nothing_else(
    layout: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model("mixtral" if layout == "experts" else "llama")
    if layout == "neurons":
        compress(model, windows, BudgetConfig(keep=0.6, own_text=0))
    elif layout == "experts":
        compress(model, windows, CompressConfig(layers=2, rank=5, targets=("experts.down_proj",)))
    else:
        compress(model, windows, CompressConfig(layers=2, rank=6, targets=("q_proj", "down_proj"), layout=layout))
    named = dict(model.named_parameters())
    learning = trainable(model)
    assert learning
    assert all(parameter is named[name] for name, parameter in learning.items())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    losses = loop(model, windows)
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}
    assert changed
    assert changed <= learning.keys()


def test_every_layer_that_learns_is_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama, windows, BudgetConfig(keep=0.6, own_text=0))
    layers = compressed_modules(llama)
    assert {layer.layout for layer in layers.values()} >= {"interpolative", "inputs", "outputs"}
    expected = {name for name, layer in layers.items() if layer.layout != "outputs"}
    assert {next(layer for layer in layers if name.startswith(f"{layer}.")) for name in trainable(llama)} == expected


def test_where_nothing_learns_an_error_says_what_to_do(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no compressed layer; compress it first"):
        trainable(llama)
    compress(llama, windows, CompressConfig(layers=1, rank=6, targets=("q_proj",)))
    quantize_(llama)
    with pytest.raises(ValueError, match=r"rounded to int8, of which nothing learns; put an adapter .*, or train"):
        trainable(llama)


def test_layers_before_neurons_alone_do_not_learn(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama, windows, BudgetConfig(keep=0.6, own_text=0))
    outputs = [layer for layer in compressed_modules(llama).values() if layer.layout == "outputs"]
    with pytest.raises(ValueError, match="layouts outputs alone, of which nothing learns; put an adapter"):
        trainable(torch.nn.ModuleList(outputs))


def test_offloaded_layers_are_refused(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    compress(llama, windows, CompressConfig(layers=1, rank=6, targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"q_proj.U.weight of `model` are offloaded"):
        trainable(llama.to("meta"))
