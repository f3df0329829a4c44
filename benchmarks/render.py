"""Put the figures of ``benchmarks/results/*.json`` into the pages that show them, between markers.

    python benchmarks/render.py           # rewrite the pages
    python benchmarks/render.py --check   # fail if that would change one

A block of a page that starts with ``<!-- results: NAME -->`` and ends with ``<!-- end -->`` belongs to
``results/NAME.json``, and ``core_PART`` to a part of ``results/core.json``. No figure is typed by hand.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cur._lib.interval import interval

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / "docs" / name for name in ("benchmarks.md", "scale.md", "howto/modules.md", "reference/families.md")
)
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    rule = "|---|" + "--:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def provenance(data: dict[str, Any]) -> str:
    """Say on which machine and with which versions a result was measured."""
    machine, versions = data["machine"], data["versions"]
    software = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"*{machine['processor']}, {machine['cores']} cores; {software}.*"


def paper_setting(data: dict[str, Any]) -> str:
    """Return perplexities, sizes and seconds of the paper's setting."""
    texts = list(next(iter(data["rows"].values()))["perplexity"])
    rows = []
    for name, row in data["rows"].items():
        seconds = row.get("seconds", {})
        rows.append(
            [
                name,
                *(f"{row['perplexity'][text]:.2f}" for text in texts),
                f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "",
                f"{seconds['decompose']:.1f}" if "decompose" in seconds else "",
            ]
        )
    head = ["Perplexity, lower is better", *texts, "Parameters", "Seconds to factor"]
    return f"{table(head, rows)}\n\n{provenance(data)}"


def ctr(data: dict[str, Any]) -> str:
    """Return the AUC of a click model by method and share of its parameters."""
    kept = sorted({row["keep"] for row in data["rows"] if row["keep"] < 1}, reverse=True)
    found = {(row["what"], row["keep"]): row for row in data["rows"]}
    dense = next(row for row in data["rows"] if row["keep"] == 1)
    rows = [
        [what, *(f"{found[what, keep]['auc']:.4f}" for keep in kept)]
        for what in dict.fromkeys(row["what"] for row in data["rows"] if row is not dense)
    ]
    sizes = [f"{keep:.0%}" for keep in kept]
    head = ["AUC, higher is better; parameters kept in tables and linear layers", *sizes]
    said = (
        f"Dense: {dense['auc']:.4f} with {dense['parameters']:,} parameters; the best possible on these clicks: "
        f"{data['possible']:.4f}. {data['seeds']} models; {data['seconds']:.0f} s in all. "
        f"At {kept[-1]:.0%} a budget keeps {found['budget by the loss', kept[-1]]['parameters']:,} parameters, and the "
        f"same share of every layer, which ranks round down, {found['SVD of the weights', kept[-1]]['parameters']:,}."
    )
    return f"{table(head, rows)}\n\n{said}\n\n{provenance(data)}"


def bounds(data: dict[str, Any]) -> str:
    """Return violations and tightness of every bound."""
    rows = [
        [
            name,
            f"{row['cases']:,}",
            f"{row['violations']:,}",
            "" if row["median bound / error"] is None else f"{row['median bound / error']:.2f}",
            "" if row["maximum finite bound / error"] is None else f"{row['maximum finite bound / error']:.3g}",
            f"{row['infinite bounds']:,}",
        ]
        for name, row in data["bounds"].items()
    ]
    head = ["Bound", "Cases", "Violations", "Median of bound / error", "Largest finite", "Infinite"]
    seconds, numpy, machine = data["seconds"], data["numpy"], data["machine"]
    note = f"*{data['cases']:,} random cases, seed {data['seed']}; {seconds:.0f} s on {machine}, NumPy {numpy}.*"
    return f"{table(head, rows)}\n\n{note}"


def cell(value: Any) -> str:
    """Return a figure as it is read: four digits at most, nothing for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def columns(*names: str) -> Callable[[dict[str, Any]], str]:
    """Return the renderer of a table with these columns, which are the keys of its rows."""

    def render(data: dict[str, Any]) -> str:
        rows = [[cell(row.get(name)) for name in names] for row in data["rows"]]
        head = [names[0].capitalize(), *names[1:]]
        return f"{table(head, rows)}\n\n{provenance(data)}"

    return render


def core_tolerance(data: dict[str, Any]) -> str:
    """Return misses of the tolerance, the largest error found, and the ranks."""
    methods = list(data["rows"][0]["misses"])
    totals = [
        [
            method,
            f"{sum(row['cases'][method] for row in data['rows']):,}",
            f"{sum(row['misses'][method] for row in data['rows']):,}",
            str(sum(row["misses"][method] > 0 for row in data["rows"])) + f" of {len(data['rows'])}",
            cell(max(row["worst error / tol"][method] for row in data["rows"])),
        ]
        for method in methods
    ]
    head = ["Method", "Cases", "Misses", "Matrix and tolerance pairs missed", "Worst error / tol"]
    names = ("matrix", "tol", "rank", "rank of the truncated SVD", "indices that could go")
    return f"{table(head, totals)}\n\n{columns(*names)(data)}"


def core_paper(data: dict[str, Any]) -> str:
    """Return the seconds of the matrices one after another and several at a time."""
    return columns("shape", *(name for name in data["rows"][0] if name != "shape"), "target")(data)


def core_growth(data: dict[str, Any]) -> str:
    """Return the exponents of time, and the memory of streams."""
    times = [
        [row["against"], ", ".join(map(str, row["sizes"])), ", ".join(map(cell, row["seconds"])), cell(row["exponent"])]
        for row in data["rows"]
        if "against" in row
    ]
    streams = [
        [f"{row['stream of rows']:,}", cell(row["peak memory, MiB"])] for row in data["rows"] if "stream of rows" in row
    ]
    return "\n\n".join(
        [
            table(["Against", "Sizes", "Seconds", "Exponent"], times),
            table(["Rows in the stream", "Peak memory, MiB"], streams),
            provenance(data),
        ]
    )


def quality(data: dict[str, Any]) -> str:
    """Return perplexities at the same number of parameters, one table for each text, what is lost, and the cost."""
    keeps = sorted({row["keep"] for row in data["rows"]} - {1.0}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in data["rows"]))
    # What keeps all parameters is the same for every budget.
    found = {(row["method"], keep): row for row in data["rows"] for keep in keeps if row["keep"] in (keep, 1.0)}
    scored = {row["windows"] for row in data["rows"]}
    parts = []
    for text, values in data["dense"]["perplexity"].items():
        rows = [["dense", *[f"{values[str(max(scored))]:.2f}"] * len(keeps), *[""] * len(keeps)]]
        for method in methods:
            cells = [found.get((method, keep)) for keep in keeps]
            figures = ["" if row is None else figure(row["perplexity"][text]) for row in cells]
            lost = [
                ""
                if row is None
                else f"{round(math.log(row['perplexity'][text] / values[str(row['windows'])]), 3) + 0.0:.3f}"
                for row in cells
            ]
            rows.append([method, *figures, *lost])
        head = [f"{text}; kept:", *(f"{keep:g}" for keep in keeps), *(f"ln ratio, {keep:g}" for keep in keeps)]
        parts.append(table(head, rows))
    cost = [
        [
            method,
            *(cell(found[method, keep]["seconds"]) if (method, keep) in found else "" for keep in keeps),
            cell(max(row["peak memory, MiB"] or 0.0 for row in data["rows"] if row["method"] == method) or None),
        ]
        for method in methods
    ]
    parts.append(table(["Seconds; kept:", *(f"{keep:g}" for keep in keeps), "Peak memory, MiB"], cost))
    parts.extend(_on_few(data))
    parts.extend(_healed(row) for row in data["rows"] if "healing" in row)
    calibration = data["calibration"]
    took = "".join(f", {part} {value:.0f} s" for part, value in calibration["seconds"].items())
    products = sorted({row["products"] for row in data["rows"]})
    parts.append(
        f"*Calibration: {calibration['windows']} windows of {calibration['length']} tokens, and for rows on own text "
        f"{calibration['own']} that the model wrote{took}. "
        f"{windows_scored(data['rows'])} Products while scoring: {', '.join(products)}. The seconds of the row of a "
        "method that was measured first include what its rows share; peak memory is that of a process which measured "
        "other rows too.*"
    )
    return "\n\n".join([*parts, provenance(data)])


def _on_few(data: dict[str, Any]) -> list[str]:
    """Return a sentence with ln ratios on few windows of rows that were scored on more, to compare others with."""
    few, found = data["few windows"], []
    for row in data["rows"]:
        if row["windows"] > few and "perplexity of few" in row:
            dense = {text: values[str(few)] for text, values in data["dense"]["perplexity"].items()}
            lost = [f"{math.log(value / dense[text]):.3f}" for text, value in row["perplexity of few"].items()]
            found.append(f"{row['method']}, {row['keep']:g}: {' and '.join(lost)}")
    if not found:
        return []
    return [f"*ln ratios on the first {few} windows of both texts, of rows above on more: {'; '.join(found)}.*"]


def _healed(row: dict[str, Any]) -> str:
    """Return a sentence on how healing went."""
    found = row["healing"]
    curve = ", ".join(f"{value:.3f} after {step}" for step, value in found["divergence"].items())
    took = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in found["seconds"].items())
    return (
        f"*{row['method']}, {row['keep']:g}: {found['numbers']:,} numbers learn; divergence from the dense model on "
        f"held-out text {found['before']:.3f} before, {curve} steps; {took}.*"
    )


def paper(data: dict[str, Any]) -> str:
    """Return one table for each question that was put to the paper's recipe."""
    names = {
        "selection": ("selection", "U"),
        "weights": ("weights", "numbers saved"),
        "layers": ("blocks", "choice"),
        "rank": ("rank at most", "stored as"),
        "calibration": ("calibrated on", "windows", "seconds to measure"),
    }
    scored = ["error", "weighted error", "seconds"]
    dense = " / ".join(figure(value) for value in data["dense"].values())
    parts = []
    for question, rows in data["questions"].items():
        keys = [*names[question]]
        texts = list(data["dense"])
        body = [
            [
                *(cell(row.get(key)) for key in keys),
                *(figure(row["perplexity"][text]) for text in texts),
                *(cell(row[key]) for key in scored),
            ]
            for row in rows
            if "perplexity" in row
        ]
        parts.append(table([keys[0].capitalize(), *keys[1:], *texts, *scored], body))
        effective = [row for row in rows if "effective rank of" in row]
        if effective:
            ranges = (f"{r['effective rank of']} {r['least']:.0f} to {r['most']:.0f}" for r in effective)
            least = next(
                row["smallest rank within 1 percent"] for row in rows if "smallest rank within 1 percent" in row
            )
            parts.append(
                f"Effective ranks: {', '.join(ranges)}. Smallest rank that keeps the perplexity of the first text "
                f"within 1 percent, to 16: {least}."
            )
    scoring = data["evaluation"]
    parts.append(
        f"*Dense: {dense}. The first {scoring['windows']} windows of {scoring['length']} tokens, "
        f"products in {scoring['products']}; {data['seconds to calibrate']:.0f} s to calibrate.*"
    )
    return "\n\n".join([*parts, provenance(data)])


def figure(value: float) -> str:
    """Return a perplexity with two decimals, without them where it is large."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def windows_scored(rows: list[dict[str, Any]]) -> str:
    """Say how many windows the rows were scored on."""
    counts = sorted({row["windows"] for row in rows}, reverse=True)
    if len(counts) == 1:
        return f"Evaluation: the first {counts[0]} windows of 1024 tokens of each text."
    parts = []
    for count in counts:
        methods = dict.fromkeys(row["method"] for row in rows if row["windows"] == count)
        parts.append(f"the first {count} for {' · '.join(methods)}")
    return (
        f"Evaluation on windows of 1024 tokens of each text: {'; '.join(parts)}; ln ratios are against the dense model "
        "on as many."
    )


def healing(data: dict[str, Any]) -> str:
    """Return perplexities and seconds of healing, the curves, forgetting, and the memory of teacher and student."""
    texts = list(next(iter(data["rows"].values()))["perplexity"])
    rows, curves = [], []
    for name, row in data["rows"].items():
        # A stage that was left out takes microseconds.
        seconds = {stage: value for stage, value in row.get("seconds", {}).items() if value and value > 1e-3}
        rows.append(
            [
                name,
                *(f"{row['perplexity'][text]:.1f}" for text in texts),
                f"{row['trainable']:,}" if "trainable" in row else "",
                *(cell(seconds.get(stage)) for stage in ("closed form", "natural steps", "heal", "a step")),
            ]
        )
        looks = [look for look in row.get("curve", []) if "kl" in look and "step" in look]
        looks = looks[:: -(-len(looks) // 13) or 1]  # a long run looked often
        if len(looks) > 1:
            curves.append([name, ", ".join(f"{look['step']}: {look['kl']:.3f}" for look in looks)])
    head = [
        "Perplexity, lower is better",
        *texts,
        "Numbers that learn",
        "s, closed form",
        "s, natural",
        "s, steps",
        "s, one",
    ]
    parts = [table(head, rows)]
    if curves:
        parts.append(table(["Divergence from the teacher on held-out windows", "by step, in nats per token"], curves))
    fits = next((row["fits"] for row in data["rows"].values() if row.get("fits")), [])
    if fits and "floor" in fits[0]:
        kinds = dict.fromkeys(fit["name"].rpartition(".")[2] for fit in fits)
        spans = [
            [
                kind,
                *(
                    f"{min(values):.1%} to {max(values):.1%}"
                    for values in (
                        [fit[what] for fit in fits if fit["name"].endswith(kind)]
                        for what in ("before", "after", "floor")
                    )
                ),
            ]
            for kind in kinds
        ]
        head = ["Squared error of the outputs, least squares", "before", "after", "left for any U"]
        parts.append(table(head, spans))
    if data["forgetting"]:
        found = [
            [
                name,
                f"{row['trainable']:,}",
                *(f"{row['before'][text]:.1f} to {row['after'][text]:.1f}" for text in row["before"]),
            ]
            for name, row in data["forgetting"].items()
        ]
        steps = next(iter(data["forgetting"].values()))["steps"]
        parts.append(table([f"Adapted to the reference in {steps} steps", "Numbers that learn", *texts], found))
    if data["processor seconds of a step"]:
        times = [[what, cell(value)] for what, value in data["processor seconds of a step"].items()]
        parts.append(table(["One step: scope, teacher", "processor seconds"], times))
    if data["memory"]:
        one, both = (data["memory"][f"peak, {who}"] / 2**20 for who in ("teacher", "teacher and student"))
        parts.append(
            f"Peak memory: {one:,.0f} MiB for the teacher alone, {both:,.0f} MiB for both ({both / one:.2f} x)."
        )
    elsewhere: dict[str, list[str]] = {}
    for name, row in data["rows"].items():
        where = row.get("processor", data["machine"]["processor"])
        if where != data["machine"]["processor"]:
            elsewhere.setdefault(where, []).append(f"“{name}”")
    parts += [f"*On {where}: {', '.join(names)}.*" for where, names in elsewhere.items()]
    return "\n\n".join([*parts, provenance(data)])


def scale(data: dict[str, Any]) -> str:
    """Return memory against depth and width, the large models, two processes, and the extrapolation."""

    def rows_of(rows: list[dict[str, Any]]) -> str:
        head = [name[0].upper() + name[1:] for name in rows[0]]
        return table(head, [[cell(value) for value in row.values()] for row in rows])

    parts = []
    for name in ("depth", "width"):
        if name in data:
            parts += [f"**Peak memory against {name}**", rows_of(data[name])]
    if "idle" in data:
        parts.append(f"A process that has only imported everything takes {cell(data['idle']['peak, MB'])} MB of that.")
    runs = {name: data[name] for name in ("limit", "eight") if name in data}
    stages = ("calibrate", "plan", "decompose", "factorizations alone", "outputs", "write")
    titles = {"limit": "Llama-3.2-3B shape, 3 GB of address space", "eight": "Llama-3.1-8B shape"}
    if runs:
        rows = [
            [
                titles[name],
                f"{run['parameters'] / 1e9:.2f} billion",
                f"{run['peak resident, bytes'] / 1e9:.2f}",
                f"{run['peak address space, bytes'] / 1e9:.2f}",
                f"{run.get('processes', 1)} x {run.get('threads', 1)}",
                cell(run.get("load before")),
                *(cell(run["seconds"].get(stage)) for stage in stages),
                cell(run["total"]),
            ]
            for name, run in runs.items()
        ]
        head = [
            "Model",
            "Parameters",
            "Peak memory, GB",
            "Peak address space, GB",
            "Processes x threads",
            "Load by other work",
            *(f"{s.capitalize()}, s" for s in stages),
        ]
        parts += ["**Whole models at the setting of the paper**", table([*head, "Total, s"], rows)]
    if "processes" in data:
        two = data["processes"]
        times = two["calibration, s"]
        parts += [
            "**Two processes**",
            f"Calibration takes {cell(times['1'])} s in one process and {cell(times['2'])} s in two, a ratio of "
            f"{two['ratio']}; load of the two cores by other work before: {two['load before']:.1f}. Same indices: "
            f"{'yes' if two['same indices'] else 'no'}.",
        ]
    if "extrapolation" in data:
        parts += ["**On paper**", rows_of(data["extrapolation"])]
    return "\n\n".join([*parts, provenance(data)])


def gpu(data: dict[str, Any]) -> str:
    """Return seconds of each stage and peak memory on a device."""
    rows = [[stage, cell(value)] for stage, value in data["seconds"].items()]
    rows.append(["peak memory, GB", cell(data["peak, GB"])])
    return f"{table(['Stage', 'Seconds'], rows)}\n\n*{data['device']}.* {provenance(data)}"


def inference(data: dict[str, Any]) -> str:
    """Return the speed of each layout over dense, of single layers and of the real model."""
    found = {(row["shape"], row["keep"], row["layout"], row["tokens"]): row for row in data["layers"]}
    tokens = sorted({row["tokens"] for row in data["layers"]})
    layers = [
        [
            f"{shape}, keep {keep:g}",
            layout,
            *(f"{found[shape, keep, layout, count]['speed-up']:.2f}" for count in tokens),
            f"{1 / keep:.2f}",
            "yes" if found[shape, keep, layout, 1]["chosen by auto"] else "",
        ]
        for shape, keep, layout in dict.fromkeys((row["shape"], row["keep"], row["layout"]) for row in data["layers"])
    ]
    models = [
        [
            f"keep {row['keep of linear layers']:g}",
            row["layout"],
            f"{row['prefill, speed-up']:.2f}",
            f"{row['decode, speed-up']:.2f}",
            f"{1 / row['parameters kept']:.2f}",
        ]
        for row in data["model"]
    ]
    head = ["Layer", "layout", *(f"{count} tokens" for count in tokens), "1 / keep", "chosen by `auto`"]
    return "\n\n".join(
        [
            table(head, layers),
            table(["Whole model", "layout", "prefill", "decode", "1 / parameters kept"], models),
            f"*Times faster than dense, {data['dtype']}, {data['threads']} thread(s).*",
            provenance(data),
        ]
    )


def cost(data: dict[str, Any]) -> str:
    """Return the time of compressing over plain forward passes, and the peak memory over the model."""
    stages = ("plain forward passes", "calibrate", "plan", "decompose")
    times = [[row["setting"], *(cell(row[key]) for key in (*stages, "over plain", "target"))] for row in data["time"]]
    parts = ("peak", "imports", "model", "statistics")
    memory = [
        [
            f"{row['setting']}; {row['dtype']}, windows a pass: {row['windows a pass']}",
            *(f"{row[f'{part}, bytes'] / 2**20:,.0f}" for part in parts),
            cell(row["over model"]),
            cell(row["target"]),
        ]
        for row in data["memory"]
    ]
    head = ["Processor seconds", *(stage.capitalize() for stage in stages), "Over plain", "Target"]
    sizes = ["MiB", *(part.capitalize() for part in parts), "(Peak - imports - statistics) / model", "Target"]
    tables = [table(head, times)] + ([table(sizes, memory)] if memory else [])
    text = f"*{data['model']}; {data['windows']} windows of {data['length']} tokens, float32, one thread.*"
    return "\n\n".join([*tables, text, provenance(data)])


def judged(row: dict[str, Any]) -> str:
    """Say in one word how a family came through: clean, refused, fault, or not built."""
    if row["why"]:
        return "not built"
    ended = [step for step in row["steps"].values() if step not in ("ok", "-")]
    if not ended:
        return "clean"
    return "refused" if all(step.startswith("refused") for step in ended) else "fault"


def families(data: dict[str, Any]) -> str:
    """Return how many families of each kind are clean, and what became of each that is not."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in data["rows"].items():
        kind, _, family = name.partition("/")
        kinds.setdefault(kind, {})[family] = row
    words = ("clean", "refused", "fault", "not built")
    counts, seconds = [], 0.0
    for kind, rows in kinds.items():
        said = [judged(row) for row in rows.values()]
        run = len(said) - said.count("not built")
        share = f"{said.count('clean') / run:.0%}" if run else ""
        counts.append([kind, *(str(said.count(word)) for word in words), share])
        seconds += sum(sum(row["seconds"].values()) for row in rows.values())
    parts = [
        table(["Kind", *words, "clean of those that run"], counts),
        f"{provenance(data)} {seconds / 60:.0f} minutes of a processor.",
    ]
    for kind, rows in kinds.items():
        by_word = {word: {family: row for family, row in rows.items() if judged(row) == word} for word in words}
        parts += [f"## {kind.capitalize()}", f"Clean: {', '.join(by_word['clean']) or 'none'}."]
        troubled = [
            [family, word, step, _sentence(ended)]
            for word in ("refused", "fault")
            for family, row in by_word[word].items()
            for step, ended in row["steps"].items()
            if ended not in ("ok", "-")
        ]
        troubled += [[family, "not built", "", _sentence(row["why"])] for family, row in by_word["not built"].items()]
        if troubled:
            lines = [
                "| Family | | step | what was said |",
                "|---|---|---|---|",
                *(f"| {' | '.join(x)} |" for x in troubled),
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _sentence(said: str) -> str:
    """Return what an error says, fit for a cell of a table."""
    words = said.partition(": ")[2] if said.startswith(("refused: ", "fault: ")) else said
    short = words if len(words) <= 240 else f"{words[:240]} ..."
    return "`" + short.replace("`", "'").replace("|", "/") + "`"


def precision(data: dict[str, Any]) -> str:
    """Return the times of products and passes in every precision, each processor beside the others."""
    every = data["processors"]
    outputs, inputs = data["layer"]
    parts = []
    for name, found in every.items():
        layer = [
            [row["products in"], cell(row["forward, ms"]), cell(row["with gradient, ms"])] for row in found["products"]
        ]
        model = [
            [row["weights"], f"{row['products']}{' (auto)' if row['auto'] else ''}", f"{row['tokens/s']:,.0f}"]
            for row in found["passes"]
        ]
        parts += [
            f"**{name}**: a product with its gradient takes {cell(found['bfloat16 over float32'])} times as long in "
            f"bfloat16 as in float32, {cell(found['float16 over float32'])} times in float16.",
            table(
                [f"Layer of {outputs} x {inputs}, {data['tokens']} tokens", "forward, ms", "with gradient, ms"], layer
            ),
            table(["Weights", "products", "tokens/s"], model),
        ]
        if "differences" in found:
            changed = found["differences"]
            values = changed["perplexity"]
            parts.append(
                f"Perplexity of {changed['windows']} windows of {changed['length']} tokens of the CPython language "
                f"reference: {values['float32']:.3f} with products in float32, {values['bfloat16']:.3f} in bfloat16. "
                "Divergence of the distributions of the next token: "
                f"{changed['divergence, nats']:.5f} ± {1.96 * changed['its standard error, over windows']:.5f} nats."
            )
    return "\n\n".join([*parts, provenance(data)])


def rounding(data: dict[str, Any]) -> str:
    """Return weighted errors of rounded layers against each other, and what looking at both sides costs."""
    rows = [
        [
            row["layer"],
            str(row["bits"]),
            cell(row["one"] / row["nearest"]),
            cell(row["both"] / row["one"]),
            cell(row["seconds, one"]),
            cell(row["seconds, both"]),
            cell(row["seconds, both"] / row["seconds, one"]),
        ]
        for row in data["layers"]
        if row["bits"] in (3, 4)
    ]
    head = ["Layer", "bits", "one / nearest", "both / one", "one, s", "both, s", "ratio"]
    about = f"*Groups of {data['group']}, asymmetric, steps in float16, damping {data['damping']}; one thread.*"
    return f"{table(head, rows)}\n\n{about}\n\n{provenance(data)}"


def off_grid(data: dict[str, Any]) -> str:
    """Return which weights lie on a grid as they are shipped, and what is left of it in the model taken off it."""
    names = list(data["rows"][0]["on a grid"])
    rows = [
        [
            f"`{row['layers']}`",
            f"{row['weights'] / 1e6:.1f} M",
            *(f"{row['on a grid'][name]:.0%}" for name in (names[0], names[-1])),
            *(f"{row['left by HQQ'][name]:.2f}" for name in names),
        ]
        for row in data["rows"]
    ]
    head = [
        "Layers",
        "weights",
        *(f"groups on a grid, {name}" for name in (names[0], names[-1])),
        *(f"left by zeros anywhere, {name}" for name in names),
    ]
    said = (
        f"*{data['weights']:,} weights, {data['bytes'] / 2**20:.1f} MiB as shipped; groups of {data['group']}, grids "
        f"of {data['levels']} numbers. Off the grid logits move by {data['logits moved, of the largest']:.0e} of the "
        f"largest. Zeros anywhere: the error of HQQ over that of nearest rounding, 4 bits, block {data['block']}; "
        f"{data['left of normal numbers']:.2f} for normal numbers.*"
    )
    return f"{table(head, rows)}\n\n{said}\n\n{provenance(data)}"


def rounding_model(data: dict[str, Any]) -> str:
    """Return divergences, shares of the same token, sizes and seconds: methods down, bits and groups across."""
    found = {(row["method"], row["bits"], row["group"]): row for row in data["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in data["rows"]))
    settings = sorted({key[1:] for key in found}, key=lambda setting: (setting[1] != 64, -setting[0], setting[1]))
    across = [str(bits) if group == 64 else f"{bits}, by {group}" for bits, group in settings]

    def pivot(title: str, shown: Callable[[dict[str, Any]], str]) -> str:
        places = [[found.get((method, bits, group)) for bits, group in settings] for method in methods]
        cells = [
            [method, *("" if row is None else shown(row) for row in rows)]
            for method, rows in zip(methods, places, strict=True)
        ]
        return table([f"{title}; bits:", *across], cells)

    parts = []
    for text in data["rows"][0]["kl"] if data["rows"] else ():
        parts.append(pivot(f"Divergence, {text}", lambda row, text=text: _with_interval(row["kl"][text])))
        parts.append(pivot(f"Same top token, {text}", lambda row, text=text: f"{interval(row['same'][text])[0]:.3f}"))
    parts.append(pivot("MiB", lambda row: f"{row['bytes'] / 2**20:.1f}"))
    parts.append(pivot("Seconds to round", lambda row: cell(row["seconds"])))
    for method in ("both sides", "ours, block after block"):
        parts.extend(_window_by_window(data, method, "GPTQ"))
    windows, taken = sorted({row["windows"] for row in data["rows"]}), data["calibration"]
    parts.append(
        f"*Nats a token, means over the first {' or '.join(map(str, windows))} windows of {data['length']} tokens of "
        "each text, with intervals of 95 percent over windows. Groups of 64, others as they are named. Calibration: "
        f"{taken['windows']} windows of {taken['length']} tokens, products in {taken['products']}; damping "
        f"{data['damping']}, of the command its own default, 0.1. Seconds of one processor, without calibration.*"
    )
    if data["int4 of torchao"] is not None:
        parts.append(
            "*torchao's own configuration for four bits (`Int4WeightOnlyConfig`) does not run on this processor in "
            f"float32 ({data['int4 of torchao']}); the row is its weight-only integers of any width "
            "(`IntxWeightOnlyConfig`), and int8 by rows (`Int8WeightOnlyConfig`) at 8 bits.*"
        )
    return "\n\n".join([*parts, provenance(data)])


def frontier(data: dict[str, Any]) -> str:
    """Return divergences against bytes, and which forms were chosen."""
    texts = list(data["rows"][0]["kl"]) if data["rows"] else []
    rows = []
    for row in sorted(data["rows"], key=lambda row: -row["bytes"]):
        name = f"{row['method']} {row['setting']}" if row["method"] == "GGUF" else row["method"]
        foreseen = "" if "predicted" not in row else f"{row['predicted']:.3g}"
        figures = [
            cell_
            for text in texts
            for cell_ in (_with_interval(row["kl"][text]), f"{interval(row['same'][text])[0]:.3f}")
        ]
        rows.append(
            [name, f"{row['bits']:.2f}", f"{row['bytes'] / 2**20:.1f}", *figures, foreseen, cell(row["seconds"])]
        )
    across = [title for text in texts for title in (f"Divergence, {text}", "same top token")]
    parts = [table(["", "bits", "MiB", *across, "foreseen", "seconds"], rows)]
    parts.extend(_forms_chosen(data))
    windows, taken = sorted({row["windows"] for row in data["rows"]}), data["calibration"]
    parts.append(
        f"*Nats a token, means over the first {' or '.join(map(str, windows))} windows of {data['length']} tokens of "
        f"each text, with intervals of 95 percent over windows. Calibration: {taken['windows']} windows of "
        f"{taken['length']} tokens, products in {taken['products']}. Foreseen: the sum of what the forms of all layers "
        "are expected to cost. Seconds of one processor, without calibration.*"
    )
    return "\n\n".join([*parts, provenance(data)])


def _forms_chosen(data: dict[str, Any]) -> list[str]:
    """Return how many layers of each kind took which form, at each size."""
    own = sorted((row for row in data["rows"] if row["method"] == "ours"), key=lambda row: row["bytes"])
    kinds = list(dict.fromkeys(kind for row in own for kind in row["forms"]))
    rows = []
    for row in own:
        cells = []
        for kind in kinds:
            said = list(row["forms"].get(kind, {}).values())
            bits = sorted({int(form.split()[0]) for form in said})
            more = [f"{count} {word}" for word in ("rank", "neurons") if (count := sum(word in form for form in said))]
            cells.append(
                ", ".join([f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else f"{bits[0]}", *more]) if bits else ""
            )
        rows.append([f"{row['bits']:.1f}", *cells])
    return [table(["Bits that were chosen (and in how many layers a rank, or neurons)", *kinds], rows)] if rows else []


def forms(data: dict[str, Any]) -> str:
    """Return what rounding was foreseen to lose beside what it lost."""
    rows = []
    for bits in sorted({row["bits"] for row in data["rows"]}):
        own = [row for row in data["rows"] if row["bits"] == bits]
        ratios = sorted(row["done"] / row["foreseen"] for row in own if "done" in row)
        times = sorted(row["times"] for row in own if "times" in row)
        shown = [f"{x[0]:.2f} to {x[-1]:.2f}, median {x[len(x) // 2]:.2f}" if x else "" for x in (ratios, times)]
        rows.append([str(bits), *shown])
    head = ["Bits", "Loss as done over as foreseen", "Added by rounding two factors, over that of the whole weight"]
    layers = list(dict.fromkeys(row["layer"] for row in data["rows"]))
    parts = [table(head, rows), f"*{len(layers)} layers, groups of 64.*"]
    four = {row["layer"]: row["residual"] for row in data["rows"] if row["bits"] == 4 and "residual" in row}
    ranks = list(next(iter(four.values())))
    cells = [
        [name.removeprefix("model.layers."), *(f"{share:.2f}" for rank in ranks for share in found[rank])]
        for name, found in four.items()
    ]
    across = [title for rank in ranks for title in (f"left with rank {rank}", "with as many bits")]
    parts.append(table(["Of the loss at 4 bits", *across], cells))
    return "\n\n".join([*parts, provenance(data)])


def _with_interval(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2g} ± {half:.1g}" if mean < 0.01 else f"{mean:.3f} ± {half:.3f}"


def _window_by_window(data: dict[str, Any], one: str, other: str) -> list[str]:
    """Return a sentence with the divergence of one method over another's on the same windows."""
    found = {(row["method"], row["bits"], row["group"]): row for row in data["rows"]}
    parts = []
    for method, bits, group in found:
        if method != one or (other, bits, group) not in found:
            continue
        mine, theirs = found[one, bits, group]["kl"], found[other, bits, group]["kl"]
        values = []
        for text in mine:
            # the first windows are those of both
            logs = [math.log(a / b) for a, b in zip(mine[text], theirs[text], strict=False)]
            mean, half = interval(logs)
            values.append(f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})")
        parts.append(f"{bits} bits{'' if group == 64 else f' by {group}'}: {' and '.join(values)}")
    if not parts:
        return []
    texts = " and ".join(data["rows"][0]["kl"])
    return [f"*Divergence of {one} over that of {other}, window by window, on {texts}: {'; '.join(parts)}.*"]


def low_bits(data: dict[str, Any]) -> str:
    """Return the fastest kernel of every case and its speed over dense, what one product gains, and the real model."""

    def said(row: dict[str, Any], kind: str) -> str:
        name = row[kind]
        return f"{row['speed-up'][name]:.2f} ({name})"

    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in data["layers"]:
        found.setdefault((row["shape"], row["grid"], row["dtype"]), []).append(row)
    tokens = [row["tokens"] for row in next(iter(found.values()))]
    layers = [
        [", ".join(case), *(f"{row['dense, ms']:.3g}" for row in rows), *(said(row, "exact") for row in rows)]
        for case, rows in found.items()
    ]
    rounds = [
        [", ".join(case), *(said(row, "int8") for row in rows)]
        for case, rows in found.items()
        if any(row["int8"] != row["exact"] for row in rows)
    ]
    together = [
        [f"{row['weights']}, {row['grid']}, {row['dtype']}", cell(row["apart, ms"]), f"{row['speed-up']:.2f}"]
        for row in data["together"]
    ]
    kinds = ("decode", "prefill")
    model = [
        [
            f"{row['grid']}, {row['dtype']}",
            *(cell(row[f"{kind}, {what}tokens/s"]) for kind in kinds for what in ("dense ", "")),
            *(f"{row[f'{kind}, speed-up']:.2f}" for kind in kinds),
        ]
        for row in data["model"]
    ]
    heads = [f"dense, ms, {count} tokens" for count in tokens], [f"speed-up, {count} tokens" for count in tokens]
    speeds = [f"{kind}, {what}tokens/s" for kind in kinds for what in ("dense ", "")]
    return "\n\n".join(
        [
            table(["Layer, inputs not rounded", *heads[0], *heads[1]], layers),
            table(["Layer, inputs in eight bits allowed", *heads[1]], rounds),
            table(["One token", "one after the other, ms", "speed-up of one product"], together),
            table(["SmolLM2-135M, rounded", *speeds, *(f"{kind}, speed-up" for kind in kinds)], model),
            f"*Kernels for {data['kernels']}, {data['threads']} thread(s).* {provenance(data)}",
        ]
    )


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "bounds": bounds,
    "off_grid": off_grid,
    "rounding": rounding,
    "rounding_model": rounding_model,
    "frontier": frontier,
    "forms": forms,
    "gpu": gpu,
    "scale": scale,
    "cost": cost,
    "core_accuracy": columns(
        "matrix", "k", "rank", "error", "certified", "truncated SVD", "over SVD", "error, randomised subspace", "target"
    ),
    "core_floor": columns("shape", "products, s", "cur, s", "ratio", "target"),
    "core_growth": core_growth,
    "core_paper": core_paper,
    "core_power": columns(
        "spectrum", "exact", "0 power iterations", "1 power iterations", "2 power iterations", "lupp"
    ),
    "core_selectors": columns("matrix", "select", "error over SVD", "worst of 5", "seconds"),
    "core_speed": columns("what", "seconds", "times faster than SciPy", "target"),
    "core_tolerance": core_tolerance,
    "ctr": ctr,
    "heads": columns("forms", "0.9", "0.8", "0.6"),
    "inference": inference,
    "low_bits": low_bits,
    "paper": paper,
    "healing": healing,
    "paper_setting": paper_setting,
    "families": families,
    "precision": precision,
    "quality": quality,
}


def rendered(page: str) -> str:
    """Return the page with every block written anew from its results."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        file = RESULTS / f"{name}.json"
        measured = file.exists()
        text = RENDERERS[name](json.loads(file.read_text(encoding="utf-8"))) if measured else "*Not measured yet.*"
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return BLOCK.sub(fill, page)


def main() -> None:
    """Rewrite the pages, or check that they are up to date."""
    for file in PAGES:
        page = file.read_text(encoding="utf-8")
        new = rendered(page)
        if new == page:
            continue
        if "--check" in sys.argv[1:]:
            sys.exit(f"docs/{file.name} is out of date; run python benchmarks/render.py")
        file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
