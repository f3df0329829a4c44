"""Statistics of what flows into the linear layers of a model, streamed over calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn

from cur._lib.errors import NumericalError
from cur.integrations.measure.angles import HiddenAngles
from cur.integrations.measure.gradients import OutputGradients
from cur.integrations.measure.inputs import InputSums
from cur.integrations.measure.statistics import Statistics, by_stack
from cur.integrations.model.finite import check_finite_weights, find_nonfinite
from cur.integrations.model.hashing import Seen
from cur.integrations.model.hooks import hooked
from cur.integrations.model.limits import check_windows
from cur.integrations.model.masks import Masks
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import (
    Progress,
    body,
    checkpointing,
    evaluating,
    find_modules,
    model_inputs,
    run,
    total_samples,
)
from cur.integrations.model.targets import found_stacks
from cur.integrations.model.unrolling import unrolled
from cur.integrations.model.usage import is_transformer, model_name

__all__ = ["Statistics", "collect", "collect_gradients"]


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    /,
    *,
    modules: Sequence[str],
    moments: Literal["diagonal", "full"] = "diagonal",
    layers: Sequence[str] | None = None,
    gradients: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    partial: bool = False,
    precision: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    r"""Measure the inputs of modules and how much each block turns the hidden state, and gradients at outputs.

    One pass over the text does it all. For the inputs ``x`` (one per token) of each module,
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

    The head of the model is not run unless one of the `modules` belongs to it or gradients are asked for, see
    :func:`collect_gradients`.

    Parameters
    ----------
    model : nn.Module
        A transformer, or any other module; see :func:`~cur.integrations.used_as` for what that is called with.
    batches : iterable of mapping or torch.Tensor
        Keyword arguments of the model: ``input_ids`` and, where there is padding, ``attention_mask``, both of shape
        (batch, length), or ``pixel_values``, ``input_features`` and the like; a bare tensor is taken as ``input_ids``.
        An encoder-decoder also needs ``labels`` or ``decoder_input_ids``; positions whose label is -100, or zero in
        ``decoder_attention_mask``, count for nothing.
    modules : sequence of str
        Full names of the modules to measure.
    moments : {"diagonal", "full"}, default "diagonal"
        Memory, for a module of n inputs: n or n**2 values of 8 bytes.
    layers : sequence of str, optional
        Full names of the blocks, in order, as :func:`cur.integrations.decoder_layers` has them. Default: no
        angular distances.
    gradients : sequence of str, optional
        Full names of the modules at whose outputs gradients are measured.
    gradient_checkpointing : bool, default False
        Whether the backward pass runs every block again instead of keeping its activations.
    partial : bool, default False
        Whether linear modules may receive nothing, as experts do that are never chosen; their sums and counts are zero.
    precision : str, default "auto"
        The precision of matrix products in the passes: ``"float32"``, ``"bfloat16"``, or what is faster on the device;
        see :class:`~cur.integrations.model.precision.Precision`.
    seed : int, default 0
        The seed of the labels that gradients are taken for.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in samples; ``total`` is None for a bare
        iterator.

    Returns
    -------
    Statistics

    Raises
    ------
    TypeError
        If gradients are asked for, no loss is told, and the model is no transformer, or returns neither logits nor
        hidden states.
    ValueError
        If there is no batch, no token, no such module, a module that received nothing or that no gradient reached
        (unless `partial` allows it),
        a module whose input does not have one row per token although there is padding, or no such precision.
    NumericalError
        If a weight, an input, a hidden state or a gradient is NaN or infinite; the message names where it began.
    """
    if moments not in ("diagonal", "full"):
        raise ValueError(f"`moments` must be 'diagonal' or 'full', got {moments!r}")
    with unrolled(model):
        stacks = found_stacks(model) if gradients and gradient_checkpointing else []
        blocks = [block for stack in stacks for _, block in stack]
        passes = Precision.of(model, precision)
        with checkpointing(blocks, passes):
            return _collect(
                model,
                batches,
                modules,
                moments,
                tuple(layers or ()),
                gradients,
                passes,
                seed,
                progress,
                partial=partial,
            )


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    statistics: Statistics,
    /,
    *,
    modules: Sequence[str],
    precision: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    r"""Measure ``E[g g^T]``, the other side of two-sided importance, and add it to calibration statistics.

    ``g`` is the gradient, with respect to a module's output at one token, of the negative log-likelihood summed over
    the sample. The labels are drawn from the model's own predictions, one per position, so that ``E[g g^T]`` is a
    factor of the Fisher information and not of the errors that the model makes on the text. With ``E[x x^T]`` of the
    inputs it gives the Kronecker-factored estimate ``||H^(1/2) dW G^(1/2)||_F^2 / 2`` of the loss that a change ``dW``
    of the weight costs (Martens and Grosse, arXiv 1503.05671).

    Labels are drawn sample by sample from a generator seeded by `seed` and the number of the sample, so that they
    depend on neither batch size nor padding. Memory is that of a training step without weight gradients: the
    activations of one batch.

    Parameters
    ----------
    model : nn.Module
        A transformer. Labels are drawn from its ``logits``, one for each token, or for each sample where they are of
        shape (batch, classes); without logits, from a normal distribution around its first output.
    batches : iterable of mapping or torch.Tensor
        Batches of text, as for :func:`collect`; not necessarily the same text.
    statistics : Statistics
        The statistics that the result is added to.
    modules : sequence of str
        Full names of the modules to measure.
    precision : str, default "auto"
        The precision of matrix products in the passes, named as for :func:`collect`.
    seed : int, default 0
        The seed of the labels that gradients are taken for.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in samples.

    Returns
    -------
    Statistics
        A copy of `statistics` with ``output_products`` and ``output_counts``.

    Raises
    ------
    TypeError
        If the model is no transformer, or returns neither logits nor hidden states.
    ValueError
        If there is no batch, one token in all, no such module, or a module that no gradient reached.
    NumericalError
        If the loss or a gradient is NaN or infinite; the message names the module.
    """
    if not find_modules(model, modules, "modules"):
        raise ValueError("`modules` is empty: there is nothing to measure")
    found = collect(model, batches, modules=(), gradients=modules, precision=precision, seed=seed, progress=progress)
    name = statistics.precision
    return dataclasses.replace(
        statistics,
        output_products=found.output_products,
        output_counts=found.output_counts,
        precision=name if name in ("", found.precision) else f"{name}, gradients in {found.precision}",
    )


def _collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    modules: Sequence[str],
    moments: str,
    layers: tuple[str, ...],
    gradients: Sequence[str],
    passes: Precision,
    seed: int,
    progress: Progress | None,
    *,
    partial: bool,
) -> Statistics:
    measured = find_modules(model, modules, "modules")
    blocks = find_modules(model, layers, "layers")
    felt = find_modules(model, gradients, "gradients")
    if not measured and not blocks and not felt:
        raise ValueError("`modules`, `layers` and `gradients` are all empty: there is nothing to measure")
    bad = check_finite_weights(model, measured)
    if bad is not None:
        raise NumericalError(f"the weight {bad!r} holds NaN or infinity; the model cannot be calibrated")

    inner = body(model)
    inside = {id(part) for part in inner.modules()}
    if felt or not all(id(part) in inside for part in (*measured.values(), *blocks.values())):
        inner = model
    total = total_samples(batches)
    masks = Masks(model)
    outputs_of = OutputGradients(model, felt, masks, seed=seed) if felt else None
    inputs_of = InputSums(measured, masks, full=moments == "full")
    # What reads no words, images for one, has no order in which they were said.
    causal = is_transformer(model) and getattr(model, "main_input_name", "input_ids") == "input_ids"
    stacks = [HiddenAngles({name: blocks[name] for name in names}, masks, causal=causal) for names in by_stack(layers)]
    seen = Seen()
    # First the encoder's own hook: what it returns is told apart by it in those that follow.
    hooks = [*masks.hooks(), *inputs_of.hooks()]
    for stack in stacks:
        hooks += stack.hooks()
    if outputs_of is not None:
        hooks += outputs_of.hooks()
    flowing = nullcontext() if outputs_of is None else outputs_of.flowing()
    with hooked(hooks), evaluating(model), passes.products(), flowing:
        for batch in batches:
            check_windows(model, [batch], name="batches")
            inputs = model_inputs(inner, batch)
            masks.start(inputs, batch)
            first = seen.samples
            seen.add(inputs, masks.of_inputs)
            inputs_of.start()
            for stack in stacks:
                stack.start()
            output = run(inner, inputs)
            broken = inputs_of.finish() or next(filter(None, [stack.finish() for stack in stacks]), None)
            if broken:
                raise NumericalError(f"{broken} is not finite; {find_nonfinite(model, inner, inputs)}")
            if outputs_of is not None:
                outputs_of.backward(output, inputs, masks.of_outputs, first=first, batch=batch)
            if progress is not None:
                progress(seen.samples, total)
    if seen.samples == 0:
        raise ValueError("`batches` is empty: calibration needs at least one batch")
    if seen.tokens == 1 and seen.reads_tokens:
        raise ValueError(
            "`batches` holds one token: nothing can be said about what a model does from that; give more text"
        )
    sums, products, counts = inputs_of.results(partial=partial)
    output_products, output_counts = ({}, {}) if outputs_of is None else outputs_of.results(partial=partial)
    return Statistics(
        tokens=seen.tokens,
        samples=seen.samples,
        square_sums=sums,
        products=products,
        counts=counts,
        output_products=output_products,
        output_counts=output_counts,
        angles=_block_diagonal([stack.angles / seen.samples for stack in stacks]),
        layers=layers,
        text_hash=seen.hexdigest(),
        model=model_name(model) or type(model).__name__,
        precision=passes.name,
        lookups=inputs_of.lookups(),
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
