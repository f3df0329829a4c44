"""`cur heal`: train the cores of a compressed checkpoint against the dense model, and write another checkpoint."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cur.cli._run import Stages, bars, note, output, print_json
from cur.cli.given import Given
from cur.cli.groups import HealingRun, HealingText
from cur.settings.healing import HealingSettings, ObjectiveSettings

if TYPE_CHECKING:
    import torch

    from cur.healing import HealingConfig, HealingReport, Status

__all__ = ["run_heal", "show_status"]

_STAGES = {"closed form": "Least squares", "natural steps": "Natural gradient", "heal": "Healing"}


def run_heal(given: Given, *, overwrite: bool, as_json: bool) -> None:
    """Run `cur heal`.

    Parameters
    ----------
    given : Given
        The values of the options, typed or from a file.
    overwrite : bool
        Whether a directory that is not empty may be replaced.
    as_json : bool
        Whether the report is printed as one line of JSON instead of a sentence.

    Raises
    ------
    ValueError
        If options contradict each other, the checkpoint is rounded to int8 or does not say what it was made from, or
        the models or the text cannot be used.
    FileExistsError
        If the directory is not empty and `overwrite` is False.
    """
    from cur.cli.commands import show_account
    from cur.cli.source import Source
    from cur.healing import HealingConfig, Objectives
    from cur.integrations.files.directory import check_target
    from cur.integrations.model.opening import stored_dtype
    from cur.integrations.pipeline import block_by_block
    from cur.integrations.store.inspect import summarize

    directory, out = Path(given.values["directory"]), Path(given.values["out"])
    asked, run = given.only(HealingSettings), given.build(HealingRun)
    low_memory, scope = run.low_memory, asked.get("scope")
    check_target(out, overwrite=overwrite)
    if grids := summarize(directory).grids:  # before anything is loaded
        raise ValueError(f"{directory} is rounded to {grids}; heal what it was made from, and round the result")
    dtype = stored_dtype(directory)
    dense = _teacher(directory, run.teacher)
    check_target(out, overwrite=overwrite, needed=dense)
    # Whoever asks for a loss through the whole network wants the whole network.
    if low_memory and dense is None:
        raise ValueError("--low-memory reads safetensors checkpoints; name that of the dense model with --teacher")
    low = block_by_block(dense, False if low_memory is None and scope == "model" else low_memory, dtype)
    if low and scope == "model":
        raise ValueError("--low-memory heals block by block; leave out --scope model")
    if low and (run.state is not None or run.cache is not None):
        raise ValueError("--state and --cache are not for --low-memory, which keeps its state beside the output")
    # By blocks no loss reaches the output, and gradients of the whole model are not to be had with one block in memory.
    goals = {"kl": 0.0, "hidden": 1.0} if low or scope == "block" else {}
    fixed: dict[str, Any] = {"scope": "block", "metric_windows": 0} if low else {}
    config = HealingConfig(objectives=Objectives(**{**goals, **given.only(ObjectiveSettings)}), **{**fixed, **asked})
    source = Source(**asdict(given.build(HealingText)))
    options: dict[str, Any] = {
        "dtype": dtype,
        "read": functools.partial(source.to_heal, held_out=config.held_out),
        "tensorboard": run.tensorboard,
        "trust_remote_code": run.trust_remote_code,
        "overwrite": overwrite,
    }
    if low:
        report = _heal_by_blocks(directory, str(dense), out, config, **options)
    else:
        kept = out.with_name(f"{out.name}.healing") if run.state is None else run.state
        report = _heal_in_memory(directory, dense, out, config, state=kept, cache=run.cache, **options)
        if run.state is None:
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
    """Return a callback that shows where healing is, with loss and perplexity.

    Parameters
    ----------
    bar : Stages
        The stages that are shown.
    """

    def show(status: Status) -> None:
        text = _STAGES[status.stage]
        if status.loss is not None:
            text += f", loss {status.loss:.3f}"
        if status.perplexity is not None:
            text += f", perplexity {status.perplexity:.2f}"
        bar.describe(status.stage, text)
        bar(status.stage, status.step, status.steps)

    return show
