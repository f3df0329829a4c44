"""One layer in eight bits: its factors fitted to each other, and errors carried over from column to column."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur._lib.grid import Grid
from cur._lib.plane import Triangle, nearest_plane
from cur.integrations.measure.statistics import Statistics
from cur.integrations.nn import CompressedLinear, Int8Embedding, Int8Linear, dense_weight, is_table

__all__ = ["round_layer"]

_LARGEST = 127


def round_layer(
    name: str, layer: nn.Module, statistics: Statistics | None, damping: float
) -> tuple[dict[str, Int8Linear | Int8Embedding], float]:
    """Return the rounded factors of a layer, and by how much its outputs change.

    See :func:`~cur.integrations.quantize.quantize_` for what is done, for the arguments and the errors.

    Parameters
    ----------
    name : str
        The name of the layer, in the statistics and in errors.
    layer : nn.Module
        A compressed layer, ``nn.Linear`` or ``Conv1D``, unchanged.
    statistics : Statistics or None
        Statistics of the inputs of the layer; None rounds every entry to the nearest multiple.
    damping : float
        The share of its mean diagonal that is added to each second moment.

    Returns
    -------
    factors : dict of str to Int8Linear or Int8Embedding
        The rounded factors, by the name of the child that each replaces; ``W`` for a layer that is not compressed.
    error : float
        The relative change of the layer's outputs, as in :class:`~cur.integrations.quantize.Quantization`.

    Raises
    ------
    NumericalError
        If a weight is NaN or infinite, or a second moment is not positive definite with the damping.
    ValueError
        If the statistics do not cover the layer, or are of another one.
    """
    factors: dict[str, tuple[Tensor, Tensor | None]] = {}
    tables = set()
    rows_are_outputs = False
    if isinstance(layer, CompressedLinear):
        for key, child in layer.factors().items():
            factors[key] = (child.weight.T, None) if is_table(child) else (child.weight, child.bias)
            tables |= {key} if is_table(child) else set()
        rows_are_outputs = layer.rows_are_outputs
    else:
        weight, bias, _ = dense_weight(layer, name)
        factors["W"] = weight, bias
    G = None if statistics is None else _moment(name, next(iter(factors.values()))[0], statistics)
    made: dict[str, Int8Linear | Int8Embedding] = {}
    lost = total = 0.0
    was = now = torch.empty(0)
    for key, (weight, bias) in factors.items():
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"the weight {name}.{key} holds NaN or infinity; the model cannot be rounded")
        F = weight.double()
        wanted = F @ was if made else F
        L = None
        if key in tables:  # its rows, the columns of the weight, are looked up one at a time
            table = Int8Embedding.from_integers(*_integers(F.T, None, weight.dtype))
            made[key], now, was = table, table.weight.T.double(), wanted
            continue
        if G is not None:
            L = _root(name, _times(now, G) @ now.T if made else G, damping)
            if made and L is not None:
                F = F + torch.cholesky_solve(_times(now, G) @ (wanted - F @ now).T, L).T
        factor = Int8Linear.from_integers(*_integers(F, L, weight.dtype), bias)
        now = factor.weight.double() @ now if made else factor.weight.double()
        was, made[key] = wanted, factor
        if rows_are_outputs or len(made) == len(factors):
            lost += _size(was - now, G)
            total += _size(was, G)
    return made, math.sqrt(lost / total) if total else 0.0


def _moment(name: str, first: Tensor, statistics: Statistics) -> Tensor:
    try:
        G = statistics.second_moment(name).to(first.device, torch.float64)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    if len(G) != first.shape[1]:
        raise ValueError(
            f"`statistics` has {len(G)} inputs of {name}, which takes {first.shape[1]}: measure them on this model"
        )
    return G


def _root(name: str, moment: Tensor, damping: float) -> Tensor | None:
    """Return the lower Cholesky factor of a damped moment; None where no input ever came."""
    if not bool(moment.any()):
        return None
    damped = moment.clone()
    damped.diagonal().add_(damping * float(moment.diagonal().mean()))
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(
            f"the second moment of the inputs of the factors of {name} is not positive definite with `damping` "
            f"{damping}; raise it"
        )
    return L


def _integers(F: Tensor, L: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return integers and the steps of their rows, of a dtype, whose product is near a matrix.

    Near under the weight ``L L^T`` of its columns: whatever one column cannot have falls to the columns before it.
    Without a weight every entry goes to the nearest multiple.
    """
    scale = (F.abs().amax(1, keepdim=True) / _LARGEST).to(dtype)
    step = torch.where(scale > 0, scale, 1).double()

    def formed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # as the layer forms them, rounded once more in half precision
        return torch.from_numpy(values).to(dtype).double().numpy()

    m, n = F.shape
    grid = Grid(step.cpu().numpy(), None, n, -_LARGEST, _LARGEST, formed)
    weight = Triangle(np.ones(n))
    if L is not None:
        pivots = L.diagonal()
        weight = Triangle((pivots**2).cpu().numpy(), (L / pivots).cpu().numpy())
    found = nearest_plane(F.cpu().numpy(), grid, Triangle(np.ones(m)), weight)
    return torch.from_numpy(found.integers).to(torch.int8).to(F.device), scale


def _times(X: Tensor, G: Tensor) -> Tensor:
    """Multiply with a moment, which of one-hot inputs is the vector of its diagonal."""
    return X * G if G.ndim == 1 else X @ G


def _size(change: Tensor, G: Tensor | None) -> float:
    return float(((change if G is None else _times(change, G)) * change).sum().clamp(min=0))
