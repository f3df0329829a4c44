"""Draw what is lost against bytes, and which forms were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cur._lib.interval import interval

__all__ = ["draw_forms", "draw_frontier"]

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHOWN = ("ours", "GPTQ, shared bits", "GPTQ", "AWQ", "nearest", "GGUF")


def draw_frontier(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each text and a line for each method, with the intervals of the means."""
    plt = _pyplot()
    rows = [row for row in result["rows"] if row["method"] in SHOWN]
    if not rows:
        return
    texts = list(rows[0]["kl"])
    figure, panels = plt.subplots(1, len(texts), figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for panel, text in zip(panels, texts, strict=True):
        for place, method in enumerate(SHOWN):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
            if not own:
                continue
            means, halves = zip(*(interval(row["kl"][text]) for row in own), strict=True)
            panel.errorbar(
                [row["bytes"] / 2**20 for row in own],
                means,
                yerr=([min(half, 0.9 * mean) for mean, half in zip(means, halves, strict=True)], halves),
                label=method,
                color=f"C{place}",
                marker="o",
                markersize=5 if method == "ours" else 3,
                linewidth=2.4 if method == "ours" else 1,
                linestyle="" if method == "GGUF" else "-",
                capsize=2,
            )
        panel.set_yscale("log")
        panel.set_xlabel("MiB of the linear layers")
        panel.set_title(text)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("divergence from the dense model, nats a token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, ncols=len(SHOWN), loc="outside lower center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_forms(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the bits of every layer as a grid of kinds and blocks, with a letter where ranks or neurons were taken."""
    plt = _pyplot()
    own = sorted((row for row in rows if row["method"] == "ours"), key=lambda row: row["bytes"])
    if not own:
        return
    blocks = max(int(block) for kind in own[0]["forms"].values() for block in kind) + 1
    figure, panels = plt.subplots(len(own), 1, figsize=(10, 1.5 * len(own) + 0.6), layout="constrained", squeeze=False)
    image = None
    for panel, row in zip(panels[:, 0], own, strict=True):
        cells = [[_bits(row["forms"].get(kind, {}).get(str(block))) for block in range(blocks)] for kind in KINDS]
        image = panel.imshow(cells, vmin=2, vmax=8, cmap="viridis", aspect="auto")
        for y, kind in enumerate(KINDS):
            for block in range(blocks):
                said = row["forms"].get(kind, {}).get(str(block), "")
                letter = "r" if "rank" in said else "n" if "neurons" in said else ""
                panel.text(block, y, letter, ha="center", va="center", fontsize=7, color="white")
        panel.set_yticks(range(len(KINDS)), [kind.removesuffix("_proj") for kind in KINDS], fontsize=7)
        panel.set_xticks([])
        panel.set_title(f"{row['bits']:.1f} bits a weight", fontsize=9)
    panels[-1, 0].set_xticks(range(0, blocks, 5))
    panels[-1, 0].set_xlabel("block; r: a lower rank, n: fewer neurons")
    figure.colorbar(image, ax=panels[:, 0], label="bits of a number", shrink=0.6)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bits(said: str | None) -> float:
    return 16.0 if said is None else float(said.split()[0])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "cur"
    return plt
