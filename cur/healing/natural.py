"""Steps of natural gradient whose length is searched for: in a few passes, what many small steps would win first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cur._errors import NumericalError
from cur.healing.cores import Coordinates
from cur.healing.data import Text
from cur.healing.train import Goal

__all__ = ["natural_step_"]

# Windows whose mean gradient gives the direction; and of them those on which its length is searched for, if none are
# held out.
_WINDOWS, _WATCHED = 32, 8

# The first length to be tried, relative to where a straight line would reach a loss of zero, and how many are.
_FIRST, _TRIES = 0.25, 6


def natural_step_(goal: Goal, coordinates: Mapping[str, Coordinates], text: Text, *, number: int) -> dict[str, float]:
    r"""Move the cores of all layers along the natural gradient of a loss to where it is least, in place.

    In the coordinates of :class:`~cur.healing.cores.Coordinates` the gradient is the Kronecker-factored natural one
    (Martens and Grosse, arXiv 1503.05671). The length is doubled, or halved, as long as the loss on the windows
    that are held out falls; the cores stay where they are if it never does.

    Parameters
    ----------
    goal : Goal
        What is compared with the teacher.
    coordinates : mapping of str to Coordinates
        By layer; they begin anew where the step leads.
    text : Text
        What to learn from.
    number : int
        Of the step, from 0: each has windows of its own.

    Returns
    -------
    dict of str to float
        ``"loss"`` where the step leads, and ``"before"`` it, on these windows; ``"length"``, relative to where a
        straight line would reach a loss of zero.

    Raises
    ------
    NumericalError
        If a loss or a gradient is not finite; the cores are left as they were.
    """
    each = -(-_WINDOWS // text.batch_size)
    batches = [text.batch(number * each + place) for place in range(each)]
    watched = [
        (batch, goal.pair.teach(batch)) for batch in text.held_out() or batches[: -(-_WATCHED // text.batch_size)]
    ]
    start = {name: one.core.value for name, one in coordinates.items()}
    try:
        with torch.enable_grad():
            losses = [goal.learn(batch, goal.pair.teach(batch))["loss"] for batch in batches]
        way = {name: _gradient(one) / each for name, one in coordinates.items()}
        square = sum(float(part.square().sum()) for part in way.values())
        whole = sum(losses) / each / square if square > 0 else 0.0

        def loss(length: float) -> float:
            for name, one in coordinates.items():
                one.write_(-length * whole * way[name])
            looks = [goal.look(batch, taught)["loss"] for batch, taught in watched]
            return sum(looks) / len(looks)

        before = loss(0.0)
        least, length = search(loss, before) if whole else (before, 0.0)
    except NumericalError as error:
        for name, one in coordinates.items():
            one.core.write_(start[name])
        raise NumericalError(
            f"{error}, in a natural step; the cores are what they were before it. Try `natural_steps` 0, or "
            "`precision` 'float32'"
        ) from error
    for name, one in coordinates.items():
        one.write_(-length * whole * way[name])
        one.begin_here_()
    return {"before": before, "loss": least, "length": length}


def _gradient(one: Coordinates) -> Tensor:
    one.take_gradient_()
    gradient, one.values.grad = one.values.grad, None
    assert gradient is not None
    if not bool(torch.isfinite(gradient).all()):
        raise NumericalError(f"the gradient of {one.core.name} is not finite")
    return gradient


def search(loss: Callable[[float], float], before: float) -> tuple[float, float]:
    """Return the least loss that is found along a line by doubling or halving a length, and where: 0 if none is less.

    Parameters
    ----------
    loss : callable
        The loss at a length.
    before : float
        The loss at 0.
    """
    least, best, length = before, 0.0, _FIRST
    for _ in range(_TRIES):
        found = loss(length)
        if found < least:
            least, best = found, length
            if length < _FIRST:
                break
            length *= 2
        elif best:
            break
        else:
            length /= 2
    return least, best
