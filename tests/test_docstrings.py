"""Docstrings: parameters are those of the signature, and their texts can be read without the page around them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {str(path.relative_to(ROOT / "cur")): path for path in sorted((ROOT / "cur").rglob("*.py"))}

WORDS = 4
"""The fewest words of a text that says something in an editor's tooltip."""

FRAGMENT = re.compile(r"(Of|For|As|With|By|See|The same|What to|Whose|Their|Those|Default:|Perhaps)\b")
"""Beginnings that mean nothing without the name, the type or the line before."""

CORE = [
    *("bounds.py", "decompose.py", "interpolation.py", "linking.py", "ranks.py", "scores.py", "selection.py"),
    *("rounding.py", "streaming.py", "subspace.py", "weights.py"),
    *("weighted/inputs.py", "weighted/rows.py", "weighted/truncation.py"),
]
"""Modules of numerical functions: each has an example, and says what it returns and refuses in sections."""

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
Described = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Documented:
    """A public function, class or method, and the class that it belongs to."""

    node: Function | ast.ClassDef
    owner: ast.ClassDef | None

    @property
    def name(self) -> str:
        return self.node.name if self.owner is None else f"{self.owner.name}.{self.node.name}"

    @property
    def sections(self) -> dict[str, list[tuple[str, str]]]:
        """The numpydoc sections, each as pairs of what is described and its text."""
        found: dict[str, list[tuple[str, str]]] = {}
        lines = (ast.get_docstring(self.node) or "").splitlines()
        heads = [i for i in range(len(lines) - 1) if lines[i] and lines[i + 1] == "-" * len(lines[i])]
        for head, end in zip(heads, [*heads, len(lines)][1:], strict=False):
            entries: list[tuple[str, str]] = []
            for line in lines[head + 2 : end]:
                if line and line[0] != " ":
                    entries.append((line, ""))
                elif line.strip() and entries:
                    entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}".strip())
            found[lines[head]] = entries
        return found

    def names(self, section: str) -> list[str]:
        """Return the names that a section describes; some entries describe several."""
        return [name.strip() for head, _ in self.sections.get(section, ()) for name in head.split(" : ")[0].split(",")]

    @property
    def described(self) -> list[str]:
        """The names that the docstring of a class describes."""
        return self.names("Parameters") or self.names("Attributes")

    @property
    def decorators(self) -> set[str]:
        return {ast.unparse(decorator).split(".")[-1].split("(")[0] for decorator in self.node.decorator_list}

    @property
    def parameters(self) -> list[str]:
        """The names in the signature; of a dataclass those of its fields."""
        if isinstance(self.node, ast.ClassDef):
            made = [part for part in self.node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            if made:
                return Documented(made[0], self.node).parameters
            fields = [part for part in self.node.body if isinstance(part, ast.AnnAssign)]
            names = [
                part.target.id
                for part in fields
                if isinstance(part.target, ast.Name)
                if "ClassVar" not in ast.unparse(part.annotation)
            ]
            return [name for name in names if name[0] != "_"] if "dataclass" in self.decorators else []
        a = self.node.args
        positional = [arg.arg for arg in (*a.posonlyargs, *a.args)]
        if self.owner is not None and "staticmethod" not in self.decorators:
            positional = positional[1:]
        more = [f"*{a.vararg.arg}"] if a.vararg else []
        last = [f"**{a.kwarg.arg}"] if a.kwarg else []
        return [*positional, *more, *(arg.arg for arg in a.kwonlyargs), *last]


def _public(path: Path) -> Iterator[Documented]:
    """Yield what `__all__` of a module names and the module defines, with the public methods of classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    names = ast.literal_eval(exported[0]) if exported else ()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
            if "overload" in Documented(node, None).decorators:  # what is described stands below
                continue
            yield Documented(node, None)
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name[0] != "_":
                        yield Documented(part, node)


def _help_of_fields(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the fields of dataclasses that have a `setting`, as "Class.field", with the help in it."""
    shared = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Call, ast.Constant))
    }
    for owner in tree.body:
        for part in owner.body if isinstance(owner, ast.ClassDef) else ():
            if not (isinstance(part, ast.AnnAssign) and isinstance(part.value, ast.Call)):
                continue
            for keyword in part.value.keywords:
                made = shared.get(ast.unparse(keyword.value), keyword.value)
                if isinstance(made, ast.Call) and ast.unparse(made.func) == "setting":
                    text = shared.get(ast.unparse(made.args[0]), made.args[0])
                    said = text.value if isinstance(text, ast.Constant) else ast.unparse(text).strip("f\"'")
                    yield f"{owner.name}.{ast.unparse(part.target)}", str(said)


PUBLIC = {name: list(_public(path)) for name, path in MODULES.items()}
EVERY = {
    node.name: node
    for path in MODULES.values()
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}
CLASSES = {d.node.name: d.node for found in PUBLIC.values() for d in found if isinstance(d.node, ast.ClassDef)}
SETTINGS = {
    field: text
    for path in MODULES.values()
    for field, text in _help_of_fields(ast.parse(path.read_text(encoding="utf-8")))
}
"""By the names of classes and fields, the help of those that are options: an option is said once."""


def _bases(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    names = [ast.unparse(base).split(".")[-1] for base in node.bases]
    return [known[name] for name in names if name in known]


def _described_elsewhere(node: ast.ClassDef) -> set[str]:
    """Return the fields of a class that their help describes, a base, or a class that inherits them."""
    found = {field.partition(".")[2] for field in SETTINGS if field.partition(".")[0] == node.name}
    for heir in EVERY.values():
        if node.name in {base.name for base in _bases(heir, EVERY)}:
            found.update(Documented(heir, None).described)
    for base in _bases(node, EVERY):
        found |= _described_elsewhere(base) | {*Documented(base, None).described}
    return found


def _is_inherited(documented: Documented) -> bool:
    """Whether a base of the class has the method, and with it what its parameters mean."""
    if documented.owner is None:
        return False
    return any(
        any(isinstance(part, ast.FunctionDef) and part.name == documented.node.name for part in base.body)
        or _is_inherited(Documented(documented.node, base))
        for base in _bases(documented.owner, CLASSES)
    )


def _texts_at_fault(found: list[Documented]) -> list[str]:
    return [
        f"{one.name}, {head}: {text!r}"
        for one in found
        for section in ("Parameters", "Attributes")
        for head, text in one.sections.get(section, ())
        if _is_fragment(text)
    ]


def _is_fragment(text: str) -> bool:
    return len(text.split()) < WORDS or text[-1] not in ".:" or bool(FRAGMENT.match(text))


def _raises(node: ast.AST) -> bool:
    """Whether a function raises an error of its own; what functions inside of it raise may be caught."""
    return any(
        (isinstance(part, ast.Raise) and part.exc is not None and ast.unparse(part.exc) != "NotImplementedError")
        or (not isinstance(part, (ast.FunctionDef, ast.Lambda)) and _raises(part))
        for part in ast.iter_child_nodes(node)
    )


def _sections_at_fault(found: list[Documented]) -> Iterator[str]:
    for one in found:
        summary = (ast.get_docstring(one.node) or "").split("\n")[0]
        if not summary:
            yield f"{one.name} has no docstring"
        if isinstance(one.node, ast.ClassDef):
            described = one.described
            # Fields that are given by name alone have no order, and what is set later is described, too.
            named = "kw_only=True" in "".join(map(ast.unparse, one.node.decorator_list))
            if named:
                described = sorted(described, key=[*one.parameters, *described].index)
            elsewhere = _described_elsewhere(one.node)
            missing = [name for name in one.parameters if name not in described and name not in elsewhere]
            if missing or (described and one.parameters and not elsewhere and described != one.parameters):
                yield f"{one.name} takes {one.parameters} and describes {described}"
            continue
        if _is_inherited(one) or one.decorators & {"property", "cached_property", "overload"}:
            continue
        if one.names("Parameters") != one.parameters:
            yield f"{one.name} takes {one.parameters} and describes {one.names('Parameters')}"
        returns = ast.unparse(one.node.returns) if one.node.returns else "None"
        if (
            returns not in ("None", "Self", "Iterator[None]")
            and not one.sections.keys() & {"Returns", "Yields"}
            and summary[:7] != "Return "
        ):
            yield f"{one.name} does not say what it returns"
        if _raises(one.node) and "Raises" not in one.sections:
            yield f"{one.name} does not say what it raises"


def test_public_objects_are_found() -> None:
    assert {"cur", "deim_cur"} <= {one.name for one in PUBLIC["decompose.py"]}
    assert "Statistics.load" in {one.name for one in PUBLIC["integrations/measure/statistics.py"]}


@pytest.mark.parametrize("module", MODULES)
def test_texts_stand_alone(module: str) -> None:
    """Whatever is described, also of what is not public."""
    nodes = ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    assert not _texts_at_fault([Documented(node, None) for node in nodes if isinstance(node, Described)])


def test_help_stands_alone() -> None:
    assert {"Text.window_length", "BudgetSettings.seed", "PaperSettings.importance"} <= SETTINGS.keys()
    assert not {field: text for field, text in SETTINGS.items() if _is_fragment(text)}


@pytest.mark.parametrize("module", MODULES)
def test_sections_are_complete(module: str) -> None:
    assert not list(_sections_at_fault(PUBLIC[module]))


@pytest.mark.parametrize("module", CORE)
def test_functions_of_the_core_are_whole(module: str) -> None:
    """As above, and what a call checks is among the errors; the example is run as a doctest."""
    functions = [one for one in PUBLIC[module] if isinstance(one.node, ast.FunctionDef) and one.owner is None]
    assert functions
    for one in functions:
        said = one.sections
        assert sorted(one.names("Parameters")) == sorted(name.lstrip("*") for name in one.parameters), one.name
        for head, text in said.get("Parameters", ()):
            assert re.match(r"[A-Z`\"']", text), f"{one.name}, {head}"
        assert said.get("Returns"), one.name
        calls = [ast.unparse(part.func) for part in ast.walk(one.node) if isinstance(part, ast.Call)]
        refuses = any(isinstance(part, ast.Raise) for part in ast.walk(one.node)) or any(
            "check" in call for call in calls
        )
        assert said.get("Raises") or not refuses, one.name
        assert ">>> " in (ast.get_docstring(one.node) or "").partition("Examples\n--------\n")[2], one.name


def test_fragments_are_found() -> None:
    source = '"""Do.\n\nParameters\n----------\nrank : int\n    Of the order.\n\nReturns\n-------\nint\n    It.\n"""'
    node = ast.parse(f"def f(rank):\n    {source}").body[0]
    assert isinstance(node, ast.FunctionDef)
    found = Documented(node, None)
    assert found.sections == {"Parameters": [("rank : int", "Of the order.")], "Returns": [("int", "It.")]}
    assert found.names("Parameters") == found.parameters == ["rank"]
    assert _texts_at_fault([found]) == ["f, rank : int: 'Of the order.'"]
