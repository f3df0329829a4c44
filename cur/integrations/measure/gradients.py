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
from cur.integrations.model.limits import word_embeddings
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
        If no loss is told, and the model is an encoder-decoder, or has no input embeddings.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], masks: Masks, *, seed: int) -> None:
        self.loss = usage_of(model).loss
        embeddings = None if self.loss is not None else self._embeddings_of(model)
        self.model = model
        self.embeddings = embeddings
        self.masks = masks
        self.seed = seed
        self.modules = {id(module): module for module in modules.values()}
        self.names: dict[int, list[str]] = {}
        for name, module in modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.products: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    @staticmethod
    def _embeddings_of(model: nn.Module) -> nn.Module:
        """Return the token embeddings of a model whose loss is that of the labels it draws itself."""
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise TypeError(
                f"gradients are measured of models that go on with a text, {type(model).__name__} is an "
                f"encoder-decoder; {_WITHOUT}"
            )
        embeddings: nn.Module | None = word_embeddings(model)
        if embeddings is None:
            raise TypeError(
                f"gradients need a transformer with input embeddings, {type(model).__name__} has none; pass the loss "
                f"of another module (`loss(output, batch)`), or {_WITHOUT}"
            )
        return embeddings

    def hooks(self) -> list[Hook]:
        """Return what starts the graph at the embeddings, and sees what every module returns."""
        watched: list[Hook] = [(module, "after", self._hook(key)) for key, module in self.modules.items()]
        return watched if self.embeddings is None else [(self.embeddings, "after", _start_graph), *watched]

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
            If the model gives no logits for each token.
        NumericalError
            If the loss, or the gradient at an output, is not finite.
        """
        loss = self._told(output, inputs, batch) if self.loss is not None else self._drawn(output, mask, first)
        if not bool(torch.isfinite(loss)):
            raise NumericalError(f"the loss is not finite; {find_nonfinite(self.model, self.model, inputs)}")
        try:
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
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            raise TypeError(
                f"gradients need logits per token, which {type(self.model).__name__} does not give; {_WITHOUT}"
            )
        kept = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
        labels = _draw(logits.detach(), kept, seed=self.seed, first=first)
        scores = logits[kept.to(logits.device)].float()
        return nn.functional.cross_entropy(scores, labels, reduction="sum")

    def _hook(self, key: int) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, _: Any, output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"{self.names[key][0]!r} does not return a tensor; its gradient cannot be measured")
            started = None
            if self.embeddings is None and not output.requires_grad and torch.is_grad_enabled():
                # The graph of a module without embeddings of tokens starts at what is measured first. Not a leaf: what
                # follows may work in place.
                output = started = output.detach().requires_grad_(True).clone()
            if output.requires_grad:
                mask = self.masks.of(module, output)
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


def _start_graph(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    # Not the leaf itself: what follows may work in place.
    return output.requires_grad_(True).clone()


def _draw(logits: torch.Tensor, kept: torch.Tensor, *, seed: int, first: int) -> torch.Tensor:
    """Draw one label per real token from the softmax of its logits, by inversion of the distribution function."""
    # NumPy's generators take a pair as seed (torch's keep 32 bits of theirs), and give the same on every device.
    uniform = [
        torch.from_numpy(np.random.default_rng((seed, first + index)).random(int(row.sum())))
        for index, row in enumerate(kept)
    ]
    return draw(logits[kept.to(logits.device)], torch.cat(uniform).to(logits.device))
