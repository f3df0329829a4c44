"""Every family: compress, run, save, reload in a new process, generate, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cur.integrations import CompressConfig, block_stacks, collect, compress, dense_export, linear_modules, save
from cur.integrations.model.experts import LinearExperts, is_experts
from cur.integrations.model.size import model_size
from cur.integrations.nn import compressed_modules
from cur.integrations.plan.plan import Plan
from cur.integrations.store.inspect import summarize
from tests.models import FAMILIES, batch, make

ROOT = Path(__file__).parents[2]
LAYOUT = {"llama": "cur", "gpt2": "folded"}

RELOAD = """
import json, sys, torch, transformers
from pathlib import Path
if sys.argv[2] == "compressed":
    import cur.integrations
else:
    sys.modules["cur"] = None  # importing it would raise
from safetensors.torch import load_file
torch.set_num_threads(int(sys.argv[3]))
found = {}
for place in sorted(Path(sys.argv[1]).iterdir()):
    inputs = load_file(place / "inputs.safetensors")
    expected = inputs.pop("expected")
    said = inputs.pop("said", None)
    model = getattr(transformers, (place / "auto").read_text()).from_pretrained(place / sys.argv[2])
    with torch.no_grad():
        logits = model(**inputs).logits
        error = float((logits - expected).abs().max() / expected.abs().max())
        found[place.name] = {"identical": torch.equal(logits, expected), "error": error}
        if said is not None:
            inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
            again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            found[place.name]["said"] = torch.equal(again, said)
print(json.dumps(found))
"""


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    fed = batch(name, count=2, seed=3)
    if "labels" in fed:
        fed["decoder_input_ids"] = fed.pop("labels")
    return fed


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, PreTrainedModel], Path]:
    """All families compressed and saved, with what they compute."""
    root = tmp_path_factory.mktemp("families")
    models = {}
    for name, family in FAMILIES.items():
        model = make(name)
        stacks = [len(stack) for stack in block_stacks(model)]
        config = CompressConfig(layers=2, targets=family.targets, rank=5, layout=LAYOUT.get(name, "interpolative"))
        report = compress(model, [batch(name)], config)
        assert sum(stacks) >= 4
        place = root / name
        place.mkdir()
        save(model, None, place / "compressed")
        report.plan.save(place / "compressed" / "plan.json")
        dense_export(model, None, place / "dense")
        fed = inputs_of(name)
        tensors = {**fed, "expected": logits(model, fed)}
        if model.can_generate():
            prompt = {key: value for key, value in fed.items() if not key.startswith("decoder")}
            tensors["said"] = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        save_file({key: value.contiguous() for key, value in tensors.items()}, place / "inputs.safetensors")
        (place / "auto").write_text(family.auto)
        models[name] = model
    return models, root


def reloaded(root: Path, kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(root), kind, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_a_new_process_computes_and_says_the_same(compressed: tuple[dict[str, PreTrainedModel], Path]) -> None:
    models, root = compressed
    found = reloaded(root, "compressed")
    assert {name for name, what in found.items() if what["identical"]} == set(FAMILIES)
    assert {name for name, what in found.items() if what.get("said")} == {
        name for name, model in models.items() if model.can_generate()
    }
    assert len([model for model in models.values() if model.can_generate()]) >= 15


def test_dense_exports_are_read_without_the_package(compressed: tuple[dict[str, PreTrainedModel], Path]) -> None:
    found = reloaded(compressed[1], "dense")
    assert {name for name, what in found.items() if what["error"] <= 1e-4} == set(FAMILIES), found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_compressed(name: str, compressed: tuple[dict[str, PreTrainedModel], Path]) -> None:
    model, place = compressed[0][name], compressed[1] / name
    layers = compressed_modules(model)
    ends = {end for target in FAMILIES[name].targets for end in [target.rpartition(".")[2]]}
    assert {layer.rpartition(".")[2] for layer in layers if not layer[-1].isdigit()} <= ends
    assert layers
    # Neither the head nor an embedding is touched, and what was tied is.
    head = model.get_output_embeddings()
    assert head is None or id(head) not in {id(layer) for layer in layers.values()}
    original = make(name)
    assert set(original.all_tied_weights_keys) == set(model.all_tied_weights_keys)
    for key, first in model.all_tied_weights_keys.items():
        assert model.get_parameter(key) is model.get_parameter(first)
    summary = summarize(place / "compressed")
    assert summary.parameters == model_size(model).parameters < model_size(original).parameters
    assert {layer.name for layer in summary.layers} == set(layers)
    assert {entry.name for entry in Plan.load(place / "compressed" / "plan.json").entries} == set(layers)
    # The export has the names and shapes of the original.
    exported = {key: tuple(value.shape) for key, value in load_file(place / "dense" / "model.safetensors").items()}
    original.save_pretrained(place / "original")
    stored = load_file(place / "original" / "model.safetensors")
    assert exported == {key: tuple(value.shape) for key, value in stored.items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_every_expert_has_a_factorization_of_its_own(
    name: str, compressed: tuple[dict[str, PreTrainedModel], Path]
) -> None:
    model = compressed[0][name]
    lists = [module for module in model.modules() if isinstance(module, LinearExperts)]
    assert len(lists) == 2
    for module in lists:
        factors = [tuple(layer.weight.flatten()[:4].tolist()) for layer in module.gate_up_proj]
        assert len(set(factors)) == 4
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_as_layers_compute_the_same(name: str) -> None:
    model = make(name)
    expected = logits(model, inputs_of(name))
    experts = {key: module for key, module in model.named_modules() if is_experts(module)}
    assert len(experts) == 4
    for key, module in experts.items():
        linear = LinearExperts(module)
        model.set_submodule(key, linear)
        for parameter, value in linear.rolled().named_parameters():
            assert torch.equal(value, module.get_parameter(parameter))
    found = logits(model, inputs_of(name))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_experts_stay_as_they_are_where_nothing_is_compressed() -> None:
    model = make("mixtral")
    before = {key: id(module) for key, module in model.named_modules()}
    names = linear_modules(model, ["experts.down_proj"])
    assert len(names) == 4 * 4
    assert names[1] == "model.layers.0.mlp.experts.down_proj.1"
    statistics = collect(model, [batch("mixtral")], modules=names)
    assert set(statistics.square_sums) == set(names)
    assert len({tuple(value.tolist()) for value in statistics.square_sums.values()}) == len(names)
    assert {key: id(module) for key, module in model.named_modules()} == before


def test_padding_and_labels_of_an_encoder_decoder_count_for_nothing() -> None:
    model = make("t5")
    names = linear_modules(model, ["SelfAttention.q", "EncDecAttention.k", "EncDecAttention.q"])
    blocks = [name for stack in block_stacks(model) for name, _ in stack]
    fed = batch("t5", count=3)
    fed["attention_mask"][:, 15:] = 0
    fed["labels"] = fed["labels"].clone()
    fed["labels"][:, 9:] = -100
    short = {key: value[:, : (9 if key == "labels" else 15)] for key, value in fed.items()}
    padded, plain = (collect(model, [given], modules=names, layers=blocks) for given in (fed, short))
    for name in names:
        assert padded.counts[name] == plain.counts[name]
        torch.testing.assert_close(padded.square_sums[name], plain.square_sums[name], rtol=1e-5, atol=0)
    assert plain.counts["decoder.block.0.layer.1.EncDecAttention.k"] == 3 * 15
    assert plain.counts["decoder.block.0.layer.1.EncDecAttention.q"] == 3 * 9
    assert padded.angular == pytest.approx(plain.angular, abs=1e-6)
    assert list(padded.angular) == list(range(7))
    assert list(padded.angular_spans(2)) == [0, 1, 2, 4, 5]


def test_an_encoder_decoder_needs_something_to_say() -> None:
    fed = batch("t5")
    del fed["labels"]
    with pytest.raises(ValueError, match="must have `decoder_input_ids` or `labels`"):
        collect(make("t5"), [fed], modules=["encoder.block.0.layer.0.SelfAttention.q"])


def test_angles_of_an_encoder_are_means_over_its_tokens() -> None:
    model = make("vit")
    names = [name for name, _ in block_stacks(model)[0]]
    fed = batch("vit", count=2)
    statistics = collect(model, [fed], modules=[], layers=names)
    with torch.no_grad():
        states = model(**fed, output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[1].double(), states[2].double(), dim=-1)
    assert statistics.angular[1] == pytest.approx(float((cosine.acos() / torch.pi).mean()), rel=1e-5)
    assert statistics.tokens == statistics.samples == 2
