"""Families that are built otherwise than most, taken from compression to loading: one for each kind of difference."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur.healing import HealingConfig, heal
from cur.healing.blockwise import heal_blockwise
from cur.integrations import BudgetConfig, CompressConfig, CompressionReport, collect, compress, decoder_layers, save
from cur.integrations.blockwise.run import compress_blockwise
from cur.integrations.blockwise.streamed_model import load_streamed
from cur.integrations.files.shards import Shards
from cur.integrations.model import targets
from cur.integrations.model.blocks import ChainError
from cur.integrations.nn import compressed_modules
from cur.integrations.quantize import quantize_
from tests.models import UNUSUAL, batch, make, tokenizer

PAPER = CompressConfig(layers=2, targets="all-linear", rank=6)
BUDGET = BudgetConfig(keep=0.7)


def windows() -> torch.Tensor:
    return batch("llama", count=8)["input_ids"]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=windows()[:2, :12], use_cache=False).logits
    return found


def compressed(name: str, config: CompressConfig | BudgetConfig) -> tuple[PreTrainedModel, CompressionReport]:
    model = make(name)
    report = compress(model, windows(), config)
    assert compressed_modules(model)
    return model, report


@pytest.mark.parametrize("config", [PAPER, BUDGET], ids=["paper", "budget"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_loaded_is_what_was_compressed(
    name: str, config: CompressConfig | BudgetConfig, tmp_path: Path
) -> None:
    model, _ = compressed(name, config)
    found = logits(model)
    assert torch.isfinite(found).all()
    save(model, None, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(loaded), found)


def test_what_blocks_turn_is_the_same_however_the_state_is_laid_out() -> None:
    """Tokens before samples, streams before both: distances are those of the vectors of tokens."""
    model = make("gemma3n_text")
    blocks = decoder_layers(model)
    text = windows()
    found = collect(model, [text], modules=(), layers=[name for name, _ in blocks])
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: seen.append(output)) for _, block in blocks]
    logits(model)
    [hook.remove() for hook in hooks]
    assert seen[0].ndim == 4
    seen.clear()
    hooks = [block.register_forward_hook(lambda _, __, output: seen.append(output)) for _, block in blocks]
    with torch.no_grad():
        model(input_ids=text, use_cache=False)
    [hook.remove() for hook in hooks]
    one, two = (state[:, :, -1].transpose(0, 1).flatten(1).double() for state in seen[:2])
    angle = torch.acos(torch.nn.functional.cosine_similarity(one, two)) / torch.pi
    assert found.angular[1] == pytest.approx(float(angle.mean()), rel=1e-5)


def test_a_stack_that_is_gone_through_several_times_is_measured_in_every_pass() -> None:
    model = make("hrm_text")
    passes: list[int] = []
    name, block = decoder_layers(model)[0]
    with torch.no_grad():
        hook = block.register_forward_hook(lambda *_: passes.append(1))
        model(input_ids=windows(), use_cache=False)
        hook.remove()
    assert len(passes) > 1
    found = collect(
        model, [windows()], modules=[f"{name}.self_attn.q_proj"], layers=[n for n, _ in decoder_layers(model)]
    )
    assert found.counts[f"{name}.self_attn.q_proj"] == len(passes) * windows().numel()
    assert all(0 < distance < 1 for distance in found.angular.values())


def test_block_by_block_refuses_blocks_that_run_several_times(tmp_path: Path) -> None:
    make("hrm_text").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ChainError, match=r"runs more than once in a pass.*load the whole model"):
        compress_blockwise(load_streamed(tmp_path / "dense"), windows(), tmp_path / "out", PAPER)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", ["openai-gpt", "olmo_hybrid"])
def test_block_by_block_is_as_in_memory(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    tokenizer(more=1).save_pretrained(tmp_path / "dense")
    compress_blockwise(load_streamed(tmp_path / "dense"), windows(), tmp_path / "out", PAPER)
    whole = copy.deepcopy(model)
    compress(whole, windows(), PAPER)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(whole))


@pytest.mark.parametrize("config", [PAPER, BUDGET], ids=["paper", "budget"])
def test_modules_that_are_named_need_no_stack(
    config: CompressConfig | BudgetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_repeated", lambda name, module: [])
    with pytest.raises(ValueError, match="no stack of blocks"):
        compress(make("llama"), windows(), PAPER)
    named = ("model.layers.0.mlp.gate_proj", "model.layers.3.mlp.down_proj")
    report = compress(make("llama"), windows(), replace(config, targets=named))
    assert [layer.name for layer in report.layers] == list(named)


@pytest.mark.parametrize(
    ("name", "why"), [("hrm_text", "has 2 stacks"), ("gemma3n_text", "leaves something for later")]
)
def test_layers_are_not_fitted_where_blocks_depend_on_more_than_the_hidden_state(name: str, why: str) -> None:
    _, report = compressed(name, BUDGET)
    assert report.plan.correction == 0.0
    assert why in report.notes[0]
    assert CompressionReport.from_dict(report.to_dict()).notes == report.notes


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("xlnet", "rel_attn.q is one parameter of shape (32, 4, 8), and XLNetRelativeAttention does not keep to"),
        ("phimoe", "mlp.router is a PhimoeTopKRouter, which does more than multiply with its weight"),
        ("recurrent_gemma", "rg_lru.input_gate_weight is one parameter of shape (4, 8, 8)"),
        ("zamba2", "shared_transformer.self_attn.q_proj is tied to model.layers.3.shared_transformer.self_attn.q_proj"),
        ("mamba", "no input reached backbone.layers.1.mixer.dt_proj on the calibration text"),
    ],
)
def test_what_is_no_linear_layer_stays_dense_with_a_sentence(name: str, odd: str) -> None:
    _, report = compressed(name, BUDGET)
    assert any(odd in sentence for sentence in report.plan.dense.values())
    assert not set(report.plan.dense) & {layer.name for layer in report.layers}


@pytest.mark.parametrize(("name", "target"), [("xlnet", "rel_attn.q"), ("phimoe", "router"), ("phimoe", "mlp.router")])
def test_what_is_no_linear_layer_is_refused_where_it_is_named(name: str, target: str) -> None:
    with pytest.raises(ValueError, match=f"'{target}' names no linear layer: .*exclude it"):
        compressed(name, replace(BUDGET, targets=(target,)))


@pytest.mark.parametrize("name", ["falcon", "mamba"])
def test_rounded_layers_of_such_families_run(name: str) -> None:
    model, _ = compressed(name, PAPER)
    before = logits(model)
    quantize_(model)
    assert float((logits(model) - before).norm() / before.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_healing_where_the_stream_is_wider_than_the_weights(scope: str, dtype: torch.dtype) -> None:
    """Mamba keeps the hidden state in float32 beside weights of half precision."""
    teacher = make("mamba").to(dtype)
    student = copy.deepcopy(teacher)
    compress(student, windows(), PAPER)
    config = HealingConfig(scope=scope, steps=2, held_out=4)
    report = heal(student, teacher, batch("llama", count=14)["input_ids"], config)
    assert report.steps == 2
    assert torch.isfinite(logits(student)).all()


def test_healing_refuses_blocks_that_depend_on_more_than_the_hidden_state() -> None:
    teacher = make("gemma3n_text")
    student = copy.deepcopy(teacher)
    compress(student, windows(), PAPER)
    with pytest.raises(ValueError, match=r"`student` cannot be healed from block to block: .*leaves something"):
        heal(student, teacher, batch("llama", count=14)["input_ids"], HealingConfig(steps=2, held_out=4))


def test_healing_block_by_block_refuses_them_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make("gemma3n_text")
    student = copy.deepcopy(teacher)
    compress(student, windows(), PAPER)
    save(student, tokenizer(), tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    pair = [load_streamed(tmp_path / name) for name in ("student", "teacher")]
    config = HealingConfig(steps=2, held_out=4, scope="block", metric_windows=0)
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match=r"`student` cannot be healed from block to block: .*leaves something"):
        heal_blockwise(*pair, batch("llama", count=14)["input_ids"], tmp_path / "out", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_gradients_that_a_model_refuses_are_told() -> None:
    model = make("llama")

    def refuse(*_: object) -> None:
        raise AssertionError("only in training mode")

    def watch(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(refuse)

    model.model.norm.register_forward_hook(watch)
    with pytest.raises(
        TypeError, match=r"no gradients .* LlamaForCausalLM .*\(only in training mode\); leave them out"
    ):
        compress(model, windows(), BUDGET)


@pytest.mark.parametrize("config", [PAPER, BUDGET], ids=["paper", "budget"])
def test_layers_that_few_tokens_reach_get_what_these_support(config: CompressConfig | BudgetConfig) -> None:
    model = make("mixtral")
    asked = (
        replace(config, own_text=0.0) if isinstance(config, BudgetConfig) else replace(config, layers="all", rank=20)
    )
    report = compress(model, windows()[:1, :6], replace(asked, targets=("experts.gate_up_proj",)))
    assert report.layers
    assert all(layer.rank <= 6 for layer in report.layers if isinstance(config, CompressConfig))
    assert "got fewer tokens of text than they have directions" in report.notes[-1]
    assert compressed("llama", config)[1].notes == ()
