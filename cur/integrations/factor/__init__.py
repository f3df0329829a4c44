"""From one layer and its entry of the plan to its replacement, and a report of what was lost.

Each method of a plan has a function here, found by :func:`make_layers`; :func:`maker` adds one. Knows nothing of
checkpoints, as `store` knows nothing of this. Imports `report`, `plan`, `measure`, `model` and `nn`.
"""

from cur.integrations.factor import gridded, layer, neurons  # noqa: F401  (they register their methods)
from cur.integrations.factor.methods import MAKERS, Made, Task, make_layers, maker

__all__ = ["MAKERS", "Made", "Task", "make_layers", "maker"]
