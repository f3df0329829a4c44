"""`cur heal`: train the cores of a compressed checkpoint against the dense model, and write another checkpoint."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cur.cli import options as o
from cur.cli._run import Stages, bars, guarded, note, output, print_json

if TYPE_CHECKING:
    import torch

    from cur.healing import HealingConfig, HealingReport, Status

__all__ = ["heal", "show_status"]

_STAGES = {"closed form": "Least squares", "natural steps": "Natural gradient", "heal": "Healing"}


@guarded
def heal(
    directory: o.Checkpoint,
    *,
    out: o.Out,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model: a directory, a .gguf file, or a hub id.", show_default="what DIR was made from"
        ),
    ] = None,
    text: o.Text = None,
    dataset: o.Dataset = None,
    dataset_config: o.DatasetConfig = None,
    split: o.Split = None,
    column: o.Column = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of text, spread over it but for those watched, which are its last; with --dataset the first.",
            show_default="all there are, or 512 with --dataset",
        ),
    ] = None,
    window_length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer; 0 stops at what comes before.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    scope: Annotated[
        str | None,
        typer.Option(
            help="model (one loss through the whole network) or block (each block by itself; less memory).",
            show_default="model, block with --low-memory",
        ),
    ] = None,
    closed_form: Annotated[bool, typer.Option(help="Whether least squares come first.")] = True,
    natural_steps: Annotated[
        int, typer.Option(help="Steps of natural gradient after that, each as long as helps; none with --scope block.")
    ] = 1,
    kl: Annotated[
        float | None,
        typer.Option(help="Weight of the divergence from the teacher's predictions.", show_default="1, 0 by blocks"),
    ] = None,
    hidden: Annotated[
        float | None,
        typer.Option(help="Weight of the distance of hidden states.", show_default="0, 1 by blocks"),
    ] = None,
    modules: Annotated[float, typer.Option(help="Weight of the distance of each compressed layer's output.")] = 0.0,
    next_token: Annotated[float, typer.Option(help="Weight of the negative log-likelihood of the text.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the predictions that are compared.")] = 1.0,
    learning_rate: Annotated[
        float, typer.Option(help="Largest size of a step, relative to what the loss itself asks for.")
    ] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Pull back to where the steps began.")] = 0.0,
    precision: o.Precision = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    held_out: Annotated[int, typer.Option(help="Windows at the end that are watched, not healed on.")] = 8,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at them.")] = 25,
    patience: Annotated[int, typer.Option(help="Looks without improvement before it stops; 0: never.")] = 0,
    workers: Annotated[int, typer.Option(help="Blocks healed at the same time, with --scope block.")] = 1,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the state, from which an interrupted run continues, and the log.",
            show_default="OUT.healing, removed at the end",
        ),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between states.")] = 25,
    cache: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps what the teacher says, for other runs on the same text."),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory of TensorBoard events.")] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--in-memory",
            help="Whether student and teacher pass through memory block by block, which leaves out gradients of the "
            "whole model; for safetensors files.",
            show_default="if the teacher does not fit",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
) -> None:
    """Win back what compression lost, by training only the small matrices U against the dense model.

    First the best U for the text are found by least squares and a step of natural gradient, then small steps refine
    them. Rows and columns stay as they are. Run the same command again after an interruption: it continues where it
    was.
    """
    from cur.cli.commands import show_account
    from cur.cli.source import Source
    from cur.healing import HealingConfig, Objectives
    from cur.integrations.files.directory import check_target
    from cur.integrations.model.opening import stored_dtype
    from cur.integrations.pipeline import block_by_block
    from cur.integrations.store.inspect import summarize

    check_target(out, overwrite=overwrite)
    if any(layer.int8 for layer in summarize(directory).layers):  # before anything is loaded
        raise ValueError(f"{directory} is rounded to int8; heal what it was made from, and round the result")
    dtype = stored_dtype(directory)
    dense = _teacher(directory, teacher)
    check_target(out, overwrite=overwrite, needed=dense)
    # Whoever asks for a loss through the whole network wants the whole network.
    if low_memory and dense is None:
        raise ValueError("--low-memory reads safetensors checkpoints; name that of the dense model with --teacher")
    low = block_by_block(dense, False if low_memory is None and scope == "model" else low_memory, dtype)
    if low and scope == "model":
        raise ValueError("--low-memory heals block by block; leave out --scope model")
    if low and (state is not None or cache is not None):
        raise ValueError("--state and --cache are not for --low-memory, which keeps its state beside the output")
    by_blocks = low or scope == "block"
    fixed: dict[str, Any] = {"metric_windows": 0} if low else {}
    config = HealingConfig(
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        scope=scope or ("block" if low else "model"),
        closed_form=closed_form,
        natural_steps=natural_steps,
        objectives=Objectives(
            kl=(0.0 if by_blocks else 1.0) if kl is None else kl,
            hidden=(1.0 if by_blocks else 0.0) if hidden is None else hidden,
            modules=modules,
            next_token=next_token,
            temperature=temperature,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        save_every=save_every,
        workers=workers,
        seed=seed,
        **fixed,
    )
    source = Source(
        text=text,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        column=column,
        windows=windows,
        length=window_length,
    )
    read = functools.partial(source.to_heal, held_out=held_out)
    options: dict[str, Any] = {
        "dtype": dtype,
        "read": read,
        "tensorboard": tensorboard,
        "trust_remote_code": trust_remote_code,
        "overwrite": overwrite,
    }
    if low:
        report = _heal_by_blocks(directory, str(dense), out, config, **options)
    else:
        kept = out.with_name(f"{out.name}.healing") if state is None else state
        report = _heal_in_memory(directory, dense, out, config, state=kept, cache=cache, **options)
        if state is None:
            shutil.rmtree(kept, ignore_errors=True)
    show_account(out)
    if as_json:
        print_json({"directory": str(out.absolute()), **report.to_dict()})
        return
    output.print(f"{report}.")
    note.print(f"Saved to {out}. Next: cur evaluate {out}")


def _heal_in_memory(
    directory: Path,
    teacher: str | None,
    out: Path,
    config: HealingConfig,
    *,
    dtype: torch.dtype,
    read: Callable[[Any], torch.Tensor],
    state: Path,
    cache: Path | None,
    tensorboard: Path | None,
    trust_remote_code: bool,
    overwrite: bool,
) -> HealingReport:
    from cur.cli.source import read_for
    from cur.healing import heal as heal_
    from cur.healing import load_student, save_healed
    from cur.healing.heal import LOG, precision_of
    from cur.integrations.model.loading import load_model

    with bars() as bar:
        with bar.busy("Loading the models"):
            dense = load_model(teacher, dtype=dtype, trust_remote_code=trust_remote_code)
            student = load_student(directory, dense.model)
            samples = read_for(dense.model, read(dense.tokenizer))
        note.print(precision_of(student, config, state).remark(config.precision))
        report = heal_(
            student,
            dense.model,
            samples,
            config,
            state=state,
            cache=cache,
            tensorboard=tensorboard,
            progress=show_status(bar),
        )
        with bar.busy("Saving"):
            save_healed(student, dense.tokenizer, out, report, source=directory, log=state / LOG, overwrite=overwrite)
    return report


def _heal_by_blocks(
    directory: Path,
    teacher: str,
    out: Path,
    config: HealingConfig,
    *,
    dtype: torch.dtype,
    read: Callable[[Any], torch.Tensor],
    tensorboard: Path | None,
    trust_remote_code: bool,
    overwrite: bool,
) -> HealingReport:
    from cur.cli.source import read_for
    from cur.healing import heal_blockwise
    from cur.healing.blockwise import precision_blockwise
    from cur.integrations.blockwise import ProcessGroup, load_streamed

    if ProcessGroup().size > 1:
        raise ValueError("`cur heal` runs in one process; start it without torchrun")
    with bars() as bar:
        with bar.busy("Opening the models"):
            student, dense = (
                load_streamed(place, dtype=dtype, trust_remote_code=trust_remote_code) for place in (directory, teacher)
            )
            samples = read_for(dense.model, read(dense.tokenizer))
        note.print(precision_blockwise(dense, out, config).remark(config.precision))
        return heal_blockwise(
            student,
            dense,
            samples,
            out,
            config,
            overwrite=overwrite,
            tensorboard=tensorboard,
            progress=show_status(bar),
        )


def _teacher(directory: Path, given: str | None) -> str | None:
    """Return what to load as the teacher: None stands for the default model."""
    from cur.integrations.files.beside import PLAN, REPORT
    from cur.integrations.model.loading import DEFAULT_MODEL
    from cur.integrations.plan.plan import Plan
    from cur.integrations.report.data import CompressionReport

    if given is not None:
        return given
    plan, report = directory / PLAN, directory / REPORT
    # Both are read, since both go along: one that is damaged is told of now.
    planned = Plan.load(plan).model if plan.exists() else ""
    name = (CompressionReport.load(report).source if report.exists() else "") or planned
    if not name:
        raise ValueError(f"{directory} does not say which model it was made from; name it with --teacher")
    if Path(name).is_absolute() and not Path(name).exists():
        raise ValueError(
            f"{directory} was made from {name}, which is not there any more; name the dense model with --teacher"
        )
    # The default model may be there as an installed file, which needs no hub.
    return None if name == DEFAULT_MODEL else name


def show_status(bar: Stages) -> Callable[[Status], None]:
    """Return a callback that shows where healing is, with loss and perplexity."""

    def show(status: Status) -> None:
        text = _STAGES[status.stage]
        if status.loss is not None:
            text += f", loss {status.loss:.3f}"
        if status.perplexity is not None:
            text += f", perplexity {status.perplexity:.2f}"
        bar.describe(status.stage, text)
        bar(status.stage, status.step, status.steps)

    return show
