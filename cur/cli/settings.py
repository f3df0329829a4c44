"""From the options of `cur compress` to a configuration: which go together, and whose defaults hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cur.integrations.plan.config import METHODS, BudgetConfig, CompressConfig

__all__ = ["compress_config", "parse_layers", "parse_size", "refuse_with_plan"]

PAPER = "paper"


def compress_config(
    *,
    method: str | None,
    budget: Mapping[str, Any],
    sharing: Mapping[str, Any],
    fixed: Mapping[str, Any],
    common: Mapping[str, Any],
) -> CompressConfig | BudgetConfig:
    """Return the configuration that the options mean; None stands for an option that was not given.

    Parameters
    ----------
    method : str or None
        A method of a budget, or "paper"; by default what the other options call for.
    budget : mapping
        ``keep``, ``parameters`` and ``size`` of a budget; the size as text, for instance "200MB".
    sharing : mapping
        How a budget is shared: ``allocation``, ``neurons``, ``gradients``, ``gradient_checkpointing``,
        ``own_text`` and ``correction``.
    fixed : mapping
        Options of the paper's setting; ``layers`` as text.
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
    if "size" in asked:
        asked["size"] = parse_size(asked["size"])
    if "layers" in own:
        own["layers"] = parse_layers(own["layers"])
    if "purpose" in own:
        own.setdefault("layout", "auto")
    method = method or (next(iter(METHODS)) if asked else PAPER)
    if method not in (*METHODS, PAPER):
        raise ValueError(f"--method must be one of {', '.join((*METHODS, PAPER))}, got {method!r}")
    if len(asked) > 1:
        raise ValueError("--keep, --target-parameters and --target-size exclude each other; give one")
    if method == PAPER:
        if asked:
            raise ValueError("--method paper has no budget; give --rank and --layers instead, or --method best")
        if changed := [_option(name, value) for name, value in sharing.items() if value != getattr(BudgetConfig, name)]:
            belong = "belongs" if len(changed) == 1 else "belong"
            raise ValueError(f"{', '.join(changed)} {belong} to a budget: give --keep, for instance --keep 0.8")
        return CompressConfig(**own, **shared)
    if not asked:
        raise ValueError(f"--method {method} needs a budget: give --keep, for instance --keep 0.8")
    if sharing["allocation"] == "d-rank" and (sharing["gradients"] or method != "best"):
        raise ValueError(f"--allocation d-rank is for --method best with --no-gradients, got --method {method}")
    if own:
        names = ", ".join(_option(name) for name in own)
        raise ValueError(f"{names} belong to --method paper; with a budget ranks and layers are chosen for you")
    return BudgetConfig(**asked, **shared, **sharing, method=method)


def _option(name: str, value: Any = True) -> str:
    """Return how an option is typed."""
    dashed = "for" if name == "purpose" else name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {value}"


def refuse_with_plan(config: CompressConfig | BudgetConfig) -> None:
    """Raise a ValueError if options were given that a plan has decided."""
    default = CompressConfig()
    if config != default:
        raise ValueError(
            "--plan has decided which layers are compressed and how; leave out the options that decide it, or edit the "
            "plan"
        )


def parse_size(text: str) -> int:
    """Return a size such as "200MB", "1.5 GiB" or "123456" in bytes.

    Examples
    --------
    >>> parse_size("200MB"), parse_size("1.5 KiB"), parse_size("12")
    (200000000, 1536, 12)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"--target-size must be a number of bytes, or one with a unit such as 200MB, got {text!r}")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_layers(text: str) -> int | str | tuple[int, ...]:
    """Return a number of blocks ("10"), "all", or indices ("3,5-8"; of a single block "3,").

    Examples
    --------
    >>> parse_layers("10"), parse_layers("all"), parse_layers("3,5-8"), parse_layers("3,")
    (10, 'all', (3, 5, 6, 7, 8), (3,))
    """
    if text == "all":
        return text
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None and part.strip():
            raise ValueError(f"--layers must be a number of blocks, indices such as 3,5-8, or all, got {text!r}")
        if match is not None:
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise ValueError(f"--layers must be a number of blocks, indices such as 3,5-8, or all, got {text!r}")
    return tuple(sorted(set(found)))
