"""What a model can take: tokens that it has embeddings for, and windows no longer than its table of positions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["check_windows", "positions"]

# How tables of learned positions are called: `wpe`, `position_embeddings`, `embed_positions`, `pos_emb`.
_POSITIONS = re.compile(r"^(wpe|pos_emb\w*|positions_embed|\w*positions?(_embeddings?|_embedding_table)?)$")
_RELATIVE = re.compile(r"relative|token_type")


def check_windows(
    model: nn.Module, batches: torch.Tensor | Iterable[Mapping[str, Any] | torch.Tensor], /, *, name: str = "windows"
) -> None:
    """Refuse token ids that a model has no embedding for, and samples longer than its learned positions.

    Rotary positions have no end and are not checked.

    Raises
    ------
    ValueError
        With what the model has, what was found, and what to do.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except NotImplementedError:  # models that read no tokens
        table = None
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    vocabulary, longest = len(weight), positions(model)
    for batch in [batches] if isinstance(batches, torch.Tensor) else batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.numel() == 0 or ids.ndim != 2:
            continue
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"`{name}` has windows of {ids.shape[1]} tokens, the model's table of positions ends at {longest}; ask "
                f"for windows of at most {longest} (--window-length {longest})"
            )
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"`{name}` holds token {least if least < 0 else most}, outside the model's vocabulary of {vocabulary}; "
                "take the tokenizer that the model was trained with, or give the model embeddings for the others "
                "(resize_token_embeddings)"
            )


def positions(model: nn.Module) -> int | None:
    """Return how many positions of tokens a model has learnt, or keeps a table of; None if there is no such end."""
    get = getattr(model, "get_input_embeddings", None)
    words = get() if callable(get) else None
    weight = getattr(words, "weight", None)
    limits = []
    for module in model.modules():
        children = dict(module.named_children())
        # Only beside the embeddings of tokens: towers of images and sound have positions of their own.
        if any(isinstance(child, nn.Embedding) and child.weight is weight for child in children.values()):
            limits += [
                child.num_embeddings - _offset(child)
                for name, child in children.items()
                if isinstance(child, nn.Embedding) and _POSITIONS.match(name) and not _RELATIVE.search(name)
            ]
        fixed = dict(module.named_buffers(recurse=False)).get("embed_positions")  # sines in a table, as of GPT-J
        if fixed is not None and fixed.ndim == 2:
            limits.append(len(fixed))
    return min(limits, default=None)


def _offset(table: nn.Embedding) -> int:
    """Return how many rows at the beginning belong to no position: OPT and BART keep two, RoBERTa numbers from two."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1
