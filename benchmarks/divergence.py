"""How far a changed model predicts otherwise than the dense one: divergence and top token, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference"]

# Tokens whose logits of both models are in memory at once.
CHUNK = 128


class Reference:
    """The last hidden states of the dense model on windows of some texts.

    Logits are made of them where they are needed, for those of all windows would be many times as large. Both models
    have the same head, and are run in the dtype of their weights.
    """

    @torch.no_grad()
    def __init__(self, model: Any, texts: Mapping[str, Tensor], progress: Callable[[int, int], Any]) -> None:
        self.texts = dict(texts)
        self.total = sum(map(len, self.texts.values()))
        self.head = model.get_output_embeddings()
        self.states: dict[str, list[Tensor]] = {name: [] for name in self.texts}
        for name, state in self._run(model, progress):
            self.states[name].append(state)

    @torch.no_grad()
    def compare(self, model: Any, progress: Callable[[int, int], Any]) -> dict[str, dict[str, list[float]]]:
        """Return by text ``kl``, nats per token from the dense model, and the share of the ``same`` top token."""
        found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "same": []} for name in self.texts}
        for name, state in self._run(model, progress):
            divergence, same = 0.0, 0
            expected = self.states[name][len(found[name]["kl"])]
            for ours, theirs in zip(state.split(CHUNK), expected.split(CHUNK), strict=True):
                p, q = (self.head(x).float().log_softmax(-1) for x in (theirs, ours))
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                divergence += float(torch.linalg.vecdot(p.exp(), p - q).double().sum())
            found[name]["kl"].append(divergence / len(state))
            found[name]["same"].append(same / len(state))
        return found

    def _run(self, model: Any, progress: Callable[[int, int], Any]) -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, windows in self.texts.items():
            for window in windows:
                yield name, model.base_model(input_ids=window[None], use_cache=False)[0][0]
                done += 1
                progress(done, self.total)
