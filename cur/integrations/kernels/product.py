"""The product of a layer whose weight is on a grid: the fastest kernel for each call, with a gradient, traceable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cur.integrations.kernels import limit
from cur.integrations.kernels.choice import choose, size_class
from cur.integrations.kernels.dense import into_inputs
from cur.integrations.kernels.entry import KERNELS, Kernel
from cur.integrations.kernels.settings import KernelSettings
from cur.integrations.kernels.weight import GridWeight

__all__ = ["Product"]

Source = Callable[[], GridWeight]

_OUT = KERNELS["multiplied out"]


class Product:
    """Multiply inputs with a weight on a grid.

    What kernels hold is made in the first call with so many tokens and belongs to the process: copies and pickles have
    none of it. Where a gradient is wanted it is that of the weight multiplied out. What is traced or transformed, and
    what is on a device without kernels, is multiplied out by ordinary operations.

    Parameters
    ----------
    source : GridWeight or callable
        The weight, or what returns it whenever it is to be arranged for a kernel, and at every backward pass: a layer
        that holds its weight in fewer bytes need not hold it twice. It must not change.
    dtype : torch.dtype
        The dtype of the weight multiplied out, which descriptions are about.
    settings : KernelSettings, optional
        What may be rounded, and how much memory may be taken. By default nothing but to the dtype of the inputs, and
        half of what is available.
    """

    def __init__(
        self, source: GridWeight | Source, *, dtype: torch.dtype, settings: KernelSettings | None = None
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.settings = KernelSettings() if settings is None else settings
        self._forget()

    def _forget(self) -> None:
        self._states: dict[tuple[Any, torch.dtype, torch.device], Any] = {}
        self._runs: dict[tuple[int, torch.dtype, torch.device, int], tuple[Kernel, Any]] = {}
        self._shape: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "dtype": self.dtype, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def weight(self) -> GridWeight:
        """The weight on its grid."""
        return self.source if isinstance(self.source, GridWeight) else self.source()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply.

        Parameters
        ----------
        x : Tensor
            The inputs, of shape (..., n).
        bias : Tensor, optional
            What is added, of m entries.

        Returns
        -------
        Tensor
            The outputs, of shape (..., m), in the dtype of the inputs or that of autocast.
        """
        if not x.is_floating_point():
            raise TypeError(f"`x` must be floating-point numbers, got {x.dtype}; convert the inputs of the layer")
        if torch.compiler.is_compiling() or _is_traced(x):
            return nn.functional.linear(x, self.weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._with(x, bias)
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._with(x, bias)

    def _with(self, x: Tensor, bias: Tensor | None) -> Tensor:
        learns = x.requires_grad and torch.is_grad_enabled()
        y: Tensor = _Learning.apply(x, self) if learns else self._multiplied(x)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(y.dtype)

    def _multiplied(self, x: Tensor) -> Tensor:
        shape = self._shape
        if shape is None:
            shape = self._shape = self.weight.shape
        m, n = shape
        given = x.shape
        if given[-1:] != (n,):
            raise ValueError(f"`x` must have {n} features along its last axis, got shape {tuple(given)}")
        tokens = x.numel() // n if n else 0
        if not tokens:
            return x.new_zeros(*given[:-1], m)
        key = (size_class(tokens), x.dtype, x.device, torch.get_num_threads())
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self._chosen(*key[:3])
        one, state = found
        return one.run(state, x.reshape(tokens, n).contiguous()).view(*given[:-1], m)

    def _chosen(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Kernel, Any]:
        """Return the kernel for a number of tokens, and the weight as it has arranged it."""
        weight = self.weight
        made: dict[Any, Any] = {}

        def prepared(one: Kernel) -> Any:
            key = (one.prepare, dtype, device)
            if key in self._states:
                return self._states[key]
            if one.prepare not in made:
                with torch.inference_mode(False), torch.no_grad():
                    made[one.prepare] = one.prepare(weight, dtype)
            return made[one.prepare]

        held = {prepare for prepare, *place in self._states if place == [dtype, device]}
        if device.type == "cpu":
            one = choose(weight, dtype, size, self.settings, prepared, held=held)
        else:
            fits = _OUT.prepare in held or limit.is_left(_OUT.held(weight, dtype), device, self.settings.memory)
            one = _OUT if fits else KERNELS["rows multiplied out in turn"]
        state, key = prepared(one), (one.prepare, dtype, device)
        if key not in self._states:
            self._states[key] = state
            if one.expands:
                limit.claim(self, one.held(weight, dtype), device)
        return one, state

    def kernel(self, tokens: int) -> str:
        """Return the name of the kernel that multiplies a number of tokens, measured now if it was not yet.

        Parameters
        ----------
        tokens : int
            The number of tokens.

        Returns
        -------
        str
            The name.
        """
        return self._chosen(size_class(tokens), self.dtype, self.weight.integers.device)[0].name

    def describe(self) -> str:
        """Return a line on which kernels multiply one token and many, measured now if they were not yet."""
        one, many = (self.kernel(tokens) for tokens in (1, 1 << 30))
        return one if one == many else f"{one} for one token, {many} for many"


class _Learning(torch.autograd.Function):
    """The product with a gradient with respect to its inputs, which needs no more memory than some rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return product._multiplied(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.product.weight
        m, n = weight.shape
        with torch.autocast(gradient.device.type, enabled=False):
            return into_inputs(weight, gradient.reshape(-1, m)).reshape(*gradient.shape[:-1], n), None


def _is_traced(x: Tensor) -> bool:
    """Tell whether inputs are no plain numbers: of another class, transformed, traced, or without any."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
