"""What every layer with fewer numbers has: sizes, a dense weight to compare with, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cur.integrations.nn.int8 import Int8Linear

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CompressedLinear", "Ranked", "check_bias", "fill_", "ranks_of", "wide"]


class CompressedLinear(nn.Module):
    """Stand in for a linear layer with a weight that takes fewer numbers.

    The base of the layouts; it is not a layer by itself.

    Parameters
    ----------
    in_features, out_features, rank : int
        Sizes n, m and r; ``1 <= rank <= largest_rank(m, n)``. Of the layouts for neurons, r is how many are kept.
    inner_rank : int, optional
        Of the layouts for neurons: the rank of what is kept, held as rows and coefficients. Default: held whole.
    bias : bool
        Whether the layer adds a bias of m entries.
    transposed : bool
        Whether the dense layer it stands for is a transformers ``Conv1D`` (weight n x m), to be restored by
        :meth:`to_dense`.
    int8 : bool
        Whether its factors are :class:`~cur.integrations.nn.Int8Linear`.
    device, dtype : optional
        Of the factors, which are random as in a new ``nn.Linear``.

    Raises
    ------
    ValueError
        If a rank is below one or above the largest.
    """

    layout: ClassVar[str]
    """Name of the layout in plans and checkpoints."""
    _limit: ClassVar[str]
    """What the largest rank is, in words."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        inner_rank: int | None = None,
        bias: bool = True,
        transposed: bool = False,
        int8: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limit = self.largest_rank(out_features, in_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"`rank` must be between 1 and {limit}, {self._limit} of a {out_features} x {in_features} layer, "
                f"got {rank}; choose a rank in that range"
            )
        if inner_rank is not None:
            inner = self.largest_inner_rank(out_features, in_features, rank)
            if not inner:
                raise ValueError(
                    f"`inner_rank` must be None in the layout {self.layout!r}, which keeps no neurons; got {inner_rank}"
                )
            if not 1 <= inner_rank <= inner:
                raise ValueError(
                    f"`inner_rank` must be None or between 1 and {inner} for {rank} kept neurons of a {out_features} x "
                    f"{in_features} layer in the layout {self.layout!r}, got {inner_rank}"
                )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.inner_rank = inner_rank
        self.has_bias = bias
        self.transposed = transposed
        self.int8 = int8
        self._make_(device=device, dtype=dtype)

    def _make_(self, **place: Any) -> None:
        """Make the factors, the bias and the buffers, on a device and of a dtype."""
        raise NotImplementedError

    def _linear(self, in_features: int, out_features: int, *, bias: bool = False, **place: Any) -> nn.Linear:
        """Make a factor, with a weight and a bias to read in any case."""
        made: Any = (Int8Linear if self.int8 else nn.Linear)(in_features, out_features, bias=bias, **place)
        return made  # type: ignore[no-any-return]

    def round_(self, factors: Mapping[str, Int8Linear]) -> None:
        """Put rounded factors in the place of all those that are there, in place."""
        for name, factor in factors.items():
            self.set_submodule(name, factor.train(self.training))
        for part in self.modules():
            if isinstance(part, CompressedLinear):
                part.int8 = True

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the largest rank of an m x n layer in this layout."""
        raise NotImplementedError

    @classmethod
    def largest_inner_rank(cls, m: int, n: int, rank: int) -> int:
        """Return the largest rank of what an m x n layer keeps; 0 if that has none of its own."""
        return 0

    @classmethod
    def numbers(cls, m: int, n: int, rank: int, inner_rank: int | None = None) -> int:
        """Count the numbers of an m x n layer of a rank, but for the bias."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """The numbers held, but for the bias."""
        return self.numbers(self.out_features, self.in_features, self.rank, self.inner_rank)

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``left`` (m x r) and ``right`` (r x n) with ``weight == left @ right``."""
        raise NotImplementedError

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, m x n, multiplied out at every access (half precision through float32)."""
        left, right = self.two_factors()
        return (wide(left) @ wide(right)).to(right.dtype)

    def to_layout(self, layout: str) -> CompressedLinear:
        """Return the same function in another layout; a layer that has the layout already is returned itself.

        Raises
        ------
        ValueError
            If the layer cannot be brought to the layout.
        """
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` of the same function."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.has_bias, device="meta")
        fill_(linear, self.weight, self.bias_tensor())
        return linear.train(self.training)

    def to_dense(self) -> nn.Module:
        """Return a dense layer of the kind this one replaced: ``nn.Linear``, or transformers' ``Conv1D``."""
        linear = self.to_linear()
        if not self.transposed:
            return linear
        with torch.device("meta"):
            conv: nn.Module = Conv1D(self.out_features, self.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        conv.bias = nn.Parameter(linear.bias.detach() if self.has_bias else linear.weight.new_zeros(self.out_features))
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        inner = "" if self.inner_rank is None else f", inner_rank={self.inner_rank}"
        return f"{sizes}{inner}, bias={self.has_bias}{', int8' if self.int8 else ''}"


def fill_(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear layer a weight, and a copy of a bias if there is one."""
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())


def wide(tensor: Tensor) -> Tensor:
    """Return what products of a tensor are formed in: itself, or float32 for half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_bias(bias: Tensor | None, m: int) -> None:
    """Raise a ValueError if a bias does not have m entries."""
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"`bias` must have shape {(m,)}, one entry for each output, got {tuple(bias.shape)}")


class Ranked(Protocol):
    """What has a rank, or a number of kept neurons and perhaps an inner rank."""

    @property
    def rank(self) -> int:
        """Rank, or number of neurons."""

    @property
    def inner_rank(self) -> int | None:
        """Rank of what belongs to these neurons, if that is factored as well."""


def ranks_of(layer: Ranked) -> str:
    """Return the rank of a layer as tables have it.

    Examples
    --------
    >>> from cur.integrations import PlanEntry
    >>> ranks_of(PlanEntry(name="q", shape=(8, 6), rank=2))
    '2'
    >>> ranks_of(PlanEntry(name="down", shape=(6, 24), rank=20, layout="inputs", method="neurons", inner_rank=4))
    '20, 4'
    """
    return str(layer.rank) if layer.inner_rank is None else f"{layer.rank}, {layer.inner_rank}"
