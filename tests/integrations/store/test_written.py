"""Every file and tensor of a checkpoint is accounted for in what any command makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from cur.cli.app import app
from cur.integrations import CompressConfig, compress, save
from cur.integrations.files.beside import HISTORY, PAGE
from cur.integrations.store.account import compare

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = ["--layers", 1, "--rank", 6, "--windows", 4, "--window-length", 16]
MTP = "mtp.layers.0.eh_proj.weight"


def cur(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{index}" for index in torch.randint(4, 100, (200,), generator=generator).tolist()))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, 100)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **options}))


def plain(place: Path) -> None:
    llama().save_pretrained(place)


def tied(place: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(place)


def both_tied_stored(place: Path) -> None:
    tied(place)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def bfloat16(place: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(place)


def sharded(place: Path) -> None:
    llama().save_pretrained(place, max_shard_size=20_000)


def pickled(place: Path) -> None:
    model = llama()
    model.save_pretrained(place)
    (place / "model.safetensors").unlink()
    # As the oldest checkpoints are, which cannot be mapped into memory.
    torch.save(model.state_dict(), place / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def extra(place: Path) -> None:
    plain(place)
    tensors = load_file(place / "model.safetensors")
    tensors[MTP] = torch.randn(32, 64)
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.randn(48, 32)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def extra_sharded(place: Path) -> None:
    sharded(place)
    save_file({MTP: torch.randn(32, 64)}, place / "model-extra.safetensors", metadata={"format": "pt"})
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][MTP] = "model-extra.safetensors"
    path.write_text(json.dumps(index))


def code(place: Path) -> None:
    plain(place)
    for name, words in {
        "modeling_own.py": "VALUE = 1\n",
        "LICENSE": "free\n",
        "NOTICE.txt": "of others\n",
        "chat_template.jinja": "{{ messages }}",
        "processor_config.json": "{}",
        "assets/logo.svg": "<svg/>",
        "modules.json": json.dumps([{"path": ""}, {"path": "2_Dense"}]),
        "2_Dense/config.json": "{}",
        "report.html": "of another",
        "model.safetensors.index.json": "stale",
        "optimizer.pt": "of a training",
        "onnx/model.onnx": "of another format",
    }.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(words)
    (place / "model.safetensors.index.json").unlink()
    save_file({"linear.weight": torch.randn(4, 32)}, place / "2_Dense" / "model.safetensors")


def all_at_once(place: Path) -> None:
    code(place)
    extra(place)


def experts(place: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=4)
    ).save_pretrained(place)


def vision(place: Path) -> None:
    words = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    words |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=words,
        vision_config={**sight, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(place)
    (place / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')


MAKERS: dict[str, Callable[[Path], None]] = {
    maker.__name__: maker
    for maker in (
        plain, tied, both_tied_stored, bfloat16, sharded, pickled, extra, extra_sharded, all_at_once, experts, vision
    )
}  # fmt: skip

# Files that are none of the result's: weights under their own names, and what is written anew.
LEFT = {"README.md", "config.json", "report.html", "optimizer.pt", "onnx"}


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place: Path = tmp_path / "source"
    place.mkdir()
    MAKERS[request.param](place)
    tokenizer().save_pretrained(place)
    return place


def files(place: Path) -> dict[str, bytes]:
    found = {file.relative_to(place).as_posix(): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    top = (".safetensors", ".bin", ".index.json")
    return {
        name: data
        for name, data in found.items()
        if name.split("/")[0] not in LEFT and not ("/" not in name and name.endswith(top))
    }


def weights(place: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in place.glob("*.safetensors"):
        found |= load_file(file)
    return found


def accounted(done: Any, out: Path, source: Path, *, dense: bool = False) -> None:
    assert done.exit_code == 0, done.stderr
    for name, data in files(source).items():
        if name in HISTORY or name == "account.json":
            continue
        assert (out / name).exists(), name
        if name != "generation_config.json":  # written anew by its own class
            assert (out / name).read_bytes() == data, name
    assert not (out / PAGE).exists() or (out / PAGE).read_text() != "of another"
    assert not (out / "onnx").exists()
    shown = cur("inspect", out, "--against", source, "--json")
    assert shown.exit_code == 0, shown.stderr
    account = json.loads(shown.stdout)["account"]
    assert account["missing"] == account["extra"] == account["changed"] == []
    assert account["rounded"] == []
    assert account["compressed"]
    assert json.loads((out / "account.json").read_text())["account"] == {**account, "against": str(source)}
    there = weights(source)
    for name in account["unread"]:
        assert torch.equal(weights(out)[name], there[name])
    assert {name for name in there if name.startswith("mtp")} <= set(account["unread"])
    if not dense:
        assert not (out / "model.safetensors").exists()


IN_MEMORY = [name for name in MAKERS if name not in ("plain", "sharded", "extra")]
BLOCK_BY_BLOCK = [name for name in IN_MEMORY if name not in ("pickled", "both_tied_stored")]


@pytest.mark.parametrize(
    ("way", "source"),
    [*(("--in-memory", name) for name in IN_MEMORY), *(("--low-memory", name) for name in BLOCK_BY_BLOCK)],
    indirect=["source"],
)
def test_compress(way: str, source: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    targets = ["--targets", "all-linear"] if config["model_type"] == "mixtral" else []
    out = tmp_path / "out"
    dtype = config.get("dtype") or "float32"
    done = cur("compress", source, "--text", text, *SMALL, *targets, way, "--dtype", dtype, "--out", out)
    accounted(done, out, source)
    assert "bit by bit" in done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["account"]["same"] > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("source", ["all_at_once"], indirect=True)
def test_what_is_made_of_it(source: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    accounted(cur("compress", source, "--text", text, *SMALL, "--out", small), small, source)
    read = ["--text", text, "--windows", 4, "--window-length", 16]
    heal = ["heal", small, *read, "--teacher", source, "--steps", 1, "--held-out", 1, "--batch-size", 1]
    for name, words in {
        "other": ["convert", small, "--layout", "folded"],
        "rounded": ["quantize", small, *read],
        "healed": heal,
        "healed_low": [*heal, "--low-memory"],
        "dense": ["export", small],
    }.items():
        out = tmp_path / name
        accounted(cur(*words, "--out", out), out, small, dense=name == "dense")
        assert not (name == "dense" and any((out / record).exists() for record in HISTORY))
        assert name == "dense" or (out / "plan.json").exists()
    assert not (tmp_path / "rounded" / PAGE).exists(), "of another state"
    shown = cur("inspect", tmp_path / "dense", "--against", source)
    assert "Other values: 3" in shown.stdout
    assert "Missing" not in shown.stdout


def test_an_encoder_with_what_sentence_transformers_keeps(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    BertModel(BertConfig(**sizes)).save_pretrained(source)
    parts = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    (source / "modules.json").write_text(json.dumps(parts))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "sentence_bert_config.json").write_text("{}")
    tensors = load_file(source / "model.safetensors")
    tensors["cls.predictions.bias"] = torch.randn(100)  # a head that the class of the encoder has no place for
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = BertModel.from_pretrained(source)
    compress(model, torch.randint(3, 100, (4, 16)), CompressConfig(layers=1, rank=4, targets=("query",)))
    save(model, None, tmp_path / "out")
    account = compare(tmp_path / "out", source)
    assert account.missing == account.extra == account.changed == account.missing_files == []
    assert account.unread == ["cls.predictions.bias"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    BertModel.from_pretrained(tmp_path / "out")


def test_weights_of_another_name_are_no_reason_to_lose_the_work(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source", variant="fp16")
    (tmp_path / "source" / "LICENSE").write_text("free")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", variant="fp16")
    compress(model, torch.randint(3, 100, (4, 16)), CompressConfig(layers=1, rank=4))
    save(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "account.json").read_text())["account"] is None
    assert (tmp_path / "out" / "LICENSE").exists()


def test_a_weight_that_is_stored_under_another_of_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for here, there in (("one", "other"), ("other", "one")):
        account = compare(tmp_path / here, tmp_path / there)
        assert account.missing == account.extra == account.changed == account.rounded == []
        assert account.same == len(tensors)


def test_what_was_said_of_the_tokenizer_before(tmp_path: Path) -> None:
    plain(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    compress(model, torch.randint(3, 100, (4, 16)), CompressConfig(layers=1, rank=4))
    changed = AutoTokenizer.from_pretrained(tmp_path / "source")
    changed.eos_token = "w7"
    save(model, changed, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "w7"
    save(model, None, tmp_path / "with its own")
    assert (tmp_path / "with its own" / "special_tokens_map.json").exists()
    for out in ("out", "with its own"):
        assert compare(tmp_path / out, tmp_path / "source").missing_files == []


def test_what_the_user_took_away_does_not_come_back(tmp_path: Path) -> None:
    plain(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    compress(model, torch.randint(3, 100, (4, 16)), CompressConfig(layers=1, rank=4))
    save(model, None, tmp_path / "out")
    written, missing = weights(tmp_path / "out"), compare(tmp_path / "out", tmp_path / "source").missing
    assert any(name.startswith("model.layers.2.") for name in written)
    assert not any(name.startswith("model.layers.3.") for name in written)
    assert missing
    assert all(name.startswith("model.layers.3.") for name in missing)


def test_a_tensor_that_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    compress(model, torch.randint(3, 100, (4, 16)), CompressConfig(layers=1, rank=4))
    monkeypatch.setattr(model, "_keys_to_ignore_on_save", ["model.norm.weight"])
    with pytest.raises(ValueError, match=r"model\.norm\.weight of .* would be missing in what was written"):
        save(model, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
