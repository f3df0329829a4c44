from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import cur.integrations.store.checkpoint as checkpoint
from cur.integrations.compress import compress
from cur.integrations.files.reading import CheckpointError
from cur.integrations.nn import LAYOUTS, CompressedLinear, compressed_modules, factored
from cur.integrations.plan.config import CompressConfig
from cur.integrations.plan.plan import Plan
from cur.integrations.quantize import quantize_
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.checkpoint import dense_export, read_config, save
from cur.integrations.store.format import FORMAT_VERSION, CURConfig
from cur.integrations.store.inspect import summarize

CONFIG = CompressConfig(layers=2, rank=6)
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "gate_proj"),
    "qwen2": ("q_proj", "gate_proj"),
    "gpt2": ("attn.c_attn", "c_fc"),
    "opt": ("q_proj", "fc1"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),
    "bert": ("query", "intermediate.dense"),
}
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def compressed(llama: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
    compress(llama, windows, CONFIG)
    return llama


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 101)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows).logits
    return found


def reload(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # the command line sets it for its process, which here is that of the tests
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("layout", factored())
@pytest.mark.parametrize("kind", TARGETS)
def test_reload_is_bit_identical(
    kind: str, layout: str, make_model: MakeModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model(kind)
    compress(model, windows, replace(CONFIG, targets=TARGETS[kind], layout=layout))
    expected = logits(model, windows)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    save(model, None, tmp_path / "once")
    once = auto.from_pretrained(tmp_path / "once")
    assert torch.equal(logits(once, windows), expected)
    # What is loaded can be saved again, by us and by transformers itself.
    save(once, None, tmp_path / "twice")
    once.save_pretrained(tmp_path / "plain")
    for directory in ("twice", "plain"):
        again = auto.from_pretrained(tmp_path / directory)
        assert torch.equal(logits(again, windows), expected)
        assert [type(layer) for layer in compressed_modules(again).values()] == [LAYOUTS[layout]] * 4 + [
            LAYOUTS[layout]
        ] * (2 if kind == "llama" else 0)


def test_a_new_process_reloads_identical_logits(
    compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    save(compressed, None, tmp_path / "model")
    save_file({"windows": windows, "logits": logits(compressed, windows)}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch, cur.integrations\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "expected = load_file(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "sys.exit(0 if torch.equal(model(expected['windows']).logits, expected['logits']) else 9)\n"
    )
    done = run_python(code, tmp_path / "model", tmp_path / "expected.safetensors", torch.get_num_threads())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["save", "save_pretrained", "fine-tuned"])
def test_loading_without_the_package_fails_loudly(way: str, compressed: PreTrainedModel, tmp_path: Path) -> None:
    if way == "save_pretrained":
        compressed.save_pretrained(tmp_path / "model")
    else:
        save(compressed, None, tmp_path / "model")
    if way == "fine-tuned":
        again = reload(tmp_path / "model")
        with torch.no_grad():
            next(iter(compressed_modules(again).values())).U.weight.mul_(1.01)
        shutil.rmtree(tmp_path / "model")
        again.save_pretrained(tmp_path / "model")
        assert (tmp_path / "model" / "model.safetensors").exists()
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = run_python(code, tmp_path / "model")
    assert done.returncode != 0
    assert "run `import cur.integrations` before from_pretrained" in done.stderr
    if way == "save":
        # Even when asked to put up with mismatched sizes, which fine-tuning scripts do.
        done = run_python(code.replace("[1])", "[1], ignore_mismatched_sizes=True)"), tmp_path / "model")
        assert done.returncode != 0
    if way == "fine-tuned":  # the same files as by "save_pretrained"
        return
    assert run_python("import cur.integrations; " + code, tmp_path / "model").returncode == 0


def test_shards(compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model", max_shard_size=10_000)
    names = sorted(file.name for file in tmp_path.glob("model/*.safetensors"))
    assert len(names) > 2
    assert all(name.startswith("cur_model-") for name in names)
    assert torch.equal(logits(reload(tmp_path / "model"), windows), logits(compressed, windows))


def test_tied_embeddings_stay_tied(compressed: PreTrainedModel, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model")
    model = reload(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "cur_model.safetensors")


def test_bfloat16(make_model: MakeModel, windows: torch.Tensor, tmp_path: Path) -> None:
    # Loaded in bfloat16 rather than cast, which would also round the frequencies of the rotary embedding.
    make_model("llama").save_pretrained(tmp_path / "dense")
    model = reload(tmp_path / "dense", dtype=torch.bfloat16)
    compress(model, windows, replace(CONFIG, layout="interpolative"))
    save(model, None, tmp_path / "model")
    loaded = reload(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, windows), logits(model, windows))
    wide = reload(tmp_path / "model", dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert {b.dtype for n, b in wide.named_buffers() if n.endswith("order")} == {torch.int64}


def test_half_and_float(compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model")
    for model in (reload(tmp_path / "model"), compressed):
        expected = logits(model, windows)
        half = model.half()
        assert {part.dtype for part in half.parameters()} == {torch.float16}
        assert torch.allclose(logits(half.float(), windows), expected, atol=0.05 * float(expected.abs().max()))
        half.half().save_pretrained(tmp_path / "half")
        assert reload(tmp_path / "half").dtype == torch.float16
        shutil.rmtree(tmp_path / "half")
    quantize_(compressed.float())
    with pytest.raises(ValueError, match="not supported for quantized"):
        compressed.half()


def test_device_map(compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model")
    loaded = reload(tmp_path / "model", device_map="cpu")
    assert torch.equal(logits(loaded, windows), logits(compressed, windows))


def test_the_body_alone_loads_from_a_model_with_a_head(
    compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    save(compressed, None, tmp_path / "model")
    body = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = compressed.model(windows).last_hidden_state
        assert torch.equal(body(windows).last_hidden_state, expected)


def test_generate_with_and_without_cache(compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model")
    loaded = reload(tmp_path / "model")
    options = {"attention_mask": torch.ones_like(windows), "max_new_tokens": 4, "do_sample": False}
    expected = compressed.generate(windows, **options)
    assert expected.shape[1] > windows.shape[1]
    assert torch.equal(loaded.generate(windows, **options), expected)
    assert torch.equal(loaded.generate(windows, **options, use_cache=False), expected)


def test_pipeline(compressed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save(compressed, tokenizer, tmp_path / "model")
    say = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    out = say("w5 w6 w7", max_new_tokens=3, do_sample=False)
    assert out[0]["generated_text"].startswith("w5 w6 w7")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()


def test_trainer_trains_the_factors(compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model")
    model = reload(tmp_path / "model")
    before = {name: p.clone() for name, p in model.named_parameters() if ".U." in name}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in windows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and torch warn of their own parts
        model.gradient_checkpointing_enable()
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = dict(model.named_parameters())
    assert before
    assert all(not torch.equal(changed[name], value) for name, value in before.items())
    again = reload(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again, windows), logits(model.eval(), windows))


def test_dense_export_is_read_without_the_package(
    compressed: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    expected = logits(compressed, windows)
    dense_export(compressed, None, tmp_path / "dense")
    assert torch.equal(logits(compressed, windows), expected), "the model itself must stay as it was"
    save(compressed, None, tmp_path / "model")
    assert torch.equal(logits(reload(tmp_path / "model"), windows), expected)
    save_file({"windows": windows, "logits": expected}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch\n"
        "sys.modules['cur'] = None  # importing it would raise\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = load_file(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "error = (model(expected['windows']).logits - expected['logits']).abs().max()\n"
        "sys.exit(0 if error <= 1e-4 * expected['logits'].abs().max() else 9)\n"
    )
    done = run_python(code, tmp_path / "dense", tmp_path / "expected.safetensors")
    assert done.returncode == 0, done.stderr


def test_dense_export_restores_conv1d(make_model: MakeModel, windows: torch.Tensor, tmp_path: Path) -> None:
    model = make_model("gpt2")
    compress(model, windows, replace(CONFIG, targets=TARGETS["gpt2"]))
    dense_export(model, None, tmp_path / "dense")
    loaded = reload(tmp_path / "dense")
    assert not compressed_modules(loaded)
    expected = logits(model, windows)
    assert torch.allclose(logits(loaded, windows), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_dequantize_gives_plain_layers(compressed: PreTrainedModel, windows: torch.Tensor) -> None:
    expected = logits(compressed, windows)
    dense = compressed.dequantize()
    assert not compressed_modules(dense)
    assert not hasattr(dense.config, "quantization_config")
    assert torch.allclose(logits(dense, windows), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class SharedLayer(LlamaForCausalLM):
    """A Llama whose third block has the gate of its second."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[2].mlp.gate_proj = self.model.layers[1].mlp.gate_proj


@pytest.mark.parametrize("layout", factored())
def test_a_shared_layer_is_stored_once_and_stays_shared(
    layout: str, llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = SharedLayer(llama.config).eval()
    compress(model, windows, replace(CONFIG, layers=3, targets=("gate_proj",), layout=layout))
    expected = logits(model, windows)
    save(model, None, tmp_path / "model")
    loaded = SharedLayer.from_pretrained(tmp_path / "model")
    layers = loaded.model.layers
    assert isinstance(layers[1].mlp.gate_proj, CompressedLinear)
    assert layers[1].mlp.gate_proj is layers[2].mlp.gate_proj
    assert torch.equal(logits(loaded, windows), expected)
    stored = load_file(tmp_path / "model" / "cur_model.safetensors")
    assert not any(name.startswith("model.layers.2.mlp.gate_proj.R") for name in stored)


def test_plan_report_and_card_travel_along(llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    report = compress(llama, windows, CONFIG)
    report = replace(report, perplexity={"before, held-out": 10.0, "after, held-out": 12.34})
    save(llama, None, tmp_path / "model", report=report)
    assert Plan.load(tmp_path / "model" / "plan.json") == report.plan
    assert CompressionReport.load(tmp_path / "model" / "report.json") == report
    card = (tmp_path / "model" / "README.md").read_text()
    code = card.split("```python\n")[1]
    assert code.startswith("import cur.integrations")
    assert "12.34" in card
    assert f"{report.after.parameters:,}" in card
    assert report.plan.calibration in card
    summary = summarize(tmp_path / "model")
    assert summary.parameters == report.after.parameters
    assert summary.dense_parameters == report.before.parameters
    assert {layer.name: layer.rank for layer in summary.layers} == {layer.name: layer.rank for layer in report.layers}


def test_a_model_without_compressed_layers(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model` has no compressed layers"):
        save(llama, None, tmp_path / "model")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ writing


def test_nothing_is_overwritten_unasked(compressed: PreTrainedModel, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    save(compressed, None, target)  # an empty directory is as good as none
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save(compressed, None, target)
    (target / "old").write_text("x")
    save(compressed, None, target, overwrite=True)
    assert not (target / "old").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        save(compressed, None, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), OSError(errno.ENOSPC, "full")])
def test_a_failed_save_leaves_the_old_checkpoint(
    error: BaseException,
    compressed: PreTrainedModel,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "model"
    save(compressed, None, target)
    before = sorted(target.iterdir())

    def fail(directory: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_rename_weights", fail)
    with pytest.raises(type(error)) as caught:
        save(compressed, None, target, overwrite=True)
    if isinstance(error, OSError):
        assert "no space left" in str(caught.value)
        assert str(target) in str(caught.value)
    assert list(tmp_path.iterdir()) == [target]
    assert sorted(target.iterdir()) == before
    monkeypatch.undo()
    assert torch.equal(logits(reload(target), windows), logits(compressed, windows))


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is one of POSIX")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from cur.integrations import CompressConfig, compress, save\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4,\n"
        "                         num_hidden_layers=4, vocab_size=100))\n"
        "compress(model, torch.randint(100, (2, 16)), CompressConfig(layers=2, rank=4))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    save(model, None, sys.argv[1])\n"
        "except OSError as error:\n"
        "    sys.exit(0 if 'no space left' in str(error) else f'unclear: {error}')\n"
        "sys.exit('written in spite of the limit')\n"
    )
    done = run_python(code, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture
def saved(compressed: PreTrainedModel, tmp_path: Path) -> Path:
    save(compressed, None, tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def first_name(directory: Path) -> str:
    return next(iter(read_config(directory).modules))


def test_a_truncated_file(saved: Path) -> None:
    file = saved / "cur_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cur_model\.safetensors is corrupt or truncated"):
        reload(saved)
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        summarize(saved)


def test_a_file_of_noise(saved: Path) -> None:
    (saved / "cur_model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        reload(saved)


def test_a_missing_file(saved: Path) -> None:
    (saved / "cur_model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError), match="cur_model"):
        reload(saved)


def test_a_missing_shard(compressed: PreTrainedModel, tmp_path: Path) -> None:
    save(compressed, None, tmp_path / "model", max_shard_size=10_000)
    shard = min(tmp_path.glob("model/cur_model-*.safetensors"))
    shard.unlink()
    with pytest.raises((CheckpointError, OSError), match=shard.name):
        reload(tmp_path / "model")


def test_a_module_that_is_not_there(saved: Path) -> None:
    edit_config(saved, lambda q: q["modules"].update(nonesuch={"layout": "cur", "rank": 3}))
    with pytest.raises(CheckpointError, match="lists the compressed module nonesuch"):
        reload(saved)


def test_a_module_that_is_not_linear(saved: Path) -> None:
    edit_config(saved, lambda q: q["modules"].update({"model.norm": {"layout": "cur", "rank": 3}}))
    with pytest.raises(TypeError, match=r"model\.norm is a LlamaRMSNorm"):
        reload(saved)


def test_a_module_without_factors(saved: Path) -> None:
    name = "model.layers.0.mlp.gate_proj"
    edit_config(saved, lambda q: q["modules"].update({name: {"layout": "cur", "rank": 3}}))
    with pytest.raises(CheckpointError, match=f"the checkpoint lacks {name}.R.weight"):
        reload(saved)


def test_a_rank_that_disagrees_with_the_weights(saved: Path) -> None:
    name = first_name(saved)
    edit_config(saved, lambda q: q["modules"][name].update(rank=5))
    with pytest.raises(CheckpointError, match=rf"says {name} has rank 5 .* stored weights are \(6, 32\)"):
        reload(saved)
    with pytest.raises(CheckpointError, match=f"{name} has rank 5, the stored weights have 6"):
        summarize(saved)


def test_a_rank_no_layer_can_have(saved: Path) -> None:
    name = first_name(saved)
    edit_config(saved, lambda q: q["modules"][name].update(rank=500))
    with pytest.raises(CheckpointError, match=f"asks for {name}: `rank` must be between 1 and"):
        reload(saved)


def test_a_missing_factor(saved: Path) -> None:
    name = first_name(saved)
    file = saved / "cur_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{name}.U.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}.U.weight"):
        reload(saved)


def test_an_order_that_is_no_permutation(make_model: MakeModel, windows: torch.Tensor, tmp_path: Path) -> None:
    model = make_model("llama")
    compress(model, windows, replace(CONFIG, layout="interpolative"))
    save(model, None, tmp_path / "model")
    file = tmp_path / "model" / "cur_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".order"))
    tensors[name][0] = tensors[name][1]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is not a permutation"):
        reload(tmp_path / "model")


def test_a_newer_format(saved: Path) -> None:
    edit_config(saved, lambda q: q.update(format_version=FORMAT_VERSION + 1))
    for read in (reload, read_config, summarize):
        with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}.*upgrade"):
            read(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(colour="blue"), "unknown fields: colour"),
        (lambda q: q.update(modules={"x": {"layout": "lu", "rank": 3}}), "describes x"),
        (lambda q: q.update(modules={"x": {"layout": "cur", "rank": "3"}}), "describes x"),
        (lambda q: q.update(modules={"x": {"layout": "cur", "rank": 3, "inner_rank": 2}}), "describes x"),
        (lambda q: q.update(modules={"x": 3}), "describes x"),
    ],
)
def test_a_malformed_description(saved: Path, change: Any, message: str) -> None:
    edit_config(saved, change)
    for read in (reload, read_config):
        with pytest.raises(CheckpointError, match=message):
            read(saved)


def test_directories_that_hold_no_compressed_checkpoint(make_model: MakeModel, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is not a compressed checkpoint"):
        read_config(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_config(tmp_path / "dense")
    shutil.rmtree(saved)


def test_config_round_trip() -> None:
    inner = {"layout": "inputs", "rank": 3, "inner_rank": 2}
    config = CURConfig({"a": {"layout": "cur", "rank": 2}, "b": {"shared_with": "a"}, "c": inner})
    data = json.loads(json.dumps(config.to_dict()))
    assert "weights" not in data
    assert CURConfig(**data).to_dict() == data


def test_pickle_is_never_read(saved: Path) -> None:
    torch.save(load_file(saved / "cur_model.safetensors"), saved / "pytorch_model.bin")
    (saved / "cur_model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError)):
        reload(saved)


def test_peft_finds_the_factors(compressed: PreTrainedModel, windows: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        adapted = peft.get_peft_model(compressed, peft.LoraConfig(r=2, target_modules=["U"]))
    wrapped = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == len(compressed_modules(compressed))
    assert torch.isfinite(logits(adapted, windows)).all()
