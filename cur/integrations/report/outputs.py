"""How much the output of each compressed layer changes, beside the bound for Lipschitz activations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from cur._lib.array import unit_roundoff
from cur.bounds import LIPSCHITZ, layer_output_bound
from cur.integrations.measure.spectra import EXACT_UP_TO, singular_values
from cur.integrations.model.hooks import Hook, hooked
from cur.integrations.model.masks import Masks, token_rows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import body, evaluating, model_inputs, run
from cur.integrations.nn import CompressedLinear, dense_weight

__all__ = ["OutputChange", "activation_of", "output_changes", "spectral_norm_bound"]

# Rows of a large matrix, or tokens, that are compared at once.
_ROWS = 128

# Names of `cur.bounds.LIPSCHITZ` by the classes that compute them. Quick GELU, x s(1.702 x), is SiLU on another scale.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.QuickGELUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    nn.Tanh: "tanh",
}


@dataclass(frozen=True, kw_only=True)
class OutputChange:
    """How much the output of one layer, after its activation, changed on a batch of text.

    Root mean squares over the tokens of 2-norms of vectors.

    Attributes
    ----------
    activation : str
        The activation that follows the layer, a key of :data:`cur.bounds.LIPSCHITZ`; ``"identity"`` if none is known.
    size : float
        The root mean square of the dense layer's output.
    change : float
        The measured root mean square of the difference of the outputs.
    bound : float
        The bound of the theorem on that difference: Lipschitz constant times spectral norm of the error of the weight
        times the root mean square of the input's norm.
    worst : float
        Largest change of a token over its own bound.
    """

    activation: str
    size: float
    change: float
    bound: float
    worst: float


def activation_of(module: nn.Module) -> str | None:
    """Return the key of :data:`cur.bounds.LIPSCHITZ` that an activation module has, None for any other module.

    Parameters
    ----------
    module : nn.Module
        The module to look at.
    """
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(module))


def spectral_norm_bound(E: Tensor) -> float:
    """Bound the 2-norm of a matrix, rounding included: by its singular values, or for large ones by ``||E||_F``.

    Parameters
    ----------
    E : Tensor
        The matrix, of any floating dtype.

    Returns
    -------
    float
        A bound that the 2-norm does not exceed.
    """
    E = E.to(torch.float64)
    total = float(torch.linalg.norm(E))
    if min(E.shape) > EXACT_UP_TO:
        return total
    largest = float(singular_values(E)[0])
    # Errors of the product and of the eigenvalue, both of the order of the unit roundoff times ||E||_F^2.
    rounding = 4 * (max(E.shape) + min(E.shape)) * unit_roundoff(E.dtype, E) * total**2
    return min(math.sqrt(largest**2 + rounding), total * (1 + 1e-12))


def _error_bound(W: Tensor, other: Tensor) -> float:
    """Bound the 2-norm of a difference of weights; a large one is never in memory in double precision."""
    if min(W.shape) <= EXACT_UP_TO:
        return spectral_norm_bound(W.double() - other.double())
    parts = zip(W.split(_ROWS), other.split(_ROWS), strict=True)  # type: ignore[no-untyped-call]
    return math.hypot(*(float(torch.linalg.norm(one.double() - two.double())) for one, two in parts))


def output_changes(
    model: nn.Module, layers: Mapping[str, CompressedLinear], batch: Mapping[str, Any]
) -> dict[str, OutputChange]:
    """Measure the change of every layer's output, each on the inputs that the dense model gives it.

    Parameters
    ----------
    model : nn.Module
        The dense model; not changed.
    layers : mapping
        The replacements of its layers, by name; those that keep some neurons have other inputs or outputs and are
        passed over.
    batch : mapping
        Keyword arguments of the model, as for :func:`~cur.integrations.collect`.

    Returns
    -------
    dict
        The changes by the name of the layer; one that the batch did not reach has no entry.
    """
    layers = {name: layer for name, layer in layers.items() if layer.by_itself}
    inner = body(model)
    masks = Masks(model)
    inputs = model_inputs(inner, batch)
    watch = _Watch(model, layers, masks)
    with hooked([*masks.hooks(), *watch.hooks()]), evaluating(model), Precision.widest(model).products():
        masks.start(inputs, batch)
        run(inner, inputs)
    return {name: sums.result() for name, sums in watch.sums.items() if sums.tokens}


class _Sums:
    """Squares summed over the tokens of one layer."""

    def __init__(self, spectral: float) -> None:
        self.spectral = spectral
        self.activation = "identity"
        self.tokens = 0
        self.inputs = self.outputs = self.change = self.worst = 0.0

    def add(self, x: Tensor, y: Tensor, other: Tensor) -> None:
        self.tokens += len(x)
        # All tokens of a batch in double precision at once took more memory than the whole calibration.
        for parts in zip(*(whole.split(_ROWS) for whole in (x, y, other)), strict=True):  # type: ignore[no-untyped-call]
            self._add(*(part.double() for part in parts))

    def _add(self, x: Tensor, y: Tensor, other: Tensor) -> None:
        norms, moved = torch.linalg.norm(x, dim=1), torch.linalg.norm(y - other, dim=1)
        self.inputs += float(norms.square().sum())
        self.outputs += float(torch.linalg.norm(y)) ** 2
        self.change += float(moved.square().sum())
        bounds = LIPSCHITZ[self.activation] * self.spectral * norms
        ratios = torch.where(bounds > 0, moved / bounds, torch.zeros_like(moved))
        self.worst = max(self.worst, float(ratios.max()))

    def result(self) -> OutputChange:
        size = math.sqrt(self.inputs / self.tokens)
        return OutputChange(
            activation=self.activation,
            size=math.sqrt(self.outputs / self.tokens),
            change=math.sqrt(self.change / self.tokens),
            bound=layer_output_bound(self.spectral, size, activation=self.activation),
            worst=self.worst,
        )


class _Watch:
    """Watches dense layers and activations: one that is called with the very output of a layer follows it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, CompressedLinear], masks: Masks) -> None:
        self.model = model
        self.layers = layers
        self.masks = masks
        self.sums = {
            name: _Sums(_error_bound(dense_weight(model.get_submodule(name), name)[0].detach(), layer.matrix.detach()))
            for name, layer in layers.items()
        }
        # Of the layer that was called last: the output, and what is added up if no activation takes it.
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.latest: tuple[weakref.ref[Tensor], str, Tensor, Tensor, Tensor] | None = None

    def hooks(self) -> list[Hook]:
        watched: list[Hook] = []
        for name, layer in self.layers.items():
            module = self.model.get_submodule(name)
            watched += [(module, "before", self._called), (module, "after", self._layer(name, layer))]
        for part in self.model.modules():
            if (kind := activation_of(part)) is not None:
                watched += [(part, "before", self._activation(kind)), (part, "after", self._activated)]
        return [*watched, (body(self.model), "after", lambda *_: self._settle())]

    def _called(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.call = args, options

    def _layer(self, name: str, layer: CompressedLinear) -> Any:
        def after(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            self._settle()
            args, options = self.call
            x = args[0] if args else next(iter(options.values()))
            if (vectors := layer.vectors(x)) is None:
                return
            mask = self.masks.of(module, x)
            rows = [token_rows(part, mask, name) for part in (vectors, output, layer(x))]
            self.latest = (weakref.ref(output), name, rows[0], rows[1], rows[2])

        return after

    def _activation(self, kind: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            if self.latest is not None and args and self.latest[0]() is args[0]:
                self.sums[self.latest[1]].activation = kind
            else:
                self._settle()

        return before

    def _activated(self, module: nn.Module, _: tuple[Any, ...], __: Tensor) -> None:
        if self.latest is None or self.sums[self.latest[1]].activation == "identity":
            return
        name, (x, y, other) = self.latest[1], self.latest[2:]
        self.latest = None
        # Not called as a module, whose hooks would see it.
        self.sums[name].add(x, module.forward(y), module.forward(other))

    def _settle(self) -> None:
        """Add up the latest layer, which no activation followed."""
        if self.latest is not None:
            name, (x, y, other) = self.latest[1], self.latest[2:]
            self.latest = None
            self.sums[name].add(x, y, other)
