"""Which layout serves a purpose."""

from __future__ import annotations

__all__ = ["PURPOSES", "choose_layout"]

PURPOSES = ("inference", "training")
"""To be run, or to have its cores trained."""

# Measured by benchmarks/inference.py, 1 to 512 tokens at once, at 0.8 and 0.5 of the numbers: from this many entries on
# rows and coefficients are faster than dense throughout; below, putting the outputs into their places takes the time
# that the saved numbers save, and two plain factors are the fastest.
_LARGE = 1 << 22
# Share of the dense numbers above which two factors no longer are.
_FASTER_BELOW = 0.8


def choose_layout(shape: tuple[int, int], purpose: str = "inference", /, *, rank: int | None = None) -> str:
    """Choose the layout of a layer: the smallest that is faster than the dense layer.

    For inference "interpolative" where it is faster than dense, as in layers of 2048 x 2048 and larger; "folded" in
    smaller ones while it is. Where no layout is faster, which is so in layers of small models at high ranks, the
    smallest: "interpolative".

    Parameters
    ----------
    shape : tuple of int
        Outputs m and inputs n.
    purpose : {"inference", "training"}, default "inference"
        Training keeps the core ``U`` apart, in the layout "cur".
    rank : int, optional
        Default: one at which two factors are faster than the dense layer.

    Returns
    -------
    str
        ``"cur"``, ``"folded"`` or ``"interpolative"``.

    Examples
    --------
    >>> choose_layout((4096, 4096), rank=1024), choose_layout((576, 576), rank=128), choose_layout((576, 576), rank=400)
    ('interpolative', 'folded', 'interpolative')
    """
    if purpose == "training":
        return "cur"
    m, n = shape
    if m * n >= _LARGE:
        return "interpolative"
    return "folded" if rank is None or rank * (m + n) <= _FASTER_BELOW * m * n else "interpolative"
