from __future__ import annotations

from typing import Any

import pytest

from cur.cli.given import Given
from cur.cli.settings import compress_config
from cur.integrations import BudgetConfig, CompressConfig


def config(**given: Any) -> CompressConfig | BudgetConfig:
    return compress_config(Given(values=given, named={}))


def test_without_options_it_is_the_setting_of_the_paper() -> None:
    assert config() == CompressConfig()
    assert config(method="paper", rank=6, targets=("q_proj",)) == CompressConfig(rank=6, targets=("q_proj",))


def test_a_budget_means_the_best_method_on_all_layers() -> None:
    assert config(keep=0.8) == BudgetConfig(keep=0.8, method="best", targets="all-linear")
    assert config(parameters=10**6) == BudgetConfig(parameters=10**6)
    assert config(keep=0.8, method="rows", gradients=False) == BudgetConfig(keep=0.8, method="rows", gradients=False)
    assert config(keep=0.8, own_text=0) == BudgetConfig(keep=0.8, own_text=0)
    assert config(keep=0.8, correction=0.2) == BudgetConfig(keep=0.8, correction=0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "luck"}, "--method must be one of best, rows, paper, got 'luck'"),
        ({"keep": 0.5, "parameters": 7}, "--keep, --target-parameters, --size, --bits and --tol exclude each other"),
        ({"keep": 0.5, "method": "paper"}, "--method paper has no budget"),
        ({"method": "best"}, "--method best needs a budget: give --keep"),
        ({"keep": 0.5, "rank": 8, "link": "optimal"}, "--rank, --link belong to --method paper"),
        ({"gradients": False, "own_text": 0}, "--no-gradients, --own-text 0 belong to a budget"),
        ({"method": "paper", "correction": 0.2}, "--correction 0.2 belongs to a budget"),
        ({"neurons": False}, "--no-neurons belongs to a budget"),
        ({"keep": 1.5}, "`keep` must be between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)
