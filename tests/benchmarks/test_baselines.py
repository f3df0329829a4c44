"""Each baseline has the property that its paper states."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.baselines import (
    activation_scaled,
    cur_factors,
    dynamic_ranks,
    effective_rank,
    fisher_weighted,
    measure,
    nearest,
    pivot_rows,
    reconstruct_,
    refit,
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
