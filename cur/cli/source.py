"""Where commands take text from: to calibrate on, to heal on and to measure on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cur.cli._run import note
from cur.cli.groups import CompressionText, HeldOutText
from cur.integrations.files.directory import check_parent
from cur.integrations.measure.rows import Conversation
from cur.integrations.measure.text import (
    batches,
    dataset_texts,
    embedded_text,
    evenly,
    read_text,
    token_windows,
    windows_left,
)
from cur.integrations.model.limits import check_windows, positions
from cur.integrations.pipeline import reference_windows, unread_remark
from cur.integrations.report.endings import output_head

__all__ = ["HeldOut", "Source", "check_file", "read_for", "show_unread", "tell"]

T = TypeVar("T", torch.Tensor, list[Any])


def read_for(model: PreTrainedModel, given: T) -> T:
    """Return windows or batches of tokens, if the model can take them; a ValueError says why not.

    Parameters
    ----------
    model : PreTrainedModel
        The model that is to read them.
    given : Tensor or list
        The windows of tokens, or batches of them.

    Raises
    ------
    ValueError
        If the windows are longer than the model has positions for, hold tokens that it has no embedding for, or the
        model does not read text.
    """
    check_windows(model, given)
    return given


def tell(sentence: str) -> None:
    """Say something beside the results.

    Parameters
    ----------
    sentence : str
        The sentence, which is printed on standard error as it is.
    """
    note.print(sentence, markup=False, soft_wrap=True)


def show_unread(model: PreTrainedModel) -> None:
    """Say which tensors of a checkpoint are no part of the model that was loaded from it.

    Parameters
    ----------
    model : PreTrainedModel
        The model that was loaded.
    """
    if remark := unread_remark(model):
        tell(remark)


def check_file(path: Path, called: str) -> None:
    """Refuse, before hours of work, a file that cannot be written.

    Parameters
    ----------
    path : Path
        The file that is to be written.
    called : str
        What should have been named instead of a directory, for the error.

    Raises
    ------
    ValueError
        If there is a directory of that name.
    FileExistsError, PermissionError
        If the directory that it is to lie in cannot be made or written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name {called}")
    check_parent(path)


@dataclass(frozen=True, kw_only=True)
class Source(CompressionText):
    """Text to calibrate or to heal on."""

    def __post_init__(self) -> None:
        """Refuse two texts, and passes without a window."""
        if self.text is not None and self.dataset is not None:
            raise ValueError("--text and --dataset exclude each other; give one")
        if self.split is not None and self.dataset is None:
            raise ValueError("--split is for --dataset; a file has one split")
        if self.column is not None and self.dataset is None and self.text is None:
            raise ValueError("--column is for --dataset, or for a --text of rows")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")

    def check(self) -> None:
        """Refuse a file of statistics that cannot be written, before anything is measured."""
        if self.stats is not None:
            check_file(self.stats, "the file of statistics with --stats")

    def read(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Return windows of tokens to calibrate on.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            The tokenizer of the model.

        Raises
        ------
        ValueError
            If the text has fewer windows than are asked for.
        """
        source, name = self._open()
        count = (128 if self.dataset is not None else 64) if self.windows is None else self.windows
        spread = self.dataset is None  # a data set is drawn no further than needed
        return token_windows(tokenizer, source, length=self.window_length, count=count, spread=spread, name=name)

    def to_heal(self, tokenizer: PreTrainedTokenizerBase, *, held_out: int) -> torch.Tensor:
        """Return windows of tokens to heal on, and behind them those to watch: the last of a text.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            The tokenizer of the model.
        held_out : int
            The number of windows to watch.

        Raises
        ------
        ValueError
            If the text has fewer windows than are asked for.
        """
        source, name = self._open()
        if self.dataset is not None:
            count = 512 if self.windows is None else self.windows
            return token_windows(tokenizer, source, length=self.window_length, count=count, name=name)
        every = token_windows(tokenizer, source, length=self.window_length, name=name)
        if self.windows is None:
            return every
        if not 1 <= self.windows <= len(every):
            raise ValueError(
                f"--windows must be between 1 and {len(every)}, the windows of {self.window_length} tokens in {name}, "
                f"got {self.windows}; give more text, or ask for fewer or shorter windows"
            )
        watched = min(held_out, self.windows)
        learnt = len(every) - watched
        return torch.cat([every[evenly(self.windows - watched, learnt)], every[learnt:]])

    def unseen(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Return windows that are not calibrated on: of the end of the text, or of the rest of the embedded one.

        Parameters
        ----------
        model : PreTrainedModel
            The model that is to read them.
        tokenizer : PreTrainedTokenizerBase
            The tokenizer of the model.

        Raises
        ------
        ValueError
            If a data set is streamed, or too little of the text is left.
        """
        if self.dataset is not None:
            raise ValueError("--tol with --dataset needs other text to compare on; name some with --held-out")
        if self.text is None:
            return reference_windows(model, tokenizer)
        source, name = self._open()
        count = 64 if self.windows is None else self.windows
        return windows_left(tokenizer, source, length=self.window_length, count=count, name=name)

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """Return batches of windows of tokens.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            The tokenizer of the model.
        """
        return batches(self.read(tokenizer), batch_size=self.batch_size)

    def _open(self) -> tuple[str | Iterable[str | Conversation], str]:
        """Return the text, or the texts of a data set, and what errors call it."""
        if self.dataset is not None:
            return self._stream(self.dataset), self.dataset
        if self.text is not None:
            return read_text(self.text, column=self.column), str(self.text)
        return embedded_text("calibrate"), "the embedded text"

    def _stream(self, dataset: str) -> Iterable[str | Conversation]:
        # C4 has one configuration for each language and no default; English is the one that papers calibrate on.
        config = "en" if self.dataset_config is None and dataset == "allenai/c4" else self.dataset_config
        # Endless: `token_windows` draws as many texts as its windows need.
        return dataset_texts(dataset, name=config, split=self.split or "train", column=self.column, count=None)


@dataclass(frozen=True, kw_only=True)
class HeldOut(HeldOutText):
    """Text to compare the compressed model with the dense one on."""

    @property
    def reader(self) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], torch.Tensor] | None:
        """What reads the text, None if there is none."""
        return None if self.held_out is None else self.read

    def read(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Return windows of 1024 tokens, or as many as the model has positions for; a ValueError says why not.

        Parameters
        ----------
        model : PreTrainedModel
            The model that is to read them.
        tokenizer : PreTrainedTokenizerBase
            The tokenizer of the model.

        Raises
        ------
        ValueError
            If the model has no output head, or the text has too few windows.
        """
        output_head(model)
        name, count = str(self.held_out), self.held_out_windows
        if name == "reference":
            return read_for(model, reference_windows(model, tokenizer, count))
        length = min(1024, positions(model) or 1024)
        return read_for(model, token_windows(tokenizer, read_text(name), length=length, count=count, name=name))
