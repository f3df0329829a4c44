"""Warnings: whose line they name, and that nothing changes who hears them."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import cur
from cur._lib.errors import collected
from tests.families import geometric, random

ONES = np.ones((9, 7))

WARNS = {
    "cur": lambda: cur.cur(ONES, rank=3),
    "deim_cur": lambda: cur.deim_cur(ONES, rank=3),
    "cross": lambda: cur.cur(ONES, rank=3, link="cross", oversample=1),
    "weighted": lambda: cur.deim_cur(ONES, rank=3, row_weights=np.ones(9)),
    "scaled": lambda: cur.deim_cur(ONES * 1e-200, rank=3),
    "interpolative": lambda: cur.interpolative(ONES, rank=3),
    "interpolative rows": lambda: cur.interpolative(ONES, rank=3, side="rows"),
    "select": lambda: cur.select(ONES, rank=3, select="deim"),
    "select qdeim": lambda: cur.select(ONES, rank=3, select="qdeim"),
}


@pytest.mark.parametrize("name", WARNS)
def test_a_warning_names_the_line_of_the_caller(name):
    with pytest.warns(cur.RankWarning, match="rank 3 was asked for, but the numerical rank is 1") as caught:
        WARNS[name]()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert caught[0].lineno == WARNS[name].__code__.co_firstlineno


def test_at_whatever_depth_of_the_user_s():
    def inner():
        return cur.cur(ONES, rank=3)

    with pytest.warns(cur.RankWarning) as caught:
        (lambda: inner())()
    assert caught[0].lineno == inner.__code__.co_firstlineno + 1


def test_searches_do_not_warn_about_ranks_of_their_own(rng):
    for A in (ONES, geometric(60, 50, rng), random(40, 30, rng)):
        cur.deim_cur(A, tol=1e-4)
        cur.cur(A, tol=1e-4, select="qdeim")
        cur.interpolative(A, tol=1e-8, select="arp")


def test_warnings_are_gathered_in_one_thread_alone():
    seen = []

    def elsewhere():
        with pytest.warns(cur.RankWarning):
            cur.deim_cur(ONES, rank=3)
        seen.append(True)

    with collected() as found:
        cur.deim_cur(ONES, rank=3)
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert len(found) == 1
    assert "the numerical rank is 1" in found[0]
    assert seen
    with pytest.warns(cur.RankWarning):
        cur.deim_cur(ONES, rank=3)


def test_filters_are_as_they_were_after_threads():
    """The filters belong to the process: one thread that restores them undoes the changes of another."""
    rng = np.random.default_rng(0)
    A = random(60, 50, rng)
    before, errors = list(warnings.filters), []

    def work():
        try:
            for _ in range(3):
                cur.deim_cur(A, tol=0.3)
                cur.cur(A, tol=0.3, select="qdeim")
                cur.interpolative(A, tol=0.3)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert warnings.filters == before
    assert not errors
    assert warnings.filters == before


def test_the_core_leaves_global_state_alone():
    """Filters, floating-point errors of the process, default dtypes and seeds."""
    filters = ("catch_warnings", "simplefilter", "filterwarnings")
    root = Path(cur.__file__).parent
    everything = sorted(root.rglob("*.py"))
    assert everything
    for path in everything:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in filters if word in text], path.name
    words = (
        "seterr(",
        "set_default",
        "manual_seed",
        "config.update",
    )
    rooms = {root, *(root / room for room in ("_lib", "_driver", "weighted"))}
    assert all(room.is_dir() for room in rooms)
    for path in everything:
        if path.parent in rooms:
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path.name
