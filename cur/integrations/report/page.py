"""A report as one self-contained page, with its pictures, for light and dark screens."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from cur.integrations.nn import cells
from cur.integrations.plan.dense import dense_remark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cur.integrations.report.data import CompressionReport, LayerReport

__all__ = ["can_draw", "report_page"]

# Axes and letters are drawn in this colour, and take that of the page's text when the picture is put into it.
_INK = "#010203"
# Told apart by people who see few colours, and on white as on black.
_COLORS = ("#3b82c4", "#e07b39", "#2a9d8f", "#b5539c", "#9a8f2a", "#c44e52", "#7a6fd0", "#5f9e3a")

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6675; --back: #fff; --line: #d8dde4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ef; --soft: #9aa6b5; --back: #14181e; --line: #333c48; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0 .8rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; } .wide { overflow-x: auto; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
"""


def can_draw() -> bool:
    """Say whether matplotlib is installed.

    Returns
    -------
    bool
        Whether pages have pictures.
    """
    return find_spec("matplotlib") is not None


def report_page(report: CompressionReport) -> str:
    """Return a report as HTML that needs nothing but itself.

    Parameters
    ----------
    report : CompressionReport
        The report of the compression.

    Returns
    -------
    str
        One page with sizes, seconds, and pictures of angular distances, spectra, ranks, errors beside their bounds and
        output changes beside theirs; whatever was not measured is left out.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    if not can_draw():
        raise ImportError('pictures need matplotlib; type: pip install "cur-decomposition[plots]"')
    layers = report.layers
    title = html.escape(f"{report.plan.model or 'A model'}, compressed")
    parts = [f"<h1>{title}</h1>", _summary(report), *_sizes(report)]
    parts += _figure(
        "Seconds",
        "Wall-clock time of each stage.",
        lambda ax: _bars(ax, list(report.seconds), list(report.seconds.values()), "seconds"),
        height=0.7 + 0.3 * len(report.seconds),
    )
    if report.plan.angular:
        parts += _figure(
            "How far each block turns the hidden state",
            "Angular distance between what goes into a block and what comes out, in units of pi. Blocks with "
            "compressed layers are filled.",
            lambda ax: _angular(ax, report),
        )
    spectra = [layer for layer in layers if layer.spectrum]
    if spectra:
        parts += _figure(
            "Singular values",
            "Of each weight with its input features counted by their norm, relative to the largest. A dot marks the "
            "rank that was kept.",
            lambda ax: _spectra(ax, spectra),
            height=4.2,
        )
    parts += _figure("Rank of each layer", "", lambda ax: _ranks(ax, layers))
    parts += _figure(
        "Error of each layer",
        "Relative error of the weight with every input feature counted by its norm: measured (dot) and its certified "
        "bound (bar), which exceeds it by rounding alone. A cross marks what was predicted: for chosen rows and "
        "columns, what no factorization of that rank goes below.",
        lambda ax: _errors(ax, report),
    )
    measured = [layer for layer in layers if layer.output is not None]
    if measured:
        parts += _figure(
            "Change of each layer's output",
            "After the activation that follows, on a batch of the calibration text, relative to the output: measured "
            "(dot), and the bound for Lipschitz activations (bar): constant times spectral norm of the error times "
            "norm of the input.",
            lambda ax: _outputs(ax, measured),
        )
    parts.append(_table(layers))
    parts.append(f'<p class="soft">{html.escape(_versions(report))}</p>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summary(report: CompressionReport) -> str:
    plan = report.plan
    kept = report.after.parameters / report.before.parameters
    lines = [f"{len(report.layers)} linear layers factored; {kept:.1%} of the parameters of the model are left."]
    if plan.kept is not None:
        lines.append(f"The budget left {plan.kept:.2%} of the parameters of the targeted layers.")
    if remark := dense_remark(plan.dense):
        lines.append(remark)
    lines += report.notes
    if report.divergence is not None:
        said = "; ".join(f"{name}, held-out: {value}" for name, value in report.divergence.figures().items())
        lines.append(f"{said}. {report.divergence.remark}")
    if report.perplexity:
        said = "; ".join(f"{name} {value:.2f}" for name, value in report.perplexity.items())
        lines.append(f"Perplexity: {said}.")
    own = f", {plan.own_text:g} times as many of them the model's own as given" if plan.own_text else ""
    lines.append(
        f"Calibrated on {plan.calibration_tokens:,} tokens{own}, seed {plan.seed}; SHA-256 of the tokens "
        f"{plan.calibration or 'unknown'}."
        + (
            f" Products in {plan.calibration_precision or report.precision}."
            if plan.calibration_precision or report.precision
            else ""
        )
    )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _sizes(report: CompressionReport) -> list[str]:
    rows = [
        *report.sizes(),
        ("numbers in the compressed weights", report.plan.dense_parameters, report.plan.parameters),
    ]
    body = "".join(
        f"<tr><td>{name}</td><td>{before:,}</td><td>{after:,}</td><td>{after / before - 1:+.1%}</td></tr>"
        for name, before, after in rows
    )
    head = "<tr><th></th><th>before</th><th>after</th><th>change</th></tr>"
    return ["<h2>Size</h2>", f'<div class="wide"><table>{head}{body}</table></div>']


def _table(layers: Iterable[LayerReport]) -> str:
    heads = ("layer", "shape", "layout", "rank", "of dense", "error", "weighted", "certified", "output", "bound")
    rows = []
    for layer in layers:
        change = bound = ""
        if layer.output is not None and layer.output.size > 0:
            change = f"{layer.output.change / layer.output.size:.3f}"
            bound = f"{layer.output.bound / layer.output.size:.3f}"
        said = cells(layer)
        line = (
            html.escape(layer.name),
            *(html.escape(said[key]) for key in ("shape", "layout", "rank")),
            f"{layer.parameters_after / layer.parameters_before:.1%}",
            f"{layer.relative_error:.4f}",
            f"{layer.weighted_error:.4f}",
            f"{layer.weighted_bound:.4f}",
            change,
            bound,
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>")
    head = "<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    return f'<h2>Layers</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _versions(report: CompressionReport) -> str:
    return "Versions: " + ", ".join(f"{name} {number}" for name, number in report.versions.items()) + "."


def _figure(title: str, caption: str, draw: Callable[[Any], None], *, height: float = 3.2) -> list[str]:
    """Draw one picture and return it as SVG that takes the colour of the page's text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours: dict[Any, Any] = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color", "legend.labelcolor"), _INK
    )
    # A salt of its own for each picture: the names of its parts must not be those of another on the page.
    with rc_context({**colours, "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(9.2, height))
        # Room for the names of axes and, on the right, of kinds of layers; in inches, so that all pictures are alike.
        axes = figure.add_axes((1.0 / 9.2, 0.5 / height, 6.45 / 9.2, 1 - 0.6 / height))
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    picture = text.getvalue()
    picture = picture[picture.index("<svg") :].replace(_INK, "currentColor")
    # Names of parts that nothing refers to would be the same in every picture.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', picture))
    picture = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", picture)
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return [f"<h2>{html.escape(title)}</h2>", f"<figure>{picture}{note}</figure>"]


def _bars(ax: Axes, names: Sequence[str], values: Sequence[float], unit: str) -> None:
    places = range(len(names))[::-1]
    ax.barh(list(places), list(values), color=_COLORS[0], height=0.6)
    ax.set_yticks(list(places), list(names))
    ax.set_xlabel(unit)
    for place, value in zip(places, values, strict=True):
        ax.annotate(f" {value:.2f}", (value, place), va="center", color=_INK)


def _angular(ax: Axes, report: CompressionReport) -> None:
    angular = report.plan.angular
    chosen = {_block(layer.name) for layer in report.layers}
    colours = [_COLORS[1] if index in chosen else "none" for index in angular]
    ax.bar(list(angular), list(angular.values()), color=colours, edgecolor=_COLORS[1])
    ax.set_xlabel("block")
    ax.set_ylabel("angle / pi")


def _spectra(ax: Axes, layers: Sequence[LayerReport]) -> None:
    kinds = _kinds(layers)
    for layer in layers:
        numbers, values = zip(*layer.spectrum, strict=True)
        colour = kinds[_kind(layer.name)]
        ax.plot(numbers, values, color=colour, linewidth=0.8, alpha=0.6)
        at = min(layer.spectrum, key=lambda point: abs(point[0] - layer.rank))
        ax.plot(layer.rank, at[1], "o", color=colour, markersize=4)
    ax.set(xscale="log", yscale="log", xlabel="number of the singular value", ylabel="relative to the largest")
    ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-4))
    _legend(ax, kinds)


def _ranks(ax: Axes, layers: Sequence[LayerReport]) -> None:
    kinds = _kinds(layers)
    for kind, colour in kinds.items():
        points = [(_block(layer.name), layer.rank) for layer in layers if _kind(layer.name) == kind]
        ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=0.8)
    ax.set(xlabel="block", ylabel="rank")
    ax.set_ylim(0, 1.05 * max(layer.rank for layer in layers))
    _legend(ax, kinds)


def _errors(ax: Axes, report: CompressionReport) -> None:
    predicted = {entry.name: entry.predicted for entry in report.plan.entries if not entry.needs_gradients}
    values = [(layer, layer.weighted_error, layer.weighted_bound) for layer in report.layers]
    _pairs(ax, values)
    for place, layer in enumerate(report.layers):
        square = predicted.get(layer.name)
        if square is not None:
            ax.plot(place, square**0.5, "x", color=_INK, markersize=4)
    ax.set_ylabel("relative weighted error")
    ax.set_ylim(bottom=0)


def _outputs(ax: Axes, layers: Sequence[LayerReport]) -> None:
    found = [(layer, layer.output) for layer in layers if layer.output is not None and layer.output.size > 0]
    _pairs(ax, [(layer, change.change / change.size, change.bound / change.size) for layer, change in found])
    ax.set(ylabel="relative to the output", yscale="log")


def _pairs(ax: Axes, values: Sequence[tuple[LayerReport, float, float]]) -> None:
    """Draw a measured value as a dot under a bar at its bound, for each layer, in the order of the model."""
    kinds = _kinds([layer for layer, _, _ in values])
    for place, (layer, value, bound) in enumerate(values):
        colour = kinds[_kind(layer.name)]
        ax.plot([place, place], [value, bound], color=colour, linewidth=0.8)
        ax.plot(place, bound, "_", color=colour, markersize=8)
        ax.plot(place, value, "o", color=colour, markersize=4)
    # The first layer of each block carries its number.
    blocks = [_block(layer.name) for layer, _, _ in values]
    firsts = [place for place, block in enumerate(blocks) if place == 0 or block != blocks[place - 1]]
    ax.set_xticks(firsts, [str(blocks[place]) for place in firsts])
    ax.set_xlabel("block")
    _legend(ax, kinds)


def _legend(ax: Axes, kinds: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linewidth=0, label=kind) for kind, colour in kinds.items()]
    ax.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def _kinds(layers: Iterable[LayerReport]) -> dict[str, str]:
    """Return a colour for each kind of layer."""
    names = list(dict.fromkeys(_kind(layer.name) for layer in layers))
    return {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}


def _kind(name: str) -> str:
    """Return what a layer is in its block: its name without numbers; an encoder and a decoder are told apart."""
    stack, _, rest = re.sub(r"\.\d+(?=\.|$)", ".", name).partition("..")
    rest = re.sub(r"\.+", ".", rest).strip(".") or name
    side = next((f"{part} " for part in ("encoder", "decoder") if part in stack), "")
    return side + rest


def _block(name: str) -> int:
    """Return the number of the block that holds a layer; 0 if it has none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0
