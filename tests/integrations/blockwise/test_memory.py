from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cur.integrations.blockwise import Shards, available_memory, fits


def test_what_fits(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(checkpoint("llama"))
    assert (available_memory() or 1) > 0
    for free, expected in ((shards.bytes, False), (2 * shards.bytes, True), (None, True)):
        monkeypatch.setattr("cur.integrations.blockwise.memory.available_memory", lambda free=free: free)
        assert fits(shards, torch.float32) is expected
    monkeypatch.setattr("cur.integrations.blockwise.memory.available_memory", lambda: shards.bytes)
    assert fits(shards, torch.bfloat16)
