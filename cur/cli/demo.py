"""`cur demo`: compress a real model, heal it a little, measure it, and reload it in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.panel import Panel
from safetensors.torch import save_file

from cur._lib.errors import NumericalError
from cur.cli import tables
from cur.cli._run import bars, note, output, print_json
from cur.cli.heal import show_status
from cur.decompose import deim_cur
from cur.healing import HealingConfig, heal, twin
from cur.integrations.compress import compress
from cur.integrations.files.directory import check_target
from cur.integrations.measure.text import embedded_text, token_windows
from cur.integrations.model.loading import LoadedModel, load_model
from cur.integrations.model.precision import Precision
from cur.integrations.plan.config import CompressConfig
from cur.integrations.report.divergence import Reference
from cur.integrations.store.checkpoint import save

__all__ = ["run_demo"]

# The paper's setting; 128 is its largest rank carried over to this model's width.
SETTING = CompressConfig(layers=10, targets=("q_proj", "k_proj", "gate_proj"), rank=128)
# Windows and tokens in each, of the two halves of the embedded text.
HALVES: dict[Literal["calibrate", "evaluate"], tuple[int, int]] = {"calibrate": (32, 512), "evaluate": (4, 1024)}

# The closed form on a part of the text, and a few steps: what fits into the time of a demo.
HEALING = HealingConfig(steps=2, closed_form_windows=8, metric_windows=2, natural_steps=0, held_out=0, warmup=1)
HEALING_LENGTH = 256

# The factorization shown as numerics: a tall matrix, of the middle of the model.
MATRIX = "model.layers.15.mlp.gate_proj"

PROMPT = "A Python function is"
NEW_TOKENS = 24

# Run as its own program, so that nothing of this process can help the reload.
RELOAD = """
import json, sys, torch
import cur.integrations
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, expected, new_tokens = sys.argv[1], load_file(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    logits = model(expected["tokens"]).logits
    said = model.generate(expected["tokens"], max_new_tokens=new_tokens, do_sample=False,
                          attention_mask=torch.ones_like(expected["tokens"]))
print(json.dumps({"identical": torch.equal(logits, expected["logits"]),
                  "sentence": tokenizer.decode(said[0], skip_special_tokens=True)}))
"""


def run_demo(out: Path | None, *, overwrite: bool, as_json: bool) -> None:
    """Run `cur demo`.

    Parameters
    ----------
    out : Path or None
        The directory to create for the checkpoint; None for a temporary one.
    overwrite : bool
        Whether a directory that is not empty may be replaced.
    as_json : bool
        Whether the result is printed as one line of JSON instead of tables.

    Raises
    ------
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    RuntimeError
        If the reloaded checkpoint does not compute what the model in memory does.
    """
    if out is not None:
        check_target(out, overwrite=overwrite)
        _run(out, overwrite=overwrite, as_json=as_json)
        return
    with tempfile.TemporaryDirectory(prefix="cur-demo-") as scratch:
        _run(Path(scratch) / "checkpoint", overwrite=False, as_json=as_json)


def _run(out: Path, *, overwrite: bool, as_json: bool) -> None:
    begin = time.perf_counter()
    with bars() as bar:
        with bar.busy("Loading the model"):
            loaded = load_model()
            tokenizer = loaded.tokenizer
            calibration, held_out = (
                token_windows(
                    tokenizer,
                    embedded_text(half),
                    length=length,
                    count=count,
                    spread=half == "calibrate",
                    name=f"the text to {half}",
                )
                for half, (count, length) in HALVES.items()
            )
        passes = Precision.of(loaded.model)
        note.print(passes.remark())
        numerics = _numerics(loaded)
        reference = Reference(loaded.model, held_out, precision=passes.name, progress=bar.of("before", len(held_out)))
        dense_sentence = _say(loaded)
        student = twin(loaded.model)
        report = compress(student, calibration, SETTING, precision=passes.name, progress=bar)
        after = reference.compare(student, progress=bar.of("after", len(held_out)))
        text = calibration.reshape(-1, HEALING_LENGTH)
        how = replace(HEALING, precision=passes.name)
        healing = heal(student, loaded.model, text, how, progress=show_status(bar))
        healed = reference.compare(student, progress=bar.of("healed", len(held_out)))
        with bar.busy("Saving"):
            figures = {"before, held-out": healed.reference_perplexity, "after, held-out": healed.perplexity}
            report = replace(report, divergence=healed, perplexity=figures)
            save(student, tokenizer, out, report=report, overwrite=overwrite)
        with bar.busy("Reloading, new process"):
            reloaded = _reload(loaded._replace(model=student), out)
    seconds = {**report.seconds, **healing.seconds, "in all": time.perf_counter() - begin}
    if as_json:
        data = {
            **report.to_dict(),
            "seconds": seconds,
            "reload": reloaded,
            "numerics": numerics,
            "healing": {"trainable": healing.trainable, "compressed, held-out": after.perplexity},
        }
        print_json(data)
    else:
        output.print(tables.layers_table(report.layers), tables.size_table(report))
        output.print(tables.seconds_line(seconds))
        output.print(
            f"KL divergence from the dense model on held-out text, nats per token: {after.said} compressed, "
            f"{healed.said} healed ({healing.trainable:,} numbers, {healing.steps} steps). {healed.remark}"
        )
        output.print(
            f"Perplexity on it: {healed.reference_perplexity:.2f} before, {after.perplexity:.2f} compressed, "
            f"{healed.perplexity:.2f} healed; products in {passes.name}."
        )
        output.print(
            "DEIM-CUR of {matrix}, {shape[0]} x {shape[1]}, rank {rank}: ||A - CUR|| = {error:.6f} <= "
            "{certified:.6f} certified <= {projection_bound:.4f} by (B1); ||A|| = {norm:.4f} (Frobenius norms).".format(
                **numerics
            )
        )
        same = "identical" if reloaded["identical"] else "DIFFERENT"
        output.print(
            Panel(
                f"Logits {same} to those of the model in memory.\n\nbefore: {dense_sentence}\n"
                f"after:  {reloaded['sentence']}",
                title="Reloaded in a new process with AutoModelForCausalLM.from_pretrained",
                title_align="left",
            )
        )
    if not reloaded["identical"]:
        raise RuntimeError("the reloaded checkpoint does not compute what the compressed model computes")


def _numerics(loaded: LoadedModel) -> dict[str, Any]:
    weight = loaded.model.get_parameter(f"{MATRIX}.weight").detach().double()
    result = deim_cur(weight, rank=SETTING.rank)
    C, U, R = result
    certificate = result.certificate
    if certificate is None or certificate.projection is None:
        raise NumericalError(f"no bound was computed for {MATRIX}")
    return {
        "matrix": MATRIX,
        "shape": list(weight.shape),
        "rank": int(result.rank),
        "norm": float(torch.linalg.norm(weight)),
        "error": float(torch.linalg.norm(weight - C @ U @ R)),
        "certified": certificate.value,
        "projection_bound": certificate.projection,
    }


def _tokens(loaded: LoadedModel) -> torch.Tensor:
    ids: torch.Tensor = loaded.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def _say(loaded: LoadedModel) -> str:
    tokens = _tokens(loaded)
    model: Any = loaded.model
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(loaded.tokenizer.decode(said[0], skip_special_tokens=True))


@torch.no_grad()
def _reload(loaded: LoadedModel, directory: Path) -> dict[str, Any]:
    tokens = _tokens(loaded)
    with tempfile.TemporaryDirectory(prefix="cur-demo-") as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_file({"tokens": tokens, "logits": loaded.model(tokens).logits.contiguous()}, expected)
        # One number of threads on both sides: the order of a sum, and with it the last bit, depends on it.
        arguments = [str(directory), str(expected), str(NEW_TOKENS), str(torch.get_num_threads())]
        done = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the checkpoint could not be reloaded in a new process:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
