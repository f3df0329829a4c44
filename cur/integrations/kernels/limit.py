"""How much memory weights that are multiplied out take in this process, and may take."""

from __future__ import annotations

import weakref

import torch

from cur._lib.memory import available_memory

__all__ = ["claim", "is_left"]

# Of what is available, when the first weight is multiplied out.
_SHARE = 0.5

_taken: dict[str, int] = {}
_limits: dict[str, float] = {}


def is_left(size: int, device: torch.device, limit: int | None) -> bool:
    """Tell whether there is memory for one more weight.

    Parameters
    ----------
    size : int
        The bytes of the weight.
    device : torch.device
        The device that the weight is to be on.
    limit : int or None
        The bytes that all of them may take; None for half of what is available in the first call.

    Returns
    -------
    bool
        Whether the weight may be multiplied out.
    """
    place = str(device)
    if limit is None:
        if place not in _limits:
            _limits[place] = _SHARE * _available(device)
        allowed = _limits[place]
    else:
        allowed = limit
    return _taken.get(place, 0) + size <= allowed


def claim(owner: object, size: int, device: torch.device) -> None:
    """Count the bytes of a weight for as long as its owner lives.

    Parameters
    ----------
    owner : object
        What holds the weight.
    size : int
        The bytes of the weight.
    device : torch.device
        The device that the weight is on.
    """
    place = str(device)
    _taken[place] = _taken.get(place, 0) + size
    weakref.finalize(owner, _release, _taken, place, size).atexit = False


def _release(taken: dict[str, int], place: str, size: int) -> None:
    taken[place] -= size


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = available_memory()
    return float("inf") if found is None else found
