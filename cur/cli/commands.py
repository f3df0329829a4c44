"""What `cur compress`, `plan`, `evaluate`, `inspect`, `convert`, `quantize` and `export` do, with the library."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cur.cli import tables
from cur.cli._run import bars, note, output, print_json
from cur.cli.file import save_file
from cur.cli.given import Given
from cur.cli.groups import Destination, Grids, Loading, Model, Opening, Passes, PlanSource, ScoredText
from cur.cli.settings import compress_config, refuse_with_plan
from cur.cli.source import HeldOut, Source, check_file, read_for, show_unread, tell
from cur.integrations.blockwise import ProcessGroup
from cur.integrations.convert import convert_
from cur.integrations.files.beside import PAGE, PLAN, REPORT
from cur.integrations.files.configuration import check_config
from cur.integrations.files.directory import check_target
from cur.integrations.measure.collect import collect
from cur.integrations.measure.rows import Conversation
from cur.integrations.measure.text import embedded_text, read_text, token_windows
from cur.integrations.model.loading import DEFAULT_MODEL, LoadedModel, load_model
from cur.integrations.model.precision import Precision, check
from cur.integrations.model.size import model_size
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import factored
from cur.integrations.pipeline import compress_model, evaluate_model, plan_model
from cur.integrations.plan.config import BudgetConfig
from cur.integrations.plan.dense import dense_remark
from cur.integrations.plan.plan import Plan
from cur.integrations.quantize import asked_grids, grid_of, measured_with, quantize_, read_grids, save_quantized
from cur.integrations.report.data import CompressionReport
from cur.integrations.report.perplexity import Perplexity
from cur.integrations.report.speed import layer_speeds
from cur.integrations.store.account import compare, read_account
from cur.integrations.store.checkpoint import save
from cur.integrations.store.export import check_export, export
from cur.integrations.store.inspect import CheckpointSummary, summarize

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

_NEAR_EXACT = 8
"""Bits at which rounding loses so little that neither gradients nor a second pass over the text are worth the time."""

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def run_compress(given: Given, *, save_config: Path | None, overwrite: bool, as_json: bool) -> None:
    """Run `cur compress`, by a configuration or by the plan in a file.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.
    save_config : Path or None
        The TOML file that the options are written to afterwards; None for no file.
    overwrite : bool
        Whether a directory that is not empty may be replaced.
    as_json : bool
        Whether the result is printed as one line of JSON instead of tables.

    Raises
    ------
    ValueError
        If options contradict each other, or the model, the text or the plan cannot be used.
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    """
    how = compress_config(given)
    source, held_out, loading = given.build(Source), given.build(HeldOut), given.build(Loading)
    model, place, planned = given.build(Model), given.build(Destination), given.build(PlanSource)
    if planned.plan is not None:
        refuse_with_plan(how)
    if save_config is not None:
        check_file(save_config, "the TOML file to write")
    out = Path(str(place.out))
    check_target(out, overwrite=overwrite, needed=model.model)
    source.check()
    judges = held_out.reader
    if judges is None and isinstance(how, BudgetConfig) and how.tol is not None:
        judges = source.unseen
    with bars() as bar:
        report = compress_model(
            model.model,
            out,
            how if planned.plan is None else Plan.load(planned.plan),
            text=source.batches,
            held_out=judges,
            statistics=source.stats,
            overwrite=overwrite,
            progress=bar,
            announce=tell,
            **_loaded(loading),
        )
    if not ProcessGroup().leads:
        return
    if save_config is not None:
        asked = planned if planned.plan is not None else how
        save_file(save_config, [model, asked, source, held_out, loading, place])
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
    _show_dense(report.plan)
    if report.divergence is not None:
        for name, figure in report.divergence.figures().items():
            output.print(f"{name}, held-out: {figure}")
        output.print(report.divergence.remark)
    for name, value in report.perplexity.items():
        output.print(f"Perplexity {name}: {value:.2f}")
    page = target / PAGE
    seen = f" What was done: {page}." if page.exists() else ""
    output.print(f"Saved to {out}.{seen} Next: cur evaluate {out}, or load it in Python as its README.md says.")


def _show_dense(plan: Plan) -> None:
    if remark := dense_remark(plan.dense):
        output.print(remark, markup=False)


def run_plan(given: Given, *, as_json: bool) -> None:
    """Run `cur plan`.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.
    as_json : bool
        Whether the plan is printed as one line of JSON instead of a table.

    Raises
    ------
    ValueError
        If options contradict each other, or the model or the text cannot be used.
    """
    config, source = compress_config(given), given.build(Source)
    out = Path(given.values["out"])
    check_file(out, "the JSON file to write")
    source.check()
    with bars() as bar:
        plan = plan_model(
            given.build(Model).model,
            config,
            text=source.batches,
            statistics=source.stats,
            progress=bar,
            announce=tell,
            **_loaded(given.build(Opening)),
        )
    out.expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    if as_json:
        print_json(plan.to_dict())
        return
    output.print(tables.plan_table(plan))
    _show_dense(plan)
    output.print(f"Saved to {out}. Next: cur compress --plan {out} --out DIR, with the same text.")


def run_convert(
    directory: Path, out: Path, *, layout: str, purpose: str, trust_remote_code: bool, overwrite: bool
) -> None:
    """Run `cur convert`.

    Parameters
    ----------
    directory : Path
        The directory of the compressed checkpoint.
    out : Path
        The directory to create.
    layout : str
        The layout that factored layers are to have, or ``"auto"``.
    purpose : str
        What ``"auto"`` is to serve, ``"inference"`` or ``"training"``.
    trust_remote_code : bool
        Whether code that the checkpoint brings is run.
    overwrite : bool
        Whether a directory that is not empty may be replaced.

    Raises
    ------
    ValueError
        If the directory is no compressed checkpoint, or the layout is unknown.
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    """
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


def run_quantize(given: Given, *, overwrite: bool, as_json: bool) -> None:
    """Run `cur quantize`.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.
    overwrite : bool
        Whether a directory that is not empty may be replaced.
    as_json : bool
        Whether the result is printed as one line of JSON instead of sentences.

    Raises
    ------
    ValueError
        If the checkpoint is rounded already, or it or the text cannot be used.
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    """
    directory, out = Path(given.values["directory"]).expanduser(), Path(given.values["out"])
    source, passes = given.build(Source), given.build(Passes)
    precision, trust_remote_code = passes.precision, passes.trust_remote_code
    check_target(out, overwrite=overwrite)
    check(precision)
    asked = given.build(Grids)
    if asked.grids is not None and (asked.bits, asked.group) != (None, None):
        raise ValueError("--grids says bits and group of each layer; leave out --bits and --group, or edit the file")
    group = int(asked.group) if asked.group is not None and asked.group.isdecimal() else asked.group
    grid = grid_of(8 if asked.bits is None else asked.bits, group) if asked.grids is None else read_grids(asked.grids)
    tables = None if asked.embeddings is None else grid_of(asked.embeddings)
    compressed = directory.is_dir() and bool(check_config(directory).get("quantization_config"))
    if rounded := summarize(directory).grids if compressed else "":  # before anything is loaded
        raise ValueError(f"{directory} is rounded to {rounded} already; start from what it was made from")
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(directory, trust_remote_code=trust_remote_code)
            model, batches = loaded.model, read_for(loaded.model, source.batches(loaded.tokenizer))
        show_unread(model)
        grids, known = asked_grids(model, grid, tables), vocabulary(model)
        fitted = any(one.bits < _NEAR_EXACT for name, one in grids.items() if name not in known)
        modules, graded = measured_with(model, grids)
        used = _passes(loaded, precision)
        measured = collect(
            model,
            batches,
            modules=modules,
            moments="full",
            gradients=graded if fitted else (),
            precision=used,
            progress=bar.of("calibrate"),
        )
        found = quantize_(
            model,
            measured,
            grid=grid,
            tables=tables,
            text=batches if fitted else None,
            precision=used,
            progress=bar.of("quantize", len(grids)),
        )
        with bar.busy("Saving"):
            origin = directory if compressed else None  # of others it is what they were loaded from
            save_quantized(model, loaded.tokenizer, out, found, source=origin, overwrite=overwrite)
    show_account(out)
    if as_json:
        print_json({"directory": str(out.expanduser().absolute()), **asdict(found)})
        return
    for sentence in found.notes:
        tell(sentence)
    worst = max(found.errors, key=found.errors.__getitem__)
    middle = median(found.errors.values())
    output.print(f"Bytes of {len(found.errors)} layers: {found.before:,} before, {found.after:,} now.")
    output.print(
        f"On this text their outputs change by {middle:.2%} (median), at most {found.errors[worst]:.2%} ({worst})."
    )
    output.print(f"Saved to {out}. Next: cur evaluate {out}.")


def _rounded(summary: CheckpointSummary) -> str:
    if not summary.grids:
        return ""
    which = "The" if all(layer.grid is not None for layer in summary.layers) else "Some of the"
    return f" {which} layers above are rounded to {summary.grids}."


def run_evaluate(given: Given, *, as_json: bool) -> None:
    """Run `cur evaluate`.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.
    as_json : bool
        Whether the result is printed as one line of JSON instead of a sentence.

    Raises
    ------
    ValueError
        If a column is named without a text, or a model or the text cannot be used.
    """
    model, scored = given.build(Model).model, given.build(ScoredText)
    if scored.column is not None and scored.text is None:
        raise ValueError("--column is for a --text of rows")
    source: str | list[str | Conversation] = (
        embedded_text("evaluate") if scored.text is None else read_text(scored.text, column=scored.column)
    )
    name = "embedded text" if scored.text is None else str(scored.text)
    length, count = scored.window_length, scored.windows
    with bars() as bar:
        result = evaluate_model(
            model,
            lambda tokenizer: token_windows(tokenizer, source, length=length, count=count, name=name),
            against=scored.against,
            batch_size=scored.batch_size,
            progress=bar,
            announce=tell,
            **_loaded(given.build(Loading)),
        )
    called = DEFAULT_MODEL if model is None else model
    if isinstance(result, Perplexity):
        if as_json:
            print_json({"model": called, "text": name, "window_length": length, **asdict(result)})
        else:
            output.print(f"{called}: perplexity {result} of {name}")
        return
    if as_json:
        about = {"model": called, "against": scored.against, "text": name, "window_length": length}
        print_json({**about, "divergence": result.to_dict()})
        return
    for line in result.lines(str(scored.against)):
        output.print(line, markup=False)
    said = f"{called} on {name}: {result.remark} {result.seconds:.1f} s, products in {result.precision}."
    output.print(said, markup=False)


def run_inspect(directory: Path, *, against: Path | None, speed: bool, as_json: bool) -> None:
    """Run `cur inspect`.

    Parameters
    ----------
    directory : Path
        The directory of the checkpoint.
    against : Path or None
        The dense model to compare it with, tensor by tensor; None for what was written when it was made.
    speed : bool
        Whether the model is loaded and its layers are timed.
    as_json : bool
        Whether everything is printed as one line of JSON instead of a table.

    Raises
    ------
    ValueError
        If the directory is no compressed checkpoint, unless a dense one is compared.
    """
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
    speeds = layer_speeds(load_model(directory).model) if speed else []
    if as_json:
        data: dict[str, Any] = {**summary.to_dict(), "account": None if found is None else found.to_dict()}
        if speed:
            data["speed"] = [one.to_dict() for one in speeds]
        if report is not None:
            data["report"] = report.to_dict()
        elif plan is not None:
            data["plan"] = plan.to_dict()
        print_json(data)
        return
    output.print(tables.checkpoint_table(summary))
    output.print(
        f"Parameters: {summary.parameters:,} (dense: {summary.dense_parameters:,}); weight files: "
        f"{summary.file_bytes:,} bytes; format version {summary.format_version}." + _rounded(summary)
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
    if speed:
        output.print(tables.speed_table(speeds))


def run_export(directory: Path, out: Path, *, to: str, trust_remote_code: bool, overwrite: bool) -> None:
    """Run `cur export`.

    Parameters
    ----------
    directory : Path
        The directory of the compressed checkpoint.
    out : Path
        The directory to create.
    to : str
        The target of export, by its name.
    trust_remote_code : bool
        Whether code that the checkpoint brings is run.
    overwrite : bool
        Whether a directory that is not empty may be replaced.

    Raises
    ------
    ValueError
        If the target is unknown, or the directory is no compressed checkpoint.
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    """
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
    """Say what a checkpoint that was just written holds of what it was made from.

    Parameters
    ----------
    directory : Path
        The directory of the checkpoint; one without an account is passed over in silence.
    """
    account = read_account(directory)
    for line in [] if account is None else account.lines():
        note.print(line, markup=False, soft_wrap=True)


def _passes(loaded: LoadedModel, asked: str) -> str:
    """Return the precision of all passes of a command, and say what it means on this device."""
    found = Precision.of(loaded.model, asked)
    note.print(found.remark(asked))
    return found.name


def _loaded(loading: Opening) -> dict[str, Any]:
    """Return how a model is loaded as the library has it."""
    if loading.dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {loading.dtype!r}")
    return {**asdict(loading), "dtype": _DTYPES[loading.dtype]}
