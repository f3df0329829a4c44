"""JSON files and hashes of files, read so that whatever is wrong with one is one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cur._lib.errors import CURError

__all__ = ["ADVICE", "CONFIG", "CheckpointError", "digest_of", "read_object"]

ADVICE = "run `import cur.integrations` before from_pretrained"
"""What a loader that does not know our format is made to say: the name of weights that it misses."""

CONFIG = "config.json"


class CheckpointError(CURError, ValueError):
    """A checkpoint cannot be read: corrupt, contradictory, or of a newer format."""


def read_object(
    path: str | os.PathLike[str], *, remedy: str = "fetch it again", error: type[CURError] = CheckpointError
) -> dict[str, Any]:
    """Read a JSON object from a file.

    Parameters
    ----------
    path : path
        The path of the file to read.
    remedy : str
        What the error advises where the file holds something else.
    error : type, default CheckpointError
        The class of the error that is raised if the file does not hold a JSON object.

    Returns
    -------
    dict
        The object that the file holds.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CURError
        Of the type given, with the name of the file, if it is no JSON or no object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as met:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from met
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as met:
        raise error(f"{path} is not JSON ({met}): it is damaged; {remedy}") from met
    if not isinstance(data, dict):
        raise error(f"{path} must be a JSON object, got {type(data).__name__}: it is damaged; {remedy}")
    return data


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file.

    Parameters
    ----------
    file : Path
        The path of the file.
    """
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()
