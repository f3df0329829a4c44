"""The model card of a compressed checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from cur.integrations.model.classes import auto_class
from cur.integrations.model.size import Size, model_size
from cur.integrations.model.usage import is_transformer
from cur.integrations.nn import cells, compressed_modules, grids_of
from cur.integrations.plan.dense import dense_remark
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport

__all__ = ["model_card"]


def model_card(model: nn.Module, report: CompressionReport | None = None) -> str:
    """Return the README of a checkpoint: how to load it, what was done, and with which figures.

    Parameters
    ----------
    model : nn.Module
        The compressed model, whose layers are listed.
    report : CompressionReport, optional
        The report that the figures come from; without it only the sizes of the layers are known.

    Returns
    -------
    str
        Markdown with a metadata block that the Hugging Face hub reads.
    """
    base = report.plan.model if report is not None else ""
    layers = compressed_modules(model)
    smaller = sum(layer.smaller for layer in layers.values())
    grids = grids_of(layers.values())
    lines = [
        "---",
        f"library_name: {'transformers' if is_transformer(model) else 'pytorch'}",
        *([f"base_model: {base}", "base_model_relation: finetune"] if _is_on_hub(base, report) else []),
        "tags:",
        "- cur-decomposition",
        "- low-rank",
        "---",
        "",
        f"# {base or type(model).__name__}, compressed by CUR factorization",
        "",
        *_loading(model),
        "",
        *([f"{smaller} linear layers hold a weight of lower rank, or of fewer neurons."] if smaller else []),
        *([f"The layers below are rounded to {grids}."] if grids else []),
        "",
    ]
    if report is not None:
        lines += _figures(report)
        lines += [
            "",
            "`plan.json` says what was decided, `report.json` what came of it, `report.html` the same in pictures.",
            "",
        ]
    lines += [
        "| layer | shape | layout | rank | numbers before | numbers after |",
        "|---|---|---|---|---|---|",
    ]
    for name, layer in layers.items():
        said, dense = cells(layer), layer.out_features * layer.in_features
        lines.append(
            f"| `{name}` | {said['shape']} | {said['layout']} | {said['rank']} | {dense:,} | {layer.stored:,} |"
        )
    if report is None:
        lines += ["", f"The model has {_size(model_size(model))}."]
    return "\n".join(lines) + "\n"


def _loading(model: nn.Module) -> list[str]:
    """Return the lines that load the checkpoint."""
    needs = "# pip install 'cur-decomposition[transformers]'"
    if not is_transformer(model):
        return [
            "```python",
            f"from cur.integrations import load_into  {needs}",
            "",
            f'model = load_into({type(model).__name__}(...), "path/to/this/directory")  # built as the dense one was',
            "```",
        ]
    transformer: Any = model
    auto = auto_class(transformer)
    return [
        "```python",
        f"import cur.integrations  {needs}; without it loading fails",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
    ]


def _figures(report: CompressionReport) -> list[str]:
    plan = report.plan
    lines = [
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before:,} | {after:,} |" for name, before, after in report.sizes()),
        f"| compressed weights, numbers | {plan.dense_parameters:,} | {plan.parameters:,} |",
    ]
    if report.divergence is not None:
        lines += [f"| {name}, held-out | | {value} |" for name, value in report.divergence.figures().items()]
    for text in dict.fromkeys(name.partition(", ")[2] for name in report.perplexity):
        values = [report.perplexity.get(f"{state}, {text}") for state in ("before", "after")]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| perplexity, {text} | {cells[0]} | {cells[1]} |")
    return [
        *lines,
        "",
        *([report.divergence.remark] if report.divergence is not None else []),
        *_how(plan),
        *report.notes,
        f"Calibrated on {plan.calibration_tokens:,} tokens of text (SHA-256 of the tokens: `{plan.calibration}`), "
        f"seed {plan.seed}{_passes(report)}.",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in report.versions.items()) + ".",
    ]


def _passes(report: CompressionReport) -> str:
    measured, later = report.plan.calibration_precision or report.precision, report.precision
    if not measured:
        return ""
    return f", products in {measured}" + (f", of later passes in {later}" if later not in ("", measured) else "")


def _how(plan: Plan) -> list[str]:
    lines = []
    if plan.kept is not None and plan.model_kept is not None:
        lines.append(
            f"Ranks share a budget: {plan.kept:.2%} of the parameters of the targeted layers are left, "
            f"{plan.model_kept:.2%} of the model."
        )
    for method in sorted({entry.method for entry in plan.entries}):
        entries = [entry for entry in plan.entries if entry.method == method]
        lines.append(entries[0].said(entries))
    return [*lines, *([dense_remark(plan.dense)] if plan.dense else [])]


def _size(size: Size) -> str:
    return f"{size.parameters:,} parameters in {size.bytes:,} bytes"


def _is_on_hub(name: str, report: CompressionReport | None) -> bool:
    """Say whether a model was loaded by the id of a repository: a directory here may have a name of the same form."""
    shaped = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return shaped and report is not None and report.source in ("", name)
