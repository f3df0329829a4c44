from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cur.integrations.blockwise import ShardError, Shards, StreamedModel, load_streamed


@pytest.fixture
def llama_directory(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def index_of(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def test_tensors_are_those_that_were_written(llama_directory: Path) -> None:
    shards = Shards(llama_directory)
    written = {}
    for file in llama_directory.glob("*.safetensors"):
        written |= load_file(file)
    assert len(list(llama_directory.glob("*.safetensors"))) > 3
    assert shards.tensors.keys() == written.keys()
    for name, tensor in written.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    assert shards.bytes == sum(tensor.nbytes for tensor in written.values())
    assert shards.bytes_as(torch.bfloat16) == shards.bytes // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_and_no_number_at_all(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "empty": torch.empty(0, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    shards = Shards(tmp_path)
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_named(llama_directory: Path) -> None:
    gone = sorted(llama_directory.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(ShardError, match=f"{gone.name}.*1 of .* shards are missing"):
        Shards(llama_directory)


def test_an_index_that_names_a_shard_that_never_was(llama_directory: Path) -> None:
    file = llama_directory / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    data["weight_map"]["model.norm.weight"] = "model-00099.safetensors"
    file.write_text(json.dumps(data))
    with pytest.raises(ShardError, match=r"names model-00099\.safetensors"):
        Shards(llama_directory)


def test_an_index_that_misplaces_a_tensor(llama_directory: Path) -> None:
    file = llama_directory / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    first = data["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    data["weight_map"]["model.norm.weight"] = first
    file.write_text(json.dumps(data))
    with pytest.raises(ShardError, match="do not belong together"):
        Shards(llama_directory)


def test_a_truncated_shard(llama_directory: Path) -> None:
    file = sorted(llama_directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ShardError, match=f"{file.name} is truncated"):
        Shards(llama_directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (20).to_bytes(8, "little") + b"not JSON at all     "])
def test_a_file_without_a_header(llama_directory: Path, content: bytes) -> None:
    file = sorted(llama_directory.glob("*.safetensors"))[1]
    file.write_bytes(content)
    with pytest.raises(ShardError, match=f"{file.name} is corrupt"):
        Shards(llama_directory)


def test_shards_of_different_dtypes(llama_directory: Path) -> None:
    file = llama_directory / index_of(llama_directory)["model.layers.3.mlp.up_proj.weight"]
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ShardError, match=r"do not agree on a dtype.*float32.*bfloat16"):
        Shards(llama_directory)


def test_norms_may_differ_from_matrices(llama_directory: Path) -> None:
    for file in llama_directory.glob("*.safetensors"):
        tensors = {name: t.bfloat16() if t.ndim == 2 else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert Shards(llama_directory).read("model.norm.weight").dtype == torch.float32


def test_no_safetensors_at_all(llama_directory: Path) -> None:
    for file in [*llama_directory.glob("*.safetensors"), llama_directory / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(ShardError, match="only safetensors checkpoints are read"):
        Shards(llama_directory)


def test_the_digest_changes_with_the_input(llama_directory: Path) -> None:
    before = Shards(llama_directory).digest()
    assert Shards(llama_directory).digest() == before
    file = sorted(llama_directory.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert Shards(llama_directory).digest() != before


def test_a_tensor_that_the_checkpoint_lacks(llama_directory: Path) -> None:
    lost = "model.layers.2.mlp.up_proj.weight"
    streamed = load_streamed(llama_directory)
    index = llama_directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    file = llama_directory / data["weight_map"].pop(lost)
    index.write_text(json.dumps(data))
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights .*{lost}"):
        load_streamed(llama_directory)
    streamed = StreamedModel(streamed.model, streamed.tokenizer, Shards(llama_directory), streamed.device)
    streamed.load_block(1)
    with pytest.raises(ShardError, match=f"lacks {lost}"):
        streamed.load_block(2)


def test_a_tensor_of_another_shape(llama_directory: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    streamed = load_streamed(llama_directory)
    file = llama_directory / index_of(llama_directory)[name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    streamed.shards = Shards(llama_directory)
    with pytest.raises(ShardError, match=r"stored with shape \(47, 32\).*asks for \(48, 32\)"):
        streamed.load_block(2)
