"""Healing: win back what compression lost, by training the small square cores of compressed layers alone.

>>> from cur.healing import HealingConfig, heal  # doctest: +SKIP
>>> report = heal(student, teacher, windows, HealingConfig(steps=100))  # doctest: +SKIP
"""

from cur.healing.blockwise import heal_blockwise
from cur.healing.config import HealingConfig, Objectives
from cur.healing.heal import heal
from cur.healing.pair.sharing import load_student, share_, twin
from cur.healing.report import HealingReport, LayerFit
from cur.healing.saving import save_healed
from cur.healing.training.closed_form import LeastSquares, closed_form_
from cur.healing.training.loop import Status
from cur.healing.training.state import StateError

__all__ = [
    "HealingConfig",
    "HealingReport",
    "LayerFit",
    "LeastSquares",
    "Objectives",
    "StateError",
    "Status",
    "closed_form_",
    "heal",
    "heal_blockwise",
    "load_student",
    "save_healed",
    "share_",
    "twin",
]
