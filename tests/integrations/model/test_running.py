"""What models are called with."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from cur.integrations import BudgetConfig, compress
from cur.integrations.model.running import body, model_inputs, taken

SIZES = {"vocab_size": 64, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
BART = hf.BartConfig(**SIZES, d_model=32, max_position_embeddings=64)
PROPHETNET = hf.ProphetNetConfig(
    vocab_size=64,
    hidden_size=32,
    num_decoder_layers=4,
    num_decoder_attention_heads=4,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    is_decoder=True,
    add_cross_attention=False,
)
DECODERS = {"bart": (hf.BartForCausalLM, BART), "prophetnet": (hf.ProphetNetForCausalLM, PROPHETNET)}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_within_a_wrapper_keeps_nothing_between_passes(name: str) -> None:
    """The wrapper says nothing of what it takes; its cache grew with every pass through a block."""
    kind, config = DECODERS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(3, 60, (4, 24))
    assert "attention_mask" in taken(body(model))
    assert model_inputs(body(model), ids)["use_cache"] is False
    report = compress(model, [ids], BudgetConfig(keep=0.7, own_text=0, correction=0.5))
    assert report.layers


def test_a_body_that_does_not_take_tokens_is_run_with_its_head() -> None:
    config = hf.PerceiverConfig(vocab_size=101, d_model=32, d_latents=32, num_latents=4, num_blocks=1)
    config.num_self_attends_per_block, config.max_position_embeddings = 2, 24
    model = hf.PerceiverForMaskedLM(config)
    assert body(model) is model
    assert (
        body(
            hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
        )
        is not model
    )


def test_a_body_that_is_called_with_other_tensors_is_none() -> None:
    """What the model is given would be taken for something else, or not be taken at all."""
    config = hf.PerceiverConfig(
        num_latents=4, d_latents=8, d_model=16, num_blocks=1, num_self_attends_per_block=2, image_size=16
    )
    images = hf.PerceiverForImageClassificationLearned(config)
    assert body(images) is images
    small: dict[str, int] = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
    }
    speech = hf.SpeechT5ForSpeechToText(hf.SpeechT5Config(vocab_size=20, hidden_size=16, **small))
    assert body(speech) is speech
    texts = hf.BartForConditionalGeneration(hf.BartConfig(**SIZES, encoder_layers=1, d_model=32))
    assert body(texts) is texts.model
