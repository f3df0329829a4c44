"""Times of kernels: how they are measured, and the file in the user's cache that keeps them for the next process."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cur._lib.atomic import replace_file
from cur._lib.versions import packages

__all__ = ["copies", "measured", "place", "read", "write"]

# Changed whenever kernels change so much that old times say nothing.
_VERSION = 1

# The weights of a model are in no cache when they are needed again. So products of few tokens go round copies of a
# weight, which take so many bytes together, while what the interpreter needs stays near, as it does in a model.
_AROUND = 1 << 26
_COPIES = 64
_FEW = 16

_ROUNDS = 4
_FIRST = 3

# Times of the best one from which on a kernel is not tried again.
_HOPELESS = 2.0


def copies(size: int, tokens: int) -> int:
    """Return how many copies of a weight a product is timed with.

    Parameters
    ----------
    size : int
        The bytes that a copy takes.
    tokens : int
        The number of tokens.
    """
    return min(_COPIES, -(-_AROUND // max(size, 1))) if tokens <= _FEW else 1


def measured(runs: Mapping[str, Sequence[Callable[[Tensor], Tensor]]], x: Tensor) -> dict[str, float]:
    """Measure the least seconds of some products with the same inputs, in turns.

    Parameters
    ----------
    runs : mapping of str to sequence of callable
        The products by name, with each copy of the weight.
    x : Tensor
        The inputs, of shape (t, n).

    Returns
    -------
    dict of str to float
        The seconds by name: the median of the copies.
    """
    for around in runs.values():
        around[0](x)  # chooses its kernels and takes memory
    first = {name: min(_seconds(around[0], x) for _ in range(_FIRST)) for name, around in runs.items()}
    hope = _HOPELESS * min(first.values())
    # Copies may be made when they are looked at: not those of what is hopeless, and none between two times.
    tried = {name: list(around) for name, around in runs.items() if first[name] <= hope}
    # Other processes interrupt, some of them for milliseconds: of each copy the best counts, and no mean of them all.
    best = {name: [math.inf] * len(around) for name, around in tried.items()}
    for _ in range(_ROUNDS):
        for name, around in tried.items():
            best[name] = [min(kept, _seconds(run, x)) for kept, run in zip(best[name], around, strict=True)]
    return {**first, **{name: statistics.median(found) for name, found in best.items()}}


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    begin = time.perf_counter()
    run(x)
    return time.perf_counter() - begin


def place() -> Path | None:
    """Return the file that keeps times, None where there is no place for it."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "cur" / "kernels.json"


@functools.cache
def _machine() -> str:
    """Say all that times depend on beside the product."""
    versions = packages("torch", "numba", "onnxruntime")
    parts = [
        str(_VERSION),
        _processor(),
        f"{os.cpu_count()} cores",
        torch.backends.cpu.get_cpu_capability(),
        os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        *(f"{name} {number}" for name, number in versions.items()),
    ]
    return "; ".join(filter(None, parts))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def read() -> dict[str, dict[str, float]]:
    """Return the times that were measured on this machine, of each case by kernel; none where no file can be read."""
    found = _all().get(_machine())
    cases = found if isinstance(found, dict) else {}
    return {case: times for case, times in cases.items() if _are_times(times)}


def write(case: str, times: Mapping[str, float]) -> None:
    """Add the times of a case to the file, if it can be written.

    Parameters
    ----------
    case : str
        A line that says what was multiplied.
    times : mapping of str to float
        The seconds by kernel.
    """
    target = place()
    if target is None:
        return
    found = _all()
    found[_machine()] = {**read(), case: dict(times)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target) as stream:
            stream.write(json.dumps(found, indent=1).encode())
    except OSError:
        return  # they are measured again by the next process


def _all() -> dict[str, Any]:
    target = place()
    try:
        found = json.loads(target.read_bytes()) if target is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _are_times(times: Any) -> bool:
    return isinstance(times, dict) and all(isinstance(value, float) and value > 0 for value in times.values())
