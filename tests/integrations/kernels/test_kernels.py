"""Each kernel gives the product with the weight multiplied out, up to the rounding that its entry states."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from cur.integrations.kernels import KERNELS, Kernel
from cur.integrations.kernels.dense import into_inputs
from cur.integrations.kernels.integer import _adds_up
from tests.integrations.kernels.grids import BITS, SHAPES, inputs, make

GRIDS = list(itertools.product(BITS, (32, 64, 128, None), (True, False)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the largest error against what rounding could change: the product of absolute values."""
    exact = x.double() @ weight.T
    return float(((found.double() - exact).abs() / (x.double().abs() @ weight.abs().T + 1e-30)).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", KERNELS.values(), ids=lambda one: one.name)
def test_products_are_those_of_the_dense_weight(one: Kernel, dtype: torch.dtype) -> None:
    if not one.exact and not _adds_up():
        pytest.skip("sums of two products of bytes overflow on this processor")
    tried = 0
    for (m, n), (bits, group, symmetric) in itertools.product(SHAPES, GRIDS):
        if group is not None and group > n:
            continue
        weight = make(m, n, bits=bits, group=group, symmetric=symmetric)
        if not one.takes(weight, dtype):
            continue
        dense, state = weight.dense(torch.float64), one.prepare(weight, dtype)
        for tokens in (1, 3):
            x = inputs(tokens, n, dtype=dtype)
            found = one.run(state, x)
            assert found.shape == (tokens, m)
            assert found.dtype == dtype
            # Of n products some are added up before others; the weight and the outputs are rounded to the dtype.
            allowed = 4 * torch.finfo(dtype).eps + (n + 4) * torch.finfo(torch.float32).eps * (dtype != torch.float64)
            if not one.exact:
                allowed += 1 / 127
            assert error(found, dense, x) < allowed, (m, n, bits, group, symmetric)
            tried += 1
    half_only = {"torch, 4 bits", "torch, 8 bits"}
    takes = dtype != torch.float64 or one.plain
    if dtype == torch.float32 and (one.name in half_only or "in half" in one.name or "in float32" in one.name):
        takes = False
    if dtype == torch.float64 and "in float32" in one.name:
        takes = False
    assert bool(tried) == takes


def test_integer_products_have_a_step_for_each_token() -> None:
    one = KERNELS["integers, a step for each token"]
    weight = make(16, 64, bits=8, symmetric=True)
    if not _adds_up():
        pytest.skip("sums of two products of bytes overflow on this processor")
    x = inputs(3, 64)
    small = x.clone()
    small[0] *= 1e-6
    state = one.prepare(weight, torch.float32)
    assert torch.allclose(one.run(state, small)[0] * 1e6, one.run(state, x)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(one.run(state, x * 0), torch.zeros(3, 16))


def test_kernels_with_more_rows_than_a_block_or_a_thread_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cur.integrations.kernels.dense.BLOCK", 3 * 50)
    monkeypatch.setattr("cur.integrations.kernels.compiled._BLOCK", 3 * 50)
    monkeypatch.setattr("cur.integrations.kernels.compiled._SHARE", 2 * 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, x = make(29, 50, group=32), inputs(2, 50)
    dense = weight.dense(torch.float64)
    ran = [one for one in KERNELS.values() if one.takes(weight, x.dtype)]
    assert len(ran) > 3
    for one in ran:
        assert error(one.run(one.prepare(weight, x.dtype), x), dense, x) < 1e-5, one.name
    gradient = inputs(2, 29)
    assert torch.allclose(into_inputs(weight, gradient), gradient @ dense.float(), rtol=1e-5, atol=1e-5)


def test_what_is_held_is_what_entries_say() -> None:
    for symmetric, bits in itertools.product((True, False), (4, 8)):
        weight = make(32, 128, bits=bits, group=32, symmetric=symmetric)
        one = KERNELS["compiled"]
        assert one.prepare(weight, torch.float32).held() == one.held(weight, torch.float32)
    dense = KERNELS["multiplied out"]
    assert dense.prepare(weight, torch.bfloat16).nbytes == dense.held(weight, torch.bfloat16)


def test_entries_know_packages_that_are_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(one.is_here for one in KERNELS.values())
    (tmp_path / "broken_package.py").write_text("raise ImportError('needs an older NumPy')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("no_such_package", "broken_package"):
        without = Kernel("no", lambda state, x: x, lambda w, d: w, lambda w, d: True, lambda w, d: 0, needs=(name,))
        assert not without.is_here
