"""Which layers are replaced, by what and at which rank: configurations, rate-distortion curves, the plan as data.

Nothing here changes a model. Imports `measure`, `model`, `files` and `nn`.
"""

from cur._lib.moved import former_names

__getattr__ = former_names(__name__, ("cur.integrations.plan.plan",))
