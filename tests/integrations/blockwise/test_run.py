from __future__ import annotations

import ctypes
import filecmp
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cur.integrations import BudgetConfig, CompressConfig, CompressionReport, compress, load_model, save
from cur.integrations.blockwise import StreamedModel, compress_blockwise, load_streamed
from cur.integrations.compress import as_batches, carry_out_, measure
from cur.integrations.files.shards import Shards
from cur.integrations.measure.statistics import Statistics
from cur.integrations.nn import IntegerGrid
from cur.integrations.plan.make import make_plan
from cur.integrations.plan.methods import RoundedEntry
from cur.integrations.plan.plan import Plan, PlanError, fingerprint
from cur.integrations.report.perplexity import perplexity
from tests import models

TARGETS = {
    "llama": ("q_proj", "k_proj", "gate_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_fc"),
}

LIBC = None if sys.platform == "win32" else ctypes.CDLL(None)


def both(
    directory: Path, windows: Any, config: CompressConfig | BudgetConfig, **options: Any
) -> tuple[CompressionReport, CompressionReport]:
    """Compress in memory to `whole`, block by block to `parts`, beside a checkpoint."""
    loaded = load_model(directory, **options)
    whole = compress(loaded.model, windows, config)
    save(loaded.model, loaded.tokenizer, directory.parent / "whole", report=whole, max_shard_size="20kB")
    streamed = load_streamed(directory, **options)
    return whole, compress_blockwise(streamed, windows, directory.parent / "parts", config, max_shard_size="20kB")


def same_files(directory: Path) -> None:
    """Everything but times is equal, byte for byte; angular distances, up to rounding."""
    whole, parts = directory.parent / "whole", directory.parent / "parts"
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    assert any(name.startswith("cur_model") for name in names)
    for name in names:
        if name not in ("plan.json", "report.json", "report.html"):
            assert filecmp.cmp(whole / name, parts / name, shallow=False), name
    plans = [json.loads((place / "plan.json").read_text()) for place in (whole, parts)]
    angles = [plan.pop("angular") for plan in plans]
    assert plans[0] == plans[1]
    assert angles[0] == pytest.approx(angles[1], rel=1e-12)
    assert not list(directory.parent.glob(".*"))  # nothing is left of the run


def same_layers(whole: CompressionReport, parts: CompressionReport) -> None:
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert (one.name, one.rank, one.rows, one.columns) == (other.name, other.rank, other.rows, other.columns)
        # Around removed neurons layers take or return fewer features.
        assert one.output is not None or one.layout in ("outputs", "inputs")
        assert one.output == other.output
    assert (whole.before, whole.after) == (parts.before, parts.after)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_result_is_that_of_the_model_in_memory(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, kind: str
) -> None:
    directory = checkpoint(kind)
    whole, parts = both(directory, windows, CompressConfig(layers=2, rank=4, targets=TARGETS[kind], batch_size=2))
    assert len(parts.layers) == 2 * len(TARGETS[kind])
    same_layers(whole, parts)
    same_files(directory)
    model = AutoModelForCausalLM.from_pretrained(directory.parent / "parts")
    assert torch.isfinite(model(windows).logits).all()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (0, 4), "importance": "covariance", "link": "covariance", "layout": "interpolative"},
        {"layers": "all", "rank": None, "energy": 0.7},
        {"layers": "all", "rank": None, "tolerance": 0.9, "layout": "folded"},
    ],
)
def test_every_rule_of_ranks(checkpoint: Callable[[str], Path], windows: torch.Tensor, options: dict[str, Any]) -> None:
    directory = checkpoint("llama")
    config = CompressConfig(**{"rank": 5, "targets": ("k_proj", "up_proj"), **options})
    whole, parts = both(directory, windows, config)
    same_layers(whole, parts)
    same_files(directory)


def test_padding_and_half_precision(checkpoint: Callable[[str], Path], windows: torch.Tensor) -> None:
    mask = torch.ones_like(windows)
    mask[0, :5] = mask[3, :7] = mask[5, 20:] = 0
    given = [{"input_ids": windows[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    directory = checkpoint("llama")
    whole, parts = both(directory, given, CompressConfig(layers=1, rank=4), dtype=torch.bfloat16)
    same_layers(whole, parts)
    same_files(directory)


@pytest.mark.parametrize("kind", ["gpt2", "fsmt"])
def test_a_model_is_called_with_the_same_as_in_memory(kind: str, windows: torch.Tensor, tmp_path: Path) -> None:
    """With positions that pass over padding on the left, and without a cache, with which FSMT masks nothing."""
    directory = tmp_path / "model"
    models.make(kind).save_pretrained(directory)
    models.tokenizer().save_pretrained(directory)
    mask = torch.ones_like(windows)
    mask[:4, :9] = 0
    given = {"input_ids": windows, "attention_mask": mask}
    if kind == "fsmt":
        given["labels"] = windows.flip(1)[:, :15]
    whole, parts = both(directory, [given], CompressConfig(layers="all", rank=4, targets="all-linear"))
    same_layers(whole, parts)
    same_files(directory)


@pytest.mark.parametrize("method", ["best", "rows"])
def test_a_budget_is_shared_in_two_passes(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, method: str
) -> None:
    directory = checkpoint("llama")
    config = BudgetConfig(keep=0.8, method=method, gradients=False, own_text=0, correction=0.0)
    whole, parts = both(directory, windows, config)
    assert len({entry.ranks for entry in parts.plan.entries}) > 1
    same_layers(whole, parts)
    same_files(directory)


@pytest.mark.parametrize(
    ("keep", "options"), [(0.8, {"neurons": False}), (0.4, {}), (0.7, {"method": "rows", "correction": 1.0})]
)
def test_layers_are_corrected_for_those_before(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, keep: float, options: dict[str, Any]
) -> None:
    directory = checkpoint("llama")
    config = BudgetConfig(keep=keep, gradients=False, own_text=0, **options)
    assert config.correction > 0
    whole, parts = both(directory, windows, config)
    same_layers(whole, parts)
    same_files(directory)
    if keep == 0.4:
        assert any(layer.layout == "outputs" for layer in parts.layers)
    without = compress(load_model(directory).model, windows, replace(config, correction=0.0))
    assert [one.relative_error for one in without.layers] != [one.relative_error for one in parts.layers]


def test_mixtures_of_experts(tmp_path: Path, checkpoint: Callable[[str], Path], windows: torch.Tensor) -> None:
    tokenizer = checkpoint("llama")
    directory = tmp_path / "mixtral"
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 101}
    config = MixtralConfig(num_hidden_layers=3, num_key_value_heads=2, num_local_experts=3, **shape)
    MixtralForCausalLM(config).save_pretrained(directory, max_shard_size="20kB")
    for file in tokenizer.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    rule = CompressConfig(layers=1, rank=4, targets=("q_proj", "experts.gate_up_proj.1"))
    whole, parts = both(directory, windows, rule)
    assert [layer.name.rpartition("layers.1.")[2] for layer in parts.layers] == [
        "self_attn.q_proj",
        "mlp.experts.gate_up_proj.1",
    ]
    same_layers(whole, parts)
    same_files(directory)


@pytest.mark.parametrize(
    "config",
    [
        CompressConfig(layers="all", rank=4, targets=("q", "wo")),
        BudgetConfig(keep=0.6, gradients=False, own_text=0),  # corrected in both stacks
    ],
)
def test_encoders_with_decoders(tmp_path: Path, windows: torch.Tensor, config: Any) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "vocab_size": 101}
    model = T5ForConditionalGeneration(T5Config(num_layers=3, **shape, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "t5")
    given = [{"input_ids": windows[i : i + 2], "labels": windows[i : i + 2, :9]} for i in (0, 2, 4)]
    whole = compress(model, given, config)
    meta = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", device_map="meta", dtype=torch.float32)
    streamed = StreamedModel(meta, None, Shards(tmp_path / "t5"), torch.device("cpu"))  # type: ignore[arg-type]
    same_layers(whole, compress_blockwise(streamed, given, tmp_path / "parts", config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BudgetConfig(keep=0.8), "`gradients` and `own_text` of a budget need the whole model"),
        (BudgetConfig(keep=0.8, gradients=False, correction=0.0), r"pass own_text=0 \(--own-text 0\)"),
        (CompressConfig(layers=2, span=2), "`span` must be 1"),
        (CompressConfig(layers=9), "`layers` must be between 1 and 3"),
        (CompressConfig(layers=1, targets=("nothing",)), "`targets` 'nothing' matches no module"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, config: Any, message: str
) -> None:
    directory = checkpoint("llama")
    with pytest.raises(ValueError, match=message):
        compress_blockwise(load_streamed(directory), windows, directory.parent / "out", config)
    assert not list(directory.parent.glob("*out*"))


def test_a_weight_that_is_not_finite_is_named(
    make_model: Callable[..., PreTrainedModel], checkpoint: Callable[[str], Path], windows: torch.Tensor
) -> None:
    directory = checkpoint("llama")
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.inf
    for file in directory.glob("model*"):
        file.unlink()
    model.save_pretrained(directory)
    with pytest.raises(ArithmeticError, match=r"the weight 'model\.layers\.3\.mlp\.down_proj\.weight' holds NaN"):
        compress_blockwise(load_streamed(directory), windows, directory.parent / "out", CompressConfig(layers=1))


def _random(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.1)


def memory(name: str) -> int:
    """Return the present ("VmRSS") or the largest ("VmHWM") memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="peaks are read from /proc of Linux with glibc")
def test_peak_memory_does_not_grow_with_depth(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig

    tokenizer = checkpoint("llama")
    config = CompressConfig(layers=1, rank=8, targets=("gate_proj",), batch_size=1)
    peaks, sizes = [], []
    for depth in (3, 3, 15):  # the first run brings in what every run needs
        directory = tmp_path / f"deep{depth}"
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
        with torch.device("meta"):
            described = LlamaConfig(num_hidden_layers=depth, vocab_size=101, **shape)
            model = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
        model.to_empty(device="cpu").apply(_random)
        model.save_pretrained(directory, max_shard_size="5MB")
        del model
        for file in tokenizer.glob("tokenizer*"):
            (directory / file.name).write_bytes(file.read_bytes())
        sizes.append(Shards(directory).bytes)
        gc.collect()
        LIBC.malloc_trim(0)  # what earlier work freed would otherwise serve this run unseen
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest so far
        before = memory("VmRSS")
        windows = torch.arange(2 * 16).reshape(2, 16)
        streamed = load_streamed(directory, dtype=torch.bfloat16)
        compress_blockwise(streamed, windows, tmp_path / "out", config, overwrite=True, max_shard_size="5MB")
        peaks.append(memory("VmHWM") - before)
    assert sizes[2] - sizes[1] > 24e6
    assert peaks[2] - peaks[1] < 0.3 * (sizes[2] - sizes[1])


def test_a_plan_is_carried_out(checkpoint: Callable[[str], Path], windows: torch.Tensor) -> None:
    directory = checkpoint("llama")
    config = CompressConfig(layers=2, rank=4, importance="covariance", link="covariance", batch_size=1)
    loaded = load_model(directory)
    statistics = measure(loaded.model, as_batches(windows, 1), config)
    plan = make_plan(loaded.model, statistics, config)
    edited = replace(plan, entries=tuple(replace(entry, rank=3) for entry in plan.entries[1:]))
    whole = carry_out_(loaded.model, edited, statistics, text=as_batches(windows, 1))
    save(loaded.model, loaded.tokenizer, directory.parent / "whole", report=whole, max_shard_size="20kB")
    parts = compress_blockwise(
        load_streamed(directory), windows, directory.parent / "parts", edited, max_shard_size="20kB"
    )
    same_layers(whole, parts)
    same_files(directory)
    wrong = replace(edited, own_text=0.25)
    with pytest.raises(ValueError, match="need the whole model in memory"):
        compress_blockwise(load_streamed(directory), windows, directory.parent / "wrong", wrong)
    other = replace(edited, fingerprint="another")
    with pytest.raises(PlanError):
        compress_blockwise(load_streamed(directory), windows, directory.parent / "wrong", other)


@pytest.mark.parametrize("importance", ["wanda", "covariance"])
def test_statistics_are_kept_and_used_again(
    checkpoint: Callable[[str], Path], windows: torch.Tensor, importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama")
    config = CompressConfig(layers=2, rank=4, importance=importance, batch_size=2)
    file = directory.parent / "statistics.safetensors"
    first = compress_blockwise(
        load_streamed(directory), windows, directory.parent / "first", config, statistics=file, held_out=windows[:2]
    )
    kept = Statistics.load(file)
    model = load_model(directory).model
    whole = measure(model, as_batches(windows, 2), config)
    assert (kept.counts, kept.text_hash, kept.layers) == (whole.counts, whole.text_hash, whole.layers)
    assert all(torch.equal(kept.square_sums[name], whole.square_sums[name]) for name in whole.square_sums)
    assert all(torch.equal(kept.products[name], whole.products[name]) for name in whole.products)
    assert kept.angular == pytest.approx(whole.angular, rel=1e-12)
    with pytest.raises(ValueError, match="between neighbours alone"):
        kept.angular_spans(2)

    # The file stands for the text: nothing is measured again, and what was measured in memory serves as well.
    whole.save(file)
    monkeypatch.setattr("cur.integrations.blockwise.calibrate.collect", None)
    again = compress_blockwise(load_streamed(directory), windows, directory.parent / "again", config, statistics=file)
    same_layers(first, again)
    for one in (directory.parent / "first").glob("*.safetensors"):
        assert filecmp.cmp(one, directory.parent / "again" / one.name, shallow=False)
    expected = {
        f"{when}, held-out": perplexity(load_model(place).model, windows[:2]).value
        for when, place in (("before", directory), ("after", directory.parent / "first"))
    }
    assert first.perplexity == expected
    assert CompressionReport.load(directory.parent / "first" / "report.json").perplexity == expected


class StopError(Exception):
    pass


def _funnel() -> PreTrainedModel:
    config = hf.FunnelConfig(
        vocab_size=101, block_sizes=[2, 2], d_model=32, n_head=4, d_head=8, d_inner=48, num_decoder_layers=1
    )
    return hf.FunnelForMaskedLM(config)


def _prophetnet() -> PreTrainedModel:
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    config = hf.ProphetNetConfig(vocab_size=101, hidden_size=32, max_position_embeddings=64, **sizes, **heads)
    return hf.ProphetNetForCausalLM(config)


@pytest.mark.parametrize(
    "made", [_funnel, _prophetnet, lambda: models.make("gemma3n_text")], ids=["between", "read", "left"]
)
def test_what_is_known_of_a_model_lasts_longer_than_a_run(
    made: Callable[[], PreTrainedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    """What happens between blocks, what tables are read and what blocks leave is found out once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made().eval()
    model.save_pretrained(tmp_path / "dense")
    models.tokenizer().save_pretrained(tmp_path / "dense")
    config = CompressConfig(layers="all", targets="all-linear", rank=4)

    def stop(stage: str, done: int, _: int | None) -> None:
        if stage == "calibrate" and done == 7:  # in the fourth block
            raise StopError

    parts = as_batches(windows, 4)[:2]
    streamed = load_streamed(tmp_path / "dense")
    with pytest.raises(StopError):
        compress_blockwise(streamed, parts, tmp_path / "parts", config, progress=stop)
    found = compress_blockwise(load_streamed(tmp_path / "dense"), parts, tmp_path / "parts", config)
    whole = compress(load_model(tmp_path / "dense").model, parts, config)
    for one, other in zip(whole.layers, found.layers, strict=True):
        assert one.name == other.name
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)
        assert one.weighted_error == pytest.approx(other.weighted_error, rel=1e-5)


GRID = IntegerGrid(4, 16, symmetric=False)


def planned_on_grids(model: PreTrainedModel, statistics: Statistics, *, factors: bool) -> Plan:
    """Return a plan of whole layers on grids, or of factors and neurons on grids."""
    plan = make_plan(model, statistics, BudgetConfig(keep=0.6, own_text=0.0, gradients=False))
    if factors:
        return replace(plan, entries=tuple(replace(entry, grid=GRID) for entry in plan.entries))
    grids = [GRID, IntegerGrid(), IntegerGrid(8, 16)]
    linear = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    entries = tuple(
        RoundedEntry(name=name, shape=tuple(part.weight.shape), grid=grids[index % len(grids)])
        for index, (name, part) in enumerate(linear)
        if name.startswith("model.layers.")
    )
    return replace(plan, entries=entries)


@pytest.mark.parametrize(("factors", "dtype"), [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)])
def test_a_plan_with_grids_writes_the_same_files(
    tmp_path: Path, windows: Any, factors: bool, dtype: torch.dtype
) -> None:
    source = tmp_path / "model"
    models.make("llama", seed=0, blocks=2, tie_word_embeddings=False).to(dtype).save_pretrained(source)
    models.tokenizer().save_pretrained(source)
    loaded = load_model(source)
    text = as_batches(windows, 1)
    statistics = measure(loaded.model, text, BudgetConfig(keep=0.6, own_text=0.0, gradients=False))
    plan = planned_on_grids(loaded.model, statistics, factors=factors)
    whole = carry_out_(loaded.model, plan, measure(loaded.model, text, plan), text=text)
    save(loaded.model, loaded.tokenizer, tmp_path / "whole", report=whole)
    parts = compress_blockwise(load_streamed(source), windows, tmp_path / "parts", plan)
    assert [layer.grid for layer in parts.layers] == [layer.grid for layer in whole.layers]
    assert whole.after == parts.after
    for file in ("cur_model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "whole" / file, tmp_path / "parts" / file, shallow=False), file
    stored = Shards(tmp_path / "parts", one_dtype=False).tensors
    steps = {tensor.dtype for name, tensor in stored.items() if name.endswith(".scale")}
    assert steps == ({torch.float16, dtype} if not factors else {torch.float16})


def test_what_lies_outside_of_the_blocks_is_refused(tmp_path: Path, windows: Any) -> None:
    source = tmp_path / "model"
    model = models.make("llama", seed=0, blocks=2)
    model.save_pretrained(source)
    models.tokenizer().save_pretrained(source)
    table = RoundedEntry(
        name="model.embed_tokens", shape=(32, models.VOCABULARY), layout="table", grid=GRID, tied=("lm_head",)
    )
    plan = Plan(entries=(table,), fingerprint=fingerprint(model))
    with pytest.raises(ValueError, match=r"model\.embed_tokens lies outside of the blocks"):
        compress_blockwise(load_streamed(source), windows, tmp_path / "parts", plan)
    assert not (tmp_path / "parts").exists()
