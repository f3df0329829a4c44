"""Text that a model writes itself: calibration without data, and of more than one domain."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cur.integrations._forward import Progress, evaluating, padding_mask
from cur.integrations.gradients import draw
from cur.integrations.text import batches

__all__ = ["own_text", "sample_windows"]


def sample_windows(
    model: PreTrainedModel,
    /,
    *,
    count: int,
    length: int,
    begun: torch.Tensor | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let a causal language model write windows of tokens.

    Every window starts with a token drawn uniformly from the vocabulary, without the special ones of the configuration,
    or as `begun`; the others are drawn from the model's own predictions, as they are. What it has learnt to write is
    broader than any one calibration text, so statistics of both together transfer better to other domains (data-free
    calibration, LLM-QAT, arXiv 2305.17888).

    Each window has a generator of its own, seeded by `seed` and its number: batches change it by rounding only.

    Parameters
    ----------
    model : PreTrainedModel
        With a key-value cache.
    count, length : int
        Windows, and tokens in each.
    begun : torch.Tensor, optional
        What the windows begin with, token ids, shape (count, at least 1 and at most `length`).
    seed : int, default 0
        For the draws.
    batch_size : int, default 32
        Windows that are written together.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in windows.

    Returns
    -------
    torch.Tensor
        Token ids, int64, shape (count, length), on the CPU.

    Raises
    ------
    TypeError, ValueError
        If a number is below 1, or `begun` holds no token ids or has another shape.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
    >>> sample_windows(model, count=3, length=8).shape
    torch.Size([3, 8])
    """
    for name, value in (("count", count), ("length", length), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
    if begun is not None and (begun.is_floating_point() or begun.dtype == torch.bool):
        raise TypeError(f"`begun` must hold token ids, got {begun.dtype}")
    if begun is not None and not (begun.ndim == 2 and len(begun) == count and 1 <= begun.shape[1] <= length):
        raise ValueError(f"`begun` must have shape ({count}, 1 to {length}), got {tuple(begun.shape)}")
    special = _special(model)
    first = torch.tensor([token for token in range(len(_embedded(model))) if token not in special])
    windows: list[torch.Tensor] = []
    with evaluating(model):
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            drawn = np.stack([np.random.default_rng((seed, number)).random(length) for number in numbers])
            heights = torch.from_numpy(drawn)
            prompt = first[(heights[:, :1] * len(first)).long()] if begun is None else begun[start : numbers.stop]
            windows.append(_write(model, prompt, heights[:, prompt.shape[1] :]))
            if progress is not None:
                progress(numbers.stop, count)
    return torch.cat(windows)


def own_text(
    model: PreTrainedModel,
    given: Sequence[Any],
    /,
    *,
    share: float,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Let a model write windows of the length of those in given batches, to calibrate on both.

    There are `share` times as many, rounded up: of little text, too, there is some. Half of them, rounded down, begin
    with a piece of the given text, an eighth of a window long, and are more text of its domain; the others begin with a
    random token, and are of all domains.

    Returns
    -------
    list of dict
        Batches, as :func:`cur.integrations.batches` makes them; none if `share` is 0, the model does not write text, or
        the batches hold no token ids.
    """
    samples = [sample for batch in given for sample in _samples(batch)] if share and _writes_text(model) else []
    if not samples:
        return []
    count, length = math.ceil(share * len(samples)), max(len(sample) for sample in samples)
    begun = _places(samples, count // 2, max(length // 8, 1), seed=seed)
    free = count - len(begun)

    def watch(before: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(before + done, count)

    write = functools.partial(sample_windows, model, length=length)
    windows = [write(count=free, seed=seed, progress=watch(0))]
    if len(begun):
        windows.append(write(count=len(begun), begun=begun, seed=seed + 1, progress=watch(free)))
    return batches(torch.cat(windows), batch_size=batch_size)


def _places(samples: Sequence[torch.Tensor], count: int, length: int, *, seed: int) -> torch.Tensor:
    """Return tokens from `count` places, in samples at even distances of those that are long enough."""
    long = [sample for sample in samples if len(sample) >= length]
    if not count:
        return torch.empty(0, length, dtype=torch.int64)
    some = [long[(2 * number + 1) * len(long) // (2 * count)] for number in range(count)]
    starts = np.random.default_rng(seed).integers([len(sample) - length + 1 for sample in some])
    return torch.stack([sample[start : start + length] for sample, start in zip(some, starts, strict=True)])


def _samples(batch: Any) -> list[torch.Tensor]:
    """Return the token ids of a batch without padding, sample by sample; none if it holds something else."""
    ids, mask = (batch.get("input_ids"), padding_mask(batch)) if isinstance(batch, Mapping) else (batch, None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return []
    return list(ids) if mask is None else [row[kept] for row, kept in zip(ids, mask, strict=True)]


def _writes_text(model: PreTrainedModel) -> bool:
    """Return whether a model goes on with a text, token after token."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def _write(model: PreTrainedModel, begun: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Write one batch: what was begun (count, p) goes on for each column of heights (count, length - p)."""
    place = _embedded(model).device
    # Of a long beginning the predictions of all tokens would take much memory; most models know how to leave them out.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens = begun.to(place, torch.int64)
    written, cache = [tokens], None
    for height in heights.T:
        output: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True, **last)
        cache = output.past_key_values
        tokens = draw(output.logits[:, -1], height.to(place))[:, None]
        written.append(tokens)
    return torch.cat(written, dim=1).cpu()


def _embedded(model: PreTrainedModel) -> torch.Tensor:
    embeddings: Any = model.get_input_embeddings()
    weight: torch.Tensor = embeddings.weight
    return weight


def _special(model: PreTrainedModel) -> set[int]:
    """Return the ids of the beginning, the end and the padding of text, where the configuration names them."""
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config, name, None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
