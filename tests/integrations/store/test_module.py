from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cur.integrations import BudgetConfig, CompressConfig, compress, load_into, save
from cur.integrations.files.reading import CheckpointError
from cur.integrations.nn import compressed_modules
from tests.models import make
from tests.modules import Tower, tower, tower_batch

CONFIG = CompressConfig(layers="all", targets=("all-linear", "all-embeddings"), rank=4)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Tower, Path]:
    model = tower()
    report = compress(model, [tower_batch()], CONFIG)
    return model, save(model, tmp_path / "small", report=report)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_module_that_was_built_anew_gets_all_of_it(stored: tuple[Tower, Path]) -> None:
    model, place = stored
    again = load_into(tower(seed=1), place)
    assert isinstance(again, Tower)
    assert same(state(again), state(model))
    assert compressed_modules(again).keys() == compressed_modules(model).keys()
    assert {path.name for path in place.iterdir()} >= {"config.json", "cur_model.safetensors", "account.json"}


def test_it_may_be_on_no_device_and_keeps_its_mode_and_what_learns(stored: tuple[Tower, Path]) -> None:
    model, place = stored
    with torch.device("meta"):
        hollow = Tower()
    hollow.eval()
    hollow.top[0].requires_grad_(False)
    load_into(hollow, place)
    assert same(state(hollow), state(model))
    assert not any(module.training for module in hollow.modules())
    assert hollow.bottom[0].R.weight.requires_grad
    assert hollow.tables[0].A.weight.requires_grad


def test_tensors_take_the_dtype_in_which_they_are_stored(tmp_path: Path) -> None:
    model = tower().to(torch.bfloat16)
    batch = tower_batch()
    compress(model, [(batch[0].bfloat16(), *batch[1:])], CONFIG)
    save(model, tmp_path / "small")
    again = load_into(tower(), tmp_path / "small")
    assert same(state(again), state(model))
    assert again.top[0].R.weight.dtype == torch.bfloat16


def test_several_files_and_a_directory_that_is_there(tmp_path: Path) -> None:
    model = tower()
    compress(model, [tower_batch()], CONFIG)
    save(model, tmp_path / "small", max_shard_size="2KB")
    assert len(list((tmp_path / "small").glob("cur_model-*.safetensors"))) > 1
    assert same(state(load_into(tower(), tmp_path / "small")), state(model))
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save(model, tmp_path / "small")
    save(model, directory=tmp_path / "small", overwrite=True)
    assert not list((tmp_path / "small").glob("cur_model-*.safetensors"))


class Shared(nn.Module):
    """Two names of one layer, two layers with one weight, and a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(12, 12)
        self.read, self.write = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
        self.write.weight = self.read.weight
        self.scale = nn.Parameter(torch.rand(3))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("passing", torch.rand(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.again(self.first(self.read(x)))) * self.scale.sum()


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    model, tokens = Shared(), torch.arange(8)[None]
    compress(model, [tokens], CompressConfig(targets=("first",), layers="all", rank=3))
    assert model.again is model.first
    save(model, tmp_path / "small")
    for device in ("cpu", "meta"):
        with torch.device(device):
            other = Shared()
        other.passing = torch.rand(2)  # which no checkpoint has
        again = load_into(other, tmp_path / "small")
        assert again.again is again.first
        assert again.write.weight is again.read.weight
        assert same(state(again), state(model))
        assert torch.equal(again(tokens), model(tokens))


def test_tied_tables_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the weight of read is tied to write: compressing one would leave"):
        compress(Shared(), [torch.arange(8)[None]], BudgetConfig(keep=0.5, targets="all-embeddings"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(2))), r"not stored: more \(2,\)"),
        (lambda m: delattr(m, "history"), "config.json` lists the compressed module history"),
        (lambda m: m.bottom.insert(4, nn.LayerNorm(8)), r"not stored: bottom.4.weight \(8,\), bottom.4.bias \(8,\)"),
        (lambda m: m.top.pop(2), r"not in the module: top.2.bias \(1,\), top.2.weight \(1, 24\)"),
        (lambda m: m.bottom.__setitem__(2, nn.Linear(24, 9)), "bottom.2 has rank 4 in layout 'cur'"),
        (lambda m: setattr(m, "pairs", m.pairs[:, 1:]), r"of other shapes: pairs \(2, 9\) here and \(2, 10\) there"),
        (lambda m: m.top.__setitem__(0, nn.Conv1d(18, 24, 1)), r"does not fit what is stored.*top.0 is a Conv1d"),
        (lambda m: m.tables.__setitem__(0, nn.Linear(60, 8)), "asks for tables.0: .*`embedding` is not for a Linear"),
    ],
)
def test_another_module_is_refused_by_names_and_shapes_and_stays_as_it_was(
    stored: tuple[Tower, Path], change: Any, message: str
) -> None:
    _, place = stored
    model = tower(seed=1)
    change(model)
    before, modules = state(model), [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(CheckpointError, match=message):
        load_into(model, place)
    assert same(state(model), before)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules


def test_what_is_stored_and_has_no_place_is_named(stored: tuple[Tower, Path], tmp_path: Path) -> None:
    _, place = stored
    (place / "account.json").unlink()
    tensors = load_file(place / "cur_model.safetensors")
    save_file({**tensors, "left.over": torch.ones(2)}, place / "cur_model.safetensors")
    with pytest.raises(CheckpointError, match=r"not in the module: left.over \(2,\)"):
        load_into(tower(), place)


def test_damaged_and_foreign_directories(stored: tuple[Tower, Path], tmp_path: Path) -> None:
    _, place = stored
    file = place / "cur_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    model = tower(seed=1)
    before = state(model)
    with pytest.raises(CheckpointError, match="is not what was written"):
        load_into(model, place)
    file.write_bytes(whole[:-5])
    (place / "account.json").unlink()
    with pytest.raises(CheckpointError, match="truncated"):
        load_into(model, place)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_into(model, tmp_path / "nowhere")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"architectures": ["Tower"]}))
    with pytest.raises(CheckpointError, match="is not a compressed checkpoint"):
        load_into(model, tmp_path / "dense")
    assert same(state(model), before)


def test_what_is_compressed_is_not_loaded_into(stored: tuple[Tower, Path]) -> None:
    model, place = stored
    with pytest.raises(ValueError, match=r"`model` has compressed layers already .* build the dense module anew"):
        load_into(model, place)


def test_bad_calls_of_save(stored: tuple[Tower, Path], tmp_path: Path) -> None:
    model, _ = stored
    with pytest.raises(TypeError, match="`directory` must be a path, got NoneType"):
        save(model)
    with pytest.raises(ValueError, match=r"`model` has no compressed layers; .* torch.save"):
        save(tower(), tmp_path / "dense")

    class Counting(Tower):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    torch.manual_seed(0)
    other = Counting()
    compress(other, [tower_batch()], CONFIG)
    with pytest.raises(TypeError, match="_extra_state of Counting is a dict, and only tensors are stored"):
        save(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_transformers_is_loaded_into_a_model_too(tmp_path: Path) -> None:
    windows = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(0))
    model = make("llama", blocks=4)
    dense = copy.deepcopy(model)
    compress(model, windows, CompressConfig(layers=2, rank=6))
    save(model, None, tmp_path / "small")
    again = load_into(dense, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model(windows).logits)
    again.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_learn_does_not_learn_afterwards(stored: tuple[Tower, Path], device: str) -> None:
    with torch.device(device):
        again = Tower()
    again.requires_grad_(False)
    load_into(again, stored[1])
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_buffers_that_nothing_stored_can_fill_are_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        net.register_buffer("scale", torch.ones(2), persistent=False)
        return net

    net, x = build(), torch.randn(64, 16)
    report = compress(net, [x], CompressConfig(layers="all", targets="all-linear", rank=4))
    place = save(net, tmp_path / "small", report=report)
    with torch.device("meta"):
        hollow = build()
    with pytest.raises(ValueError, match=r"the buffer scale of Sequential has no values .*build the module outside of"):
        load_into(hollow, place)
    assert not compressed_modules(hollow)
    assert torch.equal(load_into(build(), place)(x), net(x))
