"""What modules have in common that hold the matrices of another one as linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from cur.integrations.nn import CompressedLinear

__all__ = ["TakenApart", "to_linear"]


class TakenApart(nn.Module):
    """A module of transformers or PyTorch whose matrices became linear layers, views of its parameters.

    So calibration, plans, compressed layers, adapters and checkpoints need no second way of doing things.
    """

    def compressed(self) -> bool:
        """Say whether any of the linear layers is.

        Returns
        -------
        bool
            Whether any of them is compressed.
        """
        return any(isinstance(module, CompressedLinear) for module in self.modules())

    def rolled(self) -> nn.Module:
        """Return the module that this one was made from, with matrices multiplied out and copied."""
        raise NotImplementedError


def to_linear(layer: nn.Module) -> Any:
    """Return a linear layer as ``nn.Linear``, multiplied out if it is compressed.

    Parameters
    ----------
    layer : nn.Module
        An ``nn.Linear``, or a compressed layer.
    """
    return layer.to_linear() if isinstance(layer, CompressedLinear) else layer
