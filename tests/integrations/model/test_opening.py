"""Checkpoints of every kind, through every command: the same class, heads, dtype and tensors, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from typer.testing import CliRunner

from cur.cli.app import app
from cur.integrations import BudgetConfig, compress, load_model
from cur.integrations.blockwise import load_streamed
from cur.integrations.model import opening
from cur.integrations.model.origin import origin_of
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.account import compare, read_account
from tests.models import AUTO, KINDS, TEXT, config_of, rewrite, tokenizer, write

SMALL = ("--windows", "4", "--window-length", "16", "--layers", "2", "--rank", "4", "--targets")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def cur(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small(source: Path) -> tuple[str, ...]:
    architecture = config_of(source)["architectures"][0]
    return (*SMALL, "query" if "Bert" in architecture else "attn.c_attn" if "GPT2" in architecture else "q_proj")


def refused(done: Any, *parts: str) -> None:
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def same_outside(source: Path, out: Path, changed: str) -> None:
    """Check that every tensor of the source is in the result, bit by bit, but for weights of one kind of layer."""
    kind = getattr(hf, config_of(source)["architectures"][0])
    before, after = (kind.from_pretrained(place, dtype="auto").state_dict() for place in (source, out))
    kept = [name for name in before if changed not in name]
    assert len(kept) > 5
    for name in kept:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name
    assert {name for name in after if changed not in name} == set(kept)


@pytest.mark.parametrize("kind", AUTO)
def test_every_command_keeps_the_class(kind: str, tmp_path: Path, text: Path) -> None:
    source = write(kind, tmp_path / "source")
    changed = small(source)[-1]
    done = cur("compress", source, "--text", text, *small(source), "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    stages = {"small": tmp_path / "small"}
    for command, options in (
        ("convert", ("--layout", "folded")),
        ("export", ()),
        ("quantize", ("--text", text, "--windows", "2", "--window-length", "16")),
    ):
        done = cur(command, tmp_path / "small", *options, "--out", tmp_path / command)
        assert done.exit_code == 0, done.stderr
        stages[command] = tmp_path / command
    for name, out in stages.items():
        assert config_of(out)["architectures"] == config_of(source)["architectures"], name
        if name != "quantize":
            same_outside(source, out, changed)
    assert f"import {AUTO[kind]}, AutoTokenizer" in (tmp_path / "small" / "README.md").read_text()
    found = getattr(hf, AUTO[kind]).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert type(found[0]).__name__ == config_of(source)["architectures"][0]
    assert not found[1]["missing_keys"]
    for out in stages.values():
        assert origin_of(load_model(out).model).unread == ()


@pytest.mark.parametrize("kind", [*AUTO, "tied", "bfloat16", "float16"])
def test_every_way_of_compressing_keeps_all_that_it_does_not_compress(kind: str, tmp_path: Path, text: Path) -> None:
    """A budget in memory and block by block, a plan that is carried out, and healing by blocks."""
    source = write(kind, tmp_path / "source", max_shard_size=60_000)
    read = ("--text", text, "--windows", 4, "--window-length", 16)
    alone = ("--no-gradients", "--own-text", 0, "--correction", 0)
    plan = tmp_path / "plan.json"
    planned = cur("plan", source, "--text", text, *small(source), "--out", plan)
    assert planned.exit_code == 0, planned.stderr
    ways: dict[str, tuple[object, ...]] = {
        "budget": ("compress", source, *read, "--keep", 0.8, *alone),
        "low": ("compress", source, "--text", text, *small(source), "--low-memory"),
        "low budget": ("compress", source, *read, "--keep", 0.8, *alone, "--low-memory"),
        "planned": ("compress", source, *read, "--plan", plan),
        "low planned": ("compress", source, *read, "--plan", plan, "--low-memory"),
        "healed": (
            *("heal", tmp_path / "low", "--text", text, "--window-length", 16, "--steps", 1, "--held-out", 1),
            *("--batch-size", 2, "--scope", "block"),
        ),
    }
    for name, words in ways.items():
        out = tmp_path / name
        done = cur(*words, "--out", out)
        assert done.exit_code == 0, (name, done.stderr)
        for field in ("architectures", "dtype"):
            assert config_of(out)[field] == config_of(source)[field], name
        account = read_account(out)
        assert account is not None
        assert account.missing == account.changed == account.extra == account.rounded == [], name
        assert account.missing_files == [], name
        assert account.compressed
        assert compare(out, source).same == account.same
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("kind", [kind for kind in AUTO if kind not in ("causal", "vision-language")])
def test_only_causal_models_have_a_perplexity(kind: str, tmp_path: Path, text: Path) -> None:
    source = write(kind, tmp_path / "source")
    for way in ("--in-memory", "--low-memory"):
        done = cur("evaluate", source, "--text", text, "--windows", 2, "--window-length", 16, way)
        refused(done, "perplexity and divergence need a causal language model", config_of(source)["architectures"][0])


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
def test_the_file_that_the_configuration_names(way: str, tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source")
    (source / "model.safetensors").rename(source / "other.safetensors")
    write("tied", tmp_path / "tied")
    (tmp_path / "tied" / "model.safetensors").rename(source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({**config_of(source), "transformers_weights": "other.safetensors"}))
    done = cur("compress", source, "--text", text, *small(source), way, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    same_outside(source, tmp_path / "out", "q_proj")


def test_an_encoder_that_is_called_a_decoder_has_none_either(tmp_path: Path, text: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=100, **sizes)
    hf.BertLMHeadModel(config).save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    refused(cur("evaluate", tmp_path / "source", "--text", text), "BertLMHeadModel is not one")


@pytest.mark.parametrize("kind", ["classifier", "decoder without head", "encoding classifier"])
def test_what_has_no_logits_per_token_has_gradients_of_what_it_says(kind: str, tmp_path: Path, text: Path) -> None:
    source = write(kind, tmp_path / "source")
    given = ("compress", source, "--text", text, "--windows", 4, "--window-length", 16, "--keep", 0.8)
    for way, out in (("--gradients", "with"), ("--no-gradients", "without")):
        done = cur(*given, way, "--out", tmp_path / out)
        assert done.exit_code == 0, done.stderr
        assert config_of(tmp_path / out)["architectures"] == config_of(source)["architectures"]
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("with", "without")]
    assert plans[0]["entries"] != plans[1]["entries"]
    model = load_model(source).model
    report = compress(model, torch.randint(4, 100, (2, 16)), BudgetConfig(keep=0.8))
    assert report.layers


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
def test_block_by_block_the_class_is_the_same(way: str, tmp_path: Path, text: Path) -> None:
    source = write("classifier", tmp_path / "source")
    done = cur("compress", source, "--text", text, *small(source), way, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    assert config_of(tmp_path / "small")["architectures"] == ["LlamaForSequenceClassification"]
    same_outside(source, tmp_path / "small", "q_proj")


def test_a_class_that_is_not_there_is_refused_by_name(tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source")
    file = source / "config.json"
    file.write_text(json.dumps({**config_of(source), "architectures": ["LlamaForNothing"]}))
    for command in ("compress", "plan", "evaluate"):
        options = [] if command == "evaluate" else ["--out", tmp_path / "out"]
        refused(cur(command, source, "--text", text, *options), "names the class LlamaForNothing", "'llama'")
    with pytest.raises(ValueError, match="names the class LlamaForNothing"):
        load_streamed(source)
    file.write_text(json.dumps({**config_of(source), "architectures": [3]}))
    with pytest.raises(ValueError, match=r"`architectures` in config\.json must be a list of names"):
        load_model(source)


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("kind", "change", "lost"),
    [
        ("causal", lambda tensors: {f"_orig_mod.{key}": value for key, value in tensors.items()}, "_orig_mod."),
        ("causal", without("model.layers.1.mlp"), "model.layers.1.mlp.down_proj.weight"),
        ("causal", without("lm_head"), "lm_head.weight"),
        ("classifier", without("score"), "score.weight"),
        ("encoder", without("pooler"), "pooler.dense.bias"),
        ("causal", lambda t: {**t, "model.norm.weight": torch.ones(3)}, "with shape (3,), its config.json asks for"),
    ],
)
def test_no_weight_is_a_random_number(kind: str, change: Any, lost: str, tmp_path: Path, text: Path) -> None:
    source = write(kind, tmp_path / "source")
    rewrite(source, change)
    refused(cur("compress", source, "--text", text, *small(source), "--out", tmp_path / "out"), lost)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"^`model` "):
        load_model(source)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    source = write("tied", tmp_path / "source")
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    assert origin_of(load_model(source).model).unread == ()


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
@pytest.mark.parametrize("names", [("mtp.layers.0.eh_proj.weight", "mtp.norm.weight"), ("second_head.weight",)])
def test_tensors_that_nobody_reads_are_named(names: tuple[str, ...], way: str, tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source")
    rewrite(source, lambda tensors: {**tensors, **{name: torch.ones(4, 4) for name in names}})
    done = cur("compress", source, "--text", text, *small(source), way, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "no part of a LlamaForCausalLM" in said
    assert all(name in said for name in names)
    assert CompressionReport.load(tmp_path / "out" / "report.json").unread == tuple(sorted(names))


def test_tensors_that_the_class_hides_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("causal", tmp_path / "source")
    rewrite(source, lambda tensors: {**tensors, "mtp.norm.weight": torch.ones(4)})
    monkeypatch.setattr(hf.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ["^mtp.*"])
    assert origin_of(load_model(source).model).unread == ("mtp.norm.weight",)
    assert origin_of(load_streamed(source).model).unread == ("mtp.norm.weight",)


def test_where_a_model_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("causal", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for model in (load_model("source").model, load_streamed("source").model, hf.LlamaModel.from_pretrained("source")):
        assert origin_of(model).source == str(source)
    assert origin_of(KINDS["causal"]()).source == ""


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
def test_the_stored_dtype_is_the_default(way: str, tmp_path: Path, text: Path) -> None:
    source = write("bfloat16", tmp_path / "source")
    done = cur("compress", source, "--text", text, *small(source), way, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    same_outside(source, tmp_path / "out", "q_proj")
    report = CompressionReport.load(tmp_path / "out" / "report.json")
    assert report.before.file_bytes == (source / "model.safetensors").stat().st_size
    assert report.after.file_bytes == (tmp_path / "out" / "cur_model.safetensors").stat().st_size
    assert "bytes on disk" in done.stdout
    assert load_model(source, dtype=torch.float32).model.dtype == torch.float32


def test_what_is_stored_counts_not_what_is_said(tmp_path: Path) -> None:
    source = write("causal", tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**config_of(source), "dtype": "bfloat16"}))
    assert load_model(source).model.dtype == torch.float32
    assert load_streamed(source).dtype == torch.float32
    assert opening.stored_dtype(source) == torch.float32


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_refused_at_once(with_config: bool, tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source") if with_config else tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
    for command in ("compress", "plan", "evaluate"):
        options = [] if command == "evaluate" else ["--out", tmp_path / "out"]
        refused(cur(command, source, "--text", text, *options), "is an adapter", "merge it first")
    with pytest.raises(ValueError, match="merge it first"):
        load_streamed(source)
    (source / "config.json").unlink(missing_ok=True)
    for command in ("heal", "convert", "quantize", "export", "inspect"):
        options = [] if command == "inspect" else ["--out", tmp_path / "out"]
        options += ["--text", text] if command in ("heal", "quantize") else []
        refused(cur(command, source, *options), "is an adapter", "merge it first")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_an_adapter_in_memory_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(write("causal", tmp_path / "source")).model
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for one in (tuned, model):
        with pytest.raises(
            ValueError, match=r"carries the adapter 'default' at .*; merge it first, .*merge_and_unload"
        ):
            compress(one, torch.randint(4, 100, (2, 16)))


def test_errors_of_loading_are_whole(tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source")
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(source)
    assert caught.value.__cause__ is not None
    whole = " ".join(str(caught.value.__cause__).split())
    assert whole in str(caught.value)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
print("own code speaks")

class OwnConfig(LlamaConfig):
    model_type = "own_x"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_when_it_is_trusted(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = write("causal", tmp_path / "own")
    (source / "modeling_own.py").write_text(OWN)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    data = {**config_of(source), "model_type": "own_x", "architectures": ["Own"], "auto_map": own}
    (source / "config.json").write_text(json.dumps(data))
    given = ("compress", source, "--text", text, *SMALL, "q_proj", "--json", "--out", tmp_path / "small")
    refused(cur(*given), "--trust-remote-code")
    done = cur(*given, "--trust-remote-code")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(tmp_path / "small")
    assert config_of(tmp_path / "small")["architectures"] == ["Own"]
    assert (tmp_path / "small" / "modeling_own.py").exists()
    done = cur("evaluate", tmp_path / "small", "--text", text, "--windows", 2, "--window-length", 16)
    refused(done, "--trust-remote-code")


def test_every_kind_can_be_written(tmp_path: Path) -> None:
    others = set(KINDS) - set(AUTO)
    assert others
    for kind in others:
        assert (
            load_model(write(kind, tmp_path / kind)).model.__class__.__name__
            == config_of(tmp_path / kind)["architectures"][0]
        )


@pytest.mark.parametrize("way", ["--in-memory", "--low-memory"])
def test_layers_are_not_compressed_twice(way: str, tmp_path: Path, text: Path) -> None:
    source = write("causal", tmp_path / "source")
    done = cur("compress", source, "--text", text, *small(source), "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    again = ("compress", tmp_path / "small", "--text", text, way, "--out", tmp_path / "out")
    refused(cur(*again, *small(source)), "`model` is compressed already, in 2 layers", "start from the dense model")
    whole = ("--own-text", 0, "--no-gradients", "--correction", 0)
    refused(
        cur(*again, "--windows", 4, "--window-length", 16, "--keep", 0.7, *whole),
        "is a factor of a layer that is compressed already; start from the dense model",
    )


def test_what_hears_or_reads_needs_no_tokenizer(tmp_path: Path) -> None:
    """Pop2Piano is given sound or text; without files its tokenizer cannot be made."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = hf.Pop2PianoConfig(vocab_size=20, **sizes)
    hf.Pop2PianoForConditionalGeneration(config).save_pretrained(tmp_path / "sound")
    assert load_model(tmp_path / "sound").tokenizer is None
