"""Steps of natural gradient whose length is searched for: in a few passes, what many small steps would win first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from cur._lib.errors import NumericalError
from cur.healing.pair.cores import Coordinates
from cur.healing.pair.data import Text
from cur.healing.training.loop import Comparison

__all__ = ["natural_step_", "search"]

# Windows, or batches where the text comes as such, whose mean gradient gives the direction; and those on which the
# length is searched for.
_LEARNT, _WATCHED = 32, 8

# The first length to be tried, relative to where a straight line would reach a loss of zero, and how many are.
_FIRST, _TRIES = 0.25, 6


def natural_step_(
    comparison: Comparison, coordinates: Mapping[str, Coordinates], text: Text, *, number: int
) -> dict[str, float]:
    r"""Move the cores of all layers along the natural gradient of a loss to where it is least, in place.

    In the coordinates of :class:`~cur.healing.pair.cores.Coordinates` the gradient is the Kronecker-factored natural
    one (Martens and Grosse, arXiv 1503.05671). The length is doubled as long as the loss on held-out text falls, or
    halved until it does; the cores stay where they are if it never does. Without held-out text the windows that gave
    the gradient are watched.

    Parameters
    ----------
    comparison : Comparison
        The loss: of the whole model, or of one block.
    coordinates : mapping of str to Coordinates
        Coordinates in which each core learns, by the layer's name; they begin anew where the step leads.
    text : Text
        The windows to learn from, and those that are held out.
    number : int
        The number of the step, from 0: each continues in the text where the one before ended.

    Returns
    -------
    dict of str to float
        ``"loss"`` where the step leads, and ``"before"`` it, on the watched windows; ``"length"``, relative to where a
        straight line would reach a loss of zero.

    Raises
    ------
    NumericalError
        If the loss or a gradient is not finite; the cores are left as they were.
    """
    each = min(-(-_LEARNT // text.batch_size), text.count // text.batch_size)
    batches = [text.batch(number * each + place) for place in range(each)]
    seen = (text.held_out() or batches)[: -(-_WATCHED // text.batch_size)]
    watched = [(batch, comparison.pair.teach(batch)) for batch in seen]
    start = {name: one.core.value for name, one in coordinates.items()}
    try:
        with torch.enable_grad():
            losses = [comparison.learn(batch, comparison.pair.teach(batch))["loss"] for batch in batches]
        way = {name: one.take_gradient() / each for name, one in coordinates.items()}
        square = sum(float(part.square().sum()) for part in way.values())
        if not math.isfinite(square):
            raise NumericalError("a gradient is not finite")
        whole = sum(losses) / each / square if square > 0 else 0.0

        def loss(length: float) -> float:
            try:
                for name, one in coordinates.items():
                    one.write_(-length * whole * way[name])
                return sum(comparison.look(batch, taught)["loss"] for batch, taught in watched) / len(watched)
            except NumericalError:
                if length == 0:
                    raise
                return math.inf

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


def search(loss: Callable[[float], float], before: float) -> tuple[float, float]:
    """Return the least loss that is found along a line by doubling or halving a length, and where: 0 if none is less.

    Parameters
    ----------
    loss : callable
        A function that returns the loss after a step of the given length.
    before : float
        The loss before the step, at the length 0.
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
