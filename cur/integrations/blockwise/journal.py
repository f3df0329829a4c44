"""What a run has finished, so that it can be killed at any moment and go on."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cur._lib.atomic import replace_file
from cur._lib.errors import CURError
from cur.integrations.files.directory import is_full
from cur.integrations.files.reading import digest_of

__all__ = ["Journal", "JournalError"]

_FORMAT_VERSION = 3


class JournalError(CURError, ValueError):
    """A run cannot be continued: another one is at it, or it was begun with other inputs."""


class Journal:
    """The directory of a run, beside the one that it makes.

    Every finished step is one JSON file, which is there whole or not at all, with the checksums of the files that the
    step wrote. A step counts as finished if all of them are what they were.

    Parameters
    ----------
    target : Path
        The directory that the run makes; the journal lies beside it, in ``.NAME.run``.

    Attributes
    ----------
    directory : Path
        The directory of the run, which holds the files of its steps.
    """

    def __init__(self, target: Path) -> None:
        self.directory = target.with_name(f".{target.name}.run")
        self._lock: Any = None

    def begun_with(self, key: str) -> Any:
        """Return what a run that was begun and not finished was given under a key; None if there is no such run.

        Parameters
        ----------
        key : str
            The name of the input, as given to :meth:`begin`.
        """
        return (self._read(self.directory / "inputs.json") or {}).get(key)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Take the lock, and start a run or go on with one.

        Parameters
        ----------
        inputs : mapping
            Everything that the result depends on, as JSON types.

        Raises
        ------
        JournalError
            If another process is at the same run, or it was begun with other inputs.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("a")
        try:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise JournalError(
                f"another run is writing to the same directory (it holds {self.directory / 'lock'}); wait for it, or "
                "name another directory"
            ) from None
        given = json.loads(json.dumps({"format_version": _FORMAT_VERSION, **inputs}))
        known = self._read(self.directory / "inputs.json")
        if known is None:
            self._write(self.directory / "inputs.json", given)
        elif known != given:
            self.release()
            changed = sorted(key for key in known.keys() | given.keys() if known.get(key) != given.get(key))
            raise JournalError(
                f"{self.directory} holds an unfinished run with another {' and '.join(changed)}; give what it was "
                f"begun with and it goes on, or delete {self.directory} to begin anew"
            )

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finish(self, step: str, files: Sequence[Path] = (), **facts: Any) -> None:
        """Record a finished step: the files it wrote, and facts as JSON types.

        Parameters
        ----------
        step : str
            The name of the step.
        files : sequence of Path, default ()
            The files that the step has written.
        **facts : Any
            Facts to keep with it, as JSON types.
        """
        sums = {str(file.relative_to(self.directory)): digest_of(file) for file in files}
        self._write(self._place(step), {"files": sums, "facts": facts})

    def facts(self, step: str) -> dict[str, Any] | None:
        """Return the facts of a step, or None if it is not finished or a file of it is not what it was.

        Parameters
        ----------
        step : str
            The name of the step.
        """
        record = self._read(self._place(step))
        if record is None:
            return None
        for name, checksum in record["files"].items():
            file = self.directory / name
            if not file.exists() or digest_of(file) != checksum:
                return None
        found: dict[str, Any] = record["facts"]
        return found

    @contextmanager
    def explaining(self, target: Path) -> Iterator[None]:
        """Let an error that means a full disk say what is kept and what to do.

        Parameters
        ----------
        target : Path
            The directory that the run is to create.

        Raises
        ------
        OSError
            If the disk is full, with what is kept and what to do.
        """
        try:
            yield
        except OSError as error:
            if is_full(error):
                raise OSError(
                    errno.ENOSPC,
                    f"no space left for {target} and {self.directory}; free some and start the same command again: "
                    "it goes on where it stopped",
                ) from error
            raise

    def remove(self) -> None:
        """Remove the run, which is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()

    def _place(self, step: str) -> Path:
        return self.directory / "done" / f"{step}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        return data

    @staticmethod
    def _write(path: Path, data: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as stream:
            stream.write(json.dumps(data).encode())
