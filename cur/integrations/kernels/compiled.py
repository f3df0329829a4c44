"""Products in single precision by loops that numba compiles, of weights in bytes and in half bytes.

They read a fourth or an eighth of what the dense product reads, and round nothing that it does not round.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.kernels.dense import BLOCK
from cur.integrations.kernels.entry import kernel
from cur.integrations.kernels.weight import GridWeight

__all__ = ["Rows"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Entries below which handing work to another thread takes longer than the work.
_SHARE = 1 << 20

# Rows that are multiplied out at a time, in entries.
_BLOCK = 4 * BLOCK


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight as the loops read it: rows and groups filled up with integers that stand for 0.

    Attributes
    ----------
    outputs, inputs : int
        The sizes m and n of the weight.
    kind : str
        How integers are stored: ``"signed"`` and ``"unsigned"`` bytes, or ``"halves"``: in a byte an entry of the first
        half of a group and one of the second.
    integers, scale, zeros : Tensor
        The parts of the grid; steps in single precision, zeros as bytes.
    group : int
        The length of a group.
    multiply, unpack : callable
        The compiled loops, for the product and for multiplying out.
    """

    outputs: int
    inputs: int
    kind: str
    integers: Tensor
    scale: Tensor
    zeros: Tensor
    group: int
    multiply: Callable[..., None]
    unpack: Callable[..., None]

    @classmethod
    def of(cls, weight: GridWeight, dtype: torch.dtype | None = None) -> Rows:
        """Arrange a weight.

        Parameters
        ----------
        weight : GridWeight
            The weight on its grid.
        dtype : torch.dtype, optional
            The dtype of inputs, which nothing depends on.

        Returns
        -------
        Rows
        """
        from cur.integrations.kernels.loops import ROWS, loops

        m, n = weight.shape
        group = weight.group + weight.group % 2
        count = weight.scale.shape[1]
        q, scale, zeros = weight.integers, weight.scale.float(), weight.zeros
        kind = "halves" if weight.bits <= 4 else "signed" if zeros is None else "unsigned"
        if zeros is None:
            zeros = torch.zeros(scale.shape, dtype=torch.uint8)
            if kind == "halves":
                # As small as can be: what is added is taken away again from sums.
                zero = 1 << (weight.bits - 1)
                q, zeros = (q + zero).to(torch.uint8), zeros + zero
        rows = -m % ROWS
        # Groups of an odd length are whole rows, so that what fills up is at the end of a row in every case. Inputs
        # there are 0, whatever the integers are.
        q = nn.functional.pad(q, (0, count * group - n, 0, rows))
        scale, zeros = (nn.functional.pad(part, (0, 0, 0, rows)).contiguous() for part in (scale, zeros))
        if kind == "halves":
            first, second = q.view(-1, count, 2, group // 2).unbind(2)
            q = (first | second << 4).flatten(1)
        return cls(m, n, kind, q.contiguous(), scale, zeros, group, *loops(kind, group))

    @functools.cached_property
    def places(self) -> tuple[int, int, int]:
        """The addresses of the integers, steps and zeros."""
        return self.integers.data_ptr(), self.scale.data_ptr(), self.zeros.data_ptr()

    @functools.cached_property
    def rows(self) -> int:
        """The number of rows with those that fill up."""
        return self.scale.shape[0]

    @functools.cached_property
    def count(self) -> int:
        """The number of groups of a row."""
        return self.scale.shape[1]

    def filled(self, x: Tensor) -> Tensor:
        """Return inputs in single precision, with zeros for the columns that fill up.

        Parameters
        ----------
        x : Tensor
            The inputs, of shape (t, n).
        """
        more = self.count * self.group - self.inputs
        x = x.float()
        return nn.functional.pad(x, (0, more)) if more else x

    def product(self, x: Tensor) -> Tensor:
        """Return the product with inputs in single precision.

        Parameters
        ----------
        x : Tensor
            The inputs, filled up with zeros.
        """
        m, count = self.rows, self.count
        y = torch.empty(x.shape[0], m)
        told = (x.data_ptr(), *self.places, y.data_ptr(), x.shape[0], m, count, self.group)
        parts = min(torch.get_num_threads(), m * count * self.group // _SHARE)
        if parts < 2:
            self.multiply(*told, 0, m)
        else:
            _in_parts(parts, m, functools.partial(self.multiply, *told))
        return y if m == self.outputs else y[:, : self.outputs].contiguous()

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows multiplied out, in memory that the next call of this thread uses again.

        Parameters
        ----------
        start, stop : int
            The first row, and the one after the last.
        """
        m, count = stop - start, self.count
        out = _scratch(m * count * self.group).view(m, -1)
        places = (part[start:].data_ptr() for part in (self.integers, self.scale, self.zeros))
        told = (*places, out.data_ptr(), m, count, self.group)
        parts = min(torch.get_num_threads(), out.numel() // _SHARE)
        _in_parts(parts, m, functools.partial(self.unpack, *told))
        return out[:, : self.inputs]

    def held(self) -> int:
        """Return the bytes that are held."""
        return sum(part.nbytes for part in (self.integers, self.scale, self.zeros))


def _takes(weight: GridWeight, dtype: torch.dtype) -> bool:
    # The second group of two with odd lengths would begin within a byte.
    fits = weight.group % 2 == 0 or weight.group == weight.shape[1]
    return dtype in _DTYPES and fits and weight.integers.numel() > 0


def _takes_half(weight: GridWeight, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and _takes(weight, dtype)


def _held(weight: GridWeight, dtype: torch.dtype) -> int:
    return weight.integers.numel() // (2 if weight.bits <= 4 else 1) + 5 * weight.scale.numel()


@kernel("compiled", prepare=Rows.of, takes=_takes, held=_held, most=16, needs=("numba",))
def _multiplied(weight: Rows, x: Tensor) -> Tensor:
    """Multiply while integers are read, a token after the other."""
    return weight.product(weight.filled(x)).to(x.dtype)


@kernel("compiled, rows multiplied out in turn", prepare=Rows.of, takes=_takes, held=_held, needs=("numba",))
def _in_turn_in_single(weight: Rows, x: Tensor) -> Tensor:
    """Multiply out some rows at a time, and with them in single precision."""
    return _in_turn(weight, x.float()).to(x.dtype)


@kernel(
    "compiled, rows multiplied out in turn, in half precision",
    prepare=Rows.of,
    takes=_takes_half,
    held=_held,
    needs=("numba",),
)
def _in_turn_in_half(weight: Rows, x: Tensor) -> Tensor:
    """Multiply out some rows at a time, and with them in the dtype of the inputs."""
    return _in_turn(weight, x)


def _in_turn(weight: Rows, x: Tensor) -> Tensor:
    m, rows = weight.outputs, max(1, _BLOCK // weight.inputs)
    y = x.new_empty(x.shape[0], m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        torch.mm(x, weight.block(start, stop).to(x.dtype).T, out=y[:, start:stop])
    return y


_here = threading.local()


def _scratch(size: int) -> Tensor:
    """Return memory for some numbers, which stays: pages that are new take as long as what is written to them."""
    found: Tensor | None = getattr(_here, "scratch", None)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = _here.scratch = torch.empty(size)
    return found[:size]


_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    """Leave the threads behind, of which a forked process has none."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _in_parts(parts: int, rows: int, work: Callable[[int, int], Any]) -> None:
    """Call a function for ranges of rows, in as many threads; the loops let go of the interpreter."""
    global _pool
    if parts < 2:
        work(0, rows)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="cur-kernels")
    each = -(-rows // (4 * parts)) * 4
    bounds = [(low, min(low + each, rows)) for low in range(0, rows, each)]
    others = [_pool.submit(work, *bound) for bound in bounds[1:]]
    work(*bounds[0])
    wait(others)
    for other in others:
        other.result()
