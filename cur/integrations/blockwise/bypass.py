"""Running a model of which one block is in memory.

The model's own forward pass runs: it prepares masks, positions and whatever else its family has, and calls every block
with it. Only what the blocks do is changed. Blocks before the one that is in memory return what the last of them
returned when it was; blocks behind it return what it returned. So whatever looks at a block or its layers, calibration
for one, sees exactly what it would see in the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cur.integrations.blockwise.hidden_states import States
from cur.integrations.blockwise.streamed_model import Skeleton
from cur.integrations.model.running import body

__all__ = ["Tunnel"]


class Tunnel:
    """The blocks of a model, bypassed but one.

    Parameters
    ----------
    skeleton : Skeleton
        The model. Its forward passes are of this kind while :meth:`open` lasts.
    states : States
        Where the outputs of blocks are kept.

    Attributes
    ----------
    active : int
        Number of the block that runs; the number of all blocks for none: then all of them were run.
    recording : bool
        Whether what the active block returns is stored.
    """

    def __init__(self, skeleton: Skeleton, states: States) -> None:
        self.skeleton = skeleton
        self.states = states
        self.active = 0
        self.recording = False
        self._ends = _ends([len(stack) for stack in skeleton.stacks])
        self._batch = ""
        self._latest: Any = None
        self._stored: dict[int, Any] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def open(self) -> Iterator[Tunnel]:
        """Bypass the blocks while this lasts."""
        blocks = [block for _, block in self.skeleton.blocks]
        tables = self.skeleton.embeddings()
        before = body(self.skeleton.model).register_forward_pre_hook(self._start, with_kwargs=True)
        for number, block in enumerate(blocks):
            block.forward = self._block(number, block.forward)
        for name, table in tables.items():
            table.forward = self._table(name, table, table.forward)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            before.remove()
            for module in (*blocks, *tables.values()):
                del module.forward

    def place(self, number: int) -> str:
        """Return the name under which the outputs of a block are stored."""
        return f"block-{number:04}"

    def key(self, inputs: dict[str, Any]) -> str:
        """Return the name of a batch: a hash of its tensors."""
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
        self._calls.clear()

    def _block(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if number == self.active:
                self._latest = original(*args, **kwargs)
                if self.recording:
                    self.states.write(self.place(number), self._batch, self._latest)
                return self._latest
            if number > self.active:
                return self._latest
            return self._before(min(self.active, self._ends[number]) - 1, args, kwargs)

        return forward

    def _before(self, last: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what block `last` returned for this batch.

        Once all blocks were run, a batch that was not among those may ask what surrounds the blocks: they let it pass.
        """
        if last not in self._stored:
            place = self.place(last)
            if self.active == len(self._ends) and not self.states.has(place, self._batch):
                return args[0] if args else kwargs["hidden_states"]
            self._stored[last] = self.states.read(place, self._batch)
        return self._stored[last]

    def _table(self, name: str, table: nn.Embedding, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward pass of a table of embeddings, whose outputs stand in for it once it is gone."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            place = f"embedding-{name}-{call}"
            if table.weight.is_meta:
                return self.states.read(place, self._batch)
            output = original(*args, **kwargs)
            if self.recording:
                self.states.write(place, self._batch, output)
            return output

        return forward


def _ends(lengths: list[int]) -> list[int]:
    """Return for every block the number of the block behind the last of its stack."""
    ends: list[int] = []
    for length in lengths:
        ends += [len(ends) + length] * length
    return ends
