"""Calibration and evaluation text, and its way into token windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cur.integrations.measure.rows import ROWS, Conversation, read_rows, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["batches", "dataset_texts", "embedded_text", "evenly", "read_text", "token_windows", "windows_left"]

# Tokens at the end of a text that are not calibrated on: what `cur heal` holds out, 8 windows of 256.
_LEFT, _SHORT = 2048, 256


def embedded_text(half: Literal["calibrate", "evaluate"]) -> str:
    r"""Return one half of the Python language reference that every CPython ships.

    The text is the topics of :mod:`pydoc_data.topics` in their own order, joined by blank lines. The
    calibration half is the leading topics up to the one in which half of the characters are reached. The
    evaluation half is all later topics less every paragraph that stands in the calibration half too: the
    reference repeats itself (``with`` is also a part of ``compound``), and without this about one sixth of
    the evaluation text would have been seen in calibration.

    Parameters
    ----------
    half : {"calibrate", "evaluate"}
        Which half of the text to return.

    Returns
    -------
    str
        Some 200,000 characters; the exact text depends on the version of Python.

    Raises
    ------
    ValueError
        If `half` is neither of the two.

    Examples
    --------
    >>> from cur.integrations import embedded_text
    >>> embedded_text("calibrate").startswith('The "assert" statement')
    True
    """
    if half not in ("calibrate", "evaluate"):
        raise ValueError(f"`half` must be 'calibrate' or 'evaluate', got {half!r}")
    from pydoc_data.topics import topics

    texts = list(topics.values())
    middle = sum(map(len, texts)) / 2
    reached, count = 0, 0
    while reached < middle:
        reached += len(texts[count])
        count += 1
    if half == "calibrate":
        return "\n\n".join(texts[:count])
    seen = {_words(paragraph) for text in texts[:count] for paragraph in text.split("\n\n")}
    kept = ("\n\n".join(p for p in text.split("\n\n") if _words(p) not in seen) for text in texts[count:])
    return "\n\n".join(text for text in kept if text.strip())


def _words(paragraph: str) -> str:
    # Repeated paragraphs are indented and wrapped anew where they are repeated.
    return " ".join(paragraph.split())


def read_text(path: str | Path, *, column: str | None = None) -> str | list[str | Conversation]:
    """Read a UTF-8 text file, or the texts of a file of rows.

    Parameters
    ----------
    path : str or Path
        The file. One that ends in ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``
        holds rows; the last two are read by the package ``datasets``.
    column : str, optional
        Column of the rows to read. Default: ``"text"`` where there is one, else ``"messages"``.

    Returns
    -------
    str or list
        The text; of rows their texts or conversations, as :func:`token_windows` takes them.

    Raises
    ------
    ImportError
        If reading the file takes the package ``datasets``, which is missing.
    ValueError
        If the file does not exist, is a directory, cannot be read, is not UTF-8, not what its ending says, or holds no
        text.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"text file {str(path)!r} is a directory; name one file in it")
    rows = path.suffix.lower() in ROWS
    if column is not None and not rows:
        raise ValueError(f"text file {str(path)!r} has no columns, so `column` (--column) {column!r} is not for it")
    try:
        name = f"text file {str(path)!r}"
        text: Any = list(texts_of(read_rows(path), name=name, column=column)) if rows else path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"text file {str(path)!r} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is not UTF-8 (byte {error.start}: {error.reason}); unpack it if it is "
            "compressed, convert it otherwise"
        ) from None
    except OSError as error:
        raise ValueError(f"text file {str(path)!r} cannot be read: {error.strerror or error}") from error
    if not (text if rows else text.strip()):
        raise ValueError(f"text file {str(path)!r} is empty; calibration and evaluation need text")
    found: str | list[str | Conversation] = text
    return found


def dataset_texts(
    dataset: str,
    /,
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
    count: int | None = 128,
    min_characters: int = 1,
) -> Iterator[str | Conversation]:
    """Stream texts from a data set of the Hugging Face hub, first come first served.

    Parameters
    ----------
    dataset : str
        Id of the data set, for instance ``"allenai/c4"``, or a local path that ``datasets.load_dataset``
        reads.
    name : str, optional
        Configuration of the data set, for instance ``"en"``.
    split : str, default "train"
        The split of the data set to read.
    column : str, optional
        Column that holds text, or messages for a chat template. Default: ``"text"`` where there is one, else
        ``"messages"``.
    count : int or None, default 128
        Number of texts, the default being the number of samples that CURing (arXiv 2501.04211) calibrates on;
        None streams without end.
    min_characters : int, default 1
        Shorter texts are passed over and not counted, and so are rows without a text.

    Yields
    ------
    str or list of dict
        A text, or the messages of a conversation.

    Raises
    ------
    ImportError
        If the package ``datasets`` is missing.
    ValueError
        If the data set cannot be opened, lacks the column, or ends before `count` texts were found.
    """
    if count is not None and count < 1:
        raise ValueError(f"`count` must be at least 1 or None, got {count}")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading data set {dataset!r} needs the package `datasets`; type: pip install datasets"
        ) from None
    try:
        stream: Iterable[Any] = datasets.load_dataset(dataset, name, split=split, streaming=True)
    except Exception as error:  # load_dataset raises whatever its file system, builder or network raised
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"data set {dataset!r} (name {name!r}, split {split!r}) could not be opened: {reason}"
        ) from error
    return _take(stream, dataset=dataset, column=column, count=count, min_characters=min_characters)


def _take(
    stream: Iterable[Any], *, dataset: str, column: str | None, count: int | None, min_characters: int
) -> Iterator[str | Conversation]:
    found = 0
    for text in texts_of(stream, name=f"data set {dataset!r}", column=column):
        if not isinstance(text, str) or len(text) >= min_characters:
            yield text
            found += 1
            if found == count:
                return
    if count is not None:
        raise ValueError(
            f"data set {dataset!r} ended after {found} texts of {min_characters} or more characters, "
            f"{count} were asked for"
        )


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str | Conversation],
    /,
    *,
    length: int,
    count: int | None = None,
    spread: bool = False,
    name: str = "text",
) -> torch.Tensor:
    r"""Cut a text into windows of equal numbers of tokens.

    The whole text is tokenised as one stream, without special tokens, and cut off the front into windows that
    neither overlap nor leave gaps; the incomplete last one is dropped.

    To calibrate on, windows from all over a text show a model more than as many from its beginning, which are of few
    topics: `spread` takes them at even distances. Layers come to fit the text they are calibrated on, so healing has to
    watch other text: the last 2,048 tokens are left for that, but no more than a tenth and only what is to spare, and
    windows that would lie there come closer together before them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's own tokenizer, which splits the text.
    text : str, or iterable of str or list of dict
        The text. Lists of messages are written out by the tokenizer's chat template. What an iterable has is joined by
        blank lines, and without `spread` no more is drawn than the windows need.
    length : int
        Tokens per window, at least 2 (one token to see and one to predict).
    count : int, optional
        Number of windows; default as many as there are.
    spread : bool, default False
        Whether to take windows from all over the text but its end, not its first ones. All of it is read: not for
        endless streams.
    name : str, default "text"
        The name that errors use for the text.

    Returns
    -------
    torch.Tensor
        The windows: int64, shape (count, length).

    Raises
    ------
    ValueError
        If the text is empty, or shorter than `count` windows (or than one), or holds messages for which the tokenizer
        has no chat template.
    """
    if tokenizer is None:
        raise ValueError(
            f"`model` has no tokenizer, so {name} cannot be read: it is measured on batches of what it reads, images "
            "or sound, which are given in Python (`text=batches`)"
        )
    if length < 2:
        raise ValueError(f"`length` must be at least 2 tokens, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    needed = None if count is None or spread else count * length
    tokens: list[int] = []
    for part in [text] if isinstance(text, str) else _joined(text, tokenizer, name):
        # Without the model's own special tokens, so that every window is alike; `verbose=False` keeps the
        # tokenizer from warning that a stream is longer than the model's context.
        tokens += tokenizer(_without_halves(part), add_special_tokens=False, verbose=False)["input_ids"]
        if needed is not None and len(tokens) >= needed:
            break
    if not tokens:
        raise ValueError(f"{name} is empty: it holds no token")
    available = len(tokens) // length
    if available < (count or 1):
        raise ValueError(
            f"{name} is too short: it holds {len(tokens)} tokens, {count or 1} window(s) of {length} need "
            f"{(count or 1) * length}; give more text, or ask for fewer or shorter windows"
        )
    count = available if count is None else count
    places = torch.arange(count)
    if spread:
        left = _left(available, count, length)
        # Most windows are where they would be without an end that is left.
        places = torch.minimum(evenly(count, available), places + available - left - count)
    windows = torch.tensor(tokens[: available * length], dtype=torch.int64).view(available, length)
    return windows[places]


def windows_left(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str | Conversation],
    /,
    *,
    length: int,
    count: int,
    name: str = "text",
) -> torch.Tensor:
    """Return windows of the end that :func:`token_windows` leaves where it spreads others over a text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's own tokenizer.
    text : str, or iterable of str or list of dict
        The text, as for :func:`token_windows`.
    length, count : int
        The length and the number of the windows that are spread over it.
    name : str, default "text"
        The name that errors use for the text.

    Returns
    -------
    torch.Tensor
        The windows, of 256 tokens or `length` if that is less: int64, shape (count, length).

    Raises
    ------
    ValueError
        If fewer than two windows are left, or the text is too short.
    """
    taken = token_windows(tokenizer, text, length=length, count=count, spread=True, name=name)
    every = token_windows(tokenizer, text, length=length, name=name)
    left = _left(len(every), len(taken), length)
    short = min(_SHORT, length)
    rest = every[len(every) - left :].flatten()
    rest = rest[len(rest) % short :].view(-1, short)
    if len(rest) < 2:
        raise ValueError(
            f"{name} is too short to compare models on a part of it as well: it holds {len(every)} windows of {length} "
            f"tokens, of which {count} are calibrated on; name another text with --held-out (`held_out`), or calibrate "
            "on fewer windows"
        )
    return rest


def _left(available: int, count: int, length: int) -> int:
    """Return how many windows at the end of a text are left."""
    return max(min(math.ceil(_LEFT / length), available // 10, available - count), 0)


def evenly(count: int, available: int, /) -> torch.Tensor:
    """Return the middles of `count` equal parts of a row of `available` things: int64, all different if they can be.

    Parameters
    ----------
    count : int
        The number of things to choose.
    available : int
        The number of things there are.
    """
    return (2 * torch.arange(count) + 1) * available // max(2 * count, 1)


def _without_halves(text: str) -> str:
    """Replace halves of characters, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _joined(texts: Iterable[str | Conversation], tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[str]:
    for index, text in enumerate(texts):
        plain = text if isinstance(text, str) else _written_out(text, tokenizer, name)
        yield plain if index == 0 else "\n\n" + plain


def _written_out(messages: Conversation, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{name} holds messages, and the tokenizer has no chat template to write them out with; give text, or a "
            "column of text (`column`, --column)"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} holds messages that the chat template refuses: {reason}") from error


def batches(windows: torch.Tensor, /, *, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Group token windows into batches that a model takes.

    Parameters
    ----------
    windows : torch.Tensor
        Token ids, integer, shape (count, length).
    batch_size : int
        Windows per batch; the last batch may hold fewer.

    Returns
    -------
    list of dict
        Each with ``input_ids`` and ``attention_mask``, int64, shape (batch, length). The mask is all ones:
        windows are not padded.

    Raises
    ------
    TypeError
        If `windows` is not a two-dimensional integer tensor.
    ValueError
        If there is no window, or `batch_size` is below 1.
    """
    if windows.ndim != 2 or windows.is_floating_point():
        raise TypeError("`windows` must be an integer tensor of shape (count, length), as `token_windows` returns")
    if windows.numel() == 0:
        raise ValueError(f"`windows` must hold at least one token, got shape {tuple(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in torch.split(windows.to(torch.int64), batch_size)
    ]
