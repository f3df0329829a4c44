"""Compressed models in the hands of other libraries."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cur.integrations import BudgetConfig, CompressConfig, compress, perplexity, save
from cur.integrations.nn import compressed_modules, factored
from cur.integrations.quantize import quantize_
from tests.models import batch, make

CONFIG = CompressConfig(layers=2, rank=6, targets=("q_proj", "gate_proj", "down_proj"))


@contextmanager
def lenient() -> Iterator[None]:
    """Let other libraries warn of their own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows).logits
    return found


@pytest.fixture
def compressed(llama: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
    compress(llama, windows, CONFIG)
    return llama


# ------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("layout", factored())
def test_layers_compile_into_one_graph(
    layout: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model("llama")
    compress(model, windows, CompressConfig(layers=1, rank=6, targets=("gate_proj",), layout=layout))
    layer = next(iter(compressed_modules(model).values()))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with lenient():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_a_compiled_model_computes_the_same(compressed: PreTrainedModel, windows: torch.Tensor) -> None:
    expected = logits(compressed, windows)
    with lenient():
        found = logits(torch.compile(compressed, backend="eager"), windows)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------ training


def test_gradient_checkpointing_changes_no_gradient(compressed: PreTrainedModel, windows: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        compressed.train()
        if checkpointing:
            compressed.activation_checkpointing_enable()
        compressed.zero_grad()
        compressed(windows, labels=windows).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in compressed.named_parameters() if p.grad is not None})
    assert any(".U." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_lora_on_the_cores_alone_is_trained_saved_and_loaded(
    compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    save(compressed, None, tmp_path / "model")
    before = logits(compressed, windows)
    with lenient():
        adapted = peft.get_peft_model(compressed, peft.LoraConfig(r=2, target_modules=["U"], init_lora_weights=True))
        learning = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert len(learning) == 2 * len(compressed_modules(compressed))
        assert all(".U.lora_" in name for name in learning)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            adapted(windows, labels=windows).loss.backward()
            optimizer.step()
        trained = logits(adapted.eval(), windows)
        assert not torch.equal(trained, before)
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
        )
        assert torch.equal(logits(again, windows), trained)
        # Merged, the adapter is in the core, and the model is a compressed model like any other.
        merged = again.merge_and_unload()
    assert torch.allclose(logits(merged, windows), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))
    save(merged, None, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, windows), logits(merged, windows))


def test_lora_on_all_linear_layers_is_around_every_layer_and_in_none(compressed: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    layers = {f"base_model.model.{name}" for name in compressed_modules(compressed)}
    with lenient():
        adapted = peft.get_peft_model(compressed, peft.LoraConfig(r=2, target_modules="all-linear"))
    wrapped = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert layers
    assert layers <= wrapped
    assert not [name for name in wrapped if name.startswith(tuple(f"{layer}." for layer in layers))]


def test_lora_on_named_factors_where_some_layers_keep_neurons(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    compress(llama, windows, BudgetConfig(keep=0.6, own_text=0))
    factors = {name for name, module in llama.named_modules() if name.endswith(".R") and isinstance(module, nn.Linear)}
    assert any(name.endswith("inner.R") for name in factors)
    with lenient():
        adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["R"]))
    wrapped = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {f"base_model.model.{name}" for name in factors}


# ------------------------------------------------------------------------------------------ quantization


def stored_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights, of quantized ones those of their parts."""
    total = 0
    for parameter in module.parameters():
        flatten = getattr(parameter, "__tensor_flatten__", None)
        parts = [getattr(parameter, name) for name in flatten()[0]] if flatten else [parameter]
        total += sum(part.nbytes for part in parts)
    return total


def test_int8_weights_of_the_factors(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    with lenient():
        quantization = pytest.importorskip("torchao.quantization")
    model = make_model("llama").to(torch.bfloat16)
    compress(model, windows, CompressConfig(layers=3, rank=16, targets="all-linear", layout="interpolative"))
    layers = compressed_modules(model)
    factors = {f"{name}.{factor}" for name in layers for factor in ("R", "T")}
    before, score = sum(map(stored_bytes, layers.values())), perplexity(model, windows).value
    with lenient():
        quantization.quantize_(
            model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in factors
        )
        after, quantized = sum(map(stored_bytes, layers.values())), perplexity(model, windows).value
    # One byte for two, and a scale for every row of so short rows.
    assert 0.5 <= after / before <= 0.7
    assert quantized == pytest.approx(score, rel=0.05)
    with capsys.disabled():
        print(f"\nint8 factors: {before} -> {after} bytes, perplexity {score:.2f} -> {quantized:.2f}")


def test_rounded_factors_take_no_adapters_by_themselves(compressed: PreTrainedModel) -> None:
    # They would be merged into a weight that is not stored.
    peft = pytest.importorskip("peft")
    quantize_(compressed)
    with lenient(), pytest.raises(ValueError, match=r"GridLinear.* is not supported"):
        peft.get_peft_model(compressed, peft.LoraConfig(r=2, target_modules=["U"]))


def test_a_model_with_adapters_is_not_rounded(compressed: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    with lenient():
        adapted = peft.get_peft_model(compressed, peft.LoraConfig(r=2, target_modules=["U"]))
        with pytest.raises(
            ValueError, match=r"`model` carries the adapter 'default' at its root \(PeftModel\); merge it"
        ):
            quantize_(adapted)
        with pytest.raises(
            ValueError, match=r"carries the adapter 'default' at .*self_attn.q_proj.U \(Linear\); merge"
        ):
            quantize_(compressed)
        quantize_(adapted.merge_and_unload())


# ------------------------------------------------------------------------------------------ evaluation harness


def test_the_evaluation_harness_scores_a_local_task(compressed: PreTrainedModel, tmp_path: Path) -> None:
    reason = "lm-eval brings 41 packages and half a gigabyte; to run this: pip install -c constraints.txt lm-eval"
    with lenient():
        lm_eval = pytest.importorskip("lm_eval", reason=reason)
        huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=reason)
        tasks = pytest.importorskip("lm_eval.tasks", reason=reason)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 101)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    choices = ["w7", "w8"]
    questions = [{"text": f"w{5 + index} w{9 + index}", "choices": choices, "answer": index % 2} for index in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # JSON is YAML
    save(compressed, tokenizer, tmp_path / "model")
    with lenient():
        model = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", batch_size=2)
        manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(model=model, tasks=["words"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["words"]["acc,none"] <= 1
    # What the harness sums up is what the compressed model says.
    ids = torch.tensor([tokenizer(f"{questions[0]['text']} w7")["input_ids"]])
    expected = float(logits(compressed, ids[:, :-1])[0, -1].log_softmax(-1)[7])
    sample = found["samples"]["words"][0]
    assert math.isclose(float(sample["filtered_resps"][0][0]), expected, rel_tol=1e-4)


# ------------------------------------------------------------------------------------------ transformers' own saving


def test_experts_saved_by_transformers_itself(tmp_path: Path) -> None:
    model = make("mixtral")
    fed = batch("mixtral", count=2)
    compress(model, [batch("mixtral")], CompressConfig(layers=2, rank=5, targets=("experts.gate_up_proj",)))
    with torch.no_grad():
        expected = model(**fed).logits
        model.save_pretrained(tmp_path / "plain")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.equal(again(**fed).logits, expected)
        again.save_pretrained(tmp_path / "twice")
        twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
        assert torch.equal(twice(**fed).logits, expected)
