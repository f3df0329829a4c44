from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cur.integrations import BudgetConfig, CompressConfig, CompressionReport, compress, save
from cur.integrations.report import page
from cur.integrations.report.page import report_page
from tests.models import FAMILIES, batch, make


class Reader(HTMLParser):
    """Collects what a page refers to, its ids, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids[value or ""] += 1
            if key in ("src", "href", "xlink:href", "data"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


@pytest.fixture
def report(llama: PreTrainedModel, windows: torch.Tensor) -> CompressionReport:
    done = compress(llama, windows, CompressConfig(layers=2, rank=6))
    return replace(done, perplexity={"before, held-out": 10.0, "after, held-out": 12.34})


def test_the_page_is_one_file_that_needs_nothing(report: CompressionReport) -> None:
    page = report_page(report)
    reader = read(page)
    assert all(link.startswith("#") for link in reader.links)
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert all(count == 1 for count in reader.ids.values())
    # A picture refers to parts by the ids that are salted for it alone.
    targets = {link[1:] for link in reader.links}
    assert targets
    assert all(reader.ids[target] == 1 for target in targets)


def test_it_shows_what_was_done(report: CompressionReport) -> None:
    page = report_page(report)
    text = " ".join(read(page).text)
    for heading in (
        "Size",
        "Seconds",
        "How far each block turns",
        "Singular values",
        "Rank of each layer",
        "Error of each layer",
        "Change of each layer's output",
    ):
        assert heading in text
    assert all(layer.name in text for layer in report.layers)
    assert f"{report.after.parameters:,}" in text
    assert "12.34" in text
    assert "<svg" in page
    assert page.count("<svg") == 6


def test_pictures_take_the_colour_of_the_text(report: CompressionReport) -> None:
    page = report_page(report)
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("#000000") == page.count("#ffffff") == 0


def test_what_was_not_measured_is_left_out(report: CompressionReport) -> None:
    layers = tuple(replace(layer, output=None, spectrum=()) for layer in report.layers)
    plan = replace(report.plan, angular={}, model="<b>sly</b>")
    page = report_page(replace(report, layers=layers, plan=plan, perplexity={}))
    text = " ".join(read(page).text)
    for heading in ("Singular values", "Change of each", "How far", "Perplexity"):
        assert heading not in text
    assert "<b>sly" not in page


@pytest.mark.parametrize("name", ["mixtral", "t5", "vit"])
def test_other_families(name: str) -> None:
    report = compress(make(name), [batch(name)], CompressConfig(layers=2, rank=3, targets=FAMILIES[name].targets))
    assert report.layers
    assert all(layer.output is not None for layer in report.layers)
    text = " ".join(read(report_page(report)).text)
    if name == "t5":
        assert "decoder layer.EncDecAttention.k" in text or "encoder layer.SelfAttention.q" in text


def test_a_budget(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    report = compress(llama, windows, BudgetConfig(keep=0.7, own_text=0))
    assert "The budget left" in report_page(report)


def test_it_is_saved_where_it_can_be_drawn(
    llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compress(llama, windows, CompressConfig(layers=2, rank=6))
    save(llama, None, tmp_path / "with", report=report)
    assert (tmp_path / "with" / "report.html").read_text() == report_page(report)
    monkeypatch.setattr(page, "can_draw", lambda: False)
    save(llama, None, tmp_path / "without", report=report)
    assert not (tmp_path / "without" / "report.html").exists()
    with pytest.raises(ImportError, match="pictures need matplotlib; type: pip install"):
        report_page(report)
