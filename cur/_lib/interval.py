"""The mean of a sample and how far it may be from that of all there could be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

__all__ = ["interval"]


def interval(values: Sequence[float], /, *, share: float = 0.95) -> tuple[float, float]:
    """Return the mean of values, and half the length of its interval by Student's distribution.

    The values count as independent draws of one normal distribution.

    Parameters
    ----------
    values : sequence of float
        The values, at least one.
    share : float, default 0.95
        The share of such intervals that hold the mean of the distribution.

    Returns
    -------
    float, float
        The mean, and half the length, which is infinite for one value.

    Examples
    --------
    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 4)
    (2.0, 2.4841)
    """
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(stdtrit(count - 1, (1 + share) / 2)) * deviation / math.sqrt(count)
