"""The headers of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cur.integrations.files.reading import CheckpointError

__all__ = ["ShardError", "header_of"]

# Longer headers are refused by every reader of the format.
_LONGEST_HEADER = 100_000_000


class ShardError(CheckpointError):
    """The weight files of a checkpoint are missing, damaged, or contradict each other."""


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begin.

    Parameters
    ----------
    file : Path
        The path of the safetensors file.

    Raises
    ------
    ShardError
        If the file cannot be read, is truncated, or has no valid header.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, file.stat().st_size - 8):
                raise ShardError(f"{file} is corrupt or truncated: it has no header; fetch it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ShardError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{file} is corrupt: its header is not JSON ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise ShardError(f"{file} is corrupt: its header is not a JSON object; fetch it again")
    return header, 8 + length
