"""What a model can take: text at all, tokens it has embeddings for, windows no longer than its table of positions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["check_windows", "positions", "word_embeddings"]

# How tables of learned positions are called: `wpe`, `position_embeddings`, `embed_positions`, `pos_emb`.
_POSITIONS = re.compile(r"^(wpe|pos_emb\w*|positions_embed|\w*positions?(_embeddings?|_embedding_table)?)$")
_RELATIVE = re.compile(r"relative|token_type")
# Buffers of sines: GPT-J and its kin, CTRL.
_SINES = ("embed_positions", "pos_encoding")


def check_windows(
    model: nn.Module, batches: torch.Tensor | Iterable[Mapping[str, Any] | torch.Tensor], /, *, name: str = "windows"
) -> None:
    """Refuse text for models that read none, token ids without an embedding, and samples longer than the positions.

    Rotary positions have no end and are not checked.

    Parameters
    ----------
    model : nn.Module
        The model that is to read the text.
    batches : Tensor or iterable of mapping
        The windows of tokens, or batches of them.
    name : str, default "windows"
        The name that errors use for the text.

    Raises
    ------
    ValueError
        With what the model has, what was found, and what to do.
    """
    table = word_embeddings(model)
    vocabulary = None if table is None else len(table.weight)
    longest = positions(model)
    for batch in [batches] if isinstance(batches, torch.Tensor) else batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.numel() == 0 or ids.ndim != 2:
            continue
        _refuse_text(model, name)
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"`{name}` has windows of {ids.shape[1]} tokens, the model's table of positions ends at {longest}; ask "
                f"for windows of at most {longest} (--window-length {longest})"
            )
        least, most = int(ids.min()), int(ids.max())
        if vocabulary is not None and (least < 0 or most >= vocabulary):
            raise ValueError(
                f"`{name}` holds token {least if least < 0 else most}, outside the model's vocabulary of {vocabulary}; "
                "take the tokenizer that the model was trained with, or give the model embeddings for the others "
                "(resize_token_embeddings)"
            )


def word_embeddings(model: nn.Module) -> Any:
    """Return the table of a model's token embeddings, None of one that has none, or several.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except NotImplementedError:
        return None
    return table if isinstance(getattr(table, "weight", None), torch.Tensor) else None


def _refuse_text(model: nn.Module, name: str) -> None:
    """Refuse tokens for a model that takes none: transformers drops them, and fails for what is missing then."""
    reads = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    if reads in accepted and "input_ids" not in accepted:
        raise ValueError(
            f"`{name}` is text, and {type(model).__name__} reads `{reads}`; give batches of that in Python, commands "
            "read text alone"
        )


def positions(model: nn.Module) -> int | None:
    """Return how many positions of tokens a model has learnt, or keeps a table of; None if there is no such end.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    """
    words = word_embeddings(model)
    if words is None:
        return None
    own = _weight(words)
    limits: list[int] = []
    module: Any
    for module in model.modules():
        children: dict[str, Any] = dict(module.named_children())
        buffers = dict(module.named_buffers(recurse=False))
        # Only beside the embeddings of tokens: towers of images and sound have positions of their own.
        if any(child is words or (own is not None and _weight(child) is own) for child in children.values()):
            learnt = [len(child.weight) - _offset(child) for name, child in children.items() if _is_table(name, child)]
            numbers = buffers.get("position_ids")
            limits += [*learnt, *([numbers.shape[-1]] if learnt and numbers is not None else [])]
        fixed = [tensor for name, tensor in buffers.items() if name in _SINES and tensor.ndim == 2]
        limits += [len(table) for table in (*fixed, *([module.weight] if _is_sines(module) else []))]
        if hasattr(module, "build_mpt_alibi_tensor"):  # slopes for so many positions, and no more
            limits.append(module.config.max_seq_len)
    return min(limits, default=None)


def _is_table(name: str, module: Any) -> bool:
    named = _POSITIONS.match(name) and not _RELATIVE.search(name)
    return bool(named) and _weight(module) is not None and not _grows(module)


def _weight(module: nn.Module) -> Any:
    # Not the attribute: compressed layers multiply theirs out.
    return dict(module.named_parameters(recurse=False)).get("weight")


def _is_sines(module: Any) -> bool:
    """Say whether a module is a table of sines as RoFormer has it, which lies beside its blocks."""
    named = type(module).__name__.endswith("SinusoidalPositionalEmbedding")
    return named and isinstance(module, nn.Embedding) and not _grows(module)


def _grows(module: Any) -> bool:
    return hasattr(module, "make_weight")  # FSMT makes a longer table when it meets a longer text


def _offset(table: Any) -> int:
    """Return how many rows at the beginning belong to no position: OPT and BART keep two, RoBERTa numbers from two."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1
