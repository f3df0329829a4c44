"""The walk through the blocks of a transformer: what a block is called with, and the hidden state that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.model.hooks import Hook, forwards_replaced, hooked
from cur.integrations.model.running import body, model_inputs, run
from cur.integrations.model.targets import decoder_layers

__all__ = ["BlockCall", "BlockWalk", "ReachedError", "after_blocks", "unpack"]

Batch = Mapping[str, Any]


class ReachedError(Exception):
    """Ends a forward pass where all that was asked for is known."""


def unpack(output: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Take the hidden state out of what a block returns.

    Nothing else knows in which form blocks return it.

    Parameters
    ----------
    output : tensor or tuple
        The output of a block: the hidden state, or a tuple that begins with it.

    Returns
    -------
    hidden : Tensor
        The hidden state that the block returned.
    pack : callable
        Puts another hidden state into the form in which this one was returned.

    Examples
    --------
    >>> hidden, pack = unpack((torch.zeros(1, 2, 3), None))
    >>> tuple(hidden.shape), type(pack(hidden)).__name__
    ((1, 2, 3), 'tuple')
    """
    if isinstance(output, tuple):
        return output[0], lambda hidden: (hidden,)
    return output, lambda hidden: hidden


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden state, with which it is called as its model calls it.

    Attributes
    ----------
    rest : tuple
        Positional arguments after the hidden state.
    options : mapping of str
        The keyword arguments of the call.
    """

    rest: tuple[Any, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """Return the hidden state among the arguments of a block, and the others.

        Parameters
        ----------
        args : tuple
            The positional arguments of the block.
        options : mapping
            The keyword arguments of the block.
        """
        if args:
            return args[0], cls(args[1:], dict(options))
        others = dict(options)
        return others.pop("hidden_states"), cls((), others)

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with a hidden state among them.

        Parameters
        ----------
        hidden : Tensor
            The hidden state to call the block on.
        """
        return (hidden, *self.rest), dict(self.options)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call a block on a hidden state and return the next one."""
        after: Tensor = unpack(block(hidden, *self.rest, **self.options))[0]
        return after


def after_blocks(blocks: Sequence[nn.Module], see: Callable[[int, Tensor], object]) -> list[Hook]:
    """Return hooks that call ``see(number, hidden)`` with the hidden state after every block, whenever it was run.

    Parameters
    ----------
    blocks : sequence of nn.Module
        The blocks to watch, in order.
    see : callable
        Called as ``see(number, hidden)`` after each block.
    """

    def tell(number: int) -> Callable[..., None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            see(number, unpack(output)[0])

        return after

    return [(block, "after", tell(number)) for number, block in enumerate(blocks)]


class BlockWalk:
    """The blocks of a model with one stack of them, entered as the model's own forward pass enters them.

    A walk calls the blocks itself: :meth:`enter` or :meth:`calls` say with what, :class:`BlockCall` takes a hidden
    state through a block, and the hidden state after it is the input of the next.

    Parameters
    ----------
    model : nn.Module
        The model to walk through: a transformer in evaluation mode.
    probe : mapping, optional
        A batch with which is found out in which form blocks return the hidden state. Default: the first one that is
        given to :meth:`calls`.

    Attributes
    ----------
    blocks : list of (str, nn.Module)
        Name and module of every block, as from :func:`~cur.integrations.decoder_layers`.
    """

    def __init__(self, model: nn.Module, probe: Batch | None = None) -> None:
        self.model = model
        self.blocks = decoder_layers(model)
        self._body = body(model)
        self._pack: Callable[[Any], Any] | None = None
        if probe is not None:
            self._learn(probe)

    def enter(self, batch: Batch, index: int = 0) -> tuple[Tensor, BlockCall]:
        """Run the model on a batch up to a block, by default the first; returns what that is called with.

        Parameters
        ----------
        batch : Batch
            The batch to run the model on.
        index : int, default 0
            The number of the block to stop before.

        Returns
        -------
        Tensor, BlockCall
            The hidden state and the other arguments that the block would be called with.
        """
        caught: list[tuple[Tensor, BlockCall]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            caught.append(BlockCall.of(args, options))
            raise ReachedError

        with hooked([(self.blocks[index][1], "before", stop)]), suppress(ReachedError):
            run(self._body, model_inputs(self._body, batch))
        return caught[0]

    def calls(self, batch: Batch) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden state that enters the first block, and what every block is called with besides.

        The model runs on the batch, but for its blocks: each has arguments of its own, as where local and global
        attention take turns.

        Parameters
        ----------
        batch : Batch
            The batch to run the model on.
        """
        found: list[tuple[Tensor, BlockCall]] = []

        def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append(BlockCall.of(args, options))

        if self._pack is None:
            self._learn(batch)
        with self.passing(), hooked([(block, "before", note) for _, block in self.blocks]):
            run(self._body, model_inputs(self._body, batch))
        return found[0][0], [call for _, call in found]

    def passing(self, count: int | None = None) -> AbstractContextManager[None]:
        """Let the first `count` blocks, by default all, return the hidden state that they are called with.

        Parameters
        ----------
        count : int, optional
            The number of blocks that pass their input on; None for all.

        Returns
        -------
        context manager
            A context in which these blocks do nothing.
        """

        def pass_on(*args: Any, **options: Any) -> Any:
            hidden, _ = BlockCall.of(args, options)
            return hidden if self._pack is None else self._pack(hidden)

        return forwards_replaced((block, lambda _: pass_on) for _, block in self.blocks[:count])

    def _learn(self, batch: Batch) -> None:
        with torch.no_grad():
            hidden, call = self.enter(batch)
            args, options = call.arguments(hidden)
            _, self._pack = unpack(self.blocks[0][1](*args, **options))
