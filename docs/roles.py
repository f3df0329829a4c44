"""Show cross-references of docstrings, ``:func:`~package.name```, as the name alone: Markdown knows no roles."""

from __future__ import annotations

import re

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(~?)([\w.]+)</code>")


def on_page_content(content: str, **_: object) -> str:
    """Replace the roles of a rendered page; mkdocs calls this by its name."""
    return ROLE.sub(lambda match: f"<code>{_shown(*match.groups())}</code>", content)


def _shown(short: str, name: str) -> str:
    return name.rpartition(".")[2] if short else name
