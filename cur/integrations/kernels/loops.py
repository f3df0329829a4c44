"""Loops over weights in bytes and in half bytes, which numba compiles; imported where it is installed, and used, only.

Four rows are multiplied at a time, so that each input is loaded once for them. Sums may be in any order, which is what
vectors of a processor need; infinities and numbers that are none are treated as such.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, types  # type: ignore[attr-defined]

__all__ = ["ROWS", "loops"]

ROWS = 4
"""Rows that are multiplied at a time; weights have a multiple of it."""

_SUMS = {"reassoc", "contract", "nsz", "arcp"}
_PLACE, _SIZE = types.voidptr, types.intp

Compiled = Callable[..., Any]


_MULTIPLIES = types.void(*[_PLACE] * 5, *[_SIZE] * 6)
_UNPACKS = types.void(*[_PLACE] * 4, *[_SIZE] * 5)


def _compiled(signature: Any) -> Callable[[Compiled], Any]:
    """Return a decorator that keeps what it compiles for the next process, where there is a directory to keep it in."""

    def compiled(function: Compiled) -> Any:
        with contextlib.suppress(RuntimeError):
            return cfunc(signature, cache=True, fastmath=_SUMS)(function)
        return cfunc(signature, fastmath=_SUMS)(function)

    return compiled


def _multiply_bytes(fixed: int, kind: Any) -> Any:
    has_zeros = kind is np.uint8

    @_compiled(_MULTIPLIES)
    def loop(inputs, integers, steps, nothing, outputs, tokens, rows, count, length, low, high):  # type: ignore[no-untyped-def]
        group = fixed or length
        x, y = carray(inputs, (tokens, count * group), np.float32), carray(outputs, (tokens, rows), np.float32)
        q, scale = carray(integers, (rows, count * group), kind), carray(steps, (rows, count), np.float32)
        zeros = carray(nothing, (rows, count), np.uint8)
        for i in range(low, high, 4):
            for t in range(tokens):
                a0 = a1 = a2 = a3 = np.float32(0)
                for k in range(count):
                    # Taken away before it is multiplied: sums of integers up to 255 would lose what differences keep.
                    z0 = z1 = z2 = z3 = np.int32(0)
                    if has_zeros:
                        z0, z1 = np.int32(zeros[i, k]), np.int32(zeros[i + 1, k])
                        z2, z3 = np.int32(zeros[i + 2, k]), np.int32(zeros[i + 3, k])
                    s0 = s1 = s2 = s3 = np.float32(0)
                    for j in range(group):
                        v = x[t, k * group + j]
                        s0 += v * np.float32(np.int32(np.int32(q[i, k * group + j]) - z0))
                        s1 += v * np.float32(np.int32(np.int32(q[i + 1, k * group + j]) - z1))
                        s2 += v * np.float32(np.int32(np.int32(q[i + 2, k * group + j]) - z2))
                        s3 += v * np.float32(np.int32(np.int32(q[i + 3, k * group + j]) - z3))
                    a0 += s0 * scale[i, k]
                    a1 += s1 * scale[i + 1, k]
                    a2 += s2 * scale[i + 2, k]
                    a3 += s3 * scale[i + 3, k]
                y[t, i], y[t, i + 1], y[t, i + 2], y[t, i + 3] = a0, a1, a2, a3

    return loop


def _multiply_halves(fixed: int) -> Any:
    @_compiled(_MULTIPLIES)
    def loop(inputs, integers, steps, nothing, outputs, tokens, rows, count, length, low, high):  # type: ignore[no-untyped-def]
        group = fixed or length
        x, y = carray(inputs, (tokens, count * group), np.float32), carray(outputs, (tokens, rows), np.float32)
        q, scale = carray(integers, (rows, count * group // 2), np.uint8), carray(steps, (rows, count), np.float32)
        zeros = carray(nothing, (rows, count), np.uint8)
        half = group // 2
        sums = np.empty((tokens, count), np.float32)
        for t in range(tokens):
            for k in range(count):
                total = np.float32(0)
                for j in range(k * group, (k + 1) * group):
                    total += x[t, j]
                sums[t, k] = total
        for i in range(low, high, 4):
            for t in range(tokens):
                a0 = a1 = a2 = a3 = np.float32(0)
                for k in range(count):
                    s0 = s1 = s2 = s3 = np.float32(0)
                    for j in range(half):
                        v, w = x[t, k * group + j], x[t, k * group + half + j]
                        b0 = q[i, k * half + j]
                        b1 = q[i + 1, k * half + j]
                        b2 = q[i + 2, k * half + j]
                        b3 = q[i + 3, k * half + j]
                        s0 += v * np.float32(np.int32(b0 & 15)) + w * np.float32(np.int32(b0 >> 4))
                        s1 += v * np.float32(np.int32(b1 & 15)) + w * np.float32(np.int32(b1 >> 4))
                        s2 += v * np.float32(np.int32(b2 & 15)) + w * np.float32(np.int32(b2 >> 4))
                        s3 += v * np.float32(np.int32(b3 & 15)) + w * np.float32(np.int32(b3 >> 4))
                    total = sums[t, k]
                    a0 += (s0 - np.float32(zeros[i, k]) * total) * scale[i, k]
                    a1 += (s1 - np.float32(zeros[i + 1, k]) * total) * scale[i + 1, k]
                    a2 += (s2 - np.float32(zeros[i + 2, k]) * total) * scale[i + 2, k]
                    a3 += (s3 - np.float32(zeros[i + 3, k]) * total) * scale[i + 3, k]
                y[t, i], y[t, i + 1], y[t, i + 2], y[t, i + 3] = a0, a1, a2, a3

    return loop


def _unpack_bytes(fixed: int, kind: Any) -> Any:
    @_compiled(_UNPACKS)
    def loop(integers, steps, nothing, outputs, rows, count, length, low, high):  # type: ignore[no-untyped-def]
        group = fixed or length
        q, out = carray(integers, (rows, count * group), kind), carray(outputs, (rows, count * group), np.float32)
        scale, zeros = carray(steps, (rows, count), np.float32), carray(nothing, (rows, count), np.uint8)
        for i in range(low, high):
            for k in range(count):
                step, zero = scale[i, k], np.int32(zeros[i, k])
                part, to = q[i, k * group : (k + 1) * group], out[i, k * group : (k + 1) * group]
                for j in range(group):
                    to[j] = step * np.float32(np.int32(np.int32(part[j]) - zero))

    return loop


def _unpack_halves(fixed: int) -> Any:
    @_compiled(_UNPACKS)
    def loop(integers, steps, nothing, outputs, rows, count, length, low, high):  # type: ignore[no-untyped-def]
        group = fixed or length
        q, out = (
            carray(integers, (rows, count * group // 2), np.uint8),
            carray(outputs, (rows, count * group), np.float32),
        )
        scale, zeros = carray(steps, (rows, count), np.float32), carray(nothing, (rows, count), np.uint8)
        half = group // 2
        for i in range(low, high):
            for k in range(count):
                step, zero = scale[i, k], np.float32(zeros[i, k])
                part = q[i, k * half : (k + 1) * half]
                first, second = out[i, k * group : k * group + half], out[i, k * group + half : (k + 1) * group]
                for j in range(half):
                    first[j] = step * (np.float32(np.int32(part[j] & 15)) - zero)
                    second[j] = step * (np.float32(np.int32(part[j] >> 4)) - zero)

    return loop


_KINDS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "signed": lambda fixed: (_multiply_bytes(fixed, np.int8), _unpack_bytes(fixed, np.int8)),
    "unsigned": lambda fixed: (_multiply_bytes(fixed, np.uint8), _unpack_bytes(fixed, np.uint8)),
    "halves": lambda fixed: (_multiply_halves(fixed), _unpack_halves(fixed)),
}

# Lengths of a group that are compiled in, up to a third faster than one that is told in each call.
_FIXED = (32, 64, 128)


def loops(kind: str, group: int) -> tuple[Compiled, Compiled]:
    """Return the product of a weight and what multiplies rows of it out, compiled in the first call.

    Parameters
    ----------
    kind : str
        How integers are stored: ``"signed"``, ``"unsigned"`` or ``"halves"``.
    group : int
        The length of a group.

    Returns
    -------
    multiply : callable
        Takes the places of inputs, integers, steps, zeros and outputs, then the numbers of tokens, rows and groups, the
        length of a group, and the range of rows.
    unpack : callable
        Takes the places of integers, steps, zeros and of the weight, then the numbers of rows and groups, the length of
        a group, and the range of rows.
    """
    return _loops(kind, group if group in _FIXED else 0)


@functools.cache
def _loops(kind: str, fixed: int) -> tuple[Compiled, Compiled]:
    multiply, unpack = _KINDS[kind](fixed)
    return multiply.ctypes, unpack.ctypes
