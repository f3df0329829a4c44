"""Options whose help follows from what is registered."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from cur.cli.app import app
from cur.scores import IMPORTANCES, LINKS
from cur.selection import SELECTORS


@pytest.mark.parametrize("command", ["compress", "plan"])
@pytest.mark.parametrize(
    ("option", "known"), [("select", SELECTORS), ("importance", IMPORTANCES), ("link", LINKS)], ids=lambda x: str(x)[:9]
)
def test_help_names_all_that_are_registered(command: str, option: str, known: dict[str, Any]) -> None:
    group: Any = typer.main.get_command(app)
    said = {parameter.name: parameter.help for parameter in group.commands[command].params}[option]
    assert known
    assert [name for name in known if name not in said] == []
