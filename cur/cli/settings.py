"""From what a command was given to a configuration: which options go together, and whose defaults hold."""

from __future__ import annotations

from typing import Any

from cur.cli.given import Given
from cur.integrations.plan.config import BUDGETS, METHODS, BudgetConfig, CompressConfig
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.option import options_of

__all__ = ["compress_config", "refuse_with_plan"]

PAPER = "paper"


def compress_config(given: Given) -> CompressConfig | BudgetConfig:
    """Return the configuration that the options mean.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.

    Raises
    ------
    ValueError
        If options do not go together.
    """
    budget, fixed = given.only(BudgetSettings), given.only(PaperSettings)
    shared = {name: value for name, value in budget.items() if name in fixed}
    own = {name: value for name, value in fixed.items() if name not in shared}
    asked = {name: budget[name] for name in BUDGETS if name in budget}
    method = budget.pop("method", None) or (next(iter(METHODS)) if asked else PAPER)
    if method not in (*METHODS, PAPER):
        raise ValueError(f"--method must be one of {', '.join((*METHODS, PAPER))}, got {method!r}")
    if len(asked) > 1:
        flags = [each.flag for each in options_of(BudgetSettings) if each.name in BUDGETS]
        raise ValueError(f"{', '.join(flags[:-1])} and {flags[-1]} exclude each other; give one")
    if method == PAPER:
        if asked:
            raise ValueError("--method paper has no budget; give --rank and --layers instead, or --method best")
        sharing = budget.keys() - shared.keys()
        if changed := [
            _typed(each.flags, budget[each.name])
            for each in options_of(BudgetSettings)
            if each.name in sharing and budget[each.name] != each.default
        ]:
            belong = "belongs" if len(changed) == 1 else "belong"
            raise ValueError(f"{', '.join(changed)} {belong} to a budget: give --keep, for instance --keep 0.8")
        if "purpose" in own:
            own.setdefault("layout", "auto")
        return CompressConfig(**own, **shared)
    if not asked:
        raise ValueError(f"--method {method} needs a budget: give --keep, for instance --keep 0.8")
    if own:
        names = ", ".join(each.flag for each in options_of(PaperSettings) if each.name in own)
        belong = "belongs" if len(own) == 1 else "belong"
        raise ValueError(f"{names} {belong} to --method paper; with a budget ranks and layers are chosen for you")
    return BudgetConfig(**budget, method=method)


def _typed(flags: tuple[str, ...], value: Any) -> str:
    """Return how an option is typed."""
    return flags[not value] if isinstance(value, bool) else f"{flags[0]} {value}"


def refuse_with_plan(config: CompressConfig | BudgetConfig) -> None:
    """Raise a ValueError if options were given that a plan has decided.

    Parameters
    ----------
    config : CompressConfig or BudgetConfig
        The configuration that the options mean.

    Raises
    ------
    ValueError
        If it is not the default, which means that options were given.
    """
    if config != CompressConfig():
        raise ValueError(
            "--plan has decided which layers are compressed and how; leave out the options that decide it, or edit the "
            "plan"
        )
