"""How far a changed model predicts otherwise than the dense one: divergence and top token, by text and window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from cur.integrations import Reference

__all__ = ["References"]


class References:
    """The predictions of the dense model on windows of some texts, kept to compare others with it."""

    def __init__(self, model: nn.Module, texts: Mapping[str, Tensor], progress: Callable[[int, int], Any]) -> None:
        self.total = sum(map(len, texts.values()))
        self.of: dict[str, Reference] = {}
        for name, windows in texts.items():
            self.of[name] = Reference(
                model, windows, precision="float32", progress=self._after(list(self.of), progress)
            )

    def compare(self, model: nn.Module, progress: Callable[[int, int], Any]) -> dict[str, dict[str, list[float]]]:
        """Return by text and window ``kl``, nats per token from the dense model, and share of the ``same`` top."""
        names = list(self.of)
        found = {
            name: self.of[name].compare(model, precision="float32", progress=self._after(names[:place], progress))
            for place, name in enumerate(names)
        }
        return {name: {"kl": list(each.kl), "same": list(each.same)} for name, each in found.items()}

    def _after(self, names: list[str], progress: Callable[[int, int], Any]) -> Callable[[int, int | None], Any]:
        """Return what counts on from the windows of texts that are done."""
        done = sum(len(self.of[name].windows) for name in names)
        return lambda number, _: progress(done + number, self.total)
