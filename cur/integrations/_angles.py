"""How far the blocks of a transformer turn the hidden state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["HiddenAngles"]


class HiddenAngles:
    """Angles between the hidden states of blocks at the last token of each sample, summed over samples."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.blocks = blocks
        self.angles = torch.zeros(len(blocks) + 1, len(blocks) + 1, dtype=torch.float64)
        self.mask: torch.Tensor | None = None
        self.states: list[torch.Tensor] = []

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        if not self.blocks:
            return []
        first = next(iter(self.blocks.values()))
        before = first.register_forward_pre_hook(self._before, with_kwargs=True)
        return [before, *(block.register_forward_hook(self._after) for block in self.blocks.values())]

    def start(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.states.clear()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, state: torch.Tensor) -> None:
        rows = torch.arange(len(state), device=state.device)
        if self.mask is None:
            last = torch.full_like(rows, state.shape[1] - 1)
        else:
            mask = self.mask.to(state.device)
            last = state.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
        self.states.append(state[rows, last].to("cpu", torch.float64))

    def finish(self) -> str | None:
        """Add the angles of one batch; name the first block whose output is not finite."""
        if not self.blocks:
            return None
        names = list(self.blocks)
        if len(self.states) != len(names) + 1:
            raise ValueError(f"`layers` must be blocks that run once each and in order, got {', '.join(names[:3])} ...")
        for index, state in enumerate(self.states):
            if not bool(torch.isfinite(state).all()):
                return f"the input of {names[0]!r}" if index == 0 else f"the output of {names[index - 1]!r}"
        states = torch.stack(self.states, dim=1)  # (batch, blocks + 1, width)
        self.angles += _angular_distances(states).sum(0)
        return None


def _angular_distances(states: torch.Tensor) -> torch.Tensor:
    """Pairwise angles over pi between vectors, shape (..., count, width) to (..., count, count).

    By ``2 atan2(|u - v|, |u + v|)`` for unit vectors (Kahan), since arccos loses half of the digits where it
    matters, at small angles.
    """
    unit = nn.functional.normalize(states, dim=-1, eps=math.ulp(0.0))
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(unit, unit, compute_mode=exact)
    return 2 / math.pi * torch.atan2(apart, torch.cdist(unit, -unit, compute_mode=exact))
