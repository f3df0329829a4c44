"""The walk through the blocks of a transformer: what a block is called with, and the hidden state that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cur.integrations.model.hooks import Hook, forwards_replaced, hooked
from cur.integrations.model.running import body, evaluating, is_encoder_decoder, model_inputs, run
from cur.integrations.model.targets import block_stacks, found_stacks, networks

__all__ = [
    "BlockCall",
    "BlockWalk",
    "ChainError",
    "HollowError",
    "Left",
    "ReachedError",
    "after_blocks",
    "and_left",
    "are_in_line",
    "beside",
    "chain_fault",
    "is_handed_on",
    "leave",
    "unpack",
]

Batch = Mapping[str, Any]


class ReachedError(Exception):
    """Ends a forward pass where all that was asked for is known."""


class ChainError(ValueError):
    """Says that blocks do not hand one hidden state on from each to the next."""


class HollowError(ChainError):
    """Says that blocks cannot be walked through because not all of them are in memory."""


def unpack(output: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Take the hidden state out of what a block returns.

    Nothing else knows in which form blocks return it.

    Parameters
    ----------
    output : tensor, tuple or list
        The output of a block: the hidden state, or a tuple or list that begins with it.

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
    if isinstance(output, (tuple, list)):
        rest = [None] * (len(output) - 1)  # not what belongs to this batch
        return output[0], lambda hidden: [hidden, *rest] if isinstance(output, list) else (hidden, *rest)
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
    name : str or None
        The name of the argument that the hidden state is; None where it comes first.
    """

    rest: tuple[Any, ...]
    options: Mapping[str, Any]
    name: str | None = None

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
        tensors = [key for key, value in others.items() if isinstance(value, Tensor)]
        name = "hidden_states" if "hidden_states" in others or not tensors else tensors[0]
        return others.pop(name), cls((), others, name)

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with a hidden state among them.

        Parameters
        ----------
        hidden : Tensor
            The hidden state to call the block on.
        """
        if self.name is not None:
            return (), {self.name: hidden, **self.options}
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
        args, options = self.arguments(hidden)
        after: Tensor = unpack(alone(block, args, options))[0]
        return after


def alone(block: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Call a block that may be run without those before it: it must leave nothing for others in its arguments.

    Parameters
    ----------
    block : callable
        The block, or its forward pass.
    args : sequence
        The positional arguments of the block.
    options : mapping
        The keyword arguments of the block.

    Raises
    ------
    ChainError
        If the block changes a mapping or a list among its arguments.
    """
    output, left = and_left(block, args, options)
    if left:
        raise ChainError(_LEAVES)
    return output


_LEAVES = (
    "a block leaves something for later ones in what it is called with, so that they depend on more than the hidden "
    "state"
)

Left: TypeAlias = "list[tuple[int | str, Any, Any]]"
"""What a block leaves for later ones: where among its arguments, under which key, and what."""


def and_left(block: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, Left]:
    """Call a block; returns its output, and what it leaves for later ones in the mappings that it is called with.

    Parameters
    ----------
    block : callable
        The block, or its forward pass.
    args : sequence
        The positional arguments of the block.
    options : mapping
        The keyword arguments of the block.

    Returns
    -------
    Any, list
        The output, and what :func:`leave` puts there again.

    Raises
    ------
    ChainError
        If the block changes a list among its arguments, or takes something out of a mapping.
    """
    given: dict[int | str, Any] = {**dict(enumerate(args)), **dict(options.items())}
    before = {place: _held(value) for place, value in given.items() if isinstance(value, (Mapping, list))}
    output = block(*args, **options)
    left: Left = []
    for place, held in before.items():
        now = _held(given[place])
        if now != held and (not isinstance(given[place], Mapping) or held.keys() - now.keys()):
            raise ChainError(_LEAVES)
        left += [(place, key, given[place][key]) for key in now if held.get(key) != now[key]]
    return output, left


def leave(left: Left, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Put what a block has left for later ones into the arguments of a call.

    Parameters
    ----------
    left : list
        What was left, as from :func:`and_left`.
    args : sequence
        The positional arguments of the call.
    options : mapping
        The keyword arguments of the call.
    """
    for place, key, value in left:
        (options[place] if isinstance(place, str) else args[place])[key] = value


def _held(value: Mapping[Any, Any] | list[Any]) -> dict[Any, int]:
    """Return what a mapping or a list holds, by address."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {key: id(part) for key, part in parts}


def chain_fault(model: nn.Module, batch: Batch) -> str | None:
    """Say why the blocks of a model cannot be walked through one after the other; None if they can.

    Parameters
    ----------
    model : nn.Module
        The model, which is run on the batch and not changed.
    batch : Batch
        The batch to run it on.

    Returns
    -------
    str or None
        What is in the way, None if walking gives what the model itself gives.

    Raises
    ------
    HollowError
        If it cannot be told because not all blocks are in memory.
    """
    if not are_in_line(model):
        return f"{type(model).__name__} has {len(found_stacks(model))} stacks of blocks, not one"
    last: dict[int, list[Any]] = {}
    with evaluating(model):
        walk = BlockWalk(model)
        ended: list[Tensor] = []
        try:
            for number, stack in enumerate(walk.stacks):
                hidden, calls = walk.calls(batch, number, ended)
                for (_, block), call in zip(stack, calls, strict=True):
                    hidden = call(block, hidden)
                ended.append(hidden)
        except HollowError:
            raise
        except ChainError as error:
            return str(error)
        except (RuntimeError, TypeError, ValueError) as error:  # whatever a block says that is not called so
            reason = " ".join(str(error).split()) or type(error).__name__
            return (
                f"the blocks of {type(model).__name__} cannot be called one after the other on one hidden state "
                f"({reason})"
            )
        ends = [stack[-1][1] for stack in walk.stacks]
        with hooked(after_blocks(ends, lambda number, hidden: last.setdefault(number, []).append(hidden))):
            run(body(model), model_inputs(body(model), batch))
    if all(_are_near(last.get(number, []), hidden) for number, hidden in enumerate(ended)):
        return None
    return f"the blocks of {type(model).__name__} depend on more than the hidden state and their arguments"


def are_in_line(model: nn.Module) -> bool:
    """Say whether the blocks of a model follow each other: in one stack, in stages, or in an encoder and its decoder.

    Parameters
    ----------
    model : nn.Module
        The model to look at.

    Returns
    -------
    bool
        Whether they do; stacks of another kind may run side by side.
    """
    return len(networks(found_stacks(model))) == 1 or is_encoder_decoder(model)


def _are_near(found: list[Any], wanted: Tensor) -> bool:
    """Say whether a block returned a hidden state, or one that is near to it, once."""
    same = len(found) == 1 and isinstance(found[0], Tensor) and found[0].shape == wanted.shape
    return same and bool(torch.isclose(found[0], wanted, atol=1e-3).all())


def is_handed_on(left: Any, entered: Any) -> bool:
    """Say whether a block is called with the hidden state that the one before it returned.

    Parameters
    ----------
    left : Any
        The hidden state that a block returned.
    entered : Any
        The hidden state that the next one is called with.

    Returns
    -------
    bool
        Whether they are the same tensor, or equal.
    """
    same = isinstance(left, Tensor) and isinstance(entered, Tensor) and left.shape == entered.shape
    return left is entered or (same and torch.equal(left, entered))


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
        self._awake: set[int] = set()
        if probe is not None:
            self._learn(probe, 0, ())

    def decodes(self, number: int) -> bool:
        """Say whether a stack is the decoder's, in a model that has an encoder as well.

        Parameters
        ----------
        number : int
            The number of the stack.

        Returns
        -------
        bool
            Whether the stack is the decoder's.
        """
        if not is_encoder_decoder(self.model):
            return False
        known: Any = self.model
        block = self.stacks[number][0][1]
        return any(part is block for part in known.get_decoder().modules())

    def enter(self, batch: Batch, index: int = 0, ended: Sequence[Tensor] = ()) -> tuple[Tensor, BlockCall]:
        """Run the model on a batch up to a block, by default the first; returns what that is called with.

        Parameters
        ----------
        batch : Batch
            The batch to run the model on.
        index : int, default 0
            The number of the block to stop before.
        ended : sequence of Tensor
            The hidden states with which the first stacks end, if their blocks need not run.

        Returns
        -------
        Tensor, BlockCall
            The hidden state and the other arguments that the block would be called with.

        Raises
        ------
        ChainError
            If the block is not called.
        """
        caught: list[tuple[Tensor, BlockCall]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            caught.append(BlockCall.of(args, options))
            raise ReachedError

        passed = sum(map(len, self.stacks[: len(ended)]))
        hooks: list[Hook] = [(self.blocks[index][1], "before", stop)]
        with suppress(ReachedError), self.passing(passed, ended=ended), hooked(hooks):
            run(self._body, model_inputs(self._body, batch))
        if not caught:
            raise ChainError(f"no input reaches {self.blocks[index][0]} with the first batch")
        return caught[0]

    def calls(self, batch: Batch, number: int = 0, ended: Sequence[Tensor] = ()) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden state that enters the first block of a stack, and what its blocks are called with besides.

        The model runs on the batch, but for its blocks: each has arguments of its own, as where local and global
        attention take turns. Where the first block of a stack returns something for those after it besides the hidden
        state, such as the bias of positions in T5, that block runs as well; where others do, all of them.

        Parameters
        ----------
        batch : Batch
            The batch to run the model on.
        number : int, default 0
            The number of the stack.
        ended : sequence of Tensor
            The hidden states with which the stacks before that one end.

        Raises
        ------
        ChainError
            If a block is not called with the hidden state that the one before it returned.
        """
        blocks = [block for _, block in self.stacks[number]]
        found: list[tuple[nn.Module, Tensor, BlockCall]] = []
        left: list[Any] = []

        def note(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append((block, *BlockCall.of(args, options)))
            if len(found) == len(blocks) and number + 1 < len(self.stacks):  # others may not be known yet
                raise ReachedError

        if number not in self._forms:
            self._learn(batch, number, ended)
        watched: list[Hook] = [(block, "before", note) for block in blocks]
        watched += after_blocks(blocks, lambda _, hidden: left.append(hidden))
        with suppress(ReachedError), self.passing(ended=ended), hooked(watched):
            run(self._body, model_inputs(self._body, batch))
        handed = zip(left, [hidden for _, hidden, _ in found[1:]], strict=False)
        if [block for block, _, _ in found] != blocks or not all(is_handed_on(one, other) for one, other in handed):
            raise ChainError(
                f"the blocks of {type(self.model).__name__} do not get the hidden state that the one before returned: "
                "something else happens to it between them"
            )
        return found[0][1], [call for _, _, call in found]

    def passing(self, count: int | None = None, *, ended: Sequence[Tensor] = ()) -> AbstractContextManager[None]:
        """Let the first `count` blocks, by default all, return the hidden state that they are called with.

        The first block of a stack runs all the same where it hands on more than the hidden state, and that goes on with
        what all of them return. Blocks that hand on more each are left to run.

        Parameters
        ----------
        count : int, optional
            The number of blocks that pass their input on; None for all.
        ended : sequence of Tensor
            The hidden states that the blocks of the first stacks return, whatever they are called with.

        Returns
        -------
        context manager
            A context in which these blocks do nothing.
        """
        now: dict[int, Callable[[Any], Any]] = {}

        def instead(number: int, first: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def pass_on(*args: Any, **options: Any) -> Any:
                    form = self._forms.get(number, _PLAIN)
                    if number < len(ended):
                        return form.pack(ended[number])
                    hidden, _ = BlockCall.of(args, options)
                    if first and form.says_more:
                        now[number] = beside(original(*args, **options))
                    return now.get(number, form.pack)(hidden)

                return pass_on

            return wrap

        places = [
            (block, instead(number, place == 0))
            for number, stack in enumerate(self.stacks)
            for place, (_, block) in enumerate(stack)
            if number < len(ended) or number not in self._awake
        ]
        return forwards_replaced(places[:count])

    def _learn(self, batch: Batch, number: int, ended: Sequence[Tensor]) -> None:
        """Find out in which form the blocks of a stack return the hidden state, and what they hand on besides."""
        first = sum(map(len, self.stacks[:number]))
        with torch.no_grad():
            hidden, call = self.enter(batch, first, ended)
            args, options = call.arguments(hidden)
            output = self.blocks[first][1](*args, **options)
            self._forms[number] = form = _Form.of(output)
            if len(self.stacks[number]) < 2 or not form.says_more:
                return
            # What a later block is called with after these, and where they pass their inputs on: the last one, as each
            # may change what it hands on, or the next where no others are in memory.
            hollow = any(p.is_meta for _, block in self.stacks[number] for p in block.parameters())
            later = first + (1 if hollow else len(self.stacks[number]) - 1)
            _, real = self.enter(batch, later, ended)
            try:
                with self.passing(ended=ended):
                    _, passed = self.enter(batch, later, ended)
            except (TypeError, ValueError):  # the model does something with the rest
                passed = None
        if passed is not None and _equal((real.rest, real.options), (passed.rest, passed.options)):
            return
        self._awake.add(number)
        if hollow:
            raise HollowError(
                f"the blocks of {type(self.model).__name__} hand on more than the hidden state, and not all are in "
                "memory; load the whole model"
            )


@dataclass(frozen=True)
class _Form:
    """In which form the blocks of a stack return the hidden state, and whether something for others is beside it."""

    pack: Callable[[Any], Any]
    says_more: bool

    @classmethod
    def of(cls, output: Any) -> _Form:
        rest = output[1:] if isinstance(output, (tuple, list)) else ()
        return cls(unpack(output)[1], any(part is not None for part in rest))


_PLAIN = _Form(lambda hidden: hidden, False)


def beside(output: Any) -> Callable[[Any], Any]:
    """Return what puts another hidden state beside the rest of what a block returned.

    Parameters
    ----------
    output : tensor, tuple or list
        The output of a block, as for :func:`unpack`.

    Returns
    -------
    callable
        A function from a hidden state to an output.
    """
    if not isinstance(output, (tuple, list)):
        return lambda hidden: hidden
    kind = type(output)
    return lambda hidden: kind([hidden, *output[1:]])


def _equal(one: Any, other: Any) -> bool:
    """Say whether arguments are equal, those inside of others as well."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return is_handed_on(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True
