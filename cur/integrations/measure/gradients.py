"""Second moments of the gradients at module outputs: how much the loss feels each output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from cur._lib.errors import NumericalError
from cur.integrations.measure.generated_text import draw
from cur.integrations.measure.inputs import add_gram_, mirror_
from cur.integrations.model.finite import find_nonfinite
from cur.integrations.model.hooks import Hook
from cur.integrations.model.masks import Masks, token_rows
from cur.integrations.model.usage import Inputs, first_tensor, usage_of
from cur.integrations.nn import dense_weight

__all__ = ["OutputGradients"]


_WITHOUT = "leave them out (`gradients=False`, --no-gradients)"


class OutputGradients:
    """Sums of ``g g^T`` over the gradients at the outputs of modules, gathered by hooks.

    The loss is the negative log-likelihood, summed over the sample, of labels that the model draws itself.

    Parameters
    ----------
    model : nn.Module
        The model to differentiate: a transformer with input embeddings.
    modules : mapping of str to nn.Module
        The modules whose output gradients are summed, by name.
    masks : Masks
        The padding masks of the pass.
    seed : int
        The seed of the labels that gradients are taken for.

    Raises
    ------
    TypeError
        If no loss is told, and the model is no transformer.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], masks: Masks, *, seed: int) -> None:
        self.loss = usage_of(model).loss
        if self.loss is None and not hasattr(model, "config"):
            raise TypeError(
                f"gradients need a transformer with a configuration, {type(model).__name__} has none; pass the loss "
                f"of another module (`loss(output, batch)`), or {_WITHOUT}"
            )
        self.model = model
        self.masks = masks
        self.seed = seed
        self.modules = {id(module): module for module in modules.values()}
        self.names: dict[int, list[str]] = {}
        for name, module in modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.products: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    def hooks(self) -> list[Hook]:
        """Return what sees what every module returns, and starts the graph there."""
        return [(module, "after", self._hook(key)) for key, module in self.modules.items()]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Let gradients flow from the embeddings on; no weight gets one, which would double time and memory."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def backward(
        self, output: Any, inputs: Mapping[str, Any], mask: torch.Tensor | None, *, first: int, batch: Any
    ) -> None:
        """Go back through the model from its output for a batch, whose first sample has the number `first`.

        Parameters
        ----------
        output : Any
            The output of the model on the batch.
        inputs : mapping
            The keyword arguments that the model was called with.
        mask : Tensor or None
            The padding mask of the batch; None if it has no padding.
        first : int
            The number of the first sample of the batch, which seeds its labels.
        batch : Any
            The batch as it was given, which a loss of the user's is called with.

        Raises
        ------
        TypeError
            If the model returns nothing that could be said by another one of its kind, or cannot be differentiated.
        NumericalError
            If the loss, or the gradient at an output, is not finite.
        """
        loss = self._told(output, inputs, batch) if self.loss is not None else self._drawn(output, mask, first)
        if not bool(torch.isfinite(loss)):
            whose = "`loss`" if self.loss is not None else "the loss"
            raise NumericalError(f"{whose} is not finite; {find_nonfinite(self.model, self.model, inputs)}")
        try:
            if loss.requires_grad:  # else nothing that is measured was called
                loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TypeError(
                f"no gradients can be taken through {type(self.model).__name__} in evaluation mode ({reason}); "
                f"{_WITHOUT}"
            ) from error
        for key, product in self.products.items():
            if not bool(torch.isfinite(product.diagonal()).all()):
                raise NumericalError(f"the gradient at the output of {self.names[key][0]!r} is not finite")

    def _told(self, output: Any, inputs: Mapping[str, Any], batch: Any) -> torch.Tensor:
        """Return the loss that the user's function gives, summed over the samples."""
        assert self.loss is not None
        given = inputs.given if isinstance(inputs, Inputs) else batch
        loss: Any = self.loss(output, given)
        samples = first_tensor(given)
        count = 1 if samples is None or not samples.ndim else len(samples)
        if not isinstance(loss, torch.Tensor) or loss.numel() not in (1, count) or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            detached = " without a gradient" if isinstance(loss, torch.Tensor) and not loss.requires_grad else ""
            raise ValueError(
                f"`loss` must return the mean over the {count} samples of the batch, or one number for each of them, "
                f"that depends on a measured module; got {got}{detached}"
            )
        return loss.float().sum() * (count if loss.numel() == 1 else 1)

    def _drawn(self, output: Any, mask: torch.Tensor | None, first: int) -> torch.Tensor:
        """Return the loss of labels that the model draws itself, summed over the tokens."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.ndim in (2, 3):
            return self._of_labels(logits if logits.ndim == 3 else logits[:, None], mask, first)
        return self._of_states(output, mask, first)

    def _of_labels(self, logits: torch.Tensor, mask: torch.Tensor | None, first: int) -> torch.Tensor:
        """Return the negative log-likelihood of labels that are drawn from logits (batch, tokens, classes)."""
        kept = self._kept(logits, mask)
        labels = _draw(logits.detach(), kept, seed=self.seed, first=first)
        return nn.functional.cross_entropy(logits[kept.to(logits.device)].float(), labels, reduction="sum")

    def _of_states(self, output: Any, mask: torch.Tensor | None, first: int) -> torch.Tensor:
        """Return the part of the same for normal labels around the first output that has a gradient."""
        states = next((x for x in _tensors(output) if x.is_floating_point() and x.ndim >= 2), None)
        if states is None:
            raise TypeError(f"gradients need logits or hidden states, {type(self.model).__name__} has none; {_WITHOUT}")
        # NumPy's generators take a pair as seed, and give the same on every device.
        noise = torch.stack(
            [
                torch.from_numpy(np.random.default_rng((self.seed, first + index)).standard_normal(tuple(state.shape)))
                for index, state in enumerate(states)
            ]
        ).to(states.device, torch.float32)
        if states.ndim == 3:
            noise = noise * self._kept(states, mask).to(noise)[..., None]
        return (states.float() * noise).sum()

    def _kept(self, said: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return which tokens count of what is said of each, or of the whole sample."""
        if mask is None or said.shape[1] == 1:
            return torch.ones(said.shape[:2], dtype=torch.bool)
        if mask.shape != said.shape[:2]:
            raise ValueError(
                f"{type(self.model).__name__} says something of {said.shape[1]} places of each sample, of which an "
                f"`attention_mask` of {mask.shape[1]} does not tell the padding; give batches without padding, or "
                f"{_WITHOUT}"
            )
        return mask

    def _hook(self, key: int) -> Callable[[nn.Module, Any, Any], torch.Tensor | None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"{self.names[key][0]!r} does not return a tensor; its gradient cannot be measured")
            started = None
            if torch.is_grad_enabled() and not output.requires_grad:
                # Nothing that is measured comes before. Not a leaf: what follows may work in place.
                output = started = output.detach().requires_grad_(True).clone()
            if output.requires_grad:
                # A linear layer returns as many rows as it gets; whose tokens they are, what it gets says.
                mask = self.masks.of(module, args[0] if args else output)
                # A hook of the tensor, not of the module: it goes with the graph.
                output.register_hook(lambda gradient: self._add(key, gradient, mask))
            return started

        return watch

    def _add(self, key: int, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows = token_rows(gradient.detach(), mask, f"the output of {self.names[key][0]!r}")
        if key not in self.products:
            n = rows.shape[1]
            self.products[key] = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
            self.counts[key] = 0
        add_gram_(self.products[key], rows.to(torch.float64))
        self.counts[key] += len(rows)

    def results(self, *, partial: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Return the sums and how many gradients are in each, by name.

        Parameters
        ----------
        partial : bool, default False
            Whether linear modules that no gradient reached are allowed; their sums and counts are zero.

        Raises
        ------
        ValueError
            If no gradient reached a module.
        """
        silent = {key: names[0] for key, names in self.names.items() if key not in self.products}
        if silent and not partial:
            raise ValueError(
                f"no gradient reached {', '.join(list(silent.values())[:5])}; leave out what the loss does not use"
            )
        for key, name in silent.items():
            m = dense_weight(self.modules[key], name)[0].shape[0]
            self.products[key], self.counts[key] = torch.zeros(m, m, dtype=torch.float64), 0
        products: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for key, names in self.names.items():
            mirror_(self.products[key])
            whole = self.products[key].cpu()
            for name in names:
                products[name], counts[name] = whole, self.counts[key]
        return products, counts


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a model returns, in their order."""
    parts = output.values() if isinstance(output, Mapping) else [output] if torch.is_tensor(output) else output
    yield from (part for part in parts if isinstance(part, torch.Tensor))


def _draw(logits: torch.Tensor, kept: torch.Tensor, *, seed: int, first: int) -> torch.Tensor:
    """Draw one label per real token from the softmax of its logits, by inversion of the distribution function."""
    # NumPy's generators take a pair as seed (torch's keep 32 bits of theirs), and give the same on every device.
    uniform = [
        torch.from_numpy(np.random.default_rng((seed, first + index)).random(int(row.sum())))
        for index, row in enumerate(kept)
    ]
    return draw(logits[kept.to(logits.device)], torch.cat(uniform).to(logits.device))
