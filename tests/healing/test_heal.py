from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import cur.healing.training.loop
from cur._lib.errors import NumericalError
from cur.healing import HealingConfig, Objectives, StateError, Status, heal
from cur.integrations.nn import compressed_modules, factored

ROOT = Path(__file__).parents[2]
Make = Callable[..., PreTrainedModel]
Settings = Callable[..., HealingConfig]


def cores(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in compressed_modules(model).items()}


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", factored())
def test_the_weight_moves_within_the_span_of_columns_and_rows(
    kind: str, layout: str, make_teacher: Make, make_student: Make, windows: torch.Tensor, settings: Settings
) -> None:
    """Theorem 4.3 of arXiv 2501.04211."""
    teacher = make_teacher(kind).double()
    student = make_student(teacher, layout=layout)
    factors = {name: [f.detach().clone() for f in m.two_factors()] for name, m in compressed_modules(student).items()}
    spans = {
        name: (m.C.weight.detach().clone(), m.R.weight.detach().clone()) if layout == "cur" else factors[name]
        for name, m in compressed_modules(student).items()
    }
    before = cores(student)
    assert before
    heal(student, teacher, windows, settings(steps=5, precision="auto"))
    for name, weight in cores(student).items():
        change = weight - before[name]
        size = torch.linalg.norm(change)
        assert size > 1e-3 * torch.linalg.norm(before[name])
        left, right = torch.linalg.qr(spans[name][0]).Q, torch.linalg.qr(spans[name][1].T).Q
        rest = change - left @ (left.T @ change @ right) @ right.T
        scale = torch.linalg.norm(weight) + torch.linalg.norm(before[name])
        # A rank-deficient left factor is only spanned up to its conditioning.
        assert torch.linalg.norm(rest) <= 1e6 * torch.finfo(torch.float64).eps * scale


@pytest.mark.parametrize("layout", factored())
def test_only_the_factor_that_learns_changes(
    layout: str, teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings
) -> None:
    student = make_student(teacher, layout=layout)
    learns = {"cur": ".U.weight", "folded": ".CU.weight", "interpolative": ".R.weight"}[layout]
    before, dense = everything(student), everything(teacher)
    heal(student, teacher, windows, settings())
    after = everything(student)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(learns) and not name.startswith("lm_head")}
    assert same(dense, everything(teacher))
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())


@pytest.mark.parametrize(
    "objectives",
    [
        Objectives(kl=1.0),
        Objectives(kl=1.0, temperature=2.0),
        Objectives(kl=0.0, hidden=1.0),
        Objectives(kl=0.0, modules=1.0),
        Objectives(kl=0.0, hidden=0.9, next_token=0.1),
    ],
)
def test_every_objective_falls(
    objectives: Objectives,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    settings: Settings,
) -> None:
    report = heal(student, teacher, windows, settings(objectives=objectives, closed_form=False))
    assert report.curve[0]["loss"] == pytest.approx(report.before["loss"])
    assert report.curve[-1]["loss"] < 0.99 * report.before["loss"]


def test_layouts_learn_the_same_function(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings
) -> None:
    teacher = teacher.double()
    found = []
    for layout in ("cur", "folded"):
        student = make_student(teacher, layout=layout)
        heal(student, teacher, windows, settings(steps=0, ridge=0.0, precision="auto"))
        found.append(cores(student))
    assert found[0]
    for name, weight in found[0].items():
        assert torch.linalg.norm(found[1][name] - weight) <= 1e-6 * torch.linalg.norm(weight)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_the_best_state_is_kept(
    scope: str, student: PreTrainedModel, teacher: PreTrainedModel, windows: torch.Tensor, settings: Settings
) -> None:
    # A rate at which the loss explodes: what it began with stays the best.
    start = settings(steps=0, scope=scope)
    heal(student, teacher, windows, start)
    best = cores(student)
    wild = settings(closed_form=False, scope=scope, learning_rate=1e3, evaluate_every=1, patience=2, steps=40)
    report = heal(student, teacher, windows, wild)
    assert report.steps < 40
    assert report.best_step == -1
    assert same(cores(student), best)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_closed_form_that_harms_is_taken_back(
    scope: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def harm(pair: Any, *_: Any, **__: Any) -> list[Any]:
        for core in pair.cores.values():
            core.write_(10 * core.start)
        return []

    # The package has a function of the name of this module.
    monkeypatch.setattr(sys.modules["cur.healing.heal"], "closed_form_", harm)
    before = everything(student)
    report = heal(student, teacher, windows, settings(steps=0, scope=scope, metric_windows=0))
    assert report.curve[0]["loss"] > report.before["loss"]
    assert report.best_step == -1
    assert same(everything(student), before)
    if scope == "model":
        assert str(report).endswith(f"{report.before['perplexity']:.2f} after")


def test_neither_workers_nor_checkpointing_nor_a_cache_change_the_result(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings, tmp_path: Path
) -> None:
    for scope, changes in (
        ("block", {"workers": 2}),
        ("block", {"gradient_checkpointing": True}),
        ("model", {"gradient_checkpointing": True}),
    ):
        plain, other = make_student(teacher), make_student(teacher)
        heal(plain, teacher, windows, settings(scope=scope))
        heal(other, teacher, windows, settings(scope=scope, **changes))
        assert same(everything(plain), everything(other))
    for _ in range(2):  # the second run reads what the first wrote
        other = make_student(teacher)
        heal(other, teacher, windows, settings(), cache=tmp_path / "cache")
        assert same(everything(plain), everything(other))
    assert any((tmp_path / "cache").iterdir())


def test_accumulation_equals_a_larger_batch(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings
) -> None:
    one, two = make_student(teacher), make_student(teacher)
    heal(one, teacher, windows, settings(batch_size=4, steps=3))
    heal(two, teacher, windows, settings(batch_size=2, accumulate=2, steps=3))
    assert cores(one)
    for name, weight in cores(one).items():
        assert torch.linalg.norm(cores(two)[name] - weight) <= 1e-4 * torch.linalg.norm(weight)


def test_padding_changes_nothing(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings
) -> None:
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(4)]
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5)),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        }
        for batch in batches
    ]
    found = []
    for given in (batches, padded):
        student = make_student(teacher)
        objectives = Objectives(kl=1.0, hidden=1.0, modules=1.0, next_token=1.0)
        report = heal(student, teacher, given, settings(held_out=2, steps=3, objectives=objectives))
        found.append((cores(student), report.curve[-1]))
    assert all(found[0])
    for name, value in found[0][1].items():
        assert found[1][1][name] == pytest.approx(value, rel=1e-3), name
    for name, weight in found[0][0].items():
        assert torch.linalg.norm(found[1][0][name] - weight) <= 1e-3 * torch.linalg.norm(weight)


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForCausalLM
import cur.integrations
from cur.healing import HealingConfig, heal
torch.set_num_threads(1)
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[2])
student = AutoModelForCausalLM.from_pretrained(sys.argv[3])
def show(status):
    print(status.step, flush=True)
    if status.stage == "heal" and status.step == int(sys.argv[6]):
        sys.stdin.readline()  # waits here until it is killed
small = dict(steps=6, held_out=4, evaluate_every=3, save_every=2, warmup=2, precision="bfloat16")
config = HealingConfig(**small)
heal(student, teacher, torch.load(sys.argv[4]), config, state=sys.argv[5], progress=show)
torch.save({k: v for k, v in student.state_dict().items()}, sys.argv[5] + ".out")
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    torch.save(windows, tmp_path / "windows.pt")

    def run(state: str, stop: int) -> subprocess.Popen[str]:
        arguments = [ROOT, tmp_path / "teacher", tmp_path / "student", tmp_path / "windows.pt", tmp_path / state, stop]
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with run("killed", 5) as killed:
        assert killed.stdout is not None
        while killed.stdout.readline() != "5\n":
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed.out").exists()
    with run("whole", -1) as whole, run("killed", -1) as again:
        said = again.communicate()[0].split()
        whole.communicate()
    assert said == ["5", "6"]  # from the state of step 4, without the closed form
    assert whole.returncode == 0 == again.returncode
    assert same(torch.load(tmp_path / "whole.out"), torch.load(tmp_path / "killed.out"))
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["number"] for line in lines if line["event"] == "natural step"] == [1]


@pytest.mark.parametrize("stop", [1, 4])
def test_blocks_go_on_as_well(
    stop: int, teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings, tmp_path: Path
) -> None:
    def interrupt(status: Status) -> None:
        if status.stage == "heal" and status.step == stop:
            raise KeyboardInterrupt

    expected = make_student(teacher)
    heal(expected, teacher, windows, settings(scope="block"))
    with pytest.raises(KeyboardInterrupt):
        heal(make_student(teacher), teacher, windows, settings(scope="block"), state=tmp_path, progress=interrupt)
    student = make_student(teacher)
    report = heal(student, teacher, windows, settings(scope="block"), state=tmp_path)
    assert same(everything(student), everything(expected))
    assert len(report.fits) == len(compressed_modules(student))
    assert report.before


def test_a_run_goes_on_in_the_precision_in_which_it_was_begun(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings, tmp_path: Path
) -> None:
    def interrupt(status: Status) -> None:
        if status.step == 3:
            raise KeyboardInterrupt

    config = settings(precision="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        heal(make_student(teacher), teacher, windows, config, state=tmp_path, progress=interrupt)
    with pytest.raises(ValueError, match=r"must be bfloat16 or auto, got 'float32'.*holds a run in bfloat16"):
        heal(make_student(teacher), teacher, windows, settings(precision="float32"), state=tmp_path)
    # What is faster here would be float32.
    report = heal(make_student(teacher), teacher, windows, settings(precision="auto"), state=tmp_path)
    assert report.config["precision"] == "bfloat16"
    assert "products in bfloat16" in str(report)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["precision"] for line in lines if line["event"] == "begin"] == ["bfloat16"]


def test_a_state_of_another_run_is_refused(
    teacher: PreTrainedModel, make_student: Make, windows: torch.Tensor, settings: Settings, tmp_path: Path
) -> None:
    heal(make_student(teacher), teacher, windows, settings(), state=tmp_path)
    with pytest.raises(StateError, match="belongs to another run"):
        heal(make_student(teacher), teacher, windows, settings(learning_rate=0.5), state=tmp_path)
    with pytest.raises(StateError, match="belongs to another run"):
        heal(make_student(teacher), teacher, windows.flip(0), settings(), state=tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StateError, match="is damaged"):
        heal(make_student(teacher), teacher, windows, settings(), state=tmp_path)


def test_a_full_disk_leaves_the_last_state(
    teacher: PreTrainedModel,
    make_student: Make,
    windows: torch.Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno
    import os

    expected = make_student(teacher)
    heal(expected, teacher, windows, settings())
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left to write .*; the last complete state is kept"):
        heal(make_student(teacher), teacher, windows, settings(), state=tmp_path / "state")
    student = make_student(teacher)
    heal(student, teacher, windows, settings(), state=tmp_path / "state")
    assert same(everything(student), everything(expected))


def test_a_loss_that_is_not_finite_keeps_the_best_state(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = cores(student)
    learn, calls = cur.healing.training.loop.Comparison.learn, []

    def broken(self: Any, batch: Any, taught: Any) -> dict[str, float]:
        calls.append(1)
        figures = learn(self, batch, taught)
        if len(calls) == 5:
            self.pair.cores[next(iter(self.pair.cores))].factor.grad.fill_(torch.nan)
        return figures

    monkeypatch.setattr(cur.healing.training.loop.Comparison, "learn", broken)
    with pytest.raises(
        NumericalError, match=r"the gradient of .* is not finite, at step 5; the best state so far is kept"
    ):
        heal(student, teacher, windows, settings(closed_form=False))
    assert all(bool(torch.isfinite(weight).all()) for weight in cores(student).values())
    assert not same(before, cores(student))


def test_teachers_that_do_not_fit_are_refused(
    student: PreTrainedModel, windows: torch.Tensor, make_teacher: Make, settings: Settings
) -> None:
    def other(**changes: int) -> PreTrainedModel:
        config = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **{**config, **changes}))

    for changes, message in (
        ({"vocab_size": 50}, "`teacher` has vocabulary 50, the student 61"),
        ({"hidden_size": 64}, "`teacher` has width 64, the student 32"),
        ({"num_hidden_layers": 3}, "`teacher` has number of layers 3, the student 4"),
        ({"intermediate_size": 40}, "`teacher` has a weight of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            heal(student, other(**changes), windows, settings())
    with pytest.raises(ValueError, match="`teacher` is compressed itself"):
        heal(student, student, windows, settings())
    with pytest.raises(ValueError, match="`student` has no compressed layer"):
        heal(make_teacher(), make_teacher(), windows, settings())


def test_too_little_text(student: PreTrainedModel, teacher: PreTrainedModel, windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`batches` holds 10 samples, of which 8 are held out and 4 make a batch"):
        heal(student, teacher, windows[:10], HealingConfig())
    with pytest.raises(TypeError, match="`batches` must be token windows or a sequence"):
        heal(student, teacher, iter([]), HealingConfig())  # type: ignore[arg-type]


def test_tensorboard_that_is_missing_is_a_clear_error(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        heal(student, teacher, windows, settings(), tensorboard=tmp_path)
