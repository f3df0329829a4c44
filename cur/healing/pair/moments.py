"""Second moments of what goes into the cores of compressed layers and of what the layers return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cur.healing.pair.cores import Coordinates
from cur.healing.pair.pair import TeacherStudentPair
from cur.integrations.model.hooks import hooked
from cur.integrations.model.masks import token_rows

__all__ = ["MOMENT_SAMPLES", "LayerMoments"]

MOMENT_SAMPLES = 16
"""Samples over which the second moments behind the whitened coordinates are taken."""

# Of the whitening, relative to the mean eigenvalue of each moment.
_DAMPING = 0.01


class LayerMoments:
    """``E[(R x)(R x)^T]`` and ``E[y^T H y]`` of every compressed layer in the student as it is.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    metrics : mapping of str to Tensor
        ``H`` by layer; the identity for a layer that has none.

    Attributes
    ----------
    mask : Tensor or None
        The padding mask of the batch that runs; None if it has no padding.
    """

    def __init__(self, pair: TeacherStudentPair, metrics: Mapping[str, Tensor]) -> None:
        self.pair = pair
        self.metrics = metrics
        self.mask: Tensor | None = None
        self._sums: dict[str, tuple[Tensor, float, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what passes through the student while this lasts."""
        model = self.pair.student.model
        with hooked([(model.get_submodule(name), "after", self._keep(name)) for name in self.pair.cores]):
            yield

    def coordinates(self) -> dict[str, Coordinates]:
        """Return the coordinates in which the present cores learn, by layer."""
        return {
            name: Coordinates(
                self.pair.cores[name], gram / count, square / count, damping=_DAMPING, metric=self.metrics.get(name)
            )
            for name, (gram, square, count) in self._sums.items()
        }

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        right = self.pair.cores[name].right.float()

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            with self.pair.precision.exact():
                z = (token_rows(args[0], self.mask, name).float() @ right.T).double()
                y = token_rows(output, self.mask, name).float()
                weighed = y if name not in self.metrics else y @ self.metrics[name].to(y)
            gram, square, count = self._sums.get(name, (torch.zeros((), dtype=torch.float64), 0.0, 0))
            self._sums[name] = (gram.to(z.device) + z.T @ z, square + float((y * weighed).sum()), count + len(z))

        return after
