import sys

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from cur._lib import plane
from cur._lib.threads import _libraries, one_thread
from cur.rounding import round_to_grid


def counts():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_products_are_not_shared_within_and_as_before_after():
    with threadpool_limits(2, "blas"):
        before = counts()
        assert set(before) == {2}
        with one_thread():
            assert set(counts()) == {1}
        assert counts() == before


def test_rounding_takes_one_thread(monkeypatch):
    seen = []
    both = plane._both
    monkeypatch.setattr(plane, "_both", lambda *args: (seen.append(set(counts())), both(*args))[1])
    G = np.eye(4) + 0.5
    with threadpool_limits(2, "blas"):
        round_to_grid(np.arange(16.0).reshape(4, 4), bits=3, row_weights=G, column_weights=G)
    assert seen
    assert all(count == {1} for count in seen)


def test_without_the_package_nothing_is_limited(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    _libraries.cache_clear()
    try:
        with threadpool_limits(2, "blas"), one_thread():
            assert set(counts()) == {2}
    finally:
        _libraries.cache_clear()
