"""A hash of tensors and facts, by which runs are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest"]


def digest(tensors: Mapping[str, Tensor], *facts: Any) -> str:
    """Return the SHA-256 of tensors, by name, and of facts as JSON.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The tensors to hash, by name.
    *facts : Any
        Values of JSON types to hash with them.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    total.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return total.hexdigest()
