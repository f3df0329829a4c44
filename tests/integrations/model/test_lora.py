"""Adapters of PEFT by the names of dense layers, as its tutorials write them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from cur.healing import HealingConfig, heal
from cur.integrations import (
    BudgetConfig,
    CompressConfig,
    carry_out_,
    collect,
    compress,
    dense_export,
    linear_modules,
    make_plan,
    perplexity,
    save,
    trainable,
)
from cur.integrations.convert import convert_
from cur.integrations.model.adapters import _register
from cur.integrations.nn import compressed_modules, factored
from cur.integrations.quantize import quantize_
from tests.models import batch, make

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[3]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = [*factored(), "neurons"]


@pytest.fixture(autouse=True)
def lenient() -> Iterator[None]:
    """Let other libraries warn of their own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        yield


MADE: dict[tuple[str, bool], PreTrainedModel] = {}


def built(kind: str, windows: torch.Tensor, *, rounded: bool = False) -> PreTrainedModel:
    """Return a small compressed model of its own."""
    if (kind, rounded) not in MADE:
        MADE[kind, rounded] = compressed(kind, windows, rounded=rounded)
    return copy.deepcopy(MADE[kind, rounded])


def compressed(kind: str, windows: torch.Tensor, *, rounded: bool) -> PreTrainedModel:
    model = make("llama", blocks=3)
    if kind == "neurons":
        compress(model, windows, BudgetConfig(keep=0.6, own_text=0))
    else:
        compress(model, windows, CompressConfig(layers=1, rank=6, targets=("q_proj", "down_proj"), layout=kind))
    if rounded:
        quantize_(model)
    return model


def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(windows).logits
    return found


def around(model: torch.nn.Module) -> list[str]:
    """Name the compressed layers with adapters around them."""
    return [name for name, part in model.named_modules() if type(part).__name__ == "LoraCompressedLinear"]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rounded", [False, True], ids=["whole", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_by_the_dense_name_in_every_layout(
    kind: str, rounded: bool, dora: bool, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = built(kind, windows, rounded=rounded)
    names = list(compressed_modules(model))
    layers = {name for name in names if name.endswith(tuple(TARGETS))}
    before, base = copy.deepcopy(model), logits(model, windows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=dora))
    assert {name.removeprefix("base_model.model.") for name in around(adapted)} == layers
    assert close(logits(adapted, windows), base)

    # Adapters learn, all of them, and nothing else.
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(windows, labels=windows).loss
        loss.backward()
        assert all((p.grad is not None) == (name in learning) for name, p in adapted.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(adapted, windows)
    assert not close(trained, base)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, windows), base)

    # What is saved is the adapter, which belongs to the checkpoint as it is.
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(before, tmp_path / "adapter"), windows), trained)

    if rounded:
        refused = r"the adapter 'default' cannot be merged into .*, which is rounded to int8; keep it beside"
        for merge in (adapted.merge_adapter, adapted.merge_and_unload):
            with pytest.raises(ValueError, match=refused):
                merge()
        assert torch.equal(logits(adapted, windows), trained)
        return
    adapted.merge_adapter()
    assert not any(getattr(part, "merged", True) is False for part in adapted.modules())
    assert close(logits(adapted, windows), trained)
    adapted.unmerge_adapter()
    assert close(logits(adapted, windows), trained)
    with adapted.disable_adapter():
        assert close(logits(adapted, windows), base)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert not around(merged)
    assert list(compressed_modules(merged)) == names
    assert close(logits(merged, windows), trained)
    # It is a compressed model like any other, in the hands of transformers and in ours.
    merged.save_pretrained(tmp_path / "theirs")
    save(merged, None, tmp_path / "ours")
    for directory in ("theirs", "ours"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(logits(loaded, windows), logits(merged, windows))


def test_layers_are_as_they_were_bit_for_bit_after_unmerging(windows: torch.Tensor) -> None:
    model = built("neurons", windows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    before = {name: adapted.get_submodule(name).base_layer for name in around(adapted)}
    stored = {name: copy.deepcopy(layer.state_dict()) for name, layer in before.items()}
    adapted.merge_adapter()
    assert all(adapted.get_submodule(name).base_layer is not layer for name, layer in before.items())
    assert not any(
        part.requires_grad for name in before for part in adapted.get_submodule(name).base_layer.parameters()
    )
    adapted.unmerge_adapter()
    for name, state in stored.items():
        now = adapted.get_submodule(name).base_layer.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in now.items())


def test_several_adapters_of_different_kinds(windows: torch.Tensor) -> None:
    model = built("cur", windows)
    base = logits(model, windows)
    options: dict[str, Any] = {"init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    first = logits(adapted, windows)
    adapted.add_adapter(
        "second", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True, **options)
    )
    assert torch.equal(logits(adapted, windows), first)
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted, windows)
    assert not close(both, first)
    adapted.merge_adapter()
    assert close(logits(adapted, windows), both)
    adapted.unmerge_adapter()
    adapted.set_adapter("default")
    adapted.delete_adapter("second")
    assert close(logits(adapted, windows), first)
    assert close(logits(adapted.unload(), windows), base)


def test_perplexity_is_that_of_the_model_with_its_adapter(windows: torch.Tensor) -> None:
    model = built("cur", windows)
    before = perplexity(model, windows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = perplexity(adapted, windows)
    assert found.value == pytest.approx(perplexity(model, windows).value, rel=1e-6)
    assert found.value != pytest.approx(before.value, rel=1e-3)


@pytest.mark.parametrize("rounded", [False, True])
def test_all_linear_are_the_layers_of_the_dense_model(rounded: bool, windows: torch.Tensor) -> None:
    config = {"r": 2, "target_modules": "all-linear"}
    dense = peft.get_peft_model(make("llama", blocks=3), peft.LoraConfig(**config))
    for kind in KINDS:
        adapted = peft.get_peft_model(built(kind, windows, rounded=rounded), peft.LoraConfig(**config))
        wrapped, expected = (
            {name for name, part in model.named_modules() if hasattr(part, "lora_A")} for model in (adapted, dense)
        )
        assert wrapped == expected


@pytest.mark.parametrize("targets", [None, r".*\.q_proj", r".*q_proj.*", ["q_proj", "R"]])
def test_a_layer_is_wrapped_and_nothing_in_it(targets: Any, windows: torch.Tensor) -> None:
    model = built("cur", windows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    wrapped = around(adapted)
    assert any(name.endswith("q_proj") for name in wrapped)
    inside = [name for name, part in adapted.named_modules() if hasattr(part, "lora_A") and "q_proj.base_layer" in name]
    assert not inside
    logits(adapted, windows)


@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_a_conv1d(dora: bool) -> None:
    model, fed = make("gpt2"), batch("gpt2", count=2)
    compress(model, [batch("gpt2")], CompressConfig(layers=1, rank=5, targets=("c_attn", "c_fc")))
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False, use_dora=dora
    )
    adapted = peft.get_peft_model(model, config).eval()
    assert around(adapted)
    with torch.no_grad():
        expected = adapted(**fed).logits
        assert close(adapted.merge_and_unload()(**fed).logits, expected)


@pytest.mark.parametrize(
    "named",
    [
        {"target_modules": ["gate_up_proj"]},
        {"target_modules": ["experts.gate_up_proj"]},
        {"target_modules": r".*\.experts\.gate_up_proj\.\d+"},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    ],
    ids=str,
)
def test_experts(named: dict[str, Any], tmp_path: Path) -> None:
    model, fed = make("mixtral"), batch("mixtral", count=2)
    compress(model, [batch("mixtral")], CompressConfig(layers=2, rank=5, targets=("experts.gate_up_proj",)))
    again, base = copy.deepcopy(model), model(**fed).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **named)).eval()
    assert len(around(adapted)) == len(compressed_modules(again))
    with torch.no_grad():
        expected = adapted(**fed).logits
        assert not close(expected, base)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**fed).logits, expected)
        assert close(adapted.merge_and_unload()(**fed).logits, expected)


def test_names_that_experts_had_before_are_refused() -> None:
    model = make("mixtral")
    compress(model, [batch("mixtral")], CompressConfig(layers=2, rank=5, targets=("experts.gate_up_proj",)))
    with pytest.raises(ValueError, match=r"names experts as transformers did before .*; name down_proj, gate_up_proj"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights` must be one of True, .*; got 'pissa'"),
        ({"init_lora_weights": "olora"}, r"`init_lora_weights` must be one of True, .*; got 'olora'"),
        ({"lora_bias": True}, "`lora_bias` must not be set for an adapter of a compressed layer such as"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "`alora_invocation_tokens` must not be set for an adapter of a compressed layer such as .*q_proj, which",
        ),
    ],
    ids=str,
)
def test_what_needs_the_weight_in_one_piece_is_refused(
    option: dict[str, Any], message: str, windows: torch.Tensor
) -> None:
    model = built("cur", windows)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], **option))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("begin", ["gaussian", "orthogonal"])
def test_other_beginnings_change_nothing_at_first(begin: str, windows: torch.Tensor) -> None:
    model = built("folded", windows)
    base = logits(model, windows)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=begin)
    assert close(logits(peft.get_peft_model(model, config), windows), base)


def test_biases_are_trained_and_saved_or_refused(tmp_path: Path) -> None:
    model, fed = make("qwen2"), batch("qwen2", count=2)
    compress(model, [batch("qwen2")], CompressConfig(layers=2, rank=5, targets=("q_proj",)))
    again = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"`bias` must be 'none' or 'all' for .*q_proj, got 'lora_only'"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")).eval()
    biases = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "bias" in name}
    assert any(name.endswith("q_proj.base_layer.C.bias") for name in biases)
    with torch.no_grad():
        for bias in biases.values():
            bias.add_(1)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**fed).logits, adapted(**fed).logits)


def test_a_layer_whose_factor_has_an_adapter_takes_none(windows: torch.Tensor) -> None:
    adapted = peft.get_peft_model(built("cur", windows), peft.LoraConfig(r=2, target_modules=["R"]))
    with pytest.raises(ValueError, match=r"q_proj has an adapter on its factor R already"):
        adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_merged_weights_that_are_not_finite_are_refused(windows: torch.Tensor) -> None:
    adapted = peft.get_peft_model(built("cur", windows), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    name = around(adapted)[0]
    with torch.no_grad():
        adapted.get_submodule(f"{name}.lora_B.default").weight[0, 0] = float("nan")
    layer = adapted.get_submodule(name)
    with pytest.raises(ValueError, match="the adapters default merged would give weights that are not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


# ------------------------------------------------------------------------------------------ rounded, with a Trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_trainer_on_a_rounded_checkpoint(way: str, dtype: torch.dtype, windows: torch.Tensor, tmp_path: Path) -> None:
    small = built("cur", windows)
    small.to(dtype)
    quantize_(small)
    save(small, None, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    data = [{"input_ids": row, "labels": row} for row in windows]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    with pytest.raises(ValueError, match="Please attach trainable adapters on top of the quantized model"):
        Trainer(model, arguments, train_dataset=data)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    if way == "add_adapter":
        model.add_adapter(config)
        adapted: Any = model
    else:
        adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config)
    before = model(windows, labels=windows).loss.item()
    integers = {name: part.clone() for name, part in model.named_parameters() if part.dtype == torch.int8}
    assert integers
    Trainer(adapted, arguments, train_dataset=data).train()
    assert model.eval()(windows, labels=windows).loss.item() < before
    assert all(torch.equal(part, integers[name]) for name, part in model.named_parameters() if name in integers)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    if way == "add_adapter":
        again.load_adapter(tmp_path / "adapter")
    else:
        again = peft.PeftModel.from_pretrained(peft.prepare_model_for_kbit_training(again), tmp_path / "adapter")
    assert torch.equal(logits(again, windows), logits(adapted, windows))


# ------------------------------------------------------------------------------------------ another process


@pytest.mark.parametrize(
    "imports",
    [
        "import cur.integrations; assert 'peft' not in sys.modules; import peft",
        "import peft; import cur.integrations",
    ],
)
def test_another_process_needs_the_import_alone(imports: str, windows: torch.Tensor, tmp_path: Path) -> None:
    model = built("neurons", windows, rounded=True)
    save(model, None, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(windows, tmp_path / "windows")
    code = (
        f"import sys, torch; {imports}\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + '/adapter').eval()\n"
        "torch.save(model(torch.load(sys.argv[1] + '/windows')).logits.detach(), sys.argv[1] + '/logits')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(adapted, windows))


def test_another_version_of_peft_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cur.integrations.model.lora", None)
    with pytest.warns(UserWarning, match="this version of peft is not known .*, but not around whole layers"):
        _register()


# ------------------------------------------------------------------------------------------ what refuses adapters


def test_what_changes_a_model_refuses_one_with_an_adapter(windows: torch.Tensor, tmp_path: Path) -> None:
    config = CompressConfig(layers=1, rank=6, targets=("q_proj", "down_proj"))
    dense = make("llama", blocks=3)
    statistics = collect(dense, [{"input_ids": windows}], modules=linear_modules(dense, ["q_proj"]))
    student = copy.deepcopy(dense)
    compress(student, windows, config)
    tuned = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="legal")
    plan = None
    for model, where in ((tuned, "at its root"), (student, r"at .*q_proj \(")):
        for use in (
            lambda model=model: compress(model, windows, config),
            lambda model=model: make_plan(model, statistics, config),
            lambda model=model: carry_out_(model, plan, statistics),
            lambda model=model: quantize_(model),
            lambda model=model: convert_(model, "folded"),
            lambda model=model: save(model, None, tmp_path / "out"),
            lambda model=model: dense_export(model, None, tmp_path / "out"),
            lambda model=model: trainable(model),
            lambda model=model: heal(model, dense, windows, HealingConfig(steps=1)),
        ):
            with pytest.raises(
                ValueError, match=rf"`(model|student)` carries the adapter 'legal' {where}.*merge_and_unload\(\)`, and"
            ):
                use()
    with pytest.raises(ValueError, match="carries the adapter 'legal'"):
        student.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="`teacher` carries the adapter 'legal'"):
        heal(copy.deepcopy(dense), tuned, windows, HealingConfig(steps=1))
    assert not (tmp_path / "out").exists()
    merged = tuned.merge_and_unload()
    save(merged, None, tmp_path / "out")
    quantize_(merged)
