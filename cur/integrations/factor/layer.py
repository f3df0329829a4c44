"""One linear layer and its entry of the plan -> the compressed layer, and what was lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cur._driver.certify import evaluation_rounding
from cur._lib.array import unit_roundoff
from cur._lib.errors import collected
from cur.bounds import Certificate
from cur.decompose import cur
from cur.factors import CUR, Folded, Interpolative
from cur.integrations.factor.methods import Made, Task, maker
from cur.integrations.measure.moments import Moments, x_norm
from cur.integrations.measure.propagation import InputMoments
from cur.integrations.model.finite import finite_weight
from cur.integrations.nn import (
    CompressedLinear,
    CURLinear,
    InterpolativeLinear,
    dense_weight,
    layer_class,
    learn_as_,
)
from cur.integrations.plan.entry import PlanEntry
from cur.integrations.plan.guide import guide, link_weights
from cur.integrations.plan.methods import CUREntry, RowsEntry, WeightedEntry
from cur.integrations.report.data import LayerReport
from cur.weighted.rows import own_rows
from cur.weighted.truncation import weighted_svd

__all__ = [
    "Factored",
    "as_json",
    "factorize",
    "factorize_as",
    "interpolative_layer",
    "plain_certificate",
    "report_on",
]

# Entries of a weight that are compared at once, few enough to stay in a processor's cache.
_IN_CACHE = 1 << 19


@dataclass(frozen=True, eq=False)
class Factored:
    """A factorization in the precision it was computed in, and which rows and columns of the weight it holds.

    Parameters
    ----------
    factors : CUR or Folded or Interpolative
        The factors, in the dtype they were computed in.
    certificate : Certificate or None
        The certificate of the factorization; None if it has none.
    rows : sequence of int, default ()
        Indices of the rows of the weight that the factors hold.
    columns : sequence of int, default ()
        Indices of the columns of the weight that the factors hold.
    """

    factors: CUR | Folded | Interpolative
    certificate: Certificate | None
    rows: Any = ()
    columns: Any = ()

    def layer(self, layout: str, *, dtype: torch.dtype, bias: Tensor | None, transposed: bool) -> CompressedLinear:
        """Return the layer of these factors in a dtype.

        Parameters
        ----------
        layout : str
            The layout of the new layer.
        dtype : torch.dtype
            The dtype of the new layer's factors.
        bias : Tensor or None
            The bias of the dense layer; None if it has none.
        transposed : bool
            Whether the dense layer stores its weight transposed.
        """
        factors = self.factors
        if isinstance(factors, CUR) and layout == CURLinear.layout:
            three = (factor.to(dtype) for factor in factors)
            return CURLinear.from_factors(*three, bias=bias, transposed=transposed)
        if isinstance(factors, Interpolative) and layout == InterpolativeLinear.layout:
            return interpolative_layer(factors, dtype=dtype, bias=bias, transposed=transposed)
        left, right = (factor.to(dtype) for factor in _folded(factors))
        return layer_class(layout).from_two_factors(left, right, bias=bias, transposed=transposed)


def _folded(factors: CUR | Folded | Interpolative) -> tuple[Tensor, Tensor]:
    left, right = (factors if isinstance(factors, Folded) else factors.folded()).factors
    return left, right


def factorize(
    module: nn.Module,
    entry: CUREntry | WeightedEntry | RowsEntry,
    moments: Moments,
    *,
    dtype: torch.dtype,
    seed: int,
    propagated: InputMoments | None = None,
    correction: float = 0.0,
) -> tuple[CompressedLinear, LayerReport]:
    """Factor the weight of a layer as its entry says.

    Parameters
    ----------
    module : nn.Module
        The dense layer; it is not changed.
    entry : CUREntry, WeightedEntry or RowsEntry
        The layer's entry of the plan.
    moments : Moments
        The second moments of the layer's inputs, and of its output gradients if there are any.
    dtype : torch.dtype
        Precision of the method ``"cur"``. The others, whose weights have a large range, compute in float64.
    seed : int
        The seed of every random choice.
    propagated : InputMoments, optional
        Moments of the inputs that compressed layers before this one give, to fit the layer to them. Not for the method
        ``"cur"``.
    correction : float, default 0.0
        How much of the inputs' earlier error is corrected, see :meth:`InputMoments.problem`.

    Returns
    -------
    CompressedLinear
        The compressed layer, in the dtype and on the device of the dense one.
    LayerReport
        The errors and certificates of the factorization.

    Raises
    ------
    NumericalError
        If the weight is NaN or infinite.
    ValueError
        If the statistics do not cover the layer.
    """
    if isinstance(entry, CUREntry):
        return factorize_as(lambda W: _columns_and_rows(W, entry, moments, seed), module, entry, moments, dtype=dtype)
    return factorize_as(
        lambda W: _under_moments(W, entry, moments, propagated, correction), module, entry, moments, dtype=torch.float64
    )


@torch.no_grad()
def factorize_as(
    factor: Callable[[Tensor], Factored], module: nn.Module, entry: PlanEntry, moments: Moments, *, dtype: torch.dtype
) -> tuple[CompressedLinear, LayerReport]:
    """Put the factors that a function finds of a weight into the layer of an entry, and say what was lost.

    Parameters
    ----------
    factor : callable
        Called with the weight in `dtype`; returns its factors.
    module, entry, moments
        The layer, its entry of any method and its moments, as for :func:`factorize`.
    dtype : torch.dtype
        The dtype that the factorization computes in.

    Returns
    -------
    CompressedLinear, LayerReport
        The new layer and the report on it, as from :func:`factorize`.
    """
    start = time.perf_counter()
    weight = finite_weight(module, entry.name)
    _, bias, transposed = dense_weight(module, entry.name)
    W = weight.to(dtype)
    norm = x_norm(moments.statistics, entry.name).to(W)
    done = factor(W)
    layer = done.layer(entry.layout, dtype=weight.dtype, bias=bias, transposed=transposed)
    layer.adopt_(module)
    layer.train(module.training)
    learn_as_(layer, module)
    left, right = _folded(done.factors)
    parts = list(done.factors) if isinstance(done.factors, CUR) else [left, right]
    return layer, report_on(
        _errors(W, left, right),
        entry,
        layer,
        norm=norm,
        certificate=as_json(done.certificate),
        rounding=evaluation_rounding(*parts, u=unit_roundoff(W.dtype, W)),
        rows=_indices(done.rows),
        columns=_indices(done.columns),
        seconds=time.perf_counter() - start,
    )


@maker(CUREntry, WeightedEntry, RowsEntry)
def _factorize(task: Task, entry: CUREntry | WeightedEntry | RowsEntry, propagated: InputMoments | None) -> Made:
    layer, report = factorize(
        task.model.get_submodule(entry.name),
        entry,
        task.moments,
        dtype=task.dtype,
        seed=task.seed,
        propagated=propagated,
        correction=task.correction,
    )
    return Made({entry.name: (layer, report)}, layer)


def _errors(W: Tensor, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few rows of a weight at a time, and what a product of two factors misses of them."""
    rows = max(_IN_CACHE // W.shape[1], 1)
    for some, factor in zip(W.split(rows), left.split(rows), strict=True):  # type: ignore[no-untyped-call]
        yield some, torch.addmm(some, factor, right, alpha=-1)


def report_on(
    errors: Iterable[tuple[Tensor, Tensor]],
    entry: PlanEntry,
    layer: CompressedLinear,
    *,
    norm: Tensor,
    certificate: dict[str, Any],
    rounding: float,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    seconds: float,
) -> LayerReport:
    """Say what was lost of a weight, from all its rows and what is missed of them, up to some rounding.

    Parameters
    ----------
    errors : iterable of (Tensor, Tensor)
        Pairs of the rows of the weight and of their error, all of them in turn.
    entry : PlanEntry
        The entry of the plan that the layer was made by.
    layer : CompressedLinear
        The layer that was made.
    norm : Tensor
        The norm of every input feature over the text.
    certificate : dict
        The certificate of the factorization, as JSON types.
    rounding : float
        A bound on the rounding error of the product of the factors.
    rows : tuple of int
        Indices of the rows of the weight that were kept.
    columns : tuple of int
        Indices of the columns of the weight that were kept.
    seconds : float
        The seconds that the factorization took.

    Returns
    -------
    LayerReport
        The report on the layer.
    """
    of_weight, of_error = (sum(columns) for columns in zip(*map(_column_squares, errors), strict=True))
    (missed, missed_weighted), (size, size_weighted) = _norms(of_error, norm), _norms(of_weight, norm)
    bound = missed_weighted + rounding * float(norm.max())
    return LayerReport(
        name=entry.name,
        shape=entry.shape,
        rank=layer.rank,
        layout=entry.layout,
        parameters_before=entry.dense_parameters,
        parameters_after=layer.stored,
        inner_rank=layer.inner_rank,
        grid=layer.grid,
        certificate=certificate,
        relative_error=_ratio(missed, size),
        weighted_error=_ratio(missed_weighted, size_weighted),
        weighted_bound=_ratio(bound, size_weighted),
        rows=rows,
        columns=columns,
        seconds=seconds,
    )


def interpolative_layer(
    factors: Interpolative, *, dtype: torch.dtype, bias: Tensor | None, transposed: bool = False
) -> InterpolativeLinear:
    """Return the layer of some rows of a weight and the coefficients of the others.

    Parameters
    ----------
    factors : Interpolative
        The rows and the coefficients.
    dtype : torch.dtype
        The dtype of the new layer's factors.
    bias : Tensor or None
        The bias of the dense layer; None if it has none.
    transposed : bool, default False
        Whether the dense layer stores its weight transposed.
    """
    order = torch.argsort(torch.cat([factors.chosen, factors.others]))
    kept, rest = factors.skeleton.to(dtype), factors.coefficients.to(dtype)
    return InterpolativeLinear.from_rows(kept, rest, order, bias=bias, transposed=transposed)


def _columns_and_rows(W: Tensor, entry: CUREntry, moments: Moments, seed: int) -> Factored:
    with collected():  # a weight of lower rank than planned is represented exactly; the report says at which rank
        factors = cur(
            W,
            rank=entry.rank,
            select=entry.select,
            importance=guide(W, entry, moments),
            column_weights=link_weights(W, entry, moments),
            subspace=entry.subspace,
            bounds=entry.subspace == "exact",  # in large layers products are what takes time
            rng=seed,
        )
    return Factored(factors, factors.certificate, factors.rows, factors.columns)


def _under_moments(
    W: Tensor,
    entry: WeightedEntry | RowsEntry,
    moments: Moments,
    propagated: InputMoments | None,
    correction: float,
) -> Factored:
    H, G = moments.weights(entry.name, W, gradients=entry.gradients, damping=entry.damping)
    wanted = target = W
    if propagated is not None:
        G, wanted = propagated.problem(W, correction=correction, damping=entry.damping)
        # The best weight of full rank: the nearest one of lower rank in the norm of H and M has the least error.
        target = torch.linalg.solve(G, wanted, left=False)
    if isinstance(entry, WeightedEntry):
        near = weighted_svd(target, row_weights=H, column_weights=G).truncate(entry.rank)
        factors = near if entry.layer_type.by_inputs else near.interpolative()
    elif entry.layer_type.by_inputs:
        return _own_columns(W, entry.rank, H, G)
    else:
        factors = own_rows(W, row_weights=H, column_weights=G).truncate(entry.rank)
        if propagated is not None:
            kept = factors.skeleton
            fitted = torch.linalg.solve(kept @ G @ kept.mT, wanted[factors.others] @ kept.mT, left=False)
            factors = replace(factors, coefficients=fitted)
    left, right = factors.factors
    rounding = evaluation_rounding(left, right, u=unit_roundoff(W.dtype, W))
    certificate = plain_certificate(W, left @ right, rounding)
    rows = factors.chosen if isinstance(entry, RowsEntry) and isinstance(factors, Interpolative) else ()
    return Factored(factors, certificate, rows)


def _own_columns(W: Tensor, rank: int, H: Any, G: Any) -> Factored:
    """Keep columns of a weight, the rows of a table, and write the others as combinations of them."""
    rows = own_rows(W.mT, row_weights=G, column_weights=H).truncate(rank)
    coefficients, kept = rows.factors
    left, right = kept.mT, coefficients.mT
    rounding = evaluation_rounding(left, right, u=unit_roundoff(W.dtype, W))
    return Factored(Folded(left, right), plain_certificate(W, left @ right, rounding), columns=rows.chosen)


def plain_certificate(W: Tensor, near: Tensor, rounding: float) -> Certificate:
    """Certify in the plain norm, like that of the default method: the weighted error is what the plan predicts.

    Parameters
    ----------
    W : Tensor
        The weight that was approximated.
    near : Tensor
        The approximation of it.
    rounding : float
        A bound on the rounding error of the approximation.

    Returns
    -------
    Certificate
        A certificate in the Frobenius norm.
    """
    error, scale = (float(torch.linalg.norm(X)) for X in (W - near, W))
    dtype = str(W.dtype).removeprefix("torch.")
    return Certificate("fro", error + rounding, "exact", 0.0, dtype, scale, rounding=rounding)


def _column_squares(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of each column of both, float64."""
    weight, error = (X.square().sum(0, dtype=torch.float64) for X in rows)
    return weight, error


def _norms(squares: Tensor, norm: Tensor) -> tuple[float, float]:
    """Return the Frobenius norm of a matrix from the squares of its columns, and that with its columns weighted."""
    return math.sqrt(float(squares.sum())), math.sqrt(float((squares * norm.double().square()).sum()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _indices(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def as_json(certificate: Certificate | None) -> dict[str, Any]:
    """Return the fields of a certificate as JSON types; what is not finite becomes null.

    Parameters
    ----------
    certificate : Certificate or None
        The certificate to convert; None gives an empty mapping.
    """
    if certificate is None:  # only for matrices that are never held, which a weight is not
        return {}
    data = {**asdict(certificate), "relative": certificate.relative}
    del data["ratio"]  # which `relative` is made of
    return {key: value if isinstance(value, (str, int)) else _finite(value) for key, value in data.items()}


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
