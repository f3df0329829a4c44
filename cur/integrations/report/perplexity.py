"""Perplexity of a causal language model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from cur._lib.errors import NumericalError
from cur.integrations.measure.text import batches
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.finite import find_nonfinite
from cur.integrations.model.hooks import forwards_replaced
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, body, evaluating, model_inputs, run

__all__ = ["Perplexity", "perplexity"]

# Logits in memory at once: 64 MB in float32.
_CHUNK = 1 << 24
_PROBE = 8


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on token windows.

    Attributes
    ----------
    value : float
        The perplexity ``exp(nll / tokens)``.
    nll : float
        Negative log-likelihood, summed over the scored tokens, in nats.
    tokens : int
        Scored tokens: all but the first of each window.
    windows : int
        The number of windows scored.
    seconds : float
        The seconds that the passes took.
    precision : str
        The precision of matrix products in the passes, ``"float32"`` for instance.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    seconds: float
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.value:.2f} over {self.tokens} tokens in {self.windows} windows ({self.seconds:.1f} s, products in "
            f"{self.precision})"
        )


def perplexity(
    model: nn.Module,
    windows: torch.Tensor,
    /,
    *,
    batch_size: int = 1,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Perplexity:
    """Score token windows with a causal language model, each window on its own.

    Every token but the first of a window is predicted from the tokens before it in that window; the
    perplexity is the exponential of the mean negative log-likelihood over all of them. Log-probabilities are
    taken in float32 and summed in float64. Logits are made for a few tokens at a time, so that a large
    vocabulary needs no large memory.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers. It is evaluated in the dtype and on the device in which it
        is.
    windows : torch.Tensor
        int64, shape (count, length), as :func:`cur.integrations.token_windows` returns.
    batch_size : int, default 1
        Windows per forward pass; changes the result by rounding only.
    precision : str, default "auto"
        The precision of matrix products in the passes: ``"float32"``, ``"bfloat16"``, or what is faster on the device;
        see :class:`~cur.integrations.model.precision.Precision`. Logits are computed as the weights of the head are, in
        any case.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in windows.

    Returns
    -------
    Perplexity

    Raises
    ------
    TypeError
        If the model is not a causal language model, or `windows` is not an integer matrix.
    ValueError
        If windows are shorter than two tokens, a token is outside the model's vocabulary, or there is no such
        precision.
    NumericalError
        If the likelihood is not finite; the message names where that began.
    """
    head = output_head(model)
    parts = batches(windows, batch_size=batch_size)
    if windows.shape[1] < 2:
        raise ValueError("`windows` must have at least 2 tokens each, one to see and one to predict")
    check_windows(model, windows)
    passes = Precision.of(model, precision)
    begin = time.perf_counter()
    nll, done = 0.0, 0
    with evaluating(model), eager_experts(model), passes.products(), _unrounded(head, passes):
        separate = head_is_separate(model, head, windows[:1, :_PROBE])
        for batch in parts:
            ids = batch["input_ids"]
            loss = _nll_in_chunks(model, head, batch) if separate else _nll(model, batch)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the likelihood of window {done} is not finite; "
                    f"{find_nonfinite(model, model, model_inputs(model, batch))}"
                )
            nll += loss
            done += len(ids)
            if progress is not None:
                progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = nll / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, nll, tokens, len(windows), time.perf_counter() - begin, passes.name)


def output_head(model: nn.Module) -> nn.Linear:
    """Return the output head of a causal language model; a TypeError says what is not one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", None)
    generates = callable(can_generate) and can_generate()
    if not isinstance(head, nn.Linear) or encoder_decoder or not generates or _sees_what_follows(model):
        raise TypeError(
            f"perplexity needs a causal language model, {type(model).__name__} is not one: it has no predictions of "
            "the next token from those before it"
        )
    return head


def _sees_what_follows(model: nn.Module) -> bool:
    """Say whether a model is an encoder under the name of a decoder, as BERT with a language modelling head."""
    config = getattr(model, "config", None)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return masked and getattr(config, "is_decoder", True) is False


def head_is_separate(model: nn.Module, head: nn.Module, ids: torch.Tensor) -> bool:
    """Say whether the logits are just the head applied to the body's output, by trying a few tokens.

    Some models scale or cap the logits after the head; then the whole model is run at once.
    """
    inner = body(model)
    if inner is model:
        return False
    state = run(inner, model_inputs(inner, ids))[0]
    whole = run(model, model_inputs(model, ids)).logits
    ours = head(state.to(_dtype(head)))  # some models keep the stream in float32 beside weights of half precision
    tolerance = 100 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    return ours.shape == whole.shape and bool((ours - whole).abs().max() <= tolerance)


def _dtype(head: nn.Module) -> torch.dtype:
    weight: torch.Tensor = head.get_parameter("weight")
    return weight.dtype


def _unrounded(head: nn.Linear, passes: Precision) -> AbstractContextManager[None]:
    """Let a head compute logits as its weights are: their third digit is one of the likelihood."""

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def exact(x: torch.Tensor) -> Any:
            with passes.exact():
                return forward(x.to(head.weight.dtype))

        return exact

    return forwards_replaced([(head, wrapped)])


def _nll_in_chunks(model: nn.Module, head: nn.Linear, batch: dict[str, Any]) -> float:
    inner = body(model)
    inputs = model_inputs(inner, batch)
    states = run(inner, inputs)[0][:, :-1].flatten(0, 1)
    targets = inputs["input_ids"][:, 1:].flatten().to(states.device)
    step = max(_CHUNK // head.weight.shape[0], 1)
    return sum(
        _sum_nll(head(part), target) for part, target in zip(states.split(step), targets.split(step), strict=True)
    )


def _nll(model: nn.Module, batch: dict[str, Any]) -> float:
    inputs = model_inputs(model, batch)
    logits = run(model, inputs).logits[:, :-1].flatten(0, 1)
    return _sum_nll(logits, inputs["input_ids"][:, 1:].flatten().to(logits.device))


def _sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    losses = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return float(losses.double().sum())
