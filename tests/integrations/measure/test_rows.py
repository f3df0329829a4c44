from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cur.integrations import dataset_texts, read_text, token_windows
from tests.models import tokenizer

TALK = [{"role": "user", "content": "w4 w5"}, {"role": "assistant", "content": "w6"}]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines([{"text": "w4 w5", "id": 1}, {"text": None}, {"text": ""}, {"text": "w6"}])),
        ("a.ndjson", lines(["w4 w5", None, "w6"])),
        ("a.json", json.dumps([{"text": "w4 w5"}, {"text": "w6"}])),
        ("b.json", lines([{"text": "w4 w5"}, {"text": "w6"}])),  # as many are called
        ("a.csv", '\ufeffid,text\n1,"w4 w5"\n2,\n3,w6\n'),
        ("a.TSV", "text\tid\nw4 w5\t1\nw6\t2\n"),
    ],
)
def test_rows_of_files_are_read_by_their_column(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(tmp_path / name) == ["w4 w5", "w6"]


def test_a_column_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines([{"text": "w4", "body": "w5\u2028w6"}]))
    assert read_text(file, column="body") == ["w5\u2028w6"]
    with pytest.raises(ValueError, match=r"has no column 'head'; it has 'text', 'body': name one"):
        read_text(file, column="head")
    (tmp_path / "a.txt").write_text("w4")
    with pytest.raises(ValueError, match="has no columns"):
        read_text(tmp_path / "a.txt", column="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines([{"body": "w4"}]), "has no column 'text' or 'messages'; it has 'body'"),
        ("a.jsonl", '{"text": "w4"}\nbraces {\n', "is not JSON .line 2"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "3", "must hold rows with columns, or texts, got int"),
        ("a.jsonl", lines([{"text": ["w4", "w5"]}]), "column 'text' must hold text, or messages"),
        ("a.jsonl", lines([{"text": None}]), "is empty"),
        ("a.csv", "w4 w5\nw6\n", "has no column 'text' or 'messages'; it has 'w4 w5'"),
        ("a.csv", "text\nw4, w5\n", "has more cells in line 2 than columns"),
        ("a.csv", 'text\n"w4\n', "is no table"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_text(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_halves_of_characters_and_marks_of_order_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w4 \\ud800 w5"}')
    assert token_windows(tokenizer(), read_text(tmp_path / "a.jsonl"), length=3).tolist() == [[4, 3, 5]]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfw4 w5")
    assert token_windows(tokenizer(), read_text(tmp_path / "a.txt"), length=2).tolist() == [[4, 5]]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_text(tmp_path / "a.jsonl")


def test_conversations_are_written_out_by_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": TALK}, {"messages": TALK}]))
    found = read_text(tmp_path / "a.jsonl")
    assert found == [TALK, TALK]
    words = tokenizer()
    with pytest.raises(ValueError, match="chat holds messages, and the tokenizer has no chat template"):
        token_windows(words, found, length=4, name="chat")
    words.chat_template = TEMPLATE
    assert token_windows(words, found, length=5).tolist() == [[4, 5, 9, 6, 9], [4, 5, 9, 6, 9]]
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses: roles must alternate"):
        token_windows(words, found, length=5)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], list[Any]]:
    """Let a stand-in for the package return rows; what it is asked for comes back."""

    def install(rows: list[Any]) -> list[Any]:
        calls: list[Any] = []
        module = ModuleType("datasets")

        def load_dataset(*args: Any, **options: Any) -> list[Any]:
            calls.append((args, options))
            return rows

        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return install


def test_rows_of_data_sets(datasets: Callable[[list[Any]], list[Any]]) -> None:
    datasets([{"text": "w4"}, {"text": None}, {"text": "w5"}])
    assert list(dataset_texts("x/y", count=2)) == ["w4", "w5"]
    datasets([{"messages": TALK, "id": 1}])
    assert list(dataset_texts("x/y", count=1)) == [TALK]
    datasets([{"text": TALK}])
    assert list(dataset_texts("x/y", count=None)) == [TALK]
    datasets([{"text": 3}])
    with pytest.raises(ValueError, match=r"data set 'x/y': column 'text' must hold text, or messages .* got 3"):
        list(dataset_texts("x/y"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_tables_are_read_by_the_package(
    name: str, datasets: Callable[[list[Any]], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    calls = datasets([{"text": "w4"}])
    assert read_text(tmp_path / name) == ["w4"]
    assert calls[0][0] == (Path(name).suffix.removeprefix("."),)
    assert calls[0][1]["data_files"] == str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_text(tmp_path / name)
