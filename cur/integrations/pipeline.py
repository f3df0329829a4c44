"""One call from a model to a compressed checkpoint, or to a plan: what the commands do, for Python.

The model is opened in memory if it fits, and block by block otherwise; the rest is
:func:`~cur.integrations.compress.compress_to`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cur.integrations.blockwise.distributed import ProcessGroup
from cur.integrations.blockwise.memory import fits
from cur.integrations.blockwise.run import compress_blockwise
from cur.integrations.blockwise.score import compare_blockwise, perplexity_blockwise, reference_blockwise
from cur.integrations.blockwise.streamed_model import StreamedModel, load_streamed
from cur.integrations.compress import compress_to, planned
from cur.integrations.files.directory import check_target
from cur.integrations.files.header import ShardError
from cur.integrations.files.shards import Shards
from cur.integrations.measure.text import embedded_text, read_text, token_windows, windows_left
from cur.integrations.model.adapters import refuse_adapter_directory
from cur.integrations.model.limits import check_windows, positions
from cur.integrations.model.loading import DEFAULT_MODEL, LoadedModel, load_model
from cur.integrations.model.origin import origin_of
from cur.integrations.model.precision import Precision, check
from cur.integrations.model.running import Progress
from cur.integrations.plan.config import Asked, BudgetConfig, CompressConfig
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport
from cur.integrations.report.divergence import Divergence, Reference, check_vocabulary
from cur.integrations.report.endings import output_head
from cur.integrations.report.perplexity import Perplexity, perplexity
from cur.integrations.sources import InMemory, StageProgress, as_batches, busy, silent

__all__ = [
    "HeldOut",
    "Text",
    "block_by_block",
    "compress_model",
    "evaluate_model",
    "place",
    "plan_model",
    "reference_windows",
    "unread_remark",
]

Given: TypeAlias = "str | Path | PreTrainedModel | LoadedModel | None"
"""A model: a directory, a ``.gguf`` file or a hub id, or one in memory; None is the embedded one."""

Text: TypeAlias = (
    "str | Path | Tensor | Iterable[Mapping[str, Tensor]] | Callable[[PreTrainedTokenizerBase], list[Any]] | None"
)
"""What a model is measured on: a file, windows of tokens, batches, or a function that makes batches by its tokenizer.
None is one half of the Python language reference."""

HeldOut: TypeAlias = "Tensor | Callable[[PreTrainedModel, PreTrainedTokenizerBase], Tensor] | None"
"""Windows of tokens to compare models on, or a function that makes them by a model and its tokenizer."""

_WINDOWS, _LENGTH = 64, 512
_TOLD = 5


def compress_model(
    model: str | Path | PreTrainedModel | LoadedModel | None,
    out: str | os.PathLike[str],
    config: Asked | None = None,
    *,
    text: Text = None,
    held_out: HeldOut = None,
    statistics: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    low_memory: bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: StageProgress | None = None,
    announce: Callable[[str], object] | None = None,
) -> CompressionReport:
    """Compress a model into a checkpoint that transformers loads.

    Parameters
    ----------
    model : str, Path, PreTrainedModel, LoadedModel or None
        A directory, a ``.gguf`` file or a hub id, as for :func:`~cur.integrations.load_model`; or a model in memory,
        which is changed.
    out : path
        The path of the directory to create.
    config : CompressConfig, BudgetConfig or Plan, optional
        How to compress, or the plan to follow; the setting of the paper by default.
    text : optional
        The text to measure the model on, see :data:`Text`.
    held_out : optional
        The text to compare the compressed model with the dense one on, see :data:`HeldOut`. By default they are not
        compared; for a tolerance on the end of the text, which is not calibrated on, or the rest of the embedded one.
    statistics : path, optional
        File of statistics: used in the place of the text if it is there, written otherwise.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory, which is saved beside it.
    dtype : torch.dtype or "auto", default "auto"
        The dtype of the weights in memory and in the checkpoint; "auto" is the one they are stored in.
    precision : str, default "auto"
        The precision of matrix products in passes over text; see :class:`~cur.integrations.model.precision.Precision`.
    device : str, default "cpu"
        The device that the model runs on.
    low_memory : bool, optional
        Whether the model passes through memory block by block, with the same result. Default: if it does not fit.
    trust_remote_code : bool, default False
        Whether code that the checkpoint brings is run.
    overwrite : bool, default False
        Whether a directory that is not empty may be replaced.
    max_shard_size : int or str, default "5GB"
        Largest size of one weight file.
    progress : callable, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`; ``load`` and ``save``
        are stages without steps.
    announce : callable, optional
        Called with sentences on what was decided, such as the precision, and tensors that the model does not use.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        If the model cannot be read or the configuration does not fit it; before any forward pass.
    FileExistsError
        If the directory exists, is not empty, and `overwrite` is False.
    OSError
        If the disk is full or cannot be written.

    Examples
    --------
    >>> from cur.integrations import BudgetConfig, compress_model
    >>> report = compress_model("my-model", "small", BudgetConfig(keep=0.8), text="notes.txt")  # doctest: +SKIP
    """
    target = check_target(out, overwrite=overwrite, needed=model if isinstance(model, (str, Path)) else None)
    check(precision)
    asked = CompressConfig() if config is None else config
    file = None if statistics is None else Path(statistics).expanduser().absolute()
    where = place(device)
    tell = announce or silent
    if not isinstance(model, (PreTrainedModel, tuple)) and block_by_block(model, low_memory, dtype):
        streamed = load_streamed(str(model), dtype=dtype, device=where, trust_remote_code=trust_remote_code)
        leads = ProcessGroup().leads
        if leads:
            _tell_unread(streamed.model, tell)
        return compress_blockwise(
            streamed,
            _batches(text, streamed.tokenizer, asked),
            target,
            asked,
            statistics=file,
            held_out=_windows(_judges(held_out, text, asked), streamed.model, streamed.tokenizer),
            precision=precision,
            announce=tell,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            progress=progress if leads else None,
        )
    with busy(progress, "load"):
        loaded = _loaded(model, tokenizer, dtype=dtype, device_map=where, trust_remote_code=trust_remote_code)
        judged = _windows(_judges(held_out, text, asked), loaded.model, loaded.tokenizer)
        source = _in_memory(loaded, asked, text, file, precision, progress, tell)
    return compress_to(source, asked, target, held_out=judged, overwrite=overwrite, max_shard_size=max_shard_size)


def plan_model(
    model: str | Path | PreTrainedModel | LoadedModel | None,
    config: Asked | None = None,
    *,
    text: Text = None,
    statistics: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
    announce: Callable[[str], object] | None = None,
) -> Plan:
    """Decide which layers of a model would be replaced, and how; the parameters are those of :func:`compress_model`.

    Parameters
    ----------
    model : path or PreTrainedModel or LoadedModel or None
        A directory, a hub id or a model in memory, as for :func:`compress_model`.
    config : Asked, optional
        How to plan; the setting of the paper by default.
    text : Text, optional
        The text to measure the model on, see :data:`Text`.
    statistics : path, optional
        A file of statistics: read if it exists, else written.
    dtype : torch.dtype or str, default "auto"
        The dtype of the weights in memory; "auto" is the one they are stored in.
    precision : str, default "auto"
        The precision of matrix products in passes over text.
    trust_remote_code : bool, default False
        Whether code of the checkpoint may be run.
    progress : StageProgress, optional
        Called with a stage and its progress, see :data:`~cur.integrations.sources.StageProgress`.
    announce : callable, optional
        Called with sentences on what was decided, such as the precision.

    Returns
    -------
    Plan
        The plan, which nothing has been changed by.
    """
    check(precision)
    asked = CompressConfig() if config is None else config
    file = None if statistics is None else Path(statistics).expanduser().absolute()
    with busy(progress, "load"):
        loaded = _loaded(model, None, dtype=dtype, trust_remote_code=trust_remote_code)
        source = _in_memory(loaded, asked, text, file, precision, progress, announce or silent)
    return planned(source, asked)[1]


@overload
def evaluate_model(
    model: Given,
    text: Callable[[PreTrainedTokenizerBase], Tensor] | Tensor,
    *,
    against: None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    low_memory: bool | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
    announce: Callable[[str], object] | None = None,
) -> Perplexity: ...
@overload
def evaluate_model(
    model: Given,
    text: Callable[[PreTrainedTokenizerBase], Tensor] | Tensor,
    *,
    against: str | Path | PreTrainedModel | LoadedModel,
    batch_size: int = 1,
    dtype: torch.dtype | str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    low_memory: bool | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
    announce: Callable[[str], object] | None = None,
) -> Divergence: ...
def evaluate_model(
    model: Given,
    text: Callable[[PreTrainedTokenizerBase], Tensor] | Tensor,
    *,
    against: Given = None,
    batch_size: int = 1,
    dtype: torch.dtype | str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    low_memory: bool | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
    announce: Callable[[str], object] | None = None,
) -> Perplexity | Divergence:
    """Measure what a model, compressed or not, predicts: its divergence from another, or its perplexity alone.

    Each model is in memory or passes through it block by block. Of the one to compare with no more than its last hidden
    states and its head are kept while the other runs.

    Parameters
    ----------
    model : str, Path, PreTrainedModel, LoadedModel or None
        The model: a path, a hub id, or one in memory, as for :func:`compress_model`.
    text : Tensor or callable
        Windows of tokens, or a function that makes them by the model's tokenizer.
    against : str, Path, PreTrainedModel or LoadedModel, optional
        The model to compare it with, such as the dense one that it was made from; the embedded one by its name,
        :data:`~cur.integrations.DEFAULT_MODEL`. Default: perplexity alone is measured.
    batch_size : int, default 1
        The number of windows in one forward pass.
    dtype, precision, device, low_memory, trust_remote_code, progress, announce
        How to load and run the models, as for :func:`compress_model`.

    Returns
    -------
    Divergence or Perplexity
        With `against` the divergence from that model, which has the perplexities of both; else the perplexity.

    Raises
    ------
    TypeError
        If a model is not a causal language model; before any pass.
    ValueError
        If several processes were started, an argument is not allowed, or the models have different vocabularies or
        tokenizers; before any pass.
    """
    check(precision)
    how = _How(precision, dtype, place(device), low_memory, trust_remote_code, batch_size, progress, announce or silent)
    scored = _Scored(model, how)
    windows = text(scored.tokenizer) if callable(text) else text
    check_windows(scored.model, windows)
    if against is None:
        return scored.perplexity(windows)
    dense = _Scored(None if against == DEFAULT_MODEL else against, how)
    check_vocabulary(scored.model, type(dense.model).__name__, output_head(dense.model).out_features)
    _check_tokens(windows, scored.tokenizer, dense.tokenizer)
    reference = dense.reference(windows)
    del dense
    return scored.compare(reference)


class _How(NamedTuple):
    """How models are loaded and run, as for :func:`evaluate_model`."""

    precision: str
    dtype: torch.dtype | str
    device: str
    low_memory: bool | None
    trust_remote_code: bool
    batch_size: int
    progress: StageProgress | None
    tell: Callable[[str], object]

    def watch(self, stage: str) -> Progress | None:
        """Return a callback for the steps of one stage."""
        return None if self.progress is None else functools.partial(self.progress, stage)


class _Scored:
    """A causal language model that is opened, in memory or block by block, for what it predicts."""

    def __init__(self, given: Given, how: _How) -> None:
        self._streamed: StreamedModel | None = None
        opening: dict[str, Any] = {"dtype": how.dtype, "trust_remote_code": how.trust_remote_code}
        if not isinstance(given, (PreTrainedModel, tuple)) and block_by_block(given, how.low_memory, how.dtype):
            if ProcessGroup().size > 1:
                raise ValueError("`cur evaluate` runs in one process; start it without torchrun")
            self._streamed = load_streamed(str(given), device=how.device, **opening)
            self.model, self.tokenizer = self._streamed.model, self._streamed.tokenizer
            passes = Precision.on(self._streamed.device, self._streamed.dtype, how.precision)
        else:
            with busy(how.progress, "load"):
                self.model, self.tokenizer, _ = _loaded(given, None, device_map=how.device, **opening)
            passes = Precision.of(self.model, how.precision)
        output_head(self.model)
        _tell_unread(self.model, how.tell)
        how.tell(passes.remark(how.precision))
        self._how = how
        self._options: dict[str, Any] = {"batch_size": how.batch_size, "precision": passes.name}

    def perplexity(self, windows: Tensor) -> Perplexity:
        watch = self._how.watch("evaluate")
        if self._streamed is not None:
            return perplexity_blockwise(self._streamed, windows, progress=watch, **self._options)
        return perplexity(self.model, windows, progress=watch, **self._options)

    def reference(self, windows: Tensor) -> Reference:
        watch = self._how.watch("reference")
        if self._streamed is not None:
            return reference_blockwise(self._streamed, windows, progress=watch, **self._options)
        return Reference(self.model, windows, progress=watch, **self._options)

    def compare(self, reference: Reference) -> Divergence:
        watch = self._how.watch("evaluate")
        if self._streamed is not None:
            return compare_blockwise(self._streamed, reference, progress=watch, **self._options)
        return reference.compare(self.model, progress=watch, **self._options)


def _check_tokens(windows: Tensor, ours: Any, theirs: Any) -> None:
    """Refuse windows whose tokens mean something else to the other model's tokenizer."""
    if ours is None or theirs is None:
        return
    ids = sorted(set(windows.flatten().tolist()))
    pairs = zip(ids, *(each.convert_ids_to_tokens(ids) for each in (ours, theirs)), strict=True)
    for number, own, other in pairs:
        if own != other:
            raise ValueError(
                f"`against` (--against) must have the tokenizer of the model, to which token {number} of the text is "
                f"{own!r}; to that model it is {other!r}: compare a model with the one that it was made from"
            )


def place(device: str) -> str:
    """Return the device that is meant, this process's own of several; a ValueError says that there is none.

    Parameters
    ----------
    device : str
        The name of the device that is asked for.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"`device` (--device) must be cpu, cuda or the like, got {device!r}") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` {device} (--device) is not there: torch sees no such device; leave it at cpu")
    own = os.environ.get("LOCAL_RANK")
    return f"{device}:{own}" if device == "cuda" and own is not None else device


def block_by_block(model: str | Path | None, asked: bool | None, dtype: torch.dtype | str) -> bool:
    """Say whether a model passes through memory block by block: on request, and when it would not fit otherwise.

    Parameters
    ----------
    model : path or None
        The directory or id of the model; None for the embedded one.
    asked : bool or None
        Whether it is asked for; None to decide by the memory.
    dtype : torch.dtype or str
        The dtype that the weights are to have in memory.

    Returns
    -------
    bool
        Whether blocks are loaded in turn.

    Raises
    ------
    ValueError
        If it is asked for a model that is not made of safetensors files, or refused to several processes.
    """
    directory = None if model is None or not Path(model).expanduser().is_dir() else Path(model).expanduser()
    if directory is not None:
        refuse_adapter_directory(directory, str(model))
    several = ProcessGroup().size > 1
    if several and asked is False:
        raise ValueError("several processes work block by block; leave out --in-memory (`low_memory`), or start one")
    if asked or several:
        if model is None or str(model).endswith(".gguf"):
            raise ValueError(
                "block by block only safetensors checkpoints are read; name a directory or a hub id as MODEL"
            )
        return True
    if asked is False or directory is None:
        return False
    try:
        return not fits(Shards(directory), dtype)
    except ShardError:  # not for us to report: other formats are read in memory
        return False


def unread_remark(model: PreTrainedModel) -> str:
    """Return a sentence on the tensors of a checkpoint that are no part of the model; empty if there are none.

    Parameters
    ----------
    model : PreTrainedModel
        The model that was loaded.
    """
    unread = origin_of(model).unread
    if not unread:
        return ""
    more = f" and {len(unread) - _TOLD} more" if len(unread) > _TOLD else ""
    return (
        f"Tensors that are no part of a {type(model).__name__}, and are kept as they are in what is made of it: "
        f"{', '.join(unread[:_TOLD])}{more}."
    )


def _in_memory(
    loaded: LoadedModel,
    asked: Asked,
    text: Text,
    file: Path | None,
    precision: str,
    progress: StageProgress | None,
    tell: Callable[[str], object],
) -> InMemory:
    source = InMemory(
        loaded.model,
        _batches(text, loaded.tokenizer, asked),
        tokenizer=loaded.tokenizer,
        statistics=file,
        precision=precision,
        progress=progress,
        announce=tell,
    )
    source.check(asked)
    _tell_unread(loaded.model, tell)
    tell(source.precision.remark(precision))
    return source


def _tell_unread(model: PreTrainedModel, tell: Callable[[str], object]) -> None:
    if remark := unread_remark(model):
        tell(remark)


def _loaded(
    model: str | Path | PreTrainedModel | LoadedModel | None, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model, tokenizer, model.name_or_path)  # type: ignore[arg-type]
    return load_model(model, **options)


def _batches(text: Text, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[Any]:
    if callable(text):
        return text(tokenizer)
    if text is None or isinstance(text, (str, Path)):
        words = embedded_text("calibrate") if text is None else read_text(text)
        name = "the embedded text" if text is None else str(text)
        text = token_windows(tokenizer, words, length=_LENGTH, count=_WINDOWS, spread=True, name=name)
    return as_batches(text, asked.batch_size)


def _judges(given: HeldOut, text: Text, asked: Asked) -> HeldOut:
    """Return the text to compare on: for a tolerance, where none is named, what of the other is not calibrated on."""
    known = text is None or isinstance(text, (str, Path))
    if given is not None or not isinstance(asked, BudgetConfig) or asked.tol is None or not known:
        return given
    if text is None:
        return reference_windows
    words, name = read_text(text), str(text)  # type: ignore[arg-type]
    return lambda _, tokenizer: windows_left(tokenizer, words, length=_LENGTH, count=_WINDOWS, name=name)


def reference_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 12) -> Tensor:
    """Return windows of the half of the embedded text that is not calibrated on.

    Parameters
    ----------
    model : PreTrainedModel
        The model that is to read them.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer of the model.
    count : int, default 12
        The number of windows, of 1024 tokens, or as many as the model has positions for.

    Returns
    -------
    Tensor
        The windows: int64, shape (count, length).
    """
    length = min(1024, positions(model) or 1024)
    return token_windows(tokenizer, embedded_text("evaluate"), length=length, count=count, name="the reference")


def _windows(given: HeldOut, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    windows = given(model, tokenizer) if callable(given) else given
    if windows is not None:
        check_windows(model, windows, name="held_out")
    return windows
