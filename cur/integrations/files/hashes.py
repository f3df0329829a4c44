"""Hashes of the weight files, noted when a checkpoint is written and checked when it is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cur.integrations.files.beside import ACCOUNT
from cur.integrations.files.configuration import check_config
from cur.integrations.files.reading import CheckpointError, digest_of, read_object

__all__ = ["RECORD_VERSION", "check_hashes", "read_kept", "read_record"]

RECORD_VERSION = 1

_CHECKED: set[tuple[str, int, int, str]] = set()


def check_hashes(directory: str | os.PathLike[str]) -> None:
    """Refuse a configuration that cannot be that of the weights, and weights of ours that are not what was written.

    A file is read once in a process, as long as it does not change.

    Parameters
    ----------
    directory : path
        The directory of a checkpoint.

    Raises
    ------
    CheckpointError
        If the hash of a file is another than the one noted when it was written.
    """
    described = check_config(directory).get("quantization_config") or {}
    path = Path(directory) / ACCOUNT
    if described.get("quant_method") != "cur" or not path.exists():
        return
    for name, noted in read_record(path)["sha256"].items():
        file = Path(directory) / name
        if not file.exists():  # whether it is needed is for those to say who read it
            continue
        status = file.stat()
        seen = (str(file.absolute()), status.st_size, status.st_mtime_ns, str(noted))
        if seen in _CHECKED:
            continue
        if digest_of(file) != noted:
            raise CheckpointError(
                f"{file} is not what was written: its SHA-256 is another than {ACCOUNT} notes; fetch it again, or "
                f"delete {ACCOUNT} if you changed the weights yourself"
            )
        _CHECKED.add(seen)


def read_record(path: Path) -> dict[str, Any]:
    """Read what was written beside a checkpoint of ours: hashes, and an account of its tensors.

    Parameters
    ----------
    path : Path
        The path of the record.

    Returns
    -------
    dict
        The record, as JSON types.

    Raises
    ------
    CheckpointError
        If the file is damaged, or of a later version.
    """
    data = read_object(path, remedy="fetch it again, or delete it to go without")
    if (
        data.get("format_version") != RECORD_VERSION
        or not isinstance(data.get("sha256"), dict)
        or "account" not in data
    ):
        raise CheckpointError(
            f"{path} is not an account that this version reads; upgrade cur-decomposition, or delete it to go without"
        )
    return data


def read_kept(directory: str | os.PathLike[str]) -> str:
    """Return the hash of what compression left as it was, empty if it is not known.

    Parameters
    ----------
    directory : path
        The directory of a checkpoint.

    Raises
    ------
    CheckpointError
        If the file is damaged or not of this format.
    """
    path = Path(directory) / ACCOUNT
    if not path.exists() or (check_config(directory).get("quantization_config") or {}).get("quant_method") != "cur":
        return ""
    return str(read_record(path).get("kept", ""))
