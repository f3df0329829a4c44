"""Targets that stay dense: too small to gain, or not reached by the text."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from cur.cli.app import app
from cur.integrations import BudgetConfig, CompressConfig, compress
from cur.integrations.blockwise import compress_blockwise, load_streamed
from cur.integrations.compress import carry_out_, measure
from cur.integrations.measure.text import batches
from cur.integrations.plan.dense import dense_remark
from cur.integrations.plan.make import make_plan
from cur.integrations.plan.plan import Plan
from cur.integrations.report.page import can_draw, report_page
from tests.models import TEXT, VOCABULARY, make, tokenizer

_MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
_MADE: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2_moe": lambda: make("qwen2_moe"),
    "qwen3_next": lambda: _random(hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**_SIZES))),
    "mixtral": lambda: _never_chosen(make("mixtral", num_local_experts=5)),
    "gpt_oss": lambda: _never_chosen(make("gpt_oss", num_local_experts=5, num_experts_per_tok=2)),
    "mamba": lambda: _random(hf.MambaForCausalLM(hf.MambaConfig(**_MAMBA))),
    "falcon_mamba": lambda: _random(hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**_MAMBA))),
}
LEFT = {
    "qwen2_moe": ("shared_expert_gate", "is too small"),
    "qwen3_next": ("shared_expert_gate", "is too small"),
    "mixtral": ("experts.down_proj.4", "no input reached"),
    "gpt_oss": ("experts.down_proj.4", "no input reached"),
    "mamba": ("dt_proj", "no input reached"),
    "falcon_mamba": ("dt_proj", "no input reached"),
}
"""By family, layers that have to stay dense, and why."""
BUDGET = BudgetConfig(keep=0.8, own_text=0.0, gradients=False)
PAPER = CompressConfig(layers=(1, 2), targets="all-linear", rank=6)


def _random(model: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                parameter.data.normal_(std=0.15)
    return model.eval()


def _never_chosen(model: Any) -> Any:
    """Keep all tokens from the last of five experts of every block."""
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and hasattr(module, "weight"):
            rows = module.weight.data
            # Of two numbers and their opposites two are above zero.
            rows[1], rows[3], rows[4] = -rows[0], -rows[2], 0.0
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
    return model


def stays_dense(kind: str, plan: Plan) -> None:
    end, why = LEFT[kind]
    left = [name for name in plan.dense if name.endswith(end)]
    assert left
    assert all(why in plan.dense[name] and name in plan.dense[name] for name in left)
    assert plan.entries
    assert not set(plan.dense) & {entry.name for entry in plan.entries}
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("kind", LEFT)
def test_they_stay_dense_with_a_line_that_says_why(kind: str, windows: torch.Tensor) -> None:
    model = _MADE[kind]()
    report = compress(model, windows, PAPER)
    stays_dense(kind, report.plan)
    assert torch.isfinite(model(windows).logits).all()
    assert next(iter(report.plan.dense.values())) in dense_remark(report.plan.dense)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "mamba"])
@pytest.mark.parametrize("gradients", [False, True])
def test_under_a_budget_they_count_and_stay_dense(kind: str, windows: torch.Tensor, gradients: bool) -> None:
    model = _MADE[kind]()
    report = compress(model, windows, replace(BUDGET, gradients=gradients))
    stays_dense(kind, report.plan)
    assert report.plan.kept is not None
    assert report.plan.kept <= 0.8


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "mamba", "falcon_mamba"])
@pytest.mark.parametrize("config", [PAPER, BUDGET], ids=["paper", "budget"])
def test_block_by_block_the_plan_is_the_same(kind: str, config: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    model = _MADE[kind]()
    model.save_pretrained(tmp_path / "dense")
    tokenizer(more=1).save_pretrained(tmp_path / "dense")
    parts = compress_blockwise(load_streamed(tmp_path / "dense"), windows, tmp_path / "parts", config)
    stays_dense(kind, parts.plan)
    assert Plan.load(tmp_path / "parts" / "plan.json").dense == parts.plan.dense
    assert compress(model, windows, config).plan.dense == parts.plan.dense


@pytest.mark.parametrize("kind", LEFT)
def test_a_layer_that_is_named_by_itself_is_refused(kind: str, windows: torch.Tensor) -> None:
    end, why = LEFT[kind]
    model = _MADE[kind]()
    name = next(name for name in compress(_MADE[kind](), windows, PAPER).plan.dense if name.endswith(end))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for targets in ((name,), ("in_proj", name) if "mamba" in kind else ("q_proj", name), name.replace(".", r"\.")):
        for config in (replace(PAPER, targets=targets, rank=1), replace(BUDGET, targets=targets)):
            with pytest.raises(ValueError, match=why) as error:
                compress(model, windows, config)
            assert name in str(error.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["qwen2_moe", "mamba"])
def test_where_nothing_is_left_to_compress_the_reason_is_told(kind: str, windows: torch.Tensor) -> None:
    end, why = LEFT[kind]
    for config in (replace(PAPER, targets=(end,), rank=1), replace(BUDGET, targets=(end,))):
        with pytest.raises(ValueError, match=rf"{why}.*, and the other \d targets stay dense likewise"):
            compress(_MADE[kind](), windows, config)


def test_what_is_too_small_is_refused_before_any_pass(windows: torch.Tensor) -> None:
    model = _MADE["qwen2_moe"]()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="is too small"):
        compress(model, windows, replace(PAPER, targets=("shared_expert_gate",)))


def test_a_plan_with_an_entry_for_what_the_text_does_not_reach_is_refused(windows: torch.Tensor) -> None:
    plan = make_plan(
        (other := make("mixtral", num_local_experts=5)), measure(other, batches(windows, batch_size=6), BUDGET), BUDGET
    )
    model = _MADE["mixtral"]()
    statistics = measure(model, batches(windows, batch_size=6), plan)
    with pytest.raises(ValueError, match=r"no input reached .*\.4 .*the plan has an entry for it"):
        carry_out_(model, plan, statistics)


def test_a_plan_without_such_layers_says_nothing(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    plan = compress(llama, windows, PAPER).plan
    assert plan.dense == {}
    assert "dense" not in plan.to_dict()
    assert dense_remark(plan.dense) == ""


@pytest.mark.skipif(not can_draw(), reason="the page needs matplotlib")
def test_the_page_has_the_line(windows: torch.Tensor) -> None:
    report = compress(_MADE["qwen2_moe"](), windows, PAPER)
    assert dense_remark(report.plan.dense) in html.unescape(report_page(report))


def test_the_commands_print_the_line(tmp_path: Path) -> None:
    model = _MADE["qwen2_moe"]()
    model.save_pretrained(tmp_path / "dense")
    tokenizer(more=1).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    given = [str(tmp_path / "dense"), "--text", str(tmp_path / "text.txt"), "--rank", "6", "--layers", "2"]
    given += ["--targets", "all-linear", "--windows", "4", "--window-length", "16"]
    for command, out in (("plan", "plan.json"), ("compress", "small")):
        done = CliRunner().invoke(app, [command, *given, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        printed = " ".join(done.output.split())
        assert "shared_expert_gate (1 x 32) is too small: no rank saves anything" in printed
    assert "is too small" in (tmp_path / "small" / "README.md").read_text()


def test_a_budget_that_cannot_be_met_says_what_stays_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> Any:
            return self.third(self.second(self.first(x)))

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"`keep` must be at least .*; targets that stay dense .*first is tied to second"
    ):
        compress(Tied(), [x], BudgetConfig(keep=0.3))
    size = r"`parameters` must be at least .*; targets that stay dense .*first is tied to second"
    with pytest.raises(ValueError, match=size):
        compress(Tied(), [x], BudgetConfig(parameters=1100))
