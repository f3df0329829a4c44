"""Options that are made from fields: their defaults, their help, and what goes before what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from cur.cli import groups as g
from cur.cli.app import app
from cur.cli.command import command
from cur.cli.given import Given
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.healing import HealingSettings, ObjectiveSettings
from cur.settings.option import Named, options_of

COMMANDS: dict[str, tuple[type, ...]] = {
    "compress": (
        g.Model, g.Destination, g.PlanSource, BudgetSettings, PaperSettings, g.CompressionText, g.HeldOutText, g.Loading
    ),
    "plan": (g.Model, g.PlanDestination, BudgetSettings, PaperSettings, g.CompressionText, g.Opening),
    "quantize": (g.Checkpoint, g.Destination, g.CalibrationText, g.Passes),
    "heal": (g.Checkpoint, g.Destination, HealingSettings, ObjectiveSettings, g.HealingText, g.HealingRun),
    "evaluate": (g.Model, g.ScoredText, g.Loading),
}  # fmt: skip
FIELDS = [
    pytest.param(name, each, id=f"{name} {each.flag}")
    for name, groups in COMMANDS.items()
    for each in {each.name: each for group in reversed(groups) for each in options_of(group)}.values()
]
MATTER = (
    "--model --out --plan --keep --size --bits --tol --text --held-out --low-memory --device --overwrite "
    "--json --config --save-config --help-all"
)
LINES = 40
COLUMNS = 100


def parameters(name: str) -> dict[str, Any]:
    commands: Any = typer.main.get_command(app)
    return {each.name: each for each in commands.commands[name].params}


def shown(*arguments: str, columns: int = COLUMNS) -> list[str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)})
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "each"), FIELDS)
def test_an_option_has_the_default_and_the_help_of_its_field(name: str, each: Named) -> None:
    found = parameters(name)
    if each.option.argument is not None:
        assert found[f"{each.name}_argument"].metavar == each.option.argument
        if each.option.short is None:
            return
    option = found[each.name]
    assert option.rich_help_panel == each.heading
    assert tuple(option.opts) == (each.flags[0], *([each.option.short] if each.option.short else []))
    assert tuple(option.secondary_opts) == each.flags[1:]
    if each.option.argument is None:
        assert option.help.removesuffix(" Required.") == each.option.help
    if each.option.read is None:
        assert option.default == each.default
    elif each.default not in (None, ()):
        assert each.option.shown  # help says it in words


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_the_rest_stands_under_headings(name: str) -> None:
    brief, whole = shown(name, "--help"), shown(name, "--help-all")
    assert len(brief) <= LINES
    text, brief_text = "\n".join(whole), "\n".join(brief)
    headings = set()
    for group in COMMANDS[name]:
        for each in options_of(group):
            if each.option.argument is None or each.option.short is not None:
                assert f" {each.flag} " in text
                assert (f" {each.flag} " in brief_text) is each.option.basic
                headings.add(each.heading)
    for heading in headings:
        assert f"─ {heading} ─" in text
        assert f"─ {heading} ─" not in brief_text


def test_the_options_that_matter_are_on_the_first_screen() -> None:
    text = "\n".join(shown("compress", "--help"))
    for flag in re.findall("[^ ]+", MATTER):
        assert f" {flag} " in text


def toy(monkeypatch: pytest.MonkeyPatch) -> tuple[typer.Typer, list[Any]]:
    seen: list[Any] = []
    small = typer.Typer()

    @command(
        small, g.Model, g.Destination, BudgetSettings, PaperSettings, g.Text, example="", gone={"--old": "use --keep"}
    )
    def go(given: Given, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Do it."""
        if given.values.get("seed") == 1:
            raise ValueError("--no-neurons needs --keep")
        if given.values.get("seed") == 2:
            raise ValueError("--seed does not go with --no-neurons")
        if given.values.get("rank") == 13:
            raise ValueError("`rank` must be another, got 13")
        seen.append((given, loud))

    small.callback()(lambda: None)
    monkeypatch.setattr("cur.cli._run._load", lambda: None)
    return small, seen


def test_what_is_typed_goes_before_the_file_and_the_file_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, seen = toy(monkeypatch)
    file = tmp_path / "run.toml"
    file.write_text(
        '[output]\nout = "there"\n[budget]\nkeep = 0.8\nneurons = false\ngradients = false\n[text]\ntext = "a.txt"\n'
        '[method]\nseed = 3\n[model]\nmodel = "one"\n'
    )
    typed = ["go", "--config", str(file), "--keep", "0.7", "--neurons", "--seed", "0", "--loud", "two"]
    assert CliRunner().invoke(small, typed).exit_code == 0
    given, loud = seen.pop()
    assert loud
    assert given.values == {
        "out": Path("there"), "keep": 0.7, "neurons": True, "gradients": False, "text": Path("a.txt"), "seed": 0,
        "model": "two",
    }  # fmt: skip
    assert given.build(g.Text).window_length == 512
    # A budget of another kind takes the place of that in the file, and a data set that of a text.
    typed = ["go", "--config", str(file), "--size", "2MB", "--dataset", "x/y"]
    assert CliRunner().invoke(small, typed).exit_code == 0
    values = seen.pop()[0].values
    assert (values["size"], values["dataset"]) == (2_000_000, "x/y")
    assert not {"keep", "text"} & set(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing: name the directory to create."),
        (["--out", "x", "--old", "3"], "--old is gone: use --keep."),
        (["one", "--model", "two", "--out", "x"], "MODEL is given twice, as 'one' and as --model 'two'; give one."),
        (["--out", "x", "--config", "run.toml"], "run.toml, [paper] rank: `rank` must be another, got 13."),
        (["--out", "x", "--seed", "1", "--config", "run.toml"], "run.toml, [budget] neurons: --no-neurons needs"),
        (["--out", "x", "--seed", "2", "--config", "run.toml"], "Error: --seed does not go with --no-neurons."),
        (["--out", "x", "--rank", "13"], "Error: `rank` must be another, got 13."),
        (["--out", "x", "--size", "much"], "such as 200MB, got 'much'."),
        (
            ["--out", "x", "--config", "none.toml"],
            "none.toml cannot be read: No such file or directory; name a TOML file with --config.",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small, seen = toy(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[paper]\nrank = 13\n[budget]\nneurons = false\n")
    done = CliRunner().invoke(small, ["go", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not seen
