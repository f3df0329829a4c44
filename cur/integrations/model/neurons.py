"""Neurons between linear layers: entries of an input that depend on one output each of the layers before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.model.hooks import Hook, hooked
from cur.integrations.model.running import evaluating
from cur.integrations.nn import dense_weight

__all__ = ["neuron_groups"]

_TOKENS = 3

# Units of rounding by which what is computed from fewer outputs may differ. Even in half precision, where that is much:
# that nothing but the neurons moves has been found without any tolerance by then.
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
        The model, which is not changed.
    names : sequence of str
        The names of the linear layers to look among.

    Returns
    -------
    dict
        The layers that produce the neurons, by the name of the next layer, which reads them; a neuron can be removed
        from all of these together.
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

    def widened(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        seen.append(args[0])
        return (args[0].new_zeros(*args[0].shape[:-1], width),), options

    def silenced(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    layer = model.get_submodule(consumer)
    watched: list[Hook] = [(model.get_submodule(name), "after", hook) for name, hook in hooks.items()]
    try:
        with hooked([*watched, (layer, "before", widened), (layer, "after", silenced)]):
            output = parent(hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  (whatever a module says that is not called so)
        return None
    once = len(seen) == 1 and seen[0].shape[:-1].numel() == _TOKENS
    return _Call(seen[0], output) if once and isinstance(output, Tensor) else None
