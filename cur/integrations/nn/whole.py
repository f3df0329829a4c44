"""A layer that keeps its weight whole, on a grid of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cur.integrations.nn.base import CompressedLinear, fill_, scaled, wide
from cur.integrations.nn.registry import register
from cur.integrations.nn.rounded import GridLinear
from cur.integrations.nn.tensors import StoredTensor, Stores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WholeLinear"]


@register
class WholeLinear(CompressedLinear):
    """Apply a whole weight, whose rank is the smaller side; what is saved are its bits."""

    layout = "whole"
    bias_names = ("W.bias",)
    smaller = False
    stores: ClassVar[Stores] = {"W.weight": StoredTensor(("outputs", "inputs"))}
    _limit = "the smaller side"
    _called = "a whole layer"

    def _make_(self, **place: Any) -> None:
        self.W = self._linear(self.in_features, self.out_features, bias=self.has_bias, **place)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], in_features: int, out_features: int, **options: Any) -> Self:
        """Make the layer of such a description, with a weight yet to be loaded."""
        if spec["rank"] != min(in_features, out_features):
            raise ValueError(
                f"`rank` of a whole {out_features} x {in_features} layer must be its smaller side, got {spec['rank']}"
            )
        return super().from_spec(spec, in_features, out_features, **options)

    @classmethod
    def from_rounded(cls, W: GridLinear, *, transposed: bool = False) -> WholeLinear:
        """Build the layer of a rounded weight and its bias.

        Parameters
        ----------
        W : GridLinear
            The rounded weight, with its bias.
        transposed : bool, default False
            Whether the dense layer stores its weight transposed.

        Returns
        -------
        WholeLinear
            The layer of this weight.
        """
        m, n = W.out_features, W.in_features
        layer = cls(n, m, min(m, n), bias=W.bias is not None, transposed=transposed, device="meta")
        layer.round_({"W": W})
        return layer

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the smaller side."""
        return min(m, n)

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the weight and the identity of side n, or of side m and the weight where ``m < n``."""
        W = self.weight
        eye = torch.eye(self.rank, dtype=W.dtype, device=W.device)
        return (W, eye) if self.in_features == self.rank else (eye, W)

    @property
    def weight(self) -> Tensor:
        """The weight, m x n."""
        return self.W.weight

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.W.bias if self.has_bias else None

    def _plus(self, left: Tensor, right: Tensor, scale: Tensor | None) -> CompressedLinear:
        layer = type(self)(
            self.in_features,
            self.out_features,
            self.rank,
            bias=self.has_bias,
            transposed=self.transposed,
            device="meta",
        )
        weight = scaled(wide(self.weight.detach()) + left @ right, scale)
        fill_(layer.W, weight.to(self.weight.dtype), self.bias_tensor())
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``input`` of shape (..., n); returns (..., m).

        Parameters
        ----------
        input : Tensor
            The inputs, of shape (..., n).

        Returns
        -------
        Tensor
            The outputs, of shape (..., m).
        """
        y: Tensor = self.W(input)
        return y
