"""Public functions of the core say what goes in, what comes out and what is refused, in sentences that stand alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap

import pytest

MODULES = (
    "cur.bounds",
    "cur.decompose",
    "cur.importance",
    "cur.interpolation",
    "cur.linking",
    "cur.ranks",
    "cur.scores",
    "cur.selection",
    "cur.streaming",
    "cur.subspace",
    "cur.weighted.inputs",
    "cur.weighted.rows",
    "cur.weighted.truncation",
)


def public():
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found) and found.__module__ == module.__name__:
                yield pytest.param(found, id=f"{module.__name__}.{name}")


def section(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def described(text: str) -> dict[str, str]:
    """Return by name what is said of each parameter or result."""
    parts = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    found = {}
    for part in filter(None, parts):
        head, _, said = part.partition("\n")
        for name in head.partition(" : ")[0].split(","):
            found[name.strip().lstrip("*")] = " ".join(said.split())
    return found


def refuses(function) -> bool:
    """Whether it raises an error itself, or calls what checks an argument."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    called = {getattr(n.func, "id", getattr(n.func, "attr", "")) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return any(isinstance(n, ast.Raise) for n in ast.walk(tree)) or any("check" in name for name in called)


@pytest.mark.parametrize("function", list(public()))
def test_docstrings_are_whole(function):
    text = inspect.getdoc(function) or ""
    said = described(section(text, "Parameters"))
    assert sorted(said) == sorted(inspect.signature(function).parameters)
    for name, sentence in said.items():
        assert re.match(r"[A-Z`\"']", sentence), name
        assert sentence.endswith("."), name
        # "Of the order." says nothing in the tooltip of an editor
        assert not re.match(r"(Of|As for|For the)\b", sentence), f"{name}: {sentence}"
        assert len(sentence.split()) >= 4, f"{name}: {sentence}"
    assert section(text, "Returns").strip()
    assert section(text, "Raises").strip() or not refuses(function)
    assert ">>> " in section(text, "Examples")


def test_fragments_are_found():
    text = "Do.\n\nParameters\n----------\nrank : int\n    Of the order.\n\nReturns\n-------\nint\n    It.\n"
    assert described(section(text, "Parameters")) == {"rank": "Of the order."}
    assert described(section(text, "Returns")) == {"int": "It."}
    assert section(text, "Raises") == ""
