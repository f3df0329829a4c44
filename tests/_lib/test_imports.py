from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from cur._lib.imports import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "awaited_package"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from awaited_package.inner import there\n")
    (tmp_path / name / "inner.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for known in (name, f"{name}.inner"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    return name


def test_it_is_called_when_the_module_is_complete(package: str) -> None:
    seen: list[bool] = []
    when_imported(package, lambda: seen.append(sys.modules[package].there))
    assert package not in sys.modules
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [True]
    assert Path(str(module.__file__)).name == "__init__.py"
    importlib.import_module(f"{package}.inner")
    assert seen == [True]


def test_it_is_called_at_once_for_a_module_that_is_there(package: str) -> None:
    importlib.import_module(package)
    seen: list[bool] = []
    when_imported(package, lambda: seen.append(True))
    assert seen == [True]


def test_a_module_that_is_not_installed_stays_an_error() -> None:
    before = list(sys.meta_path)
    try:
        when_imported("no_such_package", lambda: None)
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            importlib.import_module("no_such_package")
    finally:
        sys.meta_path[:] = before
