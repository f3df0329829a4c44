"""Reading single tensors from the safetensors shards of a checkpoint, which is never in memory as a whole.

Files are read, not mapped: what is in memory is what was asked for, whatever the system makes of its cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cur.integrations.files.configuration import check_config, weights_name
from cur.integrations.files.header import ShardError, header_of
from cur.integrations.files.reading import read_object

__all__ = ["DTYPES", "Shards", "StoredTensor"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{
        name: getattr(torch, kind)
        for name, kind in {"F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "U32": "uint32", "U64": "uint64"}.items()
        if hasattr(torch, kind)
    },
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the headers of safetensors files."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, first byte and number of bytes, dtype and shape.

    Parameters
    ----------
    file : Path
        The file that the tensor lies in.
    start : int
        The place of its first byte in the file.
    size : int
        The number of its bytes.
    dtype : torch.dtype
        The dtype that it is stored in.
    shape : tuple of int
        The shape of the tensor.
    """

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
    """The weight files of a checkpoint directory.

    Headers are read and checked at once, data when a tensor is asked for.

    Parameters
    ----------
    directory : path
        The directory of a checkpoint with ``config.json`` and safetensors files.
    one_dtype : bool, default True
        Whether a matrix of a block must have the dtype of its namesakes in others.

    Attributes
    ----------
    directory : Path
        The directory of the checkpoint.
    tensors : dict of str to StoredTensor
        Where each tensor lies, by its name in the files.

    Raises
    ------
    ShardError
        If there are no such files, a file is missing, truncated or damaged, the index and the files contradict each
        other, or shards store weights in different dtypes.
    """

    def __init__(self, directory: str | os.PathLike[str], *, one_dtype: bool = True) -> None:
        self.directory = Path(directory).expanduser()
        config = check_config(self.directory)
        weights = weights_name(config)
        self._index, placed = _index(self.directory, weights)
        self._headers = hashlib.sha256((self.directory / "config.json").read_bytes())
        self.tensors: dict[str, StoredTensor] = {}
        files = [self.directory / weights] if placed is None else self._named(placed)
        for file in files:
            self._add(file)
        if placed is not None:
            self._agree(placed)
        if one_dtype:
            self._one_dtype()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.size for tensor in self.tensors.values())

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors with those of floating dtype brought to `dtype`.

        Parameters
        ----------
        dtype : torch.dtype
            The floating dtype that the weights are brought to.

        Returns
        -------
        int
            The sum of the bytes.
        """
        return sum(
            math.prod(tensor.shape) * dtype.itemsize if tensor.dtype.is_floating_point else tensor.size
            for tensor in self.tensors.values()
        )

    def digest(self) -> str:
        """SHA-256 of the configuration, and of every file's name, size, time of change and header.

        It tells one input from another without reading the weights: a file that is written to changes its time.

        Returns
        -------
        str
            The hash, in hexadecimal digits.
        """
        return self._headers.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own.

        Parameters
        ----------
        name : str
            The name of the tensor in the files.

        Raises
        ------
        ShardError
            If the file ends early or cannot be read.
        """
        stored = self.tensors[name]
        flat = torch.empty(stored.size, dtype=torch.uint8)
        view = memoryview(flat.numpy().data)
        try:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(stored.start)
                done = 0
                while done < stored.size:
                    count = stream.readinto(view[done:])
                    if not count:
                        raise ShardError(f"{stored.file} ends within {name}: it is truncated; fetch it again")
                    done += count
        except OSError as error:
            raise ShardError(f"{stored.file} cannot be read: {error.strerror or error}") from error
        return (
            flat.view(stored.dtype).reshape(stored.shape)
            if stored.size
            else torch.empty(stored.shape, dtype=stored.dtype)
        )

    def _named(self, placed: dict[str, str]) -> list[Path]:
        files = [self.directory / name for name in sorted(set(placed.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ShardError(
                f"{self._index} names {', '.join(missing)}, which {self.directory} does not hold: "
                f"{len(missing)} of {len(files)} shards are missing; fetch them again"
            )
        return files

    def _add(self, file: Path) -> None:
        header, start = header_of(file)
        status = file.stat()
        for fact in (file.name, status.st_size, status.st_mtime_ns, json.dumps(header, sort_keys=True)):
            self._headers.update(str(fact).encode() + b"\0")
        header.pop("__metadata__", None)
        end = 0
        for name, described in header.items():
            tensor = _stored(file, start, name, described)
            if name in self.tensors:
                raise ShardError(f"{name} is in two shards, {self.tensors[name].file.name} and {file.name}")
            self.tensors[name] = tensor
            end = max(end, tensor.start + tensor.size)
        if end > status.st_size:
            raise ShardError(
                f"{file} is truncated: its header speaks of {end:,} bytes, it has {status.st_size:,}; fetch it again"
            )

    def _agree(self, placed: dict[str, str]) -> None:
        for name, file in placed.items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file:
                where = "no shard" if found is None else found.file.name
                raise ShardError(
                    f"{self._index} places {name} in {file}, but {where} holds it: index and shards do not "
                    "belong together"
                )

    def _one_dtype(self) -> None:
        # Norms and routers are often kept in float32 beside weights in half precision, everywhere alike; a matrix of a
        # block that differs from its namesakes in other blocks comes from a conversion that stopped half-way.
        first: dict[str, tuple[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            if len(tensor.shape) < 2 or not tensor.dtype.is_floating_point:
                continue
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            other, known = first.setdefault(kind, (name, tensor))
            if known.dtype != tensor.dtype:
                raise ShardError(
                    f"the shards do not agree on a dtype: {other} in {known.file.name} is {_plain(known.dtype)}, "
                    f"{name} in {tensor.file.name} is {_plain(tensor.dtype)}; convert the checkpoint to one dtype"
                )


def _index(directory: Path, weights: str) -> tuple[Path, dict[str, str] | None]:
    """Return the index file and its map from tensors to files; no map for a single file."""
    index = directory / (weights if weights.endswith(".json") else f"{weights}.index.json")
    if not index.exists():
        if not (directory / weights).exists():
            raise ShardError(
                f"{directory} has neither {weights} nor {index.name}: block by block only safetensors checkpoints are "
                "read; save the model in that format"
            )
        return index, None
    if (directory / weights).exists() and not weights.endswith(".json"):
        return index, None  # as transformers, which takes the single file where both are there
    placed = read_object(index, error=ShardError).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ShardError(f"{index} has no `weight_map`, so it names no shards")
    return index, {str(name): str(file) for name, file in placed.items()}


def _stored(file: Path, start: int, name: str, described: Any) -> StoredTensor:
    try:
        dtype, shape = DTYPES[described["dtype"]], tuple(int(side) for side in described["shape"])
        begin, end = (int(offset) for offset in described["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{file} is corrupt, or stores {name} in an unknown dtype: {described!r}") from error
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ShardError(f"{file} is corrupt: {name} of shape {shape} cannot take {end - begin} bytes; fetch it again")
    return StoredTensor(file, start + begin, end - begin, dtype, shape)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
