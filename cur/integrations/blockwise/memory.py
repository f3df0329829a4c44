"""How much memory there is for a model."""

from __future__ import annotations

import torch

from cur._lib.memory import available_memory
from cur.integrations.files.shards import Shards

__all__ = ["available_memory", "fits"]

# Over its weights a compression holds statistics, hidden states of a batch, and the factorization of its largest layer.
_MARGIN = 1.25


def fits(shards: Shards, dtype: torch.dtype | str) -> bool:
    """Say whether a checkpoint fits into memory, with what its compression needs; yes if nobody knows.

    In a dtype, or, with "auto", as it is stored.

    Parameters
    ----------
    shards : Shards
        The weight files of the checkpoint.
    dtype : torch.dtype or str
        The dtype that the weights are to have in memory.

    Returns
    -------
    bool
        Whether the model and the needs of its compression fit into memory.
    """
    available = available_memory()
    needed = shards.bytes_as(dtype) if isinstance(dtype, torch.dtype) else shards.bytes
    return available is None or needed * _MARGIN <= available
