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
from cur.integrations.blockwise import compress_blockwise, load_skeleton, perplexity_blockwise
from cur.integrations.model.limits import check_windows, positions
from tests.integrations.checkpoints import TEXT, write

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
    model, skeleton = load_model(source).model, load_skeleton(source)
    target = "attn.c_attn" if kind == "learned positions" else "q_proj"
    config = CompressConfig(layers=1, targets=(target,), rank=4)
    name = f"{'transformer.h' if '.' in target else 'model.layers'}.1.{'' if '.' in target else 'self_attn.'}{target}"
    student = load_model(source).model
    compress(student, torch.randint(4, 100, (2, 8)), config)
    monkeypatch.setattr(type(model), "forward", None)  # nothing may run
    uses: list[Callable[[], object]] = [
        lambda: compress(model, bad, config),
        lambda: compress(model, bad, BudgetConfig(keep=0.7)),
        lambda: perplexity(model, bad),
        lambda: collect(model, [bad], modules=[name]),
        lambda: compress_blockwise(skeleton, bad, tmp_path / "out", config),
        lambda: perplexity_blockwise(skeleton, bad),
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
