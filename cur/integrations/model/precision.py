"""The precision in which products are computed while a model runs: the fastest on its device, or the one asked for.

Processors without units for bfloat16 or float16 emulate such products, some twenty times slower than those in float32;
others compute them at several times the speed of float32. So what is fastest is measured, once for a process.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["NAMES", "PRECISIONS", "Precision", "check", "continued", "slowdown"]

PRECISIONS = ("auto", "float32", "bfloat16")
"""What can be asked for of any weights: a name, or the faster."""

NAMES = (*PRECISIONS, "float16", "float64")
"""The same, and what can be asked for of weights in that dtype alone."""

# A layer and the tokens in a pass, for the measurement: large enough for the units of a processor, and some 0.3 s where
# the products are emulated.
_INPUTS, _OUTPUTS, _TOKENS = 512, 1024, 256
_TRIES = 3

# Times of float32 from which on nothing more is measured.
_HOPELESS = 3.0

# Share of the time of float32 below which half precision is worth its rounding.
_WORTH = 0.8

_HALVES = (torch.bfloat16, torch.float16)

# Everything that multiplies matrices; what multiplies entry by entry needs no units.
_PRODUCTS = frozenset(
    getattr(place, name)
    for place, names in (
        (
            nn.functional,
            "bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d grouped_mm linear "
            "multi_head_attention_forward scaled_dot_product_attention",
        ),
        (torch, "addbmm addmm addmv addr baddbmm bmm chain_matmul dot einsum inner matmul mm mv outer tensordot"),
        (torch, "_grouped_mm _native_multi_head_attention"),
        (torch.Tensor, "__matmul__ __rmatmul__ addbmm addmm addmv baddbmm bmm dot inner matmul mm mv"),
    )
    for name in names.split()
    if hasattr(place, name)
)


@dataclass(frozen=True)
class Precision:
    """The precision of products in the passes of one model.

    Attributes
    ----------
    name : str
        ``"float32"``, ``"bfloat16"``, or the dtype of the weights.
    dtype : torch.dtype
        The dtype of the weights.
    device : torch.device
        The device that the model runs on.
    """

    name: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, asked: str = "auto") -> Precision:
        """Return the precision for a model that is in memory, at least in part; see :meth:`on`.

        Parameters
        ----------
        model : nn.Module
            The model that is to run.
        asked : str, default "auto"
            The name of the precision that is asked for.
        """
        parts = [part for part in model.parameters() if part.is_floating_point()]
        here = next((part for part in parts if not part.is_meta), None)
        dtype = parts[0].dtype if parts else torch.float32
        return cls.on(torch.device("cpu") if here is None else here.device, dtype, asked)

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, asked: str = "auto") -> Precision:
        """Return the precision for weights of a dtype on a device.

        Parameters
        ----------
        device : torch.device
            The device that the model runs on.
        dtype : torch.dtype
            The dtype of the model's weights.
        asked : str, default "auto"
            ``"float32"``, or half precision: ``"bfloat16"``, or that of the weights. ``"auto"`` is the faster of the
            two on the device: on a CPU by a measurement, see :func:`slowdown`, elsewhere by what the device reports.
            Weights in float64 keep it.

        Raises
        ------
        ValueError
            If there is no such precision for these weights, or the device cannot compute in it.
        """
        own = _name(dtype)
        half = _name(_half(dtype))
        known = ("auto", own) if dtype == torch.float64 else ("auto", "float32", half)
        if asked not in known:
            raise ValueError(
                f"`precision` must be one of {', '.join(known)} for weights in {own}, got {asked!r}; load them in "
                "another dtype for passes in another"
            )
        if asked == "auto":
            fast = "float32" if not _is_fast(device, dtype) else half
            asked = own if dtype == torch.float64 else fast
        elif asked == half != own and not _is_able(device):
            raise ValueError(f"`precision` {half!r} is not to be had on the device {str(device)!r}; ask for float32")
        return cls(asked, dtype, device)

    @classmethod
    def widest(cls, model: nn.Module) -> Precision:
        """Return the precision for what must not be rounded more than the weights are.

        Parameters
        ----------
        model : nn.Module
            The model that is to run.
        """
        own = cls.of(model).dtype
        return cls.of(model, "float32" if own in _HALVES else _name(own))

    def remark(self, asked: str = "auto") -> str:
        """Return a sentence on what the precision costs or saves on this device, for who asked for one or for auto.

        Parameters
        ----------
        asked : str, default "auto"
            The name of the precision that was asked for.
        """
        own = _name(self.dtype)
        text = f"Products in {self.name}" if self.name == own else f"Weights in {own}, products in {self.name}"
        if self.device.type != "cpu" or self.dtype == torch.float64:
            return f"{text}."
        ratio = slowdown(_half(self.dtype), torch.get_num_threads())
        times = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
        if self.name == "float32":
            return f"{text}; {_name(_half(self.dtype))} takes {times} times as long on this processor."
        if ratio < 1:
            return f"{text}, {1 / ratio:.1f} times as fast as float32 on this processor."
        remedy = "; ask for float32 or auto" if asked == self.name else ""
        return f"{text}, in {times} times the time of float32 on this processor, which emulates it{remedy}."

    def products(self, *, cache: bool = False) -> AbstractContextManager[Any]:
        """Return a context in which a model computes its products so.

        Weights and what is added up keep their dtype. In half precision products of float32 weights are those of
        PyTorch's autocast. In float32 those of weights in half precision are computed in float32 and rounded, as units
        for half precision do it.

        Parameters
        ----------
        cache : bool, default False
            Whether rounded weights that could learn are kept until the context ends, which takes half as much memory
            again and saves rounding them in every call; for weights that do not change meanwhile.
        """
        if self.name == _name(self.dtype):
            return self.exact()
        if self.dtype in _HALVES:
            return _InSingle()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.name), cache_enabled=cache)

    def exact(self) -> AbstractContextManager[Any]:
        """Return a context, inside that of :meth:`products` too, that rounds nothing which is not in half precision."""
        return torch.autocast(self.device.type, enabled=False)


class _InSingle(TorchFunctionMode):
    """Products of tensors in half precision by way of float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        halves = [part.dtype for part in _tensors([*args, *kwargs.values()]) if part.dtype in _HALVES]
        if not halves:
            return func(*args, **kwargs)
        wide = {name: _widened(value) for name, value in kwargs.items()}
        return _narrowed(func(*map(_widened, args), **wide), halves[0])


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in _HALVES else value
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


def _narrowed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    return type(value)(_narrowed(part, dtype) for part in value) if type(value) in (list, tuple) else value


def check(asked: str) -> None:
    """Raise a ValueError if there is no precision of a name, whatever the weights; before they are loaded.

    Parameters
    ----------
    asked : str
        The name of the precision that is asked for.

    Raises
    ------
    ValueError
        If there is no precision of that name.
    """
    if asked not in NAMES:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {asked!r}")


def continued(asked: str, kept: str | None, where: Path) -> str:
    """Return the precision in which a run goes on: the one in which it was begun.

    Parameters
    ----------
    asked : str
        The precision that is asked for now.
    kept : str or None
        The precision that an unfinished run was begun in; None if there is none, or it does not say.
    where : Path
        The place of that run, for the error.

    Raises
    ------
    ValueError
        If another precision is named than the run was begun in.
    """
    if kept is None or asked == kept:
        return asked
    if asked == "auto":
        return kept
    raise ValueError(
        f"`precision` must be {kept} or auto, got {asked!r}: {where} holds a run in {kept}, which goes on in that; "
        f"remove {where} to begin anew"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _half(dtype: torch.dtype) -> torch.dtype:
    """Return the half precision that is weighed against float32 for weights of a dtype."""
    return dtype if dtype in _HALVES else torch.bfloat16


def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether half precision is faster than float32 for weights of a dtype."""
    half = _half(dtype)
    if device.type in ("cpu", "meta"):
        return slowdown(half, torch.get_num_threads()) < _WORTH
    if device.type not in ("cuda", "mps") and dtype == half:  # whoever put half precision there knows the device
        return True
    return half == torch.float16 or _is_able(device)


def _is_able(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16, by what it reports; CPUs all do, some of them slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type in ("cpu", "meta"):
        return True
    reports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return reports is not None and bool(reports())


@functools.cache
def slowdown(half: torch.dtype, threads: int | None = None) -> float:
    """Measure how many times as long as in float32 a product with its gradient takes in half precision on this CPU.

    Once for a process and a number of threads: the best of three, in some hundredths of a second, up to a third of one
    where half precision is emulated.

    Parameters
    ----------
    half : torch.dtype
        The dtype to time: bfloat16 or float16.
    threads : int, optional
        Number of threads, for the record alone: that of PyTorch counts.

    Returns
    -------
    float
        Below 1 where half precision is faster. From three on it is a lower limit of one try.
    """
    # Rounds products in float32 to bfloat16 on some processors, and would be measured in its place.
    rounding = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            single = _shortest(_product(torch.float32))
            return _shortest(_product(half), enough=_HOPELESS * single) / single
    finally:
        torch.set_float32_matmul_precision(rounding)


def _shortest(work: Callable[[], None], enough: float = math.inf) -> float:
    """Return the least time of some tries; no more of them once the second takes longer than `enough`."""
    work()  # chooses kernels and takes memory
    best = math.inf
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
        if best > enough:
            break
    return best


def _product(dtype: torch.dtype) -> Callable[[], None]:
    x = torch.ones(_TOKENS, _INPUTS, dtype=dtype, requires_grad=True)
    weight = torch.ones(_OUTPUTS, _INPUTS, dtype=dtype, requires_grad=True)
    gradient = torch.ones(_TOKENS, _OUTPUTS, dtype=dtype)

    def work() -> None:
        torch.autograd.grad(nn.functional.linear(x, weight), (x, weight), gradient)

    return work
