r"""What the student is asked to match, each as a number without unit: 0 is perfect, 1 is as bad as predicting nothing.

Hidden states of real models have a few channels that are hundreds of times larger than the rest, and a few tokens
(the first above all) on which these channels are larger still; a plain mean square is a measurement of those alone.
So every channel is divided by the root mean square that it has in the teacher over the tokens of the batch, and tokens
whose norm exceeds ten times the median are weighted down to it. With ``h`` of the student and ``g`` of the teacher,

.. math:: \frac1d \sum_c \frac{\sum_t w_t (h_{tc} - g_{tc})^2}{\sum_t w_t g_{tc}^2} .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["output_losses", "relative_distance", "token_weights"]

# Logits in memory at once: 64 MB in bfloat16. Heads are cast anew for each of these chunks.
_CHUNK = 1 << 25

# Logits that are compared at once: what a dozen passes over them find in the processor's cache.
_IN_CACHE = 1 << 19

# How much larger than the median the norm of a token may be before its weight falls.
_LARGE = 10.0


def token_weights(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight of each token by the norm of its hidden state in the teacher.

    Parameters
    ----------
    hidden : Tensor
        Hidden states of the teacher, of shape (batch, length, width).
    mask : Tensor or None
        Shape (batch, length); False at padding, which gets weight zero.

    Returns
    -------
    Tensor
        Float32, shape (batch, length): ``min(1, 10 median / norm)^2``.
    """
    norms = torch.linalg.vector_norm(hidden.detach().float(), dim=-1)
    middle = (norms if mask is None else norms[mask]).median()
    weights = (_LARGE * middle / norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1).square()
    return weights if mask is None else torch.where(mask, weights, 0.0)


def relative_distance(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over channels of the weighted square distance, relative to the teacher's.

    Parameters
    ----------
    student, teacher : Tensor
        Hidden states of both models, of shape (batch, length, width).
    weights : Tensor
        Shape (batch, length), as :func:`token_weights` gives them.

    Returns
    -------
    Tensor
        Float32 scalar. A channel that is zero in the teacher counts by the mean of the others.
    """
    teacher = teacher.detach().float()
    each = weights[..., None]
    size = (each * teacher.square()).sum((0, 1))
    floor = (size.mean() * torch.finfo(torch.float32).eps ** 2).clamp(min=torch.finfo(torch.float32).tiny)
    size = torch.where(size > floor, size, size.mean().clamp(min=floor))
    return ((each * (student.float() - teacher).square()).sum((0, 1)) / size).mean()


def output_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    logits: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    kl: float,
    next_token: float,
    temperature: float,
    learning: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    r"""Compare the distributions of the next token.

    Gradients are formed along with the losses, for a few tokens at a time: with a large vocabulary the logits would be
    the largest tensors of all.

    Parameters
    ----------
    student, teacher : Tensor
        Input of the heads, shape (tokens, width), or logits, shape (tokens, vocabulary).
    labels : Tensor
        The tokens that follow, shape (tokens,); -100 where none is scored.
    logits : pair of callable
        The heads of student and teacher.
    kl, next_token : float
        Weights of ``T^2 KL(teacher || student)``, both at temperature `T` (the factor keeps the size of the gradient;
        Hinton et al., arXiv 1503.02531), and of the negative log-likelihood. Both are means per token, in nats.
    temperature : float
        The temperature ``T`` that divides the logits of both models.
    learning : bool, default True
        Whether a gradient will be asked for.

    Returns
    -------
    Tensor
        The weighted sum, a float32 scalar.
    dict of str to float
        The parts without weights: ``next_token`` always, ``kl`` where it has a weight.
    """
    count = max(int((labels != -100).sum()), 1)
    step = max(_CHUNK // _vocabulary(student, logits[0]), 1)
    gradients: list[Tensor] = []
    divergence, likelihood = 0.0, 0.0
    for h, g, wanted in zip(*(torch.split(x, step) for x in (student.detach(), teacher, labels)), strict=True):
        with torch.set_grad_enabled(learning):
            scores = logits[0](h.requires_grad_(learning))
        with torch.no_grad():
            expected = logits[1](g) if kl else None
            gradient = torch.empty_like(scores) if learning else None
            rows = max(_IN_CACHE // scores.shape[-1], 1)
            for start in range(0, len(scores), rows):
                part = slice(start, start + rows)
                found = _compare(
                    scores[part],
                    None if expected is None else expected[part],
                    wanted[part],
                    None if gradient is None else gradient[part],
                    kl=kl,
                    next_token=next_token,
                    temperature=temperature,
                )
                likelihood, divergence = likelihood + found[0], divergence + found[1]
        if gradient is not None:
            gradients.append(torch.autograd.grad(scores, h, gradient)[0])
    parts = {"next_token": likelihood / count}
    if kl:
        parts["kl"] = divergence / count
    value = kl * parts.get("kl", 0.0) + next_token * parts["next_token"]
    if not learning:
        return torch.tensor(value), parts
    total: Tensor = _WithGradient.apply(student, torch.cat(gradients) / count, value)  # type: ignore[no-untyped-call]
    return total, parts


def _compare(
    scores: Tensor,
    expected: Tensor | None,
    labels: Tensor,
    gradient: Tensor | None,
    *,
    kl: float,
    next_token: float,
    temperature: float,
) -> tuple[float, float]:
    """Return the sums of both losses over some tokens, and write the gradient of their weighted sum, if asked for."""
    kept, place = labels != -100, labels.clamp(min=0)[:, None]
    ours = scores.float().log_softmax(-1)
    likelihood = -float((ours.gather(1, place)[:, 0] * kept).sum())
    slope = None
    if next_token and gradient is not None:
        slope = ours.exp().mul_(next_token)
        slope.scatter_add_(1, place, torch.full_like(place, -next_token, dtype=slope.dtype))
    divergence = 0.0
    if expected is not None:
        if temperature != 1:
            ours = (scores.float() / temperature).log_softmax(-1)
            expected = expected.float() / temperature
        theirs = expected.float().log_softmax(-1)
        chance = theirs.exp()
        divergence = float((torch.linalg.vecdot(chance, theirs.sub_(ours)) * kept).sum()) * temperature**2
        if gradient is not None:
            mine = ours.exp_().sub_(chance).mul_(kl * temperature)
            slope = mine if slope is None else slope.add_(mine)
    if gradient is not None and slope is not None:
        gradient.copy_(slope.mul_(kept[:, None]))
    return likelihood, divergence


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, gradient: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.tensor(value, dtype=torch.float32, device=at.device)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


def _vocabulary(sample: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    with torch.no_grad():
        return int(head(sample[:1].detach()).shape[-1])
