"""Adapters, as training by LoRA leaves them: PEFT learns of compressed layers, and what has one is merged first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from cur._lib.errors import warn
from cur._lib.imports import when_imported
from cur.integrations.files.configuration import MERGE

__all__ = ["is_adapter", "refuse_adapter_directory", "refuse_adapters"]


def refuse_adapter_directory(place: Path | str, source: str) -> None:
    """Raise a ValueError if a directory, or a model of the hub, is an adapter and not a model.

    Parameters
    ----------
    place : Path or str
        The directory, or the id on the hub.
    source : str
        The name that errors use for the model.

    Raises
    ------
    ValueError
        If it holds an adapter and not a model.
    """
    try:
        found = find_adapter_config_file(str(place))
    except OSError:  # the hub does not answer: loading says so
        return
    if found is not None:
        raise ValueError(f"`model` {source!r} is an adapter (it has an adapter_config.json), not a model; {MERGE}")


def refuse_adapters(model: nn.Module, parameter: str = "model") -> None:
    """Raise a ValueError if adapters are attached to a model: they would be factored as if they were its weights.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    parameter : str, default "model"
        What errors call it.

    Raises
    ------
    ValueError
        If an adapter is attached to a module.
    """
    for name, module in model.named_modules():
        names: Any = getattr(module, "active_adapters", ()) if is_adapter(module) else None
        if names is not None:
            which = ", ".join(map(repr, names)) if isinstance(names, list) and names else "an adapter"
            raise ValueError(
                f"`{parameter}` carries the adapter {which} at {name or 'its root'} ({type(module).__name__}); merge "
                "it first, `model = peft_model.merge_and_unload()`, and give what that returns"
            )


def is_adapter(module: nn.Module) -> bool:
    """Say whether a module is one of PEFT's: what holds a model and its adapters, or a layer with adapters beside it.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether it is.
    """
    # By its classes, as ours around compressed layers descend from theirs, and PEFT need not be installed.
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _register() -> None:
    try:
        from cur.integrations.model.lora import register
    except (ImportError, AttributeError) as error:
        warn(
            f"this version of peft is not known ({error}): it puts adapters on factors of compressed layers, by names "
            "such as 'R', but not around whole layers",
            UserWarning,
        )
    else:
        register()


# `target_modules=["q_proj"]` has to work without another call, whichever of the two packages is imported first.
when_imported("peft", _register)
