"""Checkpoints of the shapes of known models with random weights, written block by block.

A weight is the sum of a matrix of rank 64 with singular values like ``k^-1/2`` and of white noise, half of the energy
each: a few directions that stand out of a bulk, as trained weights have. One entry in 500 of every norm is 8 times
larger, so that some features of the hidden state are as large as those of trained models. The noise of all matrices is
cut from one pool of 2^26 normal numbers at random offsets.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {"hidden": 4096, "intermediate": 14336, "depth": 32, "heads": 32, "kv": 8, "vocabulary": 128256},
    "llama-3.2-3b": {"hidden": 3072, "intermediate": 8192, "depth": 28, "heads": 24, "kv": 8, "vocabulary": 128256},
    "tiny": {"hidden": 64, "intermediate": 160, "depth": 5, "heads": 4, "kv": 2, "vocabulary": 256},
}
"""Sizes of models; ``kv`` are heads of keys and values."""

# Published sizes of the same family, for the extrapolation.
LARGE: dict[str, dict[str, int]] = {
    "llama-3.1-70b": {"hidden": 8192, "intermediate": 28672, "depth": 80, "heads": 64, "kv": 8, "vocabulary": 128256},
    "llama-3.1-405b": {
        "hidden": 16384,
        "intermediate": 53248,
        "depth": 126,
        "heads": 128,
        "kv": 8,
        "vocabulary": 128256,
    },
}

_POOL = 1 << 26
_RANK = 64
_SCALE = 0.02


def matrices(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the matrices of one block: outputs and inputs by name."""
    d, f = shape["hidden"], shape["intermediate"]
    kv = d // shape["heads"] * shape["kv"]
    attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def block_parameters(shape: dict[str, int]) -> int:
    """Return the numbers in one block, norms left out."""
    return sum(m * n for m, n in matrices(shape).values())


def config(shape: dict[str, int]) -> LlamaConfig:
    """Return the configuration of a model of this shape."""
    return LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Weights:
    """Random weights with a few directions that stand out."""

    def __init__(self, seed: int, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        self.draw = torch.Generator(device=device).manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.pool = self.normal(_POOL)

    def normal(self, *shape: int) -> torch.Tensor:
        """Return normal numbers."""
        return torch.randn(*shape, generator=self.draw, device=self.device, dtype=torch.float32).to(self.dtype)

    def matrix(self, m: int, n: int) -> torch.Tensor:
        """Return a weight."""
        noise = torch.empty(m * n, dtype=self.dtype, device=self.device)
        for part in noise.split(_POOL // 2):
            offset = int(torch.randint(_POOL // 2, (), generator=self.draw, device=self.device))
            part.copy_(self.pool[offset : offset + len(part)])
        r = min(_RANK, m, n)
        values = torch.arange(1, r + 1, device=self.device) ** -0.5
        values /= torch.linalg.norm(values)
        few = (self.normal(m, r) * values.to(self.dtype)) @ self.normal(r, n)
        return few.add_(noise.view(m, n)).mul_(_SCALE / math.sqrt(2.0))

    def norm(self, n: int) -> torch.Tensor:
        """Return the weight of a norm."""
        ones = torch.ones(n, dtype=self.dtype, device=self.device)
        ones[torch.randperm(n, generator=self.draw, device=self.device)[: max(n // 500, 1)]] = 8.0
        return ones

    def block(self, shape: dict[str, int]) -> dict[str, torch.Tensor]:
        """Return the weights of one block by name."""
        found = {f"{name}.weight": self.matrix(m, n) for name, (m, n) in matrices(shape).items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}.weight"] = self.norm(shape["hidden"])
        return found


def write(directory: Path, shape: dict[str, int], *, seed: int = 0) -> None:
    """Write a checkpoint in bfloat16, one shard for each block."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    directory.mkdir(parents=True, exist_ok=True)
    weights = Weights(seed)
    placed: dict[str, str] = {}
    total = 0

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number + 1:05}-of-{shape['depth'] + 2:05}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for index in range(shape["depth"]):
        shard(index, {f"model.layers.{index}.{name}": tensor for name, tensor in weights.block(shape).items()})
    size = (shape["vocabulary"], shape["hidden"])
    table = {"model.embed_tokens.weight": weights.matrix(*size), "model.norm.weight": weights.norm(shape["hidden"])}
    shard(shape["depth"], table)
    shard(shape["depth"] + 1, {"lm_head.weight": weights.matrix(*size)})
    index_file: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    described = config(shape)
    described.architectures, described.dtype = ["LlamaForCausalLM"], "bfloat16"
    described.save_pretrained(directory)
    words = Tokenizer(WordLevel({str(number): number for number in range(256)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(directory)
