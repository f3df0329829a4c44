"""Fixtures of all tests of the core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest

from tests.backends import BACKENDS, Backend, use

hypothesis.settings.register_profile("local", deadline=None)
# in continuous integration a failure must be the fault of the change, not of the draw
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _marked(name: str) -> object:
    if name == "cupy":
        return pytest.param(name, marks=pytest.mark.gpu)
    if name.startswith("jax"):
        # what JAX compiled stays in the process: one worker does it for all
        return pytest.param(name, marks=pytest.mark.xdist_group("jax"))
    return name


@pytest.fixture(params=[_marked(name) for name in BACKENDS if name != "jax"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every kind of matrix, JAX with doubles: in single precision it compiles everything a second time."""
    with use(request.param) as found:
        yield found


@pytest.fixture(params=[_marked(name) for name in BACKENDS])
def every_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every kind of matrix, JAX in single precision included."""
    with use(request.param) as found:
        yield found


@pytest.fixture(params=[_marked(name) for name, b in BACKENDS.items() if b.is_dense])
def dense(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every library of dense arrays in memory."""
    with use(request.param) as found:
        yield found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250101)


@pytest.fixture(autouse=True)
def products_in_single(monkeypatch):
    """What is fastest depends on the processor: in this process "auto" means float32, but where a test decides."""
    loaded = sys.modules.get("cur.integrations.model.precision")
    if loaded is not None:
        monkeypatch.setattr(loaded, "slowdown", lambda half, threads=None: 1.0)


@pytest.fixture(autouse=True)
def multiplied_out(monkeypatch):
    """Which kernel is fastest depends on the processor: here it is the plain product, and no file is written."""
    loaded = sys.modules.get("cur.integrations.kernels.times")
    if loaded is not None:
        monkeypatch.setattr(
            loaded, "measured", lambda runs, x: {name: float(name != "multiplied out") + 1 for name in runs}
        )
        monkeypatch.setattr(loaded, "copies", lambda size, tokens: 1)
        monkeypatch.setattr(loaded, "place", lambda: None)
