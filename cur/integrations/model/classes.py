"""The class of a model: the one that a configuration names, and the Auto class that leads to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import (
    _BaseAutoModelClass,
    add_generation_mixin_to_remote_model,
)

__all__ = ["auto_class", "model_class"]

_AUTO = "AutoModel"


# What a class is best called by where several Auto classes lead to it.
_FIRST = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


_LAST = ("AutoModel", "AutoModelForPreTraining", "AutoModelForTextEncoding", "AutoModelForMultimodalLM", "AutoBackbone")


def model_class(config: Any, place: Path | str, *, trust_remote_code: bool = False) -> tuple[type[Any], Any]:
    """Return the class that the ``architectures`` of a configuration name, and the configuration it takes.

    Parameters
    ----------
    config : Any
        The configuration of the model.
    place : Path or str
        The directory, or the id on the hub, that remote code is loaded from.
    trust_remote_code : bool, default False
        Whether code of the checkpoint may be run.

    Raises
    ------
    ValueError
        If there is no such class in transformers, and none in the code that the checkpoint brings.
    """
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`architectures` in config.json must be a list of names of classes, got {names!r}")
    own = {key: value for key, value in (getattr(config, "auto_map", None) or {}).items() if key.startswith(_AUTO)}
    if own and trust_remote_code:
        return _own_class(own, names, config, place), config
    known = list(_known(config))
    kind = next((kind for name in names for _, kind in known if kind.__name__ == name), None)
    if kind is None and names:
        found = getattr(transformers, names[0], None)
        if (
            isinstance(found, type)
            and issubclass(found, PreTrainedModel)
            and found.config_class
            and _takes(found, config)
        ):
            kind = found
    if kind is None and not names:
        kind = next((kind for auto, kind in known if auto == "AutoModelForCausalLM"), None)
    if kind is None:
        said = f"names the class {', '.join(names)}" if names else "names no class (`architectures`)"
        hint = (
            "; its own code is run with `trust_remote_code=True` (--trust-remote-code)"
            if own
            else "; name the class that its weights are of"
        )
        raise ValueError(
            f"its config.json {said}, and transformers has none of that name for a model of type "
            f"{getattr(config, 'model_type', '')!r}{hint}"
        )
    text = config.get_text_config()
    return kind, text if not isinstance(config, _config_of(kind)) and isinstance(text, _config_of(kind)) else config


def auto_class(model: PreTrainedModel) -> str:
    """Return the name of the class in transformers that loads models such as this.

    Parameters
    ----------
    model : PreTrainedModel
        The model to find the class for.
    """
    kind = type(model)
    if own := getattr(kind, "_auto_class", None):
        return str(own)
    names = [auto for auto, found in _known(model.config) if found is kind]
    order = {name: place for place, name in enumerate(_FIRST)} | {name: 200 + i for i, name in enumerate(_LAST)}
    return min(names, key=lambda name: order.get(name, 100), default=kind.__name__)


def _own_class(own: Mapping[str, str], names: list[str], config: Any, place: Path | str) -> type[Any]:
    """Return a class from the checkpoint's own code, registered so that saving brings the code along."""
    ends = tuple(f".{name}" for name in names)
    order = [key for key, reference in own.items() if reference.endswith(ends)] if ends else []
    auto = (order or sorted(own, key=lambda key: key != "AutoModelForCausalLM"))[0]
    kind: Any = get_class_from_dynamic_module(own[auto], str(place))
    kind.register_for_auto_class(auto_class=auto)
    found: type[Any] = add_generation_mixin_to_remote_model(kind)
    return found


def _known(config: Any) -> Iterator[tuple[str, type[Any]]]:
    """Yield the classes that transformers has for a configuration, with the Auto classes that lead to them."""
    for name, auto in vars(modeling_auto).items():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        mapping: Any = auto._model_mapping
        if mapping is not None and type(config) in mapping:
            kinds = mapping[type(config)]
            yield from ((name, kind) for kind in (kinds if isinstance(kinds, list | tuple) else [kinds]))


def _config_of(kind: type[Any]) -> type[Any]:
    found: type[Any] = getattr(kind, "config_class", None) or object
    return found


def _takes(kind: type[Any], config: Any) -> bool:
    return isinstance(config, _config_of(kind)) or isinstance(config.get_text_config(), _config_of(kind))
