"""Which layers and which modules of a model to compress."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

__all__ = ["ALL_LINEAR", "choose_layers", "decoder_layers", "is_linear", "linear_modules"]

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is one matrix times a vector: ``nn.Linear``, or ``Conv1D`` as in GPT-2.

    ``Conv1D`` of transformers holds the transpose: its weight has shape (in, out).
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def decoder_layers(model: nn.Module, /) -> list[tuple[str, nn.Module]]:
    """Find the stack of equal blocks that makes up a transformer.

    The stack is the one ``nn.ModuleList`` of modules of one class, all with linear layers inside, that is as
    long as ``config.num_hidden_layers`` says; without such a config, the longest one. Lists inside blocks do
    not count.

    Parameters
    ----------
    model : nn.Module
        A transformer.

    Returns
    -------
    list of (str, nn.Module)
        Name and module of each block, from the input to the output.

    Raises
    ------
    ValueError
        If there is no such stack, or more than one.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        alike = len({type(block) for block in module}) == 1
        if alike and all(any(is_linear(part) for part in block.modules()) for block in module):
            found.append((name, module))
    count = _num_hidden_layers(model)
    if count is None and found:
        count = max(len(blocks) for _, blocks in found)
    stacks = [(name, blocks) for name, blocks in found if len(blocks) == count]
    if len(stacks) != 1:
        seen = ", ".join(f"{name!r} ({len(blocks)})" for name, blocks in found) or "none"
        what = "no stack" if not stacks else "more than one stack"
        raise ValueError(
            f"{type(model).__name__} has {what} of {count or 'equal'} blocks (lists found: {seen}); "
            "name the modules to compress instead of choosing among layers"
        )
    name, blocks = stacks[0]
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def _num_hidden_layers(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def linear_modules(
    model: nn.Module,
    targets: str | Sequence[str],
    /,
    *,
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[str]:
    r"""Name the linear modules that a target selects.

    Parameters
    ----------
    model : nn.Module
        The model.
    targets : str or sequence of str
        A sequence holds full names (``"model.layers.3.mlp.gate_proj"``) or dotted ends of names
        (``"gate_proj"``, ``"mlp.gate_proj"``), each of which must select something. A string is a regular
        expression that must match the full name; ``"all-linear"`` stands for every linear module. Neither
        kind of string selects the output head: list it by name.
    exclude : str or sequence of str, default ()
        Modules to leave alone, by the same rules; it need not match anything.
    layers : sequence of int, optional
        Only modules inside these blocks of :func:`decoder_layers`.

    Returns
    -------
    list of str
        Full names in the order of the model, without repetition.

    Raises
    ------
    ValueError
        If a target selects nothing, with the reason: no such name, not a linear module, experts stored as one
        three-dimensional parameter, outside `layers`, everything excluded.
    """
    listed = not isinstance(targets, str)
    patterns: list[str] = [targets] if isinstance(targets, str) else list(targets)
    if not patterns or "" in patterns:
        raise ValueError(f"`targets` must name at least one module and no empty name, got {targets!r}")
    modules = {name: module for name, module in model.named_modules() if name}
    linear = {name for name, module in modules.items() if is_linear(module)}
    excluded = {name for name in modules if _matches(name, exclude, "exclude")}
    _refuse_experts(modules, targets, excluded)

    chosen: set[str] = set()
    for pattern in patterns:
        rule: str | list[str] = [pattern] if listed else pattern
        named = [name for name in modules if _matches(name, rule, "targets")]
        hits = [name for name in named if name in linear]
        if not hits:
            raise ValueError(_nothing(pattern, named, modules, linear))
        chosen.update(hits)
    if not listed:
        head = _output_head(model, modules)
        chosen -= head
        if not chosen:
            raise ValueError(
                f"`targets` {targets!r} matches only the output head {', '.join(sorted(head))}, which "
                "patterns leave alone; list it by name to compress it"
            )
    if not chosen - excluded:
        raise ValueError(f"`exclude` {exclude!r} leaves none of the {len(chosen)} modules that `targets` selects")
    chosen -= excluded
    if layers is not None:
        chosen &= _inside(model, layers, modules)
        if not chosen:
            raise ValueError(f"`targets` {targets!r} selects no linear module inside `layers` {sorted(layers)}")
    return [name for name in modules if name in chosen]


def _matches(name: str, rule: str | Sequence[str], parameter: str) -> bool:
    if not isinstance(rule, str):
        return any(name == pattern or name.endswith("." + pattern) for pattern in rule)
    if rule == ALL_LINEAR:
        return True
    try:
        return re.fullmatch(rule, name) is not None
    except re.error as error:
        raise ValueError(f"`{parameter}` {rule!r} is not a regular expression: {error}") from None


def _experts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the three-dimensional parameters that hold one matrix per expert, by full name."""
    return {
        f"{name}.{parameter}": value
        for name, module in modules.items()
        # Convolutions and learned positions have three dimensions too.
        if not isinstance(module, nn.Conv1d)
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and min(value.shape) > 1
    }


def _refuse_experts(modules: Mapping[str, nn.Module], targets: str | Sequence[str], excluded: Collection[str]) -> None:
    for full, value in _experts(modules).items():
        name = full.rpartition(".")[0]
        if name in excluded:
            continue
        if _matches(name, targets, "targets") or _matches(full, targets, "targets"):
            raise ValueError(
                f"{full} holds {value.shape[0]} experts as one parameter of shape {tuple(value.shape)}; "
                "mixtures of experts stored this way are not compressed: put "
                f"{name.rpartition('.')[2]!r} into `exclude`, or name other targets"
            )


def _nothing(pattern: str, named: Sequence[str], modules: Mapping[str, nn.Module], linear: Collection[str]) -> str:
    if named:
        kinds = sorted({type(modules[name]).__name__ for name in named})
        return (
            f"`targets` {pattern!r} names {len(named)} module(s), {named[0]!r} first, none of them linear: "
            f"they are {', '.join(kinds)}"
        )
    ends = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
    if not ends:
        return f"`targets` {pattern!r} matches nothing: the model has no linear module"
    close = get_close_matches(pattern.rpartition(".")[2], ends, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    experts = next(iter(_experts(modules)), None)
    note = "" if experts is None else f"; experts stored as one parameter, as in {experts}, are not compressed"
    return f"`targets` {pattern!r} matches no module; {hint}linear modules here end in {', '.join(ends)}{note}"


def _output_head(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {name for name, module in modules.items() if head is not None and module is head}


def _inside(model: nn.Module, layers: Sequence[int], modules: Iterable[str]) -> set[str]:
    blocks = decoder_layers(model)
    wrong = [index for index in layers if not 0 <= index < len(blocks)]
    if wrong:
        raise ValueError(f"`layers` must be between 0 and {len(blocks) - 1} for this model, got {wrong}")
    prefixes = tuple(blocks[index][0] + "." for index in layers)
    return {name for name in modules if name.startswith(prefixes)}


def choose_layers(distances: Mapping[int, float], count: int, /) -> list[int]:
    """Choose the blocks that change their input least.

    Parameters
    ----------
    distances : mapping of int to float
        Angular distance of each block, keyed by its index from 0 on, as :attr:`Statistics.angular` has it.
    count : int
        How many to choose. The first and the last block are never chosen.

    Returns
    -------
    list of int
        Indices of the `count` blocks with the smallest distances, ascending; of equal distances the lower
        index.

    Raises
    ------
    ValueError
        If a distance is missing or not finite, or `count` is not between 1 and the number of blocks less two.

    Examples
    --------
    >>> from cur.integrations import choose_layers
    >>> choose_layers({0: 0.01, 1: 0.3, 2: 0.1, 3: 0.2, 4: 0.02}, 2)
    [2, 3]
    """
    indices = sorted(distances)
    if indices != list(range(len(indices))):
        raise ValueError(f"`distances` must have one entry per block, 0 to {len(indices) - 1}, got keys {indices}")
    bad = [index for index in indices if not math.isfinite(distances[index])]
    if bad:
        raise ValueError(f"`distances` must be finite, they are not for layer(s) {bad}")
    if not 1 <= count <= len(indices) - 2:
        raise ValueError(
            f"`count` must be between 1 and {max(len(indices) - 2, 0)} for a model of {len(indices)} layers "
            f"(the first and the last are never chosen), got {count}"
        )
    return sorted(sorted(indices[1:-1], key=lambda index: (distances[index], index))[:count])
