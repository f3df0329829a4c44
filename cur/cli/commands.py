"""What `cur compress`, `plan`, `evaluate`, `inspect`, `convert`, `quantize` and `export` do, with the library."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cur.cli import tables
from cur.cli._run import bars, note, output, print_json
from cur.cli.source import HeldOut, Source, read_for, show_unread, tell
from cur.integrations.blockwise import ProcessGroup
from cur.integrations.convert import convert_
from cur.integrations.files.beside import PAGE, PLAN, REPORT
from cur.integrations.files.configuration import check_config
from cur.integrations.files.directory import check_parent, check_target
from cur.integrations.measure.collect import collect
from cur.integrations.measure.rows import Conversation
from cur.integrations.measure.text import embedded_text, read_text, token_windows
from cur.integrations.model.loading import DEFAULT_MODEL, LoadedModel, load_model
from cur.integrations.model.precision import Precision, check
from cur.integrations.model.size import model_size
from cur.integrations.nn import factored
from cur.integrations.pipeline import compress_model, evaluate_model, plan_model
from cur.integrations.plan.config import BudgetConfig, CompressConfig
from cur.integrations.plan.plan import Plan
from cur.integrations.quantize import quantizable, quantize_, save_quantized
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.account import compare, read_account
from cur.integrations.store.checkpoint import save
from cur.integrations.store.export import check_export, export
from cur.integrations.store.inspect import summarize

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
    with bars() as bar:
        report = compress_model(
            model,
            out,
            Plan.load(how) if isinstance(how, Path) else how,
            text=source.batches,
            held_out=None if held_out is None else held_out.read,
            statistics=source.stats,
            dtype=_dtype(dtype),
            precision=precision,
            device=device,
            low_memory=low_memory,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=bar,
            announce=tell,
        )
    if ProcessGroup().leads:
        _show_compressed(out.expanduser().absolute(), report, out, as_json=as_json)


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
    with bars() as bar:
        plan = plan_model(
            model,
            config,
            text=source.batches,
            statistics=source.stats,
            dtype=_dtype(dtype),
            precision=precision,
            trust_remote_code=trust_remote_code,
            progress=bar,
            announce=tell,
        )
    out.expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    if as_json:
        print_json(plan.to_dict())
        return
    output.print(tables.plan_table(plan))
    output.print(f"Saved to {out}. Next: cur compress --plan {out} --out DIR, with the same text.")


def run_convert(
    directory: Path, out: Path, *, layout: str, purpose: str, trust_remote_code: bool, overwrite: bool
) -> None:
    """Run `cur convert`."""
    check_target(out, overwrite=overwrite)
    before = summarize(directory)
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
        show_unread(loaded.model)
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
        show_unread(model)
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
    with bars() as bar:
        result = evaluate_model(
            model,
            lambda tokenizer: token_windows(tokenizer, source, length=window_length, count=windows, name=name),
            batch_size=batch_size,
            dtype=_dtype(dtype),
            precision=precision,
            device=device,
            low_memory=low_memory,
            trust_remote_code=trust_remote_code,
            progress=bar,
            announce=tell,
        )
    called = DEFAULT_MODEL if model is None else str(model)
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
    counts = ", ".join(f"{layout} {summary.in_layout(layout):,}" for layout in factored())
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


def run_export(directory: Path, out: Path, *, to: str, trust_remote_code: bool, overwrite: bool) -> None:
    """Run `cur export`."""
    check_export(to)
    check_target(out, overwrite=overwrite)
    summarize(directory)  # a clear error for what is not a compressed checkpoint, before anything is loaded
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
        show_unread(loaded.model)
        with bar.busy("Saving"):
            export(loaded.model, loaded.tokenizer, out, to=to, overwrite=overwrite, source=directory)
    show_account(out)
    note.print(f"Saved to {out}.")


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
