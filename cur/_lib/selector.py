"""What a selector is to the drivers: a function with a name and facts, in a registry.

The selectors themselves are in `cur.selection`, which is also where this is imported from: without it the registry is
empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cur._lib.array import Array
from cur._lib.host import through_numpy

__all__ = ["SELECTORS", "Selector", "selector"]

Choose = TypeVar("Choose", bound=Callable[..., Array])

READS = ("basis", "sketch", "entries")


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A way of choosing rows, with what a driver has to know of it.

    Attributes
    ----------
    name : str
        What `select=` calls it.
    choose : callable
        The function, with the signature of all selectors.
    reads : tuple of str
        What it looks at. ``"basis"``: leading singular vectors, which the driver then computes. ``"sketch"``: a product
        of the matrix with random vectors instead; columns are then chosen from the rows chosen. ``"entries"``: the
        entries of the matrix, which an operator does not show. Nothing, if it looks at the number of rows alone.
    nested : bool
        Whether the first k indices are the choice for rank k, so that one choice serves a search for a rank.
    beyond_basis : bool
        Whether it can choose more rows than the basis has columns.
    draws : bool
        Whether chance has a part, so that another seed gives another choice.
    dense : bool
        Whether the entries have to be those of a dense array.
    skips_zeros : bool
        Whether rows of zeros come last, so that a sparse matrix can be handed over without its empty lines.
    """

    name: str
    choose: Callable[..., Array]
    reads: tuple[str, ...]
    nested: bool
    beyond_basis: bool
    draws: bool
    dense: bool
    skips_zeros: bool

    @property
    def summary(self) -> str:
        """The first sentence of its documentation."""
        return " ".join((self.choose.__doc__ or "").strip().partition("\n\n")[0].split())


SELECTORS: dict[str, Selector] = {}
"""All selectors by name."""


def selector(
    name: str,
    /,
    *,
    reads: str | tuple[str, ...],
    nested: bool = False,
    beyond_basis: bool = False,
    draws: bool = False,
    dense: bool = False,
    skips_zeros: bool = False,
) -> Callable[[Choose], Choose]:
    """Register a function as a selector; a decorator.

    Parameters
    ----------
    name : str
        What `select=` of the drivers, of configurations and of commands calls it.
    reads, nested, beyond_basis, draws, dense, skips_zeros
        The facts, as for `Selector`. The defaults are right for any selector, if not the most economical.

    Returns
    -------
    callable
        The decorator. The function is called with arrays of NumPy for those of JAX in the memory of the host.

    Raises
    ------
    ValueError
        If the name is taken, or `reads` names something else.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import cur, selection
    >>> @selection.selector("first", reads=(), nested=True, beyond_basis=True)
    ... def first(basis, count=None, /, *, matrix=None, rng=0):
    ...     "Take the first rows."
    ...     return np.arange(count)
    >>> cur(np.eye(5) + 1, rank=2, select="first").rows.tolist()
    [0, 1]
    >>> del selection.SELECTORS["first"]
    """
    reads = (reads,) if isinstance(reads, str) else reads
    if name in SELECTORS:
        raise ValueError(f"`name` must be one that no selector has yet, got {name!r}; choose another")
    if unknown := [what for what in reads if what not in READS]:
        raise ValueError(f"`reads` must name some of {', '.join(READS)}, got {unknown[0]!r}")

    def register(choose: Choose) -> Choose:
        choose = through_numpy(choose)
        SELECTORS[name] = Selector(
            name=name,
            choose=choose,
            reads=reads,
            nested=nested,
            beyond_basis=beyond_basis,
            draws=draws,
            dense=dense,
            skips_zeros=skips_zeros,
        )
        return choose

    return register
