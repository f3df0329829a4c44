"""Saving a compressed model as an ordinary transformers checkpoint, and as a dense one.

``AutoModelForCausalLM.from_pretrained`` reads the directory in any process that has imported
``cur.integrations``, and fails in any other: the weights are in ``cur_model.safetensors``, a name only our
quantizer knows, and the file itself holds the guards of
:meth:`~cur.integrations.store.format.CURQuantizer.get_state_dict_and_metadata`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from cur._lib.atomic import replace_file
from cur.integrations.files.beside import PAGE, PLAN, REPORT, carry, is_as_stored
from cur.integrations.files.configuration import check_config, foreign_method
from cur.integrations.files.directory import check_target, new_directory
from cur.integrations.files.reading import ADVICE, CheckpointError
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.opening import stored_dtype
from cur.integrations.model.origin import origin_of
from cur.integrations.model.size import weight_bytes
from cur.integrations.model.source import source_of
from cur.integrations.model.stored_tensors import ModelFiles, has_weights, without_weights
from cur.integrations.model.taken_apart import TakenApart
from cur.integrations.nn import compressed_modules, swap_
from cur.integrations.store.account import compare, read_account, write_account
from cur.integrations.store.format import CURConfig, CURQuantizer, mark_, read_config
from cur.integrations.store.module import write_module

if TYPE_CHECKING:
    from cur.integrations.report.data import CompressionReport

__all__ = [
    "PAGE",
    "PLAN",
    "REPORT",
    "CURConfig",
    "CURQuantizer",
    "CheckpointError",
    "check_target",
    "dense_export",
    "mark_",
    "read_config",
    "save",
]

WEIGHTS = "cur_model.safetensors"

# What transformers writes by default; our names replace the stem.
_DEFAULT_STEM = "model"
_INDEX = ".safetensors.index.json"


def save(
    model: nn.Module,
    tokenizer: Any = None,
    directory: str | os.PathLike[str] | None = None,
    *,
    report: CompressionReport | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    weights: Callable[[Path], CompressionReport | None] | None = None,
    source: str | os.PathLike[str] | None = None,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write a compressed model, whole or not at all, with all that belongs to it in the directory it came from.

    Files that are no weights are copied from there, and so are tensors that transformers does not load.
    ``account.json`` says what is the same as there, and has the hashes of the weight files.

    A module that is not one of transformers' own is written in the same format, and read by
    :func:`~cur.integrations.load_into`: ``save(module, directory)``.

    Parameters
    ----------
    model : nn.Module
        A model with compressed layers.
    tokenizer : PreTrainedTokenizerBase or None
        The tokenizer, which is saved beside the model. One that is as it was loaded leaves its files to be copied. May
        be left out where the directory is given alone.
    directory : path
        The directory to create.
    report : CompressionReport, optional
        The report, written as ``report.json``, its plan as ``plan.json``, its figures into the model card, and, where
        matplotlib is installed, its pictures as ``report.html``.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced; it stays until the new one is complete.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file, in bytes or with a unit.
    weights : callable, optional
        Called with a directory to write the weight files into it, for a model whose weights are not in memory; may
        return the report with what was found out on the way.
    source : path, optional
        The directory that the model came from. Default: what it was loaded from; without one nothing is copied.
    beside : callable, optional
        Called with the directory, when all else is in it, to write more files.

    Returns
    -------
    Path
        The absolute path of the directory.

    Raises
    ------
    TypeError
        If no directory is given, or the state of a module holds something else than tensors.
    ValueError
        If the model has no compressed layers, or an adapter that is not merged.
    CheckpointError
        If a tensor that the model has is missing in what was written, or the directory it came from is damaged.
    FileExistsError
        If the directory exists, is not empty, and `overwrite` is False.
    OSError
        If the disk is full or cannot be written.
    """
    refuse_adapters(model)
    if directory is None:
        tokenizer, directory = None, tokenizer
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"`directory` must be a path, got {type(directory).__name__}; name the directory to create")
    if not compressed_modules(model):
        raise ValueError(
            "`model` has no compressed layers; compress it first, or use model.save_pretrained"
            + ("" if isinstance(model, PreTrainedModel) else ", or torch.save for a module that has no such method")
        )
    mark_(model)
    with new_directory(directory, overwrite=overwrite) as scratch:
        if not isinstance(model, PreTrainedModel):
            write_module(model, scratch, max_shard_size=max_shard_size)
        elif weights is None:
            # In-memory names: the shapes checked on loading are looked up under the names in `config.json`.
            model.save_pretrained(scratch, max_shard_size=max_shard_size, save_original_format=False)
        else:
            _save_without_weights(model, scratch)
            report = weights(scratch) or report
        kept = origin_of(model).kept if report is None else ""  # which has it
        _complete(model, tokenizer, scratch, _source(model, source), max_shard_size, compressed=True, kept=kept)
        if report is not None:
            report = replace(report, after=replace(report.after, file_bytes=weight_bytes(scratch)))
        describe(model, scratch, report)
        if beside is not None:
            beside(scratch)
    return Path(directory).expanduser().absolute()


def _source(model: nn.Module, given: str | os.PathLike[str] | None) -> Path | None:
    return source_of(model) if given is None else Path(given).expanduser().absolute()


def _complete(
    model: Any,
    tokenizer: Any,
    scratch: Path,
    source: Path | None,
    max_shard_size: int | str,
    *,
    compressed: bool,
    kept: str = "",
) -> None:
    """Put beside weights of the default names whatever else belongs to a checkpoint, and account for all of it."""
    from cur.integrations.files.tensor_file import add_tensors

    # What another quantizer stored are not the parameters of the model, to be compared or copied.
    stored_here = source is not None and has_weights(source) and foreign_method(check_config(source)) is None
    if source is not None and stored_here:
        files = ModelFiles(source, without_weights(source, type(model)))
        if files.unread:
            stored, written = stored_dtype(source), model.dtype
            add_tensors(scratch, files.unread, files.weights, max_shard_size, dtypes={stored: written})
    if compressed:
        _rename_weights(scratch)
    if tokenizer is not None and (source is None or not is_as_stored(tokenizer, source)):
        tokenizer.save_pretrained(scratch)
    account = None
    if source is not None:
        carry(source, scratch, history=compressed)
    if source is not None and stored_here:
        account = compare(scratch, source, kind=type(model))
        lost = sorted(set(account.missing) & model.state_dict().keys())
        if lost:
            raise CheckpointError(
                f"{lost[0]}{f' and {len(lost) - 1} more tensors' if len(lost) > 1 else ''} of {source} would be "
                "missing in what was written, so nothing is; load the model again, by the class that its "
                "configuration names"
            )
    write_account(scratch, account, kept=kept)


def describe(model: nn.Module, directory: Path, report: CompressionReport | None) -> None:
    """Write what is said beside the weights: plan, report, page and model card, each whole or not at all."""
    from cur.integrations.report.card import model_card
    from cur.integrations.report.page import can_draw, report_page

    if report is not None:
        account = read_account(directory)
        report = replace(report, account={} if account is None else account.to_dict())
        report.plan.save(directory / PLAN)
        report.save(directory / REPORT)
        if can_draw():
            _write(directory / PAGE, report_page(report))
    _write(directory / "README.md", model_card(model, report))


def _write(path: Path, text: str) -> None:
    with replace_file(path) as stream:
        stream.write(text.encode())


def dense_export(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a plain checkpoint, every compressed layer multiplied out, that loads without this package.

    The compressed model itself is unchanged. The parameters are those of :func:`save`.

    Parameters
    ----------
    model : PreTrainedModel
        The compressed model, which is not changed.
    tokenizer : Any
        The tokenizer, which is saved beside the model; None saves none.
    directory : path
        The directory to create.
    overwrite : bool, default False
        Whether a directory that exists may be replaced.
    max_shard_size : int or str, default "5GB"
        The largest size of one file, in bytes or as text such as ``"5GB"``.
    source : path, optional
        The directory of the dense model, whose other files are carried over.

    Returns
    -------
    Path
        The directory that was created.

    Raises
    ------
    TypeError
        If the model is not one of transformers' own.
    ValueError
        If the model has an adapter that is not merged.
    """
    refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be one of transformers' own, got {type(model).__name__}; of another module put "
            "`layer.to_dense()` in the place of each of its compressed layers, and store its state by `torch.save`"
        )
    with new_directory(directory, overwrite=overwrite) as scratch, _multiplied_out(model):
        model.save_pretrained(scratch, max_shard_size=max_shard_size)
        _complete(model, tokenizer, scratch, _source(model, source), max_shard_size, compressed=False)
    return Path(directory).expanduser().absolute()


@contextmanager
def _multiplied_out(model: PreTrainedModel) -> Iterator[None]:
    """Hold dense layers in the place of the compressed ones for a while; the rest of the model is shared."""
    layers = compressed_modules(model)
    if not layers:
        yield
        return
    mark_(model)
    tied = dict(model.all_tied_weights_keys)
    apart = {name: module for name, module in model.named_modules() if isinstance(module, TakenApart)}
    model.dequantize(dtype=model.dtype)
    try:
        yield
    finally:
        swap_(model, apart)
        swap_(model, layers)
        model.all_tied_weights_keys = tied
        mark_(model)


def _save_without_weights(model: Any, directory: Path) -> None:
    """Let transformers write everything but weights."""
    quantizer, model.hf_quantizer = model.hf_quantizer, None  # it would name the weights
    try:
        model.save_pretrained(directory, state_dict={})
    finally:
        model.hf_quantizer = quantizer


def _rename_weights(directory: Path) -> None:
    """Give the weight files the name that only our quantizer looks for; `config.json` tells it."""
    ours = WEIGHTS.removesuffix(".safetensors")

    def renamed(name: str) -> str:
        return ours + name.removeprefix(_DEFAULT_STEM)

    index = directory / (_DEFAULT_STEM + _INDEX)
    weights = renamed(index.name) if index.exists() else WEIGHTS
    if index.exists():
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = {key: renamed(name) for key, name in data["weight_map"].items()}
        (directory / weights).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        index.unlink()
    for file in directory.glob(f"{_DEFAULT_STEM}*.safetensors"):
        file.rename(directory / renamed(file.name))
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["weights"] = weights
    if "model_type" in config:
        # Whoever reads this file without our quantizer, which names another, is told what to do.
        config["transformers_weights"] = ADVICE
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
