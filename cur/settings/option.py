"""A field of a configuration that is an option of the command line, too."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Named", "Option", "options_of", "setting"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """What the command line says of a field, and how it reads it.

    Parameters
    ----------
    help : str
        A sentence or two on what the option does.
    flag : str, optional
        What is typed, and after a slash its opposite. By default the name of the field, and its opposite if it is a
        switch.
    short : str, optional
        A letter for it, such as "-o".
    argument : str, optional
        What the usage calls it, if it can be given by its place as well.
    basic : bool, default False
        Whether `--help` shows it, and not `--help-all` alone.
    heading : str, optional
        The heading it stands under, instead of that of the class.
    shown : str, optional
        What help says of the default, where the value alone does not say it.
    read : callable, optional
        A function from what is typed to the value of the field, where the type of the field is not that of a single
        value.
    required : str, optional
        Why it has to be given, as the end of a sentence that says that it is missing.
    excludes : str, optional
        A name; of the options that have the same one at most one can be given.
    former : str, optional
        What was typed for it before; that still does, and says what it is now.
    """

    help: str
    flag: str | None = None
    short: str | None = None
    argument: str | None = None
    basic: bool = False
    heading: str | None = None
    shown: str | None = None
    read: Callable[[str], Any] | None = None
    required: str | None = None
    excludes: str | None = None
    former: str | None = None


@dataclass(frozen=True, kw_only=True)
class Named:
    """An option with what follows from its field: name, default and type.

    Attributes
    ----------
    name : str
        The name of the field.
    default : Any
        The value that the field has if nothing is given.
    kinds : tuple of type
        The types that a value can have, None left out.
    items : tuple of type
        The types of what is in a tuple, where a value can be one.
    heading : str
        The heading that it stands under.
    option : Option
        What the command line says of it.
    """

    name: str
    default: Any
    kinds: tuple[type, ...]
    items: tuple[type, ...]
    heading: str
    option: Option

    @property
    def flag(self) -> str:
        """What is typed; of a switch without the opposite."""
        return self.flags[0]

    @property
    def flags(self) -> tuple[str, ...]:
        """What is typed: the option, and if it is a switch its opposite."""
        dashed = self.name.replace("_", "-")
        if self.option.flag is not None:
            return tuple(self.option.flag.split("/"))
        return (f"--{dashed}", f"--no-{dashed}") if self.is_switch else (f"--{dashed}",)

    @property
    def key(self) -> str:
        """What a configuration file calls it."""
        by_place = self.option.argument is not None and self.option.short is None
        return str(self.option.argument).lower() if by_place else self.flag.removeprefix("--")

    @property
    def table(self) -> str:
        """The heading under which a configuration file has it."""
        return self.heading.lower()

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return bool in self.kinds

    @property
    def typed(self) -> type:
        """What the command line hands over: text, unless the field has one type that needs no reading."""
        return str if self.option.read is not None or len(self.kinds) != 1 else self.kinds[0]


def setting(help: str, **options: Any) -> dict[str, Option]:
    """Return the metadata of a field that the command line has as an option, by the parameters of :class:`Option`.

    Parameters
    ----------
    help : str
        A sentence or two on what the option does.
    **options : Any
        The other parameters of :class:`Option`.
    """
    return {"option": Option(help=help, **options)}


def options_of(group: type) -> Iterator[Named]:
    """Return the options among the fields of a class, whose attribute ``heading`` stands above them.

    Parameters
    ----------
    group : type
        The dataclass; its fields without a :func:`setting` are passed over.

    Yields
    ------
    Named
        The options, in the order of the fields.
    """
    hints = typing.get_type_hints(group)
    for each in fields(group):
        option = each.metadata.get("option")
        if option is not None:
            yield Named(
                name=each.name,
                default=each.default,
                kinds=tuple(typing.get_origin(part) or part for part in _parts(hints[each.name])),
                items=tuple(item for part in _parts(hints[each.name]) for item in typing.get_args(part)[:1]),
                heading=option.heading or group.heading,  # type: ignore[attr-defined]
                option=option,
            )


def _parts(hint: Any) -> list[Any]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [part for part in parts if part is not types.NoneType]
