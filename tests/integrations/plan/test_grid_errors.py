"""What rounding is expected to lose, beside what it loses; and budgets that choose among grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cur.integrations import BudgetConfig, compress
from cur.integrations.compress import measure
from cur.integrations.nn import IntegerGrid, WholeLinear, compressed_modules
from cur.integrations.plan.grid_errors import GRIDS, expected_errors, pivots
from cur.integrations.plan.make import Layers, budget_forms
from cur.integrations.plan.methods import ROUNDING_DAMPING
from cur.integrations.sources import as_batches
from cur.rounding import round_to_grid
from tests.models import VOCABULARY, make


def _moment(n: int, seed: int) -> torch.Tensor:
    """Return a second moment whose eigenvalues fall over three decades."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * torch.logspace(0, -3, n, dtype=torch.float64) @ Q.T


@pytest.mark.parametrize(("m", "n"), [(96, 128), (160, 64)])
@pytest.mark.parametrize(("bits", "slack"), [(2, 1.4), (3, 1.2), (4, 1.2), (6, 1.15)])
def test_what_is_expected_is_what_rounding_loses(m: int, n: int, bits: int, slack: float) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H, G = _moment(m, 1), _moment(n, 2)
    grid = IntegerGrid(bits, 32, symmetric=False)
    sides = [pivots(moment, ROUNDING_DAMPING, "layer") for moment in (H, G)]
    expected = float(expected_errors(W, *sides, [grid])[0])
    done = round_to_grid(
        W.numpy(),
        bits=bits,
        group=32,
        row_weights=H.numpy(),
        column_weights=G.numpy(),
        damping=ROUNDING_DAMPING,
        dtype="float64",
    )
    E = torch.from_numpy(done.toarray()) - W
    lost = float(((H @ E) * (E @ G)).sum())
    assert expected / slack <= lost <= expected * slack


def test_rows_of_eight_bits_without_gradients() -> None:
    W = torch.randn(64, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    G = _moment(80, 4)
    expected = float(expected_errors(W, None, pivots(G, 0.0, "layer"), [IntegerGrid()])[0])
    done = round_to_grid(W.numpy(), bits=8, symmetric=True, column_weights=G.numpy(), dtype="float64")
    E = torch.from_numpy(done.toarray()) - W
    assert expected / 1.2 <= float(((E @ G) * E).sum()) <= expected * 1.2


def test_more_bits_and_smaller_groups_are_expected_to_lose_less() -> None:
    W = torch.randn(32, 256, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = dict(zip(GRIDS, expected_errors(W, None, pivots(_moment(256, 6), 0.1, "layer")), strict=True))
    for group in (32, 64, 128):
        by_bits = [found[IntegerGrid(bits, group, symmetric=False)] for bits in (2, 3, 4, 5, 6, 8)]
        assert by_bits == sorted(by_bits, reverse=True)
    by_group = [found[IntegerGrid(4, group, symmetric=False)] for group in (32, 64, 128)]
    assert by_group == sorted(by_group)


def test_a_moment_that_was_never_seen_counts_nothing() -> None:
    assert torch.equal(
        pivots(torch.zeros(4, 4, dtype=torch.float64), 0.1, "layer"), torch.zeros(4, dtype=torch.float64)
    )


def _bits(report_plan: object, model: torch.nn.Module) -> float:
    layers = compressed_modules(model).values()
    stored = sum(
        type(layer).nbytes(*layer.shape, *layer.ranks, dtype=torch.float32, grid=layer.grid) for layer in layers
    )
    return 8 * stored / report_plan.targeted_parameters  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("bits", [3.2, 4.5, 6.0])
def test_bits_are_met_and_never_exceeded(bits: float) -> None:
    model = make("llama", seed=0, blocks=5)
    tokens = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    report = compress(model, tokens, BudgetConfig(bits=bits, own_text=0))
    assert len(report.plan.entries) == len(compressed_modules(model))  # none stays dense
    assert 0.97 * bits <= _bits(report.plan, model) <= bits
    assert all(entry.grid is not None for entry in report.plan.entries)


def test_shared_bits_are_foreseen_to_lose_less_than_the_same_for_all() -> None:
    model = make("llama", seed=0, blocks=3)
    tokens = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    statistics = measure(model, as_batches(tokens, 1), BudgetConfig(bits=4.0, own_text=0))
    place = next(place for place, grid in enumerate(GRIDS) if (grid.bits, grid.group) == (4, 32))
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "layers" in name]
    shapes = [model.get_submodule(name).weight.shape for name in names]
    stored = sum(WholeLinear.nbytes(m, n, min(m, n), dtype=torch.float32, grid=GRIDS[place]) for m, n in shapes)
    bits = 8 * stored / sum(m * n for m, n in shapes)
    forms = budget_forms(model, statistics, BudgetConfig(bits=bits), Layers(model, statistics))
    even = sum(float(curve.rounded[place]) for curve in forms.curves)
    plan = forms.plan()
    assert len({entry.grid for entry in plan.entries}) > 1
    assert sum(entry.predicted or 0.0 for entry in plan.entries) < 0.95 * even
    # and what is allowed to lose as much takes fewer bytes
    loose = replace(forms, config=BudgetConfig(tol=1.0)).plan(loss=even)
    assert sum(entry.nbytes(torch.float32) for entry in loose.entries) < stored
    assert sum(entry.predicted or 0.0 for entry in loose.entries) <= even


def test_without_rounding_a_size_has_ranks_and_neurons_alone() -> None:
    model = make("llama", seed=0, blocks=3)
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    whole = sum(part.nbytes for part in model.parameters())
    report = compress(model, tokens, BudgetConfig(size=int(0.8 * whole), rounding=False, own_text=0))
    assert all(entry.grid is None for entry in report.plan.entries)


def test_what_2_bits_cannot_reach_is_refused() -> None:
    model = make("llama", seed=0, blocks=2)
    tokens = torch.randint(VOCABULARY, (4, 32))
    with pytest.raises(ValueError, match=r"`bits` must be at least 2\.\d+, what grids of 2 bits take .*; got 1\.5"):
        compress(model, tokens, BudgetConfig(bits=1.5, own_text=0))
    with pytest.raises(ValueError, match=r"`bits` must be below 32, .*; got 33: there is nothing to do"):
        compress(model, tokens, BudgetConfig(bits=33, own_text=0))
    with pytest.raises(ValueError, match=r"`size` must be at least .* \(the rest is what grids of 2 bits take\)"):
        compress(model, tokens, BudgetConfig(size=1000, own_text=0))
    assert not compressed_modules(model)


def test_a_layer_without_gradients_is_rounded_by_its_inputs() -> None:
    model = make("llama", seed=0, blocks=2)
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    report = compress(model, tokens, BudgetConfig(bits=5, gradients=False, own_text=0))
    assert {entry.method for entry in report.plan.entries} <= {"rounded", "weighted", "neurons"}
    assert any(entry.method == "rounded" for entry in report.plan.entries)


def test_curves_of_another_kind_of_budget_are_refused() -> None:
    model = make("llama", seed=0, blocks=2)
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    of_bits, of_parameters = BudgetConfig(bits=5, own_text=0), BudgetConfig(keep=0.8, own_text=0)
    statistics = measure(model, as_batches(tokens, 1), of_bits)
    for one, other in ((of_bits, of_parameters), (of_parameters, of_bits)):
        forms = budget_forms(model, statistics, one, Layers(model, statistics))
        assert forms.plan().entries
        with pytest.raises(ValueError, match="`curves` must have been made for a budget of the same kind"):
            replace(forms, config=other).plan()


@pytest.mark.parametrize("config", [BudgetConfig(bits=5, own_text=0), BudgetConfig(keep=0.8, own_text=0)])
def test_statistics_that_lack_a_layer_are_refused_in_a_sentence(config: BudgetConfig) -> None:
    model = make("llama", seed=0, blocks=2)
    tokens = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    narrow = replace(config, targets=("q_proj",))
    statistics = measure(model, as_batches(tokens, 1), narrow)
    with pytest.raises(ValueError, match=r"statistics.*k_proj|k_proj.*statistics"):
        budget_forms(model, statistics, config, Layers(model, statistics))
