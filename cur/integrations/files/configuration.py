"""What lies in a directory of a model, read so that whatever is wrong with it is one sentence.

Nothing is built here: fields of ``config.json`` are checked for their types, and compared with the headers of the
weights, before a model of the sizes that it asks for is made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cur.integrations.files.header import header_of
from cur.integrations.files.reading import CONFIG, CheckpointError, read_object

__all__ = ["MERGE", "check_config", "check_words", "foreign_method", "weights_name"]

MERGE = (
    "merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR), "
    "and the tokenizer beside it"
)
"""What to do with the directory of an adapter."""

_ADAPTER = "adapter_config.json"

# Fields that say how many blocks a model has, and how many experts each of them.
_COUNTS = re.compile(
    r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|depth|"
    r"(num|n)_(local_|routed_|shared_)?experts"
)

_FEW = 256

_WORDS_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)

_TYPES: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "auto_map": (dict,),
    "model_type": (str,),
    "quantization_config": (dict,),
    "transformers_weights": (str,),
}

_WORDS = {dict: "an object", list: "a list", str: "a text", int: "an integer"}


def check_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the configuration of a model, and refuse one that cannot be that of the weights beside it.

    Parameters
    ----------
    directory : path
        The directory of a model.

    Returns
    -------
    dict
        The configuration, as JSON types.

    Raises
    ------
    CheckpointError
        If there is none, a field is of another type than it has everywhere, or more blocks or experts are asked for
        than the weight files have tensors.
    """
    path = Path(directory) / CONFIG
    try:
        config = read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        if (Path(directory) / _ADAPTER).is_file():
            raise CheckpointError(f"{directory} is an adapter (it has an {_ADAPTER}), not a model; {MERGE}") from None
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {CONFIG}") from None
    for name, types in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, types):
            raise CheckpointError(
                f"{path} is damaged: `{name}` must be {_WORDS[types[0]]}, got {_kind(value)}; fetch it again"
            )
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and not (isinstance(value, str) and _dtype(value)) and not isinstance(value, dict):
            raise CheckpointError(
                f"{path} is damaged: `{name}` must name a floating dtype such as bfloat16, got {value!r}; "
                "fetch it again"
            )
    _check_ours(path, config.get("quantization_config") or {})
    _check_counts(path, config)
    return config


def check_words(directory: str | os.PathLike[str]) -> None:
    """Refuse a tokenizer, or defaults of generation, in files that are damaged, by the name of the file.

    Parameters
    ----------
    directory : path
        The directory of a model.

    Raises
    ------
    CheckpointError
        If one of them is no JSON object.
    """
    for name in _WORDS_FILES:
        path = Path(directory) / name
        if path.exists():
            read_object(path)


def weights_name(config: Mapping[str, Any]) -> str:
    """Return how a checkpoint calls its weight file, or the index of several.

    Parameters
    ----------
    config : mapping
        The configuration of the checkpoint.
    """
    described = config.get("quantization_config") or {}
    own = None if described.get("quant_method") == "cur" else config.get("transformers_weights")
    return str(described.get("weights") or own or "model.safetensors")


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """Return the name of the quantizer, other than ours, in whose format a checkpoint is stored; None if dense.

    Parameters
    ----------
    config : mapping
        The configuration of the checkpoint.
    """
    method = (config.get("quantization_config") or {}).get("quant_method")
    return None if method in (None, "cur") else str(method)


def _check_ours(path: Path, described: Mapping[str, Any]) -> None:
    if described.get("quant_method") != "cur":
        return
    modules, weights = described.get("modules"), described.get("weights")
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError(
            f"{path} does not list the compressed modules: `modules` of `quantization_config` must be an object with "
            f"at least one, got {_kind(modules)}; fetch it again"
        )
    if weights is not None and (not isinstance(weights, str) or Path(weights).name != weights):
        raise CheckpointError(
            f"{path} is damaged: `weights` of `quantization_config` must name a file beside it, got {weights!r}; "
            "fetch it again"
        )


def _check_counts(path: Path, config: Mapping[str, Any]) -> None:
    counts = dict(_counts(config))
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, list)) or (isinstance(value, int) and value < 0):
            raise CheckpointError(
                f"{path} is damaged: `{name}` must be an integer from 0 on, got {value!r}; fetch it again"
            )
    numbers = {name: value for name, value in counts.items() if isinstance(value, int)}
    # So many are built in a moment, and blocks that share their weights have fewer tensors.
    if max(numbers.values(), default=0) <= _FEW:
        return
    files = sorted(path.parent.glob("*.safetensors"))
    stored = sum(len(_names(file)) for file in files)
    for name, value in numbers.items():
        if files and value > max(_FEW, stored):
            raise CheckpointError(
                f"{path} asks for {value:,} in `{name}`, but the weight files beside it hold {stored:,} tensors: "
                "configuration and weights do not belong together; fetch both again"
            )


def _counts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _counts(value, f"{prefix}{name}.")
        elif _COUNTS.fullmatch(name) and value is not None:
            yield f"{prefix}{name}", value


def _names(file: Path) -> list[str]:
    return [name for name in header_of(file)[0] if name != "__metadata__"]


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _kind(value: Any) -> str:
    return f"{_WORDS.get(type(value), type(value).__name__)} ({json.dumps(value)[:40]})"
