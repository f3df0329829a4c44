"""Writing safetensors files tensor by tensor, the same bytes as the library that holds all of them writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from cur.integrations.files.shards import DTYPES, Shards

__all__ = ["INDEX", "PATTERN", "TensorFile", "add_tensors"]

PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# Of dtypes in safetensors files, from the last to the first.
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"),
    *("F64", "I64", "U64"),
)


class TensorFile:
    """One safetensors file of known tensors, whose values come one by one, in any order.

    Parameters
    ----------
    path : Path
        The path of the file, which is created.
    tensors : mapping of str to Tensor
        Names, dtypes and shapes; may be on the meta device.
    metadata : mapping of str to str
        The metadata for the header of the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        # The order and the padding of safetensors itself.
        ordered = sorted(tensors, key=lambda name: (-_rank(tensors[name].dtype), name))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        starts: dict[str, int] = {}
        for name in ordered:
            tensor = tensors[name]
            starts[name] = end
            end += math.prod(tensor.shape) * tensor.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("w+b", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put the values of one tensor into their place.

        Parameters
        ----------
        name : str
            The name of the tensor in the file.
        tensor : Tensor
            The values to write.
        """
        if tensor.numel():
            self._file.seek(self._starts[name])
            data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
            while data:  # one call writes at most 2 GiB
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def add_tensors(
    directory: Path,
    names: Sequence[str],
    source: Any,
    max_shard_size: int | str,
    *,
    dtypes: Mapping[torch.dtype, torch.dtype],
) -> None:
    """Put tensors of another checkpoint beside those of one that was just written, in the default file names.

    Where the model is to be in one file, that is written anew; else files are added.

    Parameters
    ----------
    directory : Path
        The directory, with ``model.safetensors`` or its shards.
    names : sequence of str
        The names of the tensors to add.
    source : object
        The source of the tensors: it has ``tensors`` by name and ``read(name)``.
    max_shard_size : int or str
        The largest size of one file, in bytes or as text such as ``"5GB"``.
    dtypes : mapping
        The dtype that each dtype becomes, where it does not stay.
    """

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = source.read(name)
        return tensor.to(dtypes.get(tensor.dtype, tensor.dtype))

    written = Shards(directory, one_dtype=False)
    old = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in written.tensors.items()}
    stored = {name: source.tensors[name] for name in names}
    new = {
        name: torch.empty(one.shape, dtype=dtypes.get(one.dtype, one.dtype), device="meta")
        for name, one in stored.items()
    }
    places = {name: one.file.name for name, one in written.tensors.items()}
    whole = split_torch_state_dict_into_shards({**old, **new}, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    if not whole.is_sharded:
        place = directory / PATTERN.format(suffix="")
        file = TensorFile(place.with_suffix(".new"), {**old, **new}, {"format": "pt"})
        for name in old:
            file.write(name, written.read(name))
        for name in names:
            file.write(name, read(name))
        file.close()
        place.with_suffix(".new").replace(place)
        return
    added = split_torch_state_dict_into_shards(new, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    files = [*sorted(set(places.values())), *(f"new-{name}" for name in sorted(added.filename_to_tensors))]
    for name, group in added.filename_to_tensors.items():
        file = TensorFile(directory / f"new-{name}", {each: new[each] for each in group}, {"format": "pt"})
        for each in group:
            file.write(each, read(each))
            places[each] = f"new-{name}"
        file.close()
    last = {name: PATTERN.format(suffix=f"-{i:05}-of-{len(files):05}") for i, name in enumerate(files, start=1)}
    for name in files:
        (directory / name).rename(directory / f"moved-{last[name]}")
    for name in files:
        (directory / f"moved-{last[name]}").rename(directory / last[name])
    size = sum(one.nbytes for one in (*old.values(), *new.values()))
    index = {"metadata": {"total_size": size}, "weight_map": {name: last[place] for name, place in places.items()}}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rank(dtype: torch.dtype) -> int:
    return _ORDER.index(_NAMES[dtype])
