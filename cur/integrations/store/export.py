"""From a compressed model to a checkpoint that other software reads, for each target that is known."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cur.integrations.store.checkpoint import dense_export

__all__ = ["TARGETS", "Target", "check_export", "export", "register_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A form in which a compressed model leaves this package.

    Attributes
    ----------
    name : str
        The name of the target, which ``--to`` takes.
    summary : str
        A sentence that says what is written, and who reads it.
    write : callable
        Writes the target. Called with model, tokenizer and directory, and with ``overwrite``, ``max_shard_size`` and
        ``source`` of :func:`~cur.integrations.save`; returns the directory. It writes all of it or nothing, and leaves
        the model as it was.
    needs : tuple of str
        Packages that have to be installed for it, beside those of the ``transformers`` extra.
    """

    name: str
    summary: str
    write: Callable[..., Path]
    needs: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {}
"""By name; one of your own is added by :func:`register_target`."""


def register_target(target: Target) -> Target:
    """Make a target known.

    Parameters
    ----------
    target : Target
        The target to register.

    Returns
    -------
    Target
        The target, as it is.

    Raises
    ------
    ValueError
        If another target has the name already.
    """
    known = TARGETS.setdefault(target.name, target)
    if known is not target:
        raise ValueError(f"`name` {target.name!r} of the target is taken; choose another")
    return target


register_target(
    Target(
        name="dense",
        summary="A plain checkpoint, every compressed layer multiplied out, that loads where this package is not.",
        write=dense_export,
    )
)


def check_export(to: str) -> Target:
    """Return a target by name, if all that it needs is there.

    Parameters
    ----------
    to : str
        The name of the target.

    Raises
    ------
    ValueError
        If no target has that name.
    ImportError
        If a package that the target needs is not installed.
    """
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {', '.join(TARGETS)}, got {to!r}")
    target = TARGETS[to]
    if missing := [package for package in target.needs if find_spec(package) is None]:
        raise ImportError(f"`to` {to!r} needs {' and '.join(missing)}; type: pip install {' '.join(missing)}")
    return target


def export(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    to: str = "dense",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a compressed model in another form; the model itself is unchanged.

    Parameters
    ----------
    model, tokenizer, directory
        The model to write and its place, as for :func:`~cur.integrations.save`.
    to : str, default "dense"
        The name of the target, one of :data:`TARGETS`.
    overwrite, max_shard_size, source
        Options of writing, as for :func:`~cur.integrations.save`.

    Returns
    -------
    Path
        The absolute path of the directory.

    Raises
    ------
    ValueError
        If the target is unknown.
    ImportError
        If a package that it needs is missing.
    FileExistsError
        If the directory exists, is not empty, and `overwrite` is False.
    """
    write = check_export(to).write
    return write(model, tokenizer, directory, overwrite=overwrite, max_shard_size=max_shard_size, source=source)
