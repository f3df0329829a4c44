"""Which layers and which modules of a model to compress."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cur._lib.moved import renamed
from cur.integrations.model.experts import three_axes
from cur.integrations.model.pointwise import LinearConvolution, is_pointwise
from cur.integrations.model.taken_apart import TakenApart
from cur.integrations.model.unrolling import unrolled
from cur.integrations.model.usage import is_transformer, told_blocks
from cur.integrations.nn import CompressedLinear, has_own_forward, is_linear, is_table, made_of

__all__ = [
    "ALL_EMBEDDINGS",
    "ALL_LINEAR",
    "block_stacks",
    "decoder_layers",
    "found_stacks",
    "holds_linear",
    "is_excluded",
    "left_dense",
    "linear_modules",
    "networks",
    "targeted_singly",
]

ALL_LINEAR = "all-linear"
ALL_EMBEDDINGS = "all-embeddings"

_TOLD = 3

_Stack: TypeAlias = "list[tuple[str, nn.Module]]"


def block_stacks(model: nn.Module, /) -> list[list[tuple[str, nn.Module]]]:
    """Find the stacks of blocks that make up a transformer; see :func:`found_stacks`, where there may be none.

    Parameters
    ----------
    model : nn.Module
        The model to look through: a transformer.

    Returns
    -------
    list of list of (str, nn.Module)
        Name and module of each block, from the input to the output; an encoder before its decoder.

    Raises
    ------
    ValueError
        If there is no stack.
    """
    if stacks := found_stacks(model):
        return stacks
    raise ValueError(
        f"{type(model).__name__} has no stack of blocks (a list of modules that hold linear layers); name the modules "
        "to compress instead of choosing among layers"
    )


def found_stacks(model: nn.Module, /) -> list[list[tuple[str, nn.Module]]]:
    """Look for the stacks of blocks that make up a transformer: lists of modules that each hold linear layers.

    A stack is an ``nn.ModuleList``, or a run of modules of one class in an ``nn.Sequential``; its blocks may differ, as
    where attention and recurrence take turns, but none is a linear layer itself. A list of lists of one width is one
    stack, and lists inside blocks do not count, but for those in stages: parts of several widths, as where images get
    smaller and channels more. The blocks of each stage are a stack, see :func:`networks`. Towers for images or sound
    are no part of a model that reads text. An encoder-decoder is made up of all other stacks that it has, any other
    model of those that are as long as ``config.num_hidden_layers`` says; without such a config, or such a stack, of the
    longest one and of others with blocks of the same classes.

    Parameters
    ----------
    model : nn.Module
        The model to look through: a transformer.

    Returns
    -------
    list of list of (str, nn.Module)
        Name and module of each block, from the input to the output; an encoder before its decoder. Empty if there is
        no such stack.
    """
    if (told := told_blocks(model)) is not None:
        return told
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(outer + ".") for outer in found) and (blocks := _repeated(name, module)):
            found[name] = blocks
    stacks = found = _reached_by_text(model, found)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        stacks = _of_length(found, _num_hidden_layers(model))
        if len(stacks) > 1:
            stacks = _of_text(model, stacks)
    return [stack for blocks in stacks.values() for stack in _stages(blocks)]


def networks(stacks: Sequence[_Stack], /) -> list[list[_Stack]]:
    """Group stacks into those that follow each other as the stages of one network: what lies in one list.

    Parameters
    ----------
    stacks : sequence of list of (str, nn.Module)
        Name and module of the blocks of each stack, as from :func:`found_stacks`.

    Returns
    -------
    list of list of list of (str, nn.Module)
        The stacks of each network, in order: of an encoder and its decoder two networks of one stack each.
    """
    found: dict[str, list[_Stack]] = {}
    for stack in stacks:
        place = stack[0][0].rpartition(".")[0]
        found.setdefault(re.split(r"(?:^|\.)\d+(?:\.|$)", place)[0], []).append(stack)
    return list(found.values())


def _repeated(name: str, module: nn.Module, *, least: int = 2) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the blocks that a container repeats; none if it is no stack.

    A sequence has to repeat one class, at `least` so often.
    """
    parts = [(f"{name}.{key}" if name else key, part) for key, part in module._modules.items() if part is not None]
    inner = [_repeated(place, part) if isinstance(part, nn.ModuleList) else [] for place, part in parts]
    joined = [block for blocks in inner for block in blocks]
    if isinstance(module, nn.ModuleList) and inner and all(inner) and len({_width(part) for _, part in joined}) == 1:
        return joined
    if isinstance(module, nn.Sequential):
        runs = [list(run) for _, run in groupby(parts, key=lambda part: type(part[1]))]
        parts = max(runs, key=len, default=[])
        return parts if len(parts) >= least and _are_blocks(parts) else []
    return parts if isinstance(module, nn.ModuleList) and _are_blocks(parts) else []


def _are_blocks(parts: _Stack) -> bool:
    """Say whether each part is a block, or of the class of one: some may have convolutions alone."""
    blocks = [_is_block(part) for _, part in parts]
    return all(blocks) or (any(blocks) and len(_classes(parts)) == 1)


def _stages(blocks: _Stack) -> list[_Stack]:
    """Return the stacks within blocks that are the stages of a network; else the one stack of these blocks."""
    inner = [_within(name, block) for name, block in blocks]
    if not all(inner):
        return [blocks]
    lists = all(isinstance(block, nn.ModuleList) for _, block in blocks)  # which nobody can call
    widths = [_width(stacks[-1][-1][1]) for stacks in inner]
    apart = all(widths) and len(set(widths)) > 1
    return [stack for stacks in inner for stack in stacks] if lists or apart else [blocks]


def _within(name: str, block: nn.Module) -> list[_Stack]:
    """Return the stacks within a block that may be a stage, or be a list itself, the outermost ones."""
    found: dict[str, _Stack] = {}
    for part, module in block.named_modules(prefix=name):
        if not any(part.startswith(outer + ".") for outer in found) and (run := _repeated(part, module, least=1)):
            found[part] = run
    return list(found.values())


def _width(block: nn.Module) -> int:
    """Return the size of the largest norm of a block, which is the width of the hidden state; 0 if it has none."""
    own = [list(module.parameters(recurse=False)) for module in block.modules()]
    return max((int(part.shape[0]) for parts in own if all(p.ndim == 1 for p in parts) for part in parts), default=0)


def _is_block(module: nn.Module) -> bool:
    return not _is_matrix(module) and holds_linear(module)


def holds_linear(module: nn.Module, /) -> bool:
    """Say whether a module is or holds a linear layer, compressed or not.

    Parameters
    ----------
    module : nn.Module
        The module to look through.

    Returns
    -------
    bool
        Whether there is one.
    """
    return any(map(_is_matrix, module.modules()))


def _of_length(found: Mapping[str, _Stack], count: int | None) -> dict[str, _Stack]:
    """Return the stacks of a length; if there is none, the longest, and those with blocks of the same classes."""
    if stacks := {name: blocks for name, blocks in found.items() if len(blocks) == count}:
        return stacks
    longest = max(found.values(), key=len, default=[])
    return {name: blocks for name, blocks in found.items() if _classes(blocks) == _classes(longest)}


def _classes(blocks: _Stack) -> set[type]:
    return {type(block) for _, block in blocks}


def _reached_by_text(model: nn.Module, stacks: dict[str, _Stack]) -> dict[str, _Stack]:
    """Leave out stacks of models inside a model that reads text where these read none: towers for images or sound."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return stacks
    others = tuple(
        f"{name}."
        for name, part in model.named_modules()
        if name and isinstance(part, PreTrainedModel) and "text" not in part.input_modalities
    )
    return {name: blocks for name, blocks in stacks.items() if not f"{name}.".startswith(others)} or stacks


def _of_text(model: nn.Module, stacks: dict[str, _Stack]) -> dict[str, _Stack]:
    """Leave out stacks of towers for images or sound that are as long as that for text, where a part is for text."""
    config: Any = getattr(model, "config", None)
    several = hasattr(config, "get_text_config") and config.get_text_config() is not config
    get = getattr(model, "get_decoder", None)
    inner = get() if several and callable(get) else None
    parts = {id(part) for part in inner.modules()} if isinstance(inner, nn.Module) else set()
    return {name: blocks for name, blocks in stacks.items() if id(blocks[0][1]) in parts} or stacks


def _is_matrix(module: nn.Module) -> bool:
    # A subclass that does more than multiply is one as well: blocks of quantized models have nothing else.
    kinds = (nn.Linear, Conv1D, CompressedLinear, LinearConvolution)
    return isinstance(module, kinds) or is_pointwise(module)


def decoder_layers(model: nn.Module, /) -> list[tuple[str, nn.Module]]:
    """Name the blocks of a transformer: those of :func:`block_stacks`, one stack after the other.

    Parameters
    ----------
    model : nn.Module
        The model to look through: a transformer.

    Returns
    -------
    list of (str, nn.Module)
        Name and module of each block, from the input to the output.

    Raises
    ------
    ValueError
        If no stack of blocks is found, as in :func:`block_stacks`.
    """
    return [block for stack in block_stacks(model) for block in stack]


def _num_hidden_layers(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


@renamed(layers="blocks")
def linear_modules(
    model: nn.Module,
    targets: str | Sequence[str],
    /,
    *,
    exclude: str | Sequence[str] = (),
    blocks: Sequence[int] | None = None,
) -> list[str]:
    r"""Name the linear modules, and tables of embeddings, that a target selects.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    targets : str or sequence of str
        A sequence holds full names (``"model.layers.3.mlp.gate_proj"``) or dotted ends of names
        (``"gate_proj"``, ``"mlp.gate_proj"``), each of which must select something. The matrices of experts have
        names like ``"model.layers.3.mlp.experts.gate_up_proj.7"``; the end may leave out the number, for all of
        them. A string is a regular
        expression that must match the full name of a linear module; ``"all-linear"`` means every linear module, and
        ``"all-embeddings"`` every table of embeddings (``nn.Embedding``, and sums and means of ``nn.EmbeddingBag``).
        None of these selects the output head: list it by name. A sequence may hold the last two beside names.
    exclude : str or sequence of str, default ()
        Modules to leave alone, by the same rules; it need not match anything.
    blocks : sequence of int, optional
        The indices of the blocks of :func:`decoder_layers` in which modules are named, beside tables of embeddings that
        are asked for, which lie outside of blocks. By default all modules are.

    Returns
    -------
    list of str
        Full names in the order of the model, without repetition.

    Raises
    ------
    ValueError
        If a target selects nothing, with the reason: no such name, not a linear module, outside `blocks`,
        everything excluded, or only what :func:`left_dense` names.
    """
    patterns: list[str] = [targets] if isinstance(targets, str) else list(targets)
    if not patterns or "" in patterns:
        raise ValueError(f"`targets` must name at least one module and no empty name, got {targets!r}")
    with unrolled(model):
        modules = {name: module for name, module in model.named_modules() if name}
    linear = {name for name, module in modules.items() if is_linear(module)}
    tables = {name for name, module in modules.items() if is_table(module)}
    family = _expert_families(modules)
    excluded = {name for name in modules if _matches(name, exclude, "exclude", family)}
    whole = tuple(f"{name}." for name in excluded if isinstance(modules[name], TakenApart))
    excluded |= {name for name in modules if name.startswith(whole)}

    chosen: set[str] = set()
    for pattern, rule in zip(patterns, _rules(targets), strict=True):
        named = [name for name in modules if _matches(name, rule, "targets", family)]
        possible = linear | tables if not isinstance(rule, str) else tables if rule == ALL_EMBEDDINGS else linear
        hits = {name for name in named if name in possible}
        if not hits:
            raise ValueError(_nothing(model, pattern, named, modules, linear, tables))
        if isinstance(rule, str):
            head = _output_head(model, modules)
            hits -= head
            if not hits:
                raise ValueError(
                    f"`targets` {targets!r} matches only the output head {', '.join(sorted(head))}, which "
                    "patterns leave alone; list it by name to compress it"
                )
        chosen |= hits
    if not chosen - excluded:
        raise ValueError(f"`exclude` {exclude!r} leaves none of the {len(chosen)} modules that `targets` selects")
    chosen -= excluded
    if blocks is not None:
        chosen &= _inside(model, blocks, modules) | tables
        if not chosen:
            raise ValueError(f"`targets` {targets!r} selects no linear module inside the blocks {sorted(blocks)}")
    return [name for name in modules if name in chosen]


def targeted_singly(model: nn.Module, targets: str | Sequence[str], /) -> set[str]:
    """Name the linear modules that a target names by themselves: by their full name, or as all that it selects.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    targets : str or sequence of str
        The targets, by the rules of :func:`linear_modules`.

    Returns
    -------
    set of str
        The full names of these modules.
    """
    with unrolled(model):
        modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if is_linear(module) or is_table(module)]
    family = _expert_families(modules)
    found: set[str] = set()
    for rule in _rules(targets):
        if rule == ALL_EMBEDDINGS:  # which nobody named, however few there are
            continue
        hits = [name for name in linear if _matches(name, rule, "targets", family)]
        named = {rule} if isinstance(rule, str) else rule
        found.update(hits if len(hits) == 1 else (name for name in hits if name in named))
    return found


def _rules(targets: str | Sequence[str]) -> list[str | list[str]]:
    """Return each target as :func:`_matches` takes it: patterns as they are, names in a list of one."""
    if isinstance(targets, str):
        return [targets]
    return [target if target in (ALL_LINEAR, ALL_EMBEDDINGS) else [target] for target in targets]


def _matches(name: str, rule: str | Sequence[str], parameter: str, family: Mapping[str, str] | None = None) -> bool:
    if not isinstance(rule, str):
        names = (name, (family or {}).get(name, name))
        return any(known == pattern or known.endswith("." + pattern) for pattern in rule for known in names)
    if rule in (ALL_LINEAR, ALL_EMBEDDINGS):
        return True
    try:
        return re.fullmatch(rule, name) is not None
    except re.error as error:
        raise ValueError(f"`{parameter}` {rule!r} is not a regular expression: {error}") from None


def _expert_families(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return by the name of each expert's matrix the name that it shares with those of the other experts.

    That of a convolution of one point is the convolution's own.
    """
    apart = tuple(f"{name}." for name, module in modules.items() if isinstance(module, TakenApart))
    return {
        name: name.rpartition(".")[0]
        for name, module in modules.items()
        if name.startswith(apart) and is_linear(module)
    }


def is_excluded(name: str, exclude: str | Sequence[str]) -> bool:
    """Say whether a module is excluded by name, as :func:`linear_modules` has it.

    Parameters
    ----------
    name : str
        The name of the module.
    exclude : str or sequence of str
        Modules to leave alone.

    Returns
    -------
    bool
        Whether it is among them.
    """
    return _matches(name, exclude, "exclude")


def left_dense(
    model: nn.Module, targets: str | Sequence[str], /, *, exclude: str | Sequence[str] = ()
) -> dict[str, str]:
    """Say of what a target selects, and no linear layer is, that it stays dense.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    targets, exclude
        What is selected, by the rules of :func:`linear_modules`.

    Returns
    -------
    dict of str to str
        A sentence by the full name of each subclass of ``nn.Linear`` that does more than multiply, and of each
        parameter with three axes that is not taken apart; where all linear layers of a module that is no transformer
        are targets, also of each module that has matrices of another kind, as convolutions have.
    """
    with unrolled(model):
        modules = {name: module for name, module in model.named_modules() if name}
    rules = _rules(targets)
    found = _odd(modules)
    if ALL_LINEAR in rules and not is_transformer(model):
        found |= _of_other_kinds(modules)
    return {
        full: sentence
        for full, (name, sentence) in found.items()
        if any(_matches(each, rule, "targets") for rule in rules for each in (name, full))
        and not any(_matches(each, exclude, "exclude") for each in (name, full))
    }


def _of_other_kinds(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return the modules that have matrices of their own, and are neither linear layers nor tables."""
    return {
        name: (name, f"{name} is a {type(module).__name__}, which is no linear layer")
        for name, module in modules.items()
        if any(one.ndim > 1 for one in module.parameters(recurse=False))
        and not isinstance(module, (nn.Linear, CompressedLinear))
        and not is_linear(module)
        and not is_table(module)
    }


def _odd(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return what looks like a layer and is none, by full name: the name of its module, and what is wrong."""
    found: dict[str, tuple[str, str]] = {}
    for name, module in modules.items():
        kind = type(module).__name__
        if has_own_forward(module) and isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            found[name] = name, f"{name} has a `forward` of its own beside that of {kind}, which would be lost"
        elif isinstance(module, nn.Linear) and not isinstance(module, CompressedLinear) and not is_linear(module):
            parts = made_of(module)
            why = f"the weight of {name} is computed from {', '.join(parts)}"
            found[name] = name, why if parts else f"{name} is a {kind}, which does more than multiply with its weight"
        for parameter, value in three_axes(module).items():
            full = f"{name}.{parameter}"
            found[full] = (
                name,
                f"{full} is one parameter of shape {tuple(value.shape)}, and {kind} does not keep to transformers' "
                "interface of experts",
            )
    return found


def _nothing(
    model: nn.Module,
    pattern: str,
    named: Sequence[str],
    modules: Mapping[str, nn.Module],
    linear: Collection[str],
    tables: Collection[str],
) -> str:
    if is_linear(model) or is_table(model):
        return (
            f"`model` must hold the layers to replace, got a layer itself ({type(model).__name__}); put it into a "
            "module, as `torch.nn.Sequential(layer)`, and compress that, or factorize its weight by `cur.decompose`"
        )
    if pattern == ALL_EMBEDDINGS:
        return f"`targets` {pattern!r} matches nothing: the model has no plain table of embeddings"
    odd = [sentence for full, (name, sentence) in _odd(modules).items() if _ends(full, pattern) or _ends(name, pattern)]
    if odd:
        return f"`targets` {pattern!r} names no linear layer: {odd[0]}; exclude it, or name other targets"
    others = f"; tables of embeddings are targets by name, or as {ALL_EMBEDDINGS!r}: {_some(tables)}" if tables else ""
    if named:
        kinds = sorted({type(modules[name]).__name__ for name in named})
        return (
            f"`targets` {pattern!r} names {len(named)} module(s), {named[0]!r} first, none of them linear: "
            f"they are {', '.join(kinds)}{others}"
        )
    ends = sorted({name.rpartition(".")[2] for name in (*linear, *tables)})
    ends = [end for end in ends if not end.isdigit()] or ends
    if not ends:
        return f"`targets` {pattern!r} matches nothing: the model has no linear module and no table of embeddings"
    close = get_close_matches(pattern.rpartition(".")[2], ends, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    what = "linear modules" if linear else "the model has no linear module, and tables of embeddings"
    ends = [end for end in ends if not linear or any(_ends(name, end) for name in linear)]
    said = f"`targets` {pattern!r} matches no module; {hint}{what} here end in {', '.join(ends)}"
    return said + (others if linear else "")


def _some(names: Collection[str]) -> str:
    told = sorted(names)
    return ", ".join(told[:_TOLD]) + (f" and {len(told) - _TOLD} more" if len(told) > _TOLD else "")


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _output_head(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {name for name, module in modules.items() if head is not None and module is head}


def _inside(model: nn.Module, blocks: Sequence[int], modules: Iterable[str]) -> set[str]:
    names = [name for name, _ in decoder_layers(model)]
    wrong = [index for index in blocks if not 0 <= index < len(names)]
    if wrong:
        raise ValueError(f"`blocks` must be between 0 and {len(names) - 1} for this model, got {wrong}")
    prefixes = tuple(f"{names[index]}." for index in blocks)
    return {name for name in modules if name.startswith(prefixes)}
