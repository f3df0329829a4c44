"""Each baseline has the property that its paper states."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.baselines import (
    activation_aware,
    activation_scaled,
    cur_factors,
    dynamic_ranks,
    effective_rank,
    fisher_weighted,
    grid_bytes,
    half_quadratic,
    magnitudes,
    measure,
    nearest,
    pivot_rows,
    reconstruct_,
    refit,
    round_to_nearest,
    whitened,
)

M, N, R = 14, 9, 4
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@pytest.fixture
def W() -> torch.Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def X() -> torch.Tensor:
    """Inputs, one a row, of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, N, generator=generator, dtype=torch.float64) @ torch.diag(torch.logspace(1, -2, N)).double()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=31, **shape)).eval()


def loss(W: torch.Tensor, product: torch.Tensor, X: torch.Tensor) -> float:
    return float(torch.linalg.norm((W - product) @ X.T))


def test_truncated_svd_loses_the_singular_values_cut_off(W: torch.Tensor) -> None:
    left, right = nearest(W, R)
    assert (left.shape, right.shape) == ((M, R), (R, N))
    cut = torch.linalg.svdvals(W)[R:]
    assert math.isclose(float(torch.linalg.norm(W - left @ right)), float(torch.linalg.norm(cut)), rel_tol=1e-12)


def test_fwsvd_is_the_svd_where_all_rows_matter_alike(W: torch.Tensor) -> None:
    left, right = fisher_weighted(W, torch.full((M,), 3.0, dtype=torch.float64), R)
    plain = nearest(W, R)
    torch.testing.assert_close(left @ right, plain[0] @ plain[1], rtol=1e-10, atol=1e-12)


def test_fwsvd_minimises_the_error_weighted_by_rows(W: torch.Tensor) -> None:
    fisher = torch.logspace(-2, 2, M, dtype=torch.float64)
    D = fisher.sqrt()[:, None]
    ours, plain = (float(torch.linalg.norm(D * (W - a @ b))) for a, b in (fisher_weighted(W, fisher, R), nearest(W, R)))
    assert math.isclose(ours, float(torch.linalg.norm(torch.linalg.svdvals(D * W)[R:])), rel_tol=1e-10)
    assert ours < 0.9 * plain


def test_asvd_favours_columns_with_large_inputs(W: torch.Tensor, X: torch.Tensor) -> None:
    magnitude = X.abs().mean(0)
    scaled, plain = (a @ b for a, b in (activation_scaled(W, magnitude, R), nearest(W, R)))
    assert loss(W, scaled, X) < 0.5 * loss(W, plain, X)
    unscaled = activation_scaled(W, magnitude, R, alpha=0.0)
    torch.testing.assert_close(unscaled[0] @ unscaled[1], plain, rtol=1e-10, atol=1e-12)


def test_svd_llm_loses_the_singular_values_cut_off_and_nothing_loses_less(W: torch.Tensor, X: torch.Tensor) -> None:
    left, values, right = whitened(W, X.T @ X)
    torch.testing.assert_close(left @ torch.diag(values) @ right, W, rtol=1e-9, atol=1e-10)
    product = (left[:, :R] * values[:R]) @ right[:R]
    assert math.isclose(loss(W, product, X), float(torch.linalg.norm(values[R:])), rel_tol=1e-9)
    best = torch.linalg.norm(torch.linalg.svdvals(W @ X.T)[R:])
    assert math.isclose(loss(W, product, X), float(best), rel_tol=1e-9)


def test_pifa_stores_the_same_matrix_in_fewer_numbers(W: torch.Tensor) -> None:
    left, right = nearest(W, R)
    pivots, rows, coefficients = pivot_rows(left, right)
    torch.testing.assert_close(coefficients @ rows, left @ right, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((left @ right)[pivots], rows, rtol=0, atol=1e-14)
    assert torch.equal(coefficients[pivots], torch.eye(R, dtype=torch.float64))
    others = coefficients[[i for i in range(M) if i not in pivots.tolist()]]
    assert rows.numel() + others.numel() == R * (M + N - R)


def test_mpifa_leaves_the_optimum_where_nothing_has_changed(W: torch.Tensor, X: torch.Tensor) -> None:
    """With the dense model's own inputs the truncation of SVD-LLM is the answer already."""
    moment = X.T @ X / len(X)
    _, _, right = whitened(W, moment)
    left, new = refit(W, right[:R], moment, moment, damping=0.0)
    kept = W @ moment @ right[:R].T @ torch.linalg.inv(right[:R] @ moment @ right[:R].T)
    torch.testing.assert_close(left, kept, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(new, right[:R], rtol=1e-6, atol=1e-7)


def test_mpifa_fits_better_than_the_truncation_on_the_inputs_that_come(W: torch.Tensor, X: torch.Tensor) -> None:
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Z = X + 0.3 * X.std(0) * noise
    left, values, right = whitened(W, X.T @ X / len(X))
    before = (left[:, :R] * values[:R]) @ right[:R]
    factors = refit(W, right[:R], Z.T @ Z / len(X), X.T @ Z / len(X), mix=1.0, damping=0.0)
    after = factors[0] @ factors[1]
    errors = [float(torch.linalg.norm(X @ W.T - Z @ product.T)) for product in (before, after)]
    assert errors[1] < 0.95 * errors[0]


def test_mpifa_walks_through_the_blocks_with_the_inputs_that_come(llama: LlamaForCausalLM) -> None:
    windows = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{i}.{layer}" for i in range(2) for group in GROUPS for layer in group]
    student = copy.deepcopy(llama)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    changed = {name: 0.5 * llama.get_submodule(name).weight.detach() for name in names}

    def fit(name: str, moment: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        seen[name] = moment, cross
        return changed[name]

    reconstruct_(student, llama, windows, ["model.layers.0", "model.layers.1"], GROUPS, fit, batch_size=2)
    assert list(seen) == names
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for model in (student, llama):  # what the layers of the two whole models get
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].flatten(0, 1)))
            for name, to in inputs.items()
        ]
        with torch.no_grad():
            model(input_ids=windows)
        for hook in hooks:
            hook.remove()
    for name, (Z, X) in inputs.items():
        assert torch.equal(student.get_submodule(name).weight, changed[name])
        torch.testing.assert_close(seen[name][0].float(), Z.T @ Z / len(Z), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[name][1].float(), X.T @ Z / len(Z), rtol=1e-4, atol=1e-5)


def test_d_rank_equal_layers_share_equally_and_richer_ones_get_the_root() -> None:
    assert dynamic_ranks([5.0, 5.0], [(40, 40), (40, 40)], 2 * 10 * 80) == [10, 10]
    assert dynamic_ranks([4.0, 16.0], [(100, 100), (100, 100)], 30 * 200) == [10, 20]


def test_d_rank_keeps_the_budget_and_the_break_even() -> None:
    shapes = [(30, 60), (60, 60), (10, 60)]
    found = dynamic_ranks([1e4, 10.0, 3.0], shapes, 0.6 * sum(m * n for m, n in shapes))
    assert found[0] == 20
    spent = sum(rank * (m + n) for rank, (m, n) in zip(found, shapes, strict=True))
    assert 0.95 * 0.6 * 6000 < spent <= 0.6 * 6000


def test_effective_rank_of_equal_values_is_their_number() -> None:
    assert math.isclose(effective_rank(torch.full((7,), 2.0, dtype=torch.float64)), 7.0)
    assert math.isclose(effective_rank(torch.tensor([3.0, 0.0], dtype=torch.float64)), 1.0)


def test_curing_keeps_rows_of_the_weight(W: torch.Tensor) -> None:
    left, right = cur_factors(W, torch.ones(N, dtype=torch.float64), R)
    assert left.shape == (M, R)
    assert all(any(torch.equal(row, own) for own in W) for row in right)


def test_diagonals_are_those_of_the_gradients(llama: LlamaForCausalLM) -> None:
    windows = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.up_proj"
    found = measure(llama, windows, [name])
    wanted = torch.zeros(24, 16)
    for window in windows:
        llama.zero_grad()
        llama(input_ids=window[None], labels=window[None]).loss.backward()
        wanted += llama.get_submodule(name).weight.grad.square() / 3
    torch.testing.assert_close(found.fisher[name].float(), wanted.sum(1))
    assert found.magnitude[name].shape == (16,)
    assert bool((found.magnitude[name] > 0).all())


def test_magnitudes_alone_are_those_beside_the_gradients(llama: LlamaForCausalLM) -> None:
    windows = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(0))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found, wanted = magnitudes(llama, windows, names), measure(llama, windows, names).magnitude
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], wanted[name])
    assert not any(module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearest_rounding_is_off_by_half_a_step_at_most(bits: int) -> None:
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = round_to_nearest(W, bits=bits, group=16)
    parts = W.view(6, 4, 16)
    steps = (parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)
    # a zero that is no integer shifts the grid by half a step, steps are rounded to half precision
    assert bool(((W - Q).abs().view(6, 4, 16) <= 1.02 * steps[..., None]).all())
    assert all(len(group.unique()) <= 2**bits for group in Q.view(-1, 16))
    torch.testing.assert_close(round_to_nearest(Q, bits=bits, group=16), Q, rtol=1e-3, atol=0)


def test_bytes_are_those_of_integers_steps_and_zeros() -> None:
    assert grid_bytes(3, 64, bits=4, group=32, zero_bits=4) == 3 * (64 / 2 + 2 * (2 + 0.5))
    assert grid_bytes(3, 80, bits=3, group=32, zero_bits=16) == 3 * (80 * 3 / 8 + 3 * (2 + 2))


def test_the_last_group_is_rounded_for_itself() -> None:
    W = torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in (round_to_nearest, half_quadratic):
        parts = [method(W[:, :32], bits=3, group=16), method(W[:, 32:], bits=3, group=8)]
        assert torch.equal(method(W, bits=3, group=16), torch.cat(parts, 1))


def test_hqq_finds_a_zero_that_is_no_integer() -> None:
    """Whatever lies on a grid is on it again, wherever that has its 0."""
    q = torch.randint(16, (5, 64), generator=torch.Generator().manual_seed(0)).double()
    q[:, ::32], q[:, 1::32] = 0, 15
    W = (q - 7.4) * 0.125
    plain, found = (W - f(W, bits=4, group=32) for f in (round_to_nearest, half_quadratic))
    assert float(found.norm()) < 0.1 * float(plain.norm())


def test_hqq_lets_large_errors_be_for_the_small_ones() -> None:
    W = torch.randn(8, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in (3, 4):
        plain, found = (W - f(W, bits=bits, group=64) for f in (round_to_nearest, half_quadratic))
        assert float((found.abs() ** 0.7).sum()) < float((plain.abs() ** 0.7).sum())


def test_awq_is_nearest_rounding_where_all_inputs_are_alike(W: torch.Tensor) -> None:
    (found,), _ = activation_aware(
        [W], torch.eye(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64), bits=4, group=N
    )
    torch.testing.assert_close(found, round_to_nearest(W, bits=4, group=N))


def test_awq_rounds_columns_of_large_inputs_finely(W: torch.Tensor, X: torch.Tensor) -> None:
    moment, magnitude = X.T @ X / len(X), X.abs().mean(0)
    weights = [W, W.flip(0)[:5].contiguous()]
    found, alpha = activation_aware(weights, moment, magnitude, bits=3, group=N)
    plain = [round_to_nearest(weight, bits=3, group=N) for weight in weights]
    assert alpha > 0
    assert sum(loss(w, q, X) ** 2 for w, q in zip(weights, found, strict=True)) < 0.5 * sum(
        loss(w, q, X) ** 2 for w, q in zip(weights, plain, strict=True)
    )
    # one scale for all that read the same: multiplied by it, each lies on a grid
    s = magnitude**alpha
    s = s / (s.max() * s.min()).sqrt()
    for weight, rounded in zip(weights, found, strict=True):
        torch.testing.assert_close(rounded * s, round_to_nearest(weight * s, bits=3, group=N))
