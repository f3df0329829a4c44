"""Commands whose options are the fields of configurations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cur.cli._run import guarded, note
from cur.cli.file import read_file
from cur.cli.given import Given, merged
from cur.settings.option import Named, options_of

__all__ = ["HELP_ALL", "command"]

HELP_ALL = "--help-all"

_ALL = "cur.help_all"
_ARGUMENT = "_argument"
_FORMER = "_former"


def command(
    app: typer.Typer, *groups: type, example: str, gone: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that has the options of groups of settings, besides those of its own.

    The function is called with what was given of the settings, a :class:`~cur.cli.given.Given`, and its own options.

    Parameters
    ----------
    app : typer.Typer
        Where the command is added.
    *groups : type
        Dataclasses with fields of :func:`~cur.settings.option.setting`.
    example : str
        What the end of the help shows.
    gone : mapping, optional
        Former options, with what is said to those who type one.

    Returns
    -------
    callable
        The decorator, which returns the function itself.
    """
    options = _distinct(groups)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        name = function.__name__

        @guarded
        def run(ctx: typer.Context, *, config: Path | None, **values: Any) -> None:
            for flag, said in (gone or {}).items():
                if values.pop(_gone_name(flag)) is not None:
                    raise ValueError(f"{flag} is gone: {said}")
            given = _given(options, ctx, values, config, f"cur {name}")
            try:
                _check_required(options, given)
                function(given, **{each.name: values[each.name] for each in own})
            except (TypeError, ValueError) as error:
                raise given.placed(error) from error

        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *(parameter for each in options for parameter in _parameters(each)),
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
            _parameter("config", None, _CONFIG),
            *(
                _parameter(_gone_name(flag), None, Annotated[str | None, typer.Option(flag, hidden=True)])
                for flag in gone or {}
            ),
            _parameter("help_all", False, _HELP_ALL),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__doc__ = function.__doc__
        rest = frozenset(each.name for each in options if not each.option.basic)
        kind = type("Command", (_Command,), {"rest": rest})
        app.command(name, cls=kind, epilog=f"Example: {example}")(run)
        return function

    return decorate


class _Command(TyperCommand):
    """Shows the options that matter on one screen, and all under their headings when asked for them."""

    rest: frozenset[str]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        TyperCommand.format_help(self if ctx.meta.get(_ALL) else self._brief(), ctx, formatter)

    def _brief(self) -> TyperCommand:
        short = copy.copy(self)
        short.help = (self.help or "").split("\n\n")[0]
        short.params = [copy.copy(each) for each in self.params if each.name not in self.rest]
        for each in short.params:
            each.rich_help_panel = None  # type: ignore[attr-defined]
            each.secondary_opts = []
        return short


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


_CONFIG = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with options; what is typed goes before it.", show_default=False),
]
_HELP_ALL = Annotated[
    bool, typer.Option(HELP_ALL, is_eager=True, callback=_show_all, help="Show all options, under headings.")
]


def _distinct(groups: Sequence[type]) -> list[Named]:
    found: dict[str, Named] = {}
    for group in groups:
        for each in options_of(group):
            found.setdefault(each.name, each)
    return list(found.values())


def _parameters(each: Named) -> list[inspect.Parameter]:
    """Return the parameters that typer makes options and arguments of."""
    option = each.option
    told = f"{option.help} Required." if option.required else option.help
    shown: bool | str = option.shown or (option.read is None and type(each.default) in (int, float, str))
    found = []
    if option.argument is not None:
        more = f" Default: {option.shown}." if option.shown else ""
        argument = typer.Argument(metavar=option.argument, help=told + more, show_default=False)
        found.append(_parameter(each.name + _ARGUMENT, None, Annotated[each.typed | None, argument]))
        if option.short is None:
            return found
        told, shown = f"The same as {option.argument}, as an option.", False
    info = typer.Option(
        "/".join(each.flags),
        *([] if option.short is None else [option.short]),
        help=told,
        show_default=shown,
        rich_help_panel=each.heading,
    )
    default = None if option.read is not None or each.default == () else each.default
    found.append(_parameter(each.name, default, Annotated[each.typed | None, info]))
    if option.former is not None:
        former = typer.Option(option.former, hidden=True)
        found.append(_parameter(each.name + _FORMER, None, Annotated[each.typed | None, former]))
    return found


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _gone_name(flag: str) -> str:
    return "gone_" + flag.removeprefix("--").replace("-", "_")


def _given(
    options: Sequence[Named], ctx: typer.Context, values: Mapping[str, Any], file: Path | None, name: str
) -> Given:
    """Return what was typed, read, and what is in the configuration file."""
    typed = {}
    for each in options:
        if _was_typed(ctx, each.name + _FORMER):
            note.print(f"{each.option.former} is {each.flag} now.")
        keys = (each.name + _ARGUMENT, each.name, each.name + _FORMER)
        found = [values[key] for key in keys if _was_typed(ctx, key)]
        if len(found) == 2 and found[0] != found[1]:
            said = each.option.argument or each.option.former
            raise ValueError(f"{said} is given twice, as {found[0]!r} and as {each.flag} {found[1]!r}; give one")
        if found:
            typed[each.name] = found[0] if each.option.read is None else each.option.read(found[0])
    return merged(options, typed, None if file is None else read_file(file, name, options), file)


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _check_required(options: Sequence[Named], given: Given) -> None:
    for each in options:
        if each.option.required and given.values.get(each.name) is None:
            missing = each.option.argument or each.flag
            raise ValueError(f"{missing} is missing: {each.option.required}")
