"""Measure what healing wins back on a real model, how fast, and against adapters of the same size.

The student is the paper's setting of ``benchmarks/paper_setting.py`` (10 layers, ``q_proj k_proj gate_proj``, WANDA +
DEIM, rank 128; 478,970 numbers in the cores). It is healed on WikiText-2 ``valid.txt``, 4 windows of 256 tokens a
step, and measured on the first 12 windows of 1024 tokens of ``test.txt`` and of the CPython language reference, each
window on its own, float32 on the CPU.

    python benchmarks/healing.py [--wikitext DIR] [--only NAME ...] [--student DIR] [--cache DIR]

prints a table and writes ``benchmarks/results/healing.json`` after each row; rows that are not measured again are kept.
All of it takes some five hours on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from environment import add_precision, environment, precision_of, processor
from paper_setting import SETTING, WIKITEXT
from torch import Tensor, nn

from cur.healing import HealingConfig, Objectives, heal, load_student
from cur.healing.pair.cache import TeacherCache
from cur.healing.pair.data import Text
from cur.healing.pair.pair import TeacherStudentPair
from cur.healing.training.learner import LARGEST_GRADIENT
from cur.integrations import collect, compress, decoder_layers, load_model, perplexity, read_text, save, token_windows
from cur.integrations.measure.text import batches
from cur.integrations.model.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "healing.json"
LENGTH, BATCH, WINDOWS = 256, 4, 12

PAPER = Objectives(kl=0.0, hidden=0.9, next_token=0.1)
# All else as it is by default.
HEALED = {
    "closed form": HealingConfig(steps=0, natural_steps=0),
    "closed form, all outputs count alike": HealingConfig(steps=0, natural_steps=0, metric_windows=0),
    "closed form, the teacher's outputs in full": HealingConfig(steps=0, natural_steps=0, correction=1.0),
    "closed form, a natural step": HealingConfig(steps=0),
    "closed form, two natural steps": HealingConfig(steps=0, natural_steps=2),
    "100 steps": HealingConfig(closed_form=False, natural_steps=0),
    "closed form, then 100 steps": HealingConfig(natural_steps=0),
    "closed form, a natural step, then 100": HealingConfig(),
    "the same, hidden states too": HealingConfig(objectives=Objectives(kl=1.0, hidden=1.0)),
    "the same, the paper's objective": HealingConfig(objectives=PAPER),
    "the same, the text itself too": HealingConfig(objectives=Objectives(kl=1.0, next_token=1.0)),
    "closed form, then 100 steps by blocks": HealingConfig(scope="block"),
    "closed form, then 300 steps": HealingConfig(steps=300, natural_steps=0),
    "closed form, a natural step, then 1000": HealingConfig(steps=1000),
}

# The same text, steps and loss for adapters with as many numbers: (targets, rank, learning rate).
DENSE_TARGETS = ["v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTED: dict[str, tuple[str, int, float]] = {
    "100 steps of LoRA": ("lora", 8, 1e-3),
    "100 steps of LoHa": ("loha", 4, 1e-3),
}
# Adaptation to another domain: CURLoRA's rank gives as many numbers as the cores have.
FORGETTING = ("U of the compressed model", "LoRA on the compressed model", "CURLoRA on the dense model")
FORGETTING_STEPS, CURLORA_RANK = 50, 126


class CURLoRALinear(nn.Module):
    """A dense layer plus ``C U R`` of its least important columns and rows, U from zero (arXiv 2408.14572)."""

    def __init__(self, dense: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dense = dense
        weight = dense.weight.detach()
        rank = min(rank, *weight.shape)
        columns = _least_important(weight.square().sum(0), rank, generator)
        rows = _least_important(weight.square().sum(1), rank, generator)
        self.register_buffer("C", weight[:, columns].clone())
        self.register_buffer("R", weight[rows].clone())
        self.U = nn.Parameter(torch.zeros(rank, rank))

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(nn.functional.linear(x, self.R), self.U)
        return self.dense(x) + nn.functional.linear(z, self.C)


def _least_important(norms: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chance = 1 / norms.clamp(min=1e-12)
    return torch.multinomial(chance / chance.sum(), count, replacement=False, generator=generator)


class Bench:
    """The models, the texts, and what is measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cache = options.cache
        self.state = options.state
        self.teacher, self.tokenizer, self.source = load_model(options.model)
        self.precision = precision_of(self.teacher, options)
        self.valid = self._windows("valid.txt", read_text(options.wikitext / "valid.txt"), LENGTH, None)
        reference = "\n\n".join(topics.values())
        texts = {"WikiText-2": read_text(options.wikitext / "test.txt"), "language reference": reference}
        self.held_out = {name: self._windows(name, text, 1024, WINDOWS) for name, text in texts.items()}
        half = reference[: len(reference) // 2]
        self.domain = self._windows("first half", half, LENGTH, None)
        self.other_half = {
            "WikiText-2": self.held_out["WikiText-2"][:6],
            "language reference": self._windows("second half", reference[len(reference) // 2 :], 1024, 6),
        }
        if not (options.student / "config.json").exists():
            self._compress(options)
        self.student_directory = options.student

    def _windows(self, name: str, text: str, length: int, count: int | None) -> Tensor:
        return token_windows(self.tokenizer, text, length=length, count=count, name=name)

    def _compress(self, options: argparse.Namespace) -> None:
        model = copy.deepcopy(self.teacher)
        calibration = self._windows("valid.txt", read_text(options.wikitext / "valid.txt"), 512, 64)
        statistics = collect(
            model,
            batches(calibration, batch_size=SETTING.batch_size),
            modules=[name for name, _ in model.named_modules() if name.endswith(SETTING.targets)],
            layers=[name for name, _ in decoder_layers(model)],
            precision=self.precision,
        )
        save(
            model,
            self.tokenizer,
            options.student,
            report=compress(model, statistics, SETTING, precision=self.precision),
        )

    def student(self) -> Any:
        return load_student(self.student_directory, self.teacher)

    def measure(self, model: nn.Module, texts: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Score in float32, whatever the rows were made in."""
        return {
            name: perplexity(model, windows, precision="float32").value
            for name, windows in (texts or self.held_out).items()
        }


def healed(bench: Bench, name: str) -> dict[str, Any]:
    """Heal by a configuration."""
    student = bench.student()
    state = None if bench.state is None else bench.state / name
    options: dict[str, Any] = {"cache": bench.cache, "state": state, "progress": _show(name)}
    report = heal(student, bench.teacher, bench.valid, replace(HEALED[name], precision=bench.precision), **options)
    # Of a row that went on after an interruption the seconds are not known.
    whole = "closed form" in report.seconds
    seconds = {**report.seconds, "a step": report.seconds["heal"] / report.steps if report.steps else None}
    if state is not None:
        shutil.rmtree(state)
    return {
        "perplexity": bench.measure(student),
        "trainable": report.trainable,
        "seconds": seconds if whole else {},
        "curve": [report.before, *report.curve],
        "fits": [asdict(fit) for fit in report.fits],
        "teacher from cache": bench.cache is not None,
        "processor": processor(),
        "precision": bench.precision,
    }


def step_times(bench: Bench) -> dict[str, float]:
    """Measure the processor seconds of one step in both scopes, with the teacher run and with it read from the cache.

    Processor time, because the machine does other work meanwhile; the mean of three steps after one.
    """
    found = {}
    student = bench.student()
    for scope in ("model", "block"):
        with tempfile.TemporaryDirectory() as scratch:
            for what in ("teacher run", "teacher from cache"):
                plain: dict[str, Any] = {"closed_form": False, "metric_windows": 0, "natural_steps": 0, "held_out": 0}
                config = HealingConfig(steps=4, scope=scope, precision=bench.precision, **plain)
                clock: list[float] = []
                heal(
                    student,
                    bench.teacher,
                    bench.valid,
                    config,
                    cache=scratch,
                    progress=lambda _: clock.append(time.process_time()),
                )
                found[f"{scope}, {what}"] = (clock[-1] - clock[0]) / (len(clock) - 1)
    return found


def adapted(bench: Bench, name: str) -> dict[str, Any]:
    """Heal by an adapter of peft on the dense layers of the compressed blocks."""
    kind, rank, rate = ADAPTED[name]
    student = bench.student()
    trained, seconds = adapt(bench, student, inject(student, kind, rank), bench.valid, steps=100, rate=rate)
    return {
        "perplexity": bench.measure(student),
        "trainable": trained,
        "seconds": {"heal": seconds},
        "processor": processor(),
        "precision": bench.precision,
    }


def inject(model: Any, kind: str, rank: int) -> list[nn.Parameter]:
    """Put adapters into the dense layers of the compressed blocks; returns what learns."""
    from peft import LoHaConfig, LoraConfig, inject_adapter_in_model

    blocks = sorted({int(name.split(".")[2]) for name in model.config.quantization_config.modules})
    common: dict[str, Any] = {"r": rank, "target_modules": DENSE_TARGETS, "layers_to_transform": blocks}
    config = LoraConfig(lora_alpha=2 * rank, **common) if kind == "lora" else LoHaConfig(alpha=2 * rank, **common)
    inject_adapter_in_model(config, model)
    return [parameter for key, parameter in model.named_parameters() if "lora_" in key or "hada_" in key]


def adapt(
    bench: Bench, student: Any, parameters: list[nn.Parameter], windows: Tensor, *, steps: int, rate: float
) -> tuple[int, float]:
    """Train parameters on the teacher's distribution, with the batches and the schedule of `heal`."""
    config = HealingConfig(steps=steps, learning_rate=rate, precision=bench.precision)
    text = Text(windows, batch_size=BATCH, held_out=config.held_out, seed=config.seed)
    pair = TeacherStudentPair(student, bench.teacher, config, probe=windows[:1, :8])
    pair.cache = None if bench.cache is None else TeacherCache(bench.cache, pair.key())
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=config.betas, weight_decay=0.0)
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        batch = text.batch(step)
        loss = pair.loss(batch, pair.teach(batch))
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        _show("adapter")(step, steps, loss.parts)
    return sum(p.numel() for p in parameters), time.perf_counter() - begin


def adapt_to_domain(bench: Bench, name: str) -> dict[str, Any]:
    """Fine-tune on the likelihood of another domain, and look at both."""
    generator = torch.Generator().manual_seed(0)
    model: Any = copy.deepcopy(bench.teacher) if "dense" in name else bench.student()
    model.requires_grad_(False)
    if name.startswith("U of"):
        parameters = [p for key, p in model.named_parameters() if key.endswith(".U.weight")]
        rate = 3e-4
    elif name.startswith("LoRA"):
        parameters, rate = inject(model, "lora", 8), 1e-3
    else:
        layers = bench.student().config.quantization_config.modules
        parameters, rate = [], 1e-3
        for key in layers:
            parent, _, leaf = key.rpartition(".")
            adapter = CURLoRALinear(model.get_submodule(key), CURLORA_RANK, generator)
            setattr(model.get_submodule(parent), leaf, adapter)
            parameters.append(adapter.U)
    for parameter in parameters:
        parameter.requires_grad_(True)
    before = bench.measure(model, bench.other_half)
    config = HealingConfig(steps=FORGETTING_STEPS, learning_rate=rate)
    passes = Precision.of(model, bench.precision)
    text = Text(bench.domain, batch_size=BATCH, held_out=0, seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=config.betas, weight_decay=0.0)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        ids = text.batch(step)["input_ids"]
        with passes.products():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        _show(name)(step, config.steps, {"loss": float(loss.detach())})
    after = bench.measure(model, bench.other_half)
    return {
        "before": before,
        "after": after,
        "trainable": sum(p.numel() for p in parameters),
        "steps": config.steps,
        "precision": bench.precision,
    }


MEMORY = """
import sys
sys.path[:0] = sys.argv[4:]
import torch
from cur.healing import HealingConfig, heal, load_student
from cur.integrations import load_model
def resident(what="VmRSS"):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024
start = resident()
teacher = load_model(sys.argv[1]).model
teacher(torch.zeros(1, 8, dtype=torch.int64))
if sys.argv[3] == "pair":
    student = load_student(sys.argv[2], teacher)
    student(torch.zeros(1, 8, dtype=torch.int64))
    teacher(torch.zeros(1, 8, dtype=torch.int64))
# Not ru_maxrss, which begins with the peak of the process that started this one.
print(resident("VmHWM") - start)
"""


def memory(bench: Bench) -> dict[str, float]:
    """Measure, in new processes, the memory of the teacher alone and of teacher and student."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench.teacher.save_pretrained(scratch)
        bench.tokenizer.save_pretrained(scratch)
        for what in ("teacher", "pair"):
            command = [sys.executable, "-c", MEMORY, scratch, str(bench.student_directory), what, *sys.path]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[what] = int(done.stdout)
    one, peak = found["teacher"], found["pair"]
    return {"peak, teacher": one, "peak, teacher and student": peak, "ratio": peak / one}


def _show(name: str) -> Callable[..., None]:
    def show(*status: Any) -> None:
        print(f"\r{name}: {status}"[:118], end="", file=sys.stderr, flush=True)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["dense", "compressed", *HEALED, *ADAPTED, *FORGETTING, "memory", "time of a step"]
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt and test.txt")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--model", help="the dense model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--student", type=Path, default=Path(tempfile.gettempdir()) / "cur-benchmark-student")
    parser.add_argument("--cache", type=Path, help="directory in which what the teacher says is kept")
    parser.add_argument("--state", type=Path, help="directory in which an interrupted row of healing goes on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_precision(parser)
    options = parser.parse_args()
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt and test.txt")
    bench = Bench(options)
    kept: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    rows, forgetting = kept.get("rows", {}), kept.get("forgetting", {})
    used, times = kept.get("memory"), kept.get("processor seconds of a step")
    for name in options.only:
        if name == "dense":
            rows[name] = {"perplexity": bench.measure(bench.teacher)}
        elif name == "compressed":
            rows[name] = {"perplexity": bench.measure(bench.student())}
        elif name in HEALED:
            rows[name] = healed(bench, name)
        elif name in ADAPTED:
            rows[name] = adapted(bench, name)
        elif name in FORGETTING:
            forgetting[name] = adapt_to_domain(bench, name)
        elif name == "memory":
            used = memory(bench)
        else:
            times = step_times(bench)
        print(f"\n{name}: {rows.get(name) or forgetting.get(name) or (used, times)}")
        result = {
            "question": __doc__.splitlines()[0],
            "model": bench.source if options.model is None else "SmolLM2-135M-Instruct",
            "text": {"file": "valid.txt", "window": LENGTH, "windows a step": BATCH},
            "evaluation": {"windows": WINDOWS, "length": 1024},
            "rows": {key: rows[key] for key in names if key in rows},
            "forgetting": {key: forgetting[key] for key in names if key in forgetting},
            "memory": used,
            "processor seconds of a step": times,
            **environment(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
