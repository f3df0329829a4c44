from __future__ import annotations

from cur._lib import memory


def test_the_least_of_all_limits_counts(monkeypatch):
    assert (memory.available_memory() or 1) > 0
    monkeypatch.setattr(memory, "_machine", lambda: 300)
    monkeypatch.setattr(memory, "_group", lambda files: None)
    monkeypatch.setattr(memory, "_limit", lambda: 200)
    assert memory.available_memory() == 200
    monkeypatch.setattr(memory, "_limit", lambda: None)
    assert memory.available_memory() == 300
    monkeypatch.setattr(memory, "_machine", lambda: None)
    assert memory.available_memory() is None
