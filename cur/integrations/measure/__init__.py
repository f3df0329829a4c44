"""Text, and what a model does on it: input and output moments, angles, the inputs that layers get from others.

The results are :class:`~cur.integrations.measure.statistics.Statistics`, which a plan is made from. Imports `model`,
`files` and `nn`.
"""
