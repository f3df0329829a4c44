"""Layers around neurons that were given up: those before give fewer outputs, the one behind takes fewer inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cur.integrations.nn.base import CompressedLinear, check_bias, fill_

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KeptInputs", "KeptOutputs"]


class _KeptNeurons(CompressedLinear):
    """What the two sides of a layer of neurons share: which of them are kept, one truth value for each."""

    kept: Tensor

    def _one_hot(self) -> Tensor:
        """Return the columns of the identity at the kept neurons."""
        places = self.kept.nonzero()[:, 0]
        weight = next(self.parameters())
        eye = torch.zeros(len(self.kept), self.rank, dtype=weight.dtype, device=weight.device)
        eye[places, torch.arange(self.rank, device=weight.device)] = 1
        return eye

    def to_layout(self, layout: str) -> CompressedLinear:
        """Return the layer itself, the only layout it has.

        Raises
        ------
        ValueError
            If another is asked for: the layers at the other side of the neurons would no longer fit.
        """
        if layout != self.layout:
            raise ValueError(f"`layout` of a layer that keeps some neurons must stay {self.layout!r}, got {layout!r}")
        return self


class KeptOutputs(_KeptNeurons):
    """Apply the rows of a layer that belong to kept neurons; the output has r entries.

    Its weight has zeros elsewhere, which is exact where the layer behind is a :class:`KeptInputs` of the same neurons.
    """

    layout = "outputs"
    _limit = "the outputs"

    def _make_(self, **place: Any) -> None:
        self.R = nn.Linear(self.in_features, self.rank, bias=self.has_bias, **place)
        self.register_buffer("kept", torch.arange(self.out_features, device=place["device"]) < self.rank)

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the number of outputs."""
        return m

    @classmethod
    def numbers(cls, m: int, n: int, rank: int) -> int:
        """Count the numbers of the kept rows."""
        return rank * n

    @classmethod
    def from_rows(cls, rows: Tensor, kept: Tensor, *, bias: Tensor | None = None, transposed: bool = False) -> Self:
        """Build the layer from kept rows (r x n), truth values (m) with r of them true, and a bias of r entries."""
        check_bias(bias, len(rows))
        layer = cls(rows.shape[1], len(kept), len(rows), bias=bias is not None, transposed=transposed, device="meta")
        fill_(layer.R, rows, bias)
        layer.kept = kept.clone()  # tensors that are saved must not be shared
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the columns of the identity at the kept outputs, and the kept rows."""
        return self._one_hot(), self.R.weight

    @property
    def weight(self) -> Tensor:
        """The dense weight, m x n: the kept rows, and zeros."""
        full = self.R.weight.new_zeros(self.out_features, self.in_features)
        full[self.kept] = self.R.weight
        return full

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries, zero at the others), or None."""
        if not self.has_bias:
            return None
        full = self.R.bias.new_zeros(self.out_features)
        full[self.kept] = self.R.bias
        return full

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (..., n); returns (..., r)."""
        y: Tensor = self.R(x)
        return y


class KeptInputs(_KeptNeurons):
    """Apply a layer to kept neurons alone, the entries of its input that a :class:`KeptOutputs` gives."""

    layout = "inputs"
    _limit = "the inputs"

    def _make_(self, **place: Any) -> None:
        self.C = nn.Linear(self.rank, self.out_features, bias=self.has_bias, **place)
        self.register_buffer("kept", torch.arange(self.in_features, device=place["device"]) < self.rank)

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the number of inputs."""
        return n

    @classmethod
    def numbers(cls, m: int, n: int, rank: int) -> int:
        """Count the numbers of the kept columns."""
        return rank * m

    @classmethod
    def from_columns(
        cls, columns: Tensor, kept: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from columns (m x r), truth values (n) with r of them true, and a bias of m entries."""
        check_bias(bias, len(columns))
        layer = cls(
            len(kept), len(columns), columns.shape[1], bias=bias is not None, transposed=transposed, device="meta"
        )
        fill_(layer.C, columns, bias)
        layer.kept = kept.clone()  # tensors that are saved must not be shared
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the columns, and the rows of the identity at the kept inputs."""
        return self.C.weight, self._one_hot().mT

    @property
    def weight(self) -> Tensor:
        """The dense weight, m x n: the columns of the kept inputs, and zeros."""
        full = self.C.weight.new_zeros(self.out_features, self.in_features)
        full[:, self.kept] = self.C.weight
        return full

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.C.bias if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (..., r); returns (..., m)."""
        y: Tensor = self.C(x)
        return y
