"""How cores learn: least squares, a natural step, steps of an optimizer; states and logs.

Imports the pair of teacher and student.
"""
