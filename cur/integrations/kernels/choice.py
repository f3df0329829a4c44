"""Which kernel multiplies: the fastest on this machine for a shape, a grid, a dtype and a number of tokens.

Of kernels that take about as long the one that holds the least memory is chosen. Times are measured once for a case and
kept, in the process and in a file.
"""

from __future__ import annotations

import functools
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cur._lib.errors import warn
from cur.integrations.kernels import limit, times
from cur.integrations.kernels.entry import KERNELS, Kernel
from cur.integrations.kernels.settings import KernelSettings
from cur.integrations.kernels.weight import GridWeight

__all__ = ["SIZES", "around", "best", "candidates", "choose", "size_class"]

SIZES = (1, 4, 16, 64, 128)
"""Numbers of tokens that products are timed with. A number of tokens belongs to the least of these that is no smaller,
or to the last."""

# A kernel that holds more memory is at least so many times faster.
_WORTH = 1.1

_known: dict[str, dict[str, float]] | None = None
_lock = threading.RLock()
_said: set[str] = set()


def size_class(tokens: int) -> int:
    """Return the number of tokens that is timed for a number of tokens.

    Parameters
    ----------
    tokens : int
        The number of tokens.
    """
    return SIZES[min(bisect_left(SIZES, tokens), len(SIZES) - 1)]


def candidates(
    weight: GridWeight,
    dtype: torch.dtype,
    size: int,
    settings: KernelSettings,
    kernels: Iterable[Kernel] | None = None,
    held: Collection[Any] = (),
) -> list[Kernel]:
    """Return the kernels that can multiply and may.

    Parameters
    ----------
    weight : GridWeight
        The weight that is multiplied with.
    dtype : torch.dtype
        The dtype of the inputs.
    size : int
        The number of tokens.
    settings : KernelSettings
        What may be rounded, and how much memory may be taken.
    kernels : iterable of Kernel, optional
        The kernels to choose among. By default all that are known.
    held : collection of callable, default ()
        The functions by which the weight has been arranged already, which take no more memory.

    Returns
    -------
    list of Kernel
        One at least, in the order in which they are known.
    """
    return [
        one
        for one in (KERNELS.values() if kernels is None else kernels)
        if (one.exact or settings.activations == "int8")
        and (one.most is None or size <= one.most)
        and one.takes(weight, dtype)
        and one.is_here
        and (
            not one.expands
            or one.prepare in held
            or limit.is_left(one.held(weight, dtype), weight.integers.device, settings.memory)
        )
    ]


def choose(
    weight: GridWeight,
    dtype: torch.dtype,
    size: int,
    settings: KernelSettings,
    prepared: Callable[[Kernel], Any],
    kernels: Iterable[Kernel] | None = None,
    held: Collection[Any] = (),
) -> Kernel:
    """Return the kernel for a number of tokens.

    Parameters
    ----------
    weight : GridWeight
        The weight that is multiplied with.
    dtype : torch.dtype
        The dtype of the inputs.
    size : int
        The number of tokens, one of :data:`SIZES`.
    settings : KernelSettings
        What may be rounded, and how much memory may be taken.
    prepared : callable
        Returns the weight as a kernel has arranged it.
    kernels : iterable of Kernel, optional
        The kernels to choose among. By default all that are known.
    held : collection of callable, default ()
        The functions by which the weight has been arranged already, which take no more memory.

    Returns
    -------
    Kernel
        The chosen kernel.
    """
    kernels = list(KERNELS.values() if kernels is None else kernels)
    able = candidates(weight, dtype, size, settings, kernels, held)
    _say_what_is_missing(weight, dtype, able, kernels)
    if len(able) == 1:
        return able[0]
    with _lock:
        found = _times(weight, dtype, size, able, prepared)
    return best(able, found, weight, dtype)


def best(kernels: Iterable[Kernel], found: Mapping[str, float], weight: GridWeight, dtype: torch.dtype) -> Kernel:
    """Return the kernel that holds the least memory among those that take about as long as the fastest.

    Parameters
    ----------
    kernels : iterable of Kernel
        The kernels to choose among.
    found : mapping of str to float
        The seconds of each kernel by its name.
    weight : GridWeight
        The weight that is multiplied with.
    dtype : torch.dtype
        The dtype of the inputs.

    Returns
    -------
    Kernel
        The chosen kernel.
    """
    kernels = list(kernels)
    fastest = min(found[one.name] for one in kernels)
    near = [one for one in kernels if found[one.name] <= _WORTH * fastest]
    return min(near, key=lambda one: (one.held(weight, dtype), found[one.name]))


def around(
    one: Kernel, weight: GridWeight, dtype: torch.dtype, size: int, state: Any = None
) -> Sequence[Callable[[Tensor], Tensor]]:
    """Return the product of a kernel with each of the copies of a weight that it is timed with.

    Parameters
    ----------
    one : Kernel
        The kernel to be timed.
    weight : GridWeight
        The weight that is multiplied with.
    dtype : torch.dtype
        The dtype of the inputs.
    size : int
        The number of tokens.
    state : object, optional
        The first copy, as the kernel has arranged it.

    Returns
    -------
    sequence of callable
        Functions of the inputs. A copy is made when its function is asked for.
    """
    count = times.copies(one.held(weight, dtype), size)
    return _Copies(one, weight, dtype, count, [] if state is None else [state])


def _times(
    weight: GridWeight, dtype: torch.dtype, size: int, able: list[Kernel], prepared: Callable[[Kernel], Any]
) -> dict[str, float]:
    global _known
    if _known is None:
        _known = times.read()
    case = _case(weight, dtype, size)
    found = _known.get(case, {})
    if any(one.name not in found for one in able):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, weight.shape[1], generator=generator).to(dtype)
        runs = {one.name: around(one, weight, dtype, size, prepared(one)) for one in able}
        # Those of kernels that are no candidates now stay: for another layer they may be.
        found = {**found, **times.measured(runs, x)}
        _known[case] = found
        times.write(case, found)
    return found


class _Copies(Sequence[Callable[[Tensor], Tensor]]):
    """The product of a kernel with each of some copies of a weight, made when they are asked for."""

    def __init__(self, one: Kernel, weight: GridWeight, dtype: torch.dtype, count: int, states: list[Any]) -> None:
        self.one, self.weight, self.dtype, self.length, self.states = one, weight, dtype, count, states

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if index >= self.length:
            raise IndexError(index)
        with torch.inference_mode(False), torch.no_grad():
            while len(self.states) <= index:
                self.states.append(self.one.prepare(self.weight, self.dtype))
        return functools.partial(self.one.run, self.states[index])


def _case(weight: GridWeight, dtype: torch.dtype, size: int) -> str:
    m, n = weight.shape
    group = "rows" if weight.group == n else f"groups of {weight.group}"
    return (
        f"{m} x {n}, {weight.bits} bits, {group}, {'symmetric' if weight.is_symmetric else 'with zeros'}, "
        f"{str(dtype).removeprefix('torch.')}, {size} tokens, {torch.get_num_threads()} threads"
    )


def _say_what_is_missing(weight: GridWeight, dtype: torch.dtype, able: list[Kernel], kernels: list[Kernel]) -> None:
    """Warn, once for each package, where nothing but multiplying out is left, and a package would change that."""
    if not all(one.plain for one in able if one.exact):
        return
    for one in kernels:
        missing = [name for name in one.needs if not one.is_here]
        if missing and one.exact and one.takes(weight, dtype) and not _said.issuperset(missing):
            _said.update(missing)
            warn(
                f"weights in few bits are multiplied out here, as {', '.join(missing)} cannot be imported, whose "
                'kernels read them as they are; type: pip install "cur-decomposition[kernels]"',
                UserWarning,
            )
