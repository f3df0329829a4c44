"""Which layout serves a purpose."""

from __future__ import annotations

__all__ = ["PURPOSES", "choose_layout"]

PURPOSES = ("inference", "training")
"""To be run, or to have its cores trained."""


def choose_layout(shape: tuple[int, int], purpose: str = "inference", /) -> str:
    """Choose the layout of a layer: the smallest and fastest that serves the purpose.

    Parameters
    ----------
    shape : tuple of int
        Outputs m and inputs n.
    purpose : {"inference", "training"}, default "inference"
        Training keeps the core ``U`` apart, in the layout "cur".

    Returns
    -------
    str
        ``"cur"`` or ``"interpolative"``.
    """
    return "cur" if purpose == "training" else "interpolative"
