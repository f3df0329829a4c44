"""Perplexity of a causal language model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cur._lib.errors import NumericalError
from cur.integrations.measure.text import batches
from cur.integrations.model.finite import find_nonfinite
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, model_inputs
from cur.integrations.report.endings import Predictor, output_head, predicting

__all__ = ["Perplexity", "perplexity"]


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
    output_head(model)
    parts = batches(windows, batch_size=batch_size)
    if windows.shape[1] < 2:
        raise ValueError("`windows` must have at least 2 tokens each, one to see and one to predict")
    check_windows(model, windows)
    passes = Precision.of(model, precision)
    begin = time.perf_counter()
    nll, done = 0.0, 0
    with predicting(model, windows, passes) as predictor:
        for batch in parts:
            loss = _nll(predictor, batch)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the likelihood of window {done} is not finite; "
                    f"{find_nonfinite(model, model, model_inputs(model, batch))}"
                )
            nll += loss
            done += len(batch["input_ids"])
            if progress is not None:
                progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    value = exponential(nll / tokens)
    return Perplexity(value, nll, tokens, len(windows), time.perf_counter() - begin, passes.name)


def exponential(nll: float) -> float:
    """Return the perplexity of a mean negative log-likelihood, infinite where a float does not hold it.

    Parameters
    ----------
    nll : float
        The mean negative log-likelihood of a token, in nats.

    Returns
    -------
    float
        The perplexity.
    """
    return math.exp(nll) if nll < 700 else math.inf


def _nll(predictor: Predictor, batch: dict[str, Any]) -> float:
    states = predictor.states(batch)[:, :-1].flatten(0, 1)
    targets = batch["input_ids"][:, 1:].flatten()
    parts = zip(*(torch.split(each, predictor.step) for each in (states, targets)), strict=True)
    return sum(_sum_nll(predictor.logits(part), target) for part, target in parts)


def _sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    losses = nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return float(losses.double().sum())
