"""Rows of data as text: JSON lines, JSON, CSV and Parquet files, and data sets, by a column of text or of messages."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["ROWS", "Conversation", "read_rows", "texts_of"]

Conversation: TypeAlias = "list[dict[str, Any]]"
"""Messages, each with a ``role`` and a ``content``, for a tokenizer's chat template."""

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files that hold rows, not prose."""

_COLUMNS = ("text", "messages")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def read_rows(path: Path) -> Iterable[Any]:
    """Return the rows of a file by its ending: mappings from columns to values, or bare texts.

    Parameters
    ----------
    path : Path
        The path of the file; its ending says the format.

    Raises
    ------
    ImportError
        If it takes the package ``datasets`` to read, which is missing.
    ValueError
        If the file is not what its ending says.
    """
    if path.suffix.lower() in _TABLES:
        return _table(path)
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _cells(text, path)
    return _json(text, path)


def texts_of(rows: Iterable[Any], *, name: str, column: str | None = None) -> Iterator[str | Conversation]:
    """Yield the texts and conversations of rows; rows without one are passed over.

    Parameters
    ----------
    rows : iterable
        Mappings from columns to values, or bare texts.
    name : str
        The name that errors use for the texts.
    column : str, optional
        Which column to read. Default: ``"text"`` where there is one, else ``"messages"``.

    Yields
    ------
    str or Conversation
        A text, or the turns of a conversation.

    Raises
    ------
    ValueError
        If there is no such column, or it holds neither text nor messages.
    """
    for row in rows:
        value = row if row is None or isinstance(row, str) else _cell(row, name, column)
        if value is None or value == "" or value == []:
            continue
        if isinstance(value, str) or _is_conversation(value):
            yield value
            continue
        shown = repr(value)
        raise ValueError(
            f"{name}: column {column or _default(row)!r} must hold text, or messages with `role` and `content`, got "
            f"{shown if len(shown) < 80 else f'{shown[:80]}...'}; name another (`column`, --column)"
        )


def _cell(row: Any, name: str, column: str | None) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} must hold rows with columns, or texts, got {type(row).__name__}")
    chosen = column or _default(row)
    if chosen not in row:
        wanted = repr(column) if column else " or ".join(map(repr, _COLUMNS))
        raise ValueError(
            f"{name} has no column {wanted}; it has {', '.join(map(repr, row))}: name one of them (`column`, --column)"
        )
    return row[chosen]


def _default(row: Mapping[str, Any]) -> str:
    return next((column for column in _COLUMNS if column in row), _COLUMNS[0])


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    )


def _cells(text: str, path: Path) -> list[Any]:
    csv.field_size_limit(sys.maxsize)
    between = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.DictReader(StringIO(text, newline=""), delimiter=between, strict=True)
    rows = []
    try:
        for row in lines:
            # Text after a separator that nobody quoted would be dropped.
            if None in row:
                raise ValueError(
                    f"text file {str(path)!r} has more cells in line {lines.line_num} than columns; quote it"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"text file {str(path)!r} is no table: line {lines.line_num}: {error}") from error
    return rows


def _json(text: str, path: Path) -> list[Any]:
    try:
        data = [json.loads(text)]
    except RecursionError as error:
        raise ValueError(f"text file {str(path)!r} is not JSON that holds rows: it is nested too deeply") from error
    except json.JSONDecodeError as whole:
        # Many a file of JSON lines is called .json.
        data = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    data.append(json.loads(line))
                except json.JSONDecodeError as error:
                    where = whole if path.suffix == ".json" and number == 1 else f"line {number}: {error}"
                    raise ValueError(f"text file {str(path)!r} is not JSON ({where})") from error
    return data[0] if len(data) == 1 and isinstance(data[0], list) else data


def _table(path: Path) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"reading {str(path)!r} needs the package `datasets`; type: pip install datasets") from None
    kind = _TABLES[path.suffix.lower()]
    try:
        rows: Iterable[Any] = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except Exception as error:  # whatever its builder raised
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"text file {str(path)!r} could not be read as {kind}: {reason}") from error
    return rows
