"""Teacher and student side by side in the memory of one model: what was not compressed is there once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from cur.integrations.files.beside import REPORT
from cur.integrations.files.hashes import check_hashes, read_kept
from cur.integrations.files.reading import CheckpointError, read_object
from cur.integrations.model.experts import inside_experts
from cur.integrations.model.origin import changed_modules, kept_digest, origin_of, set_origin_
from cur.integrations.model.pointwise import LinearConvolution
from cur.integrations.nn import CompressedLinear, compressed_modules, dense_weight
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.checkpoint import read_config
from cur.integrations.store.format import CURQuantizer, mark_

__all__ = ["check_pair", "check_teacher", "load_student", "share_", "twin"]


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher from which the student cannot have been made.

    Parameters
    ----------
    student : nn.Module
        The compressed model to heal.
    teacher : nn.Module
        The dense model that it should have been made from.

    Raises
    ------
    ValueError
        If the teacher is compressed itself, or its vocabulary, width or layers are others than the student's, or
        experts or convolutions are compressed.
    """
    ours, theirs = _sizes(student), _sizes(teacher)
    for what, mine in ours.items():
        if mine != theirs[what]:
            raise ValueError(
                f"`teacher` has {what} {theirs[what]}, the student {mine}; the teacher must be the dense model that "
                "the student was compressed from"
            )
    layers = compressed_modules(student)
    inside = inside_experts(student)
    if experts := [name for name in layers if name in inside]:
        raise ValueError(
            f"`student` has compressed experts ({experts[0]}, {len(experts)} layers in all), which are not healed: a "
            'token may choose others in the dense model; compress with `exclude` "experts" to heal the other layers'
        )
    if points := [name for name in layers if isinstance(_holder(student, name), LinearConvolution)]:
        raise ValueError(
            f"`student` has compressed convolutions ({points[0]}, {len(points)} layers in all), which are not healed; "
            "compress with `exclude` and their names to heal the other layers"
        )
    dense = dict(teacher.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if name not in dense:
            raise ValueError(f"`teacher` has no module {name}, which the student has compressed")
        if isinstance(dense[name], CompressedLinear):
            raise ValueError(f"`teacher` is compressed itself at {name}; the teacher must be the dense model")
        weight, _, _ = dense_weight(dense[name], name)
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"`teacher` has a weight of shape {tuple(weight.shape)} at {name}, the student's layer maps "
                f"{layer.in_features} to {layer.out_features} features"
            )


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _sizes(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = {"vocabulary": "vocab_size", "width": "hidden_size", "number of layers": "num_hidden_layers"}
    return {what: getattr(config, name, None) for what, name in names.items()}


def check_teacher(directory: str | Path, student: nn.Module, teacher: Callable[[Collection[str]], str]) -> None:
    """Refuse a dense model that differs from the one that a checkpoint was made from in what both have.

    Parameters
    ----------
    directory : path
        The compressed checkpoint. One that says nothing, in its report or account, is let pass.
    student : nn.Module
        The compressed model, with or without its weights in memory.
    teacher : callable
        Returns the hash of the dense model's parameters outside the modules that it is given.

    Raises
    ------
    CheckpointError
        If the hash of the teacher differs from the one the student was made from.
    """
    report = Path(directory) / REPORT
    known = CompressionReport.load(report) if report.exists() else None
    kept = (known.kept if known is not None else "") or read_kept(directory)
    if not kept:
        return
    found = teacher(changed_modules(student))
    if found and found != kept:
        source = f" ({known.source})" if known is not None and known.source else ""
        raise CheckpointError(
            f"the teacher is not the dense model that {directory} was made from{source}: weights that compression left "
            "as they were differ from its own; name the right one with --teacher"
        )


def share_(student: nn.Module, teacher: nn.Module) -> int:
    """Let the student use the teacher's tensors wherever both are bitwise equal, in place.

    Parameters
    ----------
    student, teacher : nn.Module
        Modules of the same names, but for the compressed layers.

    Returns
    -------
    int
        Bytes that the student no longer keeps to itself.
    """
    theirs: dict[str, Tensor] = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    saved = 0
    for kind in (student.named_parameters, student.named_buffers):
        for name, tensor in kind():
            other = theirs.get(name)
            if other is None or other.data_ptr() == tensor.data_ptr() or not _same(tensor, other):
                continue
            saved += tensor.numel() * tensor.element_size()
            tensor.data = other.data
    return saved


def load_student(directory: str | Path, teacher: PreTrainedModel) -> PreTrainedModel:
    """Load a compressed checkpoint beside its teacher, without ever holding a tensor twice.

    The student begins as a second set of modules around the teacher's own tensors; the compressed layers and any other
    tensor in which the checkpoint differs from the teacher are then read from the files.

    Parameters
    ----------
    directory : path
        The directory of a compressed checkpoint.
    teacher : PreTrainedModel
        The dense model that it was made from.

    Returns
    -------
    PreTrainedModel
        The compressed model, in evaluation mode.

    Raises
    ------
    CheckpointError
        If the directory holds no compressed checkpoint, or one that does not fit the teacher.
    """
    config = read_config(directory)
    check_hashes(directory)
    stored = _Files(Path(directory), config.weights or "model.safetensors")
    student = twin(teacher)
    # The factors get the shapes that the checkpoint names, and their values after that, as in `from_pretrained`.
    quantizer = CURQuantizer(config, pre_quantized=True)
    quantizer.preprocess_model(student, checkpoint_files=stored.files)
    with torch.no_grad():
        for name, layer in compressed_modules(student).items():
            for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                tensor.copy_(stored.read(f"{name}.{key}"))
            layer.eval()
    mark_(student)
    set_origin_(student, replace(origin_of(student), kept=read_kept(directory)))
    check_pair(student, teacher)
    check_teacher(directory, student, functools.partial(kept_digest, teacher))
    _check_shared(student, stored)
    return student


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second set of modules around the same tensors: what is swapped in one leaves the other as it is.

    Parameters
    ----------
    model : PreTrainedModel
        The model, which is not changed.
    """
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def _check_shared(student: nn.Module, stored: _Files) -> None:
    """Compare the tensors that the student has from the teacher with the checkpoint's, and take those that differ."""
    factors = tuple(f"{name}." for name in compressed_modules(student))
    for name, parameter in list(student.named_parameters()):
        if name.startswith(factors) or name not in stored:
            continue
        own = stored.read(name).to(parameter.device)
        if own.shape != parameter.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(own.shape)} in the checkpoint and {tuple(parameter.shape)} in the teacher; "
                "the teacher must be the dense model that the student was compressed from"
            )
        if not _same(own, parameter):
            _replace_(student, parameter, nn.Parameter(own.to(parameter.dtype), requires_grad=False))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)


def _replace_(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another wherever that is used, so that tied weights stay tied."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, key, new)


class _Files:
    """The tensors of a checkpoint, each read when it is asked for."""

    def __init__(self, directory: Path, weights: str) -> None:
        path = directory / weights
        if weights.endswith(".json"):
            index = read_object(path)
            self.where = {key: str(directory / file) for key, file in index["weight_map"].items()}
        else:
            try:
                with safe_open(path, framework="pt") as file:
                    self.where = {key: str(path) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        self.files = sorted(set(self.where.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def read(self, name: str) -> Tensor:
        if name not in self.where:
            raise CheckpointError(f"the checkpoint lacks {name}")
        try:
            with safe_open(self.where[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.where[name]} cannot be read: {error}") from error
        return tensor
