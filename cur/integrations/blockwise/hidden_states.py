"""What blocks returned, batch by batch, on disk: the hidden states of a model of which one block is in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

__all__ = ["HeldStates", "HiddenStates"]

_SUFFIX = ".safetensors"


class HiddenStates:
    """Outputs of modules, one file for each module and batch.

    Parameters
    ----------
    directory : Path
        The directory that the files lie in, created when the first is written.
    device : torch.device
        The device that outputs are read onto.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.directory = directory
        self.device = device

    def write(self, place: str, batch: str, output: Any) -> None:
        """Store what a module returned: a tensor, or tensors in tuples, lists and mappings, within others as well.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.
        output : Any
            The output: a tensor, None, a number or a text, or a tuple, list or mapping of such.

        Raises
        ------
        TypeError
            If the output is of another kind.
        OSError
            If the disk is full or cannot be written.
        """
        form, tensors = self._parts(place, output)
        data = save(tensors, {"form": json.dumps(form)})
        file = self._file(place, batch)
        file.parent.mkdir(parents=True, exist_ok=True)
        # No fsync: a file that did not reach the disk is found by its checksum, and computed again.
        scratch = file.with_suffix(f".{os.getpid()}.partial")
        try:
            scratch.write_bytes(data)
            scratch.with_suffix(".sha256").write_text(hashlib.sha256(data).hexdigest())
            scratch.with_suffix(".sha256").replace(file.with_suffix(".sha256"))
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)

    def has(self, place: str, batch: str) -> bool:
        """Say whether an output is stored.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.

        Returns
        -------
        bool
            Whether a file with the output is there.
        """
        return self._file(place, batch).exists()

    def intact(self, place: str, batch: str) -> bool:
        """Say whether an output is stored, and is what was written.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.

        Returns
        -------
        bool
            Whether a file is there and its hash is the one that was written.
        """
        file = self._file(place, batch)
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest() == file.with_suffix(".sha256").read_text()
        except OSError:
            return False

    def read(self, place: str, batch: str) -> Any:
        """Return an output.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.

        Raises
        ------
        OSError
            If it is not there or cannot be read.
        """
        file = self._file(place, batch)
        try:
            with safe_open(file, framework="pt") as stored:
                form = json.loads(stored.metadata()["form"])
                # Cloned: what `safe_open` returns is a view of the file, which is removed when the next block is done.
                tensors = {key: stored.get_tensor(key).clone().to(self.device) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise OSError(f"the stored hidden state {file} cannot be read: {error}") from error
        return _put_together(form, tensors)

    def places(self, prefix: str) -> list[str]:
        """Name the modules of which outputs are stored, by the beginning of their name.

        Parameters
        ----------
        prefix : str
            The beginning of the names to look for.

        Returns
        -------
        list of str
            The names of the modules with stored outputs.
        """
        return sorted(path.name for path in self.directory.glob(f"{prefix}*"))

    def drop(self, place: str, *, keep: str | None = None) -> None:
        """Remove the outputs of one module, but for one batch.

        Parameters
        ----------
        place : str
            The name of the module whose outputs are removed.
        keep : str, optional
            The name of a batch whose output stays.
        """
        for file in (self.directory / place).glob("*"):
            if keep is None or file.name.partition(".")[0] != keep:
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, place: str, batch: str) -> Path:
        return self.directory / place / f"{batch}{_SUFFIX}"

    @staticmethod
    def _parts(place: str, output: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        try:
            return _taken_apart(output, tensors), tensors
        except TypeError as error:
            raise TypeError(
                f"{place} returns {error}; block by block only tensors are kept, so load the whole model"
            ) from None


class HeldStates(HiddenStates):
    """Outputs of modules in memory, for so few tokens that they fit; nothing is written.

    Parameters
    ----------
    device : torch.device
        The device that outputs are read onto.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(Path(), device)
        self._held: dict[tuple[str, str], tuple[Any, dict[str, torch.Tensor]]] = {}

    def write(self, place: str, batch: str, output: Any) -> None:
        """Keep what a module returned.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.
        output : Any
            The output, as for :meth:`HiddenStates.write`.

        Raises
        ------
        TypeError
            If the output could not be stored.
        """
        self._held[place, batch] = self._parts(place, output)

    def has(self, place: str, batch: str) -> bool:
        """Say whether an output is kept.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.

        Returns
        -------
        bool
            Whether it is there.
        """
        return (place, batch) in self._held

    def read(self, place: str, batch: str) -> Any:
        """Return an output, in memory of its own.

        Parameters
        ----------
        place : str
            The name of the module that returned the output.
        batch : str
            The name of the batch.
        """
        form, tensors = self._held[place, batch]
        return _put_together(form, {name: tensor.clone().to(self.device) for name, tensor in tensors.items()})

    def places(self, prefix: str) -> list[str]:
        """Name the modules of which outputs are kept, by the beginning of their name.

        Parameters
        ----------
        prefix : str
            The beginning of the names to look for.

        Returns
        -------
        list of str
            The names of the modules.
        """
        return sorted({place for place, _ in self._held if place.startswith(prefix)})

    def drop(self, place: str, *, keep: str | None = None) -> None:
        """Let go of the outputs of one module, but for one batch.

        Parameters
        ----------
        place : str
            The name of the module whose outputs are let go of.
        keep : str, optional
            The name of a batch whose output stays.
        """
        for key in [key for key in self._held if key[0] == place and key[1] != keep]:
            del self._held[key]


def _taken_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the form of a value as JSON types, and put its tensors into a mapping, by the names that the form has."""
    if isinstance(value, torch.Tensor):
        name, host = str(len(tensors)), value.detach().to("cpu").contiguous()
        # What is there twice, or as a part of another, a file does not store.
        shared = host.untyped_storage().data_ptr() in {known.untyped_storage().data_ptr() for known in tensors.values()}
        tensors[name] = host.clone() if shared else host
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict) and all(isinstance(key, (int, str)) for key in value):
        return {"dict": [[key, _taken_apart(part, tensors)] for key, part in value.items()]}
    for kind in (tuple, list):
        if type(value) is kind:
            return {kind.__name__: [_taken_apart(part, tensors) for part in value]}
    raise TypeError(type(value).__name__)


def _put_together(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that a form is of."""
    [(kind, parts)] = form.items()
    if kind == "tensor":
        return tensors[parts]
    if kind == "value":
        return parts
    if kind == "dict":
        return {key: _put_together(part, tensors) for key, part in parts}
    return {"tuple": tuple, "list": list}[kind](_put_together(part, tensors) for part in parts)
