"""One layer on a grid of few bits: its factors fitted to each other, and rounded by nearest plane."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur.integrations.measure.moments import damped
from cur.integrations.measure.propagation import InputMoments
from cur.integrations.measure.statistics import Statistics
from cur.integrations.nn import (
    CompressedLinear,
    GridEmbedding,
    GridLinear,
    IntegerGrid,
    WholeLinear,
    dense_weight,
    is_table,
)
from cur.rounding import round_to_grid

__all__ = ["RoundedLayer", "grid_integers", "round_layer", "step_dtype"]

# Steps between these have all digits of float16, whatever part of a range is tried.
_FLOAT16 = (2.0**-12, 2.0**15)


@dataclass(frozen=True, eq=False)
class RoundedLayer:
    """A layer on a grid, and what rounding lost.

    Attributes
    ----------
    layer : CompressedLinear
        The layer, of the type that it had, or a :class:`~cur.integrations.nn.WholeLinear` of a dense one.
    error : float
        The relative change of the layer's outputs, as in :class:`~cur.integrations.quantize.Quantization`.
    predicted : float or None
        The increase of the loss in nats per token, to second order; None without second moments of output gradients.
    """

    layer: CompressedLinear
    error: float
    predicted: float | None


@torch.no_grad()
def round_layer(
    name: str,
    layer: nn.Module,
    grid: IntegerGrid,
    statistics: Statistics | None,
    *,
    damping: float,
    gradients: bool = True,
    propagated: InputMoments | None = None,
    correction: float = 0.0,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
) -> RoundedLayer:
    """Round a layer to a grid; see :func:`~cur.integrations.quantize.quantize_` for what is done.

    Parameters
    ----------
    name : str
        The name of the layer, in the statistics and in errors.
    layer : nn.Module
        A compressed layer, ``nn.Linear`` or ``Conv1D``, unchanged.
    grid : IntegerGrid
        The grid of its factors.
    statistics : Statistics or None
        Statistics of the inputs of the layer; None rounds every entry to the nearest number.
    damping : float
        The share of its mean diagonal that is added to each second moment.
    gradients : bool, default True
        Whether outputs are weighted by the second moments of their gradients, where the statistics have them.
    propagated : InputMoments, optional
        Moments of the inputs that rounded layers before it give, to fit the layer to them.
    correction : float, default 0.0
        How much of the inputs' earlier error is corrected, see :meth:`InputMoments.problem`.
    inputs, outputs : Tensor, optional
        Which of the inputs or outputs in the statistics the layer has, as truth values; by default all.

    Returns
    -------
    RoundedLayer
        The rounded layer.

    Raises
    ------
    NumericalError
        If a weight is NaN or infinite, or a second moment is not positive semidefinite with the damping.
    ValueError
        If the statistics do not cover the layer, or are of another one.
    """
    factors = _factors(name, layer)
    W = _product(factors)
    dtype = next(part.weight.dtype for part in _parts(name, layer).values())
    G = H = None
    if statistics is not None:
        G = _moment(statistics.second_moment, name, W.shape[1], W, "inputs", inputs)
        if gradients and name in statistics.output_products:
            H = _moment(statistics.output_moment, name, W.shape[0], W, "outputs", outputs)
            H = H if bool(H.any()) else None  # no gradient ever came
    seen = None if G is None or not bool(G.any()) else G  # no input ever came
    target, more = W, damping
    if propagated is not None:
        seen, wanted = propagated.problem(W, correction=correction, damping=damping)
        target, more = _over(wanted, seen, name, damping), 0.0
    made: dict[str, GridLinear | GridEmbedding] = {}
    was = now = torch.empty(0)
    for key, factor in factors.items():
        F = factor.matrix
        wanted = F @ was if made else F
        if factor.looks_up:  # its rows, the columns of the weight, are looked up one at a time
            parts = grid_integers(f"{name}.{key}", F.T, grid, None, None, dtype)
            table = GridEmbedding.from_integers(**parts, grid=grid)
            made[key], now, was = table, table.weight.T.double(), F
            continue
        moment = seen
        if seen is not None:
            if factor.outputs is not None:
                wanted = target[factor.outputs]
            elif factor.after is None:
                wanted = target
            if made:
                moment = damped(_times(now, seen) @ now.T, more)
                F = F + _over(_times(wanted - F @ now, seen) @ now.T, moment, f"{name}.{key}", damping)
            else:
                F, moment = wanted, damped(seen, more)
        rows = None if H is None or seen is None else damped(factor.weigh(H), damping)
        rounded = GridLinear.from_integers(
            bias=factor.bias, grid=grid, **grid_integers(f"{name}.{key}", F, grid, rows, moment, dtype)
        )
        now = rounded.weight.double() @ now if made else rounded.weight.double()
        was, made[key] = wanted, rounded
    done = _with(name, layer, made)
    change = _product(_chained({key: factor.rounded(made[key]) for key, factor in factors.items()})) - W
    size = _size(W, G)
    predicted = None if H is None else 0.5 * float(((H @ change) * _times(change, G)).sum().clamp(min=0))
    return RoundedLayer(done, math.sqrt(_size(change, G) / size) if size else 0.0, predicted)


@dataclass(frozen=True, eq=False)
class _Factor:
    """A factor of a layer: a matrix that is applied to what those before it give.

    Attributes
    ----------
    matrix : Tensor, shape (p, q)
        The matrix in float64.
    bias : Tensor or None
        The bias that is added; None for none.
    looks_up : bool
        Whether it is a table, of which columns are looked up.
    outputs : Tensor or None
        The outputs of the layer that its own are, where those of every factor are some.
    after : Tensor or None, shape (m, p)
        What is made of its outputs; None where they are those of the layer.
    """

    matrix: Tensor
    bias: Tensor | None
    looks_up: bool
    outputs: Tensor | None = None
    after: Tensor | None = None

    def rounded(self, part: GridLinear | GridEmbedding) -> _Factor:
        """Return the factor with what a rounded one stands for."""
        weight = part.weight.double()
        return replace(self, matrix=weight.T if self.looks_up else weight, after=None)

    def weigh(self, H: Tensor) -> Tensor:
        """Return the weight of its outputs, from that of the layer's."""
        if self.after is not None:
            return self.after.T @ H @ self.after
        return H if self.outputs is None else H[self.outputs][:, self.outputs]


def _parts(name: str, layer: nn.Module) -> dict[str, Any]:
    return dict(layer.factors()) if isinstance(layer, CompressedLinear) else {"W": _Whole(*dense_weight(layer, name))}


@dataclass(frozen=True, eq=False)
class _Whole:
    """The weight of a dense layer, as if it were a factor."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool


def _factors(name: str, layer: nn.Module) -> dict[str, _Factor]:
    """Return the factors of a layer in the order in which they are applied."""
    found: dict[str, _Factor] = {}
    for key, part in _parts(name, layer).items():
        looks_up = is_table(part) or isinstance(part, GridEmbedding)
        matrix = part.weight.detach()
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(f"the weight {name}.{key} holds NaN or infinity; the model cannot be rounded")
        outputs = layer.outputs_of(key) if isinstance(layer, CompressedLinear) else None
        found[key] = _Factor(
            (matrix.T if looks_up else matrix).double(), getattr(part, "bias", None), looks_up, outputs
        )
    return _chained(found)


def _chained(found: dict[str, _Factor]) -> dict[str, _Factor]:
    """Return factors that know what is made of their outputs by those after them."""
    after: Tensor | None = None
    for key in reversed(found):
        factor = found[key]
        if factor.outputs is not None and after is not None:
            # its outputs are outputs of the layer, and what is made of them are the others
            both = after.new_zeros(factor.outputs.numel() + len(after), factor.matrix.shape[0])
            both[factor.outputs] = torch.eye(factor.matrix.shape[0], dtype=both.dtype, device=both.device)
            later = next(other.outputs for other in found.values() if other is not factor)
            both[later] = after
            found[key] = replace(factor, after=both)
        else:
            found[key] = replace(factor, after=after)
        after = factor.matrix if after is None else after @ factor.matrix
    return found


def _product(factors: dict[str, _Factor]) -> Tensor:
    """Return the matrix that the factors stand for, whose rows are outputs in their order."""
    first, *others = factors.values()
    X = first.matrix
    if first.outputs is None:
        for factor in others:
            X = factor.matrix @ X
        return X
    return X if first.after is None else first.after @ X


def _with(name: str, layer: nn.Module, made: dict[str, GridLinear | GridEmbedding]) -> CompressedLinear:
    """Return the layer with rounded factors."""
    if isinstance(layer, CompressedLinear):
        done = copy.deepcopy(layer)
        done.round_(made)
        return done
    (weight,) = made.values()
    assert isinstance(weight, GridLinear)
    whole = WholeLinear.from_rounded(weight, transposed=dense_weight(layer, name)[2])
    return whole.train(layer.training)


def _moment(of: Callable[[str], Tensor], name: str, size: int, like: Tensor, what: str, kept: Tensor | None) -> Tensor:
    try:
        found = of(name).to(like)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    if kept is not None:
        found = found[kept][:, kept]
    if len(found) != size:
        raise ValueError(
            f"`statistics` has {len(found)} {what} of {name}, which has {size}: measure them on this model"
        )
    return found


def grid_integers(
    name: str,
    F: Tensor,
    grid: IntegerGrid,
    rows: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    *,
    steps: str | None = None,
) -> dict[str, Any]:
    """Return integers, steps and zeros whose matrix is near another under weights of its rows and columns.

    A row that the groups do not divide is continued by zeros, whose errors nothing makes up for.

    Parameters
    ----------
    name : str
        The name of the matrix, for errors.
    F : Tensor
        The matrix in float64.
    grid : IntegerGrid
        The grid that it is rounded to.
    rows, columns : Tensor or None
        The weights of rows and columns, matrices or the diagonals of such; None for none.
    dtype : torch.dtype
        The dtype of the layer.
    steps : str, optional
        The dtype in which steps are stored, where the matrix is a part of one. By default :func:`step_dtype`.

    Returns
    -------
    dict
        ``integers``, ``scale`` and ``zeros``.

    Raises
    ------
    NumericalError
        If the steps do not fit into their dtype, or the matrix cannot be rounded under the weights.
    """
    q = F.shape[1]
    more = 0 if grid.group is None else -q % grid.group
    if more:
        F = nn.functional.pad(F, (0, more))
    if columns is not None and columns.ndim == 1:
        columns = torch.diag(columns)
    if columns is not None and more:
        own = torch.full((more,), float(columns.diagonal().mean()), dtype=columns.dtype, device=columns.device)
        columns = torch.block_diag(columns, torch.diag(own))  # type: ignore[no-untyped-call]
    try:
        found = round_to_grid(
            F.cpu().numpy(),
            bits=grid.bits,
            group=grid.group,
            symmetric=grid.symmetric,
            row_weights=None if rows is None else rows.cpu().numpy(),
            column_weights=None if columns is None else columns.cpu().numpy(),
            dtype=steps or step_dtype(F, grid, dtype),
        )
    except ValueError as error:
        if rows is None and columns is None:
            raise NumericalError(
                f"the steps of {name} do not fit into {str(dtype).removeprefix('torch.')}; load the model in float32 "
                "or bfloat16"
            ) from error
        raise NumericalError(f"{name} cannot be rounded with its statistics: {error}") from error
    take = {key: torch.from_numpy(getattr(found, key)).to(F.device) for key in ("integers", "steps")}
    zeros = None if found.zeros is None else torch.from_numpy(found.zeros).to(F.device)
    return {"integers": take["integers"][:, :q].contiguous(), "scale": take["steps"].to(dtype), "zeros": zeros}


def step_dtype(F: Tensor, grid: IntegerGrid, dtype: torch.dtype) -> str:
    """Return the dtype in which the steps of a matrix are stored.

    Parameters
    ----------
    F : Tensor
        The matrix that is rounded.
    grid : IntegerGrid
        The grid that it is rounded to.
    dtype : torch.dtype
        The dtype of the layer.

    Returns
    -------
    str
        The name of the dtype.
    """
    if grid.step_dtype is None or dtype == torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    more = 0 if grid.group is None else -F.shape[1] % grid.group
    F = nn.functional.pad(F, (0, more)) if more else F
    sizes = F.reshape(len(F), grid.groups(F.shape[1]), -1).abs().amax(-1) / 2 ** (grid.bits - 1)
    sizes = sizes[sizes > 0]
    fits = not len(sizes) or (float(sizes.min()) >= _FLOAT16[0] and float(sizes.max()) <= _FLOAT16[1])
    return "float16" if fits or dtype == torch.float16 else "bfloat16"


def _over(right: Tensor, moment: Tensor, name: str, damping: float) -> Tensor:
    """Return a matrix times the inverse of a damped moment."""
    L, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        raise NumericalError(
            f"the second moment of the inputs of {name} is not positive definite with `damping` {damping}; raise it"
        )
    solved: Tensor = torch.cholesky_solve(right.T, L).T
    return solved


def _times(X: Tensor, G: Tensor | None) -> Tensor:
    """Multiply with a moment, which of one-hot inputs is the vector of its diagonal."""
    return X if G is None else X * G if G.ndim == 1 else X @ G


def _size(change: Tensor, G: Tensor | None) -> float:
    return float((_times(change, G) * change).sum().clamp(min=0))
