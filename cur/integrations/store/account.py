"""What of one checkpoint is in another: the same bit by bit, compressed, missing or extra; and hashes of its weights.

Tensors are compared one at a time, so that a model of any size can be accounted for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cur._lib.atomic import replace_file
from cur.integrations.files.beside import ACCOUNT, missing_files, name_of
from cur.integrations.files.hashes import RECORD_VERSION, check_hashes, read_record
from cur.integrations.files.reading import CheckpointError, digest_of
from cur.integrations.model.stored_tensors import ModelFiles, without_weights

__all__ = ["Account", "compare", "read_account", "write_account"]

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of the tensors and files of one directory in another.

    Attributes
    ----------
    against : str
        The directory that this one is compared with.
    same : int
        Tensors with the same values, bit by bit.
    same_bytes : int
        The bytes of the tensors that are the same.
    compressed : list of str
        Modules that hold factors in one of the two, or in both.
    rounded : list of str
        Tensors with the same values in another dtype.
    changed : list of str
        Tensors with other values or shapes.
    missing, extra : list of str
        Tensors that are in one alone. A tied weight is not missing where it is stored under its other name.
    unread : list of str
        Tensors that transformers does not load, by their names in the files of `against`, and that are here as well.
    missing_files : list of str
        Files beside the weights that `against` has and this one has not; of folders that are left out their names.
    """

    against: str
    same: int
    same_bytes: int
    compressed: list[str]
    rounded: list[str]
    changed: list[str]
    missing: list[str]
    extra: list[str]
    unread: list[str]
    missing_files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the account as JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it in sentences."""
        told = [f"Of {self.against} {self.same:,} tensors ({self.same_bytes:,} bytes) are the same, bit by bit."]
        for names, what in (
            (self.compressed, "Compressed modules"),
            (self.rounded, "The same values in another dtype"),
            (self.changed, "Other values"),
            (self.missing, "Missing tensors"),
            (self.extra, "Extra tensors"),
            (self.unread, "Tensors that transformers does not load, copied"),
            (self.missing_files, "Files left out"),
        ):
            if names:
                more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
                told.append(f"{what}: {len(names):,} ({', '.join(names[:_SHOWN])}{more}).")
        return told


def compare(
    directory: str | os.PathLike[str], against: str | os.PathLike[str], *, kind: type[Any] | None = None
) -> Account:
    """Account for what one directory holds of another.

    Parameters
    ----------
    directory, against : path
        Checkpoints of the same model, compressed or not.
    kind : type, optional
        Class of the model; default: the one that the configuration of `against` names.

    Returns
    -------
    Account

    Raises
    ------
    CheckpointError
        If one of them is no checkpoint, or damaged.
    """
    here, there = Path(directory), Path(against)
    for place in (here, there):
        check_hashes(place)
    hollow = without_weights(there, kind)
    ours, theirs = ModelFiles(here, hollow), ModelFiles(there, hollow)
    compressed = ours.compressed | theirs.compressed
    inside = tuple(f"{name}." for name in compressed)
    tied = {} if hollow is None else {**hollow.all_tied_weights_keys}
    found = _Compared(ours, tied)
    done: set[str] = set()
    for target in theirs.places:
        if target in done or target.startswith(inside):
            continue
        for name, tensor in theirs.read(target):
            done.add(name)
            found.add(name, tensor)
    for name in theirs.unread:
        if name in ours.weights.tensors:
            found.add_unread(name, theirs.weights.read(name))
        else:
            found.missing.append(name)
    extra = [name for name in ours.places if not name.startswith(inside) and done.isdisjoint(_aliases(name, tied))]
    extra += [name for name in ours.unread if name not in theirs.weights.tensors]
    return Account(
        against=name_of(there),
        same=found.same,
        same_bytes=found.same_bytes,
        compressed=sorted(compressed),
        rounded=found.rounded,
        changed=found.changed,
        missing=found.missing,
        extra=extra,
        unread=[name for name in theirs.unread if name in ours.weights.tensors],
        missing_files=missing_files(there, here),
    )


class _Compared:
    """The tensors of the other model, as they are met one by one."""

    def __init__(self, ours: ModelFiles, tied: Mapping[str, str]) -> None:
        self._ours, self._tied = ours, tied
        self._ahead: dict[str, torch.Tensor] = {}
        self.same = self.same_bytes = 0
        self.rounded: list[str] = []
        self.changed: list[str] = []
        self.missing: list[str] = []

    def add(self, name: str, theirs: torch.Tensor) -> None:
        place = next((at for at in _aliases(name, self._tied) if self._ours.holds(at)), None)
        if place is None and name not in self._ahead:
            self.missing.append(name)
            return
        if name not in self._ahead and place is not None:
            self._ahead |= {(name if at == place else at): tensor for at, tensor in self._ours.read(place)}
        self._judge(name, self._ahead.pop(name), theirs)

    def add_unread(self, name: str, theirs: torch.Tensor) -> None:
        self._judge(name, self._ours.weights.read(name), theirs)

    def _judge(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if ours.shape != theirs.shape:
            self.changed.append(name)
        elif ours.dtype == theirs.dtype and _same_bits(ours, theirs):
            self.same += 1
            self.same_bytes += theirs.nbytes
        elif ours.dtype != theirs.dtype and _same_bits(ours, theirs.to(ours.dtype)):
            self.rounded.append(name)
        else:
            self.changed.append(name)


def _aliases(name: str, tied: Mapping[str, str]) -> list[str]:
    """Return the names under which a tensor can be stored: its own, and those of others that are tied to it."""
    first = tied.get(name, name)
    return [name, first, *(other for other, source in tied.items() if source == first)]


def write_account(directory: Path, account: Account | None, *, kept: str = "") -> None:
    """Write what is known of a directory that is complete.

    Hashes of its weights, what it holds of its source, and the hash of what compression left as it was.

    Parameters
    ----------
    directory : Path
        The directory, which is complete.
    account : Account or None
        The comparison with the source; None if there is none.
    kept : str, default ""
        The hash of the tensors that compression left as they were.
    """
    hashes = {file.name: digest_of(file) for file in sorted(directory.glob("*.safetensors"))}
    said = None if account is None else account.to_dict()
    data = {"format_version": RECORD_VERSION, "sha256": hashes, "kept": kept, "account": said}
    with replace_file(directory / ACCOUNT) as stream:
        stream.write((json.dumps(data, indent=1) + "\n").encode())


def read_account(directory: str | os.PathLike[str]) -> Account | None:
    """Return the account that was written with a checkpoint, None if there is none.

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
    if not path.exists():
        return None
    found = read_record(path)["account"]
    try:
        return None if found is None else Account(**found)
    except TypeError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again, or delete it to go without") from error


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Bits, not values: NaN is equal to itself, and 0.0 is not -0.0.
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
