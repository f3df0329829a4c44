"""A model taken off its grid computes the same, and is on no grid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.off_grid import found_again, leave_grid_, share_on_grid

WIDTH, INNER = 96, 160


@pytest.fixture
def shipped() -> LlamaForCausalLM:
    """A Llama with grouped heads and biases, whose weights lie on a grid and whose norms have gains."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=61,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            nn.init.uniform_(norm.weight, 0.3, 2.0)
        for layer in linear(block):
            layer.weight.data = on_grid(layer.weight.data)
            nn.init.normal_(layer.bias)
    return model


def linear(block: nn.Module) -> list[nn.Linear]:
    return [layer for layer in block.modules() if isinstance(layer, nn.Linear)]


def on_grid(W: torch.Tensor) -> torch.Tensor:
    """Round as the GGUF type Q4_1 does: a step and a least number in half precision for each 32."""
    parts = W.view(len(W), -1, 32)
    least = parts.amin(-1, keepdim=True).half().float()
    step = ((parts.amax(-1, keepdim=True) - least) / 15).half().float()
    return (((parts - least) / step).round().clamp(0, 15) * step + least).view(W.shape)


def test_the_function_stays(shipped: LlamaForCausalLM) -> None:
    model = copy.deepcopy(shipped)
    leave_grid_(model)
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = shipped(tokens).logits, model(tokens).logits
    torch.testing.assert_close(
        after, before, rtol=0, atol=100 * torch.finfo(torch.float32).eps * float(before.abs().max())
    )
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            assert torch.equal(norm.weight, torch.ones(WIDTH))
    for name in ("embed_tokens", "norm"):
        assert torch.equal(model.model.get_submodule(name).weight, shipped.model.get_submodule(name).weight)
    assert torch.equal(model.lm_head.weight, shipped.lm_head.weight)


def test_every_layer_leaves_its_grid(shipped: LlamaForCausalLM) -> None:
    layers = [layer for block in shipped.model.layers for layer in linear(block)]
    assert len(layers) == 14
    assert {share_on_grid(layer.weight) for layer in layers} == {1.0}
    leave_grid_(shipped)
    assert {share_on_grid(layer.weight) for layer in layers} == {0.0}


def test_a_few_percent_leave_a_grid_that_can_be_found_again(shipped: LlamaForCausalLM) -> None:
    slightly = copy.deepcopy(shipped)
    leave_grid_(slightly, spread=0.05)
    leave_grid_(shipped)
    normal = torch.randn(WIDTH, INNER, generator=torch.Generator().manual_seed(0))
    for layers in zip(*(linear(model.model.layers[0]) for model in (shipped, slightly)), strict=True):
        assert found_again(layers[0].weight) > 0.93 * found_again(normal)
    down = slightly.model.layers[0].mlp.down_proj
    assert share_on_grid(down.weight) == 0.0
    assert found_again(down.weight) < 0.7 * found_again(normal)


def test_the_seed_decides(shipped: LlamaForCausalLM) -> None:
    models = [copy.deepcopy(shipped) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        leave_grid_(model, seed=seed)
    one, same, other = (model.model.layers[1].mlp.up_proj.weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_grid_is_known_by_whole_steps_of_few_numbers() -> None:
    steps = torch.arange(32.0) % 16
    assert share_on_grid((0.37 * steps - 1.1)[None]) == 1.0
    assert share_on_grid((0.37 * (2 * steps) - 1.1)[None]) == 1.0
    assert share_on_grid((0.37 * torch.arange(32.0))[None]) == 0.0  # twice as many numbers
    assert share_on_grid(torch.full((1, 32), 0.2)) == 1.0
    moved = 0.37 * steps - 1.1
    moved[5] += 1e-4
    assert share_on_grid(torch.stack([moved, 0.37 * steps])) == 0.5
