"""Networks of images, whose stages have widths of their own, in memory and block by block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from cur.integrations import BudgetConfig, CompressConfig, compress, load_model, save
from cur.integrations.blockwise import compress_blockwise, load_streamed
from cur.integrations.model.blocks import chain_fault
from cur.integrations.model.targets import block_stacks

SIDE = 32


def _swin() -> hf.SwinConfig:
    return hf.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[2, 2, 3], num_heads=[2, 2, 2], window_size=4, num_labels=5
    )


def _decoder() -> Any:
    config = hf.BartConfig(
        vocab_size=40,
        d_model=16,
        decoder_layers=3,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        is_decoder=True,
        add_cross_attention=True,
    )
    config.is_encoder_decoder = False
    return hf.BartForCausalLM(config)


def _reading() -> Any:
    encoder = hf.SwinModel(_swin())
    model = hf.VisionEncoderDecoderModel(encoder=encoder, decoder=_decoder())
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


NETWORKS: dict[str, Callable[[], Any]] = {
    "stages in modules": lambda: hf.SwinForImageClassification(_swin()),
    "stages in lists": lambda: hf.PvtForImageClassification(
        hf.PvtConfig(
            image_size=SIDE,
            depths=[2, 2, 1],
            num_encoder_blocks=3,
            hidden_sizes=[8, 16, 24],
            num_attention_heads=[1, 2, 2],
            sequence_reduction_ratios=[4, 2, 1],
            patch_sizes=[4, 2, 2],
            strides=[4, 2, 2],
            mlp_ratios=[2, 2, 2],
            num_labels=5,
        )
    ),
    "channels first": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            num_stages=3, hidden_sizes=[8, 16, 24], depths=[2, 3, 2], layer_scale_init_value=1.0, num_labels=5
        )
    ),
    "a block that changes the width": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[3, 3], layer_type="bottleneck", num_labels=5)
    ),
    "one list of all widths": lambda: hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE, num_labels=5)
    ),
    "a table that is read": lambda: hf.Siglip2ForImageClassification(
        hf.Siglip2Config(
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_patches": 16,
                "patch_size": 4,
            },
            num_labels=5,
        )
    ),
    "an encoder of stages": _reading,
}


def network(name: str) -> Any:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for parameter in model.parameters():  # the initial scale leaves so small a model nearly linear
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:  # else signals die out on the way
        norm.momentum = 1.0
    if norms:
        model.train()(**batch(name))
    return model.eval()


def batch(name: str, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "a table that is read":
        return {
            "pixel_values": torch.randn(count, 16, 48, generator=generator),
            "pixel_attention_mask": torch.ones(count, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((count, 2), 4),
        }
    images = {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=generator)}
    if name == "an encoder of stages":
        images["labels"] = torch.randint(3, 40, (count, 9), generator=generator)
    return images


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_chosen_in_memory_and_block_by_block(name: str, tmp_path: Path) -> None:
    network(name).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model").model
    parts = [batch(name), batch(name, 3)]
    config = CompressConfig(layers=2, targets="all-linear", rank=3)
    whole = compress(model, parts, config)
    inner = [block for stack in block_stacks(network(name)) for block, _ in stack][1:-1]
    chosen = {block for block in inner if any(layer.name.startswith(f"{block}.") for layer in whole.layers)}
    assert len(chosen) == 2
    streamed = load_streamed(tmp_path / "model")
    same = compress_blockwise(streamed, parts, tmp_path / "parts", config)
    for one, other in zip(whole.layers, same.layers, strict=True):
        assert (one.name, one.rank, one.rows, one.columns) == (other.name, other.rank, other.rows, other.columns)
        assert one.output is not None
    save(model, None, tmp_path / "whole", report=whole)
    loaded = [type(model).from_pretrained(tmp_path / place) for place in ("whole", "parts")]
    outputs = [each(**parts[0]).logits for each in (model, *loaded)]
    largest = float(outputs[0].detach().abs().max())
    for other in outputs[1:]:  # what is mapped from files lies elsewhere in memory, where sums are ordered otherwise
        assert torch.allclose(other, outputs[0], rtol=0, atol=1e-5 * largest)
    assert not torch.allclose(outputs[0], network(name)(**parts[0]).logits, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("name", ["stages in modules", "stages in lists", "channels first", "an encoder of stages"])
def test_layers_are_fitted_along_the_stages(name: str) -> None:
    """Each gets what compressed ones in the stages before it give, so that the output is nearer to the dense one."""
    parts = [batch(name, 8)]
    model = network(name)
    assert chain_fault(model, parts[0]) is None
    wanted = model(**parts[0]).logits.detach()
    errors = []
    for correction in (0.0, 1.0):
        model = network(name)
        budget = BudgetConfig(keep=0.6, own_text=0, gradients=False, correction=correction)
        report = compress(model, parts, budget)
        assert not report.notes or not any("fitted" in note for note in report.notes)
        errors.append(float((model(**parts[0]).logits.detach() - wanted).norm()))
    assert errors[1] < errors[0]


def test_networks_with_no_linear_layer_in_their_blocks_are_refused() -> None:
    model = hf.BitForImageClassification(hf.BitConfig(embedding_size=32, hidden_sizes=[128, 128], depths=[1, 1]))
    with pytest.raises(ValueError, match=r"has no stack of blocks .* that hold linear layers"):
        compress(model, [batch("stages in modules")], CompressConfig(targets="all-linear"))
