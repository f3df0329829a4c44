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
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]

__all__ = ["ROWS", "loops"]

ROWS = 4
"""Rows that are multiplied at a time; weights have a multiple of it."""

_SUMS = {"reassoc", "contract", "nsz", "arcp"}
_PLACE, _SIZE = types.voidptr, types.intp

Compiled = Callable[..., Any]


def _compiled(decorator: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Compiled], Any]:
    """Return a decorator that keeps what it compiles for the next process, where there is a directory to keep it in."""

    def compiled(function: Compiled) -> Any:
        with contextlib.suppress(RuntimeError):
            return decorator(*signature, cache=True, **options)(function)
        return decorator(*signature, **options)(function)

    return compiled


@_compiled(njit, fastmath=_SUMS)
def _multiply_signed(x, q, scale, zeros, y, group, low, high):  # type: ignore[no-untyped-def]
    for i in range(low, high, 4):
        for t in range(x.shape[0]):
            a0 = a1 = a2 = a3 = np.float32(0)
            for k in range(scale.shape[1]):
                at, to = k * group, (k + 1) * group
                q0, q1, q2, q3 = q[i, at:to], q[i + 1, at:to], q[i + 2, at:to], q[i + 3, at:to]
                part = x[t, at:to]
                s0 = s1 = s2 = s3 = np.float32(0)
                for j in range(group):
                    v = part[j]
                    s0 += v * np.float32(q0[j])
                    s1 += v * np.float32(q1[j])
                    s2 += v * np.float32(q2[j])
                    s3 += v * np.float32(q3[j])
                a0 += s0 * scale[i, k]
                a1 += s1 * scale[i + 1, k]
                a2 += s2 * scale[i + 2, k]
                a3 += s3 * scale[i + 3, k]
            y[t, i], y[t, i + 1], y[t, i + 2], y[t, i + 3] = a0, a1, a2, a3


@_compiled(njit, fastmath=_SUMS)
def _multiply_unsigned(x, q, scale, zeros, y, group, low, high):  # type: ignore[no-untyped-def]
    for i in range(low, high, 4):
        for t in range(x.shape[0]):
            a0 = a1 = a2 = a3 = np.float32(0)
            for k in range(scale.shape[1]):
                at, to = k * group, (k + 1) * group
                q0, q1, q2, q3 = q[i, at:to], q[i + 1, at:to], q[i + 2, at:to], q[i + 3, at:to]
                # Taken away before it is multiplied: sums of integers up to 255 would lose what differences keep.
                z0, z1 = np.int32(zeros[i, k]), np.int32(zeros[i + 1, k])
                z2, z3 = np.int32(zeros[i + 2, k]), np.int32(zeros[i + 3, k])
                part = x[t, at:to]
                s0 = s1 = s2 = s3 = np.float32(0)
                for j in range(group):
                    v = part[j]
                    s0 += v * np.float32(np.int32(np.int32(q0[j]) - z0))
                    s1 += v * np.float32(np.int32(np.int32(q1[j]) - z1))
                    s2 += v * np.float32(np.int32(np.int32(q2[j]) - z2))
                    s3 += v * np.float32(np.int32(np.int32(q3[j]) - z3))
                a0 += s0 * scale[i, k]
                a1 += s1 * scale[i + 1, k]
                a2 += s2 * scale[i + 2, k]
                a3 += s3 * scale[i + 3, k]
            y[t, i], y[t, i + 1], y[t, i + 2], y[t, i + 3] = a0, a1, a2, a3


@_compiled(njit, fastmath=_SUMS)
def _multiply_halves(x, q, scale, zeros, y, group, low, high):  # type: ignore[no-untyped-def]
    half, count = group // 2, scale.shape[1]
    sums = np.empty((x.shape[0], count), np.float32)
    for t in range(x.shape[0]):
        for k in range(count):
            total = np.float32(0)
            for j in range(k * group, (k + 1) * group):
                total += x[t, j]
            sums[t, k] = total
    for i in range(low, high, 4):
        for t in range(x.shape[0]):
            a0 = a1 = a2 = a3 = np.float32(0)
            for k in range(count):
                at, to = k * half, (k + 1) * half
                q0, q1, q2, q3 = q[i, at:to], q[i + 1, at:to], q[i + 2, at:to], q[i + 3, at:to]
                first, second = x[t, 2 * at : at + to], x[t, at + to : 2 * to]
                s0 = s1 = s2 = s3 = np.float32(0)
                for j in range(half):
                    v, w = first[j], second[j]
                    b0, b1, b2, b3 = q0[j], q1[j], q2[j], q3[j]
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


@_compiled(njit, fastmath=_SUMS)
def _unpack_bytes(q, scale, zeros, out, group, low, high):  # type: ignore[no-untyped-def]
    for i in range(low, high):
        for k in range(scale.shape[1]):
            step, zero = scale[i, k], np.int32(zeros[i, k])
            part, to = q[i, k * group : (k + 1) * group], out[i, k * group : (k + 1) * group]
            for j in range(group):
                to[j] = step * np.float32(np.int32(np.int32(part[j]) - zero))


@_compiled(njit, fastmath=_SUMS)
def _unpack_halves(q, scale, zeros, out, group, low, high):  # type: ignore[no-untyped-def]
    half = group // 2
    for i in range(low, high):
        for k in range(scale.shape[1]):
            step, zero = scale[i, k], np.float32(zeros[i, k])
            part = q[i, k * half : (k + 1) * half]
            first, second = out[i, k * group : k * group + half], out[i, k * group + half : (k + 1) * group]
            for j in range(half):
                first[j] = step * (np.float32(np.int32(part[j] & 15)) - zero)
                second[j] = step * (np.float32(np.int32(part[j] >> 4)) - zero)


def _entry(loop: Any, kind: Any, share: int, *, unpacks: bool) -> Any:
    """Compile the entry to a loop over weights whose entries are of a kind, so many of them in a byte."""
    if unpacks:

        @_compiled(cfunc, types.void(*[_PLACE] * 4, *[_SIZE] * 5))
        def unpack(q, scale, zeros, out, m, count, group, low, high):  # type: ignore[no-untyped-def]
            loop(
                carray(q, (m, count * group // share), kind),
                carray(scale, (m, count), np.float32),
                carray(zeros, (m, count), np.uint8),
                carray(out, (m, count * group), np.float32),
                group,
                low,
                high,
            )

        return unpack

    @_compiled(cfunc, types.void(*[_PLACE] * 5, *[_SIZE] * 6))
    def multiply(x, q, scale, zeros, y, t, m, count, group, low, high):  # type: ignore[no-untyped-def]
        loop(
            carray(x, (t, count * group), np.float32),
            carray(q, (m, count * group // share), kind),
            carray(scale, (m, count), np.float32),
            carray(zeros, (m, count), np.uint8),
            carray(y, (t, m), np.float32),
            group,
            low,
            high,
        )

    return multiply


_KINDS = {
    "signed": (_multiply_signed, _unpack_bytes, np.int8, 1),
    "unsigned": (_multiply_unsigned, _unpack_bytes, np.uint8, 1),
    "halves": (_multiply_halves, _unpack_halves, np.uint8, 2),
}


@functools.cache
def loops(kind: str) -> tuple[Compiled, Compiled]:
    """Return the product of a weight and what multiplies rows of it out, compiled in the first call.

    Parameters
    ----------
    kind : str
        How integers are stored: ``"signed"``, ``"unsigned"`` or ``"halves"``.

    Returns
    -------
    multiply : callable
        Takes the places of inputs, integers, steps, zeros and outputs, then the numbers of tokens, rows and groups, the
        length of a group, and the range of rows.
    unpack : callable
        Takes the places of integers, steps, zeros and of the weight, then the numbers of rows and groups, the length of
        a group, and the range of rows.
    """
    multiply, unpack, entry, share = _KINDS[kind]
    entries = _entry(multiply, entry, share, unpacks=False), _entry(unpack, entry, share, unpacks=True)
    return entries[0].ctypes, entries[1].ctypes
