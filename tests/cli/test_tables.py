from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich")

from rich.console import Console

from cur.cli.tables import checkpoint_table, layers_table, plan_table
from cur.integrations.plan.methods import CUREntry, NeuronsEntry


def layer(name: str, **others: Any) -> Any:
    given = {"layout": "inputs", "shape": (1536, 576), "ranks": (1382, None)}
    given |= {"weighted_error": 0.1, "weighted_bound": 0.1}
    kept = {"parameters_after": 700, "parameters_before": 1000, "certificate": {"relative": 0.1, "scale": 2.0}}
    return SimpleNamespace(grid=None, name=name, **{**given, **kept, **others})


def printed(table: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_layer_takes_one_line_of_80_columns() -> None:
    names = [f"model.layers.{block}.{part}" for block in (9, 17) for part in ("self_attn.q_proj", "mlp.down_proj")]
    text = printed(layers_table([layer(name, ranks=(1382, 410)) for name in names]), 80)
    assert "Compressed layers, all in model.layers" in text
    for name in names:
        (line,) = (line for line in text.splitlines() if f" {name.removeprefix('model.layers.')} " in line)
        assert line.split()[-6:] == ["1382,", "410", "70.0%", "0.100", "0.100", "0.100"]
    assert "bound:" not in text


def test_so_does_a_layer_of_a_plan_and_of_a_checkpoint() -> None:
    common: dict[str, Any] = {"name": "model.layers.17.self_attn.q_proj", "shape": (1536, 576), "predicted": 1.5e-4}
    entries = (
        NeuronsEntry(**{**common, "neurons": 1382, "inner_rank": 410, "shape": (576, 1536)}),
        CUREntry(**{**common, "name": "model.layers.9.mlp.down_proj", "rank": 500, "layout": "interpolative"}),
    )
    plan: Any = SimpleNamespace(entries=entries, parameters=1_000, dense_parameters=2_000)
    text = printed(plan_table(plan), 80)
    for entry in entries:
        (line,) = (line for line in text.splitlines() if f" {entry.name.removeprefix('model.layers.')} " in line)
        assert line.split()[-1] == "1.50e-04"
        assert entry.layout in line
    shown = ("name", "shape", "layout", "ranks", "parameters", "dense_parameters")
    layers = [
        SimpleNamespace(dtype="bfloat16", grid=None, **{key: getattr(entry, key) for key in shown}) for entry in entries
    ]
    text = printed(checkpoint_table(SimpleNamespace(directory="small", layers=layers)), 80)
    for entry in entries:
        (line,) = (line for line in text.splitlines() if f" {entry.name.removeprefix('model.layers.')} " in line)
        assert line.split()[-1] == "bfloat16"


def test_bounds_have_a_column_where_there_are_some() -> None:
    certificate = {"relative": 0.1, "scale": 2.0, "projection": 3.0}
    text = printed(layers_table([layer("model.layers.3.mlp.up_proj", certificate=certificate)]), 80)
    assert "1.500" in text
    assert "bound: (B1)" in " ".join(text.split())
    assert " up_proj " in text


def test_names_without_a_common_beginning_stay_whole() -> None:
    text = printed(layers_table([layer("encoder.up_proj"), layer("decoder.up_proj")]), 80)
    assert "all in" not in text
    assert "encoder.up_proj" in text
