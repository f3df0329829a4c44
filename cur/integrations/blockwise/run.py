"""From a checkpoint to a compressed one, block by block."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cur._lib.versions import versions
from cur.integrations.blockwise.calibrate import Calibration, text_hash
from cur.integrations.blockwise.decompose import Decomposition
from cur.integrations.blockwise.distributed import Team
from cur.integrations.blockwise.journal import Journal
from cur.integrations.blockwise.score import perplexity_blockwise
from cur.integrations.blockwise.streamed_model import Skeleton, load_skeleton
from cur.integrations.blockwise.writer import fill
from cur.integrations.compress import Clock, as_batches, as_done
from cur.integrations.files.beside import REPORT, source_of
from cur.integrations.files.directory import check_target
from cur.integrations.files.reading import digest_of
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.experts import release_, rolled, unroll_, unrolled
from cur.integrations.model.limits import check_windows
from cur.integrations.model.origin import origin_of
from cur.integrations.model.precision import Precision, continued
from cur.integrations.model.running import model_inputs
from cur.integrations.model.size import model_size, weight_bytes
from cur.integrations.nn import swap_
from cur.integrations.plan.config import BudgetConfig, CompressConfig
from cur.integrations.plan.make import candidates
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport, LayerReport
from cur.integrations.store.checkpoint import describe, save
from cur.integrations.store.format import mark_

__all__ = ["compress_blockwise"]

# Windows in a forward pass where a plan has decided everything else.
_PLAN_BATCH = 1

# The step of the journal that says that the statistics are in the file that was asked for.
_SAVED = "statistics-saved"

_WHOLE = {
    "gradients": ("gradients=False", "--no-gradients"),
    "own_text": ("own_text=0", "--own-text 0"),
    "correction": ("correction=0.0", "--correction 0"),
}
"""What a budget can ask for that no single block gives, and how to do without: gradients flow back through all blocks,
text is written word by word, and corrected layers are fitted to what the compressed ones before them return."""


def compress_blockwise(
    skeleton: Skeleton,
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
    three times ``n d`` numbers, and with full second moments 8 bytes for every pair of input features of every block.

    A run that was ended in any way goes on when it is started again with the same arguments; the seconds of blocks that
    were finished before count in the report. Under ``torchrun`` the
    processes share calibration text and blocks; all of them must see the same directory.

    Parameters
    ----------
    skeleton : Skeleton
        What :func:`load_skeleton` returns.
    calibration : Tensor or iterable of mapping
        Token windows (count, length), or batches of ``input_ids`` and ``attention_mask``.
    directory : path
        What to create.
    config : CompressConfig, BudgetConfig or Plan, optional
        Default: the paper's setting. A budget must do without gradients and without text of the model's own, for which
        the whole model has to run. A plan is carried out as it is.
    statistics : path, optional
        File of statistics, as for :meth:`Statistics.save`: used in the place of the text if it is there, else written.
    held_out : Tensor, optional
        Token windows whose perplexity is measured before and after, for the report.
    precision : str, default "auto"
        Of the products in passes over text, as for :func:`~cur.integrations.compress`. All processes compute in one,
        float32 where ``"auto"`` would be another in each; a run that goes on does so in that in which it was begun.
    announce : callable, optional
        Called by the process that leads with a sentence on the precision that all have agreed on.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced; it stays until the new one is complete.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file.
    progress : callable, optional
        As for :func:`~cur.integrations.compress`; ``calibrate`` is told in batches, block after block, ``before`` and
        ``after`` in windows.

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
        If the checkpoint is damaged.
    TeamError
        If another process of the run has ended.
    OSError
        If the disk is full; what was finished is kept.
    """
    config = config or CompressConfig()
    _refuse(config)
    target = check_target(directory, overwrite=overwrite)
    given = as_batches(calibration, _PLAN_BATCH if isinstance(config, Plan) else config.batch_size)
    names = _names(skeleton, config)
    check_windows(skeleton.model, given, name="calibration")
    if held_out is not None:
        check_windows(skeleton.model, held_out, name="held_out")
    journal = Journal(target)
    file = None if statistics is None else Path(statistics).expanduser().absolute()
    # What this run wrote itself, before it was ended, is not what it was begun with.
    stored = file if file is not None and file.exists() and journal.facts(_SAVED) is None else None
    if stored is not None:
        Statistics.load(stored, moments=False).check(skeleton.model)
    with Team().joined(skeleton.device) as team:
        passes = _agreed(team, journal, skeleton, precision, announce)
        _begin(team, journal, _inputs(skeleton, given, config, stored, held_out, passes))
        try:
            with journal.explaining(target):
                full = isinstance(config, BudgetConfig) or config.needs_moments
                measuring = Calibration(
                    skeleton, given, names, journal=journal, team=team, full=full, precision=passes, stored=stored
                )
                perplexities = _before(measuring, held_out, progress)
                report, final = _run(measuring, file, target, config, overwrite, max_shard_size, progress)
                if held_out is not None and team.leads:
                    value = _score(target, skeleton, held_out, journal, passes, progress)
                    report = replace(report, perplexity={**perplexities, "after, held-out": value})
                    describe(final, target, report)
        finally:
            journal.release()
        team.gather(None)
        if team.leads:
            journal.remove()
    return report


def _run(
    measuring: Calibration,
    file: Path | None,
    target: Path,
    config: CompressConfig | BudgetConfig | Plan,
    overwrite: bool,
    max_shard_size: int | str,
    progress: Callable[[str, int, int | None], object] | None,
) -> tuple[CompressionReport, Any]:
    """Measure, plan, decompose and write; returns what was done, and the compressed model on the meta device."""
    skeleton, team = measuring.skeleton, measuring.team
    clock = Clock()
    before = replace(model_size(skeleton.model), file_bytes=weight_bytes(skeleton.shards.directory))
    with clock.stage("calibrate"):
        watch = None if progress is None else lambda done, total: progress("calibrate", done, total)
        statistics = measuring.run(watch)
        if file is not None and measuring.stored is None and team.leads:
            measuring.save(file)
            measuring.journal.finish(_SAVED)
    clock.seconds["calibrate"] += measuring.earlier
    factoring = Decomposition(measuring, statistics, config, progress)
    with clock.stage("plan"):
        plan = factoring.plan()
    with clock.stage("outputs"):
        skeleton.load_outside()
        skeleton.free_embeddings()
    with clock.stage("decompose"):
        reports = factoring.carry_out(plan, measuring.given[0])
    skeleton.free_outside()
    clock.seconds["decompose"] += factoring.earlier["decompose"] - factoring.outputs
    clock.seconds["outputs"] += factoring.earlier["outputs"] + factoring.outputs
    final = _compressed_skeleton(skeleton, factoring, reports)
    report = CompressionReport(
        plan=as_done(plan, reports),
        layers=tuple(reports),
        before=before,
        after=model_size(final),
        seconds=clock.seconds,
        precision=measuring.precision.name,
        versions=versions(),
        source=origin_of(skeleton.model).source,
        unread=origin_of(skeleton.model).unread,
    )
    if team.leads:

        def write(place: Path) -> CompressionReport:
            kept = fill(final, skeleton, place, max_shard_size, replaced=factoring.factors, progress=progress)
            return replace(report, kept=kept)

        with clock.stage("write"):
            save(
                final,
                skeleton.tokenizer,
                target,
                report=report,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                source=source_of(skeleton.model) or skeleton.shards.directory,
                weights=write,
            )
        report = replace(CompressionReport.load(target / REPORT), seconds=clock.seconds)
    return report, final


def _before(
    measuring: Calibration, held_out: Tensor | None, progress: Callable[[str, int, int | None], object] | None
) -> dict[str, float]:
    """Return the perplexity of the dense model, which rank 0 measures once."""
    journal = measuring.journal
    if held_out is None or not measuring.team.leads:
        return {}
    facts = journal.facts("before")
    if facts is None:
        watch = None if progress is None else functools.partial(progress, "before")
        scored = perplexity_blockwise(
            measuring.skeleton,
            held_out,
            precision=measuring.precision.name,
            scratch=journal.directory,
            progress=watch,
        )
        facts = {"value": scored.value}
        journal.finish("before", **facts)
    return {"before, held-out": facts["value"]}


def _score(
    target: Path,
    skeleton: Skeleton,
    held_out: Tensor,
    journal: Journal,
    passes: Precision,
    progress: Callable[[str, int, int | None], object] | None,
) -> float:
    """Return the perplexity of what was written."""
    written = load_skeleton(target, dtype=skeleton.dtype, device=skeleton.device)
    watch = None if progress is None else functools.partial(progress, "after")
    return perplexity_blockwise(
        written, held_out, precision=passes.name, scratch=journal.directory, progress=watch
    ).value


def _names(skeleton: Skeleton, config: CompressConfig | BudgetConfig | Plan) -> list[str]:
    """Name the layers that are measured."""
    if isinstance(config, Plan):
        config.check(skeleton.model)
        return [entry.name for entry in config.entries]
    with unrolled(skeleton.model):
        return candidates(skeleton.model, config, offloaded=True)


def _refuse(config: CompressConfig | BudgetConfig | Plan) -> None:
    if isinstance(config, Plan):
        if config.own_text or config.correction or any(entry.gradients for entry in config.entries):
            raise ValueError(
                "the plan was made with text of the model's own, gradients or a correction, which need the whole model "
                "in memory; block by block carry out one that was made without (--own-text 0 --no-gradients "
                "--correction 0)"
            )
    elif isinstance(config, BudgetConfig):
        asked = [name for name in _WHOLE if getattr(config, name)]
        if asked:
            names = " and ".join(f"`{name}`" for name in asked)
            without = ", ".join(_WHOLE[name][0] for name in asked)
            options = " ".join(_WHOLE[name][1] for name in asked)
            raise ValueError(
                f"{names} of a budget need the whole model in memory; block by block pass {without} ({options})"
            )
    elif config.span > 1:
        raise ValueError("`span` must be 1 block by block: angles are measured between neighbours alone")


def _inputs(
    skeleton: Skeleton,
    given: list[Any],
    config: CompressConfig | BudgetConfig | Plan,
    stored: Path | None,
    held_out: Tensor | None,
    passes: Precision,
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    decided = config.to_dict() if isinstance(config, Plan) else asdict(config)
    return {
        "checkpoint": skeleton.shards.digest(),
        "calibration text": text_hash(skeleton.model, given),
        "number of windows in a pass": [
            len(next(iter(model_inputs(skeleton.model, batch).values()))) for batch in given
        ],
        "configuration": {"kind": type(config).__name__, **decided},
        "statistics": None if stored is None else digest_of(stored),
        "held-out text": None if held_out is None else text_hash(skeleton.model, [held_out]),
        "dtype": str(skeleton.dtype),
        "precision": passes.name,
        "versions": versions(),
    }


def _agreed(
    team: Team, journal: Journal, skeleton: Skeleton, asked: str, announce: Callable[[str], object] | None
) -> Precision:
    """Return the precision of all processes; what one of them cannot do is raised by all."""
    kept = team.agree(journal.begun_with("precision"))
    met: ValueError | None = None
    name = ""
    try:
        name = Precision.on(skeleton.device, skeleton.dtype, continued(asked, kept, journal.directory)).name
    except ValueError as error:
        met = error
    errors = [error for error in team.gather(met) if error is not None]
    if errors:
        raise errors[0]
    names = team.gather(name)
    agreed = Precision.on(skeleton.device, skeleton.dtype, name if len(set(names)) == 1 else "float32")
    if announce is not None and team.leads:
        if len(set(names)) > 1:
            fastest = ", ".join(f"{names.count(each)} in {each}" for each in sorted(set(names)))
            announce(
                f"The processes run on different processors (fastest are {fastest}): all compute products in float32; "
                "name a `precision` to decide otherwise."
            )
        else:
            announce(agreed.remark(asked))
    return agreed


def _begin(team: Team, journal: Journal, inputs: Mapping[str, Any]) -> None:
    """Let rank 0 take the lock; what it meets is raised by all."""
    met: Exception | None = None
    if team.leads:
        try:
            journal.begin(inputs)
        except (OSError, ValueError) as error:
            met = error
    met = team.agree(met)
    if met is not None:
        raise met


def _compressed_skeleton(skeleton: Skeleton, factoring: Decomposition, reports: list[LayerReport]) -> Any:
    """Return the compressed model on the meta device."""
    final = copy.deepcopy(skeleton.model)
    unroll_(final)
    swap_(final, {done.name: factoring.stand_in(done, final.get_submodule(done.name)) for done in reports})
    swap_(final, rolled(final, compressed=False))
    release_(final)
    mark_(final)
    return final
