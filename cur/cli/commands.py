"""What `cur compress`, `plan`, `evaluate`, `inspect`, `convert`, `quantize` and `export` do, with the library."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cur.cli import tables
from cur.cli._run import Stages, bars, note, output, print_json
from cur.cli.blockwise import block_by_block, compress_by_blocks, evaluate_by_blocks, place
from cur.cli.source import HeldOut, Source, read_for, tell_unread
from cur.integrations._directory import check_parent
from cur.integrations.account import compare, read_account
from cur.integrations.blockwise import Team
from cur.integrations.budget import BudgetConfig
from cur.integrations.calibration import collect
from cur.integrations.checkpoint import PAGE, PLAN, REPORT, check_target, dense_export, save
from cur.integrations.compress import (
    Clock,
    carry_out_,
    make_plan,
    measure,
    measure_plan,
    with_own_text,
)
from cur.integrations.config import CompressConfig
from cur.integrations.convert import convert_
from cur.integrations.evaluate import output_head, perplexity
from cur.integrations.experts import unrolled
from cur.integrations.inspect import summarize
from cur.integrations.models import LoadedModel, load_model
from cur.integrations.nn import FACTORED
from cur.integrations.plan import Plan
from cur.integrations.planning import candidates
from cur.integrations.precision import Precision, check
from cur.integrations.quantize import quantizable, quantize_, save_quantized
from cur.integrations.report import CompressionReport, model_size
from cur.integrations.rows import Conversation
from cur.integrations.statistics import Statistics
from cur.integrations.stored import check_config
from cur.integrations.text import embedded_text, read_text, token_windows

__all__ = [
    "run_compress",
    "run_convert",
    "run_evaluate",
    "run_export",
    "run_inspect",
    "run_plan",
    "run_quantize",
    "show_account",
]

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def run_compress(
    model: str | None,
    out: Path,
    how: CompressConfig | BudgetConfig | Path,
    *,
    source: Source,
    held_out: HeldOut | None,
    dtype: str,
    precision: str,
    device: str,
    low_memory: bool | None,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run `cur compress`, by a configuration or by the plan in a file."""
    check_target(out, overwrite=overwrite, needed=model)
    source.check()
    check(precision)
    kind, where = _dtype(dtype), place(device)
    asked = Plan.load(how) if isinstance(how, Path) else how
    if block_by_block(model, low_memory, kind):
        report = compress_by_blocks(
            str(model),
            out,
            asked,
            read=source.batches,
            held_out=None if held_out is None else held_out.read,
            stats=source.stats,
            dtype=kind,
            precision=precision,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
        if Team().leads:
            _show_compressed(out.expanduser().absolute(), report, out, as_json=as_json)
        return
    clock = Clock()
    perplexities: dict[str, float] = {}
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(model, dtype=kind, device_map=where, trust_remote_code=trust_remote_code)
            if isinstance(asked, Plan):
                asked.check(loaded.model)
            given = read_for(loaded.model, source.batches(loaded.tokenizer))
            if not isinstance(asked, Plan):
                _refuse_early(loaded.model, asked)
            judged = None if held_out is None else held_out.read(loaded.model, loaded.tokenizer)
        tell_unread(loaded.model)
        passes = _passes(loaded, precision)
        if judged is not None:
            watch = bar.of("before", len(judged))
            before = perplexity(loaded.model, judged, precision=passes, progress=watch)
            perplexities["before, held-out"] = before.value
        statistics, plan, given = _decide(loaded, asked, given, source.stats, passes, clock, bar)
        if isinstance(asked, Plan) and asked.calibration not in (None, statistics.text_hash):
            note.print("The calibration text is another than the one that the plan was made from.")
        report = carry_out_(loaded.model, plan, statistics, text=given, precision=passes, clock=clock, progress=bar)
        if judged is not None:
            watch = bar.of("after", len(judged))
            after = perplexity(loaded.model, judged, precision=passes, progress=watch)
            perplexities["after, held-out"] = after.value
        report = replace(report, perplexity=perplexities)
        with bar.busy("Saving"):
            target = save(loaded.model, loaded.tokenizer, out, report=report, overwrite=overwrite)
        report = CompressionReport.load(target / REPORT)  # with the bytes on disk
    _show_compressed(target, report, out, as_json=as_json)


def _show_compressed(target: Path, report: CompressionReport, out: Path, *, as_json: bool) -> None:
    show_account(target)
    if as_json:
        account = read_account(target)
        report = replace(report, account={} if account is None else account.to_dict())
        print_json({"directory": str(target), **report.to_dict()})
        return
    output.print(tables.layers_table(report.layers), tables.size_table(report), tables.seconds_line(report.seconds))
    if report.plan.kept is not None:
        output.print(tables.budget_line(report.plan))
    for name, value in report.perplexity.items():
        output.print(f"Perplexity {name}: {value:.2f}")
    page = target / PAGE
    seen = f" What was done: {page}." if page.exists() else ""
    output.print(f"Saved to {out}.{seen} Next: cur evaluate {out}, or load it in Python as its README.md says.")


def run_plan(
    model: str | None,
    out: Path,
    config: CompressConfig | BudgetConfig,
    *,
    source: Source,
    dtype: str,
    precision: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Run `cur plan`."""
    if out.is_dir():
        raise ValueError(f"{out} is a directory; name the JSON file to write")
    check_parent(out)
    source.check()
    check(precision)
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(model, dtype=_dtype(dtype), trust_remote_code=trust_remote_code)
            given = read_for(loaded.model, source.batches(loaded.tokenizer))
            _refuse_early(loaded.model, config)
        tell_unread(loaded.model)
        _, plan, _ = _decide(loaded, config, given, source.stats, _passes(loaded, precision), Clock(), bar)
    out.expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    if as_json:
        print_json(plan.to_dict())
        return
    output.print(tables.plan_table(plan))
    output.print(f"Saved to {out}. Next: cur compress --plan {out} --out DIR, with the same text.")


def _decide(
    loaded: LoadedModel,
    asked: CompressConfig | BudgetConfig | Plan,
    given: list[Any],
    stats: Path | None,
    precision: str,
    clock: Clock,
    bar: Stages,
) -> tuple[Statistics, Plan, list[Any]]:
    """Measure, or read what an earlier run measured, and plan; return the batches with what the model wrote besides."""
    model = loaded.model
    known = stats is not None and stats.exists()
    with clock.stage("calibrate"):
        earlier = Statistics.load(stats) if stats is not None and known else None
        own = 0.0
        if not isinstance(asked, CompressConfig) and (asked.correction > 0 or not known):
            share = asked.own_text if earlier is None else earlier.own_text
            given, own = with_own_text(model, given, share, seed=asked.seed, precision=precision, progress=bar)
        if earlier is not None:
            statistics = earlier
            statistics.check(model)
        else:
            if isinstance(asked, Plan):
                statistics = measure_plan(model, given, asked, precision=precision, progress=bar)
            else:
                statistics = measure(model, given, asked, own_text=own, precision=precision, progress=bar)
            if stats is not None:
                statistics.save(stats)
    with clock.stage("plan"):
        plan = asked if isinstance(asked, Plan) else make_plan(model, statistics, asked, progress=bar)
    return statistics, plan, given


def run_convert(
    directory: Path, out: Path, *, layout: str, purpose: str, trust_remote_code: bool, overwrite: bool
) -> None:
    """Run `cur convert`."""
    check_target(out, overwrite=overwrite)
    before = summarize(directory)
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
        tell_unread(loaded.model)
        convert_(loaded.model, layout, purpose=purpose)
        report = CompressionReport.load(directory / REPORT) if (directory / REPORT).exists() else None
        if report is not None:
            report = replace(report, after=model_size(loaded.model))
        with bar.busy("Saving"):
            save(loaded.model, loaded.tokenizer, out, report=report, overwrite=overwrite, source=directory)
    show_account(out)
    after = summarize(out)
    kept = [sum(layer.parameters for layer in summary.layers) for summary in (before, after)]
    output.print(f"Numbers in the compressed layers: {kept[0]:,} before, {kept[1]:,} now.")
    output.print(f"Saved to {out}.")


def run_quantize(
    directory: Path,
    out: Path,
    *,
    source: Source,
    precision: str,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run `cur quantize`."""
    check_target(out, overwrite=overwrite)
    check(precision)
    if any(layer.int8 for layer in summarize(directory).layers):  # before anything is loaded
        raise ValueError(f"{directory} is rounded to int8 already; start from what it was made from")
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
            model, given = loaded.model, read_for(loaded.model, source.batches(loaded.tokenizer))
        tell_unread(model)
        names = quantizable(model)
        passes = _passes(loaded, precision)
        measured = collect(model, given, modules=names, moments="full", precision=passes, progress=bar.of("calibrate"))
        found = quantize_(model, measured, progress=bar.of("quantize", len(names)))
        with bar.busy("Saving"):
            save_quantized(model, loaded.tokenizer, out, found, source=directory, overwrite=overwrite)
    show_account(out)
    if as_json:
        print_json({"directory": str(out.expanduser().absolute()), **asdict(found)})
        return
    worst = max(found.errors, key=found.errors.__getitem__)
    middle = median(found.errors.values())
    output.print(f"Bytes of {len(names)} layers: {found.before:,} before, {found.after:,} now.")
    output.print(
        f"On this text their outputs change by {middle:.2%} (median), at most {found.errors[worst]:.2%} ({worst})."
    )
    output.print(f"Saved to {out}. Next: cur evaluate {out}.")


def run_evaluate(
    model: str | None,
    *,
    text: Path | None,
    column: str | None,
    windows: int,
    window_length: int,
    batch_size: int,
    dtype: str,
    precision: str,
    device: str,
    low_memory: bool | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Run `cur evaluate`."""
    if column is not None and text is None:
        raise ValueError("--column is for a --text of rows")
    source: str | list[str | Conversation] = (
        embedded_text("evaluate") if text is None else read_text(text, column=column)
    )
    name = "embedded text" if text is None else str(text)
    check(precision)
    kind, where = _dtype(dtype), place(device)

    def read(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        return token_windows(tokenizer, source, length=window_length, count=windows, name=name)

    if block_by_block(model, low_memory, kind):
        called = str(model)
        result = evaluate_by_blocks(
            called,
            read=read,
            batch_size=batch_size,
            dtype=kind,
            precision=precision,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    else:
        with bars() as bar:
            with bar.busy("Loading the model"):
                loaded = load_model(model, dtype=kind, device_map=where, trust_remote_code=trust_remote_code)
                output_head(loaded.model)
                tell_unread(loaded.model)
                held_out, called = read_for(loaded.model, read(loaded.tokenizer)), loaded.source
            watch = bar.of("evaluate", len(held_out))
            passes = _passes(loaded, precision)
            result = perplexity(loaded.model, held_out, batch_size=batch_size, precision=passes, progress=watch)
    if as_json:
        print_json({"model": called, "text": name, "window_length": window_length, **asdict(result)})
        return
    output.print(f"{called}: perplexity {result} of {name}")


def run_inspect(directory: Path, *, against: Path | None, as_json: bool) -> None:
    """Run `cur inspect`."""
    if against is not None and not (check_config(directory).get("quantization_config") or {}):
        account = compare(directory, against)  # of a dense checkpoint there is nothing else to say
        if as_json:
            print_json({"account": account.to_dict()})
        else:
            print("\n".join(account.lines()))
        return
    summary = summarize(directory)
    plan = Plan.load(directory / PLAN) if (directory / PLAN).exists() else None
    report = CompressionReport.load(directory / REPORT) if (directory / REPORT).exists() else None
    found = read_account(directory) if against is None else compare(directory, against)
    if as_json:
        data: dict[str, Any] = {**summary.to_dict(), "account": None if found is None else found.to_dict()}
        if report is not None:
            data["report"] = report.to_dict()
        elif plan is not None:
            data["plan"] = plan.to_dict()
        print_json(data)
        return
    output.print(tables.checkpoint_table(summary))
    output.print(
        f"Parameters: {summary.parameters:,} (dense: {summary.dense_parameters:,}); weight files: "
        f"{summary.file_bytes:,} bytes; format version {summary.format_version}."
        + (" The layers above are rounded to int8." if any(layer.int8 for layer in summary.layers) else "")
    )
    counts = ", ".join(f"{layout} {summary.in_layout(layout):,}" for layout in FACTORED)
    output.print(f"Numbers in the factored layers at these ranks, by layout: {counts}.")
    for line in [] if against is None or found is None else found.lines():
        output.print(line, markup=False, soft_wrap=True)
    if plan is not None:
        output.print(
            f"Made from {plan.model or 'a model of unknown origin'} with {plan.calibration_tokens:,} "
            "calibration "
            f"tokens, seed {plan.seed}; "
            + ", ".join(f"{name} {number}" for name, number in plan.versions.items())
            + "."
        )


def run_export(directory: Path, out: Path, *, trust_remote_code: bool, overwrite: bool) -> None:
    """Run `cur export`."""
    check_target(out, overwrite=overwrite)
    summarize(directory)  # a clear error for what is not a compressed checkpoint, before anything is loaded
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
        tell_unread(loaded.model)
        with bar.busy("Saving"):
            dense_export(loaded.model, loaded.tokenizer, out, overwrite=overwrite, source=directory)
    show_account(out)
    note.print(f"Saved to {out}.")


def _refuse_early(model: PreTrainedModel, config: CompressConfig | BudgetConfig) -> None:
    """Refuse what cannot be compressed before anything is measured."""
    with unrolled(model):
        candidates(model, config)


def show_account(directory: Path) -> None:
    """Say what a checkpoint that was just written holds of what it was made from."""
    account = read_account(directory)
    for line in [] if account is None else account.lines():
        note.print(line, markup=False, soft_wrap=True)


def _passes(loaded: LoadedModel, asked: str) -> str:
    """Return the precision of all passes of a command, and say what it means on this device."""
    found = Precision.of(loaded.model, asked)
    note.print(found.remark(asked))
    return found.name


def _dtype(name: str) -> torch.dtype | str:
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
