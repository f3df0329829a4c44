"""CUR matrix factorizations by DEIM, with bounds that hold.

>>> import numpy as np
>>> from cur import deim_cur
>>> A = 1.0 / (np.arange(1, 101)[:, None] + np.arange(100))
>>> C, U, R = deim_cur(A, rank=5)
>>> C.shape, U.shape, R.shape
((100, 5), (5, 5), (5, 100))
"""

from cur import bounds, linking, ranks, rounding, scores, selection, subspace, weights
from cur._lib import moved as _moved
from cur._lib.errors import CURError, NumericalError, RankWarning
from cur.bounds import Certificate
from cur.decompose import cur, deim_cur
from cur.factors import CUR, Folded, Interpolative
from cur.interpolation import interpolative, select
from cur.selection import deim
from cur.streaming import stream_cur
from cur.weighted import own_inputs, own_rows, truncation

_moved.install()
__getattr__ = _moved.former_modules(__name__)

__version__ = "0.1.0"

__all__ = [
    "CUR",
    "CURError",
    "Certificate",
    "Folded",
    "Interpolative",
    "NumericalError",
    "RankWarning",
    "bounds",
    "cur",
    "deim",
    "deim_cur",
    "interpolative",
    "linking",
    "own_inputs",
    "own_rows",
    "ranks",
    "rounding",
    "scores",
    "select",
    "selection",
    "stream_cur",
    "subspace",
    "truncation",
    "weights",
]
