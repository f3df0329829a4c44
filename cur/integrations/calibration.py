"""Statistics of what flows into the linear layers of a model, streamed over calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from cur._errors import NumericalError
from cur.integrations._angles import HiddenAngles
from cur.integrations._forward import (
    Masks,
    Progress,
    Seen,
    body,
    check_finite_weights,
    evaluating,
    find_modules,
    find_nonfinite,
    model_inputs,
    run,
    total_samples,
)
from cur.integrations._inputs import InputSums
from cur.integrations.experts import unrolled
from cur.integrations.statistics import Statistics, by_stack

__all__ = ["Statistics", "collect"]


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    /,
    *,
    modules: Sequence[str],
    moments: Literal["diagonal", "full"] = "diagonal",
    layers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    r"""Measure the inputs of modules and how much each block turns the hidden state.

    One pass over the text does both. For the inputs ``x`` (one per token) of each module,
    ``moments="diagonal"`` sums ``x**2`` per feature and ``moments="full"`` sums ``x x^T``. Sums are taken in
    float64. Padded positions (zeros of ``attention_mask``) count for nothing, so that the result depends on
    batch size and padding by rounding only. Modules that are called with the very same tensor (the query, key
    and value projections) share one sum.

    For each block ``i`` of `layers` the angular distance of CURing (arXiv 2501.04211) is the mean over
    samples of ``arccos(cos(h[i-1], h[i])) / pi``, between 0 and 1, where ``h[i]`` is the block's output at
    the last token of the sample that is not padding and ``h[-1]`` the input of the first block. It is kept
    for every pair of blocks of a stack. Where every token sees all others (encoders of text or images), the mean over
    the tokens of the sample takes the place of the last one.

    Experts stored as three-dimensional parameters are measured one by one, under names such as
    ``"model.layers.3.mlp.experts.gate_up_proj.7"``.

    The head of the model is not run unless one of the `modules` belongs to it.

    Parameters
    ----------
    model : nn.Module
        A transformer, or any module that is called with the entries of a batch as keyword arguments.
    batches : iterable of mapping or torch.Tensor
        Keyword arguments of the model: ``input_ids`` and, where there is padding, ``attention_mask``, both of shape
        (batch, length), or ``pixel_values``, ``input_features`` and the like; a bare tensor stands for ``input_ids``.
        An encoder-decoder also needs ``labels`` or ``decoder_input_ids``; positions whose label is -100, or zero in
        ``decoder_attention_mask``, count for nothing.
    modules : sequence of str
        Full names of the modules to measure.
    moments : {"diagonal", "full"}, default "diagonal"
        Memory, for a module of n inputs: n or n**2 numbers of 8 bytes.
    layers : sequence of str, optional
        Full names of the blocks, in order, as :func:`cur.integrations.decoder_layers` has them. Default: no
        angular distances.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in samples; ``total`` is None for a bare
        iterator.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If there is no batch, no token, no such module, a module that received nothing, or a module whose
        input does not have one row per token although there is padding.
    NumericalError
        If a weight, an input or a hidden state is NaN or infinite; the message names where it began.
    """
    if moments not in ("diagonal", "full"):
        raise ValueError(f"`moments` must be 'diagonal' or 'full', got {moments!r}")
    with unrolled(model):
        return _collect(model, batches, modules, moments, tuple(layers or ()), progress)


def _collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    modules: Sequence[str],
    moments: str,
    layers: tuple[str, ...],
    progress: Progress | None,
) -> Statistics:
    measured = find_modules(model, modules, "modules")
    blocks = find_modules(model, layers, "layers")
    if not measured and not blocks:
        raise ValueError("`modules` and `layers` are both empty: there is nothing to measure")
    bad = check_finite_weights(model, measured)
    if bad is not None:
        raise NumericalError(f"the weight {bad!r} holds NaN or infinity; the model cannot be calibrated")

    inner = body(model)
    inside = {id(part) for part in inner.modules()}
    if not all(id(part) in inside for part in (*measured.values(), *blocks.values())):
        inner = model
    total = total_samples(batches)
    masks = Masks(model)
    inputs_of = InputSums(measured, masks, full=moments == "full")
    stacks = [HiddenAngles({name: blocks[name] for name in names}, masks) for names in by_stack(layers)]
    seen = Seen()
    # First the encoder's own hook: what it returns is told apart by it in those that follow.
    handles = [*masks.attach(), *inputs_of.attach()]
    for stack in stacks:
        handles += stack.attach()
    try:
        with evaluating(model):
            for batch in batches:
                inputs = model_inputs(inner, batch)
                masks.start(inputs, batch)
                seen.add(inputs, masks.of_inputs)
                inputs_of.start()
                for stack in stacks:
                    stack.start()
                run(inner, inputs)
                broken = inputs_of.finish() or next(filter(None, [stack.finish() for stack in stacks]), None)
                if broken:
                    raise NumericalError(f"{broken} is not finite; {find_nonfinite(model, inner, inputs)}")
                if progress is not None:
                    progress(seen.samples, total)
    finally:
        for handle in handles:
            handle.remove()
    if seen.samples == 0:
        raise ValueError("`batches` is empty: calibration needs at least one batch")
    if seen.tokens == 1 and seen.reads_tokens:
        raise ValueError(
            "`batches` holds one token: nothing can be said about what a model does from that; give more text"
        )
    sums, products, counts = inputs_of.results()
    config = getattr(model, "config", None)
    return Statistics(
        tokens=seen.tokens,
        samples=seen.samples,
        square_sums=sums,
        products=products,
        counts=counts,
        angles=_block_diagonal([stack.angles / seen.samples for stack in stacks]),
        layers=layers,
        text_hash=seen.hexdigest(),
        model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
    )


def _block_diagonal(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if not parts:
        return None
    whole = torch.zeros((sum(len(part) for part in parts),) * 2, dtype=torch.float64)
    corner = 0
    for part in parts:
        whole[corner : corner + len(part), corner : corner + len(part)] = part
        corner += len(part)
    return whole
