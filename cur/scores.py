"""Importances and links by name: what rows and columns of a layer are chosen for, and what its core minimises.

For a layer ``y = W x`` an importance turns the weight ``W`` (m x n) into the matrix whose leading singular subspaces
choose rows and columns, and a link gives the weights of the columns under which the core between them is the best one.
Each is a function with a decorator that gives it a name and says what has to be measured for it. Configurations, plans
and commands take every name in `IMPORTANCES` and `LINKS`, also those of functions that are defined elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cur._lib import promotion
from cur._lib.array import Array, adjoint, namespace
from cur._lib.host import through_numpy
from cur._lib.validate import check_companion, check_dense
from cur.weights import Weight

__all__ = ["IMPORTANCES", "LINKS", "Importance", "Known", "Link", "importance", "link", "listed", "needs", "wanda"]

NEEDS = ("norms", "moments", "gradients")

Function = TypeVar("Function", bound=Callable[..., Any])


class Known(Protocol):
    """What was measured of a layer; each is there if it was asked for."""

    @property
    def norms(self) -> Array:
        """The norm ``||x_j||`` of each input feature over all tokens, shape (n,)."""

    @property
    def moments(self) -> Weight:
        """The second moments ``E[x x^T]`` of the inputs, as a weight of the columns."""

    @property
    def gradients(self) -> Array:
        """The second moments ``E[g g^T]`` of the gradients at the outputs, shape (m, m)."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What importances and links have in common.

    Attributes
    ----------
    name : str
        What configurations call it.
    formula : str
        What it is, for a line of help.
    needs : tuple of str
        What has to be measured: some of ``"norms"``, ``"moments"`` and ``"gradients"``.
    """

    name: str
    formula: str
    needs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Importance(_Entry):
    """A matrix that chooses rows and columns of a weight.

    Attributes
    ----------
    name : str
        What configurations and commands call it.
    formula : str
        The matrix as a formula, for a line of help.
    needs : tuple of str
        What has to be measured: some of ``"norms"``, ``"moments"`` and ``"gradients"``.
    score : callable
        The function, called as ``score(W, known)`` with the weight and what is `Known` of the layer; it returns a
        matrix of the shape of the weight.
    link : str or None
        The link under which the weight itself is chosen from in the same way, so that no matrix has to be formed.
    """

    score: Callable[[Array, Known], Array]
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class Link(_Entry):
    """Weights of the columns under which a core is the best one.

    Attributes
    ----------
    name : str
        What configurations and commands call it.
    formula : str
        The norm that it makes smallest, for a line of help.
    needs : tuple of str
        What has to be measured: some of ``"norms"``, ``"moments"`` and ``"gradients"``.
    weights : callable
        The function, called as ``weights(W, known)`` with the weight and what is `Known` of the layer; it returns
        `column_weights` of `cur.cur`, None if every column counts the same.
    """

    weights: Callable[[Array, Known], Any]


IMPORTANCES: dict[str, Importance] = {}
"""All importances by name."""

LINKS: dict[str, Link] = {}
"""All links by name."""


def importance(
    name: str, formula: str, /, *, needs: str | tuple[str, ...] = (), link: str | None = None
) -> Callable[[Function], Function]:
    """Register a function as an importance; a decorator.

    Parameters
    ----------
    name : str
        What configurations and commands call it.
    formula : str
        What it is, for a line of help.
    needs : str or tuple of str, default ()
        What has to be measured for it: ``"norms"``, ``"moments"``, ``"gradients"``.
    link : str, optional
        A link under which the weight itself is chosen from in the same way.

    Returns
    -------
    callable
        The decorator of a function ``score(W, known)``.

    Raises
    ------
    ValueError
        If the name is taken, or `needs` names something else.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import scores
    >>> @scores.importance("squares", "W^2")
    ... def squares(W, known):
    ...     return W**2
    >>> scores.IMPORTANCES["squares"].score(np.array([[1.0, -2.0]]), None).tolist()
    [[1.0, 4.0]]
    >>> del scores.IMPORTANCES["squares"]
    """
    needed = _checked(name, needs, IMPORTANCES)

    def register(function: Function) -> Function:
        IMPORTANCES[name] = Importance(name=name, formula=formula, needs=needed, score=function, link=link)
        return function

    return register


def link(name: str, formula: str, /, *, needs: str | tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Register a function as a link; a decorator.

    Parameters
    ----------
    name : str
        What configurations and commands call it.
    formula : str
        What it is, for a line of help.
    needs : str or tuple of str, default ()
        What has to be measured for it: ``"norms"``, ``"moments"``, ``"gradients"``.

    Returns
    -------
    callable
        The decorator of a function ``weights(W, known)``.

    Raises
    ------
    ValueError
        If the name is taken, or `needs` names something else.

    Examples
    --------
    >>> from cur import scores
    >>> @scores.link("squares", "with features counted by ||x||^2", needs="norms")
    ... def squares(W, known):
    ...     return known.norms**4
    >>> scores.LINKS["squares"].needs
    ('norms',)
    >>> del scores.LINKS["squares"]
    """
    needed = _checked(name, needs, LINKS)

    def register(function: Function) -> Function:
        LINKS[name] = Link(name=name, formula=formula, needs=needed, weights=function)
        return function

    return register


def needs(importance: str, link: str) -> frozenset[str]:
    """Return what has to be measured for an importance and a link together.

    Parameters
    ----------
    importance : str
        The importance, by its name in `IMPORTANCES`.
    link : str
        The link, by its name in `LINKS`.

    Returns
    -------
    frozenset of str
        Some of ``"norms"``, ``"moments"`` and ``"gradients"``.

    Raises
    ------
    KeyError
        If there is no such name.

    Examples
    --------
    >>> from cur import scores
    >>> sorted(scores.needs("wanda", "covariance"))
    ['moments', 'norms']
    """
    return frozenset(IMPORTANCES[importance].needs) | frozenset(LINKS[link].needs)


def listed(entries: Mapping[str, Importance] | Mapping[str, Link]) -> str:
    """Return the names of a registry with their formulas, for a line of help.

    Parameters
    ----------
    entries : mapping
        The registry, `IMPORTANCES` or `LINKS`.

    Returns
    -------
    str
        The names in their order.

    Examples
    --------
    >>> from cur import scores
    >>> scores.listed({name: scores.IMPORTANCES[name] for name in ("wanda", "magnitude")})
    'wanda: |W| ||x||; magnitude: |W|'
    """
    return "; ".join(f"{name}: {entry.formula}" for name, entry in entries.items())


@through_numpy
def wanda(W: Array, x_norm: Array, /) -> Array:
    """Score the weights of a linear layer by magnitude times the norm of what they multiply.

    Parameters
    ----------
    W : array, shape (m, n)
        Weight of the layer, output by input features.
    x_norm : array, shape (n,)
        Euclidean norm of each input feature over the calibration tokens, non-negative.

    Returns
    -------
    array, shape (m, n)
        ``|W| * x_norm``, to be passed as `importance` to `cur.deim_cur`: it guides the choice of rows and columns,
        which are taken from `W` itself.

    Raises
    ------
    TypeError, ValueError
        If shapes or libraries do not match, or a norm is negative or not finite.

    References
    ----------
    Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024; used for CUR in
    "CURing Large Models", arXiv 2501.04211.

    Examples
    --------
    >>> import numpy as np
    >>> wanda(np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([1.0, 10.0])).tolist()
    [[1.0, 20.0], [3.0, 5.0]]
    """
    check_dense(W, "W")
    check_dense(x_norm, "x_norm", (1,), "a vector")
    check_companion(x_norm, W, "x_norm")
    W, x_norm = promotion.promote(W), promotion.promote(x_norm)
    xp = namespace(W, x_norm)
    if W.ndim != 2 or tuple(x_norm.shape) != (W.shape[1],):
        raise ValueError(
            f"`x_norm` must have one entry per column of `W`, shape ({W.shape[-1]},); got shape {tuple(x_norm.shape)}"
        )
    if not bool(xp.all(xp.isfinite(x_norm))) or float(xp.min(x_norm)) < 0:
        raise ValueError(
            "`x_norm` must be finite and non-negative; it holds NaN, inf or negative entries; check the calibration"
        )
    score = xp.abs(W)
    if score.dtype == x_norm.dtype:
        score *= x_norm[None, :]  # a second matrix of this size takes as long as the product with it
        return score
    return score * x_norm[None, :]


def _checked(name: str, needs: str | tuple[str, ...], taken: Mapping[str, Any]) -> tuple[str, ...]:
    needed = (needs,) if isinstance(needs, str) else needs
    if name in taken:
        raise ValueError(f"`name` must be one that none of {', '.join(taken)} has, got {name!r}; choose another")
    if unknown := [what for what in needed if what not in NEEDS]:
        raise ValueError(f"`needs` must name some of {', '.join(NEEDS)}, got {unknown[0]!r}")
    return needed


@importance("wanda", "|W| ||x||", needs="norms")
def _wanda(W: Array, known: Known) -> Array:
    return wanda(W, known.norms)


@importance("magnitude", "|W|")
def _magnitude(W: Array, known: Known) -> Array:
    return abs(W)


@importance("weights", "W", link="optimal")
def _weights(W: Array, known: Known) -> Array:
    return W


@importance("activation", "W diag(||x||)", needs="norms", link="activation")
def _activation(W: Array, known: Known) -> Array:
    return W * known.norms


@importance("covariance", "W times the root of E x x^T", needs="moments", link="covariance")
def _covariance(W: Array, known: Known) -> Array:
    return known.moments.apply(W, 1) @ adjoint(known.moments.vectors)


@link("optimal", "||W - C U R||")
def _plain(W: Array, known: Known) -> None:
    return None


@link("activation", "||(W - C U R) diag(||x||)||", needs="norms")
def _by_norms(W: Array, known: Known) -> Array:
    return known.norms**2


@link("covariance", "||(W - C U R) x|| in the mean square", needs="moments")
def _by_moments(W: Array, known: Known) -> Weight:
    return known.moments
