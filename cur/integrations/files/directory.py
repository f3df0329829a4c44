"""Writing a directory so that it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cur._lib.atomic import umask

__all__ = ["check_parent", "check_target", "is_full", "new_directory"]

# A full disk reaches us as one of these: the device, the user's quota, or a limit on the size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(
    directory: str | os.PathLike[str], *, overwrite: bool = False, needed: str | os.PathLike[str] | None = None
) -> Path:
    """Return the absolute path of a directory that may be written; of a link, the path of its target.

    Called by commands before hours of work, and again by :func:`new_directory` at the moment of writing.

    Parameters
    ----------
    directory : path
        The directory that is to be written.
    overwrite : bool, default False
        Whether a directory that exists may be replaced.
    needed : path, optional
        A directory that must not be lost with it: the dense model, which heals what was made from it.

    Raises
    ------
    FileExistsError
        If the path is a file, lies below one, is a directory that is not empty and `overwrite` is False, or holds what
        is needed.
    PermissionError
        If nothing may be written there.
    """
    target = Path(directory).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory that does not exist yet")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty; name another directory, or overwrite it")
    held = None if needed is None else Path(needed).expanduser()
    if held is not None and held.exists() and held.resolve().is_relative_to(target.resolve()):
        raise FileExistsError(f"{target} holds the dense model, which would be gone; name another directory")
    check_parent(target)
    return target


def check_parent(path: str | os.PathLike[str]) -> None:
    """Refuse a path, before hours of work, beside which nothing can be written.

    Parameters
    ----------
    path : path
        The path that is to be written.

    Raises
    ------
    FileExistsError
        If it lies below a file.
    PermissionError
        If the directory that it is to lie in may not be written.
    """
    parent = Path(path).expanduser().absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise FileExistsError(f"{path} lies below {parent}, which is a file; name another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {parent} may not be written to; name another path")


@contextmanager
def new_directory(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `directory` and rename it when the block ends.

    If the block raises, KeyboardInterrupt included, the temporary directory is removed and whatever was at
    `directory` before is untouched. With `overwrite`, the old directory goes only after the new one is
    complete. What runs that were killed left of the same target is removed first.

    Parameters
    ----------
    directory : path
        The directory to create, with its missing parents.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced.

    Yields
    ------
    Path
        A temporary directory to write into.

    Raises
    ------
    FileExistsError
        As :func:`check_target`, or if another run wrote it in the meantime.
    OSError
        If the disk is full, in one sentence, whatever the writer inside made of it.
    """
    target = check_target(directory, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    scratch, lock = _locked(target)
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():  # safetensors writes files that none but their owner may read
                file.chmod(0o666 & ~umask())
        _replace(scratch, target, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_full(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {target}; nothing was left behind, free some and try again",
            ) from error
        raise
    finally:
        os.close(lock)


def _locked(target: Path) -> tuple[Path, int]:
    """Make a directory beside the target, and take a lock on it that the system lets go of when the process ends."""
    while True:
        # Not tempfile.mkdtemp: its mode 0700 would stay with the directory after the rename.
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
        scratch.mkdir()
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # another run took it for abandoned before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _remove_abandoned(target: Path) -> None:
    """Remove what runs that were killed left of the same target; those of living processes are locked."""
    for place in (*target.parent.glob(f".{glob.escape(target.name)}.*.partial"), *_replaced(target)):
        try:
            lock = os.open(place, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)


def _replaced(target: Path) -> list[Path]:
    # Where the target is gone, a run was killed between two renames, and what was moved away is all there is.
    return list(target.parent.glob(f".{glob.escape(target.name)}.*.old")) if target.exists() else []


def _replace(scratch: Path, target: Path, *, overwrite: bool) -> None:
    try:
        scratch.rename(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise FileExistsError(
                f"{target} was written by another run in the meantime, and stays as it is; name another directory, or "
                "overwrite it"
            ) from error
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        scratch.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Say whether an error means that there is no space left.

    Parameters
    ----------
    error : BaseException
        The error that was raised.

    Returns
    -------
    bool
        Whether it, or an error that caused it, means a full disk.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors reports an error of the operating system only as text, with the system's number at its end.
    return type(error).__name__ == "SafetensorError" and any(f"os error {n}" in str(error) for n in _FULL)
