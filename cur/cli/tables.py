"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from cur.integrations.inspect import CheckpointSummary
    from cur.integrations.plan import Plan
    from cur.integrations.report import CompressionReport, LayerReport

__all__ = [
    "budget_line",
    "checkpoint_table",
    "layers_table",
    "perplexity_table",
    "plan_table",
    "seconds_line",
    "size_table",
]


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Return one line for each compressed layer."""
    from cur.integrations.layouts import ranks_of

    table = Table(title="Compressed layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("shape", "rank", "numbers kept", "error", "bound", "weighted", "certified"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            ranks_of(layer),
            f"{layer.parameters_after / layer.parameters_before:.1%}",
            f"{layer.certificate['relative']:.3f}",
            _bound(layer),
            f"{layer.weighted_error:.3f}",
            f"{layer.weighted_bound:.3f}",
        )
    table.caption = (
        "error: certified, ||W - C U R|| / ||W|| in the Frobenius norm; bound: (B1), what the choice of "
        "rows and "
        "columns guaranteed beforehand; weighted: the error with every input feature weighted by its norm "
        "on the calibration text, and its certified bound"
    )
    table.caption_justify = "left"
    return table


def _bound(layer: LayerReport) -> str:
    bound, scale = layer.certificate.get("projection"), layer.certificate["scale"]
    return "" if bound is None or not scale else f"{bound / scale:.3f}"


def plan_table(plan: Plan) -> Table:
    """Return one line for each layer of a plan."""
    from cur.integrations.layouts import ranks_of

    table = Table(title="Plan", title_justify="left", show_footer=True)
    table.add_column("layer", "all", overflow="fold")
    for heading, footer in (
        ("shape", ""),
        ("rank", ""),
        ("layout", ""),
        ("numbers", f"{plan.parameters:,}"),
        ("of dense", f"{plan.parameters / plan.dense_parameters:.1%}" if plan.entries else ""),
        ("predicted", ""),
    ):
        table.add_column(heading, footer, justify="right", no_wrap=True)
    for entry in plan.entries:
        table.add_row(
            entry.name,
            f"{entry.shape[0]} x {entry.shape[1]}",
            ranks_of(entry),
            entry.layout,
            f"{entry.parameters:,}",
            f"{entry.parameters / entry.dense_parameters:.1%}",
            "" if entry.predicted is None else f"{entry.predicted:.2e}",
        )
    table.caption = (
        "predicted: the increase of the loss per token where gradients were measured; else the squared relative error "
        "of the outputs, of which fixed ranks are told what no factorization goes below"
    )
    table.caption_justify = "left"
    return table


def size_table(report: CompressionReport) -> Table:
    """Return parameters and bytes of the whole model and of the compressed weights."""
    table = Table(title="Size", title_justify="left")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=True)
    rows = (
        ("parameters", report.before.parameters, report.after.parameters),
        ("bytes in memory", report.before.bytes, report.after.bytes),
        ("numbers in the compressed weights", report.plan.dense_parameters, report.plan.parameters),
    )
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
    return table


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Return the seconds of each stage in one line."""
    return "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())


def budget_line(plan: Plan) -> str:
    """Return in one sentence what a plan with a budget keeps."""
    return (
        f"Kept: {plan.kept or 0:.2%} of the parameters of the targeted layers, {plan.model_kept or 0:.2%} of the "
        "model; "
        f"{len(plan.entries)} layers factored, the other targets stay dense."
    )


def perplexity_table(values: Mapping[str, float], title: str) -> Table:
    """Return a table of perplexities by name."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("perplexity", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.2f}")
    return table


def checkpoint_table(summary: CheckpointSummary) -> Table:
    """Return one line for each compressed layer of a checkpoint, and the totals."""
    from cur.integrations.layouts import ranks_of

    table = Table(title=f"Compressed layers of {summary.directory}", title_justify="left", show_footer=True)
    dense = sum(layer.dense_parameters for layer in summary.layers)
    kept = sum(layer.parameters for layer in summary.layers)
    table.add_column("layer", "all", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("layout")
    table.add_column("rank", justify="right")
    table.add_column("numbers", f"{kept:,}", justify="right")
    table.add_column("of dense", f"{kept / dense:.1%}", justify="right")
    table.add_column("dtype")
    for layer in summary.layers:
        table.add_row(
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.layout,
            ranks_of(layer),
            f"{layer.parameters:,}",
            f"{layer.parameters / layer.dense_parameters:.1%}",
            layer.dtype,
        )
    return table
