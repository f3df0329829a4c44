from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cur.integrations import Statistics


@pytest.fixture
def measured() -> Statistics:
    shared = torch.rand(3, 3, dtype=torch.float64)
    own = torch.rand(2, 2, dtype=torch.float64)
    diagonal = shared.diagonal()
    return Statistics(
        tokens=10,
        samples=2,
        square_sums={"a.q": diagonal, "a.k": diagonal, "a.o": own.diagonal()},
        products={"a.q": shared, "a.k": shared, "a.o": own},
        counts={"a.q": 10, "a.k": 10, "a.o": 20},
        output_products={"a.q": torch.rand(4, 4, dtype=torch.float64)},
        output_counts={"a.q": 7},
        angles=torch.tensor([[0, 0.25, 0.5], [0.25, 0, 0.125], [0.5, 0.125, 0]], dtype=torch.float64),
        layers=("a", "b"),
        text_hash="abc",
        model="tiny",
    )


def test_round_trip(measured: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    measured.save(file)
    loaded = Statistics.load(file)
    for part in dataclasses.fields(Statistics):
        ours, theirs = getattr(measured, part.name), getattr(loaded, part.name)
        if part.name in ("square_sums", "products", "output_products"):
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        elif part.name == "angles":
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs, part.name
    assert loaded.versions["torch"] == torch.__version__.partition("+")[0] or "+" in loaded.versions["torch"]
    assert loaded.angular == {0: 0.25, 1: 0.125}
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_shared_sums_are_stored_once_and_stay_shared(measured: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    measured.save(file)
    with safe_open(file, framework="pt") as content:
        keys = set(content.keys())
    assert keys == {
        "angles",
        "square_sums/a.q",
        "square_sums/a.o",
        "products/a.q",
        "products/a.o",
        "output_products/a.q",
    }
    loaded = Statistics.load(file)
    assert loaded.products["a.q"] is loaded.products["a.k"]


def test_moments_are_means(measured: Statistics) -> None:
    assert torch.equal(measured.second_moment("a.o"), measured.products["a.o"] / 20)
    assert torch.equal(measured.output_moment("a.q"), measured.output_products["a.q"] / 7)
    with pytest.raises(KeyError, match=r"no gradients .*of 'a.o'"):
        measured.output_moment("a.o")


def test_it_is_frozen_and_says_what_it_is(measured: Statistics) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured.tokens = 11  # type: ignore[misc]
    assert repr(measured) == ("Statistics(model='tiny', tokens=10, samples=2, modules=3, moments='full', layers=2)")


def test_without_blocks_there_are_no_angles(tmp_path: Path) -> None:
    plain = Statistics(tokens=1, samples=1, square_sums={"a": torch.ones(2, dtype=torch.float64)}, counts={"a": 1})
    assert plain.angular == {}
    plain.save(tmp_path / "stats.safetensors")
    assert Statistics.load(tmp_path / "stats.safetensors").angles is None


def test_a_failed_save_leaves_the_old_file(
    measured: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stats.safetensors"
    measured.save(file)
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cur.integrations.measure.statistics.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        measured.save(file)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_what_cannot_be_read_says_so(measured: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        Statistics.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(file)
    save_file({"weight": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="does not hold calibration statistics"):
        Statistics.load(file)
    measured.save(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(file)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    metadata = {"format": "cur-statistics", "format_version": "2", "facts": json.dumps({})}
    save_file({"angles": torch.ones(1)}, file, metadata=metadata)
    with pytest.raises(ValueError, match="has format 2, this version of the package reads up to 1; upgrade"):
        Statistics.load(file)
