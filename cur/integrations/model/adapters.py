"""Adapters, as training by LoRA leaves them: what has one is merged before it is compressed."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

__all__ = ["refuse_adapter_directory", "refuse_adapters"]

_MERGE = (
    "merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR), "
    "and the tokenizer beside it"
)


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
        raise ValueError(f"`model` {source!r} is an adapter (it has an adapter_config.json), not a model; {_MERGE}")


def refuse_adapters(model: nn.Module) -> None:
    """Raise a ValueError if adapters are attached to a model: they would be factored as if they were its weights.

    Parameters
    ----------
    model : nn.Module
        The model to look through.

    Raises
    ------
    ValueError
        If an adapter is attached to a module.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(f"`model` has an adapter at {name or 'its root'} ({type(module).__name__}); {_MERGE}")
