"""What the teacher gives for a batch, kept on disk: text is seen many times, the teacher never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cur._lib.atomic import replace_file
from cur.integrations.model.blocks import BlockCall

__all__ = ["TeacherCache", "TeacherOutputs"]


@dataclass
class TeacherOutputs:
    """What the teacher returned for a batch, with which the student is compared.

    Attributes
    ----------
    hidden : dict of int to Tensor
        Output of blocks by their index, shape (batch, length, width). For healing by blocks that of -1 is what enters
        the first block.
    modules : dict of str to Tensor
        Output of the dense layers in the place of compressed ones.
    last : Tensor or None
        The hidden state that the head gets; None where the output is not compared.
    calls : dict of int to BlockCall
        The arguments of blocks besides the hidden state, by the block's index, for healing by blocks; not kept on disk.
    """

    hidden: dict[int, Tensor]
    modules: dict[str, Tensor]
    last: Tensor | None
    calls: dict[int, BlockCall] = field(default_factory=dict)

    def to(self, device: torch.device) -> TeacherOutputs:
        """Return the same on a device.

        Parameters
        ----------
        device : torch.device
            The device that the outputs are brought to.
        """
        return TeacherOutputs(
            {index: value.to(device) for index, value in self.hidden.items()},
            {name: value.to(device) for name, value in self.modules.items()},
            None if self.last is None else self.last.to(device),
        )


class TeacherCache:
    """A directory with one file for each batch.

    Hidden states are stored in the dtype in which they were computed, so that healing from the cache gives bit for bit
    the weights of healing without it.

    Parameters
    ----------
    directory : path
        Made when the first batch is written.
    key : str
        What the outputs depend on besides the batch: teacher, precision, which blocks and modules are kept.
    """

    def __init__(self, directory: str | Path, key: str) -> None:
        self.directory = Path(directory).expanduser()
        self.key = key

    def _path(self, batch: Mapping[str, Any]) -> Path:
        total = hashlib.sha256(self.key.encode())
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                total.update(f"{name} {tuple(value.shape)}".encode())
                total.update(value.cpu().to(torch.float64).contiguous().numpy().tobytes())
        return self.directory / f"{total.hexdigest()[:32]}.safetensors"

    def read(self, batch: Mapping[str, Any]) -> TeacherOutputs | None:
        """Return what was kept for a batch, None if there is nothing.

        A damaged file counts as not there and is written anew.

        Parameters
        ----------
        batch : mapping
            The batch that the teacher was run on.
        """
        path = self._path(batch)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None
        hidden = {int(name[7:]): value for name, value in tensors.items() if name.startswith("hidden/")}
        modules = {name[8:]: value for name, value in tensors.items() if name.startswith("modules/")}
        return TeacherOutputs(hidden, modules, tensors.get("last"))

    def write(self, batch: Mapping[str, Any], taught: TeacherOutputs) -> None:
        """Keep what the teacher gave.

        Parameters
        ----------
        batch : mapping
            The batch that the teacher was run on.
        taught : TeacherOutputs
            The outputs of the teacher on it.

        Raises
        ------
        OSError
            If the disk is full or cannot be written.
        """
        tensors = {f"hidden/{index}": value for index, value in taught.hidden.items()}
        tensors |= {f"modules/{name}": value for name, value in taught.modules.items()}
        tensors |= {} if taught.last is None else {"last": taught.last}
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        self.directory.mkdir(parents=True, exist_ok=True)
        with replace_file(self._path(batch)) as stream:
            stream.write(data)
