"""The tensors that lie in a model's directory, by the names that the model has for them.

Which tensors a model loads follows from the headers of its files and a model without weights, whatever was done to the
model since: transformers renames, splits and merges on the way, and what it has no place for it leaves out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from cur.integrations.files.configuration import check_config, weights_name
from cur.integrations.files.reading import ADVICE, CheckpointError
from cur.integrations.files.shards import Shards
from cur.integrations.model.classes import model_class

__all__ = [
    "ModelFiles",
    "conversions",
    "empty_model",
    "has_weights",
    "names_in_model",
    "names_safetensors",
    "open_weights",
    "without_weights",
]


def without_weights(directory: Path, kind: type[Any] | None = None) -> PreTrainedModel | None:
    """Return the dense model of a directory on the meta device.

    Parameters
    ----------
    directory : Path
        The directory with the configuration of the model.
    kind : type, optional
        Class of the model; default: the one that the configuration names.

    Returns
    -------
    PreTrainedModel or None
        None if transformers has no such class, or it cannot be made without weights.
    """
    check_config(directory)
    try:
        if kind is None:
            kind, config = model_class(AutoConfig.from_pretrained(directory), directory)
        elif kind.config_class is None:
            return None
        else:
            config = kind.config_class.from_pretrained(directory)
    except Exception:  # noqa: BLE001 - of a configuration that does not fit, transformers raises what it likes
        return None  # names are taken as they are, and an account says what that leaves open
    return empty_model(kind, config)


def empty_model(kind: type[Any], config: Any) -> PreTrainedModel | None:
    """Return the dense model of a configuration on the meta device, None if it cannot be made there.

    Parameters
    ----------
    kind : type
        The class of the model.
    config : Any
        The configuration of the model.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind(plain)
    except Exception:  # noqa: BLE001 - and so does the code of a model that is made without memory
        return None
    return model


def conversions(model: Any) -> list[WeightTransform]:
    """Return what transformers does to stored tensors, made anew: the entries remember what they converted.

    Parameters
    ----------
    model : Any
        The model that the tensors are loaded into.
    """
    found: list[WeightTransform] = get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))
    return found


def names_in_model(model: Any, names: Any) -> dict[str, tuple[str, bool]]:
    """Return by stored name the name in the model, and whether what lies there is converted, not renamed alone.

    A name for which the model has no place is among them, as transformers would call it.

    Parameters
    ----------
    model : Any
        The model that the tensors are loaded into.
    names : Any
        The names of the stored tensors.
    """
    mapping = conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        target, converter = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as the loader does: it has the model's name already
            target, converter = rename_source_key(name, [], [], prefix, known)
        found[name] = target, converter is not None
    return found


def open_weights(directory: str | os.PathLike[str]) -> Any:
    """Return the weight files of a directory: ``tensors`` with their dtype and shape by name, and ``read(name)``.

    Parameters
    ----------
    directory : path
        The directory of a model.

    Raises
    ------
    CheckpointError
        If there are none, or they are damaged.
    """
    place = Path(directory)
    pickles = sorted(place.glob("pytorch_model*.bin"))
    return _Pickles(pickles) if pickles and not names_safetensors(place) else Shards(place, one_dtype=False)


def has_weights(directory: Path) -> bool:
    """Say whether the weights of a directory have names by which they are found; variants have others.

    Parameters
    ----------
    directory : Path
        The directory of a model.

    Returns
    -------
    bool
        Whether weights are found there.
    """
    return names_safetensors(directory) or any(directory.glob("pytorch_model*.bin"))


def names_safetensors(place: Path) -> bool:
    """Say whether a directory has a safetensors file, or an index of several, by the name that is looked for.

    Parameters
    ----------
    place : Path
        The directory of a model.

    Returns
    -------
    bool
        Whether safetensors files are found there.
    """
    named = weights_name(check_config(place))
    return (place / named).exists() or (place / f"{named}.index.json").exists()


class ModelFiles:
    """The tensors of one directory, in terms of the dense model.

    Parameters
    ----------
    directory : Path
        The directory of a model, compressed or not.
    hollow : PreTrainedModel or None
        The dense model without weights; None if it is not known, and names are taken as they are.

    Attributes
    ----------
    compressed : set of str
        Modules that hold factors, and those whose experts do.
    places : dict of str to list of str
        The stored tensors that belong to each name in the model.
    unread : list of str
        Stored tensors that the model has no place for.
    """

    def __init__(self, directory: Path, hollow: PreTrainedModel | None) -> None:
        self.directory = directory
        self.hollow = hollow
        self.weights = open_weights(directory)
        described = check_config(directory).get("quantization_config") or {}
        ours = described if described.get("quant_method") == "cur" else {}
        self.compressed = {*ours.get("modules", {}), *ours.get("experts", [])}
        names = list(self.weights.tensors)
        named = {name: (name, False) for name in names} if hollow is None else names_in_model(hollow, names)
        known = None if hollow is None else hollow.state_dict()
        self._empty: dict[str, Any] = {} if hollow is None else hollow.state_dict(keep_vars=True)
        prefixes = tuple(f"{name}." for name in self.compressed)
        self.places: dict[str, list[str]] = {}
        self.unread: list[str] = []
        self._converted: set[str] = set()
        # What several tensors of the model are made of is found by the name of any of them.
        self._with: dict[str, str] = {}
        for name, (target, converted) in named.items():
            if name == ADVICE:
                continue
            if known is not None and target not in known and not name.startswith(prefixes):
                self.unread.append(name)
                continue
            self.places.setdefault(target, []).append(name)
            if converted:
                self._converted.add(target)
                self._with |= dict.fromkeys(_made_with(target, hollow), target)
        for other in self.places.keys() & self._with.keys():
            del self._with[other]

    def holds(self, target: str) -> bool:
        """Say whether a tensor of the model is stored under one name or several.

        Parameters
        ----------
        target : str
            The name of the tensor in the model.

        Returns
        -------
        bool
            Whether the files hold the tensor.
        """
        return target in self.places or target in self._with

    def read(self, target: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield one tensor of the model by its name there, and others that are made from the same stored ones.

        Parameters
        ----------
        target : str
            The name of the tensor in the model.

        Yields
        ------
        (str, Tensor)
            The name of a tensor in the model, and its values.
        """
        target = self._with.get(target, target)
        names = self.places[target]
        if target not in self._converted or self.hollow is None:
            yield target, self.weights.read(names[0])
            return
        read = {name: self.weights.read(name) for name in names}
        config = LoadStateDictConfig(
            device_map={"": torch.device("cpu")},
            dtype=next(iter(read.values())).dtype,
            dtype_plan={},
            weight_mapping=conversions(self.hollow),  # type: ignore[arg-type]
        )
        convert_and_load_state_dict_in_model(
            model=self.hollow, state_dict=read, load_config=config, disk_offload_index=None
        )
        for name, tensor in self.hollow.state_dict().items():
            if not tensor.is_meta:
                place, _, key = name.rpartition(".")
                setattr(self.hollow.get_submodule(place), key, self._empty[name])
                yield name, tensor


def _made_with(target: str, model: Any) -> list[str]:
    """Return the other tensors of a model that the same stored ones are split into as the one of this name."""
    known = model.state_dict()
    patterns = [entry.target_patterns for entry in conversions(model) if isinstance(entry, WeightConverter)]
    places = [target.replace(first, other, 1) for first, *others in patterns if first in target for other in others]
    return [place for place in places if place in known]


class _Pickles:
    """The weights of files that ``torch.load`` reads, tensors alone."""

    def __init__(self, files: list[Path]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                self.tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
            except (RuntimeError, ValueError, EOFError, OSError, TypeError) as error:
                raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch it again") from error

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]
