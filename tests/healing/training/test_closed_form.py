from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from cur._lib.errors import NumericalError
from cur.healing import HealingConfig, LeastSquares, heal
from cur.healing.pair.cores import Core
from cur.integrations.nn import CURLinear, compressed_modules

M, N, RANK, TOKENS = 8, 12, 3, 60


@pytest.fixture
def problem_data() -> tuple[CURLinear, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, RANK), (RANK, RANK), (RANK, N), (M,), (TOKENS, N), (TOKENS, M), (M, M))
    C, U, R, bias, x, y, factor = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return CURLinear.from_factors(C, U, R, bias=bias), x, y, factor @ factor.T


@pytest.mark.parametrize("metric", [False, True])
def test_the_solution_is_that_of_dense_least_squares(
    metric: bool, problem_data: tuple[CURLinear, torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    layer, x, y, H = problem_data
    problem = LeastSquares(Core("layer", layer), H if metric else None)
    for start in range(0, TOKENS, 25):  # streamed, in parts
        problem.add(x[start : start + 25], y[start : start + 25])
    U = problem.solve(ridge=0.0)
    root = torch.linalg.cholesky(H).T if metric else torch.eye(M, dtype=torch.float64)
    z = x @ layer.R.weight.T
    design = torch.kron(z, root @ layer.C.weight)  # rows: tokens and outputs, columns: U by columns
    wanted = ((y - layer.C.bias) @ root.T).reshape(-1, 1)
    best = torch.linalg.lstsq(design, wanted).solution.reshape(RANK, RANK).T
    # Inputs go through float32.
    assert torch.linalg.norm(U - best) <= 1e-4 * torch.linalg.norm(best)
    residual = (design @ best.T.reshape(-1, 1) - wanted).detach().square().sum() / wanted.detach().square().sum()
    assert problem.error(U) == pytest.approx(float(residual), rel=1e-4)
    span = torch.linalg.qr(root @ layer.C.weight).Q
    target = (y - layer.C.bias) @ root.T
    outside = ((target - target @ span @ span.T).detach().square().sum() / target.detach().square().sum()).item()
    assert problem.floor() == pytest.approx(outside, rel=1e-6)
    assert problem.floor() <= problem.error(U)


def test_the_ridge_pulls_towards_the_core_as_it_is(
    problem_data: tuple[CURLinear, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    layer, x, y, _ = problem_data
    core = Core("layer", layer)
    problem = LeastSquares(core)
    problem.add(x, y)
    distances = [float(torch.linalg.norm(problem.solve(ridge=r) - core.start)) for r in (0.0, 0.1, 1.0, 10.0, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] <= 1e-5 * distances[0]
    errors = [problem.error(problem.solve(ridge=r)) for r in (0.0, 0.1, 1.0, 10.0)]
    assert errors == sorted(errors)


def test_directions_without_inputs_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    C, U, R = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((M, RANK), (RANK, RANK), (RANK, N)))
    layer = CURLinear.from_factors(C, U, R)
    x = torch.randn(1, N, generator=generator, dtype=torch.float64).repeat(5, 1)  # one direction only
    problem = LeastSquares(Core("layer", layer))
    problem.add(x, torch.zeros(5, M, dtype=torch.float64))
    best = problem.solve(ridge=0.0)
    z = R @ x[0]
    assert torch.linalg.norm(best @ z) <= 1e-5 * torch.linalg.norm(U @ z)
    across = torch.linalg.svd(z[None]).Vh[1:].T
    assert torch.linalg.norm((best - U) @ across) <= 1e-5 * torch.linalg.norm(U)


def test_targets_that_are_not_finite(
    problem_data: tuple[CURLinear, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    layer, x, y, _ = problem_data
    problem = LeastSquares(Core("layer", layer))
    problem.add(x, y * torch.nan)
    with pytest.raises(NumericalError, match="the inputs or wanted outputs of layer are not finite"):
        problem.solve(ridge=0.1)


def test_layers_of_one_input_are_solved_together_and_errors_fall(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    settings: Callable[..., HealingConfig],
) -> None:
    report = heal(student, teacher, windows, settings(steps=0, metric_windows=0, ridge=0.0))
    assert {fit.name for fit in report.fits} == set(compressed_modules(student))
    assert all(fit.floor <= fit.after <= fit.before * (1 + 1e-6) for fit in report.fits)
    ends = [fit.name.rpartition(".")[2] for fit in report.fits]
    assert ends == ["q_proj", "k_proj", "gate_proj"] * 2
    assert report.curve[0]["kl"] < report.before["kl"]
