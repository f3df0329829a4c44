"""Writing beside the target and renaming, so that an interrupted run leaves the old file or the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

__all__ = ["replace_file", "umask"]


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file in the directory of `path` and move it there when the block ends without an error.

    Parameters
    ----------
    path : path
        The file to write, whose directory has to exist; what was there before stays until the block ends.

    Yields
    ------
    binary file
        The temporary file, open for writing.

    Raises
    ------
    OSError
        If the directory is missing or cannot be written to, or the disk is full; nothing is left beside the old file.
    """
    target = os.path.abspath(os.fspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def umask() -> int:
    """Return the permissions that new files do without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
