"""What FWSVD, ASVD and AWQ need to know of a model: squared gradients of weights, and magnitudes of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Diagonals", "magnitudes", "measure"]


@dataclass(frozen=True)
class Diagonals:
    """By the name of a layer, float64.

    Attributes
    ----------
    fisher : dict of str to Tensor, shape (m,)
        Sums over the rows of the weight of the squares of the loss's gradients, their mean over the windows.
    magnitude : dict of str to Tensor, shape (n,)
        Mean magnitude of every input feature.
    """

    fisher: dict[str, Tensor]
    magnitude: dict[str, Tensor]


def measure(
    model: nn.Module, windows: Tensor, names: Sequence[str], *, progress: Callable[[int, int], Any] | None = None
) -> Diagonals:
    """Run a causal language model forward and back over windows (count, length), one at a time."""
    layers = {name: model.get_submodule(name) for name in names}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fisher: dict[str, Any] = dict.fromkeys(names, 0.0)
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with _watched(layers, len(windows)) as magnitude:
            for done, window in enumerate(windows.split(1), start=1):
                model(input_ids=window, labels=window, use_cache=False).loss.backward()
                for name, layer in layers.items():
                    fisher[name] = fisher[name] + layer.weight.grad.square().sum(1).double() / len(windows)
                    layer.weight.grad = None
                if progress is not None:
                    progress(done, len(windows))
    finally:
        for parameter, required in learning.items():
            parameter.requires_grad_(required)
    return Diagonals(fisher, magnitude)


@torch.no_grad()
def magnitudes(
    model: Any, windows: Tensor, names: Sequence[str], *, progress: Callable[[int, int], Any] | None = None
) -> dict[str, Tensor]:
    """Return the mean magnitude of every input feature of layers, by a pass over windows (count, length)."""
    with _watched({name: model.get_submodule(name) for name in names}, len(windows)) as magnitude:
        for done, window in enumerate(windows.split(1), start=1):
            model.base_model(input_ids=window, use_cache=False)
            if progress is not None:
                progress(done, len(windows))
    return magnitude


@contextmanager
def _watched(layers: Mapping[str, nn.Module], windows: int) -> Iterator[dict[str, Any]]:
    """Yield mean magnitudes of the inputs of layers, which passes of one window each add up."""
    magnitude: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            magnitude[name] = magnitude[name] + args[0].detach().abs().flatten(0, -2).double().mean(0) / windows

        return add

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield magnitude
    finally:
        for handle in handles:
            handle.remove()
