"""What `cur compress`, `evaluate`, `inspect` and `export` do: load, call the public function, print."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cur.cli import tables
from cur.cli._run import bars, note, output
from cur.integrations.budget import BudgetConfig
from cur.integrations.checkpoint import PLAN, REPORT, check_target, dense_export, save
from cur.integrations.compress import CompressConfig, compress
from cur.integrations.evaluate import perplexity
from cur.integrations.inspect import summarize
from cur.integrations.models import load_model
from cur.integrations.nn import LAYOUTS
from cur.integrations.plan import Plan
from cur.integrations.text import dataset_texts, embedded_text, read_text, token_windows

__all__ = ["run_compress", "run_evaluate", "run_export", "run_inspect"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_compress(
    model: str | None,
    out: Path,
    config: CompressConfig | BudgetConfig,
    *,
    text: Path | None,
    dataset: str | None,
    dataset_config: str | None,
    windows: int | None,
    window_length: int,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run `cur compress`."""
    if text is not None and dataset is not None:
        raise ValueError("--text and --dataset exclude each other; give one")
    check_target(out, overwrite=overwrite)
    source: str | Iterable[str]
    if dataset is not None:
        source, name = _stream(dataset, dataset_config), dataset
    elif text is not None:
        source, name = read_text(text), str(text)
    else:
        source, name = embedded_text("calibrate"), "the embedded text"
    count = windows or (128 if dataset is not None else 64)
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(model, dtype=_dtype(dtype))
            calibration = token_windows(loaded.tokenizer, source, length=window_length, count=count, name=name)
        report = compress(loaded.model, calibration, config, progress=bar)
        with bar.busy("Saving"):
            target = save(loaded.model, loaded.tokenizer, out, report=report, overwrite=overwrite)
    if as_json:
        print(json.dumps({"directory": str(target), **report.to_dict()}))
        return
    output.print(tables.layers_table(report.layers), tables.size_table(report), tables.seconds_line(report.seconds))
    if report.plan.kept is not None:
        output.print(tables.budget_line(report.plan))
    output.print(f"Saved to {out}. Next: cur evaluate {out}, or load it in Python as its README.md says.")


def run_evaluate(
    model: str | None,
    *,
    text: Path | None,
    windows: int,
    window_length: int,
    batch_size: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Run `cur evaluate`."""
    source, name = (embedded_text("evaluate"), "embedded text") if text is None else (read_text(text), str(text))
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model(model, dtype=_dtype(dtype))
            held_out = token_windows(loaded.tokenizer, source, length=window_length, count=windows, name=name)
        result = perplexity(loaded.model, held_out, batch_size=batch_size, progress=bar.of("evaluate", len(held_out)))
    if as_json:
        print(json.dumps({"model": loaded.source, "text": name, "window_length": window_length, **asdict(result)}))
        return
    output.print(f"{loaded.source}: perplexity {result} of {name}")


def run_inspect(directory: Path, *, as_json: bool) -> None:
    """Run `cur inspect`."""
    summary = summarize(directory)
    plan = Plan.load(directory / PLAN) if (directory / PLAN).exists() else None
    if as_json:
        data: dict[str, Any] = summary.to_dict()
        report = directory / REPORT
        if report.exists():
            data["report"] = json.loads(report.read_text(encoding="utf-8"))
        elif plan is not None:
            data["plan"] = plan.to_dict()
        print(json.dumps(data))
        return
    output.print(tables.checkpoint_table(summary))
    output.print(
        f"Parameters: {summary.parameters:,} (dense: {summary.dense_parameters:,}); weight files: "
        f"{summary.file_bytes:,} bytes; format version {summary.format_version}."
    )
    counts = ", ".join(f"{layout} {summary.in_layout(layout):,}" for layout in LAYOUTS)
    output.print(f"Numbers in these layers at these ranks, by layout: {counts}.")
    if plan is not None:
        output.print(
            f"Made from {plan.model or 'a model of unknown origin'} with {plan.calibration_tokens:,} "
            "calibration "
            f"tokens, seed {plan.seed}; "
            + ", ".join(f"{name} {number}" for name, number in plan.versions.items())
            + "."
        )


def run_export(directory: Path, out: Path, *, overwrite: bool) -> None:
    """Run `cur export`."""
    check_target(out, overwrite=overwrite)
    summarize(directory)  # a clear error for what is not a compressed checkpoint, before anything is loaded
    with bars() as bar:
        with bar.busy("Loading the model"):
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            stored = getattr(torch, str(config.get("dtype") or "float32"))
            loaded = load_model(str(directory), dtype=stored)
        with bar.busy("Saving"):
            dense_export(loaded.model, loaded.tokenizer, out, overwrite=overwrite)
    note.print(f"Saved to {out}.")


def _stream(dataset: str, config: str | None) -> Iterable[str]:
    # C4 has one configuration for each language and no default; English is the one that papers calibrate on.
    if config is None and dataset == "allenai/c4":
        config = "en"
    # Endless: `token_windows` draws as many texts as its windows need.
    return dataset_texts(dataset, name=config, count=None)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
