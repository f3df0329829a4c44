"""Neurons between linear layers: entries of an input that depend on one output each of the layers before."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cur.integrations._forward import evaluating
from cur.integrations.arriving import Arriving
from cur.integrations.curves import Cut, LayerCurve, NeuronCurve, unit
from cur.integrations.factorize import as_json, finite_weight, interpolative_layer, plain_certificate, report_on
from cur.integrations.moments import Moments, x_norm
from cur.integrations.nn import CompressedLinear, InterpolativeLinear, KeptInputs, KeptOutputs, dense_weight
from cur.integrations.plan import PlanEntry, PlanError
from cur.integrations.report import LayerReport
from cur.own_inputs import OwnInputs, fit, own_inputs
from cur.truncation import weighted_svd

__all__ = ["FittedBefore", "fit_before", "keep_neurons", "neuron_curves", "neuron_groups"]

_TOKENS = 3

# Shares of neurons at which what is left may be factored as well. Between these the error hardly depends on the share.
_SHARES = (0.9, 0.75, 0.6)

# Units of rounding by which what is computed from fewer outputs may differ; what is wrong differs by all there is.
_ROUNDING = 16


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

    In the unit of :class:`~cur.integrations.curves.LayerCurve`: the error of the outputs of the layer behind, predicted
    from the neurons that are kept. At some of these numbers also the errors of what is left of the layers, at every
    rank: a little of both loses less than much of either.
    """
    groups = neuron_groups(model, names)
    curves = []
    for done, (consumer, producers) in enumerate(groups.items(), start=1):
        found = _order(model, moments, consumer, gradients=gradients, damping=damping)
        squares = found.square_errors
        weights = [_weight(model, name) for name in (consumer, *producers)]
        shapes = tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in weights)
        count = np.arange(1, len(squares) - 1)
        scale = unit(float(squares[0]), gradients=gradients)
        each = shapes[0][0] + sum(n for _, n in shapes[1:])
        cuts = tuple(
            _cut(found, some, dict(zip((consumer, *producers), weights, strict=True)), moments, gradients, damping)
            for some in dict.fromkeys(round(share * shapes[0][1]) for share in _SHARES)
            if 1 < some < shapes[0][1]
        )
        curves.append(NeuronCurve(consumer, producers, shapes, scale * squares[count], count * each, cuts))
        if progress is not None:
            progress(done, len(groups))
    return curves


def _weight(model: nn.Module, name: str) -> Tensor:
    return finite_weight(model.get_submodule(name), name).to(torch.float64)


def _order(model: nn.Module, moments: Moments, consumer: str, *, gradients: bool, damping: float) -> OwnInputs:
    W = _weight(model, consumer)
    H, G = moments.weights(consumer, W, gradients=gradients, damping=damping)
    return own_inputs(W, row_weights=H, column_weights=G)


def _cut(
    found: OwnInputs, count: int, weights: Mapping[str, Tensor], moments: Moments, gradients: bool, damping: float
) -> Cut:
    """Compute the curves of what a number of kept neurons leaves of layers, the first of them the one behind."""
    places = found.kept(count)
    layers: list[LayerCurve] = []
    for name, W in weights.items():
        behind = not layers
        inside = found.truncate(count) if behind else W[places]
        H, G = _weights_inside(name, W, places, moments, behind=behind, gradients=gradients, damping=damping)
        squares = weighted_svd(inside, row_weights=H, column_weights=G).square_errors
        whole = float(found.square_errors[0]) if behind else 0.0
        if not behind and not gradients:
            whole = float(torch.sum(W @ moments.inputs(name, W, damping=damping) * W))
        m, n = inside.shape
        layers.append(LayerCurve.of(name, (m, n), squares, unit(whole, gradients=gradients)))
    lost = float(found.square_errors[count]) * unit(float(found.square_errors[0]), gradients=gradients)
    return Cut(count, lost, tuple(layers))


def _weights_inside(
    name: str, W: Tensor, places: Tensor, moments: Moments, *, behind: bool, gradients: bool, damping: float
) -> tuple[Any, Any]:
    """Return the weights of the rows and columns of what kept neurons leave of a layer."""
    H, G = moments.weights(name, W, gradients=gradients, damping=damping)
    if behind:
        return H, moments.inputs(name, W, damping=damping)[places][:, places]
    return moments.outputs(name, W, damping=damping)[places][:, places] if gradients else None, G


@dataclass(frozen=True, eq=False)
class FittedBefore:
    """A layer before neurons, fitted to what arrives while those behind are still to be made.

    Attributes
    ----------
    wide : nn.Module
        Of full width. Rows that are known to be kept are already of the rank that they will have.
    inside : InterpolativeLinear or None
        These rows as a factored layer, if there is an inner rank.
    places : Tensor or None
        Which rows these are, if some layer before the neurons has an inner rank; otherwise the layer behind will say.
    """

    wide: nn.Module
    inside: InterpolativeLinear | None
    places: Tensor | None


@torch.no_grad()
def fit_before(
    model: nn.Module,
    name: str,
    entries: Mapping[str, PlanEntry],
    moments: Moments,
    arriving: Arriving,
    *,
    correction: float,
    fitted: Mapping[str, FittedBefore],
) -> FittedBefore:
    """Fit a layer before neurons to what arrives.

    Parameters
    ----------
    model : nn.Module
        The dense model; it is not changed.
    name : str
        The layer.
    entries : mapping
        Of the plan, by name.
    moments, arriving, correction
        As for :func:`~cur.integrations.factorize.factorize`.
    fitted : mapping
        By name, what this function made of the layers beside it.
    """
    entry, module = entries[name], model.get_submodule(name)
    W = _weight(model, name)
    M, wanted = arriving.problem(W, correction=correction, damping=entry.damping)
    wide = copy.deepcopy(module)
    weight, bias, _ = dense_weight(wide, name)
    weight.copy_(torch.linalg.solve(M, wanted, left=False))
    beside = {other.name for other in entries.values() if other.consumer == entry.consumer}
    if all(entries[other].inner_rank is None for other in beside):
        return FittedBefore(wide, None, None)
    places = next((fitted[other].places for other in beside if other in fitted), None)
    if places is None:
        behind = entries[entry.consumer or ""]
        found = _order(model, moments, behind.name, gradients=behind.gradients, damping=behind.damping)
        places = found.kept(behind.rank)
    inside = None
    if entry.inner_rank is not None:
        H = moments.outputs(name, W, damping=entry.damping)[places][:, places] if entry.gradients else None
        rows, some = weight[places].to(torch.float64), None if bias is None else bias[places]
        inside = _factored(rows, entry.inner_rank, H, M, dtype=weight.dtype, bias=some)
        weight[places] = inside.weight
    return FittedBefore(wide, inside, places)


def _factored(X: Tensor, rank: int, H: Any, G: Any, *, dtype: torch.dtype, bias: Tensor | None) -> InterpolativeLinear:
    near = weighted_svd(X, row_weights=H, column_weights=G).truncate(rank).interpolative()
    return interpolative_layer(near, dtype=dtype, bias=bias)


@torch.no_grad()
def keep_neurons(
    model: nn.Module,
    entry: PlanEntry,
    before: Sequence[PlanEntry],
    moments: Moments,
    *,
    arriving: Arriving | None = None,
    correction: float = 0.0,
    fitted: Mapping[str, FittedBefore] | None = None,
) -> dict[str, tuple[CompressedLinear, LayerReport]]:
    """Choose the neurons to keep, cut the layers before them, and fit the layer behind to what is left.

    What is left is brought to its inner rank, where the plan has one.

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
    fitted = fitted or {}
    places, columns, inputs = _behind(model, entry, moments, arriving, correction, fitted)
    kept = torch.zeros(entry.shape[1], dtype=torch.bool, device=columns.device)
    kept[places] = True
    done: dict[str, tuple[CompressedLinear, LayerReport]] = {}
    for part in (entry, *before):
        module = model.get_submodule(part.name)
        weight = finite_weight(module, part.name)
        _, bias, transposed = dense_weight(module, part.name)
        here, mask = places.to(weight.device), kept.to(weight.device)
        layer: CompressedLinear
        inside: Any
        if part is entry:
            inside = columns.to(weight.dtype)
            if part.inner_rank is not None:
                H, _ = moments.weights(part.name, weight.double(), gradients=part.gradients, damping=part.damping)
                inside = _factored(columns, part.inner_rank, H, inputs, dtype=weight.dtype, bias=bias)
            layer = KeptInputs.from_columns(inside, mask, bias=bias, transposed=transposed)
        else:
            some = None if bias is None else bias[here]
            early = fitted.get(part.name)
            inside = dense_weight(module if early is None else early.wide, part.name)[0][here]
            if early is not None and early.inside is not None:
                inside = early.inside
            elif part.inner_rank is not None:
                options: dict[str, Any] = {"gradients": part.gradients, "damping": part.damping}
                H, G = _weights_inside(part.name, weight.double(), here, moments, behind=False, **options)
                inside = _factored(inside.double(), part.inner_rank, H, G, dtype=weight.dtype, bias=some)
            layer = KeptOutputs.from_rows(inside, mask, bias=some, transposed=transposed)
        layer.train(module.training)
        layer.requires_grad_(next(module.parameters()).requires_grad)
        wide, near = weight.to(torch.float64), layer.weight.to(torch.float64)
        own = isinstance(layer, KeptOutputs) and part.name not in fitted and part.inner_rank is None
        done[part.name] = (
            layer,
            report_on(
                [(wide, wide - near)],
                part,
                layer,
                norm=x_norm(moments.statistics, part.name).to(wide),
                certificate=as_json(plain_certificate(wide, near, 0.0)),
                rounding=0.0,  # of the layer as it is stored
                rows=tuple(places.tolist()) if own else (),
                columns=(),  # those of the layer behind are fitted, no longer the weight's own
                seconds=time.perf_counter() - start,
            ),
        )
        start = time.perf_counter()
    return done


def _behind(
    model: nn.Module,
    entry: PlanEntry,
    moments: Moments,
    arriving: Arriving | None,
    correction: float,
    fitted: Mapping[str, FittedBefore],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the neurons to keep, the columns that are fitted to them, and the second moment under which they are."""
    if arriving is None:
        found = _order(model, moments, entry.name, gradients=entry.gradients, damping=entry.damping)
        places, columns = found.kept(entry.rank), found.truncate(entry.rank)
        return places, columns, moments.inputs(entry.name, columns, damping=entry.damping)[places][:, places]
    W = _weight(model, entry.name)
    M, cross = arriving.problem(W, correction=correction, damping=entry.damping)
    known = [early.places for early in fitted.values() if early.places is not None]
    if known:
        places = known[0].to(W.device)
    else:
        # The error of a layer of all inputs fitted to these moments, and what giving up some of them adds to it.
        best = torch.linalg.solve(M, cross, left=False)
        H, _ = moments.weights(entry.name, W, gradients=entry.gradients, damping=entry.damping)
        places = own_inputs(best, row_weights=H, column_weights=M).kept(entry.rank)
    return places, fit(cross, M, places), M[places][:, places]
