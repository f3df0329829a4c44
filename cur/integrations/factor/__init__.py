"""From one layer and its entry of the plan to its replacement, and a report of what was lost.

Knows nothing of checkpoints, as `store` knows nothing of this. Imports `report`, `plan`, `measure`, `model` and `nn`.
"""
