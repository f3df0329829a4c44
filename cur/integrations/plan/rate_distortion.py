"""Rate-distortion curves of layers: error and parameters at every rank, or number of neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from cur.integrations.nn import CompressedLinear, InterpolativeLinear, layer_class, layout_for

__all__ = ["SMALLEST", "Cut", "LayerCurve", "NeuronCurve", "smallest_of", "unit"]

SMALLEST = InterpolativeLinear
"""The type of factored layers with the fewest parameters: what they are stored as under a budget."""


def smallest_of(module: nn.Module) -> type[CompressedLinear]:
    """Return the type that a dense layer, or a table of embeddings, is stored as under a budget.

    Parameters
    ----------
    module : nn.Module
        The dense layer or table.
    """
    return layer_class(layout_for(module, SMALLEST.layout))


def unit(whole: float, *, gradients: bool) -> float:
    """Return what squares of weighted errors are multiplied by, so that those of all layers may be added up.

    With gradients they are halved, which makes them loss per token; without, they are divided by the square of the
    whole layer.

    Parameters
    ----------
    whole : float
        The squared weighted error of leaving out the whole layer.
    gradients : bool
        Whether errors are weighted by output gradients.
    """
    return 0.5 if gradients else 1.0 / (whole or 1.0)


@dataclass(frozen=True, eq=False)
class LayerCurve:
    """Options of one layer: its error and size at every rank.

    Attributes
    ----------
    name : str
        The name of the layer.
    shape : tuple of int
        The numbers of outputs m and inputs n of the layer.
    errors : array
        Error at the ranks 1, 2, ... that save anything, and 0 for the layer left dense.
    costs : array
        The number of parameters stored at each of these ranks.
    kind : type of CompressedLinear
        The type that it is stored as.
    rounded : array
        Error of the whole weight on each of :data:`~cur.integrations.plan.grid_errors.GRIDS`, as it is expected; empty
        where it may not be rounded, infinite for grids that are not offered.
    tied : tuple of str
        The names of other modules that read the same weight.
    """

    name: str
    shape: tuple[int, int]
    errors: np.ndarray[Any, Any]
    costs: np.ndarray[Any, Any]
    kind: type[CompressedLinear] = SMALLEST
    rounded: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0))
    tied: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, int],
        squares: np.ndarray[Any, Any],
        scale: float,
        kind: type[CompressedLinear] = SMALLEST,
        rounded: np.ndarray[Any, Any] | None = None,
    ) -> LayerCurve:
        """Return the curve of a layer from the squares of its weighted errors at the ranks 0, 1, ..., its smaller side.

        They are multiplied by `scale`, see :func:`unit`.

        Parameters
        ----------
        name : str
            The name of the layer.
        shape : (int, int)
            The numbers of outputs m and inputs n of the layer.
        squares : ndarray
            The squares of the weighted errors at the ranks 0, 1, ..., the smaller side.
        scale : float
            The factor that brings the squares to one unit for all layers, see :func:`unit`.
        kind : type of CompressedLinear, optional
            The type that the layer is stored as; the smallest of linear layers by default.
        rounded : ndarray, optional
            The squares of the weighted errors on grids. By default it may not be rounded.
        """
        m, n = shape
        # Ranks from the break-even on would cost as much as the dense layer and lose something.
        rank = np.arange(1, min(kind.rank_within(m, n, m * n - 1), len(squares) - 1) + 1)
        costs = np.append(kind.parameter_count(m, n, rank), m * n)
        on_grids = np.zeros(0) if rounded is None else scale * rounded
        return cls(name, shape, np.append(scale * squares[rank], 0.0), costs, kind, on_grids)

    @classmethod
    def dense(cls, name: str, shape: tuple[int, int]) -> LayerCurve:
        """Return the curve of a layer that stays dense.

        Parameters
        ----------
        name : str
            The name of the layer.
        shape : (int, int)
            The numbers of outputs m and inputs n of the layer.
        """
        return cls(name, shape, np.zeros(1), np.array([shape[0] * shape[1]]))


@dataclass(frozen=True, eq=False)
class Cut:
    """The layers around neurons at one number of neurons kept, and their own options at that number.

    Attributes
    ----------
    count : int
        The number of neurons kept.
    error : float
        The error of removing the other neurons.
    layers : tuple of LayerCurve
        The curves of what remains of the consumer, and of the producers in order.
    """

    count: int
    error: float
    layers: tuple[LayerCurve, ...]


@dataclass(frozen=True, eq=False)
class NeuronCurve:
    """Options that remove neurons from a group of layers: error and size for every number of neurons kept.

    Attributes
    ----------
    consumer : str
        The layer whose inputs are the neurons.
    producers : tuple of str
        The layers that have one output for each of them.
    shapes : tuple of (int, int)
        Outputs and inputs of the consumer, and of the producers in order.
    errors : array
        Error of the consumer's outputs with 1, 2, ... neurons kept, fewer than all.
    costs : array
        Numbers stored in all these layers at the same.
    cuts : tuple of Cut
        The remaining parts at some of these counts, which can be factored as well.
    """

    consumer: str
    producers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    errors: np.ndarray[Any, Any]
    costs: np.ndarray[Any, Any]
    cuts: tuple[Cut, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, the consumer first."""
        return self.consumer, *self.producers
