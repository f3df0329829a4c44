"""Writing a checkpoint tensor by tensor: the same bytes as `save_pretrained`, without the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.tensor_file import INDEX, PATTERN, TensorFile
from cur.integrations.model.origin import KeptDigest, changed_modules, kept_names
from cur.integrations.model.unrolling import unrolled

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CheckpointWriter", "fill"]


class CheckpointWriter:
    """The weight files of a model on the meta device, filled in any order.

    Parameters
    ----------
    model : PreTrainedModel
        The model with compressed layers, marked by :func:`~cur.integrations.store.format.mark_`.
    directory : Path
        The directory to write the files into.
    max_shard_size : int or str
        Largest size of one file, in bytes or with a unit.
    dtypes : mapping of str to torch.dtype, optional
        The dtypes in which tensors are stored, where these are others than the model has them in.
    """

    def __init__(
        self, model: Any, directory: Path, max_shard_size: int | str, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        state, metadata = model.hf_quantizer.get_state_dict_and_metadata(model)
        state |= {name: state[name].to(dtype) for name, dtype in (dtypes or {}).items() if name in state}
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, model)
        split = split_torch_state_dict_into_shards(state, filename_pattern=PATTERN, max_shard_size=max_shard_size)
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
            (directory / INDEX).write_text(text, encoding="utf-8")
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

        Parameters
        ----------
        name : str
            The name of the tensor in the checkpoint.
        tensor : Tensor
            The values to write.

        Raises
        ------
        OSError
            If the disk is full or cannot be written.
        """
        dtype, shape = self._expected.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its place is for {dtype} {shape}")
        self._places[name].write(name, tensor)


def fill(
    final: Any,
    streamed: StreamedModel,
    directory: Path,
    max_shard_size: int | str,
    *,
    replaced: Callable[[int], Mapping[str, torch.Tensor]],
    dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Callable[[str, int, int | None], object] | None = None,
) -> str:
    """Write the weight files of a model, one block of the one that it was made from in memory at a time.

    Parameters
    ----------
    final : PreTrainedModel
        The compressed model, without weights, on the meta device.
    streamed : StreamedModel
        The dense model, which all that is not replaced is copied from.
    directory : Path
        The directory to write the files into.
    max_shard_size : int or str
        The largest size of one file, in bytes or as text such as ``"5GB"``.
    replaced : callable
        Returns, for the number of a block, tensors by name that are new or other than the streamed's.
    dtypes : mapping of str to torch.dtype, optional
        The dtypes in which these are stored, by name. By default those of the model.
    progress : callable, optional
        Called as ``progress("write", done, total)``, in blocks.

    Returns
    -------
    str
        Hash of the parameters that were kept, as :func:`~cur.integrations.model.origin.kept_digest` has it.
    """
    count = len(streamed.blocks)
    kept, digest = set(kept_names(final, changed_modules(final))), KeptDigest()
    with CheckpointWriter(final, directory, max_shard_size, dtypes) as writer:
        for name in streamed.outside():  # one by one: embeddings and head can be larger than a block
            if name in writer:
                tensor = streamed.load_tensor(name)
                writer.write(name, tensor)
                if name in kept:
                    digest.add(name, tensor)
                streamed.free_outside()
        for index, (block, module) in enumerate(streamed.blocks):
            if progress is not None:
                progress("write", index, count)
            streamed.load_block(index)
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
            streamed.free_block(index)
        if progress is not None:
            progress("write", count, count)
    return digest.hexdigest()
