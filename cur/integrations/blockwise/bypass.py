"""Running a model of which one block is in memory.

The model's own forward pass runs: it prepares masks, positions and whatever else its family has, and calls every block
with it. Only what the blocks do is changed. Blocks before the one that is in memory return what the last of them
returned when it was; blocks after it return what it returned. So whatever looks at a block or its layers, calibration
for one, sees exactly what it would see in the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.model.blocks import (
    BlockCall,
    ChainError,
    Left,
    ReachedError,
    and_left,
    beside,
    is_handed_on,
    leave,
    unpack,
)
from cur.integrations.model.hooks import forwards_replaced, hooked
from cur.integrations.model.running import body

__all__ = ["KEPT", "Bypass"]

_LEFT = "left-"

KEPT = ("embedding-", _LEFT)
"""What the names of places begin with whose outputs are needed to the end."""


class Bypass:
    """The blocks of a model, bypassed but one.

    Parameters
    ----------
    streamed : StreamedModel
        The model. Its forward passes are of this kind while :meth:`open` lasts.
    states : HiddenStates
        The files in which the outputs of blocks are kept.

    Attributes
    ----------
    active : int
        Number of the block that runs; the number of all blocks for none: then all of them were run.
    recording : bool
        Whether what the active block returns is stored.
    starts : set of int
        Numbers of blocks that are called with something else than what the block before returned: the first ones of
        stacks, and those before which the model does something with the hidden state, as they are found.
    """

    def __init__(self, streamed: StreamedModel, states: HiddenStates) -> None:
        self.streamed = streamed
        self.states = states
        self.active = 0
        self.recording = False
        self.starts = set(streamed.starts)
        self._batch = ""
        self._latest: Any = None
        self._pack: Callable[[Any], Any] | None = None
        self._stored: dict[int, Any] = {}
        self._blank: dict[int, Any] = {}
        self._calls: dict[str, int] = {}
        self._met = -1
        self._leaving: set[int] = set()
        self._leaving_of = -1
        self._inside: list[int] = []

    @contextmanager
    def open(self) -> Iterator[Bypass]:
        """Bypass the blocks while this lasts.

        Yields
        ------
        Bypass
            The bypass itself.
        """
        blocks = [(block, partial(self._block, number)) for number, (_, block) in enumerate(self.streamed.blocks)]
        tables = [(table, partial(self._table, name, table)) for name, table in self.streamed.embeddings().items()]
        inner = body(self.streamed.model)
        whole = (inner, lambda original: self._until_reached(self._watched(original)))
        with hooked([(inner, "before", self._start)]), forwards_replaced([*blocks, *tables, whole]):
            yield self

    @contextmanager
    def at(self, index: int, *, recording: bool = True) -> Iterator[None]:
        """Have a block in memory and let it run while this lasts; the embeddings, stored by then, go with the first.

        Parameters
        ----------
        index : int
            The number of the block, counted from 0.
        recording : bool, default True
            Whether what it returns is stored.
        """
        self.streamed.load_block(index)
        self.active, self.recording = index, recording
        try:
            yield
        finally:
            self.recording = False
        self.streamed.free_block(index)
        if index == 0:
            self.free_embeddings()

    def free_embeddings(self) -> None:
        """Let go of the tables of embeddings of which the outputs are stored.

        Others stay: a model may read the weight of a table itself, as where positions are stretched to the size of an
        image, or a later stack is the first that looks something up.
        """
        stored = self.states.places("embedding-")
        self.streamed.free_embeddings({place.removeprefix("embedding-").rpartition("-")[0] for place in stored})

    def drop_before(self, index: int, *, keep: str | None = None) -> None:
        """Remove what the block before one returned, but for one batch.

        What a block returned that the model does something with stays: it will do so again.

        Parameters
        ----------
        index : int
            The number of the block.
        keep : str, optional
            The name of a batch whose output stays.
        """
        if index not in self.starts:
            self.states.drop(self.place(index - 1), keep=keep)

    def place(self, number: int) -> str:
        """Return the name under which the outputs of a block are stored.

        Parameters
        ----------
        number : int
            The number of the block.
        """
        return f"block-{number:04}"

    def key(self, inputs: dict[str, Any]) -> str:
        """Return the name of a batch: a hash of its tensors.

        Parameters
        ----------
        inputs : dict
            The tensors of the batch, by name.
        """
        digest = hashlib.sha256()
        for name in sorted(inputs):
            if isinstance(inputs[name], torch.Tensor):
                tensor = inputs[name].cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _start(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = self.key({**{str(index): value for index, value in enumerate(args)}, **kwargs})
        self._latest = None
        self._stored.clear()
        self._blank.clear()
        self._calls.clear()
        self._met = -1
        if self._leaving_of != self.active:  # what the blocks before leave does not change any more
            places = set(self.states.places(_LEFT))
            self._leaving = {number for number in range(self.active) if f"{_LEFT}{self.place(number)}" in places}
            self._leaving_of = self.active

    def _block(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if number == self.active:
                self._met = number
                if self._latest is not None:
                    raise ChainError(
                        f"{self.streamed.blocks[number][0]} runs more than once in a pass, so block by block its input "
                        "is not known; load the whole model"
                    )
                if _hold_nan([args, kwargs]) and not _hold_nan(list(self._stored.values())):
                    raise ChainError(
                        f"{self.streamed.blocks[number][0]} depends on what several blocks before it returned, so "
                        "block by block its input is not known; load the whole model"
                    )
                try:
                    self._latest, left = and_left(original, args, kwargs)
                except ChainError as error:
                    name = self.streamed.blocks[number][0]
                    raise ChainError(f"{name} cannot be run without others: {error}; load the whole model") from error
                _, self._pack = unpack(self._latest)
                if self.recording:
                    self._write(number, self._latest, left)
                return self._latest
            if number == self.active + 1 and not is_handed_on(unpack(self._latest)[0], BlockCall.of(args, kwargs)[0]):
                self.starts.add(number)
            if number > self.active:
                if self._end(number) != self._end(self.active):  # another stack, whose blocks return another form
                    last = self._end(self.active) - 1
                    if self._met < last:
                        raise ChainError(
                            f"{self.streamed.blocks[number][0]} runs before {self.streamed.blocks[last][0]} does, so "
                            "block by block the inputs of both are not known; load the whole model"
                        )
                    raise ReachedError
                self._met = number
                return self._latest
            if number in self._leaving and self.states.has(f"{_LEFT}{self.place(number)}", self._batch):
                leave(self.states.read(f"{_LEFT}{self.place(number)}", self._batch), args, kwargs)
            last = min(self.active, self._end(number)) - 1
            output = self._before(last, args, kwargs)
            if number < last and last in self._stored:  # the next one does not look at it, and nothing else may
                return self._nothing(last)
            return output

        return forward

    def _write(self, number: int, output: Any, left: Left) -> None:
        """Store what a block returned, and what it left in its arguments."""
        try:
            self.states.write(self.place(number), self._batch, output)
            if left:
                self.states.write(f"{_LEFT}{self.place(number)}", self._batch, [list(one) for one in left])
        except TypeError as error:
            raise ChainError(f"{self.streamed.blocks[number][0]}: {error}") from None

    def _nothing(self, last: int) -> Any:
        """Return what a block before `last` returns, in the form of what that one returned: NaN, and the rest of it."""
        if last not in self._blank:
            output = self._stored[last]
            hidden = unpack(output)[0]
            floating = isinstance(hidden, torch.Tensor) and hidden.is_floating_point()
            self._blank[last] = beside(output)(torch.full_like(hidden, torch.nan)) if floating else output
        return self._blank[last]

    def _end(self, number: int) -> int:
        """Return the number of the block behind the last one that gets what the block before returned, from one on."""
        return min((start for start in self.starts if start > number), default=len(self.streamed.blocks))

    def _before(self, last: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what block `last` returned for this batch.

        Once all blocks were run, a batch that was not among those may ask what surrounds the blocks: they let it pass.
        """
        if last not in self._stored:
            place = self.place(last)
            if self.active == len(self.streamed.blocks) and not self.states.has(place, self._batch):
                hidden, _ = BlockCall.of(args, kwargs)
                return hidden if self._pack is None else self._pack(hidden)
            self._stored[last] = self.states.read(place, self._batch)
        return self._stored[last]

    def _until_reached(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward pass of a model that ends, with nothing, where all that was asked for is known.

        What comes behind the blocks is not asked for while one runs that is not the last: it gets what that one
        returned, which is of another shape where later ones have more channels.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                output = original(*args, **kwargs)
                if self.active == len(self.streamed.blocks):
                    self._check_end(output)
                return output
            except ReachedError:
                return None
            except (RuntimeError, ValueError) as error:
                if isinstance(error, ChainError) or not self.active < self._met == len(self.streamed.blocks) - 1:
                    raise
                return None

        return forward

    def _check_end(self, output: Any) -> None:
        """Refuse what a model makes of more than the last block of each stack: the others returned nothing."""
        found = next((one for one in tree_leaves(output) if isinstance(one, torch.Tensor)), None)
        if _hold_nan(found) and not _hold_nan(list(self._stored.values())):
            raise ChainError(
                f"what {type(self.streamed.model).__name__} returns depends on what several of its blocks returned, so "
                "block by block it is not known; load the whole model"
            )

    def _table(self, name: str, table: nn.Embedding, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward pass of a table of embeddings, whose outputs stand in for it once it is gone."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            place = f"embedding-{name}-{call}"
            if table.weight.is_meta:
                if not self.recording or self.states.has(place, self._batch):
                    return self.states.read(place, self._batch)
                self.streamed.load_embedding(name)  # the first call was not the last, as between three stacks
            self._inside.append(id(table.weight))
            try:
                output = original(*args, **kwargs)
            finally:
                self._inside.pop()
            if self.recording:
                self.states.write(place, self._batch, output)
            return output

        return forward

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward pass of the model, which finds out what tables are read elsewhere than in their own.

        That is seen while the first block is reached; from then on outputs of tables stand in for them.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.active > 0:
                return original(*args, **kwargs)
            tables = {id(table.weight): name for name, table in self.streamed.embeddings().items()}
            with _Reading(tables, self._inside, self.streamed.read):
                return original(*args, **kwargs)

        return forward


class _Reading(TorchFunctionMode):
    """Notes which tables of embeddings are read elsewhere than in their own forward pass.

    Parameters
    ----------
    tables : mapping of int to str
        The names of tables by the addresses of their weights.
    inside : sequence of int
        The weights whose own forward pass runs.
    found : set of str
        Where names are added.
    """

    def __init__(self, tables: Mapping[int, str], inside: Sequence[int], found: set[str]) -> None:
        super().__init__()
        self.tables, self.inside, self.found = tables, inside, found

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) for one in tree_leaves(output)):  # a shape, a dtype or a device remain
            read = {id(one) for one in tree_leaves([args, kwargs]) if isinstance(one, torch.Tensor)}
            self.found |= {self.tables[key] for key in read & self.tables.keys() if key not in self.inside}
        return output


def _hold_nan(values: Any) -> bool:
    """Say whether a tensor is NaN somewhere, among whatever holds tensors."""
    tensors = (one for one in tree_leaves(values) if isinstance(one, torch.Tensor) and one.is_floating_point())
    return any(bool(one.isnan().any()) for one in tensors)
