"""Rounding the weights of a model to eight bits, against what its inputs make important."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cur._lib.atomic import replace_file
from cur.integrations.factor.rounding import round_layer
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.running import Progress
from cur.integrations.model.targets import decoder_layers
from cur.integrations.model.usage import is_transformer
from cur.integrations.nn import (
    CompressedLinear,
    WholeLinear,
    compressed_modules,
    dense_weight,
    is_linear,
    swap_,
)
from cur.integrations.store.checkpoint import save
from cur.integrations.store.format import mark_, refuse_other_formats

__all__ = ["Quantization", "quantizable", "quantize_", "save_quantized"]

_QUANTIZATION = "quantization.json"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What rounding a model changed.

    Attributes
    ----------
    errors : dict of str to float
        The root mean square change of each layer's outputs, relative to that of the outputs: on the text of the
        statistics, so a little less than on others; without statistics as if entries of its inputs were independent and
        of one size.
    before, after : int
        The bytes of the rounded layers before and after.
    precision : str
        The precision of matrix products in the passes of the statistics, ``"float32"`` for instance; empty where it is
        not known.
    """

    errors: dict[str, float]
    before: int
    after: int
    precision: str = ""


def quantizable(model: nn.Module, /) -> list[str]:
    """Name the layers that :func:`quantize_` rounds: compressed ones, and other linear layers of the blocks.

    Linear layers that share their weight with another module are left out, and experts in three-dimensional parameters
    that were not compressed; of a transformer in which no stack of blocks is found, compressed layers are all. Of any
    other module linear layers are rounded wherever they are.

    Parameters
    ----------
    model : nn.Module
        The model to look through.

    Returns
    -------
    list of str
        The names of the layers.

    Raises
    ------
    ValueError
        If the model has an adapter, some layers are rounded already or offloaded, or there is none to round.
    """
    refuse_adapters(model)
    layers = compressed_modules(model)
    done = [name for name, layer in layers.items() if layer.int8]
    if done:
        raise ValueError(f"{done[0]} is rounded to int8 already; start from the checkpoint that it was made from")
    try:
        blocks = tuple(f"{name}." for name, _ in decoder_layers(model)) if is_transformer(model) else ("",)
    except ValueError:
        blocks = ()
    factors = tuple(f"{name}." for name in layers)
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    names = [
        name
        for name, module in model.named_modules()
        if (name in layers and layers[name].factors())
        or (
            is_linear(module)
            and name.startswith(blocks)
            and not name.startswith(factors)
            and owners[id(module.weight)] == 1
        )
    ]
    offloaded = [name for name in names if any(part.is_meta for part in model.get_submodule(name).parameters())]
    if offloaded:
        raise ValueError(f"{', '.join(offloaded[:5])} of `model` are offloaded; load the model onto a device")
    if not names:
        raise ValueError("`model` has no compressed layers, and no stack of blocks with linear layers was found in it")
    return names


@torch.no_grad()
def quantize_(
    model: nn.Module,
    statistics: Statistics | None = None,
    *,
    damping: float = 0.1,
    progress: Progress | None = None,
) -> Quantization:
    r"""Round a model to eight bits, in place: every row of a factor or weight to multiples of a step of its own.

    The factors of a layer are rounded in the order in which they are applied. With statistics, each is first fitted to
    what the rounded ones before it give: with inputs of second moment ``G``, and products ``P`` of the factors before
    as they were and ``Q`` as they are, a factor ``F`` becomes ``F + F (P - Q) G Q^T (Q G Q^T + d I)^-1``, by least
    squares. Then it is rounded column after column, each with what the errors of those before call for under
    ``Q G Q^T + d I``: GPTQ (Frantar et al., arXiv 2210.17323) from the last column to the first, which is Babai's
    nearest plane (Chen et al., arXiv 2507.18553).

    Parameters
    ----------
    model : nn.Module
        A model, compressed or not. Its :func:`quantizable` layers are rounded.
    statistics : Statistics, optional
        Statistics of this model, with full second moments of the inputs of all its :func:`quantizable` layers. Without
        them every entry goes to the nearest multiple.
    damping : float, default 0.1
        ``d`` as a multiple of the mean eigenvalue of ``Q G Q^T``. With less, errors go into directions that the text
        of the statistics hardly uses and other text may; with few tokens that can cost more than nearest multiples.
    progress : callable, optional
        Called as ``progress(done, total)`` after every layer.

    Returns
    -------
    Quantization

    Raises
    ------
    TypeError
        If the model is no module.
    ValueError
        As :func:`quantizable`; if the model is quantized by another method, the statistics do not cover a layer, or
        `damping` is negative.
    NumericalError
        If a weight is NaN or infinite, or a damped second moment is not positive definite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module, got {type(model).__name__}; load it first")
    refuse_adapters(model)
    refuse_other_formats(model)
    if not 0 <= damping < math.inf:
        raise ValueError(f"`damping` must be a number that is at least 0, got {damping}")
    names = quantizable(model)
    errors: dict[str, float] = {}
    rounded: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, start=1):
        rounded[name], errors[name] = round_layer(name, model.get_submodule(name), statistics, damping)
        if progress is not None:
            progress(done, len(names))
    before = sum(_bytes(model.get_submodule(name)) for name in names)
    whole: dict[str, nn.Module] = {}
    for name, factors in rounded.items():
        layer = model.get_submodule(name)
        if isinstance(layer, CompressedLinear):
            layer.round_(factors)
        else:
            _, _, transposed = dense_weight(layer, name)
            whole[name] = WholeLinear.from_int8(factors["W"], transposed=transposed).train(layer.training)
    swap_(model, whole)
    mark_(model)
    return Quantization(
        errors=errors,
        before=before,
        after=sum(_bytes(model.get_submodule(name)) for name in names),
        precision="" if statistics is None else statistics.precision,
    )


def save_quantized(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    found: Quantization,
    *,
    source: str | os.PathLike[str],
    overwrite: bool = False,
) -> None:
    """Write a rounded model, whole or not at all; see :func:`~cur.integrations.save`.

    Parameters
    ----------
    model : PreTrainedModel
        The model that :func:`quantize_` has changed.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer, which is saved beside the model.
    directory : path
        The directory to create.
    found : Quantization
        The result of :func:`quantize_`, written as ``quantization.json``.
    source : path
        The checkpoint that was rounded. What it says of how it was made stays true of it, and is copied.
    overwrite : bool, default False
        Whether a directory that exists may be replaced, as for :func:`~cur.integrations.save`.
    """

    def beside(scratch: Path) -> None:
        with replace_file(scratch / _QUANTIZATION) as stream:
            stream.write((json.dumps(asdict(found), indent=2) + "\n").encode())

    save(model, tokenizer, directory, overwrite=overwrite, source=source, beside=beside)


def _bytes(module: nn.Module) -> int:
    return sum(part.nbytes for part in (*module.parameters(), *module.buffers()))
