"""Text that a model writes itself: calibration without data, and of more than one domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cur.integrations.measure.text import batches
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, evaluating
from cur.integrations.model.usage import is_transformer

__all__ = ["draw", "own_text", "sample_windows", "writing_fault"]

# Probabilities in memory at once while labels are drawn: 32 MB in float64.
_CHUNK = 1 << 22


def sample_windows(
    model: PreTrainedModel,
    /,
    *,
    count: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let a causal language model write windows of tokens.

    Every window starts with a token drawn uniformly from the vocabulary, without the special ones of the configuration;
    the others are drawn from the model's own predictions, as they are. What it has learnt to write is broader than any
    one calibration text, so statistics of both together transfer better to other domains (data-free calibration,
    LLM-QAT, arXiv 2305.17888).

    Each window has a generator of its own, seeded by `seed` and its number: batches change it by rounding only.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, whatever it keeps of what it has read.
    count, length : int
        The number of windows, and of tokens in each.
    seed : int, default 0
        The seed of the draws.
    batch_size : int, default 32
        The number of windows that are written together.
    precision : str, default "auto"
        The precision of matrix products in the passes: ``"float32"``, ``"bfloat16"``, or what is faster on the device;
        see :class:`~cur.integrations.model.precision.Precision`. Another one may lead to another text.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in windows.

    Returns
    -------
    torch.Tensor
        Token ids, int64, shape (count, length), on the CPU.

    Raises
    ------
    ValueError
        If a number is below 1, or there is no such precision.

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
    vocabulary = len(_embedded(model))
    special = _special(model)
    first = torch.tensor([token for token in range(vocabulary) if token not in special])
    windows: list[torch.Tensor] = []
    # Token by token, rounding all weights would take longer than multiplying with them.
    with evaluating(model), eager_experts(model), Precision.of(model, precision).products(cache=True):
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            heights = np.stack([np.random.default_rng((seed, number)).random(length) for number in numbers])
            windows.append(_write(model, first, torch.from_numpy(heights)))
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
    precision: str = "auto",
    progress: Progress | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Let a model write windows of the length of those in given batches, to calibrate on both.

    There are `share` times as many, rounded up: of little text, too, there is some.

    Parameters
    ----------
    model : PreTrainedModel
        The causal language model that writes.
    given : sequence
        The batches that were given, whose windows set the length.
    share : float
        The number of windows to write, as a multiple of those given.
    batch_size : int
        The number of windows that are written together.
    seed : int
        The seed of the draws.
    precision : str, default "auto"
        The precision of matrix products in the passes.
    progress : Progress, optional
        Called as ``progress(done, total)`` after every batch, in windows.

    Returns
    -------
    list of dict
        Batches, as :func:`cur.integrations.batches` makes them; none if `share` is 0, the model does not write text, or
        the batches hold no token ids.
    """
    ids = [batch.get("input_ids") if isinstance(batch, Mapping) else batch for batch in given]
    written = [one for one in ids if isinstance(one, torch.Tensor) and one.ndim == 2 and not one.is_floating_point()]
    if not share or not written or not _writes_text(model):
        return []
    count, length = math.ceil(share * sum(len(one) for one in written)), max(one.shape[1] for one in written)
    windows = sample_windows(model, count=count, length=length, seed=seed, precision=precision, progress=progress)
    return batches(windows, batch_size=batch_size)


def _writes_text(model: PreTrainedModel) -> bool:
    """Return whether a model goes on with a text, token after token."""
    if not is_transformer(model):
        return False
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def _write(model: PreTrainedModel, first: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Write one batch: a window for each row of heights (count, length), the first token from among `first`."""
    tokens = first[(heights[:, 0] * len(first)).long()].to(_embedded(model).device)[:, None]
    if heights.shape[1] == 1:
        return tokens.cpu()
    known: Any = model
    with _as_it_predicts(model):
        written: torch.Tensor = known.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=heights.shape[1] - 1,
            do_sample=False,
            logits_processor=LogitsProcessorList([_Drawing(heights)]),
        )
    return written.cpu()


class _Drawing(LogitsProcessor):
    """Leaves to the search, at each step, the token that is drawn from the model's predictions."""

    def __init__(self, heights: torch.Tensor) -> None:
        self.heights = heights

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        height = self.heights[:, input_ids.shape[1]].to(scores.device)
        drawn = torch.full_like(scores, -math.inf)
        return drawn.scatter_(1, draw(scores, height)[:, None], 0.0)  # type: ignore[return-value]


@contextmanager
def _as_it_predicts(model: PreTrainedModel) -> Iterator[None]:
    """Let a model write without the settings that its authors recommend, which change predictions or end the text."""
    known: Any = model
    own = known.generation_config
    known.generation_config = GenerationConfig(use_cache=True)
    try:
        yield
    finally:
        known.generation_config = own


def writing_fault(model: PreTrainedModel) -> str | None:
    """Say why a model that should go on with a text cannot; None if it can, or is of another kind.

    Parameters
    ----------
    model : PreTrainedModel
        The model, which is tried on three tokens.

    Returns
    -------
    str or None
        What is in the way, None if nothing is.
    """
    if not _writes_text(model):
        return None
    try:
        sample_windows(model, count=1, length=3, precision="float32")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever a model says that cannot do it)
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{type(model).__name__} does not go on with a text here ({reason})"
    return None


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


def draw(logits: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Draw a label from each row of logits (rows, classes), by inversion at heights (rows,) in [0, 1) of its sums.

    Parameters
    ----------
    logits : Tensor
        Logits of shape (rows, classes).
    heights : Tensor
        Heights in [0, 1), of shape (rows,).

    Returns
    -------
    Tensor
        The labels, int64, of shape (rows,).
    """
    step = max(_CHUNK // logits.shape[-1], 1)
    labels = []
    for part, height in zip(logits.split(step), heights.split(step), strict=True):  # type: ignore[no-untyped-call]
        below = part.double().softmax(-1).cumsum(-1)
        # The last entry is 1 but for rounding; scaled by it, a height below 1 always finds its label.
        labels.append(torch.searchsorted(below, height[:, None] * below[:, -1:], right=True)[:, 0])
    return torch.cat(labels).clamp_(max=logits.shape[-1] - 1)
