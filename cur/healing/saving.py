"""A healed checkpoint: that of the student with other cores, and what healing did."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cur.healing.report import HealingReport
from cur.integrations.store.checkpoint import save

__all__ = ["save_healed"]


def save_healed(
    student: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    report: HealingReport,
    *,
    source: Path,
    log: Path,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    weights: Callable[[Path], None] | None = None,
) -> None:
    """Write a healed model, whole or not at all; see :func:`~cur.integrations.save`.

    Parameters
    ----------
    student : PreTrainedModel
        The healed student, with the cores that were found.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer, which is saved beside the model.
    directory : path
        The directory to create.
    report : HealingReport
        The report of the healing, written as ``healing.json``.
    source : Path
        The checkpoint that was healed; its plan and report stay true and are copied, with all
        else that lies beside its weights.
    log : Path
        Copied to ``healing.jsonl`` where it is there.
    overwrite, max_shard_size, weights
        These are handed on to :func:`~cur.integrations.save`.
    """

    def beside(scratch: Path) -> None:
        report.save(scratch / "healing.json")
        with (scratch / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n{report}. `healing.json` and `healing.jsonl` say how.\n")
        if log.exists():
            shutil.copyfile(log, scratch / "healing.jsonl")

    save(
        student,
        tokenizer,
        directory,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        weights=weights,
        source=source,
        beside=beside,
    )
