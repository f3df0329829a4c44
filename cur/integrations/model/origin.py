"""Where a model in memory came from, and what is left of it: so that another is not taken for its dense model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cur.integrations.model.taken_apart import TakenApart
from cur.integrations.nn import compressed_modules

__all__ = ["KeptDigest", "Origin", "changed_modules", "kept_digest", "kept_names", "origin_of", "set_origin_"]

_MARK = "_cur_origin"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a model was loaded from.

    Attributes
    ----------
    source : str
        Absolute path of a directory or GGUF file, or a hub id; empty if it is not known.
    unread : tuple of str
        Names of tensors in its files that are no part of the model.
    kept : str
        The hash of the tensors of a compressed model that compression left as they were; empty if it is not known.
    """

    source: str = ""
    unread: tuple[str, ...] = ()
    kept: str = ""


def set_origin_(model: nn.Module, origin: Origin) -> None:
    """Remember where a model came from; copies of it remember that, too.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.
    origin : Origin
        The place that it came from.
    """
    setattr(model, _MARK, origin)


def origin_of(model: nn.Module) -> Origin:
    """Return what is known of where a model came from; of one that transformers loaded, the path or the id.

    Parameters
    ----------
    model : nn.Module
        The model to ask about.
    """
    found: Origin | None = getattr(model, _MARK, None)
    if found is not None:
        return found
    name = str(getattr(model, "name_or_path", "") or "")
    return Origin(source=str(Path(name).absolute()) if name and Path(name).exists() else name)


class KeptDigest:
    """A hash over named tensors that come in any order.

    They are hashed in bfloat16, so that the hash is the same in whichever dtype the model was loaded.
    """

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor into account.

        Parameters
        ----------
        name : str
            The name of the tensor.
        tensor : Tensor
            The values of the tensor.
        """
        plain = tensor.detach()
        if plain.is_floating_point():
            plain = plain.to(torch.bfloat16)
        data = plain.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.blake2b(f"{tuple(plain.shape)}".encode(), digest_size=32)
        digest.update(data.data)
        self._parts[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        """Return the hash of all of them."""
        whole = hashlib.blake2b(digest_size=32)
        for name, part in sorted(self._parts.items()):
            whole.update(f"{name} {part}\n".encode())
        return whole.hexdigest()


def kept_names(model: nn.Module, without: Iterable[str]) -> list[str]:
    """Name the parameters of a model that are not inside these modules; one that has several names once.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    without : iterable of str
        The names of the modules to leave out.

    Returns
    -------
    list of str
        The names of the parameters.
    """
    inside = tuple(f"{name}." for name in without)
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def changed_modules(model: nn.Module) -> Collection[str]:
    """Name the modules of a compressed model that hold other parameters than those of the dense one.

    Parameters
    ----------
    model : nn.Module
        The compressed model to look through.

    Returns
    -------
    collection of str
        The names of the modules.
    """
    apart = {name for name, part in model.named_modules() if isinstance(part, TakenApart)}
    return apart | compressed_modules(model).keys()


def kept_digest(model: nn.Module, without: Collection[str]) -> str:
    """Return the hash of all parameters of a model in memory but those inside these modules.

    Empty for a model of which parts are offloaded: nothing is known of those.

    Parameters
    ----------
    model : nn.Module
        The model to hash, which is in memory.
    without : collection of str
        The names of the modules to leave out.
    """
    digest = KeptDigest()
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in kept_names(model, without):
        if parameters[name].is_meta:
            return ""
        digest.add(name, parameters[name])
    return digest.hexdigest()
