"""Reports as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from cur.integrations.plan.entry import PlanEntry
    from cur.integrations.plan.plan import Plan
    from cur.integrations.report.data import CompressionReport, LayerReport
    from cur.integrations.report.speed import LayerSpeed
    from cur.integrations.store.inspect import CheckpointSummary

__all__ = [
    "budget_line",
    "checkpoint_table",
    "layers_table",
    "perplexity_table",
    "plan_table",
    "seconds_line",
    "size_table",
    "speed_table",
]

# Least width of a column of names.
_LEAST = 12


def _of_layers(title: str, names: Sequence[str], **options: Any) -> tuple[Table, list[str]]:
    """Return a table whose lines are layers, and their names without what all have in common, which the title has.

    It is to fit into 80 columns.
    """
    ways = [name.split(".")[:-1] for name in names]
    common = ".".join(steps[0] for steps in takewhile(_alike, zip(*ways, strict=False)))
    short = [name.removeprefix(f"{common}.") for name in names]
    heading = f"{title}, all in {common}" if common else title
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), **options), short


def _alike(values: Sequence[str]) -> bool:
    return len(set(values)) == 1


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Return one line for each compressed layer.

    Parameters
    ----------
    layers : sequence of LayerReport
        The reports on the layers, one a line.
    """
    from cur.integrations.nn import cells

    table, names = _of_layers("Compressed layers", [layer.name for layer in layers])
    bounds = [_bound(layer) for layer in layers]
    columns = {
        **{key: [cells(layer)[key] for layer in layers] for key in ("shape", "rank")},
        **_bits(layers),
        "kept": [f"{layer.parameters_after / layer.parameters_before:.1%}" for layer in layers],
        "error": [f"{layer.certificate['relative']:.3f}" for layer in layers],
        **({"bound": bounds} if any(bounds) else {}),
        "weighted": [f"{layer.weighted_error:.3f}" for layer in layers],
        "certified": [f"{layer.weighted_bound:.3f}" for layer in layers],
    }
    table.add_column("layer", overflow="fold", min_width=_LEAST)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in zip(names, *columns.values(), strict=True):
        table.add_row(*row)
    bound = "bound: (B1), what the choice of rows and columns guaranteed beforehand; " if any(bounds) else ""
    table.caption = (
        "kept: of the numbers; error: certified, ||W - C U R|| / ||W|| in the Frobenius norm; "
        f"{bound}weighted: the error with every input feature weighted by its norm on the calibration text, and its "
        "certified bound"
    )
    table.caption_justify = "left"
    return table


def _bits(layers: Sequence[LayerReport] | Sequence[PlanEntry]) -> dict[str, list[str]]:
    """Return a column of the bits of each layer, and of the neighbours that share a step; none if none is rounded."""
    if all(layer.grid is None for layer in layers):
        return {}
    grids = [layer.grid for layer in layers]
    return {"bits": ["" if g is None else f"{g.bits}" if g.group is None else f"{g.bits} by {g.group}" for g in grids]}


def _bound(layer: LayerReport) -> str:
    bound, scale = layer.certificate.get("projection"), layer.certificate["scale"]
    return "" if bound is None or not scale else f"{bound / scale:.3f}"


def plan_table(plan: Plan) -> Table:
    """Return one line for each layer of a plan.

    Parameters
    ----------
    plan : Plan
        The plan, whose entries are the lines.
    """
    from cur.integrations.nn import cells

    table, names = _of_layers("Plan", [entry.name for entry in plan.entries], show_footer=True)
    table.add_column("layer", "all", overflow="fold", min_width=_LEAST)
    bits = _bits(plan.entries)
    for heading, footer in (
        ("shape", ""),
        ("rank", ""),
        ("layout", ""),
        *((heading, "") for heading in bits),
        ("kept", f"{plan.parameters / plan.dense_parameters:.1%}" if plan.entries else ""),
        ("predicted", ""),
    ):
        table.add_column(heading, footer, justify="right", no_wrap=True)
    for place, (name, entry) in enumerate(zip(names, plan.entries, strict=True)):
        table.add_row(
            name,
            *(cells(entry)[key] for key in ("shape", "rank", "layout")),
            *(column[place] for column in bits.values()),
            f"{entry.parameters / entry.dense_parameters:.1%}",
            "" if entry.predicted is None else f"{entry.predicted:.2e}",
        )
    table.caption = (
        f"kept: of the numbers, {plan.parameters:,} in all; predicted: the increase of the loss per token where "
        "gradients were measured; else the squared relative error of the outputs, of which fixed ranks are told what "
        "no factorization goes below"
    )
    table.caption_justify = "left"
    return table


def size_table(report: CompressionReport) -> Table:
    """Return parameters and bytes of the whole model and of the compressed weights.

    Parameters
    ----------
    report : CompressionReport
        The report on the whole model.
    """
    table = Table(title="Size", title_justify="left")
    for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=True)
    rows = (
        *report.sizes(),
        ("numbers in the compressed weights", report.plan.dense_parameters, report.plan.parameters),
    )
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
    return table


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Return the seconds of each stage in one line.

    Parameters
    ----------
    seconds : mapping
        The seconds by the names of the stages.
    """
    return "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())


def budget_line(plan: Plan) -> str:
    """Return in one sentence what a plan with a budget keeps.

    Parameters
    ----------
    plan : Plan
        The plan, made for a budget.
    """
    kept = (
        f"Kept: {plan.kept or 0:.2%} of the parameters of the targeted layers, {plan.model_kept or 0:.2%} of the "
        "model; "
    )
    if all(entry.grid is None for entry in plan.entries):
        return f"{kept}{len(plan.entries)} layers factored, the other targets stay dense."
    counts = Counter(entry.method for entry in plan.entries)
    forms = {"rounded": "whole in few bits", "weighted": "of a lower rank", "neurons": "with fewer neurons"}
    said = ", ".join(f"{counts[method]} layers {words}" for method, words in forms.items() if counts[method])
    return f"{kept}{said}; the other targets stay dense."


def perplexity_table(values: Mapping[str, float], title: str) -> Table:
    """Return a table of perplexities by name.

    Parameters
    ----------
    values : mapping
        The perplexities by what they are of.
    title : str
        The line above the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("perplexity", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.2f}")
    return table


def checkpoint_table(summary: CheckpointSummary) -> Table:
    """Return one line for each compressed layer of a checkpoint, and the totals.

    Parameters
    ----------
    summary : CheckpointSummary
        The checkpoint, as :func:`~cur.integrations.store.inspect.summarize` has it.
    """
    from cur.integrations.nn import cells

    title = f"Compressed layers of {summary.directory}"
    table, names = _of_layers(title, [layer.name for layer in summary.layers], show_footer=True)
    dense = sum(layer.dense_parameters for layer in summary.layers)
    kept = sum(layer.parameters for layer in summary.layers)
    table.add_column("layer", "all", overflow="fold", min_width=_LEAST)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("kept", f"{kept / dense:.1%}", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for name, layer in zip(names, summary.layers, strict=True):
        table.add_row(
            name,
            *(cells(layer)[key] for key in ("shape", "layout", "rank")),
            f"{layer.parameters / layer.dense_parameters:.1%}",
            layer.dtype if layer.grid is None or layer.grid.signed else str(layer.grid),
        )
    table.caption = f"kept: of the numbers, {kept:,} in all"
    table.caption_justify = "left"
    return table


def speed_table(speeds: Sequence[LayerSpeed]) -> Table:
    """Return one line for each kind of layers and number of tokens: how fast it is beside the dense layer.

    Parameters
    ----------
    speeds : sequence of LayerSpeed
        What was measured, by :func:`~cur.integrations.report.speed.layer_speeds`.
    """
    title = "Speed on this machine, in milliseconds a call, beside dense layers"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("layers", "shape", "rank", "tokens", "ms", "dense", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout, grid and what multiplies", overflow="fold")
    for speed in speeds:
        table.add_row(
            str(speed.count),
            speed.shape,
            speed.rank,
            str(speed.tokens),
            f"{1e3 * speed.seconds:.2f}",
            f"{1e3 * speed.dense:.2f}",
            f"{speed.dense / speed.seconds:.2f}",
            "; ".join(filter(None, (speed.layout, speed.grid, ", ".join(speed.kernels)))),
        )
    table.caption = "times: how many times as fast as the dense layer in the same dtype"
    table.caption_justify = "left"
    return table
