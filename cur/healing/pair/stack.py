"""Running a model from any of its blocks on, to the end or to another block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.model.blocks import BlockCall, BlockWalk, ReachedError, after_blocks
from cur.integrations.model.hooks import hooked
from cur.integrations.model.running import body, model_inputs, run
from cur.integrations.nn import compressed_modules, dtype_of
from cur.integrations.report.endings import head_is_separate, output_head

__all__ = ["Outputs", "Stack"]


@dataclass
class Outputs:
    """What a pass from a block to the end gave.

    Attributes
    ----------
    hidden : dict of int to Tensor
        Output of each block that was run, by its index.
    last : Tensor or None
        The hidden state that the head gets, or the logits where the head cannot be told apart; None if the pass ended
        before.
    """

    hidden: dict[int, Tensor]
    last: Tensor | None


class Stack(BlockWalk):
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
    compressed : list of int
        Indices of the blocks with compressed layers.

    Raises
    ------
    TypeError
        If it is to be run to its end, and is no causal language model.
    """

    def __init__(self, model: nn.Module, probe: Tensor | None, *, whole: bool = False) -> None:
        self.head = _head_of(model, needed=whole)
        super().__init__(model, None if probe is None else {"input_ids": probe})
        self.compressed = [i for i, (_, block) in enumerate(self.blocks) if compressed_modules(block)]
        self.separate = False
        if probe is not None:
            with torch.no_grad():
                self.separate = self.head is not None and head_is_separate(model, self.head, probe)

    def finish(
        self, batch: Mapping[str, Any], start: int = 0, hidden: Tensor | None = None, *, stop: int | None = None
    ) -> Outputs:
        """Run the model on a batch, from block `start` on, which gets `hidden`; to the end, or to block `stop`.

        The blocks before `start` are not run. With ``start=0`` and no `hidden` this is the model from its beginning.

        Parameters
        ----------
        batch : mapping
            The batch to run the model on.
        start : int, default 0
            The number of the first block that runs.
        hidden : Tensor, optional
            The hidden state that block `start` gets; None to begin with the embeddings.
        stop : int, optional
            The number of the last block that runs; None to go to the end.

        Returns
        -------
        Outputs
            The hidden states after the blocks that ran, and what the head gets if the pass went to the end.
        """
        seen: dict[int, Tensor] = {}

        def keep(number: int, after: Tensor) -> None:
            seen[start + number] = after
            if start + number == stop:
                raise ReachedError

        def enter(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any] | None:
            return None if hidden is None else BlockCall.of(args, options)[1].arguments(hidden)

        blocks = [block for _, block in self.blocks[start:]]
        hooks = after_blocks(blocks, keep)
        hooks += [(block, "before", enter) for block in blocks[:1]]
        inner = body(self.model) if self.separate else self.model
        with self.passing(start), hooked(hooks):
            try:
                result = run(inner, model_inputs(inner, batch))
            except ReachedError:
                return Outputs(seen, None)
        return Outputs(seen, result[0] if self.separate else result.logits)

    def logits(self, last: Tensor) -> Tensor:
        """Return the logits of what :attr:`Outputs.last` holds, or of some of its rows.

        Parameters
        ----------
        last : Tensor
            The hidden states that the head gets.
        """
        if not self.separate or self.head is None:
            return last
        scores: Tensor = self.head(last.to(dtype_of(self.head)))
        return scores


def _head_of(model: nn.Module, *, needed: bool) -> nn.Module | None:
    try:
        head: nn.Module = output_head(model)
        return head
    except TypeError as error:
        if needed:
            raise TypeError(
                "a loss through the whole network compares predictions of the next token, which "
                f"{type(model).__name__} does not make; heal block by block (`scope='block'`, --scope block)"
            ) from error
        return None
