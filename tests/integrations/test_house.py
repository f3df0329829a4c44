"""What somebody adds to the library, from outside of it: each kind in this file, taken the whole way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cur import scores, selection
from cur.cli.app import app
from cur.factors import Folded
from cur.healing.pair.cores import cores_of
from cur.integrations import CompressConfig, Plan, dense_export, save
from cur.integrations.compress import compress
from cur.integrations.convert import convert_
from cur.integrations.factor import MAKERS, Made, Task, maker
from cur.integrations.factor.layer import Factored, factorize_as, plain_certificate
from cur.integrations.nn import (
    LAYOUTS,
    CompressedLinear,
    StoredTensor,
    Stores,
    Trainable,
    compressed_modules,
    factored,
    register,
    swap_,
)
from cur.integrations.plan.entry import METHODS, register_method
from cur.integrations.plan.layouts import choose_layout
from cur.integrations.plan.methods import RankEntry, WeightedEntry
from cur.integrations.plan.plan import PlanError, fingerprint
from cur.integrations.quantize import quantizable
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.export import TARGETS, Target, register_target
from cur.integrations.store.inspect import summarize
from tests.models import TEXT, write

ROOT = Path(__file__).parents[2]
BLOCK = "model.layers.1"


class ScaledPair(CompressedLinear):
    """A toy layer type: ``x -> s * (A (B x)) + bias``, a pair of factors with a scale for each output."""

    layout = "scaled"
    stores: ClassVar[Stores] = {
        "B.weight": StoredTensor(("rank", "inputs")),
        "A.weight": StoredTensor(("outputs", "rank")),
        "s": StoredTensor(("outputs",)),
    }

    def _make_(self, **place: Any) -> None:
        self.B = self._linear(self.in_features, self.rank, **place)
        self.A = self._linear(self.rank, self.out_features, **place)
        self.s = nn.Parameter(torch.ones(self.out_features, **place))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **place)) if self.has_bias else None

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        return min(m, n)

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> ScaledPair:
        place: dict[str, Any] = {"device": right.device, "dtype": right.dtype}
        layer = cls(
            right.shape[1], left.shape[0], right.shape[0], bias=bias is not None, transposed=transposed, **place
        )
        scale = left.norm(dim=1).clamp_min(torch.finfo(left.dtype).tiny)
        values = {"A.weight": left / scale[:, None], "B.weight": right, "s": scale}
        layer.load_state_dict(values if bias is None else {**values, "bias": bias})
        return layer

    @classmethod
    def cells(cls, m: int, n: int, rank: int, inner_rank: int | None = None) -> dict[str, str]:
        return {**super().cells(m, n, rank, inner_rank), "rank": f"{rank}s"}

    @classmethod
    def conversions(cls) -> tuple[str, ...]:
        return (cls.layout, *factored())

    def _converted(self, layout: str) -> CompressedLinear:
        left, right = (factor.detach() for factor in self.two_factors())
        return factored()[layout].from_two_factors(left, right, bias=self.bias_tensor(), transposed=self.transposed)

    def two_factors(self) -> tuple[Tensor, Tensor]:
        return self.s[:, None] * self.A.weight, self.B.weight

    def bias_tensor(self) -> Tensor | None:
        return self.bias

    def factors(self) -> dict[str, nn.Linear]:
        return {}  # between them and the outputs there is the scale

    def trainable(self) -> Trainable:
        left, right = (factor.detach().clone() for factor in self.two_factors())
        return Trainable(self.B.weight, left, right, holds="right")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.s * self.A(self.B(x))
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class ScaledEntry(RankEntry):
    """A toy method: the nearest weight of a rank, with its singular values to a power."""

    method = "scaled svd"

    layout: str = ScaledPair.layout
    power: float = 1.0

    @classmethod
    def layouts(cls) -> Sequence[str]:
        return (ScaledPair.layout, *factored())

    def check(self) -> None:
        super().check()
        if not 0.0 < self.power <= 1.0:
            raise PlanError(f"`power` of {self.name} must be above 0 and at most 1, got {self.power!r}")

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        return f"A toy made {len(entries)} layers."


def make_scaled(task: Task, entry: ScaledEntry, propagated: Any) -> Made:
    """Make the layer of an entry of the toy method."""

    def factor(W: Tensor) -> Factored:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        left, right = U[:, : entry.rank] * s[: entry.rank] ** entry.power, Vh[: entry.rank]
        return Factored(Folded(left, right), plain_certificate(W, left @ right, 0.0))

    module = task.model.get_submodule(entry.name)
    layer, report = factorize_as(factor, module, entry, task.moments, dtype=torch.float64)
    return Made({entry.name: (layer, report)}, layer)


def register_toys() -> None:
    """Make all toys known; in the process of the tests the fixture takes them away again."""
    register(ScaledPair)
    register_method(ScaledEntry)
    maker(ScaledEntry)(make_scaled)


@pytest.fixture
def toys() -> Iterator[None]:
    register_toys()
    yield
    del LAYOUTS[ScaledPair.layout], METHODS[ScaledEntry.method], MAKERS[ScaledEntry]


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output + done.stderr
    return done.stdout


def written(directory: Path) -> Path:
    """Write a dense model, text, and a plan by hand that names the toy method and layout beside one that is known."""
    dense = write("causal", directory / "dense")
    (directory / "text.txt").write_text(TEXT)
    model = AutoModelForCausalLM.from_pretrained(dense)
    plan = {
        "format_version": 3,
        "fingerprint": fingerprint(model),
        "entries": [
            {
                "name": f"{BLOCK}.self_attn.q_proj",
                "shape": [32, 32],
                "rank": 6,
                "method": "scaled svd",
                "layout": "scaled",
                "power": 0.9,
            },
            {"name": f"{BLOCK}.mlp.gate_proj", "shape": [64, 32], "rank": 8},
        ],
    }
    (directory / "plan.json").write_text(json.dumps(plan))
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 20)[None]).logits
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("toys")
def test_a_layer_type_and_a_method_from_outside(tmp_path: Path) -> None:
    home = written(tmp_path)
    text = ("--text", home / "text.txt", "--windows", "6", "--window-length", "16", "--precision", "float32")
    small = home / "small"
    shown = command("compress", home / "dense", "--plan", home / "plan.json", *text, "--out", small)
    assert "6s" in shown
    model = AutoModelForCausalLM.from_pretrained(small)
    expected = logits(model)
    layers = compressed_modules(model)
    assert {name: type(layer).__name__ for name, layer in layers.items()} == {
        f"{BLOCK}.self_attn.q_proj": "ScaledPair",
        f"{BLOCK}.mlp.gate_proj": "CURLinear",
    }

    # plan, report, card and page
    entry = Plan.load(small / "plan.json").entries[0]
    assert entry == ScaledEntry(name=f"{BLOCK}.self_attn.q_proj", shape=(32, 32), rank=6, power=0.9)
    assert entry.parameters == 6 * 64 + 32
    assert "A toy made 1 layers." in (small / "README.md").read_text()
    assert "| 32 x 32 | scaled | 6s | 1,024 | 416 |" in (small / "README.md").read_text()
    page = small / "report.html"
    assert not page.exists() or "<td>scaled</td><td>6s</td>" in page.read_text()

    # a new process
    code = (
        "import sys, torch; from tests.integrations.test_house import logits, register_toys; register_toys(); "
        "from transformers import AutoModelForCausalLM; "
        "torch.save(logits(AutoModelForCausalLM.from_pretrained(sys.argv[1])), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(small), str(home / "logits")], cwd=ROOT, check=True, timeout=300)
    assert torch.equal(torch.load(home / "logits"), expected)

    # inspect
    assert " scaled " in command("inspect", small)
    inspected = {layer["name"]: layer for layer in json.loads(command("inspect", small, "--json"))["layers"]}
    ours = inspected[f"{BLOCK}.self_attn.q_proj"]
    assert (ours["layout"], ours["rank"], ours["shape"], ours["parameters"]) == ("scaled", 6, [32, 32], 416)

    # block by block
    command("compress", home / "dense", "--plan", home / "plan.json", *text, "--out", home / "blocks", "--low-memory")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(home / "blocks")), expected)

    # convert, round, export
    command("convert", small, "--layout", "folded", "--out", home / "folded")
    converted = AutoModelForCausalLM.from_pretrained(home / "folded")
    assert {layer.layout for layer in compressed_modules(converted).values()} == {"folded"}
    torch.testing.assert_close(logits(converted), expected, rtol=1e-4, atol=1e-4)
    command("quantize", small, *text, "--out", home / "int8")
    rounded = AutoModelForCausalLM.from_pretrained(home / "int8")
    assert [layer.layout for layer in compressed_modules(rounded).values() if layer.grid is None] == ["scaled"]
    command("export", small, "--out", home / "exported")
    exported = AutoModelForCausalLM.from_pretrained(home / "exported")
    assert not compressed_modules(exported)
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)

    # healing
    more = [*text[:2], "--windows", "20", *text[4:], "--scope", "block", "--steps", "2"]
    command("heal", small, *more, "--out", home / "healed")
    healed = compressed_modules(AutoModelForCausalLM.from_pretrained(home / "healed"))
    before, after = (found[f"{BLOCK}.self_attn.q_proj"] for found in (layers, healed))
    assert isinstance(before, ScaledPair)
    assert isinstance(after, ScaledPair)
    assert torch.equal(before.A.weight, after.A.weight)
    assert not torch.equal(before.B.weight, after.B.weight)


class Unlike(CompressedLinear):
    """A toy layer type that keeps a diagonal, has no rank to speak of, converts to nothing and learns nothing."""

    layout = "diagonal"
    stores: ClassVar[Stores] = {"d": StoredTensor(("outputs",)), "places": StoredTensor(("inputs",), torch.int64)}

    def _make_(self, **place: Any) -> None:
        self.d = nn.Parameter(torch.ones(self.out_features, **place))
        self.register_buffer("places", torch.arange(self.in_features, device=place["device"]))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **place)) if self.has_bias else None

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        return 1

    @property
    def weight(self) -> Tensor:
        return torch.diag(self.d)

    def bias_tensor(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.d * x
        return y if self.bias is None else y + self.bias


def test_a_type_that_can_do_little_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, Unlike.layout, Unlike)
    name = f"{BLOCK}.self_attn.q_proj"
    dense = AutoModelForCausalLM.from_pretrained(write("causal", tmp_path / "dense"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    swap_(model, {name: Unlike(32, 32, 1, bias=False)})
    save(model, None, tmp_path / "small")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(model))
    (layer,) = summarize(tmp_path / "small").layers
    assert (layer.layout, layer.rank, layer.parameters, layer.dtype) == ("diagonal", 1, 32, "F32")
    with pytest.raises(ValueError, match="none of its compressed layers has another layout"):
        convert_(model)
    assert choose_layout((4096, 4096), rank=1024) == "interpolative"
    assert choose_layout((4096, 4096), rank=1024, among=("diagonal", "folded")) == "folded"
    assert choose_layout((4096, 4096), "training", rank=1024, among=("diagonal", "folded")) is None
    with pytest.raises(ValueError, match="`layout` of such a layer must stay 'diagonal', got 'cur'"):
        model.get_submodule(name).to_layout("cur")
    with pytest.raises(ValueError, match="layouts diagonal alone, which do not learn"):
        cores_of(model)
    assert name not in quantizable(model)
    dense_export(model, None, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.get_submodule(name).weight, torch.eye(32))
    assert not torch.equal(logits(exported), logits(dense))


def test_what_is_not_registered_is_refused_when_it_is_read(tmp_path: Path) -> None:
    home = written(tmp_path)
    with pytest.raises(
        PlanError, match=r"`method` of .*q_proj must be one of cur, weighted, rows, rounded, neurons, got 'scaled"
    ):
        Plan.load(home / "plan.json")


def test_names_that_are_taken() -> None:
    class Other(ScaledPair):
        layout = "cur"

    class Entry(ScaledEntry):
        method = "weighted"

    with pytest.raises(ValueError, match="`layout` 'cur' of Other is that of CURLinear"):
        register(Other)
    with pytest.raises(ValueError, match="`method` 'weighted' of Entry is that of WeightedEntry in the layout 'cur'"):
        register_method(Entry)
    with pytest.raises(ValueError, match="WeightedEntry has a maker already"):
        maker(WeightedEntry)(make_scaled)
    with pytest.raises(ValueError, match="`name` 'dense' of the target is taken"):
        register_target(Target(name="dense", summary="", write=lambda *_: Path()))


def test_a_target_of_export_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(model: Any, tokenizer: Any, directory: Path, **options: Any) -> Path:
        Path(directory).mkdir()
        Path(directory, "names.txt").write_text("\n".join(compressed_modules(model)))
        return Path(directory)

    monkeypatch.setitem(TARGETS, "names", Target(name="names", summary="Names of layers.", write=names))
    monkeypatch.setitem(TARGETS, "far", Target(name="far", summary="", write=names, needs=("no_such_package",)))
    home = written(tmp_path)
    plan = json.loads((home / "plan.json").read_text())
    (home / "plan.json").write_text(json.dumps({**plan, "entries": plan["entries"][1:]}))
    text = ("--text", home / "text.txt", "--windows", "6", "--window-length", "16")
    command("compress", home / "dense", "--plan", home / "plan.json", *text, "--out", home / "small")
    command("export", home / "small", "--to", "names", "--out", home / "listed")
    assert (home / "listed" / "names.txt").read_text() == f"{BLOCK}.mlp.gate_proj"
    for to, said in (("far", "needs no_such_package"), ("near", "must be one of dense, names, far, got 'near'")):
        done = CliRunner().invoke(app, ["export", str(home / "small"), "--to", to, "--out", str(home / to)])
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())


def longest(basis: Tensor, count: int | None = None, /, *, matrix: Tensor | None = None, rng: Any = 0) -> Tensor:
    """A toy selector: take the longest rows of the basis."""
    return torch.argsort(-basis.norm(dim=1), stable=True)[:count]


def felt(W: Tensor, known: scores.Known) -> Tensor:
    """A toy importance: what the loss feels of each entry, and how the inputs go together."""
    gradients: Tensor = known.gradients
    together: Tensor = known.moments.apply(W, 1)
    return gradients.diagonal().sqrt()[:, None] * (W.abs() * known.norms + together.norm(dim=1)[:, None])


def squared(W: Tensor, known: scores.Known) -> Any:
    """A toy link: input features count by the fourth power of their norms."""
    return known.norms**4


def register_choices() -> None:
    selection.selector("longest", reads="basis", nested=True, beyond_basis=True)(longest)
    scores.importance("felt", "what the loss feels", needs=("norms", "moments", "gradients"))(felt)
    scores.importance("near", "||x||^2 W", needs="norms")(lambda W, known: W * known.norms**2)
    scores.link("squared", "by ||x||^4", needs="norms")(squared)


def remove_choices() -> None:
    del selection.SELECTORS["longest"], scores.IMPORTANCES["felt"], scores.IMPORTANCES["near"], scores.LINKS["squared"]


@pytest.fixture
def choices() -> Iterator[None]:
    register_choices()
    yield
    remove_choices()


@pytest.mark.slow
@pytest.mark.usefixtures("choices")
def test_a_selector_an_importance_and_a_link_from_outside(tmp_path: Path) -> None:
    home = written(tmp_path)
    text = ("--text", home / "text.txt", "--windows", "6", "--window-length", "16", "--precision", "float32")
    asked = ("--select", "longest", "--importance", "felt", "--link", "squared", "--layers", "1,", "--rank", "6")
    command("plan", home / "dense", *asked, *text, "--out", home / "plan.json")
    plan = Plan.load(home / "plan.json")
    assert {(entry.select, entry.importance, entry.link) for entry in plan.entries} == {("longest", "felt", "squared")}
    assert plan.needs_moments
    assert plan.needs_gradients

    small = home / "small"
    command("compress", home / "dense", "--plan", home / "plan.json", *text, "--out", small)
    command("compress", home / "dense", *asked, *text, "--out", home / "same")
    model = AutoModelForCausalLM.from_pretrained(small)
    expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(home / "same")), expected)
    dense = AutoModelForCausalLM.from_pretrained(home / "dense")
    assert not torch.allclose(logits(dense), expected)

    # report, card, inspect
    report = CompressionReport.load(small / "report.json")
    assert [layer.rank for layer in report.layers] == [6, 6, 6]
    other = AutoModelForCausalLM.from_pretrained(home / "dense")
    wanda = compress(other, torch.arange(4, 84).reshape(5, 16), CompressConfig(layers=(1,), rank=6))
    assert any(ours.rows != theirs.rows for ours, theirs in zip(report.layers, wanda.layers, strict=True))
    said = "Rows and columns were chosen by `longest` on the importance `felt`."
    assert said in (small / "README.md").read_text()
    assert "q_proj" in command("inspect", small)

    # a new process
    code = (
        "import sys, torch; from tests.integrations.test_house import logits, register_choices; register_choices(); "
        "from cur.integrations import Plan; Plan.load(sys.argv[1] + '/plan.json'); "
        "from transformers import AutoModelForCausalLM; "
        "torch.save(logits(AutoModelForCausalLM.from_pretrained(sys.argv[1])), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(small), str(home / "logits")], cwd=ROOT, check=True, timeout=300)
    assert torch.equal(torch.load(home / "logits"), expected)

    # convert, export, healing
    command("convert", small, "--layout", "folded", "--out", home / "folded")
    converted = logits(AutoModelForCausalLM.from_pretrained(home / "folded"))
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-4)
    command("export", small, "--out", home / "exported")
    exported = logits(AutoModelForCausalLM.from_pretrained(home / "exported"))
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    more = [*text[:2], "--windows", "20", *text[4:], "--scope", "block", "--steps", "2"]
    command("heal", small, *more, "--out", home / "healed")
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(home / "healed")), expected)

    # block by block, without what needs the whole model
    asked = (*asked[:2], "--importance", "near", *asked[4:])
    command("compress", home / "dense", *asked, *text, "--out", home / "whole")
    command("compress", home / "dense", *asked, *text, "--out", home / "blocks", "--low-memory")
    first, second = (logits(AutoModelForCausalLM.from_pretrained(home / name)) for name in ("whole", "blocks"))
    torch.testing.assert_close(first, second)
    refused = ["compress", home / "dense", "--importance", "felt", "--layers", "1", *text, "--out", home / "no"]
    done = CliRunner().invoke(app, [*map(str, refused), "--low-memory"])
    assert done.exit_code == 2
    assert "needs gradients, which need the whole model in memory" in " ".join(done.stderr.split())


def test_choices_that_are_not_registered_are_refused(tmp_path: Path) -> None:
    home = written(tmp_path)
    data = json.loads((home / "plan.json").read_text())
    for key, value in {"select": "longest", "importance": "felt", "link": "squared"}.items():
        with pytest.raises(ValueError, match=f"`{key}` must be one of .*, got '{value}'"):
            CompressConfig(**{key: value})
        entries = [{**data["entries"][1], key: value}]
        (home / "plan.json").write_text(json.dumps({**data, "entries": entries}))
        with pytest.raises(PlanError, match=f"`{key}` of .*gate_proj must be one of .*, got '{value}'"):
            Plan.load(home / "plan.json")


def test_plans_name_the_selector_where_it_is_not_the_default(tmp_path: Path) -> None:
    home = written(tmp_path)
    data = json.loads((home / "plan.json").read_text())
    for select in ("deim", "osinsky"):
        plan = Plan.from_dict({**data, "entries": [{**data["entries"][1], "select": select}]})
        written_entry = plan.to_dict()["entries"][0]
        assert written_entry.get("select") == (None if select == "deim" else select)
        assert Plan.from_dict(plan.to_dict()) == plan
