from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from cur.healing import HealingConfig, Objectives
from cur.integrations import BudgetConfig, CompressConfig
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.healing import HealingSettings, ObjectiveSettings
from cur.settings.option import options_of, setting
from cur.settings.reading import parse_layers, parse_names


@dataclass(frozen=True, kw_only=True)
class Toy:
    heading: ClassVar[str] = "Toys"

    wheels: int = field(default=4, metadata=setting("How many."))
    top_speed: float | None = field(default=None, metadata=setting("How fast.", flag="--speed", heading="Motion"))
    loud: bool = field(default=False, metadata=setting("Whether it is."))
    silent: bool | None = field(default=None, metadata=setting("Whether it is.", flag="--silent/--noisy"))
    place: Path | None = field(default=None, metadata=setting("Where."))
    colours: str | tuple[str, ...] = field(default=(), metadata=setting("Which.", read=parse_names))
    inner: int = 7


def test_an_option_is_what_its_field_says() -> None:
    found = {each.name: each for each in options_of(Toy)}
    assert list(found) == ["wheels", "top_speed", "loud", "silent", "place", "colours"]
    assert [each.flags for each in found.values()] == [
        ("--wheels",), ("--speed",), ("--loud", "--no-loud"), ("--silent", "--noisy"), ("--place",), ("--colours",)
    ]  # fmt: skip
    assert [each.typed for each in found.values()] == [int, float, bool, bool, Path, str]
    assert [each.default for each in found.values()] == [4, None, False, None, None, ()]
    assert found["top_speed"].table == "motion"
    assert found["top_speed"].key == "speed"
    assert {each.table for name, each in found.items() if name != "top_speed"} == {"toys"}


@pytest.mark.parametrize(
    ("checked", "settings"),
    [
        (CompressConfig, PaperSettings),
        (BudgetConfig, BudgetSettings),
        (HealingConfig, HealingSettings),
        (Objectives, ObjectiveSettings),
    ],
)
def test_configurations_have_the_options_of_their_settings(checked: type, settings: type) -> None:
    options = list(options_of(checked))
    assert options == list(options_of(settings))
    for each in options:
        assert each.option.help.endswith(".")
        assert f"{each.name}" in str(checked.__doc__)
        assert getattr(checked, each.name) == each.default


@pytest.mark.parametrize("text", ["ten", "3-", "", ","])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--layers must be a number of blocks, indices such as 3,5-8, or all, got"):
        parse_layers(text)
