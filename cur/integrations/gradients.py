"""Second moments of the gradients at module outputs: how much the loss feels each output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cur._errors import NumericalError
from cur.integrations._forward import (
    Masks,
    Progress,
    Seen,
    evaluating,
    find_modules,
    find_nonfinite,
    model_inputs,
    padding_mask,
    run,
    token_rows,
    total_samples,
)
from cur.integrations._inputs import add_gram_, mirror_
from cur.integrations.statistics import Statistics

__all__ = ["collect_gradients", "draw"]

# Probabilities in memory at once while labels are drawn, in numbers: 32 MB in float64.
_CHUNK = 1 << 22


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    statistics: Statistics,
    /,
    *,
    modules: Sequence[str],
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
        A transformer with input embeddings whose output has ``logits`` of shape (batch, length, classes).
    batches : iterable of mapping or torch.Tensor
        As for :func:`cur.integrations.collect`; not necessarily the same text.
    statistics : Statistics
        Where the result is added.
    modules : sequence of str
        Full names of the modules to measure.
    seed : int, default 0
        For the labels.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in samples.

    Returns
    -------
    Statistics
        A copy of `statistics` with ``output_products`` and ``output_counts``.

    Raises
    ------
    TypeError
        If the model has no input embeddings or no logits.
    ValueError
        If there is no batch, no such module, or a module that no gradient reached.
    NumericalError
        If a gradient is NaN or infinite; the message names the module.
    """
    measured = find_modules(model, modules, "modules")
    if not measured:
        raise ValueError("`modules` is empty: there is nothing to measure")
    get = getattr(model, "get_input_embeddings", None)
    embeddings = get() if callable(get) else None
    if not isinstance(embeddings, nn.Module):
        raise TypeError(f"gradients need a transformer with input embeddings, {type(model).__name__} has none")
    total = total_samples(batches)
    masks = Masks(model)
    outputs_of = _Outputs(measured, masks)
    seen = Seen()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Gradients flow from the embeddings on; no weight gets one, which would double time and memory.
    handles = [*masks.attach(), embeddings.register_forward_hook(_start_graph), *outputs_of.attach()]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                inputs = model_inputs(model, batch)
                mask = padding_mask(inputs)
                first = seen.samples
                seen.add(inputs, mask)
                masks.start(inputs, batch)
                logits = getattr(run(model, inputs), "logits", None)
                if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
                    raise TypeError(f"gradients need logits per token, which {type(model).__name__} does not give")
                kept = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
                labels = _draw(logits.detach(), kept, seed=seed, first=first)
                scores = logits[kept.to(logits.device)].float()
                loss = nn.functional.cross_entropy(scores, labels, reduction="sum")
                if not bool(torch.isfinite(loss)):
                    raise NumericalError(f"the loss is not finite; {find_nonfinite(model, model, inputs)}")
                loss.backward()  # type: ignore[no-untyped-call]
                broken = outputs_of.broken()
                if broken is not None:
                    raise NumericalError(f"the gradient at the output of {broken!r} is not finite")
                if progress is not None:
                    progress(seen.samples, total)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
    if seen.samples == 0:
        raise ValueError("`batches` is empty: gradients need at least one batch")
    products, counts = outputs_of.results()
    return dataclasses.replace(statistics, output_products=products, output_counts=counts)


def _start_graph(_: nn.Module, __: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def draw(logits: torch.Tensor, heights: torch.Tensor) -> torch.Tensor:
    """Draw a label from each row of logits (rows, classes), by inversion at heights (rows,) in [0, 1) of its sums."""
    step = max(_CHUNK // logits.shape[-1], 1)
    labels = []
    for part, height in zip(logits.split(step), heights.split(step), strict=True):  # type: ignore[no-untyped-call]
        below = part.double().softmax(-1).cumsum(-1)
        # The last entry is 1 but for rounding; scaled by it, a height below 1 always finds its label.
        labels.append(torch.searchsorted(below, height[:, None] * below[:, -1:], right=True)[:, 0])
    return torch.cat(labels).clamp_(max=logits.shape[-1] - 1)


def _draw(logits: torch.Tensor, kept: torch.Tensor, *, seed: int, first: int) -> torch.Tensor:
    """Draw one label per real token from the softmax of its logits, by inversion of the distribution function."""
    # NumPy's generators take a pair as seed (torch's keep 32 bits of theirs), and give the same on every device.
    uniform = [
        torch.from_numpy(np.random.default_rng((seed, first + index)).random(int(row.sum())))
        for index, row in enumerate(kept)
    ]
    return draw(logits[kept.to(logits.device)], torch.cat(uniform).to(logits.device))


class _Outputs:
    """Sums of ``g g^T`` over the gradients at the outputs of modules."""

    def __init__(self, modules: Mapping[str, nn.Module], masks: Masks) -> None:
        self.masks = masks
        self.modules = {id(module): module for module in modules.values()}
        self.names: dict[int, list[str]] = {}
        for name, module in modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.products: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        return [module.register_forward_hook(self._hook(key)) for key, module in self.modules.items()]

    def _hook(self, key: int) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, _: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"{self.names[key][0]!r} does not return a tensor; its gradient cannot be measured")
            if output.requires_grad:
                mask = self.masks.of(module, output)
                output.register_hook(lambda gradient: self._add(key, gradient, mask))  # type: ignore[no-untyped-call]

        return watch

    def _add(self, key: int, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows = token_rows(gradient.detach(), mask, f"the output of {self.names[key][0]!r}")
        if key not in self.products:
            n = rows.shape[1]
            self.products[key] = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
            self.counts[key] = 0
        add_gram_(self.products[key], rows.to(torch.float64))
        self.counts[key] += len(rows)

    def broken(self) -> str | None:
        for key, product in self.products.items():
            if not bool(torch.isfinite(product.diagonal()).all()):
                return self.names[key][0]
        return None

    def results(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        silent = [names[0] for key, names in self.names.items() if key not in self.products]
        if silent:
            raise ValueError(f"no gradient reached {', '.join(silent[:5])}; leave out what the loss does not use")
        products: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for key, names in self.names.items():
            mirror_(self.products[key])
            whole = self.products[key].cpu()
            for name in names:
                products[name], counts[name] = whole, self.counts[key]
        return products, counts
