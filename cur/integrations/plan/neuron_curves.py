"""What removing neurons costs: the error at every number of neurons kept, and at ranks of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cur.integrations.measure.moments import Moments
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.neurons import neuron_groups
from cur.integrations.nn import dense_weight
from cur.integrations.plan.rate_distortion import Cut, LayerCurve, NeuronCurve, unit
from cur.weighted.inputs import OwnInputs, own_inputs
from cur.weighted.truncation import square_errors

__all__ = ["double_weight", "neuron_curves", "neuron_order"]

# Shares of neurons at which what is left may be factored as well. Between these the error hardly depends on the share.
_SHARES = (0.9, 0.75, 0.6)


def neuron_curves(
    model: nn.Module,
    moments: Moments,
    names: Sequence[str],
    *,
    gradients: bool,
    damping: float,
    cuts: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> list[NeuronCurve]:
    """Compute the error of every layer that reads neurons at every number of neurons kept.

    In the unit of :class:`~cur.integrations.plan.rate_distortion.LayerCurve`: the error of the outputs of the next
    layer, predicted from the neurons that are kept. For some of these numbers the curves also have the errors
    of the remaining layers at every rank: a little of both loses less than much of either.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    moments : Moments
        The statistics, as moments of layers.
    names : sequence of str
        The names of the layers to look among.
    gradients : bool
        Whether errors are weighted by output gradients.
    damping : float
        The share of its mean diagonal that is added to each moment.
    cuts : bool, default True
        Whether what is left may be of a lower rank as well, which takes most of the time.
    progress : callable, optional
        Called as ``progress(done, total)`` after every group of layers.

    Returns
    -------
    list of NeuronCurve
        A curve for each layer that reads neurons.
    """
    groups = neuron_groups(model, names)
    curves = []
    for done, (consumer, producers) in enumerate(groups.items(), start=1):
        found = neuron_order(model, moments, consumer, gradients=gradients, damping=damping)
        squares = found.square_errors
        weights = (dense_weight(model.get_submodule(name), name)[0] for name in (consumer, *producers))
        shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in weights)
        count = np.arange(1, len(squares) - 1)
        scale = unit(float(squares[0]), gradients=gradients)
        each = shapes[0][0] + sum(n for _, n in shapes[1:])
        parts: tuple[Cut, ...] = ()
        if cuts:
            parts = _cuts(model, moments, found, (consumer, *producers), gradients=gradients, damping=damping)
        curves.append(NeuronCurve(consumer, producers, shapes, scale * squares[count], count * each, parts))
        if progress is not None:
            progress(done, len(groups))
    return curves


def double_weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a dense layer in float64; a NumericalError names it if it is not finite.

    Parameters
    ----------
    model : nn.Module
        The model that the layer belongs to.
    name : str
        The name of the layer.
    """
    return finite_weight(model.get_submodule(name), name).to(torch.float64)


def neuron_order(model: nn.Module, moments: Moments, consumer: str, *, gradients: bool, damping: float) -> OwnInputs:
    """Choose the order in which the inputs of a layer, the neurons before it, are kept.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    moments : Moments
        The statistics, as moments of layers.
    consumer : str
        The name of the layer whose inputs are the neurons.
    gradients : bool
        Whether errors are weighted by output gradients.
    damping : float
        The share of its mean diagonal that is added to each moment.

    Returns
    -------
    OwnInputs
        The order, and the error at every number of neurons kept.
    """
    W = double_weight(model, consumer)
    H, G = moments.weights(consumer, W, gradients=gradients, damping=damping)
    return own_inputs(W, row_weights=H, column_weights=G)


def _cuts(
    model: nn.Module, moments: Moments, found: OwnInputs, names: Sequence[str], *, gradients: bool, damping: float
) -> tuple[Cut, ...]:
    """Compute the curves of what remains of the consumer and of its producers at some numbers of kept neurons."""
    width = len(found.order)
    kept = [found.kept(count) for count in dict.fromkeys(round(share * width) for share in _SHARES) if count > 1]
    layers: list[list[LayerCurve]] = [[] for _ in kept]
    for name in names:
        W, is_consumer = double_weight(model, name), name == names[0]
        # Of a moment of which only a part will be used no factors are needed.
        H, G = moments.weights(name, W, gradients=gradients and is_consumer, damping=damping)
        whole = float(found.square_errors[0] if is_consumer else G.apply(W, 1).square().sum())
        if gradients and not is_consumer:
            H = moments.outputs(name, W, damping=damping)
        for places, curves in zip(kept, layers, strict=True):
            if is_consumer:
                inside, rows, columns = found.truncate(len(places)), H, found.moment[places][:, places]
            else:
                inside, rows, columns = W[places], None if H is None else H[places][:, places], G
            squares = square_errors(inside, row_weights=rows, column_weights=columns)
            m, n = inside.shape
            curves.append(LayerCurve.of(name, (m, n), squares, unit(whole, gradients=gradients)))
    lost = found.square_errors * unit(float(found.square_errors[0]), gradients=gradients)
    return tuple(
        Cut(len(places), float(lost[len(places)]), tuple(curves)) for places, curves in zip(kept, layers, strict=True)
    )
