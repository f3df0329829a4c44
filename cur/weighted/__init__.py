"""Problems in which rows and columns count by matrices of weights, such as second moments of inputs.

:func:`own_rows` and :func:`own_inputs` choose rows and columns, :mod:`~cur.weighted.truncation` is the best that any
factors can do. Imports the core; knows nothing of models.
"""

from cur.weighted import truncation
from cur.weighted.inputs import own_inputs
from cur.weighted.rows import own_rows
from cur.weighted.truncation import weighted_svd

__all__ = ["own_inputs", "own_rows", "truncation", "weighted_svd"]
