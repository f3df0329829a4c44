"""Convolutions of one point: linear layers over channels, which stand before the places of an image or a sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.model.taken_apart import TakenApart, to_linear

__all__ = ["LinearConvolution", "is_pointwise"]


def is_pointwise(module: nn.Module) -> bool:
    """Say whether a module is a convolution that applies one matrix to the channels of every place.

    That is one of a single point, without groups, steps or padding. A subclass may do something else.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether it is such a convolution.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or type(module) not in (nn.Conv1d, nn.Conv2d):
        return False
    once = all(size == 1 for size in (*module.kernel_size, *module.stride))
    padded = not isinstance(module.padding, str) and any(module.padding)
    return once and not padded and module.groups == 1 and "weight" in module._parameters


class LinearConvolution(TakenApart):
    """A convolution of one point as an ``nn.Linear`` or its compressed stand-in, which gets channels last.

    Parameters
    ----------
    convolution : nn.Conv1d or nn.Conv2d
        A module that :func:`is_pointwise` accepts. Its weight is not copied: the linear layer is a view of it.
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.kind = type(convolution)
        self.in_channels: int = convolution.in_channels
        self.out_channels: int = convolution.out_channels
        for name in convolution.__constants__:  # which its model may ask for
            setattr(self, name, getattr(convolution, name))
        weight, bias = convolution.weight, convolution.bias
        sizes = convolution.in_channels, convolution.out_channels
        self.linear: nn.Module = nn.Linear(*sizes, bias=bias is not None, device="meta")
        self.linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
        if bias is not None:
            self.linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the channels of every place.

        Parameters
        ----------
        input : Tensor
            An image or a sound, of shape (samples, channels, height, width) or (samples, channels, length).

        Returns
        -------
        Tensor
            The same with other channels, contiguous as what a convolution returns.
        """
        axis = -1 - (2 if issubclass(self.kind, nn.Conv2d) else 1)
        output: Tensor = self.linear(input.movedim(axis, -1))
        return output.movedim(-1, axis).contiguous()

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution, with an axis of one for each of height and width, or for length."""
        weight: Any = self.linear.weight
        found: Tensor = weight[..., None, None] if issubclass(self.kind, nn.Conv2d) else weight[..., None]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias of the convolution, or None."""
        found: Any = self.linear.bias
        return found  # type: ignore[no-any-return]

    def rolled(self) -> nn.Module:
        """Return the convolution, with its matrix multiplied out and copied."""
        linear = to_linear(self.linear)
        with torch.device("meta"):
            done = self.kind(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        done.weight = nn.Parameter(linear.weight.detach().clone().reshape(done.weight.shape))
        if linear.bias is not None:
            done.bias = nn.Parameter(linear.bias.detach().clone())
        found: nn.Module = done.train(self.training)
        return found
