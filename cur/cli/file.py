"""Configuration files: the options of a command as TOML, under the headings of its help."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cur._lib.atomic import replace_file
from cur.settings.option import Named, options_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_file", "save_file"]

# What a value may be, and an example, by type.
_KINDS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true"),
    int: ("an integer", "8"),
    float: ("a number", "0.5"),
    str: ("text", '"text"'),
    Path: ("a path", '"path"'),
}


def read_file(path: Path, command: str, options: Sequence[Named]) -> dict[str, Any]:
    """Return the values in a configuration file, by the names of their fields.

    Parameters
    ----------
    path : Path
        The TOML file to read.
    command : str
        The command that the options belong to, for errors.
    options : sequence of Named
        The options that the command knows.

    Raises
    ------
    ValueError
        If the file is no TOML, has a heading or an option that the command does not know, or a value of the wrong kind.
    """
    try:
        with path.expanduser().open("rb") as stream:
            data = tomllib.load(stream)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} must be a TOML file in UTF-8, which line {line} is not; mend that line") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be a TOML file: {error}; mend that line") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a TOML file with --config") from error
    found: dict[str, Any] = {}
    tables = {each.table for each in options}
    for table, entries in data.items():
        if not isinstance(entries, Mapping):
            raise ValueError(f"{path}: {_misplaced(table, options, command)}")
        if table not in tables:
            raise ValueError(f"{path}: [{table}] is no heading of {command}; {_near(table, tables)}")
        known = {key: each for each in options if each.table == table for key in (each.key, *_former(each))}
        for key, value in entries.items():
            if key not in known:
                raise ValueError(f"{path}, [{table}]: {_unknown(key, table, options, command)}")
            found[known[key].name] = _value(value, known[key], f"{path}, [{table}] {key}")
    return found


def _former(each: Named) -> list[str]:
    return [] if each.option.former is None else [each.option.former.removeprefix("--")]


def save_file(path: Path, groups: Iterable[Any]) -> None:
    """Write groups of settings as a configuration file; what has no value is left out.

    Parameters
    ----------
    path : Path
        The file to write; one that is there is replaced.
    groups : iterable of objects
        The groups, each of a dataclass with fields of :func:`~cur.settings.option.setting`.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    data: dict[str, dict[str, Any]] = {}
    for group in groups:
        for each in options_of(type(group)):
            value = getattr(group, each.name)
            if value is not None:
                data.setdefault(each.table, {})[each.key] = _plain(value)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as stream:
        tomli_w.dump(data, stream)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _misplaced(key: str, options: Sequence[Named], command: str) -> str:
    for each in options:
        if each.key == key:
            return f"{key} must stand under its heading, [{each.table}]"
    return f"{_unknown(key, '', options, command)}; options stand under headings"


def _unknown(key: str, table: str, options: Sequence[Named], command: str) -> str:
    for each in options:
        if each.key == key:
            return f"{key} belongs under [{each.table}]"
    here = [each.key for each in options if each.table == table]
    return f"{key} is no option of {command}; {_near(key, here or [each.key for each in options], options)}"


def _near(name: str, known: Iterable[str], options: Sequence[Named] = ()) -> str:
    """Return the nearest known name, or all."""
    known = sorted(set(known))
    if close := difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(
        name, [each.key for each in options], 1
    ):
        return f"the nearest is {close[0]}"
    return f"there are {', '.join(known)}"


def _value(value: Any, each: Named, place: str) -> Any:
    """Return a value of TOML as one of the field."""
    read = each.option.read
    if isinstance(value, str) and read is not None:
        try:
            return read(value)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if isinstance(value, list) and all(type(item) in each.items for item in value):
        return tuple(value)
    for kind in each.kinds:
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and type(value) is str:
            return Path(value).expanduser()  # no shell has read it
        if type(value) is kind:
            return value
    kinds = [*each.kinds, *([str] if read is not None and str not in each.kinds else [])]
    rule = " or ".join(_KINDS[kind][0] for kind in kinds if kind is not tuple)
    rule += "".join(f" or a list, each {_KINDS[kind][0]}" for kind in each.items)
    raise ValueError(f"{place} must be {rule}, got {value!r}; write for instance {each.key} = {_KINDS[kinds[0]][1]}")
