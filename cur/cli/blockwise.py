"""`cur compress` and `cur evaluate` for models larger than memory, and for several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cur.cli._run import bars, note
from cur.cli.source import read_for, tell_unread
from cur.integrations.adapters import refuse_adapter_directory
from cur.integrations.blockwise import (
    ShardError,
    Shards,
    Skeleton,
    Team,
    compress_blockwise,
    fits,
    load_skeleton,
    perplexity_blockwise,
)
from cur.integrations.budget import BudgetConfig
from cur.integrations.config import CompressConfig
from cur.integrations.evaluate import Perplexity, output_head
from cur.integrations.plan import Plan
from cur.integrations.precision import Precision
from cur.integrations.report import CompressionReport

__all__ = ["block_by_block", "compress_by_blocks", "evaluate_by_blocks", "place"]


def place(device: str) -> str:
    """Return the device that is meant, this process's own of several; a ValueError says that there is none."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or the like, got {device!r}") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} is not there: torch sees no such device; leave it at cpu")
    own = os.environ.get("LOCAL_RANK")
    return f"{device}:{own}" if device == "cuda" and own is not None else device


def block_by_block(model: str | None, asked: bool | None, dtype: torch.dtype | str) -> bool:
    """Say whether a model passes through memory block by block: on request, and when it would not fit otherwise.

    Raises
    ------
    ValueError
        If it is asked for a model that is not made of safetensors files, or refused to several processes.
    """
    if model is not None and Path(model).expanduser().is_dir():
        refuse_adapter_directory(Path(model).expanduser(), model)
    several = Team().size > 1
    if several and asked is False:
        raise ValueError("several processes work block by block; leave out --in-memory, or start one")
    if asked or several:
        if model is None or model.endswith(".gguf"):
            raise ValueError(
                "block by block only safetensors checkpoints are read; name a directory or a hub id as MODEL"
            )
        return True
    if asked is False or model is None or not Path(model).expanduser().is_dir():
        return False
    try:
        return not fits(Shards(model), dtype)
    except ShardError:  # not for us to report: other formats are read in memory
        return False


def compress_by_blocks(
    model: str,
    out: Path,
    config: CompressConfig | BudgetConfig | Plan,
    *,
    read: Callable[[Any], list[Any]],
    held_out: Callable[[Any, Any], torch.Tensor] | None,
    stats: Path | None,
    dtype: torch.dtype | str,
    precision: str,
    device: str,
    trust_remote_code: bool,
    overwrite: bool,
) -> CompressionReport:
    """Compress a checkpoint into another.

    From a tokenizer `read` makes batches, and from a model and its tokenizer `held_out` windows.
    """
    with _watched() as watch:
        skeleton = _open(model, dtype, device, trust_remote_code)
        if watch is not None:
            tell_unread(skeleton.model)
        judged = None if held_out is None else held_out(skeleton.model, skeleton.tokenizer)
        return compress_blockwise(
            skeleton,
            read_for(skeleton.model, read(skeleton.tokenizer)),
            out,
            config,
            statistics=stats,
            precision=precision,
            announce=note.print,
            held_out=judged,
            overwrite=overwrite,
            progress=watch,
        )


def evaluate_by_blocks(
    model: str,
    *,
    read: Callable[[Any], torch.Tensor],
    batch_size: int,
    dtype: torch.dtype | str,
    precision: str,
    device: str,
    trust_remote_code: bool,
) -> Perplexity:
    """Measure perplexity; `read` turns a tokenizer into windows."""
    if Team().size > 1:
        raise ValueError("`cur evaluate` runs in one process; start it without torchrun")
    with _watched() as watch:
        skeleton = _open(model, dtype, device, trust_remote_code)
        output_head(skeleton.model)
        tell_unread(skeleton.model)
        windows = read_for(skeleton.model, read(skeleton.tokenizer))
        passes = Precision.on(skeleton.device, skeleton.dtype, precision)
        note.print(passes.remark(precision))
        progress = None if watch is None else lambda done, total: watch("evaluate", done, total)
        return perplexity_blockwise(skeleton, windows, batch_size=batch_size, precision=passes.name, progress=progress)


def _open(model: str, dtype: torch.dtype | str, device: str, trust_remote_code: bool) -> Skeleton:
    return load_skeleton(model, dtype=dtype, device=place(device), trust_remote_code=trust_remote_code)


@contextmanager
def _watched() -> Iterator[Callable[[str, int, int | None], object] | None]:
    """Show progress, in one process of several."""
    if not Team().leads:
        yield None
        return
    with bars() as bar:
        yield bar
