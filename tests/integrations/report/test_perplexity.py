from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from cur import NumericalError
from cur.integrations import perplexity, read_text, token_windows
from cur.integrations.model.loading import LoadedModel
from cur.integrations.report import endings


def by_definition(model: PreTrainedModel, windows: torch.Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for window in windows:
            log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
            total -= sum(float(log_p[i, window[i + 1]]) for i in range(len(window) - 1))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def test_it_is_the_definition(causal_model: PreTrainedModel, windows: torch.Tensor) -> None:
    found = perplexity(causal_model, windows)
    assert found.value == pytest.approx(by_definition(causal_model, windows), rel=1e-5)
    assert found.tokens == 6 * 23
    assert found.windows == 6
    assert found.value == pytest.approx(math.exp(found.nll / found.tokens))
    assert found.seconds > 0
    assert str(found).startswith(f"{found.value:.2f} over 138 tokens in 6 windows")


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_batch_size_does_not_matter(causal_model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> None:
    one = perplexity(causal_model, windows)
    assert perplexity(causal_model, windows, batch_size=batch_size).nll == pytest.approx(one.nll, rel=1e-6)


def test_chunks_of_logits_do_not_matter(
    llama: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(llama, windows).nll
    sizes: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda _, args, __: sizes.append(args[0][..., 0].numel()))
    monkeypatch.setattr(endings, "_CHUNK", 101 * 5)
    assert perplexity(llama, windows, batch_size=3).nll == pytest.approx(whole, rel=1e-6)
    handle.remove()
    # The first two are the trial of a few tokens.
    assert max(sizes[2:]) == 5
    assert sum(sizes[2:]) == 6 * 23


def test_capped_logits_are_seen(windows: torch.Tensor) -> None:
    config = Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight, std=0.5)
    found = perplexity(model, windows)
    assert found.value == pytest.approx(by_definition(model, windows), rel=1e-5)
    model.config.final_logit_softcapping = None
    assert perplexity(model, windows).value > 1.05 * found.value


def test_bfloat16_models_are_scored_in_float32(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    full = perplexity(llama, windows).value
    half = perplexity(llama.to(torch.bfloat16), windows).value
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_modes_are_put_back_and_progress_is_told(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    llama.train()
    calls: list[tuple[int, int | None]] = []
    perplexity(llama, windows, batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert llama.training
    assert llama.model.layers[0].training
    assert calls == [(4, 6), (6, 6)]


def test_dropout_is_off(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    model = make_model("gpt2")
    quiet = perplexity(model, windows).nll
    assert perplexity(model.train(), windows).nll == quiet


def test_only_causal_language_models(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="BertForMaskedLM is not one"):
        perplexity(make_model("bert"), windows)
    with pytest.raises(TypeError, match="LlamaModel is not one"):
        perplexity(make_model("llama").model, windows)
    with pytest.raises(TypeError, match="Linear is not one"):
        perplexity(nn.Linear(2, 2), windows)


def test_bad_windows(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(llama, windows[:, :1])
    with pytest.raises(ValueError, match="token 101, outside the model's vocabulary of 101"):
        perplexity(llama, windows.clamp(min=101))
    with pytest.raises(ValueError, match="token -1, outside"):
        perplexity(llama, windows.clamp(max=-1))
    with pytest.raises(TypeError, match="`windows` must be an integer tensor"):
        perplexity(llama, windows.float())


def test_broken_models_are_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    name = "model.layers.3.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=rf"window 0 is not finite; the weight '{name}.weight' holds NaN"):
        perplexity(llama, windows)


@pytest.mark.real_model
def test_the_real_model_scores_as_published(real_model: LoadedModel, wikitext: Path) -> None:
    windows = token_windows(real_model.tokenizer, read_text(wikitext / "test.txt"), length=1024, count=2)
    found = perplexity(real_model.model, windows)
    assert found.tokens == 2046
    # All 40 windows of the protocol give 21.38; these are the first two of them.
    assert found.value == pytest.approx(17.57, abs=0.02)
