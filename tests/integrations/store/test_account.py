from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cur.integrations import CompressConfig, compress, save
from cur.integrations.files.beside import ACCOUNT
from cur.integrations.files.hashes import check_hashes
from cur.integrations.files.reading import CheckpointError
from cur.integrations.store.account import compare, read_account

NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def dense(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A dense checkpoint; beside it lies "copy", with the same tensors."""
    with torch.no_grad():
        llama.get_parameter(NORM)[0] = -0.0
        llama.get_parameter(NORM)[1] = float("nan")
    for name in ("dense", "copy"):
        llama.save_pretrained(tmp_path / name)
    return tmp_path / "dense"


def test_the_same_bit_by_bit(dense: Path) -> None:
    account = compare(dense.with_name("copy"), dense)
    stored = load_file(dense / "model.safetensors")
    assert account.same == len(stored)  # NaN included
    assert account.same_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert account.compressed == account.changed == account.rounded == account.missing == account.extra == []
    assert "bit by bit" in account.lines()[0]
    assert len(account.lines()) == 1


def test_what_differs(dense: Path) -> None:
    copy = dense.with_name("copy")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][0] = 0.0  # was -0.0, which is equal, and another bit
        del tensors[UP]
        tensors["model.layers.1.input_layernorm.weight"] = torch.ones(3)
        name = "model.layers.2.input_layernorm.weight"
        tensors[name] = tensors[name].to(torch.bfloat16)
        tensors["another.weight"] = torch.ones(2)

    edit(copy, change)
    account = compare(copy, dense)
    assert account.changed == ["model.layers.1.input_layernorm.weight", NORM]
    assert account.rounded == ["model.layers.2.input_layernorm.weight"]
    assert account.missing == [UP]
    assert account.extra == ["another.weight"]
    assert account.same == len(load_file(dense / "model.safetensors")) - 4
    back = compare(dense, copy)
    assert (back.missing, back.extra) == (["another.weight"], [UP])
    told = " ".join(account.lines())
    assert f"Missing tensors: 1 ({UP})." in told
    assert "Other values: 2" in told


def test_a_class_that_transformers_does_not_have(dense: Path) -> None:
    path = dense / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["NoneSuch"]}))
    assert compare(dense.with_name("copy"), dense).missing == []


def test_weights_that_are_not_what_was_written(llama: PreTrainedModel, windows: torch.Tensor, tmp_path: Path) -> None:
    compress(llama, windows, CompressConfig(layers=1, rank=4))
    save(llama, None, tmp_path / "small", max_shard_size=20_000)
    assert read_account(tmp_path / "small") is None  # it came from no directory
    check_hashes(tmp_path / "small")
    file = max(tmp_path.glob("small/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{file.name} is not what was written: its SHA-256 is another"):
            check_hashes(tmp_path / "small")
    (tmp_path / "small" / ACCOUNT).unlink()
    check_hashes(tmp_path / "small")
