"""Where healing stands, on disk: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from cur._lib.atomic import replace_file
from cur._lib.errors import CURError

__all__ = ["StateError", "StateFile"]

_FORMAT = "cur-healing-state"
_VERSION = 1


class StateError(CURError, ValueError):
    """A state of healing on disk cannot be used: damaged, of a newer format, or of another run."""


class StateFile:
    """One file that holds tensors and facts, and says which run they belong to.

    Parameters
    ----------
    path : Path
        The file; its directory is made when it is first written.
    run : str
        Fingerprint of everything that decides the result: configuration, text, student, teacher.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file; the old one stays until the new one is complete on disk.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The tensors of the state, by name.
        facts : mapping
            The facts of the state, as JSON types.

        Raises
        ------
        OSError
            If it cannot be written, for instance because the disk is full; the old file is still there.
        """
        head = {"format": _FORMAT, "version": str(_VERSION), "run": self.run, "facts": json.dumps(facts)}
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=head)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(self.path) as stream:
                stream.write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    errno.ENOSPC,
                    f"no space left to write {self.path}; the last complete state is kept, free some space and run the "
                    "same command again",
                ) from error
            raise

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was written, None if there is no file.

        Raises
        ------
        StateError
            If the file is damaged, or of another run.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            size = int.from_bytes(data[:8], "little")
            head = json.loads(data[8 : 8 + size])["__metadata__"]
            tensors = load(data)
            if head["format"] != _FORMAT or int(head["version"]) > _VERSION:
                raise StateError(f"{self.path} is not a state of healing that this version reads; remove it")
        except (SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(f"{self.path} is damaged ({error}); remove it to begin anew") from error
        if head["run"] != self.run:
            raise StateError(
                f"{self.path} belongs to another run: the configuration, the text, the student or the teacher has "
                "changed; name another directory for the state, or remove this one to begin anew"
            )
        facts: dict[str, Any] = json.loads(head["facts"])
        return tensors, facts

    @staticmethod
    def facts_in(path: Path) -> dict[str, Any]:
        """Return the facts of a state of any run, to be read before it is known whose it is; none of a damaged file.

        Parameters
        ----------
        path : Path
            The path of the state's file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = json.loads(file.metadata()["facts"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}
        return found

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Return what decides the last bit besides the run itself, to be written down with a state."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": os.cpu_count()}
