"""The package as it is shipped: what importing it loads, what it exports, what its metadata say."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cur

FRAMEWORKS = (
    "torch",
    "transformers",
    "jax",
    "cupy",
    "dask",
    "matplotlib",
    "typer",
    "rich",
    "tqdm",
    "datasets",
)


def imported_modules(statement: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a new interpreter that has run `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_no_framework():
    assert imported_modules("import cur").isdisjoint(FRAMEWORKS)


def test_factoring_a_numpy_array_loads_no_framework():
    loaded = imported_modules("import numpy, cur\ncur.deim_cur(numpy.eye(6), rank=2)")
    assert loaded.isdisjoint(FRAMEWORKS)


def test_the_check_on_imports_can_fail():
    pytest.importorskip("rich")
    assert "rich" in imported_modules("import cur, rich")


def test_imports_point_one_way():
    """The contracts of pyproject.toml: no circle, and no arrow back up between rooms."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_all_is_sorted_and_names_every_public_object():
    assert list(cur.__all__) == sorted(cur.__all__)
    assert len(set(cur.__all__)) == len(cur.__all__)
    for name in cur.__all__:
        assert hasattr(cur, name), name


def test_star_import_leaves_out_no_public_object():
    """Of modules it binds some; those that others were imported from are no names of the package."""
    namespace: dict[str, object] = {}
    exec("from cur import *", namespace)
    public = {name for name, value in vars(cur).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public
    assert {name for name in namespace if name[0] != "_" and not isinstance(namespace[name], ModuleType)} == public


@pytest.mark.parametrize("name", ["CUR", "Certificate", "cur", "deim", "deim_cur", "interpolative", "weights"])
def test_documented_names_are_exported(name):
    assert name in cur.__all__


def test_types_are_shipped():
    assert importlib.resources.files("cur").joinpath("py.typed").is_file()


def test_version_is_the_distribution_s():
    assert cur.__version__ == importlib.metadata.version("cur-decomposition")


def test_core_requires_three_packages_only():
    requirements = importlib.metadata.requires("cur-decomposition") or []
    core = {line.split(">=")[0] for line in requirements if "extra ==" not in line}
    assert core == {"array-api-compat", "numpy", "scipy"}
