"""What cannot be done block by block is said before anything is measured, read or written."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomBlock
from transformers.models.llama.modeling_llama import LlamaMLP

from cur.integrations import BudgetConfig, CompressConfig, collect, compress, load_model, save
from cur.integrations.blockwise import calibrate, compress_blockwise, load_streamed, perplexity_blockwise
from cur.integrations.blockwise.rehearsal import Rehearsal
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.shards import Shards
from cur.integrations.measure.propagation import fitting_fault
from cur.integrations.model.blocks import ChainError
from cur.integrations.model.precision import Precision
from tests.models import make, tokenizer

PAPER = CompressConfig(layers="all", targets=("gate_proj",), rank=4)
BUDGET = BudgetConfig(keep=0.8, gradients=False, own_text=0.0)

Change = Callable[[StreamedModel], None]


def opened(model: PreTrainedModel, directory: Path) -> StreamedModel:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return load_streamed(directory)


def kept(model: Any, number: int) -> list[torch.Tensor]:
    """What block `number` returned last, as a model keeps it for later ones."""
    found: list[torch.Tensor] = []
    model.base_model.layers[number].register_forward_hook(lambda _, __, output: found.append(output))
    return found


def skipping(streamed: StreamedModel) -> None:
    """What the first block returned is added to the input of the fourth, as in a U."""
    first = kept(streamed.model, 0)
    fourth: Any = streamed.blocks[3][1]
    fourth.register_forward_pre_hook(lambda _, args: (args[0] + first[-1], *args[1:]))


def turning(streamed: StreamedModel) -> None:
    """The fourth block's positions depend on what the first returned; the hidden state is handed on as ever."""
    first = kept(streamed.model, 0)
    fourth: Any = streamed.blocks[3][1]

    def change(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        cosines, sines = options["position_embeddings"]
        return args, {**options, "position_embeddings": (cosines * first[-1].mean(), sines)}

    fourth.register_forward_pre_hook(change, with_kwargs=True)


def leaving(streamed: StreamedModel) -> None:
    """The first block leaves something for the fourth where nobody looks."""
    left: list[torch.Tensor] = []
    first, fourth = (streamed.blocks[number][1] for number in (0, 3))
    part: Any = first.get_submodule("mlp")
    part.register_forward_hook(lambda _, __, output: left.append(output))
    block: Any = fourth
    block.register_forward_pre_hook(lambda _, args: (args[0] + left.pop(), *args[1:]) if left else args)


def measured_nothing(streamed: StreamedModel, windows: Any, place: Path, config: Any, said: str) -> None:
    """The run is refused with a sentence, before the first pass over text, and nothing is left of it."""
    before = sorted(place.iterdir())
    passes: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "collect", lambda *args, **options: passes.append(args) or collect(*args, **options))
        with pytest.raises(ChainError, match=said):
            compress_blockwise(
                streamed,
                windows,
                place / "out",
                config,
                progress=lambda *step: passes.append(step),
                precision="float32",
            )
    assert not passes
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (skipping, r"model\.layers\.3 depends on what several blocks before it returned, .*; load the whole model"),
        (turning, r"model\.layers\.3 depends on what several blocks before it returned, .*; load the whole model"),
        (leaving, r"model\.layers\.3 of LlamaForCausalLM depends on more than what it is called with"),
    ],
)
@pytest.mark.parametrize("config", [PAPER, BUDGET], ids=["paper", "budget"])
def test_a_block_that_depends_on_others_before_the_last(
    change: Change, said: str, config: Any, windows: torch.Tensor, tmp_path: Path
) -> None:
    streamed = opened(make("llama", blocks=5), tmp_path / "dense")
    change(streamed)
    measured_nothing(streamed, windows, tmp_path, config, said)


def test_a_block_that_returns_what_is_not_kept(
    windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"vocab_size": 101, "hidden_size": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    streamed = opened(BloomForCausalLM(BloomConfig(**shape)), tmp_path / "dense")
    pair = namedtuple("pair", ["hidden", "rest"])
    forward = BloomBlock.forward

    def other(block: BloomBlock, *args: Any, **options: Any) -> Any:
        output: Any = forward(block, *args, **options)
        return pair(*output) if block.self_attention.layer_idx == 2 else output

    monkeypatch.setattr(BloomBlock, "forward", other)
    config = CompressConfig(layers="all", targets=("dense_h_to_4h",), rank=4)
    said = r"transformer\.h\.2: block-0002 returns pair; block by block only tensors are kept, so load the whole model"
    measured_nothing(streamed, windows, tmp_path, config, said)


def test_a_layer_that_cannot_be_measured(
    windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = opened(make("llama", blocks=4), tmp_path / "dense")
    forward = LlamaMLP.forward

    def shorter(mlp: LlamaMLP, x: torch.Tensor) -> Any:
        if not hasattr(mlp, "odd"):
            return forward(mlp, x)
        gate = torch.nn.functional.pad(mlp.act_fn(mlp.gate_proj(x[:, 1:])), (0, 0, 1, 0))
        return mlp.down_proj(gate * mlp.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", shorter)
    vars(streamed.model.get_submodule("model.layers.2.mlp"))["odd"] = True
    mask = torch.ones_like(windows)
    mask[3, :5] = 0  # neither the first batch nor the first sample
    given = [{"input_ids": windows[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    said = (
        r"cannot be run block by block \(the input of 'model\.layers\.2\.mlp\.gate_proj' has .* calibrate with unpadded"
    )
    measured_nothing(streamed, given, tmp_path, PAPER, said)


def test_what_comes_behind_the_blocks_and_needs_several(windows: torch.Tensor, tmp_path: Path) -> None:
    streamed = opened(make("llama", blocks=4), tmp_path / "dense")
    first = kept(streamed.model, 0)
    norm: Any = streamed.model.base_model.norm
    norm.register_forward_pre_hook(lambda _, args: (args[0] + first[-1],))
    scored: list[object] = []
    said = "what LlamaForCausalLM returns depends on what several of its blocks returned"
    with pytest.raises(ChainError, match=said):
        perplexity_blockwise(streamed, windows, progress=lambda *step: scored.append(step))
    assert scored == []
    with pytest.raises(ChainError, match=said):
        compress_blockwise(streamed, windows, tmp_path / "out", PAPER, held_out=windows)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    compress_blockwise(streamed, windows, tmp_path / "out", PAPER)  # the end is not asked for


def test_what_chance_has_a_part_in_is_not_refused(windows: torch.Tensor, tmp_path: Path) -> None:
    streamed = opened(make("llama", blocks=4), tmp_path / "dense")
    block: Any = streamed.blocks[2][1]
    block.register_forward_pre_hook(lambda _, args: (args[0] + torch.rand_like(args[0]), *args[1:]))
    Rehearsal(streamed, [windows], Precision.of(streamed.model, "float32")).check(end=True)


@pytest.mark.parametrize("least", [1, 20])
def test_nothing_is_read_and_one_block_is_in_memory(
    least: int, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = opened(make("llama", blocks=4), tmp_path / "dense")
    lengths: list[int] = []
    held: list[int] = []

    def look(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        lengths.append(args[0].shape[1])
        whole: Any = module
        held.append(sum(any(not p.is_meta for p in block.parameters()) for block in whole.around))
        if args[0].shape[1] < least:
            raise ValueError("so few tokens are none that the model takes")

    monkeypatch.setattr("cur.integrations.blockwise.rehearsal._TOKENS", 8)
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a tensor is read"))
    for _, block in streamed.blocks:
        vars(block)["around"] = [block for _, block in streamed.blocks]
        block.register_forward_pre_hook(look, with_kwargs=True)
    rehearsal = Rehearsal(streamed, [windows], Precision.of(streamed.model, "float32"))
    rehearsal.check(["model.layers.1.mlp.gate_proj"], end=True)
    assert rehearsal.correction_fault(["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.down_proj"]) is None
    assert set(lengths) == ({8} if least == 1 else {8, windows.shape[1]})
    assert set(held) <= {0, 1}
    assert all(p.is_meta for p in streamed.model.parameters())


def test_correction_is_left_out_where_it_is_in_memory(windows: torch.Tensor, tmp_path: Path) -> None:
    """Before the measurement, with the same sentence and the same result."""
    model = make("gemma3n_text")
    streamed = opened(model, tmp_path / "dense")
    told: list[str] = []
    parts = compress_blockwise(streamed, windows, tmp_path / "parts", BUDGET, announce=told.append)
    loaded = load_model(tmp_path / "dense")
    whole = compress(loaded.model, windows, BUDGET)
    save(loaded.model, loaded.tokenizer, tmp_path / "whole", report=whole)
    assert parts.plan.correction == 0.0
    assert "a block leaves something for later ones" in parts.notes[0]
    assert parts.notes[0] in told
    assert parts.notes == whole.notes
    one, two = ((tmp_path / name / "cur_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two
    assert json.loads((tmp_path / "parts" / "plan.json").read_text())["correction"] == 0.0


def test_blocks_that_cannot_be_held_before_a_layer(windows: torch.Tensor) -> None:
    import threading

    model = make("llama")
    names = ["model.layers.1.mlp.gate_proj"]
    assert fitting_fault(model, {"input_ids": windows}, names) is None
    vars(model.base_model.layers[1])["lock"] = threading.Lock()
    fault = fitting_fault(model, {"input_ids": windows}, names)
    assert fault is not None
    assert "cannot be copied, or held before a layer (cannot pickle '_thread.lock' object)" in fault
    report = compress(model, windows, BudgetConfig(keep=0.8, own_text=0.0))
    assert report.plan.correction == 0.0
    assert any(fault in note for note in report.notes)
