"""Write the tables of selectors, importances and links from their entries, while the site is built."""

from __future__ import annotations

from collections.abc import Iterator

from cur.scores import IMPORTANCES, LINKS
from cur.selection import SELECTORS


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put each table where a page has its marker; mkdocs calls this by its name."""
    for marker, table in (
        ("<!-- selectors -->", _selectors),
        ("<!-- importances -->", _importances),
        ("<!-- links -->", _links),
    ):
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(table()))
    return markdown


def _selectors() -> Iterator[str]:
    yield _row("`select=`", "What it does", "Looks at", "Nested", "By chance")
    yield _row(*["---"] * 5)
    for name, known in SELECTORS.items():
        reads = ", ".join(("dense " if known.dense and what == "entries" else "") + what for what in known.reads)
        yield _row(f"`{name}`", known.summary, reads or "nothing", _yes(known.nested), _yes(known.draws))


def _importances() -> Iterator[str]:
    yield _row("`importance`", "Matrix that chooses", "Has to be measured")
    yield _row(*["---"] * 3)
    for name, known in IMPORTANCES.items():
        yield _row(f"`{name}`", f"`{known.formula}`", ", ".join(known.needs) or "nothing")


def _links() -> Iterator[str]:
    yield _row("`link`", "The core minimises", "Has to be measured")
    yield _row(*["---"] * 3)
    for name, known in LINKS.items():
        yield _row(f"`{name}`", f"`{known.formula}`", ", ".join(known.needs) or "nothing")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _yes(fact: bool) -> str:
    return "yes" if fact else ""
