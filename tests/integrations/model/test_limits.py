"""Windows and tokens that a model cannot take are refused before anything runs, in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from cur.cli.app import app
from cur.healing import HealingConfig, heal
from cur.integrations import BudgetConfig, CompressConfig, collect, compress, load_model, perplexity
from cur.integrations.blockwise import compress_blockwise, load_streamed, perplexity_blockwise
from cur.integrations.model.limits import check_windows, positions
from tests.models import TEXT, tokenizer, write

SHORT: dict[str, Any] = {"vocab_size": 90, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}


_INNER: dict[str, Any] = {"intermediate_size": 32}
_PLACES: dict[str, Any] = {"max_position_embeddings": 40}
_GPT: dict[str, Any] = {"vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}

MODELS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)), 40),
    "gptj": (lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=8)), 40),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**SHORT, **_PLACES, ffn_dim=32, word_embed_proj_dim=32)), 40),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SHORT, **_INNER, **_PLACES)), 40),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**SHORT, **_INNER, max_position_embeddings=42)), 40),
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**SHORT, **_INNER, **_PLACES)), None),
    "ctrl": (lambda: hf.CTRLLMHeadModel(hf.CTRLConfig(**_GPT, dff=32)), 40),
    "ibert": (lambda: hf.IBertModel(hf.IBertConfig(**SHORT, **_INNER, max_position_embeddings=42)), 40),
    "mpt": (
        lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=90, d_model=32, n_layers=1, n_heads=2, max_seq_len=40)),
        40,
    ),
    "nystromformer": (lambda: hf.NystromformerModel(hf.NystromformerConfig(**SHORT, **_INNER, **_PLACES)), 40),
    "roformer": (lambda: hf.RoFormerModel(hf.RoFormerConfig(**SHORT, **_INNER, **_PLACES)), 40),
}


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_those_that_the_model_runs_with(name: str) -> None:
    make, expected = MODELS[name]
    model = make().eval()
    assert positions(model) == expected
    model(input_ids=torch.randint(5, 90, (1, 40)))
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.randint(5, 90, (1, 41)))
        with pytest.raises(ValueError, match="windows of 41 tokens, the model's table of positions ends at 40"):
            check_windows(model, torch.randint(5, 90, (1, 41)))


def test_towers_of_images_have_positions_of_their_own(tmp_path: Path) -> None:
    assert positions(load_model(write("vision-language", tmp_path / "source")).model) is None


def test_a_table_that_grows_is_no_end() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "src_vocab_size": 90, "tgt_vocab_size": 90}
    model = hf.FSMTModel(hf.FSMTConfig(langs=["en", "de"], **sizes, **heads, **_PLACES)).eval()
    ids = torch.randint(5, 90, (1, 60))
    model(input_ids=ids, decoder_input_ids=ids)
    assert positions(model) is None


SEES: dict[str, Callable[[], Any]] = {
    "ViTForImageClassification": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**{**SHORT, "num_hidden_layers": 3}, intermediate_size=32, image_size=28, patch_size=14)
    ),
    "CLIPModel": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**SHORT, **_INNER, **_PLACES, "num_hidden_layers": 3, "eos_token_id": 2, "bos_token_id": 1},
            vision_config={**SHORT, **_INNER, "image_size": 28, "patch_size": 14},
        )
    ),
    "BertForMultipleChoice": lambda: hf.BertForMultipleChoice(
        hf.BertConfig(**{**SHORT, "num_hidden_layers": 3}, **_INNER, **_PLACES)
    ),
    "T5ForConditionalGeneration": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=90, d_model=32, d_ff=32, num_layers=3, num_heads=2, d_kv=16, decoder_start_token_id=0)
    ),
}
"""Models that read something else than text, or more."""


@pytest.mark.parametrize("kind", SEES)
def test_what_reads_more_than_text_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    SEES[kind]().save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + index % 80}" for index in range(200)))
    read = ("--text", text, "--windows", 2, "--window-length", 16)
    ranks, budget = ("--layers", 1, "--rank", 4, "--targets", "all-linear"), ("--keep", 0.8)
    for way in (ranks, budget, (*budget, "--no-gradients", "--own-text", 0)):
        if kind == "BertForMultipleChoice" and way is not budget:
            continue  # its head alone wants several texts
        done = _cur("compress", tmp_path / "source", *read, *way, "--out", tmp_path / "out")
        assert done.exit_code == 2, (way, done.exception)
        error = next(line for line in done.stderr.splitlines() if line.startswith("Error: "))
        assert kind in error
        assert "give batches" in error or "leave them out" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tokens", "found"), [([5, 100], 100), ([-1, 5], -1)])
def test_tokens_beyond_the_embeddings(tokens: list[int], found: int, tmp_path: Path) -> None:
    model = load_model(write("causal", tmp_path / "source")).model
    with pytest.raises(ValueError, match=f"`windows` holds token {found}, outside the model's vocabulary of 100"):
        check_windows(model, torch.tensor([tokens]))


@pytest.mark.parametrize("kind", ["learned positions", "causal"])
def test_python_entries_refuse_them_before_they_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(kind, tmp_path / "source")
    bad = torch.randint(4, 100, (6, 80)) if kind == "learned positions" else torch.full((6, 16), 100)
    message = "table of positions ends at 64" if kind == "learned positions" else "holds token 100"
    model, streamed = load_model(source).model, load_streamed(source)
    target = "attn.c_attn" if kind == "learned positions" else "q_proj"
    config = CompressConfig(layers=1, targets=(target,), rank=4)
    name = f"{'transformer.h' if '.' in target else 'model.layers'}.1.{'' if '.' in target else 'self_attn.'}{target}"
    student = load_model(source).model
    compress(student, torch.randint(4, 100, (2, 8)), config)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("nothing may run"))
    uses: list[Callable[[], object]] = [
        lambda: compress(model, bad, config),
        lambda: compress(model, bad, BudgetConfig(keep=0.7)),
        lambda: perplexity(model, bad),
        lambda: collect(model, [bad], modules=[name]),
        lambda: compress_blockwise(streamed, bad, tmp_path / "out", config),
        lambda: perplexity_blockwise(streamed, bad),
        lambda: heal(student, model, bad, HealingConfig(steps=1, held_out=2, precision="float32")),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("more", [0, 50])
def test_commands_refuse_them(more: int, tmp_path: Path) -> None:
    """A window of 512, the default, and a tokenizer with more words than the model has."""
    source = write("learned positions", tmp_path / "source", more=more)
    text, one = tmp_path / "text.txt", tmp_path / "short.txt"
    text.write_text(" ".join(f"w{149 - index % 140}" for index in range(13000)) if more else " ".join([TEXT] * 24))
    one.write_text(TEXT)
    fits: tuple[object, ...] = ("--window-length", 16)
    length: tuple[object, ...] = fits if more else ()
    what = "outside the model's vocabulary of 100" if more else "table of positions ends at 64"
    small = ("--windows", 2, "--layers", 2, "--rank", 4, "--targets", "attn.c_attn")
    done = _cur("compress", source, "--text", one, *fits, *small, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    for command in (
        ("compress", source, *small, "--in-memory", "--out", tmp_path / "out"),
        ("compress", source, *small, "--low-memory", "--out", tmp_path / "out"),
        ("plan", source, *small, "--out", tmp_path / "plan.json"),
        ("evaluate", source, "--windows", 2, "--in-memory"),
        ("evaluate", source, "--windows", 2, "--low-memory"),
        ("quantize", tmp_path / "small", "--windows", 2, "--out", tmp_path / "out"),
        ("heal", tmp_path / "small", "--steps", 1, "--out", tmp_path / "out"),
    ):
        done = _cur(*command, "--text", text, *length)
        assert done.exit_code == 2, (command, done.stderr)
        assert done.stdout == ""
        assert what in " ".join(done.stderr.split()), (command, done.stderr)
    assert not (tmp_path / "out").exists()
    done = _cur("compress", source, "--text", one, *fits, *small, "--held-out", text, "--out", tmp_path / "out")
    if more:
        assert done.exit_code == 2
        assert what in " ".join(done.stderr.split())
    else:  # held-out windows are as long as the model allows
        assert done.exit_code == 0, done.stderr


def _cur(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
