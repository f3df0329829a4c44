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
from cur.integrations.model.targets import block_stacks

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
        return output[0], lambda hidden: (hidden, *output[1:])
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

    def reads(self, x: Tensor) -> bool:
        """Say whether a tensor is among the other arguments, as what an encoder returned is for its decoder.

        Parameters
        ----------
        x : Tensor
            The tensor to look for.

        Returns
        -------
        bool
            Whether it is one of them.
        """
        return any(x is value for value in (*self.rest, *self.options.values()))

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
    """The blocks of a model, entered as the model's own forward pass enters them.

    A walk calls the blocks itself: :meth:`enter` or :meth:`calls` say with what, :class:`BlockCall` takes a hidden
    state through a block, and the hidden state after it is the input of the next of its stack. What the model makes of
    the end of one stack for the next, as between an encoder and its decoder, is left to the model.

    Parameters
    ----------
    model : nn.Module
        The model to walk through: a transformer in evaluation mode.
    probe : mapping, optional
        A batch with which is found out in which form blocks return the hidden state. Default: the first one that is
        given to :meth:`calls`.

    Attributes
    ----------
    stacks : list of list of (str, nn.Module)
        Name and module of every block of every stack, as from :func:`~cur.integrations.block_stacks`.
    blocks : list of (str, nn.Module)
        Name and module of every block, one stack after the other.
    """

    def __init__(self, model: nn.Module, probe: Batch | None = None) -> None:
        self.model = model
        self.stacks = block_stacks(model)
        self.blocks = [block for stack in self.stacks for block in stack]
        self._body = body(model)
        self._forms: dict[int, _Form] = {}
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

    def calls(self, batch: Batch, number: int = 0, ended: Sequence[Tensor] = ()) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden state that enters the first block of a stack, and what its blocks are called with besides.

        The model runs on the batch, but for its blocks: each has arguments of its own, as where local and global
        attention take turns. Where the first block of a stack returns something for those after it besides the hidden
        state, such as the bias of positions in T5, that block runs as well.

        Parameters
        ----------
        batch : Batch
            The batch to run the model on.
        number : int, default 0
            The number of the stack.
        ended : sequence of Tensor
            The hidden states with which the stacks before that one end.
        """
        found: list[tuple[Tensor, BlockCall]] = []

        def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append(BlockCall.of(args, options))
            if len(found) == len(self.stacks[number]):
                raise ReachedError

        with (
            suppress(ReachedError),
            self.passing(ended=ended, learning=number),
            hooked([(block, "before", note) for _, block in self.stacks[number]]),
        ):
            run(self._body, model_inputs(self._body, batch))
        return found[0][0], [call for _, call in found]

    def passing(
        self, count: int | None = None, *, ended: Sequence[Tensor] = (), learning: int | None = None
    ) -> AbstractContextManager[None]:
        """Let the first `count` blocks, by default all, return the hidden state that they are called with.

        Parameters
        ----------
        count : int, optional
            The number of blocks that pass their input on; None for all.
        ended : sequence of Tensor
            The hidden states that the blocks of the first stacks return, whatever they are called with.
        learning : int, optional
            The number of a stack whose first block runs, if it is not known yet in which form it returns the state.

        Returns
        -------
        context manager
            A context in which these blocks do nothing.
        """
        now: dict[int, Callable[[Any], Any]] = {}

        def instead(number: int, first: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def pass_on(*args: Any, **options: Any) -> Any:
                    hidden, _ = BlockCall.of(args, options)
                    if first and number >= len(ended) and self._runs(number, learning):
                        output = original(*args, **options)
                        self._forms.setdefault(number, _Form.of(output))
                        now[number] = unpack(output)[1]
                    form = self._forms.get(number)
                    pack = now.get(number) or (form.pack if form is not None else lambda state: state)
                    return pack(ended[number] if number < len(ended) else hidden)

                return pass_on

            return wrap

        places = [
            (block, instead(number, place == 0))
            for number, stack in enumerate(self.stacks)
            for place, (_, block) in enumerate(stack)
        ]
        return forwards_replaced(places[:count])

    def _runs(self, number: int, learning: int | None) -> bool:
        """Say whether the first block of a stack runs although the stack is passed: for what it returns besides."""
        form = self._forms.get(number)
        return number == learning if form is None else form.says_more

    def _learn(self, batch: Batch) -> None:
        with torch.no_grad():
            hidden, call = self.enter(batch)
            args, options = call.arguments(hidden)
            self._forms[0] = _Form.of(self.blocks[0][1](*args, **options))


@dataclass(frozen=True)
class _Form:
    """In which form the blocks of a stack return the hidden state, and whether something for others is beside it."""

    pack: Callable[[Any], Any]
    says_more: bool

    @classmethod
    def of(cls, output: Any) -> _Form:
        if not isinstance(output, tuple):
            return cls(unpack(output)[1], False)
        empty = (None,) * (len(output) - 1)
        return cls(lambda hidden: (hidden, *empty), any(isinstance(part, Tensor) for part in output[1:]))
