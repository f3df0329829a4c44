"""Checkpoints of modules that are not transformers models: the same files, written from and read into a module."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from cur.integrations.files.hashes import check_hashes
from cur.integrations.files.reading import ADVICE, CONFIG, CheckpointError
from cur.integrations.files.shards import Shards
from cur.integrations.files.tensor_file import PATTERN
from cur.integrations.nn import CompressedLinear, compressed_modules
from cur.integrations.nn.rounded import OnGrid
from cur.integrations.store.format import CURConfig, describe, mark_, put_layers_, read_config, unique_state

__all__ = ["load_into", "write_module"]

_TOLD = 5


def write_module(model: nn.Module, directory: Path, *, max_shard_size: int | str) -> None:
    """Write weights and configuration of a module under the names that transformers gives its own.

    Parameters
    ----------
    model : nn.Module
        The module with compressed layers.
    directory : Path
        The directory to write into, which exists.
    max_shard_size : int or str
        Largest size of one weight file, in bytes or with a unit.

    Raises
    ------
    TypeError
        If the state of the module holds something else than tensors.
    ValueError
        If a tensor has no values, on the device ``"meta"``.
    """
    state = unique_state(model)
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(
            f"{odd[0]} of {type(model).__name__} is a {type(state[odd[0]]).__name__}, and only tensors are stored; "
            "keep it out of `state_dict` (`get_extra_state`), and store it by itself"
        )
    if lost := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"{lost[0]} of {type(model).__name__} has no values (device meta); load the module first")
    config = {
        "architectures": [type(model).__name__],
        "quantization_config": CURConfig(describe(model)).to_dict(),
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(state, directory, filename_pattern=PATTERN, max_shard_size=max_shard_size)


def load_into(model: nn.Module, directory: str | os.PathLike[str], /) -> nn.Module:
    """Put compressed layers and all values of a checkpoint into a module that was built anew, in place.

    The module is one like that which was compressed: of the same names and shapes, with any values; it may be on the
    device ``"meta"``. Tensors take the dtype in which they are stored, and stay on the device where they are.

    Parameters
    ----------
    model : nn.Module
        The dense module, which is changed in place, and only if all of it fits.
    directory : path
        The directory that :func:`~cur.integrations.save` has written.

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    CheckpointError
        If the directory holds no compressed checkpoint or a damaged one, or the module does not fit: the message says
        which names and shapes differ.
    ValueError
        If the module has compressed layers already, or a buffer on the device ``"meta"`` that no checkpoint has.

    Examples
    --------
    >>> import tempfile, torch
    >>> from cur.integrations import CompressConfig, compress, load_into, save
    >>> def build():
    ...     return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> net, x = build(), torch.randn(64, 16)
    >>> report = compress(net, [x], CompressConfig(layers="all", targets="all-linear", rank=4))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = save(net, f"{place}/small", report=report)
    ...     again = load_into(build(), f"{place}/small")
    >>> torch.equal(again(x), net(x))
    True
    """
    if hollow := _hollow(model):
        raise ValueError(
            f"the buffer {hollow[0]} of {type(model).__name__} has no values (device meta) and is not persistent, so "
            'that nothing is stored of it; build the module outside of `torch.device("meta")`'
        )
    if done := list(compressed_modules(model)):
        raise ValueError(
            f"`model` has compressed layers already ({done[0]}, for instance); build the dense module anew, and load "
            "into that"
        )
    place = Path(directory).expanduser()
    check_hashes(place)
    config, files = read_config(place), Shards(place, one_dtype=False)
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    with _put_back_on_error(model):
        try:
            put_layers_(model, config, shapes)
        except TypeError as error:  # a module of another kind, by its name
            raise CheckpointError(
                f"{type(model).__name__} does not fit what is stored in {place}: {error}; build the module as it was "
                "when it was compressed"
            ) from error
        slots = _slots(model)
        _check_fit(model, slots, shapes, place)
        stored = {key: next(name for name in names if name in shapes) for key, (_, names) in slots.items()}
        values = {key: files.read(name) for key, name in stored.items()}
        _widen_steps_(model, values)
        inside = {id(tensor) for layer in compressed_modules(model).values() for tensor in _own(layer)}
        _fill_(model, slots, {key: value for key, value in values.items() if key in inside})
        for name, layer in compressed_modules(model).items():
            if fault := layer.damage():
                raise CheckpointError(f"{name}.{fault}: the checkpoint is corrupt")
    _fill_(model, slots, {key: value for key, value in values.items() if key not in inside})
    mark_(model)
    return model


def _hollow(model: nn.Module) -> list[str]:
    """Name the buffers without values that are no part of the state, so that nothing stored can fill them."""
    known = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return [name for name, buffer in model.named_buffers() if buffer.is_meta and id(buffer) not in known]


def _own(layer: CompressedLinear) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


@contextmanager
def _put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Put every child of every module back into its place if something fails."""
    before = [(parent, dict(parent._modules)) for parent in model.modules()]
    try:
        yield
    except BaseException:
        for parent, children in before:
            parent._modules.update(children)
        raise


def _slots(model: nn.Module) -> dict[int, tuple[Tensor, list[str]]]:
    """Return the tensors of a module's state by identity, each with all of its names."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (value, []))[1].append(name)
    return found


def _check_fit(
    model: nn.Module,
    slots: Mapping[int, tuple[Tensor, list[str]]],
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
) -> None:
    """Raise a CheckpointError that names what a module and a checkpoint do not have in common."""
    known = {name for _, names in slots.values() for name in names}
    # transformers is kept by empty tensors from loading what it does not know.
    guards = {f"{name}.weight" for name in compressed_modules(model)} | {ADVICE}
    lacking, other = [], []
    for tensor, names in slots.values():
        place = next((name for name in names if name in shapes), None)
        if place is None:
            lacking.append(f"{names[0]} {tuple(tensor.shape)}")
        elif shapes[place] != tuple(tensor.shape):
            other.append(f"{place} {tuple(tensor.shape)} here and {shapes[place]} there")
    extra = [f"{name} {shape}" for name, shape in shapes.items() if name not in known | guards]
    told = [
        f"{what}: {', '.join(some[:_TOLD])}{f' and {len(some) - _TOLD} more' if len(some) > _TOLD else ''}"
        for what, some in (("not stored", lacking), ("not in the module", extra), ("of other shapes", other))
        if some
    ]
    if told:
        raise CheckpointError(
            f"{type(model).__name__} does not fit what is stored in {directory}: {'; '.join(told)}; build the module "
            "as it was when it was compressed"
        )


def _fill_(model: nn.Module, slots: Mapping[int, tuple[Tensor, list[str]]], values: Mapping[int, Tensor]) -> None:
    """Give tensors of a module other values, of any dtype; those that are shared stay so."""
    made: dict[int, Tensor] = {}
    for key, value in values.items():
        old = slots[key][0]
        new = value if old.is_meta else value.to(old.device)
        if isinstance(old, nn.Parameter):
            if old.is_meta:
                made[key] = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
            else:
                old.data = new
        else:
            made[key] = new
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            _replace(place, made)


def _widen_steps_(model: nn.Module, values: dict[int, Tensor]) -> None:
    """Give stored steps, which are written in fewer bits, the dtype of what else is stored, in place.

    Where nothing else is, it is that of the module as it was built.
    """
    steps = {id(part.scale): part for part in model.modules() if isinstance(part, OnGrid)}
    others = Counter(value.dtype for key, value in values.items() if key not in steps and value.is_floating_point())
    usual = max(others, key=others.__getitem__) if others else None
    for key, part in steps.items():
        if part.grid.step_dtype is not None and key in values:
            values[key] = values[key].to(usual or part.scale.dtype)


def _replace(place: dict[str, Any], made: Mapping[int, Tensor]) -> None:
    changed: Iterable[tuple[str, Tensor]] = [(key, made[id(old)]) for key, old in place.items() if id(old) in made]
    place.update(changed)
