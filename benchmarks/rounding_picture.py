"""Draw divergence from the dense model against bytes, a panel for each text and a line for each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cur._lib.interval import interval

__all__ = ["draw"]

GROUP = 64


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw groups of 64 as lines, with the intervals of their means, and other groups as points of the same color."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "cur"
    rows = result["rows"]
    if not rows:
        return
    texts = list(rows[0]["kl"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(1, len(texts), figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for panel, text in zip(panels, texts, strict=True):
        for place, method in enumerate(methods):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
            line = [row for row in own if row["group"] == GROUP]
            others = [row for row in own if row["group"] != GROUP]
            ours = method == "both sides" or method.startswith("ours")
            color = f"C{place}"
            means, halves = zip(*(interval(row["kl"][text]) for row in line), strict=True) if line else ((), ())
            panel.errorbar(
                [row["bytes"] / 2**20 for row in line],
                means,
                # a mean less its interval may be below 0, where there is no logarithm
                yerr=([min(half, 0.9 * mean) for mean, half in zip(means, halves, strict=True)], halves),
                label=method,
                color=color,
                marker="o",
                markersize=5 if ours else 3,
                linewidth=2.2 if ours else 1,
                capsize=2,
            )
            panel.plot(
                [row["bytes"] / 2**20 for row in others],
                [interval(row["kl"][text])[0] for row in others],
                color=color,
                marker="x",
                linestyle="",
            )
        panel.set_yscale("log")
        panel.set_xlabel("MiB of the linear layers")
        panel.set_title(text)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("divergence from the dense model, nats a token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
