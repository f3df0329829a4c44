"""How far the blocks of a transformer turn the hidden state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cur.integrations.measure.inputs import first_false
from cur.integrations.model.blocks import BlockCall, ChainError, after_blocks
from cur.integrations.model.hooks import Hook
from cur.integrations.model.masks import Masks, by_token

__all__ = ["HiddenAngles"]


class HiddenAngles:
    """Angles between the hidden states of the blocks of one stack, summed over samples.

    The hidden states are what each block is called with, and what the last one returns. A model may go through the
    stack several times: then they are averaged over the passes.

    At the last token of each sample that is not padding, which in a causal model is the one that has seen all others.
    Where every token sees all others, the mean over the tokens of the sample. Hidden states of two shapes, before and
    after a block that has more channels or fewer places of an image, have no angle: it counts as 1, the largest.

    Parameters
    ----------
    blocks : mapping of str to nn.Module
        Names and modules of the blocks of one stack, in order.
    masks : Masks
        The padding masks of the pass.
    causal : bool, default True
        Whether tokens see only those before them in blocks that do not say so themselves.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], masks: Masks, *, causal: bool = True) -> None:
        self.blocks = blocks
        self.masks = masks
        self.causal = _is_causal(blocks.values(), silent=causal)
        self.angles = torch.zeros(len(blocks) + 1, len(blocks) + 1, dtype=torch.float64)
        self.mask: torch.Tensor | None = None
        self.called: list[int] = []
        self.states: list[torch.Tensor] = []

    def hooks(self) -> list[Hook]:
        """Return what sees the hidden state before each block and behind the last."""
        blocks = list(self.blocks.values())
        watched: list[Hook] = [(block, "before", self._before(number)) for number, block in enumerate(blocks)]
        return [*watched, *after_blocks(blocks[-1:], lambda _, hidden: self._keep(len(blocks), blocks[-1], hidden))]

    def start(self) -> None:
        """Forget the states of the batch before."""
        self.states.clear()
        self.called.clear()

    def _before(self, number: int) -> Callable[..., None]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, _ = BlockCall.of(args, kwargs)
            self.mask = self.masks.of(block, state)
            self._keep(number, block, state)

        return before

    def _keep(self, number: int, block: nn.Module, state: torch.Tensor) -> None:
        state = by_token(state.detach(), self.masks.shapes, block)
        self.called.append(number)
        if self.causal:
            rows = torch.arange(len(state), device=state.device)
            if self.mask is None:
                last = torch.full_like(rows, state.shape[1] - 1)
            else:
                mask = self.mask.to(state.device)
                last = state.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
            self.states.append(state[rows, last].to(torch.float64))
        else:  # all tokens of all blocks would not fit onto a device
            self.states.append(state.to("cpu", torch.float64))

    def finish(self) -> str | None:
        """Add the angles of one batch; name the first block whose output is not finite.

        Returns
        -------
        str or None
            The name of the first block whose output is not finite, None if all are.

        Raises
        ------
        ChainError
            If the blocks do not run in order.
        """
        names = list(self.blocks)
        count = len(names) + 1
        passes = [self.states[start : start + count] for start in range(0, len(self.states), count)]
        if not passes or self.called != list(range(count)) * len(passes):
            raise ChainError(f"`layers` must be blocks that run in order, got {', '.join(names[:3])} ...")
        index = first_false([torch.isfinite(state).all() for state in self.states])
        if index is not None:
            index %= count
            return f"the input of {names[0]!r}" if index == 0 else f"the output of {names[index - 1]!r}"
        for states in passes:
            self._add(states, 1 / len(passes))
        return None

    def _add(self, states: Sequence[torch.Tensor], share: float) -> None:
        samples = len(states[0])
        found = torch.full_like(self.angles, samples).fill_diagonal_(0.0)
        for shape in dict.fromkeys(state.shape for state in states):
            same = [number for number, state in enumerate(states) if state.shape == shape]
            found[torch.tensor(same)[:, None], same] = self._summed([states[number] for number in same])
        self.angles += share * found

    def _summed(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the angles between hidden states of one shape, summed over the samples."""
        if self.causal:
            place = states[0].device
            stacked = torch.stack([state.to(place) for state in states], dim=1)  # (batch, states, width)
            return _angular_distances(stacked).sum(0).to(self.angles)
        total = torch.zeros(len(states), len(states), dtype=torch.float64)
        for sample, tokens in enumerate(torch.stack(list(states), dim=2)):  # (batch, length, states, width)
            mask = None if self.mask is None or self.mask.shape[1] != len(tokens) else self.mask[sample].cpu()
            total += _angular_distances(tokens if mask is None else tokens[mask]).mean(0)
        return total


def _is_causal(blocks: Iterable[nn.Module], *, silent: bool) -> bool:
    """Say whether tokens see only those before them, as the attention of the blocks has it, or else `silent`."""
    said = {
        bool(getattr(part, "is_causal", False) or getattr(part, "is_decoder", False))
        for block in blocks
        for part in block.modules()
        if hasattr(part, "is_causal") or hasattr(part, "is_decoder")
    }
    return True in said if said else silent


def _angular_distances(states: torch.Tensor) -> torch.Tensor:
    """Pairwise angles over pi between vectors, shape (..., count, width) to (..., count, count).

    By ``2 atan2(|u - v|, |u + v|)`` for unit vectors (Kahan), since arccos loses half of the digits where it
    matters, at small angles.
    """
    unit = nn.functional.normalize(states, dim=-1, eps=math.ulp(0.0))
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(unit, unit, compute_mode=exact)
    return 2 / math.pi * torch.atan2(apart, torch.cdist(unit, -unit, compute_mode=exact))
