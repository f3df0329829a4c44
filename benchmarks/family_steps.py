"""Take one tiny model through all that can be done with it, and say how each step ended.

``walk`` does the work and leaves what it wrote, ``reload`` loads that in another process and compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cur.integrations import BudgetConfig, CompressConfig, LoadedModel, compress_model, dense_export, load_model, save
from cur.integrations.convert import convert_
from cur.integrations.quantize import quantize_
from cur.integrations.store.inspect import summarize

__all__ = ["STEPS", "Outcome", "noted", "reload", "walk"]

STEPS = ("open", "paper", "budget", "blocks", "inspect", "load", "generate", "export", "convert", "int8")
"""In the order of the table. What is written is loaded again in another process, by `load`, and by those after it."""

PAPER = CompressConfig(layers=2, targets="all-linear", rank=6)
BUDGET = BudgetConfig(keep=0.7)
ROUNDING = 2e-3
"""What a sequence of float32 products may change, relative to the largest logit."""

_INPUTS, _EXPECTED, _NOTES = "inputs.safetensors", "expected.json", "notes.json"


@dataclass
class Outcome:
    """How the steps of one family ended.

    A step is "ok", "refused: ..." before anything was measured or written, "fault: ...", or "-" where it is not done.
    """

    steps: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    dense: int = 0
    """Targets that stayed dense in the plans, each with a sentence."""
    left: tuple[str, ...] = ()
    why: str = ""
    """Why transformers itself builds or runs none; empty if it does."""

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON types."""
        return asdict(self)


class _Walk:
    """The steps on one model; what a failed step would have given is missing, and those that need it are not done."""

    def __init__(self, kind: str, made: tiny.Tiny, place: Path, outcome: Outcome) -> None:
        self.place = place
        self.made = made
        self.outcome = outcome
        self.measured = False
        self.models: dict[str, PreTrainedModel] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        self.auto = getattr(transformers, tiny.KINDS[kind].auto)
        reads = "input_ids" in made.inputs
        self.tokenizer = tiny.tokenizer() if reads else None

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do one step; one that is done more than once keeps its first trouble."""
        begin = time.process_time()
        self.measured = False
        before = set(self.place.iterdir())
        try:
            work()
            ended = "ok"
        except KeyError as missing:
            known = missing.args[0] in ("paper", "budget", "dense")  # a step before would have given it
            ended = "-" if known else f"fault: {_said(missing)}"
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
            written = {path.name for path in self.place.iterdir() if path not in before}
            refused = isinstance(error, (ValueError, TypeError)) and not self.measured and not written
            ended = f"{'refused' if refused else 'fault'}: {_said(error)}"
        steps, seconds = self.outcome.steps, self.outcome.seconds
        if steps.get(name, "ok") in ("ok", "-"):
            steps[name] = ended if steps.get(name) != "ok" or ended != "-" else "ok"
        seconds[name] = round(seconds.get(name, 0.0) + time.process_time() - begin, 2)
        (self.place / _NOTES).write_text(json.dumps(self.outcome.to_dict()))

    def watch(self, stage: str, done: int, total: int | None) -> None:
        """Note that something was measured; until then an error is a refusal."""
        self.measured = self.measured or (stage in ("calibrate", "sample") and done > 0)

    def compress(self, name: str, config: CompressConfig | BudgetConfig, *, blocks: bool = False) -> None:
        """Compress what was saved into a directory: in memory, and keep that model, or block by block."""
        options: dict[str, Any] = {"text": self.made.batches, "precision": "float32", "progress": self.watch}
        dense = self.place / "dense"
        if blocks:
            report = compress_model(dense, self.place / name, config, low_memory=True, **options)
        else:
            model = self.opened(dense)
            loaded = LoadedModel(model, self.tokenizer, "")  # type: ignore[arg-type]
            report = compress_model(loaded, self.place / name, config, **options)
            self.models[name] = model
            self.keep(name, model)
        self.outcome.dense = max(self.outcome.dense, len(report.plan.dense))

    def opened(self, directory: Path) -> PreTrainedModel:
        """Open a directory as the commands do."""
        return load_model(directory).model

    def keep(self, name: str, model: PreTrainedModel, *, near: Any = None) -> None:
        """Keep what a model computes, for the process that loads it; or what it has to be near to."""
        found = _logits_of(model, self.made.inputs)
        if not bool(torch.isfinite(found).all()):
            raise AssertionError(f"the logits of {name} are not finite")
        if near is not None:
            _compare(f"the logits of {name}", found, near, rounding=ROUNDING)
        save_file({"logits": found.contiguous()}, self.place / f"{name}.safetensors")
        self.expected[name] = {"rounding": 0.0, "tensors": _digest(model)}

    def same_files(self) -> None:
        """Compare what was made block by block with what was made in memory."""
        whole, parts = (_tensors(self.place / name) for name in ("paper", "blocks"))
        if whole.keys() != parts.keys():
            raise AssertionError(f"other tensors than in memory: {sorted(whole.keys() ^ parts.keys())[:3]}")
        for key, value in whole.items():
            _compare(f"block by block {key}", parts[key], value, rounding=1e-5)

    def inspect(self, name: str) -> None:
        """Compare the count of `inspect` with the model's own."""
        own = sum(part.numel() for part in {id(part): part for part in self.models[name].parameters()}.values())
        found = summarize(self.place / name).parameters
        if found != own:
            raise AssertionError(f"inspect says {found:,}, the model of {name} has {own:,}")

    def generate(self, name: str) -> None:
        """Let a compressed model write; it has to where the dense one does."""
        prompt = {key: value for key, value in self.made.inputs.items() if not key.startswith("decoder")}
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        if self.made.model.config.is_encoder_decoder:
            options["decoder_start_token_id"] = 1
        model = self.models[name]
        dense = self.auto.from_pretrained(self.place / "dense")
        if not dense.can_generate():
            raise KeyError("dense")
        try:
            dense.generate(**prompt, **options)
        except Exception:  # noqa: BLE001 - the dense model does not either
            raise KeyError("dense") from None
        model.generate(**prompt, **options)

    def export(self, name: str) -> None:
        """Write a dense checkpoint of a compressed model."""
        target = f"{name}-dense"
        dense_export(self.models[name], self.tokenizer, self.place / target)
        self.expected[target] = {"rounding": ROUNDING}
        save_file(load_file(self.place / f"{name}.safetensors"), self.place / f"{target}.safetensors")

    def convert(self) -> None:
        """Bring the layers to another layout."""
        model = self.models["paper"]
        before = tiny.logits(model, self.made.inputs)
        convert_(model, "folded")
        self.keep("converted", model, near=before)
        save(model, self.tokenizer, self.place / "converted")

    def quantize(self) -> None:
        """Round a compressed model to eight bits."""
        model = self.models["budget"]
        quantize_(model)
        save(model, self.tokenizer, self.place / "int8")
        self.keep("int8", model)


def walk(kind: str, family: str, place: Path) -> Outcome:
    """Take a family through all steps but those of the process that loads what was written.

    Parameters
    ----------
    kind : str
        What the family is registered for.
    family : str
        The model type.
    place : Path
        An empty directory.
    """
    outcome = Outcome()
    try:
        made = tiny.make(kind, family)
        _check_transformers(kind, made, place)
    except tiny.NotBuiltError as error:
        outcome.why = str(error)
        return outcome
    outcome.parameters = sum(part.numel() for part in made.model.parameters())
    outcome.left = made.left
    steps = _Walk(kind, made, place, outcome)
    if steps.tokenizer is not None:
        steps.tokenizer.save_pretrained(place / "dense")
    save_file(made.inputs, place / _INPUTS)
    dense = place / "dense"
    steps.step("open", lambda: _compare("opened", tiny.logits(steps.opened(dense), made.inputs), _logits(place)))
    steps.step("paper", lambda: steps.compress("paper", PAPER))
    steps.step("budget", lambda: steps.compress("budget", BUDGET))
    steps.step("blocks", lambda: steps.compress("blocks", PAPER, blocks=True))
    if outcome.steps["blocks"] == outcome.steps["paper"] == "ok":
        steps.step("blocks", steps.same_files)
    for name in ("paper", "budget"):
        steps.step("inspect", lambda name=name: steps.inspect(name))
        steps.step("generate", lambda name=name: steps.generate(name))
        steps.step("export", lambda name=name: steps.export(name))
    steps.step("convert", steps.convert)
    steps.step("int8", steps.quantize)
    (place / _EXPECTED).write_text(json.dumps(steps.expected))
    return outcome


def noted(place: Path) -> dict[str, Any]:
    """Return what was noted of a walk after its last step, for the case that its process was ended."""
    file = place / _NOTES
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def reload(kind: str, place: Path, outcome: Outcome) -> Outcome:
    """Load what was written, in a process that has not seen the models, and compare what they compute."""
    file = place / _EXPECTED
    if not file.exists():
        return outcome
    outcome.steps.setdefault("load", "-")
    auto = getattr(transformers, tiny.KINDS[kind].auto)
    inputs = load_file(place / _INPUTS)
    for name, what in json.loads(file.read_text()).items():
        step = {"converted": "convert", "int8": "int8"}.get(name, "export" if name.endswith("-dense") else "load")
        begin = time.process_time()
        try:
            model = auto.from_pretrained(place / name)
            if what.get("tensors") not in (None, _digest(model)):
                raise AssertionError(f"loaded, {name}: other tensors than in memory")
            expected = load_file(place / f"{name}.safetensors")["logits"]
            _compare(f"loaded, {name}", _logits_of(model, inputs), expected, rounding=what["rounding"])
            ended = "ok"
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
            ended = f"fault: {_said(error)}"
        if outcome.steps.get(step, "ok") in ("ok", "-"):
            outcome.steps[step] = ended
        outcome.seconds[step] = round(outcome.seconds.get(step, 0.0) + time.process_time() - begin, 2)
    return outcome


def _check_transformers(kind: str, made: tiny.Tiny, place: Path) -> None:
    """Leave out what transformers itself does not bring back from a checkpoint as it was."""
    try:
        made.model.save_pretrained(place / "dense")
        again = getattr(transformers, tiny.KINDS[kind].auto).from_pretrained(place / "dense")
        found = tiny.logits(again, made.inputs)
        expected = tiny.logits(made.model, made.inputs)
        if not torch.equal(found, tiny.logits(again, made.inputs)):
            raise AssertionError("two passes over the same inputs give two results")
        _compare("loaded by transformers alone", found, expected, rounding=1e-5)
    except Exception as error:
        raise tiny.NotBuiltError(f"saved and loaded by transformers alone: {_said(error)}") from error
    save_file({"logits": found.contiguous()}, place / "dense.safetensors")


def _logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a model computes where all its tensors lie in memory of their own.

    Files are mapped: where a tensor lies in one decides in which order some products sum, so the last bits are those of
    the place, not of the model. In memory of its own the same tensor gives the same bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if all(step > 0 for step in tensor.stride()):  # what is expanded is no memory of its own
            tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.data)
    return tiny.logits(model, inputs)


def _logits(place: Path) -> torch.Tensor:
    return load_file(place / "dense.safetensors")["logits"]


def _digest(model: PreTrainedModel) -> str:
    """Return a hash of all stored tensors of a model, by name: their values and how they lie in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, *, rounding: float = 0.0) -> None:
    if found.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if torch.equal(found, expected):
        return
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
    if not error <= rounding:
        raise AssertionError(f"{what}: differ by {error:.1e} of the largest")


def _said(error: BaseException) -> str:
    """Return what an error says, without the place where the models are kept for a while."""
    words = re.sub(r"\S*/family-\w+/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:400]}"
