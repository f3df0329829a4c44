"""Running a model in parts: up to its first block, and from a block to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations._forward import body, model_inputs, run
from cur.integrations.evaluate import head_is_separate, output_head
from cur.integrations.layers import decoder_layers
from cur.integrations.nn import compressed_modules

__all__ = ["Entry", "Outputs", "ReachedError", "Stack"]


class ReachedError(Exception):
    """Ends a forward pass where all that was asked for is known."""


@dataclass
class Entry:
    """What a block is called with: the hidden state (batch, length, width), and the rest of its arguments."""

    hidden: Tensor
    rest: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass
class Outputs:
    """What a pass from a block to the end gave.

    Attributes
    ----------
    hidden : dict of int to Tensor
        Output of each block that was run, by its index.
    last : Tensor or None
        What the head gets, or the logits where the head cannot be told apart; None if the pass ended before.
    """

    hidden: dict[int, Tensor]
    last: Tensor | None


class _Skipped(nn.Module):
    """Stands in for a block that is not run."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self.as_tuple else hidden


class Stack:
    """The blocks of a model, to be run from any one of them on.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, in evaluation mode.
    probe : Tensor or None
        A few token ids, shape (1, tokens), with which it is tried out. None for a model of which one block is in
        memory: then the blocks before return by themselves what they returned when they were, and :meth:`finish` is
        not for it.
    whole : bool, default False
        Whether it is to be run to its end, for what it says of the next token.

    Attributes
    ----------
    head : nn.Module or None
        The output head of a causal language model, None of any other.
    blocks : list of (str, nn.Module)
        As :func:`~cur.integrations.decoder_layers` has them.
    compressed : list of int
        Indices of the blocks with compressed layers.

    Raises
    ------
    TypeError
        If it is to be run to its end, and is no causal language model.
    """

    def __init__(self, model: nn.Module, probe: Tensor | None, *, whole: bool = False) -> None:
        self.model = model
        try:
            self.head: nn.Module | None = output_head(model)
        except TypeError as error:
            if whole:
                raise TypeError(
                    "a loss through the whole network compares predictions of the next token, which "
                    f"{type(model).__name__} does not make; heal block by block (`scope='block'`, --scope block)"
                ) from error
            self.head = None
        self.blocks = decoder_layers(model)
        self.compressed = [i for i, (_, block) in enumerate(self.blocks) if compressed_modules(block)]
        self._list: Any = model.get_submodule(self.blocks[0][0].rpartition(".")[0])
        self.separate, self._tuples = False, False
        if probe is not None:
            with torch.no_grad():
                self.separate = self.head is not None and head_is_separate(model, self.head, probe)
                entry = self.enter({"input_ids": probe})
                self._tuples = isinstance(self._call(0, entry), tuple)

    def enter(self, batch: Mapping[str, Any], index: int = 0) -> Entry:
        """Run the model up to a block, by default the first, and return what that is called with."""
        caught: list[Entry] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args:
                caught.append(Entry(args[0], args[1:], dict(kwargs)))
            else:
                kwargs = dict(kwargs)
                caught.append(Entry(kwargs.pop("hidden_states"), (), kwargs))
            raise ReachedError

        inner = body(self.model)
        handle = self.blocks[index][1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run(inner, model_inputs(inner, batch))
        except ReachedError:
            pass
        finally:
            handle.remove()
        return caught[0]

    def block(self, index: int, entry: Entry) -> Tensor:
        """Run one block; returns its hidden state."""
        return _hidden_of(self._call(index, entry))

    def _call(self, index: int, entry: Entry) -> Any:
        return self.blocks[index][1](entry.hidden, *entry.rest, **entry.options)

    def finish(
        self, batch: Mapping[str, Any], start: int = 0, hidden: Tensor | None = None, *, stop: int | None = None
    ) -> Outputs:
        """Run the model on a batch, from block `start` on, which gets `hidden`; to the end, or to block `stop`.

        The blocks before `start` are not run. With ``start=0`` and no `hidden` this is the model from its beginning.
        """
        seen: dict[int, Tensor] = {}
        inner = body(self.model) if self.separate else self.model
        with self._skipping(start), self._watching(start, seen, hidden, stop):
            try:
                result = run(inner, model_inputs(inner, batch))
            except ReachedError:
                return Outputs(seen, None)
        return Outputs(seen, result[0] if self.separate else result.logits)

    def logits(self, last: Tensor) -> Tensor:
        """Return the logits of what :attr:`Outputs.last` holds, or of some of its rows."""
        if not self.separate or self.head is None:
            return last
        scores: Tensor = self.head(last)
        return scores

    @contextmanager
    def _skipping(self, start: int) -> Iterator[None]:
        kept = [block for _, block in self.blocks[:start]]
        for index in range(len(kept)):
            self._list[index] = _Skipped(self._tuples)
        try:
            yield
        finally:
            for index, block in enumerate(kept):
                self._list[index] = block

    @contextmanager
    def _watching(self, start: int, seen: dict[int, Tensor], hidden: Tensor | None, stop: int | None) -> Iterator[None]:
        def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def after(_: nn.Module, __: Any, output: Any) -> None:
                seen[index] = _hidden_of(output)
                if index == stop:
                    raise ReachedError

            return after

        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handles = [self.blocks[i][1].register_forward_hook(keep(i)) for i in range(start, len(self.blocks))]
        if hidden is not None and start < len(self.blocks):
            handles.append(self.blocks[start][1].register_forward_pre_hook(replace, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hidden_of(output: Any) -> Tensor:
    """Return the hidden state in what a block returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
