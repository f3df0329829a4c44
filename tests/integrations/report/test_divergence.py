from __future__ import annotations

import copy
import gc
import json
import math
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from cur import NumericalError
from cur.integrations import CompressConfig, Divergence, Reference, compress, divergence, perplexity
from cur.integrations.report import divergence as module
from cur.integrations.report import endings

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# Families whose logits are not those of the head.
SCALED: dict[str, tuple[type, dict[str, Any]]] = {
    "capped": (hf.Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "multiplied": (hf.CohereConfig, {"logit_scale": 0.3}),
    "divided": (hf.GraniteConfig, {"logits_scaling": 7.0}),
}


def pair_of(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    config, options = SCALED[kind]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config(**SIZES, **options)).eval()
        nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
        models.append(model)
    return models[0], models[1]


@pytest.fixture
def other(causal_model: PreTrainedModel) -> PreTrainedModel:
    """The same model with other numbers, so that it predicts something else."""
    changed = copy.deepcopy(causal_model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return changed


@torch.no_grad()
def by_definition(model: PreTrainedModel, reference: PreTrainedModel, windows: torch.Tensor) -> tuple[Any, Any]:
    divergences, shares = [], []
    for window in windows:
        p, q = (each(input_ids=window[None]).logits[0].double().log_softmax(-1) for each in (reference, model))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        shares.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    return pytest.approx(divergences, rel=2e-4), shares


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_the_definition_and_not_that_of_the_arguments_exchanged(
    causal_model: PreTrainedModel, other: PreTrainedModel, windows: torch.Tensor, batch_size: int
) -> None:
    found = divergence(other, causal_model, windows, batch_size=batch_size)
    expected, same = by_definition(other, causal_model, windows)
    exchanged, _ = by_definition(causal_model, other, windows)
    assert list(found.kl) == expected
    assert list(found.kl) != exchanged
    assert list(found.same) == same
    assert found.tokens == windows.numel()
    assert found.windows == 6
    assert found.perplexity == pytest.approx(perplexity(other, windows).value, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(perplexity(causal_model, windows).value, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(causal_model: PreTrainedModel, windows: torch.Tensor) -> None:
    found = divergence(causal_model, causal_model, windows)
    assert found.kl == (0.0,) * 6
    assert (found.mean, found.half_width, found.upper) == (0.0, 0.0, 0.0)
    assert (found.same_top, found.same_top_half_width) == (1.0, 0.0)
    assert found.perplexity == found.reference_perplexity


@pytest.mark.parametrize("kind", SCALED)
def test_logits_that_are_scaled_or_capped(kind: str, windows: torch.Tensor) -> None:
    dense, other = pair_of(kind)
    found = divergence(other, dense, windows)
    assert (list(found.kl), list(found.same)) == by_definition(other, dense, windows)
    assert divergence(dense, dense, windows).mean == 0.0
    # Hidden states are kept, and not logits.
    assert Reference(dense, windows).states[0].shape == (24, 32)


def test_chunks_of_logits_do_not_matter(
    causal_model: PreTrainedModel, other: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divergence(other, causal_model, windows).kl
    sizes: list[int] = []
    compared = module._compared
    monkeypatch.setattr(module, "_compared", lambda p, q, after: (sizes.append(len(q)), compared(p, q, after))[1])
    monkeypatch.setattr(endings, "_CHUNK", 101 * 4 * 5)
    assert divergence(other, causal_model, windows, batch_size=3).kl == pytest.approx(whole, rel=1e-4)
    assert max(sizes) == 5
    assert sum(sizes) == windows.numel()


def test_the_interval_is_students_over_windows() -> None:
    found = Divergence(
        kl=(1.0, 2.0, 3.0),
        same=(0.5, 0.5, 0.8),
        perplexity=9.0,
        reference_perplexity=8.0,
        tokens=30,
        seconds=1.0,
        precision="float32",
    )
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302652729 / math.sqrt(3))
    assert found.upper == found.mean + found.half_width
    assert found.same_top == pytest.approx(0.6)
    assert found.same_top_half_width == pytest.approx(4.302652729 * 0.1)
    lines = found.lines()
    assert lines[0] == "KL divergence from the reference: 2 ± 2.484 nats per token"
    assert lines[1] == "Same most likely token: 60.0 ± 43.0 %"
    assert lines[2] == "Perplexity: 9.00, of the reference 8.00"
    assert str(found).startswith("; ".join(lines) + ". Predictions of 30 tokens in 3 windows were compared; ± is half")


def test_one_window_has_no_interval(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    found = divergence(llama, llama, windows[:1])
    assert found.half_width == found.upper == math.inf
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["half_width"] is None
    assert "±" not in str(found)
    assert Divergence.from_dict(data) == found


def test_figures_are_read_again(causal_model: PreTrainedModel, other: PreTrainedModel, windows: torch.Tensor) -> None:
    found = divergence(other, causal_model, windows)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert next(iter(data)) == "mean"
    assert data["mean"] == found.mean
    assert Divergence.from_dict(data) == found


def test_a_model_that_is_compressed_in_place_is_compared_with_what_it_was(
    causal_model: PreTrainedModel, windows: torch.Tensor
) -> None:
    dense = copy.deepcopy(causal_model)
    reference = Reference(causal_model, windows)
    assert reference.compare(causal_model).mean == 0.0
    compress(causal_model, windows, CompressConfig(layers=2, targets="all-linear", rank=4))
    found = reference.compare(causal_model)
    assert found.mean > 0
    assert found.kl == divergence(causal_model, dense, windows).kl


def test_the_rest_of_the_reference_need_not_be_in_memory(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    for make in (lambda: make_model("llama"), lambda: pair_of("capped")[0]):
        model = make()
        block = weakref.ref(model.model.layers[0])
        same = copy.deepcopy(model)
        reference = Reference(model, windows)
        del model
        gc.collect()
        assert block() is None
        assert reference.compare(same).mean == 0.0


def test_a_head_that_is_changed_in_place_is_noticed(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    reference = Reference(llama, windows)
    llama.lm_head.weight.data[3, 3] += 1e-3
    with pytest.raises(ValueError, match=r"`reference` must have the output head .* that of LlamaForCausalLM was"):
        reference.compare(llama)


def test_both_are_run_in_one_precision(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    reference = Reference(llama, windows, precision="bfloat16")
    assert (reference.compare(llama).mean, reference.compare(llama).precision) == (0.0, "bfloat16")
    assert reference.compare(llama, precision="float32").mean > 0


def test_windows_are_those_of_the_reference(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    reference = Reference(llama, windows)
    assert divergence(llama, reference).mean == divergence(llama, reference, windows).mean == 0.0
    with pytest.raises(ValueError, match="`windows` must be those that the reference was made of, got others"):
        divergence(llama, reference, windows + 1)
    with pytest.raises(ValueError, match="`windows` must be given with a reference that is a model"):
        divergence(llama, llama)


def test_what_cannot_be_compared_is_refused_before_any_pass(
    make_model: Callable[..., PreTrainedModel], llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    larger = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "vocab_size": 110}))
    calls: list[int] = []
    for model in (llama, larger):
        model.register_forward_hook(lambda *_: calls.append(1))
        model.model.register_forward_hook(lambda *_: calls.append(1))
    sentence = "`reference` must predict the tokens that the model does, .* of 101, LlamaForCausalLM has one of 110; c"
    with pytest.raises(ValueError, match=sentence):
        divergence(llama, larger, windows)
    for family, name in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        wrong = make_model(family)
        for pair in ((wrong, llama), (llama, wrong)):
            with pytest.raises(TypeError, match=f"need a causal language model, {name} is not one"):
                divergence(*pair, windows)
    with pytest.raises(ValueError, match="token 101, outside the model's vocabulary of 101"):
        divergence(llama, llama, windows.clamp(min=101))
    assert not calls


def test_logits_of_more_than_the_last_state_are_kept_in_files(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(type(llama)):  # type: ignore[misc]
        """Logits that depend on the text as well."""

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            output = super().forward(input_ids=input_ids, **options)
            output.logits[:, 1:, :5] += input_ids[:, :-1, None]
            return output

    llama.__class__ = Shifted
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 2
    reference = Reference(llama, windows)
    assert len(list(tmp_path.iterdir())) == 6
    assert reference.compare(llama).mean == 0.0
    found = reference.compare(other, batch_size=4)
    assert (list(found.kl), list(found.same)) == by_definition(other, llama, windows)
    del reference
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[0, 0] = torch.inf
    name = "the weight 'model.layers.3.mlp.up_proj.weight' holds NaN or infinity"
    with pytest.raises(NumericalError, match=f"the hidden states of window 0 are not finite; {name}"):
        divergence(llama, broken, windows)
    with pytest.raises(NumericalError, match=f"the divergence of window 0 is not finite; {name}"):
        divergence(broken, llama, windows)


def test_tokens_without_a_chance_count_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    found = module._compared(logits, logits.flip(0) * torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 1]))
    assert found.isfinite().all()
    assert (found[0] > 0).all()


def test_progress_is_told_of_both(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    calls: list[tuple[int, int | None]] = []
    divergence(llama, llama, windows, batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 12), (6, 12), (10, 12), (12, 12)]
