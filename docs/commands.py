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
    headings = dict.fromkeys(p.rich_help_panel for p in options if p.rich_help_panel)
    plain = [f"| `{_metavar(p)}` | {_cell(p.help)} | |" for p in arguments]
    parts = [f"## cur {name}", command.help or "", f"```console\n$ {usage}\n```"]
    parts.append(_table([*plain, *_rows(options, None)], "Argument or option" if arguments else "Option"))
    for heading in headings:
        parts += [f"**{heading}**, in a file `[{heading.lower()}]`:", _table(_rows(options, heading), "Option")]
    return "\n\n".join([*parts, command.epilog or ""])


def _rows(options: list[Any], heading: str | None) -> list[str]:
    return [f"| {_flags(p)} | {_cell(p.help)} | {_default(p)} |" for p in options if p.rich_help_panel == heading]


def _table(rows: list[str], first: str) -> str:
    return "\n".join([f"| {first} | Meaning | Default |", "|---|---|---|", *rows])


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    return name if argument.required else f"[{name}]"


def _flags(option: Any) -> str:
    flags = sorted(option.opts, key=len, reverse=True) + option.secondary_opts
    return ", ".join(f"`{flag}`" for flag in flags)


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
