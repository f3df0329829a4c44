from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from cur.healing import HealingConfig, heal, twin
from cur.healing.training.closed_form import LeastSquares
from cur.integrations import (
    BudgetConfig,
    CompressConfig,
    Statistics,
    collect,
    collect_gradients,
    compress,
    perplexity,
)
from cur.integrations.measure.generated_text import sample_windows
from cur.integrations.measure.propagation import in_order
from cur.integrations.model import precision as module
from cur.integrations.model.precision import Precision, check, continued
from cur.integrations.model.running import checkpointing
from cur.integrations.model.targets import decoder_layers, linear_modules
from cur.integrations.report.card import model_card
from tests.models import make

CPU = torch.device("cpu")
MEASURED = module.slowdown  # before the fixture of all tests puts a constant in its place

Make = Callable[[str], PreTrainedModel]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with units for half precision."""
    monkeypatch.setattr(module, "slowdown", lambda half, threads=None: 0.5)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that emulates it."""
    monkeypatch.setattr(module, "slowdown", lambda half, threads=None: 20.0)


def test_the_faster_one(fast: None) -> None:
    names = {dtype: Precision.on(CPU, dtype).name for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert list(names.values()) == ["bfloat16", "bfloat16", "float16"]
    assert Precision.on(CPU, torch.float32, "float32").name == "float32"


def test_float32_where_half_precision_is_emulated(slow: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Precision.on(CPU, dtype).name == "float32"
    assert Precision.on(CPU, torch.float32, "bfloat16").name == "bfloat16"  # a name wins
    assert Precision.on(CPU, torch.float64).name == "float64"


@pytest.mark.parametrize(("ratio", "name"), [(0.79, "bfloat16"), (0.81, "float32"), (1.0, "float32")])
def test_half_precision_must_be_worth_its_rounding(ratio: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "slowdown", lambda half, threads=None: ratio)
    assert Precision.on(CPU, torch.float32).name == name


def test_the_measurement_is_a_ratio_and_made_once() -> None:
    found = [MEASURED(torch.bfloat16, 1) for _ in range(2)]
    assert found[0] == found[1] > 0
    assert MEASURED.cache_info().hits >= 1


def test_an_emulated_product_is_not_measured_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    calls: list[int] = []
    assert module._shortest(lambda: calls.append(0), enough=0.5) == 1.0
    assert len(calls) == 2
    calls.clear()
    assert module._shortest(lambda: calls.append(0), enough=2.0) == 1.0
    assert len(calls) == 1 + module._TRIES


@pytest.mark.parametrize(
    ("kind", "reports", "name"),
    [("cuda", True, "bfloat16"), ("cuda", False, "float32"), ("mps", True, "bfloat16"), ("mps", False, "float32")],
)
def test_other_devices_are_asked(kind: str, reports: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: reports and not including_emulation
    )
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: reports)
    device = torch.device(kind)
    assert Precision.on(device, torch.float32).name == name
    assert Precision.on(device, torch.float16).name == "float16"
    assert f"Products in {name}." == Precision.on(device, torch.float32).remark().replace("Weights in float32, p", "P")
    if not reports:
        with pytest.raises(ValueError, match=rf"'bfloat16' is not to be had on the device '{kind}'; ask for float32"):
            Precision.on(device, torch.float32, "bfloat16")


def test_bad_input(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    known = {
        torch.float32: "auto, float32, bfloat16",
        torch.bfloat16: "auto, float32, bfloat16",
        torch.float16: "auto, float32, float16",
        torch.float64: "auto, float64",
    }
    for dtype, names in known.items():
        own = str(dtype).removeprefix("torch.")
        for asked in {"half", "float16", "float32", "bfloat16", "float64"} - set(names.split(", ")):
            with pytest.raises(ValueError, match=rf"must be one of {names} for weights in {own}, got '{asked}'"):
                Precision.on(CPU, dtype, asked)
    with pytest.raises(ValueError, match="`precision` must be one of auto, float32, bfloat16, got 'half'"):
        check("half")
    for run in (
        lambda: collect(llama, [windows], modules=["lm_head"], precision="half"),
        lambda: perplexity(llama, windows, precision="half"),
        lambda: sample_windows(llama, count=1, length=4, precision="half"),
        lambda: compress(llama, windows, CompressConfig(layers=2, rank=4), precision="half"),
        lambda: HealingConfig(precision="half"),
    ):
        with pytest.raises(ValueError, match=r"`precision` must be one of .*got 'half'"):
            run()


@pytest.mark.parametrize("ratio", [0.5, 20.0])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
@pytest.mark.parametrize("reports", [True, False])
def test_what_auto_found_can_be_asked_for(
    ratio: float, kind: str, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "slowdown", lambda half, threads=None: ratio)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: reports)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: reports)
    said = SimpleNamespace(is_bf16_supported=lambda: reports)
    monkeypatch.setattr(torch, "get_device_module", lambda _: said)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        name = Precision.on(torch.device(kind), dtype).name
        assert Precision.on(torch.device(kind), dtype, name).name == name


def test_a_run_that_goes_on(tmp_path: Any) -> None:
    assert continued("auto", None, tmp_path) == "auto"
    assert continued("auto", "bfloat16", tmp_path) == continued("bfloat16", "bfloat16", tmp_path) == "bfloat16"
    with pytest.raises(ValueError, match=r"must be bfloat16 or auto, got 'float32'.*remove"):
        continued("float32", "bfloat16", tmp_path)


def test_remarks(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(ratio: float, dtype: torch.dtype, asked: str) -> str:
        monkeypatch.setattr(module, "slowdown", lambda half, threads=None: ratio)
        return Precision.on(CPU, dtype, asked).remark(asked)

    assert "bfloat16, 2.0 times as fast as float32" in said(0.5, torch.float32, "auto")
    assert said(20, torch.float32, "auto").startswith("Products in float32; bfloat16 takes 20 times as long")
    assert "Weights in bfloat16, products in float32; bfloat16 takes 1.3" in said(1.3, torch.bfloat16, "auto")
    assert "in 104 times the time of float32" in said(104, torch.bfloat16, "bfloat16")
    assert "emulates it; ask for float32 or auto." in said(20, torch.bfloat16, "bfloat16")
    assert said(20, torch.float64, "auto") == "Products in float64."


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_products_of_half_weights_in_single(kind: str, make_model: Make, windows: torch.Tensor) -> None:
    """What a unit for half precision gives, but for the order of sums; in no product of the model's own dtype."""
    model = make_model(kind)
    exact = run(model, windows, "float32")
    model = model.to(torch.bfloat16)
    native, wide = (run(model, windows, name) for name in ("bfloat16", "float32"))
    assert native.dtype == wide.dtype == torch.bfloat16
    errors = [float(torch.linalg.norm(each.float() - exact) / torch.linalg.norm(exact)) for each in (native, wide)]
    assert 0 < errors[1] <= 1.5 * errors[0] < 0.1
    with Precision.of(model, "float32").products(), Watch() as seen:
        model(input_ids=windows)
    assert seen.dtypes == {torch.float32}
    with Watch() as seen:
        model(input_ids=windows)
    assert seen.dtypes == {torch.bfloat16}


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes of all products below autograd."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.called.add(name)
        if name in self.PRODUCTS or name.startswith("_scaled_dot_product"):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def run(model: PreTrainedModel, windows: torch.Tensor, name: str) -> torch.Tensor:
    with Precision.of(model, name).products():
        logits: torch.Tensor = model(input_ids=windows).logits
    return logits


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_every_pass_is_in_the_precision_that_is_named(
    dtype: torch.dtype, name: str, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    model, asked = llama.to(dtype), getattr(torch, name)
    names = linear_modules(model, "all-linear")
    seen = {
        "collect": watched(lambda: collect(model, [windows], modules=names, moments="full", precision=name)),
        "sample": watched(lambda: sample_windows(model, count=2, length=6, precision=name)),
        "perplexity": watched(lambda: perplexity(model, windows, precision=name)),
        "fits": watched(
            lambda: in_order(
                model,
                [{"input_ids": windows}],
                linear_modules(model, ("down_proj",)),
                lambda layer, _: model.get_submodule(layer),
                precision=name,
            )
        ),
    }
    # Logits are as the weights of the head are, second moments of fits in float32, others in float64.
    assert seen["collect"] - {torch.float64} == seen["sample"] == {asked}
    assert seen["perplexity"] == {asked, torch.float32}
    assert seen["fits"] - {torch.float64} == {asked, torch.float32}


def watched(work: Callable[[], Any]) -> set[torch.dtype]:
    with Watch() as seen:
        work()
    return seen.dtypes


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_experts_too(family: str, dtype: torch.dtype, name: str, windows: torch.Tensor) -> None:
    """transformers multiplies with all experts at once, by products that no context of PyTorch's reaches."""
    model = make(family).to(dtype)
    way = model.config._experts_implementation
    assert watched(lambda: sample_windows(model, count=2, length=6, precision=name)) == {getattr(torch, name)}
    with Watch() as seen:
        perplexity(model, windows, precision=name)
    assert seen.dtypes == {getattr(torch, name), torch.float32}
    assert not {called for called in seen.called if "grouped" in called}
    assert model.config._experts_implementation == way


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_gradients_too_and_blocks_that_run_again(
    dtype: torch.dtype, name: str, saving: bool, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    model = llama.to(dtype)
    passes = Precision.of(model, name)
    with Watch() as seen, checkpointing([block for _, block in decoder_layers(model)] if saving else [], passes):
        with passes.products():
            loss = model(input_ids=windows).logits.float().logsumexp(-1).sum()
        loss.backward()
    assert seen.dtypes == {getattr(torch, name)}
    assert all(part.grad is not None and part.grad.dtype == dtype for part in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_are_not_rounded(kind: str, llama: PreTrainedModel, windows: torch.Tensor) -> None:
    """The head is multiplied as it is, also where what it gives is capped afterwards."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma2 = Gemma2Config(vocab_size=101, num_key_value_heads=2, head_dim=8, **shape)
    model = llama if kind == "llama" else Gemma2ForCausalLM(gemma2).eval()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    head: Any = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    found = perplexity(model, windows, precision="bfloat16")
    assert found.precision == "bfloat16"
    assert {output for _, output in seen} == {torch.float32}
    assert "forward" not in vars(head)
    exact = perplexity(model, windows, precision="float32")
    assert found.value == pytest.approx(exact.value, rel=0.01)
    assert found.value != exact.value
    assert "products in bfloat16" in str(found)


def test_a_name_wins_over_an_autocast_around_it(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = perplexity(llama, windows, precision="float32")
    assert found.value == perplexity(llama, windows, precision="float32").value


def test_attention_of_pytorch_itself() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).to(torch.bfloat16)
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    with Precision.of(attention, "float32").products(), Watch() as seen:
        output = attention(x, x, x)[0]
    assert output.dtype == torch.bfloat16
    assert seen.dtypes == {torch.float32}


def test_least_squares_are_not_rounded(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    student = twin(llama)
    compress(student, windows, CompressConfig(layers=2, rank=4), precision="float32")
    seen: list[torch.dtype] = []
    solve = LeastSquares.add

    def add(self: Any, x: torch.Tensor, wanted: torch.Tensor) -> None:
        seen.append((self.core.right.float() @ self.core.right.float().T).dtype)
        solve(self, x, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeastSquares, "add", add)
        heal(student, llama, windows, HealingConfig(steps=0, held_out=2, precision="bfloat16"))
    assert seen
    assert set(seen) == {torch.float32}


def test_what_was_measured_in_another_precision_is_recorded_as_such(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    names = linear_modules(llama, CompressConfig().targets)
    layers = [name for name, _ in decoder_layers(llama)]
    statistics = collect(llama, [windows], modules=names, layers=layers, precision="bfloat16")
    report = compress(llama, statistics, CompressConfig(layers=2, rank=4), precision="float32")
    assert (report.plan.calibration_precision, report.precision) == ("bfloat16", "float32")
    card = model_card(llama, report)
    assert "seed 0, products in bfloat16, of later passes in float32." in card
    both = collect_gradients(llama, [windows], statistics, modules=names[:1], precision="float32")
    assert both.precision == "bfloat16, gradients in float32"


def test_statistics_in_bfloat16_are_those_in_float32_but_for_rounding(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    names = linear_modules(llama, "all-linear")
    found: list[Statistics] = [
        collect(llama, [windows], modules=names, moments="full", gradients=names, precision=name)
        for name in ("float32", "bfloat16")
    ]
    assert [one.precision for one in found] == ["float32", "bfloat16"]
    changes = [
        float(
            torch.linalg.norm(found[1].products[name] - found[0].products[name])
            / torch.linalg.norm(found[0].products[name])
        )
        for name in names
    ]
    assert 0 < max(changes) < 0.02
    # Labels are drawn, and rounding draws others of the same distribution: gradients are of the same size alone.
    for name in names:
        sizes = [float(each.output_products[name].trace()) for each in found]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_layers_are_made_in_full_precision_between_passes_in_half(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    """What is made inside a pass has nothing of it: factorizations would be in bfloat16."""
    names = linear_modules(llama, ("gate_proj", "down_proj"))
    seen: list[torch.dtype] = []

    def make(name: str, propagated: Any) -> Any:
        layer: Any = llama.get_submodule(name)
        seen.append((layer.weight @ layer.weight.T).dtype)
        return lambda x: nn.functional.linear(x, layer.weight)

    in_order(llama, [{"input_ids": windows}], names, make, precision="bfloat16")
    assert len(seen) == len(names)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("config", [CompressConfig(layers=2, rank=4), BudgetConfig(keep=0.6, targets="all-linear")])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_compression_and_healing(
    config: Any, dtype: torch.dtype, name: str, llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    model = llama.to(dtype)
    student = twin(model)
    report = compress(student, windows, config, precision=name)
    assert report.precision == name
    assert type(report).from_dict(report.to_dict()).precision == name
    assert {part.dtype for part in student.parameters()} == {dtype}
    healing = HealingConfig(steps=2, held_out=2, precision=name, gradient_checkpointing=True)
    healed = heal(student, model, windows, healing)
    assert healed.config["precision"] == name
    assert math.isfinite(healed.curve[-1]["loss"])


@pytest.mark.parametrize("reports", [True, False, None])
def test_a_device_that_nobody_here_knows(reports: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace() if reports is None else SimpleNamespace(is_bf16_supported=lambda: reports)
    monkeypatch.setattr(torch, "get_device_module", lambda _: said)
    device = torch.device("xpu")
    assert Precision.on(device, torch.float32).name == ("bfloat16" if reports else "float32")
    assert Precision.on(device, torch.bfloat16).name == "bfloat16"
