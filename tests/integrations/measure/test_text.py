from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cur.integrations import batches, dataset_texts, embedded_text, read_text, token_windows


class WordTokenizer:
    """One token per word; counts the words it was asked to tokenise."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        words = text.split()
        self.asked += len(words)
        return {"input_ids": [int(word) for word in words]}


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n")} - {""}


def test_embedded_halves_share_no_paragraph() -> None:
    first, second = embedded_text("calibrate"), embedded_text("evaluate")
    assert min(len(first), len(second)) > 150_000
    assert not paragraphs(first) & paragraphs(second)


def test_embedded_text_is_the_language_reference() -> None:
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics.values())
    assert whole.startswith(embedded_text("calibrate"))
    assert paragraphs(embedded_text("evaluate")) <= paragraphs(whole)
    assert paragraphs(embedded_text("calibrate")) | paragraphs(embedded_text("evaluate")) == paragraphs(whole)


def test_embedded_text_refuses_another_half() -> None:
    with pytest.raises(ValueError, match="`half` must be 'calibrate' or 'evaluate', got 'both'"):
        embedded_text("both")  # type: ignore[arg-type]


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("für alle", encoding="utf-8")
    assert read_text(file) == "für alle"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n\t\n", "is empty"), (b"ab\xff", "not UTF-8 .byte 2")],
)
def test_read_text_says_what_is_wrong(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_text(file)
    assert str(file) in str(caught.value)


def test_read_text_refuses_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory"):
        read_text(tmp_path)


def test_windows_are_the_stream_cut_off_the_front() -> None:
    text = " ".join(map(str, range(23)))
    windows = token_windows(WordTokenizer(), text, length=5)  # type: ignore[arg-type]
    assert windows.dtype == torch.int64
    assert torch.equal(windows, torch.arange(20).view(4, 5))
    first = token_windows(WordTokenizer(), text, length=5, count=2)  # type: ignore[arg-type]
    assert torch.equal(first, windows[:2])


def test_windows_from_all_over_the_text() -> None:
    text = " ".join(map(str, range(23)))
    every = token_windows(WordTokenizer(), text, length=2)  # type: ignore[arg-type]
    some = token_windows(WordTokenizer(), text, length=2, count=3, spread=True)  # type: ignore[arg-type]
    assert torch.equal(some, every[[1, 5, 9]])  # the middles of thirds of 11
    again = token_windows(WordTokenizer(), text, length=2, count=11, spread=True)  # type: ignore[arg-type]
    assert torch.equal(again, every)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (256, 10, [4, 12, 20, 28, 36, 44, 52, 60, 68, 71]),  # of 80, of which 8 are left
        (256, 76, list(range(76))),  # no more than is to spare
        (1024, 4, [2, 7, 12, 17]),  # of 20, of which 2 are left
        (4096, 3, [0, 2, 4]),  # of 5: no more than a tenth
    ],
)
def test_the_end_of_a_text_is_left_to_healing(length: int, count: int, expected: list[int]) -> None:
    text = " ".join(map(str, range(80 * 256)))
    some = token_windows(WordTokenizer(), text, length=length, count=count, spread=True)  # type: ignore[arg-type]
    assert (some[:, 0] // length).tolist() == expected


def test_a_stream_of_texts_is_drawn_no_further_than_needed() -> None:
    tokenizer = WordTokenizer()

    def endless() -> Iterator[str]:
        while True:
            yield "1 2 3"

    windows = token_windows(tokenizer, endless(), length=4, count=2)  # type: ignore[arg-type]
    assert windows.tolist() == [[1, 2, 3, 1], [2, 3, 1, 2]]
    assert tokenizer.asked == 9


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("", None, "held-out text is empty"),
        ("1 2 3", None, r"held-out text is too short: it holds 3 tokens, 1 window\(s\) of 4 need 4"),
        ("1 2 3 4 5 6 7", 2, r"it holds 7 tokens, 2 window\(s\) of 4 need 8"),
    ],
)
def test_short_text_is_refused_with_the_counts(text: str, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(WordTokenizer(), text, length=4, count=count, name="held-out text")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"length": 1}, {"length": 4, "count": 0}])
def test_windows_need_sensible_sizes(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}` must be at least"):
        token_windows(WordTokenizer(), "1 2 3 4", **options)  # type: ignore[arg-type]


def test_batches_keep_order_and_the_remainder(windows: torch.Tensor) -> None:
    parts = batches(windows, batch_size=4)
    assert [len(part["input_ids"]) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), windows)
    assert all(part["attention_mask"].all() for part in parts)


def test_batches_refuse_what_is_no_window(windows: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="`windows` must be an integer tensor"):
        batches(windows.float(), batch_size=1)
    with pytest.raises(TypeError, match="`windows` must be an integer tensor"):
        batches(windows[0], batch_size=1)
    with pytest.raises(ValueError, match="at least one token"):
        batches(windows[:0], batch_size=1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        batches(windows, batch_size=0)


def fake_datasets(rows: list[dict[str, str]], calls: list[Any]) -> ModuleType:
    module = ModuleType("datasets")

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        if args[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nmore lines")
        return rows

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_dataset_streams_the_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    rows = [{"text": "a" * n} for n in (3, 1, 4, 1, 5)]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, calls))
    found = list(dataset_texts("allenai/c4", name="en", count=2, min_characters=2))
    assert found == ["aaa", "aaaa"]
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_dataset_errors_name_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"text": "a"}], []))
    with pytest.raises(ValueError, match="'x/y' has no column 'body'; it has 'text'"):
        list(dataset_texts("x/y", column="body"))
    with pytest.raises(ValueError, match=r"'x/y' ended after 1 texts .* 128 were asked for"):
        list(dataset_texts("x/y"))
    with pytest.raises(
        ValueError, match=r"'no/such' .* could not be opened: Dataset 'no/such' doesn't exist"
    ) as caught:
        dataset_texts("no/such")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        dataset_texts("x/y", count=0)


def test_dataset_without_the_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install"):
        dataset_texts("allenai/c4")
