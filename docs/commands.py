"""Write the reference of the command line from the commands themselves, while the site is built."""

from __future__ import annotations

from typing import Any

import typer

from cur.cli.app import app

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the reference where a page has the marker; mkdocs calls this by its name."""
    return markdown.replace(MARKER, _reference()) if MARKER in markdown else markdown


def _reference() -> str:
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(["cur", name, *map(_metavar, arguments), "[OPTIONS]"])
    rows = [f"| `{_metavar(p)}` | {_cell(p.help)} | |" for p in arguments]
    rows += [f"| {_flags(p)} | {_cell(p.help)} | {_default(p)} |" for p in options]
    table = ["| Argument or option | Meaning | Default |", "|---|---|---|", *rows]
    parts = [f"## cur {name}", command.help or "", f"```console\n$ {usage}\n```", "\n".join(table)]
    return "\n\n".join([*parts, command.epilog or ""])


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    return name if argument.required else f"[{name}]"


def _flags(option: Any) -> str:
    return ", ".join(f"`{flag}`" for flag in sorted(option.opts, key=len, reverse=True))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag or option.default is None or option.default == "":
        return ""
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
