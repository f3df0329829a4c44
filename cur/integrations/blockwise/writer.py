"""Writing a checkpoint tensor by tensor: the same bytes as `save_pretrained`, without the model in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from cur.integrations.blockwise.shards import DTYPES, Shards
from cur.integrations.blockwise.skeleton import Skeleton
from cur.integrations.experts import unrolled
from cur.integrations.origin import KeptDigest, changed_modules, kept_names

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CheckpointWriter", "TensorFile", "add_tensors", "fill"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PATTERN = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"


class CheckpointWriter:
    """The weight files of a model on the meta device, filled in any order.

    Parameters
    ----------
    model : PreTrainedModel
        With compressed layers, marked by :func:`~cur.integrations.quantizer.mark_`.
    directory : Path
        Where the files go.
    max_shard_size : int or str
        Largest size of one file, in bytes or with a unit.
    """

    def __init__(self, model: Any, directory: Path, max_shard_size: int | str) -> None:
        state, metadata = model.hf_quantizer.get_state_dict_and_metadata(model)
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, model)
        split = split_torch_state_dict_into_shards(state, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
        self._places: dict[str, TensorFile] = {}
        self._expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        for file, names in split.filename_to_tensors.items():
            place = TensorFile(directory / file, {name: state[name] for name in names}, {**metadata, "format": "pt"})
            self._places |= dict.fromkeys(names, place)
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / _INDEX).write_text(text, encoding="utf-8")
        # What is not on the meta device is whole already.
        for name, tensor in state.items():
            if not tensor.is_meta:
                self.write(name, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in set(self._places.values()):
            file.close()
        if error is None and self._expected:
            raise ValueError(f"the checkpoint lacks {next(iter(self._expected))}: it was never written")

    def __contains__(self, name: str) -> bool:
        return name in self._expected

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place.

        Raises
        ------
        OSError
            If the disk is full.
        """
        dtype, shape = self._expected.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its place is for {dtype} {shape}")
        self._places[name].write(name, tensor)


class TensorFile:
    """One safetensors file of known tensors, whose values come one by one, in any order.

    Parameters
    ----------
    path : Path
        The file, which is made.
    tensors : mapping of str to Tensor
        Names, dtypes and shapes; may be on the meta device.
    metadata : mapping of str to str
        For its header.
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
        """Put the values of one tensor into their place."""
        if tensor.numel():
            self._file.seek(self._starts[name])
            data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
            while data:  # one call writes at most 2 GiB
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def fill(
    final: Any,
    skeleton: Skeleton,
    directory: Path,
    max_shard_size: int | str,
    *,
    replaced: Callable[[int], Mapping[str, torch.Tensor]],
    progress: Callable[[str, int, int | None], object] | None = None,
) -> str:
    """Write the weight files of a model, one block of the one that it was made from in memory at a time.

    Parameters
    ----------
    final : PreTrainedModel
        On the meta device.
    skeleton : Skeleton
        Where everything comes from that is not replaced.
    directory : Path
        Where the files go.
    max_shard_size : int or str
        Largest size of one file.
    replaced : callable
        Returns, for the number of a block, tensors by name that are new or other than the skeleton's.
    progress : callable, optional
        Called as ``progress("write", done, total)``, in blocks.

    Returns
    -------
    str
        Hash of the parameters that were kept, as :func:`~cur.integrations.origin.kept_digest` has it.
    """
    count = len(skeleton.blocks)
    kept, digest = set(kept_names(final, changed_modules(final))), KeptDigest()
    with CheckpointWriter(final, directory, max_shard_size) as writer:
        for name in skeleton.outside():  # one by one: embeddings and head can be larger than a block
            if name in writer:
                tensor = skeleton.load_tensor(name)
                writer.write(name, tensor)
                if name in kept:
                    digest.add(name, tensor)
                skeleton.free_outside()
        for index, (block, module) in enumerate(skeleton.blocks):
            if progress is not None:
                progress("write", index, count)
            skeleton.load_block(index)
            tensors = {f"{block}.{key}": value for key, value in module.state_dict().items()}
            with unrolled(module):
                tensors |= {f"{block}.{key}": value for key, value in module.state_dict().items()}
                tensors |= replaced(index)
                for name, tensor in tensors.items():
                    if name in writer:
                        writer.write(name, tensor)
                        if name in kept:
                            digest.add(name, tensor)
            del tensors
            skeleton.free_block(index)
        if progress is not None:
            progress("write", count, count)
    return digest.hexdigest()


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
        With ``model.safetensors`` or its shards.
    names : sequence of str
        The tensors.
    source : object
        What has them: ``tensors`` by name and ``read(name)``.
    max_shard_size : int or str
        Largest size of one file.
    dtypes : mapping
        What a dtype becomes, where it does not stay.
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
    whole = split_torch_state_dict_into_shards({**old, **new}, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    if not whole.is_sharded:
        place = directory / _PATTERN.format(suffix="")
        file = TensorFile(place.with_suffix(".new"), {**old, **new}, {"format": "pt"})
        for name in old:
            file.write(name, written.read(name))
        for name in names:
            file.write(name, read(name))
        file.close()
        place.with_suffix(".new").replace(place)
        return
    added = split_torch_state_dict_into_shards(new, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    files = [*sorted(set(places.values())), *(f"new-{name}" for name in sorted(added.filename_to_tensors))]
    for name, group in added.filename_to_tensors.items():
        file = TensorFile(directory / f"new-{name}", {each: new[each] for each in group}, {"format": "pt"})
        for each in group:
            file.write(each, read(each))
            places[each] = f"new-{name}"
        file.close()
    last = {name: _PATTERN.format(suffix=f"-{i:05}-of-{len(files):05}") for i, name in enumerate(files, start=1)}
    for name in files:
        (directory / name).rename(directory / f"moved-{last[name]}")
    for name in files:
        (directory / f"moved-{last[name]}").rename(directory / last[name])
    size = sum(one.nbytes for one in (*old.values(), *new.values()))
    index = {"metadata": {"total_size": size}, "weight_map": {name: last[place] for name, place in places.items()}}
    (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Of dtypes in safetensors files, from the last to the first.
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"),
    *("F64", "I64", "U64"),
)


def _rank(dtype: torch.dtype) -> int:
    return _ORDER.index(_NAMES[dtype])
