"""Which layout serves a purpose, and how its rank is written."""

from __future__ import annotations

from collections.abc import Collection

from cur.integrations.nn import CURLinear, FactoredLinear, factored

__all__ = ["PURPOSES", "choose_layout", "fastest_rank"]

PURPOSES = ("inference", "training")
"""To be run, or to have its cores trained."""

_TRAINED = CURLinear
"""The type whose core is apart."""


def _within(shape: tuple[int, int], kind: type[FactoredLinear]) -> float:
    """Return the most parameters that a layer of this shape may keep in a layout to be faster than dense.

    Two products cost more than one, and putting outputs into their places takes time that grows with the layer: for 1,
    64 and 512 tokens at once a layer is faster if it saves a number of parameters and a share of the dense ones.
    From trials of benchmarks/inference.py on one core, 192 x 576 to 14336 x 4096.
    """
    if kind.faster is None:
        return 0.0
    number, share = kind.faster
    dense = shape[0] * shape[1]
    return dense - number - share * dense


def choose_layout(
    shape: tuple[int, int], purpose: str = "inference", /, *, rank: int, among: Collection[str] | None = None
) -> str | None:
    """Choose the layout of a layer: the smallest that is faster than the dense layer.

    Parameters
    ----------
    shape : tuple of int
        The numbers of outputs m and inputs n of the layer.
    purpose : {"inference", "training"}, default "inference"
        Training keeps the core ``U`` apart.
    rank : int
        The rank of the weight.
    among : collection of str, optional
        The layouts that it can have. Default: all of factored weights.

    Returns
    -------
    str or None
        A layout of factored weights; None if no layout is faster, as in small layers at high ranks.

    Examples
    --------
    >>> choose_layout((4096, 4096), rank=1024), choose_layout((576, 576), rank=100), choose_layout((576, 576), rank=128)
    ('interpolative', 'folded', None)
    """
    if purpose == "training":
        return _TRAINED.layout if among is None or _TRAINED.layout in among else None
    kinds = {layout: kind for layout, kind in factored().items() if among is None or layout in among}
    counts = {layout: kind.parameter_count(*shape, rank) for layout, kind in kinds.items()}
    faster = [layout for layout, kind in kinds.items() if counts[layout] <= _within(shape, kind)]
    return min(faster, key=lambda layout: counts[layout], default=None)


def fastest_rank(shape: tuple[int, int], purpose: str = "inference", /) -> int:
    """Return the largest rank for which there is a layout, 0 if there is none.

    Parameters
    ----------
    shape : (int, int)
        The numbers of outputs m and inputs n of the layer.
    purpose : str, default "inference"
        The purpose of the layer, ``"inference"`` or ``"training"``.

    Examples
    --------
    >>> fastest_rank((4096, 4096)), fastest_rank((576, 576)), fastest_rank((192, 576))
    (2348, 108, 0)
    """
    m, n = shape
    if purpose == "training":
        return _TRAINED.rank_within(m, n, m * n - 1)
    return max(kind.rank_within(m, n, _within(shape, kind)) for kind in factored().values())
