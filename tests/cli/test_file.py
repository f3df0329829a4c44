from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cur.cli import groups as g
from cur.cli.file import read_file, save_file
from cur.integrations import BudgetConfig, CompressConfig
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.option import Named, options_of

GROUPS = (g.Model, g.Destination, BudgetSettings, PaperSettings, g.CompressionText, g.HeldOutText, g.Loading)


def options() -> list[Named]:
    return list({each.name: each for group in GROUPS for each in options_of(group)}.values())


def read(path: Path, text: str | bytes) -> dict[str, Any]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_file(path, "cur compress", options())


def test_values_are_those_of_the_fields(tmp_path: Path) -> None:
    found = read(
        tmp_path / "run.toml",
        """
        [budget]
        keep = 0.8
        target-size = "200MB"
        gradient-checkpointing = true
        [paper]
        layers = [3, 5]
        for = "training"
        [method]
        targets = ["q_proj", "k_proj"]
        exclude = "lm_head,up_proj"
        seed = 3
        [text]
        text = "~/notes.txt"
        [loading]
        low-memory = false
        """,
    )
    assert found == {
        "keep": 0.8,
        "size": 200_000_000,
        "gradient_checkpointing": True,
        "layers": (3, 5),
        "purpose": "training",
        "targets": ("q_proj", "k_proj"),
        "exclude": ("lm_head", "up_proj"),
        "seed": 3,
        "text": Path.home() / "notes.txt",
        "low_memory": False,
    }
    assert read(tmp_path / "run.toml", '[paper]\nlayers = "3,5-7"\nrank = 8\n')["layers"] == (3, 5, 6, 7)
    number = read(tmp_path / "run.toml", "[budget]\ncorrection = 1\n")["correction"]
    assert (number, type(number)) == (1.0, float)


@pytest.mark.parametrize(
    "config",
    [
        BudgetConfig(size=10**8, own_text=0, targets=("q_proj",), neurons=False, seed=4),
        CompressConfig(layers=(3, 5), energy=0.9, layout="auto", exclude=("up_proj",)),
        CompressConfig(),
    ],
)
def test_what_is_saved_is_read_again(config: Any, tmp_path: Path) -> None:
    groups = [
        g.Model(model="a model"),
        g.Destination(out=Path("out")),
        config,
        g.CompressionText(text=Path("a b.txt"), windows=3),
        g.HeldOutText(),
        g.Loading(low_memory=True),
    ]
    save_file(tmp_path / "new" / "run.toml", groups)
    found = read_file(tmp_path / "new" / "run.toml", "cur compress", options())
    for group in groups:
        given = {each.name: found[each.name] for each in options_of(type(group)) if each.name in found}
        assert type(group)(**given) == group
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[budget]\nkeep = \n", "must be a TOML file: .*at line 2.*; mend that line"),
        (b"# a\n# \xff", "must be a TOML file in UTF-8, which line 2 is not; mend that line"),
        ("[budgets]\nkeep = 0.8\n", r": \[budgets\] is no heading of cur compress; the nearest is budget"),
        ("[budget]\nkep = 0.8\n", r", \[budget\]: kep is no option of cur compress; the nearest is keep"),
        ("[text]\nkeep = 0.8\n", r", \[text\]: keep belongs under \[budget\]"),
        ("keep = 0.8\n", r": keep must stand under its heading, \[budget\]"),
        ("[budget]\nxyz = 0.8\n", r"xyz is no option of cur compress; there are bits, correction, gradient-"),
        (
            '[budget]\nkeep = "much"\n',
            r", \[budget\] keep must be a number, got \'much\'; write for instance keep = 0.5",
        ),
        ("[budget]\nneurons = 1\n", r"\[budget\] neurons must be true or false, got 1"),
        ("[text]\nwindows = 1.5\n", r"\[text\] windows must be an integer, got 1.5"),
        ("[text]\nwindows = true\n", r"\[text\] windows must be an integer, got True"),
        ("[text]\ntext = 3\n", r"\[text\] text must be a path, got 3"),
        ('[budget]\ntarget-size = "much"\n', r"\[budget\] target-size: --size must be a number of bytes"),
        ("[budget]\ntarget-size = 1.5\n", r"target-size must be an integer or text, got 1.5"),
        ("[paper]\nlayers = {}\n", r"\[paper\] layers must be an integer or text or a list, each an integer, got {}"),
        ('[paper]\nlayers = [3, "all"]\n', r"\[paper\] layers must be .* or a list, each an integer, got \[3, 'all'\]"),
        ("[method]\nexclude = [3]\n", r"\[method\] exclude must be text or a list, each text, got \[3\]"),
        ("[text]\nwindows = [3]\n", r"\[text\] windows must be an integer, got \[3\]; write for instance windows = 8"),
    ],
)
def test_what_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "run.toml", text)
    assert str(tmp_path / "run.toml") in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"{path} cannot be read: {reason}; name a TOML file with --config"):
            read_file(path, "cur compress", options())
