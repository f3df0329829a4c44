"""Measure a compression at the setting of "CURing Large Models" on a CUDA device.

    python benchmarks/gpu.py                                       # the Llama-3.1-8B shape; 24 GB on the device
    python benchmarks/gpu.py --shape tiny --device cpu --windows 2 --length 16

A model with random weights of realistic spectrum (`benchmarks/shapes.py`) is made on the device in bfloat16, calibrated
on random tokens, and 10 of its blocks are compressed to rank 256. Prints seconds of each stage and the peak memory of
the device; on a CUDA device they are stored in ``benchmarks/results/gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from shapes import SHAPES, Weights, config
from transformers import LlamaForCausalLM, PreTrainedModel

from cur.integrations import CompressConfig, compress

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"


@torch.no_grad()
def made(shape: dict[str, int], device: torch.device) -> PreTrainedModel:
    """Return a model of this shape on the device."""
    with device:
        model = LlamaForCausalLM._from_config(config(shape), dtype=torch.bfloat16)
    weights = Weights(0, device=str(device))
    for block in model.model.layers:
        for name, tensor in weights.block(shape).items():
            block.get_parameter(name).copy_(tensor)
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.copy_(weights.matrix(*table.weight.shape))
    return model.eval()


def measured(shape: str, device: torch.device, *, windows: int, length: int, batch: int) -> dict[str, Any]:
    """Compress, and return what it took."""
    begin = time.perf_counter()
    model = made(SHAPES[shape], device)
    tokens = torch.randint(SHAPES[shape]["vocabulary"], (windows, length), generator=torch.Generator().manual_seed(0))
    made_in = time.perf_counter() - begin
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    depth = SHAPES[shape]["depth"]
    asked = CompressConfig(layers=min(10, depth - 2), rank=256 if depth > 5 else 8, batch_size=batch)
    report = compress(model, tokens, asked)
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "windows": windows,
        "length": length,
        "precision": report.precision,
        "seconds": {
            "making the model": made_in,
            **report.seconds,
            "factorizations alone": sum(layer.seconds for layer in report.layers),
        },
        "peak, GB": 1e-9 * torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "parameters": [report.before.parameters, report.after.parameters],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and store what a CUDA device gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; pass --device cpu --shape tiny to try the script")
    found = measured(options.shape, device, windows=options.windows, length=options.length, batch=options.batch)
    print(json.dumps(found, indent=1))
    if device.type == "cuda":
        RESULTS.write_text(json.dumps({**found, **environment()}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
