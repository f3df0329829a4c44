"""Measure what compressing costs beside running the model: time against plain forward passes, and peak memory.

SmolLM2-135M-Instruct; 64 windows of 512 tokens of WikiText-2 ``valid.txt``. Plain forward passes are those of the model
without its output head, which calibration does not run either. A copy of the model runs every batch plainly just before
it is calibrated on; both are timed in processor seconds of one thread. Peak memory is that of a process of its own for
each setting that has a target, loading included, in float32 and bfloat16, with one window in a pass and with four.

    python benchmarks/cost.py [--model DIR] [--wikitext DIR] [--only time]

prints tables and writes ``benchmarks/results/cost.json``. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from environment import environment
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cur.integrations import BudgetConfig, batches, collect, decoder_layers, load_model, read_text, token_windows
from cur.integrations.compress import carry_out_
from cur.integrations.factor.making import decompose
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.running import body, evaluating, model_inputs, run
from cur.integrations.model.size import model_size
from cur.integrations.plan.config import CompressConfig
from cur.integrations.plan.make import candidates, make_plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cost.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"

PAPER = CompressConfig(layers=10, targets=("q_proj", "k_proj", "gate_proj"), rank=256, importance="wanda")
ALL = "all-linear"
# What is measured of the model, in which layers; how it is compressed with that; targets for time and for memory.
SETTINGS: dict[str, tuple[str, str | tuple[str, ...], CompressConfig | BudgetConfig, float | None, float | None]] = {
    "the paper's setting, diagonal statistics": ("diagonal", PAPER.targets, PAPER, 1.3, 1.5),
    "the same 30 layers by second moments, which are measured of all linear layers": (
        "full",
        ALL,
        CompressConfig(layers=10, rank=256, importance="covariance", link="covariance"),
        2.5,
        1.5,
    ),
    "all linear layers share a budget of 0.8, without gradients": (
        "full",
        ALL,
        BudgetConfig(keep=0.8, gradients=False, own_text=0, correction=0.0),
        None,
        None,
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Windows in a pass, as by default, and those where memory is measured.
BATCH = CompressConfig().batch_size
MEMORY_BATCHES = (BATCH, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT, help="directory of valid.txt")
    parser.add_argument("--windows", type=int, default=64, help="windows of 512 tokens")
    parser.add_argument("--only", choices=["time", "memory"], help="the other part is kept from an earlier run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        child(json.loads(options.child))
        return
    if not options.wikitext.is_dir():
        sys.exit(f"{options.wikitext} is not there; pass --wikitext DIR with WikiText-2's valid.txt")
    model, tokenizer, source = load_model(options.model)
    text = read_text(options.wikitext / "valid.txt")
    windows = token_windows(tokenizer, text, length=512, count=options.windows, name="valid.txt")
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    result = {
        "question": __doc__.splitlines()[0],
        "model": Path(source).name if Path(source).is_dir() else source,
        "windows": options.windows,
        "length": 512,
        "time": kept.get("time", []) if options.only == "memory" else measure_time(model, windows),
        "memory": kept.get("memory", [])
        if options.only == "time"
        else measure_memory(model, windows[: 2 * max(MEMORY_BATCHES)]),
        **environment(),
    }
    result["machine"]["threads"] = 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


class InTurn:
    """Batches, each of which a model of its own runs plainly just before it is given out."""

    def __init__(self, model: Any, given: list[Mapping[str, torch.Tensor]]) -> None:
        self.model = model
        self.given = given
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        inner = body(self.model)
        for batch in self.given:
            with evaluating(self.model):
                begin = time.process_time()
                run(inner, model_inputs(inner, batch))
                self.seconds += time.process_time() - begin
            yield batch


def measure_time(model: Any, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Time calibration, planning and decomposition of every setting."""
    given = list(batches(windows, batch_size=BATCH))
    plain = InTurn(copy.deepcopy(model), given)
    for _ in zip(range(2), plain, strict=False):  # the first passes of a process are slower
        pass
    measured: dict[tuple[str, Any], tuple[Statistics, float, float]] = {}
    rows = []
    for name, (moments, targets, config, target, _) in SETTINGS.items():
        if (moments, targets) not in measured:
            plain.seconds, begin = 0.0, time.process_time()
            statistics = calibrate(model, plain, moments, targets)
            measured[moments, targets] = statistics, time.process_time() - begin - plain.seconds, plain.seconds
        statistics, calibration, forward = measured[moments, targets]
        begin = time.process_time()
        plan = make_plan(model, statistics, config)
        planned = time.process_time()
        decompose(model, plan, statistics, precision=_own(model))
        done = time.process_time()
        stages = {"calibrate": calibration, "plan": planned - begin, "decompose": done - planned}
        rows.append(
            {
                "setting": name,
                "layers measured": len(statistics.square_sums),
                "sums kept": len({id(one) for one in statistics.square_sums.values()}),
                "layers factored": len(plan.entries),
                "plain forward passes": forward,
                **stages,
                "over plain": sum(stages.values()) / forward,
                "target": target,
            }
        )
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
    return rows


def calibrate(model: Any, given: Any, moments: Any, targets: str | tuple[str, ...]) -> Statistics:
    """Collect what a setting measures."""
    names = candidates(model, CompressConfig(targets=targets, layers="all"))
    return collect(
        model,
        given,
        modules=names,
        moments=moments,
        layers=[layer for layer, _ in decoder_layers(model)],
        precision=_own(model),
    )


def _own(model: Any) -> str:
    """Return the precision of the weights, in which plain passes compute."""
    return str(model.dtype).removeprefix("torch.")


def measure_memory(model: Any, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Return the peak memory of every setting, and of a process that has only imported everything."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        save_file({"windows": windows}, f"{place}/windows")
        for kind, dtype in DTYPES.items():
            model.to(dtype).save_pretrained(f"{place}/model")
            aimed = {name: target for name, (*_, target) in SETTINGS.items() if target is not None}
            for (name, target), size in itertools.product(aimed.items(), MEMORY_BATCHES):
                row = spawn({"place": place, "setting": name, "batch": size})
                own = row["peak, bytes"] - row["imports, bytes"] - row["statistics, bytes"]
                common = {"setting": name, "dtype": kind, "windows a pass": size, "target": target}
                rows.append({**common, **row, "over model": own / row["model, bytes"]})
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    return rows


def spawn(asked: dict[str, Any]) -> dict[str, Any]:
    """Run `child` in a process of its own and return what it printed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asked)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(asked: dict[str, Any]) -> None:
    """Compress at one setting and print the memory that it took."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (counted among the imports)

    imports = peak()
    model = AutoModelForCausalLM.from_pretrained(f"{asked['place']}/model", dtype="auto")
    size, loaded = model_size(model).bytes, peak()
    windows = load_file(f"{asked['place']}/windows")["windows"]
    moments, targets, config, *_ = SETTINGS[asked["setting"]]
    given = list(batches(windows, batch_size=asked["batch"]))
    statistics = calibrate(model, given, moments, targets)
    calibrated = peak()
    tensors = {id(one): one.nbytes for part in (statistics.square_sums, statistics.products) for one in part.values()}
    carry_out_(model, make_plan(model, statistics, config), statistics, text=given, precision=_own(model))
    row = {
        "imports, bytes": imports,
        "model, bytes": size,
        "statistics, bytes": sum(tensors.values()),
        "peak after loading, bytes": loaded,
        "peak after calibration, bytes": calibrated,
        "peak, bytes": peak(),
    }
    print(json.dumps(row))


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    Not by `resource.getrusage`, whose figure a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
