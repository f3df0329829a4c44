"""Take a Llama off the grid that its weights are shipped on, by a change that leaves its function as it is.

SmolLM2-135M-Instruct is shipped in the GGUF type Q4_1: each 32 neighbours in a row of a linear layer of the blocks are
``step q + least`` for integers q of four bits, with a step and a least number in half precision, 5 bits a weight.
What is rounded to a grid of few bits says little if it lay on one before. So the gains of the norms before attention
and feed-forward network go into the layers that read them, and channels between ``up_proj`` and ``down_proj``, and
between ``v_proj`` and ``o_proj``, are multiplied by random numbers on one side and divided by them on the other.

A change of a few percent is not enough: small weights move by a small part of a step, and a method that may put the
zero of a group anywhere finds most of the grid again. How much of the error of nearest rounding such a method, HQQ,
leaves of each kind of layer, beside what it leaves of normal numbers, shows that (4 bits, groups of 32).

    python benchmarks/off_grid.py [--model DIR]

prints that as shipped, with factors of a few percent and as all benchmarks of rounding take it; how many groups of 32
lie on a grid of 16 numbers; and how far the logits of some tokens move; and writes
``benchmarks/results/off_grid.json``. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import half_quadratic, round_to_nearest
from benchmarks.environment import environment
from cur.integrations import decoder_layers, linear_modules, load_model

__all__ = ["GROUP", "SEED", "leave_grid_", "share_on_grid"]

RESULTS = Path(__file__).resolve().parent / "results" / "off_grid.json"
GROUP = 32
LEVELS = 16
# A step and a least number in half precision for each group.
SHIPPED_BITS = 4 + 2 * 16 / GROUP
SPREAD = 0.3
FEW_PERCENT = 0.05
SEED = 0
TOKENS = 64
BLOCK = 14


@torch.no_grad()
def leave_grid_(model: Any, *, seed: int = SEED, spread: float = SPREAD) -> None:
    """Change the weights of a Llama's blocks, but not what the model computes: exact but for rounding to its dtype.

    Embeddings, last norm and head stay.

    Parameters
    ----------
    model : nn.Module
        A Llama of transformers, or a model whose blocks have the same parts under the same names.
    seed : int, default 0
        The seed of the factors.
    spread : float, default 0.3
        How far factors are from 1 at most. With 0.3 methods find no more of the old grid in the layers that have
        nothing but factors than in those that have gains.
    """
    rng = np.random.default_rng(seed)
    for _, block in decoder_layers(model):
        attention, mlp = block.self_attn, block.mlp
        _fold_(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        _fold_(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        by_channel = _factors(rng, mlp.up_proj.weight.shape[0], spread)
        _rescale_(mlp.up_proj, mlp.down_proj, by_channel, by_channel)
        of_values = _factors(rng, attention.v_proj.weight.shape[0], spread)
        # query heads that share a key-value head are neighbours
        shared = of_values.view(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
        _rescale_(attention.v_proj, attention.o_proj, of_values, shared.flatten())


def _factors(rng: np.random.Generator, count: int, spread: float) -> Tensor:
    return torch.from_numpy(rng.uniform(1 - spread, 1 + spread, count))


def _fold_(norm: nn.Module, layers: tuple[nn.Linear, ...]) -> None:
    """Put the gains of a norm into the layers that read what it gives."""
    gains: Any = norm.weight
    for layer in layers:
        layer.weight.copy_(layer.weight.double() * gains.double())
    gains.fill_(1.0)


def _rescale_(first: nn.Linear, second: nn.Linear, outputs: Tensor, inputs: Tensor) -> None:
    """Multiply the outputs of a layer by factors, and divide the inputs of the one that reads them."""
    first.weight.copy_(first.weight.double() * outputs[:, None])
    if first.bias is not None:
        first.bias.copy_(first.bias.double() * outputs)
    second.weight.copy_(second.weight.double() / inputs)


def share_on_grid(W: Tensor, *, group: int = GROUP, levels: int = LEVELS) -> float:
    """Return the share of groups of neighbours in a row whose numbers are whole steps apart, few of them in all.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        A weight; the group has to divide n.
    group : int, default 32
        How many neighbours share a step.
    levels : int, default 16
        How many numbers a grid has.
    """
    parts = W.detach().double().reshape(-1, group)
    least, most = parts.min(1, keepdim=True).values, parts.max(1, keepdim=True).values
    span = most - least
    # both ends and the numbers between were rounded to the dtype of the weight
    blur = 4 * torch.finfo(W.dtype).eps * torch.maximum(least.abs(), most.abs())
    found = span[:, 0] == 0
    for steps in range(1, levels):
        places = (parts - least) / span.clamp(min=torch.finfo(torch.float64).tiny) * steps
        off = (places - places.round()).abs() * span / steps
        found |= (off <= blur).all(1)
    return float(found.double().mean())


def by_kind(model: Any) -> dict[str, list[nn.Linear]]:
    """Return the linear layers of the blocks by the last part of their names, in order."""
    kinds: dict[str, list[nn.Linear]] = {}
    for name in linear_modules(model, "all-linear", blocks=range(len(decoder_layers(model)))):
        kinds.setdefault(name.rpartition(".")[2], []).append(model.get_submodule(name))
    return kinds


def found_again(W: Tensor) -> float:
    """Return the error that zeros anywhere leave of that of nearest rounding, in four bits and groups of 32."""
    W = W.detach().double()
    size = {"bits": 4, "group": GROUP}
    return float(torch.linalg.norm(W - half_quadratic(W, **size)) / torch.linalg.norm(W - round_to_nearest(W, **size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory of a Llama; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shipped: Any = load_model(options.model, dtype=torch.float32).model
    models = {"as shipped": shipped}
    for name, spread in (("factors of a few percent", FEW_PERCENT), ("off the grid", SPREAD)):
        models[name] = copy.deepcopy(shipped)
        leave_grid_(models[name], spread=spread)
    rows = []
    for kind, layers in by_kind(shipped).items():
        weights = sum(layer.weight.numel() for layer in layers)
        row: dict[str, Any] = {"layers": kind, "weights": weights, "on a grid": {}, "left by HQQ": {}}
        for name, model in models.items():
            own = by_kind(model)[kind]
            row["on a grid"][name] = sum(share_on_grid(x.weight) * x.weight.numel() for x in own) / weights
            row["left by HQQ"][name] = found_again(own[min(BLOCK, len(own) - 1)].weight)
        print(row, flush=True)
        rows.append(row)
    tokens = torch.from_numpy(np.random.default_rng(SEED).integers(0, shipped.config.vocab_size, (1, TOKENS)))
    with torch.no_grad():
        before, after = shipped(tokens).logits, models["off the grid"](tokens).logits
    weights = sum(row["weights"] for row in rows)
    record = {
        "question": "Do the weights that are called dense lie on a grid?",
        "model": shipped.name_or_path,
        "group": GROUP,
        "levels": LEVELS,
        "weights": weights,
        "bytes": weights * SHIPPED_BITS / 8,
        "block": BLOCK,
        "left of normal numbers": found_again(torch.randn(576, 576, generator=torch.Generator().manual_seed(SEED))),
        "spread": SPREAD,
        "seed": SEED,
        "logits moved, of the largest": float((after - before).abs().max() / before.abs().max()),
        "rows": rows,
        **environment(),
    }
    print(f"{weights:,} weights, {record['bytes'] / 2**20:.1f} MiB; {record['logits moved, of the largest']:.1e}")
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
