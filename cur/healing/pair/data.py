"""The text to heal on: which part is held out, and which windows a step sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cur.integrations.measure.text import batches as in_batches

__all__ = ["Text"]


class Text:
    """Samples in an order that the seed alone decides, so that a resumed run goes on where it was.

    Parameters
    ----------
    samples : Tensor or sequence of mapping
        Token windows (count, length), or batches with ``input_ids`` and ``attention_mask``, which are kept as they are.
    batch_size : int
        Windows in a batch; batches that come as such are not divided.
    held_out : int
        Samples (windows or batches) at the end that are watched and not healed on.
    seed : int
        The seed of the order, which is drawn anew for each pass through the text.

    Raises
    ------
    TypeError
        If `samples` is neither a tensor nor a sequence of mappings.
    ValueError
        If nothing is left to heal on.
    """

    def __init__(
        self, samples: Tensor | Sequence[Mapping[str, Any]], *, batch_size: int, held_out: int, seed: int
    ) -> None:
        if isinstance(samples, Tensor):
            in_batches(samples, batch_size=batch_size)  # checks the windows
        elif not isinstance(samples, list | tuple):
            raise TypeError(
                f"`batches` must be token windows or a sequence of batches, got {type(samples).__name__}; make it a "
                "list"
            )
        self.samples = samples
        self.batch_size = batch_size if isinstance(samples, Tensor) else 1
        self.seed = seed
        count = len(samples)
        if count - held_out < self.batch_size:
            raise ValueError(
                f"`batches` holds {count} samples, of which {held_out} are held out and {self.batch_size} make a "
                "batch; give more text, or make `held_out` or `batch_size` smaller"
            )
        self.count = count - held_out
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, dtype=np.int64))

    def _take(self, indices: Sequence[int]) -> dict[str, Any]:
        if isinstance(self.samples, Tensor):
            return in_batches(self.samples[list(indices)], batch_size=len(indices))[0]
        return dict(self.samples[indices[0]])

    def batch(self, number: int) -> dict[str, Any]:
        """Return the batch of this number, counted from 0 and without end.

        The samples that are left over at the end of a pass are passed over, so that every batch is full.

        Parameters
        ----------
        number : int
            The number of the batch, counted from 0.
        """
        each = self.count // self.batch_size
        turn, place = divmod(number, each)
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng((self.seed, turn)).permutation(self.count))
        chosen = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return self._take([int(index) for index in chosen])

    def spread(self, count: int) -> list[dict[str, Any]]:
        """Return about `count` samples, evenly spread over what is healed on, in batches.

        Parameters
        ----------
        count : int
            The number of samples that is aimed at.
        """
        chosen = np.unique(np.linspace(0, self.count - 1, min(count, self.count)).round().astype(int)).tolist()
        return self._groups(chosen)

    def held_out(self) -> list[dict[str, Any]]:
        """Return the samples that are watched, in batches."""
        return self._groups(list(range(self.count, len(self.samples))))

    def _groups(self, indices: list[int]) -> list[dict[str, Any]]:
        step = self.batch_size
        return [self._take(indices[start : start + step]) for start in range(0, len(indices), step)]

    def digest(self) -> str:
        """Return the SHA-256 of all token ids."""
        total = hashlib.sha256()
        parts = [self.samples] if isinstance(self.samples, Tensor) else [b["input_ids"] for b in self.samples]
        for part in parts:
            total.update(f"{tuple(part.shape)}".encode())
            total.update(part.to(torch.int64).cpu().contiguous().numpy().tobytes())
        return total.hexdigest()
