"""What a kernel says of itself: which weights it takes, how it arranges them, and whether it rounds its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cur.integrations.kernels.weight import GridWeight

__all__ = ["KERNELS", "Kernel", "kernel"]

KERNELS: dict[str, Kernel] = {}
"""All kernels by name, in the order in which they were defined."""


@dataclass(frozen=True)
class Kernel:
    """One way of multiplying with a weight on a grid, on a CPU.

    Attributes
    ----------
    name : str
        The name, which descriptions and the file of times have.
    run : callable
        The product: what `prepare` returned and inputs of shape (t, n), contiguous, give outputs of shape (t, m) in the
        dtype of the inputs.
    prepare : callable
        Arranges a weight for a dtype of inputs, once. Kernels that share this function share what it returns.
    takes : callable
        Tells whether the kernel can multiply a weight with inputs of a dtype.
    held : callable
        The bytes that `prepare` would hold for a weight and a dtype.
    exact : bool
        Whether nothing is rounded but to the dtype of the inputs, or a wider one; otherwise inputs are rounded to eight
        bits.
    plain : bool
        Whether it is an ordinary product with what was multiplied out, which needs no kernel.
    expands : bool
        Whether the whole weight is held multiplied out, for which there is a limit of memory.
    most : int or None
        The largest number of tokens that the kernel is tried for; None for any.
    needs : tuple of str
        Packages beside torch, by the names they are imported by.
    """

    name: str
    run: Callable[[Any, Tensor], Tensor]
    prepare: Callable[[GridWeight, torch.dtype], Any]
    takes: Callable[[GridWeight, torch.dtype], bool]
    held: Callable[[GridWeight, torch.dtype], int]
    exact: bool = True
    plain: bool = False
    expands: bool = False
    most: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether the packages that the kernel needs can be imported."""
        return all(_is_there(name) for name in self.needs)


@functools.cache
def _is_there(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:  # also of one that does not go with the other packages that are installed
        return False
    return True


def kernel(name: str, **facts: Any) -> Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]:
    """Make a product known as a kernel; a decorator of its function.

    Parameters
    ----------
    name : str
        The name of the kernel.
    **facts
        The other fields of :class:`Kernel`.

    Returns
    -------
    callable
        The decorator, which returns the function as it is.
    """

    def enter(run: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        KERNELS[name] = Kernel(name, run, **facts)
        return run

    return enter
