"""How many parameters and bytes a model has, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

__all__ = ["Size", "model_size", "weight_bytes"]


@dataclass(frozen=True)
class Size:
    """Size of a model: tied weights count once.

    Attributes
    ----------
    parameters : int
        The number of parameters of the model.
    bytes : int
        Bytes of its parameters and buffers, in the dtype they have.
    file_bytes : int or None
        Bytes of its weight files; None where there are none yet.
    """

    parameters: int
    bytes: int
    file_bytes: int | None = field(default=None, compare=False)


def model_size(model: nn.Module) -> Size:
    """Count the parameters and bytes of a model; tied weights count once.

    Parameters
    ----------
    model : nn.Module
        The model to count.

    Returns
    -------
    Size
        The size in memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def weight_bytes(directory: str | Path) -> int | None:
    """Return the bytes of the weight files in a directory, or of a weight file; None if there is none.

    Parameters
    ----------
    directory : path
        The directory of a model, or one weight file.
    """
    path = Path(directory)
    # Not all that end so: some models are stored a second time, in `consolidated.safetensors`.
    for files in ([path] if path.is_file() else [], path.glob("*model*.safetensors"), path.glob("pytorch_model*.bin")):
        if found := [file.stat().st_size for file in files]:
            return sum(found)
    return None
