"""Blocks that pause before layers, so that a layer can be made from what all batches bring to it.

Each batch goes through the block once, and the layers after a replacement get its outputs as their inputs.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from cur.integrations.model.blocks import BlockCall
from cur.integrations.model.experts import inside_experts
from cur.integrations.model.hooks import Hook, call_groups, inputs_of
from cur.integrations.model.masks import channels_first

__all__ = ["Course", "layer_groups", "pauses"]


def layer_groups(block: nn.Module, call: BlockCall, hidden: Tensor, names: Sequence[str]) -> list[list[str]]:
    """Return layers of a block in the order of their calls, those called with one tensor (query and key) together.

    Layers that are not called once with every token (experts), or all that an encoder returned, are left out.

    Parameters
    ----------
    block : nn.Module
        The block, which is run once.
    call : BlockCall
        The arguments of the block besides the hidden state.
    hidden : Tensor
        The hidden state of one batch.
    names : sequence of str
        Layers, by their names in the block.
    """
    first = hidden.ndim > 3 and channels_first(block, hidden.shape)
    tokens = hidden.numel() // hidden.shape[1 if first else -1]
    # One that happens to get every token of this batch may get others of the next, or none.
    experts = inside_experts(block)
    names = [name for name in names if name not in experts]
    with inputs_of(block, names) as seen:
        groups = call_groups(block, names, lambda: call(block, hidden))
    calls = Counter(itertools.chain(*groups))
    whole = [
        name for name, x in seen.items() if calls[name] == 1 and (x.numel() // x.shape[-1] == tokens or call.reads(x))
    ]
    return groups if len(whole) == len(names) else call_groups(block, whole, lambda: call(block, hidden))


class Course(greenlet):
    """The way of one batch through a block, which pauses at the hooks of :func:`pauses`.

    Between its layers a block must keep nothing but local variables, as other batches take their way meanwhile.

    Parameters
    ----------
    call : BlockCall
        What the model calls the block with, for this batch.
    block : nn.Module
        The block, whose layers have the hooks.
    hidden : Tensor
        The hidden state that goes into the block.
    """

    def __init__(self, call: BlockCall, block: nn.Module, hidden: Tensor) -> None:
        super().__init__(functools.partial(call, block, hidden))

    def to_layer(self, name: str) -> Tensor:
        """Go on to a layer, and pause before it is called; returns its input.

        Parameters
        ----------
        name : str
            The name of the layer within the block.

        Returns
        -------
        Tensor
            The input that the layer is about to be called with.

        Raises
        ------
        RuntimeError
            If another layer comes first, or the block ends.
        """
        found = self.switch()
        if self.dead or found[0] != name:
            raise out_of_turn(name)
        x: Tensor = found[1]
        return x

    def to_the_end(self) -> Tensor:
        """Go on to the end of the block; returns the next hidden state.

        Returns
        -------
        Tensor
            The hidden state that the block returns.

        Raises
        ------
        RuntimeError
            If there is another pause before that.
        """
        state: Any = self.switch()
        if not self.dead:
            raise RuntimeError(f"{state[0]} is called more often in one of the batches than in the first; exclude it")
        return cast(Tensor, state)


def pauses(block: nn.Module, names: Iterable[str]) -> list[Hook]:
    """Return hooks that pause a :class:`Course` before each of these layers of its block.

    Parameters
    ----------
    block : nn.Module
        The block that the layers belong to.
    names : iterable of str
        The names of the layers within the block.
    """

    def pause(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            course = getcurrent()
            if isinstance(course, Course) and course.parent is not None:  # the layer may be called beside as well
                course.parent.switch((name, args[0]))

        return before

    return [(block.get_submodule(name), "before", pause(name)) for name in names]


def out_of_turn(name: str) -> RuntimeError:
    """Return the error of a layer that is not called in its turn."""
    return RuntimeError(
        f"{name} is not called in its turn in one of the batches, as in the first; exclude the layers of this block "
        "that are called in another order, or not at all, from case to case"
    )
