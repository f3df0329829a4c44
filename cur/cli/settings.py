"""From the options of `cur compress` to a configuration: which go together, and whose defaults hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cur.integrations.budget import METHODS, BudgetConfig
from cur.integrations.compress import CompressConfig

__all__ = ["compress_config"]

PAPER = "paper"


def compress_config(
    *,
    method: str | None,
    budget: Mapping[str, Any],
    gradients: bool,
    fixed: Mapping[str, Any],
    common: Mapping[str, Any],
) -> CompressConfig | BudgetConfig:
    """Return the configuration that the options mean; None stands for an option that was not given.

    Parameters
    ----------
    method : str or None
        A method of a budget, or "paper"; by default what the other options call for.
    budget : mapping
        ``keep`` and ``parameters`` of a budget.
    gradients : bool
        For a budget.
    fixed : mapping
        Options of the paper's setting.
    common : mapping
        Options of both.

    Raises
    ------
    ValueError
        If options do not go together.
    """
    asked = {name: value for name, value in budget.items() if value is not None}
    shared = {name: value for name, value in common.items() if value is not None}
    own = {name: value for name, value in fixed.items() if value is not None}
    method = method or (next(iter(METHODS)) if asked else PAPER)
    if method not in (*METHODS, PAPER):
        raise ValueError(f"--method must be one of {', '.join((*METHODS, PAPER))}, got {method!r}")
    if len(asked) > 1:
        raise ValueError("--keep and --target-parameters exclude each other; give one")
    if method == PAPER:
        if asked:
            raise ValueError("--method paper has no budget; give --rank and --layers instead, or --method best")
        return CompressConfig(**own, **shared)
    if not asked:
        raise ValueError(f"--method {method} needs a budget: give --keep, for instance --keep 0.8")
    if own:
        names = ", ".join(f"--{name}" for name in own)
        raise ValueError(f"{names} belong to --method paper; with a budget ranks and layers are chosen for you")
    return BudgetConfig(**asked, **shared, method=method, gradients=gradients)
