"""The documentation tells the truth: its numerical pages run, and print what they show."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Pages whose Python is pure numerics. Pages about models show commands, and code that takes minutes.
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/tutorials/factor-a-matrix.md",
    "docs/tutorials/certificate.md",
    "docs/howto/matrices.md",
)

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")

# Figures on a page are rounded to two or three digits, and BLAS libraries differ in the last one.
RELATIVE_TOLERANCE = 0.02


class Block(NamedTuple):
    """One Python block, the line it starts on and the output that the page shows below it, if any."""

    line: int
    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """Python blocks of a page, each with the ``text`` block that follows it without prose between."""
    found = list(FENCE.finditer(page))
    result = []
    for here, following in itertools.zip_longest(found, found[1:]):
        if here["info"].strip() != "python":
            continue
        output = None
        if following is not None and following["info"].split()[:1] == ["text"]:
            between = page[here.end() : following.start()]
            output = following["body"] if not between.strip() else None
        result.append(Block(page.count("\n", 0, here.start()) + 2, here["body"], output))
    return result


def assert_same_output(shown: str, printed: str) -> None:
    """Words must agree exactly, numbers to the precision of a page."""
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", printed).split(), f"page:\n{shown}\nprinted:\n{printed}"
    expected = [float(text) for text in NUMBER.findall(shown)]
    actual = [float(text) for text in NUMBER.findall(printed)]
    assert actual == pytest.approx(expected, rel=RELATIVE_TOLERANCE), f"page:\n{shown}\nprinted:\n{printed}"


@pytest.mark.parametrize("name", PAGES)
def test_page_runs_and_prints_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Blocks of a page build on each other, so they share one namespace.
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        if "from_pretrained" in block.code or "cur.integrations" in block.code:
            continue
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), namespace)
        if block.output is not None:
            assert_same_output(block.output, stdout.getvalue())


@pytest.mark.parametrize("name", PAGES[2:])
def test_numerical_pages_show_code_with_its_output(name):
    assert any(block.output for block in blocks((ROOT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_names_of_this_package_on_a_page_exist(name):
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cur":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{name}, line {block.line + node.lineno - 1}"


def test_benchmarks_page_shows_the_stored_results():
    render = importlib.import_module("benchmarks.render")
    page = "".join(file.read_text(encoding="utf-8") for file in render.PAGES)
    assert {match["name"] for match in render.BLOCK.finditer(page)} == set(render.RENDERERS)
    assert {file.stem for file in render.RESULTS.glob("*.json")} <= {"core", *render.RENDERERS}
    assert render.rendered(page) == page, "run python benchmarks/render.py"


def test_sections_that_call_the_shipped_model_dense_say_what_that_is():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]}
    definition = sections.pop("## The dense model")
    assert "Q4_1" in definition
    assert "<!-- results: off_grid -->" in definition
    named = {
        title: part
        for title, part in sections.items()
        if re.search(r"dense model|^\| dense|\*Dense:", part, flags=re.MULTILINE)
    }
    assert named
    assert [title for title, part in named.items() if "(#the-dense-model)" not in part] == []
    assert "docs/benchmarks.md#the-dense-model" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_other_words_are_noticed():
    with pytest.raises(AssertionError):
        assert_same_output("rank 3", "order 3")


def test_other_numbers_are_noticed():
    assert_same_output("error 1.23e-05", "error 1.234e-05")
    with pytest.raises(AssertionError):
        assert_same_output("error 1.23e-05", "error 1.53e-05")


def test_output_separated_by_prose_is_not_compared():
    page = "```python\nprint(1)\n```\n\nSome prose.\n\n```text\n2\n```\n"
    assert blocks(page) == [Block(2, "print(1)\n", None)]
