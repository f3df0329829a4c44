"""Opening a checkpoint: the class that it names, in the dtype it is stored in, with every tensor accounted for."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from cur.integrations.files.configuration import check_config, check_words, foreign_method
from cur.integrations.files.hashes import check_hashes
from cur.integrations.files.shards import Shards
from cur.integrations.model.adapters import refuse_adapter_directory
from cur.integrations.model.classes import model_class
from cur.integrations.model.stored_tensors import empty_model, names_in_model, names_safetensors

__all__ = ["Opened", "open_checkpoint", "quiet", "stored_dtype"]


# Buffers that older versions of transformers stored, and that every model computes itself.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|attn\.masked_bias)$")

_NAMED = 5


class Opened(NamedTuple):
    """A model in evaluation mode, its tokenizer or None, and the names of stored tensors that are no part of it."""

    model: PreTrainedModel
    tokenizer: Any
    unread: tuple[str, ...]


def open_checkpoint(
    place: Path | str,
    source: str,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    gguf: str | None = None,
    hollow: bool = False,
    trust_remote_code: bool = False,
) -> Opened:
    """Load the model that a checkpoint holds, as the class that its ``config.json`` names.

    Parameters
    ----------
    place : Path or str
        A directory in the format of transformers, or a hub id.
    source : str
        The name that errors, the model and the tokenizer use for the checkpoint.
    dtype : torch.dtype or "auto", default "auto"
        The dtype of the weights in memory; "auto" is the one they are stored in, float32 of a GGUF file.
    device_map : optional
        Where ``from_pretrained`` puts the parts of the model; passed on as it is.
    gguf : str, optional
        Name of a GGUF file in the directory.
    hollow : bool, default False
        Whether transformers is given names, shapes and dtypes of the stored tensors alone, so that the model is on the
        meta device; given the files, it would map all of them into the address space at once.
    trust_remote_code : bool, default False
        Whether code that the checkpoint brings is run.

    Returns
    -------
    Opened

    Raises
    ------
    ValueError
        If it is an adapter, names no class that can be loaded, lacks weights of that class or stores them in other
        shapes, or cannot be read.
    """
    refuse_adapter_directory(place, source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _loading(source):
        stored = None
        if gguf is None and Path(place).is_dir():
            check_hashes(place)
            check_words(place)
            _refuse_method(foreign_method(check_config(place)), hollow)
            stored = _Stored(place)
        if gguf is not None:
            options["gguf_file"] = gguf
            dtype = torch.float32 if dtype == "auto" else dtype
            tokenizer = AutoTokenizer.from_pretrained(str(place), **options)
            kind: Any = AutoModelForCausalLM
        else:
            config = AutoConfig.from_pretrained(str(place), **options)
            kind, config = model_class(config, place, trust_remote_code=trust_remote_code)
            tokenizer = _tokenizer(kind, config, place, options)
            options["config"] = config
            if dtype == "auto" and stored is not None:
                dtype = stored.dtype()
    if stored is not None and foreign_method(check_config(place)) is None:  # others may pack their tensors
        _compare(kind, options["config"], stored, source)
    with _loading(source):
        if hollow and stored is not None:
            model, info = _hollow(kind, place, stored, dtype, **options)
        else:
            # Mismatched weights are refused here, by name; transformers shows them in a table that commands silence.
            model, info = kind.from_pretrained(
                str(place),
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    _check(info, source, type(model).__name__)
    unread = () if gguf is not None else _unread(model, info, stored)
    model.config._name_or_path = model.name_or_path = source
    if tokenizer is not None:
        tokenizer.name_or_path = source
    return Opened(model.eval(), tokenizer, unread)


def _tokenizer(kind: Any, config: Any, place: Path | str, options: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a model, None of one that reads images or sound and has none."""
    try:
        return AutoTokenizer.from_pretrained(str(place), **options)
    except Exception:  # transformers raises what it likes where there is none
        if getattr(kind, "main_input_name", "input_ids") == "input_ids" and not _hears(kind, config):
            raise
        return None


def _hears(kind: Any, config: Any) -> bool:
    """Say whether an encoder takes sound, and may be given text instead, as that of Pop2Piano."""
    sound = {"input_features", "input_values"} & set(inspect.signature(kind.forward).parameters)
    return bool(sound) and bool(getattr(config, "is_encoder_decoder", False))


def stored_dtype(directory: Path | str) -> torch.dtype:
    """Return the dtype in which a directory stores its weights, float32 if neither weights nor configuration say.

    Parameters
    ----------
    directory : Path or str
        The directory of a model.
    """
    found = _Stored(directory).dtype()
    if isinstance(found, torch.dtype):
        return found
    said = getattr(AutoConfig.from_pretrained(str(directory)), "dtype", None)
    return said if isinstance(said, torch.dtype) else torch.float32


class _Stored:
    """Headers of the safetensors files of a directory, or nothing if it has none."""

    def __init__(self, directory: Path | str) -> None:
        place = Path(directory)
        self.tensors: Mapping[str, Any] = Shards(place, one_dtype=False).tensors if names_safetensors(place) else {}

    def dtype(self) -> torch.dtype | str:
        """Return the dtype of most parameters, "auto" where that is none to compute in."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
        plain = {dtype: count for dtype, count in counts.items() if dtype.is_floating_point}
        most = max(plain, key=plain.__getitem__, default=None)
        return "auto" if most is None or most.itemsize < 2 else most


def _refuse_method(method: str | None, hollow: bool) -> None:
    """Refuse weights in the format of a quantizer where it would not be undone.

    What it stored are not the parameters of the model.
    """
    if method is not None and method not in AUTO_QUANTIZER_MAPPING:
        raise ValueError(f"its weights are quantized by {method!r}, which transformers does not know; take them dense")
    if method is not None and hollow:
        raise ValueError(
            f"its weights are quantized by {method!r}, which is not undone block by block; read it in memory "
            "(--in-memory), or take it dense"
        )


def _compare(kind: type[Any], config: Any, stored: _Stored, source: str) -> None:
    """Refuse sizes that the stored tensors do not have before memory is taken for them."""
    model = empty_model(kind, config)
    if model is None:
        return
    known = model.state_dict()
    expected = {
        name: tuple(known[target].shape)
        for name, (target, converted) in names_in_model(model, stored.tensors).items()
        if target in known and not converted
    }
    shapes = {name: tuple(stored.tensors[name].shape) for name in expected}
    mismatched = {(name, shapes[name], shape) for name, shape in expected.items() if shapes[name] not in (shape, (0,))}
    _check({"mismatched_keys": mismatched}, source, kind.__name__)


def _hollow(kind: Any, place: Path | str, stored: _Stored, dtype: torch.dtype | str, **options: Any) -> Any:
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in stored.tensors.items()
    }
    try:
        generation = GenerationConfig.from_pretrained(str(place))
    except OSError:  # not every checkpoint has one
        generation = None
    if dtype == "auto":
        dtype = getattr(options["config"], "dtype", None) or torch.float32
    return kind.from_pretrained(
        None,
        state_dict=empty,
        device_map="meta",
        dtype=dtype,
        generation_config=generation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )


def _check(info: Mapping[str, Collection[Any]], source: str, kind: str) -> None:
    """Refuse weights that would be random numbers: transformers fills them in and goes on."""
    if missing := sorted(info.get("missing_keys", ())):
        raise ValueError(
            f"`model` {source!r} lacks weights of a {kind}, which would be random numbers: {_list(missing)}; it is "
            f"incomplete, names its tensors otherwise{_instead(info)}, or its config.json names another class"
        )
    if mismatched := sorted(info.get("mismatched_keys", ())):
        name, stored, expected = mismatched[0]
        more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        raise ValueError(
            f"`model` {source!r} stores {name} with shape {tuple(stored)}, its config.json asks for {tuple(expected)}"
            f"{more}; configuration and weights do not belong together"
        )


def _instead(info: Mapping[str, Collection[Any]]) -> str:
    found = sorted(info.get("unexpected_keys", ()))
    return f" ({found[0]}, for instance)" if found else ""


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _unread(model: Any, info: Mapping[str, Collection[Any]], stored: _Stored | None) -> tuple[str, ...]:
    """Name the stored tensors that are no part of the model.

    transformers keeps some of them out of its own report, by patterns of the class.
    """
    found = set(info.get("unexpected_keys", ()))
    if stored is not None:
        known = model.state_dict()
        targets = {name for name, (target, _) in names_in_model(model, stored.tensors).items() if target in known}
        empty = {name for name, tensor in stored.tensors.items() if tuple(tensor.shape) == (0,)}
        found |= stored.tensors.keys() - targets - empty
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    computed = buffers | {name.removeprefix(prefix) for name in buffers}
    return tuple(sorted(name for name in found if name not in computed and not _COMPUTED.search(name)))


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Turn whatever loading raises into one sentence, and keep what foreign code prints off standard output."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # the code of transformers, and that of the checkpoint, raise what they like
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"  # of a KeyError the key alone says nothing
        if "trust_remote_code" in reason and "--trust-remote-code" not in reason:
            reason += " (on the command line --trust-remote-code)"
        raise ValueError(f"`model` {source!r} cannot be loaded: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of files that load in seconds off the terminal; warnings still show."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    captured = StringIO()
    try:
        # The bar of GGUF files is a plain tqdm that no setting turns off.
        with redirect_stderr(captured):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
        for line in re.split(r"[\r\n]+", captured.getvalue()):
            if line.strip() and re.search(r"\d+%\|.*\|", line) is None:
                print(line, file=sys.stderr)
