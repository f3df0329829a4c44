"""Which positions of a batch count: padding, and what a module is called with in an encoder-decoder or an expert."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cur.integrations.model.experts import LinearExperts
from cur.integrations.model.hooks import Hook
from cur.integrations.model.pointwise import LinearConvolution
from cur.integrations.model.running import is_encoder_decoder
from cur.integrations.model.usage import Inputs

__all__ = ["Masks", "by_token", "channels_first", "decoder_mask", "padding_mask", "token_rows", "token_shapes"]


def padding_mask(inputs: Mapping[str, Any], key: str = "attention_mask") -> torch.Tensor | None:
    """Return the padding mask as booleans, None where every position counts.

    Parameters
    ----------
    inputs : mapping
        The keyword arguments that the model is called with.
    key : str, default "attention_mask"
        The name of the mask among them.

    Raises
    ------
    ValueError
        If the mask is not of shape (batch, length), or a sample is all padding.
    """
    mask = inputs.get(key)
    if mask is None:
        return None
    if mask.ndim != 2:
        if isinstance(inputs, Inputs):  # what another module calls so may be anything
            return None
        raise ValueError(f"`{key}` must have shape (batch, length), got {tuple(mask.shape)}")
    kept: torch.Tensor = mask.bool()
    empty = ~kept.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"sample {int(empty.nonzero()[0])} of a batch is all padding; leave it out")
    return None if bool(kept.all()) else kept


def decoder_mask(batch: Mapping[str, Any] | torch.Tensor) -> torch.Tensor | None:
    """Return the padding mask of a decoder that reads an encoder: its own, or the labels that are not -100.

    Parameters
    ----------
    batch : mapping or Tensor
        The batch that the model is run on.
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if "decoder_attention_mask" in batch or not isinstance(labels, torch.Tensor):
        return padding_mask(batch, "decoder_attention_mask")
    return padding_mask({"labels": labels != -100}, "labels") if labels.ndim == 2 else None


class Masks:
    """Which positions count in what a module is called with.

    In an encoder-decoder the modules of the decoder see its own positions, except where they are called with what the
    encoder returned. An expert sees the tokens that are routed to it.

    Parameters
    ----------
    model : nn.Module
        The model whose parts are asked about.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of_inputs: torch.Tensor | None = None
        self.of_decoder: torch.Tensor | None = None
        self.shapes: list[tuple[int, int]] = []
        self._decodes = is_encoder_decoder(model)
        self._inside: set[int] = set()
        self._encoder: nn.Module | None = None
        self._encoded: weakref.ref[torch.Tensor] | None = None
        self._experts = {
            id(part): experts
            for experts in model.modules()
            if isinstance(experts, LinearExperts)
            for part in experts.modules()
        }
        if self._decodes:
            known: Any = model
            self._inside = {id(part) for part in known.get_decoder().modules()}
            self._encoder = known.get_encoder()

    @property
    def of_outputs(self) -> torch.Tensor | None:
        """The mask of what the model says: of a decoder that reads an encoder its own."""
        return self.of_decoder if self._decodes else self.of_inputs

    def hooks(self) -> list[Hook]:
        """Return what has to be told of the encoder; before other hooks, which need to tell apart what it returns."""
        return [] if self._encoder is None else [(self._encoder, "after", self._after)]

    def start(self, inputs: Mapping[str, Any], batch: Mapping[str, Any] | torch.Tensor) -> None:
        """Take the masks of one batch.

        Parameters
        ----------
        inputs : mapping
            The keyword arguments that the model is called with.
        batch : mapping or Tensor
            The batch that they were made from.
        """
        self.of_inputs = padding_mask(inputs)
        self.shapes = token_shapes(inputs)
        self.of_decoder = decoder_mask(batch)

    def of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of `x`, with which `module` is called, or that it returns.

        Parameters
        ----------
        module : nn.Module
            The module that is called with the tensor, or returns it.
        x : Tensor
            The tensor to find the mask for.
        """
        encoded = self._encoded is not None and self._encoded() is x
        mask = self.of_decoder if id(module) in self._inside and not encoded else self.of_inputs
        experts = self._experts.get(id(module))
        if mask is None or experts is None or experts.routed is None:
            return mask
        count, token = experts.routed
        return mask.reshape(-1).to(token.device)[token] if count == mask.numel() else mask

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self._encoded = weakref.ref(output[0])


def token_rows(x: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the vectors of real tokens in what a module is called with or returns, shape (tokens, width).

    Parameters
    ----------
    x : Tensor
        The tensor, whose last axis is the width.
    mask : Tensor or None
        The padding mask of the batch; None if it has no padding.
    name : str
        The name of the module, for the error.

    Raises
    ------
    ValueError
        If the tensor does not have one row for each token.
    """
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    # Of an expert the mask is that of the tokens which it gets.
    axes = None if mask.ndim == 1 else _token_axes(x.shape, [(int(mask.shape[0]), int(mask.shape[1]))])
    if axes is not None:
        shape = [1] * (x.ndim - 1)
        shape[axes[0]], shape[axes[1]] = mask.shape
        kept = (mask if axes[0] < axes[1] else mask.T).reshape(shape).expand(x.shape[:-1])
        return flat[kept.reshape(-1).to(x.device)]
    if len(flat) == mask.numel():
        return flat[mask.reshape(-1).to(x.device)]
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}, which has not one row per token of a batch of "
        "shape "
        f"{tuple(mask.shape)}, so padding cannot be told apart; calibrate with unpadded text"
    )


def token_shapes(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the numbers of samples and of tokens of each that a model is called with; of a decoder its own as well.

    Parameters
    ----------
    inputs : mapping
        The keyword arguments that the model is called with.
    """
    named = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    given = [inputs[name] for name in named if isinstance(inputs.get(name), torch.Tensor)]
    return [(int(one.shape[0]), int(one.shape[1])) for one in given if one.ndim > 1]


def by_token(state: torch.Tensor, shapes: Sequence[tuple[int, int]], block: nn.Module | None = None) -> torch.Tensor:
    """Return a hidden state as one vector for each token: a view or copy of shape (batch, length, width).

    Several streams of a token (hyper-connections, alternating updates) become one vector. A state whose tokens come
    before its samples, or in one axis with them, is brought into order. Places of an image are its tokens, whether
    channels come first, as in convolutions, or last.

    Parameters
    ----------
    state : Tensor
        The hidden state, whose last axis is the width.
    shapes : sequence of (int, int)
        The numbers of samples and tokens to look for, as from :func:`token_shapes`; if there are none, or none is
        found, the first two axes are taken for them, and a state of two axes has one token a sample.
    block : nn.Module, optional
        The block that is called with the state, or returns it: its sizes tell which axis is the width. By default it
        is the last.

    Raises
    ------
    ValueError
        If the state has fewer than three axes, and not one row for each token.
    """
    axes = _token_axes(state.shape, shapes)
    if axes is not None:
        return state.movedim(axes, (0, 1)).flatten(2)
    if state.ndim >= 3 and not shapes:
        state = state.movedim(1, -1) if block is not None and channels_first(block, state.shape) else state
        return state.flatten(1, -2)
    if state.ndim >= 3:
        return state.flatten(2)
    if not shapes:  # of a module that reads no tokens: one vector a sample
        return state[:, None]
    for batch, length in shapes:
        if len(state) == batch * length:
            return state.reshape(batch, length, -1)
    raise ValueError(
        f"a block is called with a hidden state of shape {tuple(state.shape)}, which has not one vector for each token "
        "of the batch; name the layers to compress instead of choosing among blocks"
    )


def _token_axes(shape: Sequence[int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the axes of samples and of tokens, which lie beside each other, among all but the last axis."""
    for wanted in shapes:
        for place in range(len(shape) - 2):
            if tuple(shape[place : place + 2]) == wanted:
                return place, place + 1
    for batch, length in shapes:  # XLNet has the tokens first
        if len(shape) == 3 and tuple(shape[:2]) == (length, batch):
            return 1, 0
    return None


def channels_first(block: nn.Module, shape: Sequence[int]) -> bool:
    """Say whether the axis after that of the samples is the width of a hidden state.

    Of an image it is where the block has convolutions of so many channels. Else the width is what norms and biases of
    the block have, and where that could be said of the last axis as well, it is that one.

    Parameters
    ----------
    block : nn.Module
        The block that is called with the hidden state, or returns it.
    shape : sequence of int
        The shape of a hidden state that it is called with, or returns.

    Returns
    -------
    bool
        Whether channels come first.
    """
    if len(shape) > 3:
        convolutions = [part for part in block.modules() if isinstance(part, (nn.Conv2d, LinearConvolution))]
        if any(shape[1] in (part.in_channels, part.out_channels) for part in convolutions):
            return True
    sizes = {int(part.shape[0]) for part in block.parameters() if part.ndim == 1}
    return shape[1] in sizes and shape[-1] not in sizes
