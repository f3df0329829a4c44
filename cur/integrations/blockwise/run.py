"""From a checkpoint to a compressed one, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cur._lib.versions import versions
from cur.integrations.blockwise.calibrate import text_hash
from cur.integrations.blockwise.distributed import ProcessGroup
from cur.integrations.blockwise.journal import Journal
from cur.integrations.blockwise.source import Streamed
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.compress import compress_to
from cur.integrations.files.directory import check_target
from cur.integrations.files.reading import digest_of
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision, continued
from cur.integrations.model.running import model_inputs
from cur.integrations.plan.config import Asked, BudgetConfig, CompressConfig
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport
from cur.integrations.sources import TOL_IN_MEMORY, as_batches

__all__ = ["compress_blockwise"]

# What a rehearsal found, for a run that goes on.
_REHEARSED = "rehearsed"

_WHOLE = {
    "gradients": ("gradients=False", "--no-gradients"),
    "own_text": ("own_text=0", "--own-text 0"),
}
"""What a budget can ask for that no single block gives, and how to do without: gradients flow back through all blocks,
and text is written word by word."""


def compress_blockwise(
    streamed: StreamedModel,
    calibration: Tensor | Iterable[Mapping[str, Tensor]],
    directory: str | os.PathLike[str],
    config: CompressConfig | BudgetConfig | Plan | None = None,
    *,
    statistics: str | os.PathLike[str] | None = None,
    held_out: Tensor | None = None,
    precision: str = "auto",
    announce: Callable[[str], object] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Callable[[str, int, int | None], object] | None = None,
) -> CompressionReport:
    """Compress a checkpoint into another without ever holding the model.

    The result is that of :func:`~cur.integrations.compress` and :func:`~cur.integrations.save`, its weight
    files byte for byte. Every block is loaded to be measured, and again to be copied; those that are chosen, also to be
    factored. In memory are one block, its statistics, and the hidden states of one batch; those of the others lie on
    disk beside `directory`, as do statistics and factors. They take, for ``n`` calibration tokens and a width of ``d``,
    three times ``n d`` values, and with full second moments 8 bytes for every pair of input features of every block.

    A run that was ended in any way goes on when it is started again with the same arguments; the seconds of blocks that
    were finished before count in the report. Under ``torchrun`` the
    processes share calibration text and blocks; all of them must see the same directory.

    Parameters
    ----------
    streamed : StreamedModel
        The model as :func:`load_streamed` returns it.
    calibration : Tensor or iterable of mapping
        Token windows (count, length), or batches of ``input_ids`` and ``attention_mask``.
    directory : path
        The directory to create.
    config : CompressConfig, BudgetConfig or Plan, optional
        Default: the paper's setting. A budget must do without gradients and without text of the model's own, for which
        the whole model has to run. A plan is applied as it is.
    statistics : path, optional
        File of statistics, as for :meth:`Statistics.save`: used in the place of the text if it is there, else written.
    held_out : Tensor, optional
        Token windows on which the compressed model is compared with the dense one, for the report.
    precision : str, default "auto"
        The precision of matrix products in passes over text, as for :func:`~cur.integrations.compress`. All processes
        compute in one, float32 where ``"auto"`` would be another in each; a run that goes on does so in that in which
        it was begun.
    announce : callable, optional
        Called by the leading process with a sentence on the precision that all have agreed on.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced; it stays until the new one is complete.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file.
    progress : callable, optional
        Called with a stage and its progress, as for :func:`~cur.integrations.compress`; ``calibrate`` is told in
        batches, block after block, ``before`` and ``after`` in windows.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        As :func:`~cur.integrations.compress`, or if the configuration needs the whole model, or an unfinished run was
        begun in another precision than the one that is named.
    JournalError
        If another run writes to the same directory, or an unfinished one was begun with other inputs.
    ShardError
        If a weight file of the checkpoint is damaged.
    ProcessGroupError
        If another process of the run has ended.
    OSError
        If the disk is full; what was finished is kept.
    """
    asked = config or CompressConfig()
    _refuse(asked)
    target = check_target(directory, overwrite=overwrite)
    given = as_batches(calibration, asked.batch_size)
    check_windows(streamed.model, given, name="calibration")
    if held_out is not None:
        check_windows(streamed.model, held_out, name="held_out")
    journal = Journal(target)
    file = None if statistics is None else Path(statistics).expanduser().absolute()
    with ProcessGroup().joined(streamed.device) as group:
        passes = _agreed(group, journal, streamed, precision, announce)
        source = Streamed(
            streamed,
            given,
            journal=journal,
            group=group,
            precision=passes,
            file=file,
            progress=progress,
            announce=announce,
        )
        names = source.check(asked)
        earlier = journal.facts(_REHEARSED)  # of a run that goes on
        if earlier is None:
            source.rehearse(asked, names, end=held_out is not None)
        else:
            source.fault = earlier["fault"]
        _begin(group, journal, _inputs(source, asked, held_out))
        if earlier is None and group.leads:
            journal.finish(_REHEARSED, fault=source.fault)
        try:
            with journal.explaining(target):
                report = compress_to(
                    source, asked, target, held_out=held_out, overwrite=overwrite, max_shard_size=max_shard_size
                )
        finally:
            journal.release()
        group.gather(None)
        if group.leads:
            journal.remove()
    return report


def _refuse(config: Asked) -> None:
    if isinstance(config, Plan):
        if config.own_text or config.needs_gradients:
            raise ValueError(
                "the plan was made with text of the model's own or gradients, which need the whole model in memory; "
                "block by block apply one that was made without (--own-text 0 --no-gradients)"
            )
    elif isinstance(config, BudgetConfig):
        if config.tol is not None:
            raise ValueError(TOL_IN_MEMORY)
        asked = [name for name in _WHOLE if getattr(config, name)]
        if asked:
            names = " and ".join(f"`{name}`" for name in asked)
            without = ", ".join(_WHOLE[name][0] for name in asked)
            options = " ".join(_WHOLE[name][1] for name in asked)
            raise ValueError(
                f"{names} of a budget need the whole model in memory; block by block pass {without} ({options})"
            )
    elif config.needs_gradients:
        raise ValueError(
            f"`importance` {config.importance!r} with `link` {config.link!r} needs gradients, which need the whole "
            "model in memory; block by block choose others"
        )
    elif config.span > 1:
        raise ValueError("`span` must be 1 block by block: angles are measured between neighbours alone")


def _inputs(source: Streamed, asked: Asked, held_out: Tensor | None) -> dict[str, Any]:
    """Return everything that the result depends on."""
    streamed, given = source.streamed, source.text
    decided = asked.to_dict() if isinstance(asked, Plan) else asdict(asked)
    return {
        "checkpoint": streamed.shards.digest(),
        "calibration text": text_hash(streamed.model, given),
        "number of windows in a pass": [
            len(next(iter(model_inputs(streamed.model, batch).values()))) for batch in given
        ],
        "configuration": {"kind": type(asked).__name__, **decided},
        "statistics": None if source.stored is None else digest_of(source.stored),
        "held-out text": None if held_out is None else text_hash(streamed.model, [held_out]),
        "dtype": str(streamed.dtype),
        "precision": source.precision.name,
        "versions": versions(),
    }


def _agreed(
    group: ProcessGroup, journal: Journal, streamed: StreamedModel, asked: str, announce: Callable[[str], object] | None
) -> Precision:
    """Return the precision of all processes; what one of them cannot do is raised by all."""
    kept = group.agree(journal.begun_with("precision"))
    met: ValueError | None = None
    name = ""
    try:
        name = Precision.on(streamed.device, streamed.dtype, continued(asked, kept, journal.directory)).name
    except ValueError as error:
        met = error
    errors = [error for error in group.gather(met) if error is not None]
    if errors:
        raise errors[0]
    names = group.gather(name)
    agreed = Precision.on(streamed.device, streamed.dtype, name if len(set(names)) == 1 else "float32")
    if announce is not None and group.leads:
        if len(set(names)) > 1:
            fastest = ", ".join(f"{names.count(each)} in {each}" for each in sorted(set(names)))
            announce(
                f"The processes run on different processors (fastest are {fastest}): all compute products in float32; "
                "name a `precision` to decide otherwise."
            )
        else:
            announce(agreed.remark(asked))
    return agreed


def _begin(group: ProcessGroup, journal: Journal, inputs: Mapping[str, Any]) -> None:
    """Let rank 0 take the lock; what it meets is raised by all."""
    met: Exception | None = None
    if group.leads:
        try:
            journal.begin(inputs)
        except (OSError, ValueError) as error:
            met = error
    met = group.agree(met)
    if met is not None:
        raise met
