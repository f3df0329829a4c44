"""Turn the formulas of a page into MathML while the site is built: no script renders them in the browser."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex writes in its generic mode: \( inline \) in a span, \[ displayed \] in a div.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, *, page: Any, **_: object) -> str:
    """Replace every formula of a rendered page; mkdocs calls this by its name.

    Raises
    ------
    mkdocs.exceptions.PluginError
        If a formula is not valid TeX, with the page it stands on.
    """

    def render(match: re.Match[str]) -> str:
        tag, formula = match.group(1), html.unescape(match.group(2)).strip()
        display = "block" if tag == "div" else "inline"
        try:
            mathml = convert(formula, display=display)
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: cannot render the formula {formula!r}: {error}") from error
        return f'<{tag} class="formula">{mathml}</{tag}>'

    return FORMULA.sub(render, content)
