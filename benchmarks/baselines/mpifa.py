"""MPIFA (arXiv 2501.19090): block after block, refit to the dense model's outputs on the inputs that really come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["reconstruct_", "refit"]


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass where enough is known."""


def refit(
    W: Tensor, right: Tensor, student: Tensor, cross: Tensor, *, mix: float = 0.25, damping: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Return factors that give a mixture of the dense model's outputs and the dense layer's, from the inputs that come.

    With inputs ``x`` of the dense model and ``z`` of the compressed one the wanted outputs are ``W (mix x + (1 - mix)
    z)``. First the left factor is the minimiser for the given right one, then the right one for the new left one.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Dense weight.
    right : Tensor, shape (r, n)
        Right factor of the truncation.
    student, cross : Tensor, shape (n, n)
        ``E[z z^T]`` and ``E[x z^T]``.
    mix : float, default 0.25
        As in the paper.
    damping : float, default 1e-4
        Multiple of the mean eigenvalue of `student` by which the solution is drawn to ``W``.
    """
    n = len(student)
    ridge = damping * float(student.diagonal().mean()) * torch.eye(n, dtype=W.dtype)
    moment = student + ridge
    wanted = W @ (mix * cross + (1 - mix) * student + ridge)
    left = torch.linalg.solve(right @ moment @ right.T, wanted @ right.T, left=False)
    return left, torch.linalg.lstsq(left, torch.linalg.solve(moment, wanted, left=False)).solution


@torch.no_grad()
def reconstruct_(
    model: nn.Module,
    dense: nn.Module,
    windows: Tensor,
    blocks: Sequence[str],
    groups: Sequence[Sequence[str]],
    fit: Callable[[str, Tensor, Tensor], Tensor],
    *,
    batch_size: int = 4,
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Go through the blocks in order and give every layer the weight fitted to the inputs it gets by then, in place.

    Parameters
    ----------
    model, dense : nn.Module
        The same causal language model twice; the first is changed.
    windows : Tensor
        Token ids, shape (count, length).
    blocks : sequence of str
        Names of the blocks.
    groups : sequence of sequences of str
        Names of the layers within a block, in the order of their inputs, those with the same input together.
    fit : callable
        From the name of a layer, ``E[z z^T]`` of its inputs and ``E[x z^T]`` with those of the dense model, float64, to
        its new weight.
    """
    hidden, options = _entrances(dense, dense.get_submodule(blocks[0]), windows.split(batch_size))
    states = [state.clone() for state in hidden]
    for done, block in enumerate(blocks, start=1):
        theirs, ours = dense.get_submodule(block), model.get_submodule(block)
        seen: dict[str, list[Tensor]] = {group[0]: [] for group in groups}
        handles = [
            theirs.get_submodule(first).register_forward_pre_hook(lambda _, args, to=inputs: to.append(_rows(args[0])))
            for first, inputs in seen.items()
        ]
        hidden = [_run(theirs, state, options) for state in hidden]
        for handle in handles:
            handle.remove()
        for group in groups:
            student, cross = _moments(ours, ours.get_submodule(group[0]), states, options, seen.pop(group[0]))
            for layer in group:
                name = f"{block}.{layer}"
                model.get_submodule(name).weight.copy_(fit(name, student, cross))
        states = [_run(ours, state, options) for state in states]
        if progress is not None:
            progress(done, len(blocks))


def _entrances(model: nn.Module, block: nn.Module, parts: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what the first block is called with: hidden states, and the options of the first batch."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append((args[0], options))
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    for part in parts:
        try:
            model(input_ids=part, use_cache=False)
        except _Reached:
            continue
    handle.remove()
    options = dict(calls[0][1])
    # Of one window, to be broadcast: the last batch may be smaller.
    options["position_ids"] = options["position_ids"][:1]
    options["position_embeddings"] = tuple(part[:1] for part in options["position_embeddings"])
    return [state for state, _ in calls], options


def _run(block: nn.Module, state: Tensor, options: dict[str, Any]) -> Tensor:
    output = block(state, **options)
    return output[0] if isinstance(output, tuple) else output


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _moments(
    block: nn.Module, layer: nn.Module, states: Sequence[Tensor], options: dict[str, Any], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return ``E[z z^T]`` and ``E[x z^T]`` of a layer's inputs ``z`` and the dense model's ``x``."""
    n = inputs[0].shape[1]
    student, cross = torch.zeros(n, n), torch.zeros(n, n)
    waiting = iter(inputs)

    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        z = _rows(args[0])
        student.addmm_(z.T, z)
        cross.addmm_(next(waiting).T, z)
        raise _Reached

    handle = layer.register_forward_pre_hook(add)
    for state in states:
        try:
            _run(block, state, options)
        except _Reached:
            continue
    handle.remove()
    tokens = sum(len(part) for part in inputs)
    return student.double() / tokens, cross.double() / tokens
