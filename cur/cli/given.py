"""What a command was given: on its line, else in a configuration file; whatever neither says has its default."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cur.settings.option import Named, options_of

__all__ = ["Given", "merged"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Values of settings by the names of their fields.

    Parameters
    ----------
    values : mapping
        The values that were given, by the names of their fields.
    named : mapping
        The options that these are values of, for errors.
    file : Path, optional
        The configuration file that some of them are from.
    of_file : frozenset
        The names of the values that are from it.
    """

    values: Mapping[str, Any]
    named: Mapping[str, Named]
    file: Path | None = None
    of_file: frozenset[str] = frozenset()

    def only(self, group: type) -> dict[str, Any]:
        """Return what was given of a group of settings.

        Parameters
        ----------
        group : type
            The dataclass of the settings.
        """
        return {each.name: self.values[each.name] for each in options_of(group) if each.name in self.values}

    def build(self, group: type[T]) -> T:
        """Return a group of settings.

        Parameters
        ----------
        group : type
            The dataclass of the settings; what was not given of it has its default.

        Raises
        ------
        TypeError, ValueError
            If the group refuses a value.
        """
        return group(**self.only(group))

    def placed(self, error: Exception) -> Exception:
        """Return an error together with where in the file the value stands that it names first, if it is from there.

        Parameters
        ----------
        error : Exception
            The error, whose text may name options or fields.
        """
        text, places = str(error), dict[int, str]()
        for name in self.values:
            flags = "|".join(self.named[name].flags)
            if found := re.search(rf"`{name}`|(?<![\w-])({flags})(?![\w-])", text):
                places[found.start()] = name
        first = places[min(places)] if places else ""
        if first not in self.of_file:
            return error
        each = self.named[first]
        return ValueError(f"{self.file}, [{each.table}] {each.key}: {text}")


def merged(
    options: Sequence[Named],
    typed: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
    file: Path | None = None,
) -> Given:
    """Return what was given, where what was typed goes before what is stored in a file.

    What excludes something that was typed goes with what it would have had a value for.

    Parameters
    ----------
    options : sequence of Named
        The options that the command knows.
    typed : mapping
        The values that were typed, by the names of their fields.
    stored : mapping, optional
        The values of a configuration file, by the same names.
    file : Path, optional
        The path of that file, for errors.
    """
    named = {each.name: each for each in options}
    decided = {named[name].option.excludes for name, value in typed.items() if value not in (None, False)} - {None}
    kept = {
        name: value
        for name, value in (stored or {}).items()
        if name not in typed and named[name].option.excludes not in decided
    }
    return Given(values={**kept, **typed}, named=named, file=file, of_file=frozenset(kept))
