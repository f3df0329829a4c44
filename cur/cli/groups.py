"""Settings that only commands have: what is read and written, the text, how a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cur.settings.option import setting

__all__ = [
    "AnyCheckpoint",
    "CalibrationText",
    "Checkpoint",
    "CompressionText",
    "Destination",
    "Grids",
    "HealingRun",
    "HealingText",
    "HeldOutText",
    "Loading",
    "Model",
    "Opening",
    "Passes",
    "PlanDestination",
    "PlanSource",
    "ScoredText",
    "Text",
]

_TEXT = "UTF-8 file, or rows in .jsonl, .json, .csv or .parquet."
_COLUMN = "Column of text, or of messages for the chat template, in a data set or a file of rows."


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is read."""

    heading: ClassVar[str] = "Model"

    model: str | None = field(
        default=None,
        metadata=setting(
            "Directory of a model, a .gguf file, or a hub id.",
            short="-m",
            argument="MODEL",
            basic=True,
            shown="SmolLM2-135M-Instruct",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The compressed checkpoint that is read."""

    heading: ClassVar[str] = "Model"

    directory: Path | None = field(
        default=None,
        metadata=setting(
            "Directory of a compressed checkpoint.",
            argument="DIR",
            basic=True,
            required="name the directory of a compressed checkpoint",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class AnyCheckpoint:
    """The checkpoint that is read, compressed or not."""

    heading: ClassVar[str] = "Model"

    directory: Path | None = field(
        default=None,
        metadata=setting(
            "Directory of a checkpoint, compressed or dense, a .gguf file, or a hub id.",
            argument="DIR",
            basic=True,
            required="name the directory of a checkpoint",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Grids:
    """What the numbers of layers are rounded to."""

    heading: ClassVar[str] = "Method"

    bits: int | None = field(
        default=None,
        metadata=setting("Bits of a number: 2, 3, 4, 5, 6 or 8.", basic=True, shown="8", excludes="grid"),
    )
    group: str | None = field(
        default=None,
        metadata=setting(
            "Neighbours in a row that share a step, a multiple of 8, or row.",
            basic=True,
            shown="row for 8 bits, else 64",
        ),
    )
    embeddings: int | None = field(
        default=None,
        metadata=setting(
            "Bits of the embeddings of tokens and the output head, 8 or 6 for instance.",
            basic=True,
            shown="left as they are",
        ),
    )
    grids: Path | None = field(
        default=None,
        metadata=setting(
            "The quantization.json of a rounded checkpoint, edited or not, that says the grid of each layer.",
            excludes="grid",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The directory that is written."""

    heading: ClassVar[str] = "Output"

    out: Path | None = field(
        default=None,
        metadata=setting(
            "Directory to create for the result.", short="-o", basic=True, required="name the directory to create"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PlanDestination:
    """The plan that is written."""

    heading: ClassVar[str] = "Output"

    out: Path | None = field(
        default=None,
        metadata=setting("JSON file to write.", short="-o", basic=True, required="name the JSON file to write"),
    )


@dataclass(frozen=True, kw_only=True)
class PlanSource:
    """The plan that is carried out."""

    heading: ClassVar[str] = "Method"

    plan: Path | None = field(
        default=None, metadata=setting("Carry out a plan that `cur plan` wrote, edited or not.", basic=True)
    )


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to calibrate or to heal on."""

    heading: ClassVar[str] = "Text"

    text: Path | None = field(
        default=None,
        metadata=setting(_TEXT, short="-t", basic=True, shown="part of the Python language reference", excludes="text"),
    )
    dataset: str | None = field(
        default=None,
        metadata=setting(
            "Data set of the Hugging Face hub to stream instead, for instance allenai/c4.", excludes="text"
        ),
    )
    dataset_config: str | None = field(
        default=None, metadata=setting("Configuration of the data set, for instance en.", shown="en for allenai/c4")
    )
    split: str | None = field(
        default=None, metadata=setting("Split of the data set, for instance validation.", shown="train")
    )
    column: str | None = field(default=None, metadata=setting(_COLUMN, shown="text, or messages"))
    windows: int | None = field(
        default=None,
        metadata=setting(
            "Windows of calibration text, spread over all of it but its end; with --dataset the first ones.",
            shown="64, or 128 with --dataset",
        ),
    )
    window_length: int = field(default=512, metadata=setting("Tokens in each window."))


@dataclass(frozen=True, kw_only=True)
class CalibrationText(Text):
    """Text to calibrate on."""

    batch_size: int = field(
        default=1,
        metadata=setting(
            "Windows in one forward pass: more keep a GPU busy, take more memory, and give the same but for rounding."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class CompressionText(CalibrationText):
    """Text to calibrate on, or what was measured on it."""

    stats: Path | None = field(
        default=None,
        metadata=setting(
            "File of calibration statistics: read if it is there, else written, so that another run can do without "
            "calibration.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class HealingText(Text):
    """Text to heal on."""

    windows: int | None = field(
        default=None,
        metadata=setting(
            "Windows of text, spread over it but for those watched, which are its last; with --dataset the first.",
            shown="all there are, or 512 with --dataset",
        ),
    )
    window_length: int = field(default=256, metadata=setting("Tokens in each window."))


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """Text to measure predictions on, and what to compare them with."""

    heading: ClassVar[str] = "Text"

    against: str | None = field(
        default=None,
        metadata=setting(
            "The model to compare it with, as a rule the dense one that it was made from: a directory, a .gguf file, "
            "or a hub id.",
            basic=True,
            heading="Model",
            shown="perplexity alone is measured",
        ),
    )

    text: Path | None = field(
        default=None, metadata=setting(_TEXT, short="-t", basic=True, shown="part of the Python language reference")
    )
    column: str | None = field(default=None, metadata=setting(_COLUMN, shown="text, or messages"))
    windows: int = field(default=40, metadata=setting("Windows of text to score, each on its own.", basic=True))
    window_length: int = field(default=1024, metadata=setting("Tokens in each window.", basic=True))
    batch_size: int = field(default=1, metadata=setting("Windows in one forward pass."))


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """Text to compare the compressed model with the dense one on."""

    heading: ClassVar[str] = "Perplexity"

    held_out: str | None = field(
        default=None,
        metadata=setting(
            "Text file to compare the compressed model with the dense one on, by divergence and perplexity; or "
            "`reference`, the rest of the default text.",
            basic=True,
            shown="not measured",
        ),
    )
    held_out_windows: int = field(
        default=12, metadata=setting("Windows of it, of 1024 tokens if the model has positions for them.")
    )


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whether code of a checkpoint is run."""

    heading: ClassVar[str] = "Loading"

    trust_remote_code: bool = field(
        default=False, metadata=setting("Run code that the checkpoint brings, where it needs its own.")
    )


@dataclass(frozen=True, kw_only=True)
class Passes(Trust):
    """How a model is run."""

    precision: str = field(
        default="auto",
        metadata=setting(
            "Precision of products in passes over text: float32, bfloat16, or auto, the faster on the device."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Opening(Passes):
    """How a model is loaded."""

    dtype: str = field(
        default="auto",
        metadata=setting(
            "Dtype of the weights in memory and in the checkpoint: float32, bfloat16, float16, or auto, that in which "
            "they are stored.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Loading(Opening):
    """How a model is loaded, and where."""

    low_memory: bool | None = field(
        default=None,
        metadata=setting(
            "Read safetensors block by block, with the same result.",
            flag="--low-memory/--in-memory",
            basic=True,
            shown="if it does not fit",
        ),
    )
    device: str = field(
        default="cpu", metadata=setting("Where the model is run: cpu, cuda, or cuda and a number.", basic=True)
    )


@dataclass(frozen=True, kw_only=True)
class HealingRun(Trust):
    """What healing reads and keeps besides."""

    teacher: str | None = field(
        default=None,
        metadata=setting(
            "The dense model: a directory, a .gguf file, or a hub id.",
            basic=True,
            heading="Model",
            shown="what DIR was made from",
        ),
    )
    state: Path | None = field(
        default=None,
        metadata=setting(
            "Directory for the state, from which an interrupted run continues, and the log.",
            heading="Output",
            shown="OUT.healing, removed at the end",
        ),
    )
    cache: Path | None = field(
        default=None,
        metadata=setting(
            "Directory that keeps what the teacher says, for other runs on the same text.", heading="Output"
        ),
    )
    tensorboard: Path | None = field(
        default=None, metadata=setting("Directory of TensorBoard events.", heading="Output")
    )
    low_memory: bool | None = field(
        default=None,
        metadata=setting(
            "Read student and teacher, safetensors files, block by block, which leaves out gradients of the whole "
            "model.",
            flag="--low-memory/--in-memory",
            basic=True,
            shown="if the teacher does not fit",
        ),
    )
