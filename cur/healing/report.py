"""What healing did: the figures, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["HealingReport", "LayerFit", "best_step"]


@dataclass(frozen=True)
class LayerFit:
    """What least squares did to one layer.

    Attributes
    ----------
    name : str
        The name of the compressed layer.
    before, after : float
        Squared error of its outputs, relative to the wanted ones, for the core as it was and as it is.
    floor : float
        The error of the best outputs in the span of L: no core does better.
    """

    name: str
    before: float
    after: float
    floor: float


@dataclass(frozen=True, kw_only=True)
class HealingReport:
    """What a healing did.

    Attributes
    ----------
    config : mapping
        The configuration of the healing run, as JSON types.
    trainable : int
        The number of parameters that learned: ``r^2`` for each compressed layer.
    fits : sequence of LayerFit
        The fit of each layer by the closed form; empty without it.
    before : mapping of str to float
        Loss, its parts and perplexity on the held-out text before anything was changed; empty without held-out text.
    curve : sequence of mapping
        The losses and the perplexity on the held-out text, after the closed form and natural steps (``step`` 0) and at
        every look.
    steps : int
        The number of steps that were taken.
    best_step : int or None
        The step whose state was kept: 0 is what comes before steps, -1 the model as it came, where nothing was better
        on the held-out text; None without such text, when the last state is kept. By blocks, each of which keeps its
        own best, that of the mean.
    shared_bytes : int
        Bytes that student and teacher use together.
    seconds : mapping of str to float
        The seconds that each stage took in this process.
    versions : mapping of str to str
        The versions of Python and of the packages involved.
    """

    config: Mapping[str, Any]
    trainable: int
    fits: Sequence[LayerFit]
    before: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]
    steps: int
    best_step: int | None
    shared_bytes: int
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON.

        Parameters
        ----------
        path : path
            The path of the file to write.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        looks = {-1: self.before, **{int(look["step"]): look for look in self.curve}}
        first = self.before.get("perplexity")
        last = None if self.best_step is None else looks[self.best_step].get("perplexity")
        text = f"Healed {self.trainable:,} numbers in {self.steps} steps, products in {self.config['precision']}"
        if first is None or last is None:
            return text
        return f"{text}; perplexity on held-out text {first:.2f} before, {last:.2f} after"


def best_step(before: Mapping[str, float], curve: Sequence[Mapping[str, float]]) -> int | None:
    """Return the step of the least held-out loss, -1 for the loss before anything, None if there was no look.

    Parameters
    ----------
    before : mapping of str to float
        The losses before anything was changed.
    curve : sequence of mapping of str to float
        The losses at every look, each with its ``step``.
    """
    looks = [(before["loss"], -1)] if before else []
    looks += [(look["loss"], int(look["step"])) for look in curve]
    return min(looks)[1] if looks else None
