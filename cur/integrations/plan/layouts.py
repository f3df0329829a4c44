"""Which layout serves a purpose, and how its rank is written."""

from __future__ import annotations

from cur import ranks

__all__ = ["PURPOSES", "choose_layout", "fastest_rank"]

PURPOSES = ("inference", "training")
"""To be run, or to have its cores trained."""

# A layout is faster than the dense layer, for 1, 64 and 512 tokens at once, if it saves this many numbers and this
# share of the dense ones besides: two products cost more than one, and putting outputs into their places takes time
# that grows with the layer. From trials of benchmarks/inference.py on one core, 192 x 576 to 14336 x 4096.
_PAYS = {"interpolative": (200_000, 0.17), "folded": (200_000, 0.02)}


def _budget(shape: tuple[int, int], layout: str) -> float:
    """Return the most numbers that a layer of this shape may keep in a layout to be faster than dense."""
    number, share = _PAYS[layout]
    dense = shape[0] * shape[1]
    return dense - number - share * dense


def choose_layout(shape: tuple[int, int], purpose: str = "inference", /, *, rank: int) -> str | None:
    """Choose the layout of a layer: the smallest that is faster than the dense layer.

    Parameters
    ----------
    shape : tuple of int
        Outputs m and inputs n.
    purpose : {"inference", "training"}, default "inference"
        Training keeps the core ``U`` apart, in the layout "cur".
    rank : int
        Of its weight.

    Returns
    -------
    str or None
        ``"cur"``, ``"folded"`` or ``"interpolative"``; None if no layout is faster, as in small layers at high ranks.

    Examples
    --------
    >>> choose_layout((4096, 4096), rank=1024), choose_layout((576, 576), rank=100), choose_layout((576, 576), rank=128)
    ('interpolative', 'folded', None)
    """
    if purpose == "training":
        return "cur"
    for layout in _PAYS:
        if ranks.parameters(*shape, rank, layout=layout) <= _budget(shape, layout):
            return layout
    return None


def fastest_rank(shape: tuple[int, int], purpose: str = "inference", /) -> int:
    """Return the largest rank for which there is a layout, 0 if there is none.

    Examples
    --------
    >>> fastest_rank((4096, 4096)), fastest_rank((576, 576)), fastest_rank((192, 576))
    (2348, 108, 0)
    """
    m, n = shape
    if purpose == "training":
        return ranks.break_even(m, n)
    return max(ranks.rank_for(m, n, _budget(shape, layout), layout=layout) for layout in _PAYS)
