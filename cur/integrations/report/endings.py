"""The end of a causal language model: from its last hidden states to logits, a few tokens at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils.generic import ModelOutput

from cur.integrations.model.experts import eager_experts
from cur.integrations.model.hooks import forwards_replaced
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import body, evaluating, model_inputs, run
from cur.integrations.nn import dtype_of, is_head

__all__ = ["Ending", "Predictor", "head_is_separate", "output_head", "predicting"]

# Logits in memory at once: 64 MB in float32.
_CHUNK = 1 << 24
_PROBE = 8


class Ending(nn.Module):
    """What a causal language model does with its last hidden states.

    It is made of the head of the model and of nothing that is replaced with layers of the model, so it stays what it
    is when these are, and outlives the rest of the model.

    Parameters
    ----------
    model : nn.Module
        The causal language model.
    example : ModelOutput, optional
        An output of its body, where the logits are not those of the head alone, but scaled or capped: then the model
        itself makes them, with hidden states in the place of its body's. None for the head alone.

    Attributes
    ----------
    head : nn.Linear or CompressedLinear
        The output head, the one of the model.
    """

    def __init__(self, model: nn.Module, example: ModelOutput | None = None) -> None:
        super().__init__()
        self.head = output_head(model)
        self.rest: nn.Module | None = None
        if example is not None:
            self._body = _Given(example)
            known: dict[int, Any] = {id(it): it for it in (*model.parameters(), *model.buffers(), self.head)}
            self.rest = copy.deepcopy(model, {**known, id(body(model)): self._body})

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits of some tokens.

        Parameters
        ----------
        states : Tensor
            Last hidden states, of shape (tokens, width).

        Returns
        -------
        Tensor
            Logits, of shape (tokens, vocabulary).
        """
        if self.rest is None:
            logits: Tensor = self.head(states)
            return logits
        self._body.states = states[None]
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        found: Tensor = run(self.rest, model_inputs(self.rest, ids)).logits[0]
        return found


class _Given(nn.Module):
    """In the place of a body, returns the hidden states that it was given."""

    def __init__(self, example: ModelOutput) -> None:
        super().__init__()
        self.states: Any = None
        self._kind, self._name = type(example), next(iter(example))

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self._kind(**{self._name: self.states})


class Predictor:
    """A causal language model whose last hidden states and logits are had one after the other.

    Parameters
    ----------
    model : nn.Module
        The causal language model.
    probe : Tensor
        A few token ids, shape (1, tokens), with which it is tried out.

    Attributes
    ----------
    ending : Ending or None
        What makes logits of hidden states; None where only the whole model does.
    vocabulary : int
        The number of tokens that are predicted.
    """

    def __init__(self, model: nn.Module, probe: Tensor) -> None:
        self.model = model
        self.vocabulary: int = output_head(model).out_features
        self.ending = _ending(model, probe)
        self.step = max(_CHUNK // self.vocabulary, 1)
        """Tokens whose logits fit into memory at once."""

    def states(self, batch: dict[str, Any]) -> Tensor:
        """Return what logits are made of: last hidden states, or logits where only the whole model makes these.

        Parameters
        ----------
        batch : dict
            A batch of ``input_ids`` and ``attention_mask``.

        Returns
        -------
        Tensor
            Shape (windows, tokens, width).
        """
        inner = body(self.model)
        if self.ending is None:
            logits: Tensor = run(self.model, model_inputs(self.model, batch)).logits
            return logits
        states: Tensor = run(inner, model_inputs(inner, batch))[0]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of some tokens.

        Parameters
        ----------
        states : Tensor
            What :meth:`states` returned of these tokens, of shape (tokens, width).

        Returns
        -------
        Tensor
            Shape (tokens, vocabulary).
        """
        if self.ending is None:
            return states
        logits: Tensor = self.ending(states)
        return logits


@contextmanager
def predicting(model: nn.Module, windows: Tensor, passes: Precision) -> Iterator[Predictor]:
    """Run a causal language model for what it predicts: without gradients, in a precision, its logits unrounded.

    Parameters
    ----------
    model : nn.Module
        The causal language model.
    windows : Tensor
        Windows of tokens, of which the first few are those that it is tried out with.
    passes : Precision
        The precision of matrix products.

    Yields
    ------
    Predictor
        The model, ready to run.
    """
    head = output_head(model)
    with evaluating(model), eager_experts(model), passes.products(), unrounded(head, passes):
        yield Predictor(model, windows[:1, :_PROBE])


def unrounded(head: nn.Module, passes: Precision) -> AbstractContextManager[None]:
    """Let a head compute logits as its weights are: their third digit is one of the likelihood.

    Parameters
    ----------
    head : nn.Module
        The output head of a model, whose weights decide.
    passes : Precision
        The precision of the passes around it.
    """

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def exact(x: Tensor) -> Any:
            with passes.exact():
                return forward(x.to(dtype_of(head)))

        return exact

    return forwards_replaced([(head, wrapped)])


def output_head(model: nn.Module) -> Any:
    """Return the output head of a causal language model, dense or compressed; a TypeError says what is not one.

    Parameters
    ----------
    model : nn.Module
        The model to look into.

    Returns
    -------
    nn.Linear or CompressedLinear
        The output head.

    Raises
    ------
    TypeError
        If the model is no causal language model.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", None)
    generates = callable(can_generate) and can_generate()
    if not is_head(head) or encoder_decoder or not generates or _sees_what_follows(model):
        raise TypeError(
            "perplexity and divergence need a causal language model, "
            f"{type(model).__name__} is not one: it has no predictions of the next token from those before it"
        )
    return head


def _sees_what_follows(model: nn.Module) -> bool:
    """Say whether a model is an encoder under the name of a decoder, as BERT with a language modelling head."""
    config = getattr(model, "config", None)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return masked and getattr(config, "is_decoder", True) is False


def head_is_separate(model: nn.Module, head: nn.Module, ids: Tensor) -> bool:
    """Say whether the logits are just the head applied to the body's output, by trying a few tokens.

    Some models scale or cap the logits after the head.

    Parameters
    ----------
    model : nn.Module
        The causal language model.
    head : nn.Module
        The output head of the model.
    ids : Tensor
        A few token ids, shape (1, tokens).

    Returns
    -------
    bool
        Whether both give the same logits, up to rounding.
    """
    inner = body(model)
    if inner is model:
        return False
    state = run(inner, model_inputs(inner, ids))[0]
    whole = run(model, model_inputs(model, ids)).logits
    # Some models keep the stream in float32 beside weights of half precision.
    return _alike(head(state.to(dtype_of(head))), whole)


def _ending(model: nn.Module, ids: Tensor) -> Ending | None:
    """Return what makes logits of last hidden states, None if that depends on more than these."""
    if head_is_separate(model, output_head(model), ids):
        return Ending(model)
    inner = body(model)
    if inner is model:
        return None
    output = run(inner, model_inputs(inner, ids))
    if not isinstance(output, ModelOutput):
        return None
    states, whole = output[0][0], run(model, model_inputs(model, ids)).logits[0]
    try:
        ending = Ending(model, output)
        same = [_alike(ending(states[start:]), whole[start:]) for start in (0, len(states) // 2)]
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it asks its body, or the text, for something else
        return None
    return ending if all(same) else None


def _alike(ours: Tensor, whole: Tensor) -> bool:
    tolerance = 100 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    return ours.shape == whole.shape and bool((ours - whole).abs().max() <= tolerance)
