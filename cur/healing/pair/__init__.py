"""Teacher and student on one batch: what learns, what it is compared with, and by which loss.

Imports `cur.integrations`; knows nothing of optimizers.
"""

from cur._lib.moved import former_names

__getattr__ = former_names(__name__, ("cur.healing.pair.pair", "cur.integrations.model.hooks"))
