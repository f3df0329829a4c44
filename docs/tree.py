"""Write the tree of the package from the first sentence of every file, while the site is built."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MARKER = "<!-- tree -->"
ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the tree where a page has the marker; mkdocs calls this by its name."""
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, "```text\n" + "\n".join(_lines(ROOT / "cur", 0)) + "\n```")


def _lines(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", folder / "__init__.py", depth)
    for file in sorted(folder.glob("*.py")):
        if file.name not in ("__init__.py", "__main__.py"):
            yield _line(file.name, file, depth + 1)
    for inside in sorted(folder.iterdir()):
        if (inside / "__init__.py").exists():
            yield from _lines(inside, depth + 1)


def _line(name: str, file: Path, depth: int) -> str:
    said = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return f"{'  ' * depth}{name:<{26 - 2 * depth}} {said}"
