from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from cur import ranks
from cur.integrations.plan.entry import METHODS, PlanEntry, read_entry
from cur.integrations.plan.methods import (
    CUREntry,
    NeuronsBeforeEntry,
    NeuronsEntry,
    RoundedEntry,
    RowsEntry,
    WeightedEntry,
)
from cur.integrations.plan.plan import FORMAT_VERSION, Plan, PlanError, fingerprint

NAME = "model.layers.1.self_attn.q_proj"


def entry(**changes: Any) -> PlanEntry:
    return read_entry({"name": NAME, "shape": (32, 32), "rank": 5, **changes})


@pytest.fixture
def plan(llama: PreTrainedModel) -> Plan:
    return Plan(
        entries=(entry(), entry(name="model.layers.1.mlp.gate_proj", shape=(48, 32), layout="interpolative")),
        fingerprint=fingerprint(llama),
        model="a model",
        seed=3,
        calibration="0" * 64,
        calibration_tokens=10,
        angular={0: 0.1, 1: 0.2},
        versions={"torch": "2"},
    )


def test_json_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("layout", ["cur", "folded", "interpolative"])
def test_parameters_are_those_of_the_layout(layout: str) -> None:
    assert entry(layout=layout).parameters == ranks.parameters(32, 32, 5, layout=layout)
    assert entry(layout=layout).dense_parameters == 32 * 32


def test_a_rank_can_be_edited_alone(plan: Plan) -> None:
    data = plan.to_dict()
    data["entries"][0]["rank"] = 7
    edited = Plan.from_dict(data)
    assert edited.entries[0].parameters == ranks.parameters(32, 32, 7)
    assert edited.parameters > plan.parameters
    assert edited.dense_parameters == plan.dense_parameters


def test_check_accepts_its_own_model_in_any_dtype(plan: Plan, llama: PreTrainedModel) -> None:
    plan.check(llama)
    plan.check(llama.bfloat16())


def test_a_plan_for_another_model(plan: Plan, make_model: Any) -> None:
    with pytest.raises(PlanError, match=r"the plan names .* for another model"):
        plan.check(make_model("gpt2"))
    wide = replace(plan, entries=(entry(shape=(64, 32)),))
    with pytest.raises(PlanError, match=r"expects model\.layers\.1.* of shape \(64, 32\), this model has"):
        wide.check(make_model("llama"))
    with pytest.raises(PlanError, match=r"made for another model \(a model\)"):
        replace(plan, fingerprint="f" * 64).check(make_model("llama"))


def test_fingerprint_sees_shapes_only(make_model: Any) -> None:
    assert fingerprint(make_model("llama", seed=0)) == fingerprint(make_model("llama", seed=1))
    assert fingerprint(make_model("llama")) != fingerprint(make_model("qwen2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 33}, "`rank` of .* between 1 and 32, the largest of 32 x 32 in the layout .cur., got 33"),
        ({"rank": 0}, "`rank`"),
        ({"rank": True}, "`rank`"),
        ({"rank": 2.0}, "`rank`"),
        ({"shape": (32,)}, "`shape`"),
        ({"shape": (32, -1)}, "`shape`"),
        (
            {"layout": "lu"},
            "`layout` of .* must be one of cur, folded, interpolative, embedding for the method 'cur', got 'lu'",
        ),
        ({"layout": "inputs"}, "`layout` of .* for the method 'cur', got 'inputs'"),
        ({"layout": ["cur"]}, "`layout`"),
        ({"method": "luck"}, "`method` of .* must be one of cur, weighted, rows, rounded, neurons, got 'luck'"),
        ({"method": 3}, "`method`"),
        (
            {"method": "rows", "layout": "cur"},
            "`layout` of .* must be one of interpolative, embedding for the method 'rows'",
        ),
        (
            {"gradients": True},
            "`gradients` of .* is for the method 'weighted' or 'rows' or 'rounded' or 'neurons' alone, got True",
        ),
        ({"method": "weighted", "link": "covariance"}, "`link` of .* is for the method 'cur' alone, got 'covariance'"),
        ({"method": "weighted", "gradients": 1}, "`gradients` of .* must be true or false, got 1"),
        ({"method": "weighted", "damping": -1}, "`damping` of .* at least 0, got -1"),
        ({"consumer": "down"}, "`consumer` of .* is for the method 'neurons' alone"),
        ({"method": "neurons", "layout": "outputs"}, "lacks consumer"),
        ({"method": "neurons", "layout": "inputs", "consumer": "down"}, "in the layout 'inputs' .* it must be null"),
        ({"importance": "luck"}, "`importance`"),
        ({"link": "luck"}, "`link`"),
        ({"subspace": "luck"}, "`subspace`"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        entry(**changes)


def test_a_module_named_twice() -> None:
    with pytest.raises(PlanError, match="more than once"):
        Plan(entries=(entry(), entry()), fingerprint="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=FORMAT_VERSION + 1), "format version .* upgrade"),
        (lambda d: d.pop("format_version"), "`format_version`"),
        (lambda d: d.update(colour="blue"), "the plan has unknown fields: colour"),
        (lambda d: d["entries"][0].update(colour="blue"), "entry .* has unknown fields: colour"),
        (lambda d: d.pop("fingerprint"), "the plan lacks fingerprint"),
        (lambda d: d["entries"][0].pop("rank"), "entry .* lacks rank"),
        (lambda d: d["entries"][0].update(shape=3), "`shape`"),
        (lambda d: d.update(own_text="0.5"), "`own_text` must be a finite multiple"),
        (lambda d: d.update(own_text=True), "`own_text` must be a finite multiple"),
    ],
)
def test_malformed_plans(plan: Plan, change: Any, message: str) -> None:
    data = plan.to_dict()
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_plans_of_the_first_version_knew_no_share_of_own_text(plan: Plan) -> None:
    for before, now in ((False, 0.0), (True, 1.0)):
        read = Plan.from_dict({**plan.to_dict(), "format_version": 1, "own_text": before})
        assert read.own_text == now
        assert type(read.to_dict()["own_text"]) is float


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(PlanError, match="must be a JSON object, got list"):
        Plan.load(path)


COMMON = {"name": NAME, "shape": [32, 32], "predicted": 0.25}
DEFAULTS = {"importance": "wanda", "link": "optimal", "subspace": "exact", "gradients": False, "damping": 0.0}
# As they were written while entries of all methods were of one class.
WRITTEN: list[tuple[type[PlanEntry], dict[str, Any]]] = [
    (CUREntry, {"rank": 5, "layout": "cur", "importance": "magnitude", "subspace": "randomised", "parameters": 345}),
    (WeightedEntry, {"rank": 5, "layout": "interpolative", "gradients": True, "damping": 0.1, "parameters": 295}),
    (RowsEntry, {"rank": 5, "layout": "interpolative", "parameters": 295}),
    (NeuronsEntry, {"rank": 20, "layout": "inputs", "inner_rank": 4, "damping": 0.1, "parameters": 192}),
    (NeuronsBeforeEntry, {"rank": 20, "layout": "outputs", "consumer": "down", "parameters": 640}),
]


@pytest.mark.parametrize(("kind", "own"), WRITTEN)
def test_entries_are_written_as_ever(kind: type[PlanEntry], own: dict[str, Any]) -> None:
    order = [
        "name",
        "shape",
        "rank",
        "layout",
        "method",
        *DEFAULTS,
        "consumer",
        "inner_rank",
        "predicted",
        "parameters",
    ]
    filled = {**COMMON, **DEFAULTS, "consumer": None, "inner_rank": None, "method": kind.method, **own}
    read = read_entry(filled)
    assert type(read) is kind
    assert json.dumps(read.to_dict()) == json.dumps({key: filled[key] for key in order})


def test_the_former_class_of_all_entries_still_makes_them() -> None:
    with pytest.warns(DeprecationWarning, match="one of cur.integrations.plan.methods"):
        made = PlanEntry(**{**COMMON, "rank": 20, "layout": "inputs", "method": "neurons"})
    assert made == NeuronsEntry(name=NAME, shape=(32, 32), neurons=20, predicted=0.25)
    assert isinstance(made, PlanEntry)
    with pytest.warns(DeprecationWarning, match="no field `rank` any more"):
        assert made.rank == 20
    with pytest.warns(DeprecationWarning, match="no field `importance` any more"):
        assert made.importance == "wanda"
    with pytest.raises(AttributeError, match="colour"):
        made.colour  # noqa: B018


def test_every_method_is_registered_with_its_layouts() -> None:
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    assert kinds == {RoundedEntry, *(kind for kind, _ in WRITTEN)}  # which is later than the one class of all
    assert all(kind.layouts() for kind in kinds)
