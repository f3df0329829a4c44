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

# Logits in memory at once, in numbers: 64 MB in float32.
_CHUNK = 1 << 24

# How much larger than the median the norm of a token may be before its weight falls.
_LARGE = 10.0


def token_weights(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight of each token by the norm of its hidden state in the teacher.

    Parameters
    ----------
    hidden : Tensor
        Shape (batch, length, width).
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
        Shape (batch, length, width).
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
        ``T``.
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
            kept, place = wanted != -100, wanted.clamp(min=0)[:, None]
            scores32 = scores.float()
            chance, norm = _softmax(scores32)
            likelihood += float(((norm - scores32.gather(1, place)[:, 0]) * kept).sum())
            gradient = torch.zeros_like(chance)
            if next_token:
                gradient.add_(chance, alpha=next_token)
                gradient.scatter_add_(1, place, torch.full_like(place, -next_token, dtype=gradient.dtype))
            if kl:
                if temperature != 1:
                    scores32 = scores32 / temperature
                    chance, norm = _softmax(scores32)
                expected = logits[1](g).float() / temperature
                target, target_norm = _softmax(expected)
                each = torch.linalg.vecdot(target, expected.sub_(scores32)) - target_norm + norm
                divergence += float((each * kept).sum()) * temperature**2
                gradient.add_(chance.sub_(target), alpha=kl * temperature)
        if learning:
            gradient *= kept[:, None]
            gradients.append(torch.autograd.grad(scores, h, gradient.to(scores.dtype))[0])
    parts = {"next_token": likelihood / count}
    if kl:
        parts["kl"] = divergence / count
    value = kl * parts.get("kl", 0.0) + next_token * parts["next_token"]
    if not learning:
        return torch.tensor(value), parts
    total: Tensor = _WithGradient.apply(student, torch.cat(gradients) / count, value)  # type: ignore[no-untyped-call]
    return total, parts


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities and the logarithm of the sum of exponentials, with one pass of exponentials for both."""
    chance = scores.softmax(-1)
    likeliest = scores.argmax(-1, keepdim=True)
    return chance, (scores.gather(-1, likeliest) - chance.gather(-1, likeliest).log())[..., 0]


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
