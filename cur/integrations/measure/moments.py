"""Second moments of a layer's inputs and output gradients, as weights of the columns and rows of its matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cur.integrations.measure.statistics import Statistics
from cur.weights import Weight, diagonal, matrix

__all__ = ["Measured", "Moments", "damped", "token_counts", "token_shares", "x_norm"]


def x_norm(statistics: Statistics, name: str) -> Tensor:
    """Return the norm of each input feature of a layer; a ValueError says that the statistics do not cover it.

    Parameters
    ----------
    statistics : Statistics
        The statistics that should cover the layer.
    name : str
        The name of the layer.

    Raises
    ------
    ValueError
        If the statistics do not cover the layer.
    """
    try:
        return statistics.x_norm(name)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error


class Moments:
    """The weights that statistics give to layers.

    A change ``dW`` of a layer's weight costs ``||H^(1/2) dW G^(1/2)||_F^2 / 2`` in loss per token, to second order and
    with inputs and gradients taken as independent, where ``G`` and ``H`` are their second moments (Martens and Grosse,
    arXiv 1503.05671).

    Parameters
    ----------
    statistics : Statistics
        Statistics with full second moments of inputs, and of output gradients where they are asked for.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self._latest: tuple[tuple[int, float, torch.dtype, torch.device], Weight] | None = None

    def weights(self, name: str, W: Tensor, *, gradients: bool, damping: float) -> tuple[Any, Any]:
        """Return the weights ``H`` of the rows and ``G`` of the columns of a layer's matrix.

        The weight of the shorter side is factored, all that :func:`cur.weighted.truncation.weighted_svd` needs. Layers
        in a row that share it, as the query, key and value projections share their input, share the work.

        Parameters
        ----------
        name : str
            The name of the layer.
        W : Tensor, shape (m, n)
            The layer's matrix, whose dtype and device the weights get.
        gradients : bool
            Whether outputs are weighted; otherwise ``H`` is None, the identity.
        damping : float
            Multiple of the mean eigenvalue that is added to all eigenvalues of either moment.

        Raises
        ------
        ValueError
            If the statistics lack a moment of the layer.
        """
        try:
            G = self.statistics.second_moment(name)
            H = self.statistics.output_moment(name) if gradients else None
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error
        if G.ndim == 1:  # of one-hot inputs: diagonal
            rows = None if H is None else self._factored(H, self.statistics.output_products[name], W, damping)
            return rows, diagonal(damped(G, damping).to(W))
        m, n = W.shape
        if m < n and H is not None:
            return self._factored(H, self.statistics.output_products[name], W, damping), damped(G.to(W), damping)
        factored = self._factored(G, self.statistics.products[name], W, damping)
        return None if H is None else damped(H.to(W), damping), factored

    def outputs(self, name: str, W: Tensor, *, damping: float) -> Tensor:
        """Return the damped second moment of a layer's output gradients as a matrix to take rows and columns of.

        Parameters
        ----------
        name : str
            The name of the layer.
        W : Tensor
            The layer's matrix, whose dtype and device the moment gets.
        damping : float
            The share of its mean diagonal that is added to the moment.

        Raises
        ------
        ValueError
            If the statistics lack the moment, or the layer.
        """
        try:
            return damped(self.statistics.output_moment(name).to(W), damping)
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error

    def input_weight(self, name: str, W: Tensor) -> Weight:
        """Return the second moment of a layer's inputs as a factored weight of the columns of its matrix.

        Parameters
        ----------
        name : str
            The name of the layer.
        W : Tensor
            The layer's matrix, whose dtype and device the weight gets.

        Raises
        ------
        ValueError
            If the statistics lack the moment, or the layer.
        """
        try:
            moment = self.statistics.second_moment(name)
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error
        if moment.ndim == 1:
            return diagonal(moment.to(W))
        return self._factored(moment, self.statistics.products[name], W, 0.0)

    def _factored(self, moment: Tensor, shared: Tensor, W: Tensor, damping: float) -> Weight:
        key = (id(shared), damping, W.dtype, W.device)
        if self._latest is None or self._latest[0] != key:
            self._latest = key, matrix(moment.to(W), damping=damping)
        return self._latest[1]


class Measured:
    """What was measured of a layer, in the dtype and on the device of its weight, as `cur.scores.Known`.

    Parameters
    ----------
    moments : Moments
        The statistics of the model.
    name : str
        The name of the layer.
    W : Tensor, shape (m, n)
        The weight of the layer.
    """

    def __init__(self, moments: Moments, name: str, W: Tensor) -> None:
        self._of, self._name, self._W = moments, name, W

    @property
    def norms(self) -> Tensor:
        """The norm of each input feature."""
        return x_norm(self._of.statistics, self._name).to(self._W)

    @property
    def moments(self) -> Weight:
        """The second moments of the inputs, as a factored weight of the columns."""
        return self._of.input_weight(self._name, self._W)

    @property
    def gradients(self) -> Tensor:
        """The second moments of the gradients at the outputs."""
        return self._of.outputs(self._name, self._W, damping=0.0)


def damped(moment: Tensor, damping: float) -> Tensor:
    """Return a second moment with a multiple of its mean eigenvalue added to all eigenvalues.

    Parameters
    ----------
    moment : Tensor
        The moment, a matrix, or the vector of a diagonal one.
    damping : float
        The multiple of the mean eigenvalue.
    """
    if moment.ndim == 1:
        return moment + damping * float(moment.mean())
    found = moment.clone()
    found.diagonal().add_(damping * float(moment.diagonal().mean()))
    return found


def token_shares(counts: Tensor) -> Tensor:
    """Return how often each token comes, from a text that does not have all of them.

    As much as tokens that came once make up is left for those that never came (Good and Turing), evenly.

    Parameters
    ----------
    counts : Tensor
        How often each token came.

    Returns
    -------
    Tensor
        The shares, whose sum is one, float64.

    Examples
    --------
    >>> token_shares(torch.tensor([3, 1, 0, 0])).tolist()
    [0.5625, 0.1875, 0.125, 0.125]
    """
    counts = counts.double()
    total, never = counts.sum(), counts == 0
    if not float(total) or not bool(never.any()):
        return counts / total if float(total) else torch.full_like(counts, 1 / len(counts))
    left = float((counts == 1).sum() / total)
    left = min(left, 0.5)
    return torch.where(never, left / never.sum(), (1 - left) * counts / total)


def token_counts(statistics: Statistics, names: Sequence[str], size: int) -> Tensor | None:
    """Return how often each token came to one of some tables, or to another of the same tokens; None if unknown.

    Parameters
    ----------
    statistics : Statistics
        The statistics of the model.
    names : sequence of str
        The names of the tables that come first.
    size : int
        The number of tokens.

    Returns
    -------
    Tensor or None
        The counts, one for each token.
    """
    counts = [statistics.square_sums[name] for name in (*names, *statistics.lookups) if name in statistics.lookups]
    return next((found for found in counts if len(found) == size and bool(found.any())), None)
