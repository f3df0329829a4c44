"""Neurons between linear layers: entries of an input that depend on one output each of the layers before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cur.integrations._forward import evaluating
from cur.integrations.arriving import Arriving
from cur.integrations.factorize import as_json, finite_weight, plain_certificate, report_on
from cur.integrations.moments import Moments, x_norm
from cur.integrations.nn import CompressedLinear, KeptInputs, KeptOutputs, dense_weight
from cur.integrations.plan import PlanEntry, PlanError
from cur.integrations.report import LayerReport
from cur.own_inputs import fit, own_inputs

__all__ = ["NeuronCurve", "keep_neurons", "neuron_curves", "neuron_groups"]

_TOKENS = 3

# Units of rounding by which what is computed from fewer outputs may differ; what is wrong differs by all there is.
_ROUNDING = 16


@dataclass(frozen=True, eq=False)
class NeuronCurve:
    """What giving up neurons offers to a budget, as one more form that several layers can take together.

    Attributes
    ----------
    consumer : str
        The layer whose inputs are the neurons.
    producers : tuple of str
        The layers that have one output for each of them.
    shapes : tuple of (int, int)
        Outputs and inputs of the consumer, and of the producers in order.
    errors : array
        Error of the consumer's outputs with 1, 2, ... neurons kept, fewer than all.
    costs : array
        Numbers stored in all these layers at the same.
    """

    consumer: str
    producers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    errors: np.ndarray[Any, Any]
    costs: np.ndarray[Any, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, the consumer first."""
        return self.consumer, *self.producers


def neuron_groups(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Find layers with neurons between them, among named ones.

    No architecture is known: in every module that holds some of the layers directly and can be called with one hidden
    state, the outputs of a layer are changed at some places, and the input of another that changes at these places, and
    nowhere else, has its neurons there. Gated and plain feed-forward networks are found, whatever their activation;
    heads of attention are not, since a token's output there depends on more than one entry.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    names : sequence of str
        Linear layers.

    Returns
    -------
    dict
        By the name of the layer behind the neurons, the layers before them, all of which are needed to give one up.
    """
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    with evaluating(model):
        for parent, layers in inside.items():
            module = model.get_submodule(parent)
            if isinstance(module, nn.ModuleList):  # cannot be called
                continue
            sides = {name: tuple(dense_weight(model.get_submodule(name), name)[0].shape) for name in layers}
            for consumer in layers:
                width = sides[consumer][1]
                before = [name for name in layers if name != consumer and sides[name][0] == width]
                if before and taken.isdisjoint((consumer, *before)) and _are_neurons(model, module, consumer, before):
                    found[consumer] = tuple(before)
                    taken.update((consumer, *before))
    return found


def _are_neurons(model: nn.Module, parent: nn.Module, consumer: str, producers: Sequence[str]) -> bool:
    """Tell whether outputs of the producers are seen in the same entries of the consumer's input, and nowhere else.

    And whether the module runs, and gives the same, where some of these outputs are cut away.
    """
    weight = dense_weight(model.get_submodule(producers[0]), producers[0])[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, weight.shape[1], generator=generator).to(weight)
    width = weight.shape[0]
    places = torch.arange(width, device=weight.device) % 2 == 0

    def changed(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where(places.to(output.device), output + 1.0, output)

    def cut(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[..., places.to(output.device)]

    plain = _called(model, parent, hidden, consumer, width, {})
    if plain is None or plain.neurons.shape[-1] != width:
        return False
    for name in producers:
        other = _called(model, parent, hidden, consumer, width, {name: changed})
        if other is None or not torch.equal(other.beside, plain.beside):
            return False
        moved = (other.neurons != plain.neurons).flatten(0, -2).any(0)
        # An activation may swallow the change of a neuron, so not all need to have moved.
        if bool(moved[~places].any()) or int(moved.sum()) < int(places.sum()) // 2:
            return False
    less = _called(model, parent, hidden, consumer, width, dict.fromkeys(producers, cut))
    return less is not None and _same(less.neurons, plain.neurons[..., places]) and _same(less.beside, plain.beside)


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether tensors are equal but for the rounding of products of another shape, which some processors have."""
    allowed = _ROUNDING * torch.finfo(other.dtype).eps * float(other.abs().max())
    return one.shape == other.shape and bool(((one - other).abs() <= allowed).all())


@dataclass(frozen=True, eq=False)
class _Call:
    """What a layer was called with, and what its module gives if the layer itself gives zeros."""

    neurons: Tensor
    beside: Tensor


def _called(
    model: nn.Module,
    parent: nn.Module,
    hidden: Tensor,
    consumer: str,
    width: int,
    hooks: Mapping[str, Callable[..., Tensor]],
) -> _Call | None:
    """Call a module, with forward hooks on some of its layers.

    None if the module cannot be called with one tensor, gives more than one, or does not call the consumer once.
    """
    seen: list[Tensor] = []

    def widened(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0].new_zeros(*args[0].shape[:-1], width),)

    def silenced(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    handles.append(model.get_submodule(consumer).register_forward_pre_hook(widened))
    handles.append(model.get_submodule(consumer).register_forward_hook(silenced))
    try:
        output = parent(hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  (whatever a module says that is not called so)
        return None
    finally:
        for handle in handles:
            handle.remove()
    once = len(seen) == 1 and seen[0].shape[:-1].numel() == _TOKENS
    return _Call(seen[0], output) if once and isinstance(output, Tensor) else None


def neuron_curves(
    model: nn.Module,
    moments: Moments,
    names: Sequence[str],
    *,
    gradients: bool,
    damping: float,
    progress: Callable[[int, int], object] | None = None,
) -> list[NeuronCurve]:
    """Compute, for every layer behind neurons, the error at every number of neurons kept.

    In the unit of :class:`~cur.integrations.budget.LayerCurve`: the error of the outputs of the layer behind, predicted
    from the neurons that are kept.
    """
    groups = neuron_groups(model, names)
    curves = []
    for done, (consumer, producers) in enumerate(groups.items(), start=1):
        squares = _order(model, moments, consumer, gradients=gradients, damping=damping).square_errors
        weights = (dense_weight(model.get_submodule(name), name)[0] for name in (consumer, *producers))
        shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in weights)
        count = np.arange(1, len(squares) - 1)
        scale = 0.5 if gradients else 1.0 / (float(squares[0]) or 1.0)
        each = shapes[0][0] + sum(n for _, n in shapes[1:])
        curves.append(NeuronCurve(consumer, producers, shapes, scale * squares[count], count * each))
        if progress is not None:
            progress(done, len(groups))
    return curves


def _order(model: nn.Module, moments: Moments, consumer: str, *, gradients: bool, damping: float) -> Any:
    W = finite_weight(model.get_submodule(consumer), consumer).to(torch.float64)
    H, G = moments.weights(consumer, W, gradients=gradients, damping=damping)
    return own_inputs(W, row_weights=H, column_weights=G)


@torch.no_grad()
def keep_neurons(
    model: nn.Module,
    entry: PlanEntry,
    before: Sequence[PlanEntry],
    moments: Moments,
    *,
    arriving: Arriving | None = None,
    correction: float = 0.0,
    fitted: Mapping[str, nn.Module] | None = None,
) -> dict[str, tuple[CompressedLinear, LayerReport]]:
    """Choose the neurons to keep, cut the layers before them, and fit the layer behind to what is left.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is not changed.
    entry : PlanEntry
        Of the layer behind.
    before : sequence of PlanEntry
        Of the layers before.
    moments, arriving, correction
        As for :func:`~cur.integrations.factorize.factorize`, of the layer behind.
    fitted : mapping, optional
        By name, layers before of full width that were fitted to what arrives; without, their own rows are kept.

    Returns
    -------
    dict
        By name, what stands for each layer and what was lost of its weight; the entries of the one behind are fitted.

    Raises
    ------
    NumericalError
        If a weight is NaN or infinite.
    ValueError
        If the statistics do not cover the layer behind.
    PlanError
        If the layers before are not all that give its neurons, or others.
    """
    start = time.perf_counter()
    names = [part.name for part in before]
    if set(neuron_groups(model, [entry.name, *names]).get(entry.name, ())) != set(names) or not names:
        raise PlanError(
            f"the plan gives up neurons between {', '.join(names) or 'no layer'} and {entry.name}, which are not the "
            "layers around some; cut all of the layers that give them, or none"
        )
    W = finite_weight(model.get_submodule(entry.name), entry.name).to(torch.float64)
    H, G = moments.weights(entry.name, W, gradients=entry.gradients, damping=entry.damping)
    if arriving is None:
        found = own_inputs(W, row_weights=H, column_weights=G)
        places, columns = found.kept(entry.rank), found.truncate(entry.rank)
    else:
        M, cross = arriving.problem(W, correction=correction, damping=entry.damping)
        # The error of a layer of all inputs fitted to these moments, and what giving up some of them adds to it.
        best = torch.linalg.solve(M, cross, left=False)
        places = own_inputs(best, row_weights=H, column_weights=M).kept(entry.rank)
        columns = fit(cross, M, places)
    kept = torch.zeros(W.shape[1], dtype=torch.bool, device=W.device)
    kept[places] = True
    indices = tuple(places.tolist())
    done: dict[str, tuple[CompressedLinear, LayerReport]] = {}
    for part in (entry, *before):
        module = model.get_submodule(part.name)
        weight = finite_weight(module, part.name)
        _, bias, transposed = dense_weight(module, part.name)
        here, mask = places.to(weight.device), kept.to(weight.device)
        layer: CompressedLinear
        if part is entry:
            layer = KeptInputs.from_columns(columns.to(weight.dtype), mask, bias=bias, transposed=transposed)
        else:
            some = None if bias is None else bias[here]
            whole = dense_weight((fitted or {}).get(part.name, module), part.name)[0]
            layer = KeptOutputs.from_rows(whole[here], mask, bias=some, transposed=transposed)
        layer.train(module.training)
        layer.requires_grad_(next(module.parameters()).requires_grad)
        wide, near = weight.to(torch.float64), layer.weight.to(torch.float64)
        done[part.name] = (
            layer,
            report_on(
                [(wide, wide - near)],
                part,
                layer,
                norm=x_norm(moments.statistics, part.name).to(wide),
                certificate=as_json(plain_certificate(wide, near, 0.0)),
                rounding=0.0,  # nothing is multiplied out
                rows=() if part is entry or part.name in (fitted or {}) else indices,
                columns=(),  # those of the layer behind are fitted, no longer the weight's own
                seconds=time.perf_counter() - start,
            ),
        )
        start = time.perf_counter()
    return done
