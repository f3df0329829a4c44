"""Layers that hold a factored weight, in three layouts, and the exact conversions between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cur.factors import Folded
from cur.integrations.nn.base import CompressedLinear, check_bias, fill_, scaled, wide
from cur.integrations.nn.registry import LAYOUTS, register
from cur.integrations.nn.tensors import StoredTensor, Stores
from cur.integrations.nn.trainable import Trainable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CURLinear", "FactoredLinear", "FoldedLinear", "InterpolativeLinear", "factored"]


class FactoredLinear(CompressedLinear):
    """Stand in for a linear layer with a weight of rank r, a product of factors.

    The base of all types of which any can be had from any other; it is not a layer by itself.
    """

    _limit = "the smaller side"

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the smaller side."""
        return min(m, n)

    @classmethod
    def conversions(cls) -> tuple[str, ...]:
        """Name all layouts of factored weights.

        The conversions are exact up to rounding. A layer brought *to* the layout ``"cur"`` gets ``U = I``: what its
        core was is no longer known.
        """
        return tuple(factored())

    def _converted(self, layout: str) -> CompressedLinear:
        left, right = (factor.detach() for factor in self.two_factors())
        layer = factored()[layout].from_two_factors(left, right, bias=self.bias_tensor(), transposed=self.transposed)
        return layer.train(self.training)

    def _plus(self, left: Tensor, right: Tensor, scale: Tensor | None) -> CompressedLinear:
        mine = [factor.detach() for factor in self.two_factors()]
        dtype = mine[1].dtype
        left, right = scaled(torch.cat([wide(mine[0]), left], 1), scale), torch.cat([wide(mine[1]), right])
        if len(right) > min(self.shape):  # the smaller side is the largest rank
            product, eye = left @ right, torch.eye(min(self.shape), dtype=left.dtype, device=left.device)
            left, right = (product, eye) if len(eye) == self.in_features else (eye, product)
        options: dict[str, Any] = {"bias": self.bias_tensor(), "transposed": self.transposed}
        return self.from_two_factors(left.to(dtype), right.to(dtype), **options)


def factored() -> dict[str, type[FactoredLinear]]:
    """Return the types of factored weights by layout, of which any can be had from any other."""
    return {layout: kind for layout, kind in LAYOUTS.items() if issubclass(kind, FactoredLinear)}


@register
class CURLinear(FactoredLinear):
    """Apply ``x -> C (U (R x)) + bias``: the layout to train, with the small core ``U`` apart.

    ``R`` are rows of the dense weight and ``C`` columns of it when the layer comes from a CUR factorization.

    Examples
    --------
    >>> import torch
    >>> layer = CURLinear(6, 4, 2, bias=False)
    >>> [tuple(p.shape) for p in layer.parameters()]
    [(2, 6), (2, 2), (4, 2)]
    >>> layer(torch.zeros(3, 6)).shape
    torch.Size([3, 4])
    """

    layout = "cur"
    bias_names = ("C.bias",)
    stores: ClassVar[Stores] = {
        "R.weight": StoredTensor(("rank", "inputs")),
        "U.weight": StoredTensor(("rank", "rank")),
        "C.weight": StoredTensor(("outputs", "rank")),
    }

    def _make_(self, **place: Any) -> None:
        self.R = self._linear(self.in_features, self.rank, **place)
        self.U = self._linear(self.rank, self.rank, **place)
        self.C = self._linear(self.rank, self.out_features, bias=self.has_bias, **place)

    @classmethod
    def from_factors(
        cls, C: Tensor, U: Tensor, R: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from ``C`` (m x r), ``U`` (r x r), ``R`` (r x n) and a bias of m entries.

        The factors keep their dtype and device.

        Parameters
        ----------
        C : Tensor
            The kept columns, of shape (m, r).
        U : Tensor
            The core, of shape (r, r).
        R : Tensor
            The kept rows, of shape (r, n).
        bias : Tensor, optional
            The bias of m entries.
        transposed : bool, default False
            Whether the dense layer stores its weight transposed.

        Raises
        ------
        ValueError
            If the shapes do not chain.
        """
        if C.ndim != 2 or R.ndim != 2 or U.shape != (C.shape[1], R.shape[0]) or C.shape[1] != R.shape[0]:
            raise ValueError(
                f"`C`, `U`, `R` must have shapes (m, r), (r, r), (r, n), got {tuple(C.shape)}, {tuple(U.shape)}, "
                f"{tuple(R.shape)}; pass the factors of one CUR factorization with as many rows as columns"
            )
        check_bias(bias, C.shape[0])
        layer = cls(R.shape[1], C.shape[0], R.shape[0], bias=bias is not None, transposed=transposed, device="meta")
        fill_(layer.R, R)
        fill_(layer.U, U)
        fill_(layer.C, C, bias)
        return layer

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer with ``C = left``, ``U = I``, ``R = right``."""
        eye = torch.eye(right.shape[0], dtype=right.dtype, device=right.device)
        return cls.from_factors(left, eye, right, bias=bias, transposed=transposed)

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``C U`` and ``R``."""
        return (wide(self.C.weight) @ wide(self.U.weight)).to(self.C.weight.dtype), self.R.weight

    @property
    def weight(self) -> Tensor:
        """The dense weight ``C U R``, m x n, multiplied out at every access."""
        # Not through `two_factors`, which rounds C U to the stored dtype first: in bfloat16 that would be
        # lost twice.
        product = wide(self.C.weight) @ (wide(self.U.weight) @ wide(self.R.weight))
        return product.to(self.R.weight.dtype)

    def _plus(self, left: Tensor, right: Tensor, scale: Tensor | None) -> CompressedLinear:
        if self.rank + len(right) > min(self.shape):
            return super()._plus(left, right, scale)
        C, U, R = (wide(factor.weight.detach()) for factor in (self.C, self.U, self.R))
        eye = torch.eye(len(right), dtype=U.dtype, device=U.device)
        core: Tensor = torch.block_diag(U, eye)  # type: ignore[no-untyped-call]
        factors = scaled(torch.cat([C, left], 1), scale), core, torch.cat([R, right])
        rounded = [factor.to(self.R.weight.dtype) for factor in factors]
        return self.from_factors(*rounded, bias=self.bias_tensor(), transposed=self.transposed)

    def trainable(self) -> Trainable:
        """Return ``U`` between ``C`` and ``R``."""
        return Trainable(self.U.weight, self.C.weight.detach(), self.R.weight.detach(), holds="core")

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.C.bias if self.has_bias else None

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
        y: Tensor = self.C(self.U(self.R(input)))
        return y


@register
class FoldedLinear(FactoredLinear):
    """Apply ``x -> (C U) (R x) + bias``: two products and r^2 fewer parameters than :class:`CURLinear`."""

    layout = "folded"
    bias_names = ("CU.bias",)
    faster = (200_000, 0.02)
    stores: ClassVar[Stores] = {
        "R.weight": StoredTensor(("rank", "inputs")),
        "CU.weight": StoredTensor(("outputs", "rank")),
    }

    def _make_(self, **place: Any) -> None:
        self.R = self._linear(self.in_features, self.rank, **place)
        self.CU = self._linear(self.rank, self.out_features, bias=self.has_bias, **place)

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer with ``C U = left``, ``R = right``."""
        check_bias(bias, left.shape[0])
        rank, n = right.shape
        layer = cls(n, left.shape[0], rank, bias=bias is not None, transposed=transposed, device="meta")
        fill_(layer.R, right)
        fill_(layer.CU, left, bias)
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``C U`` and ``R``."""
        return self.CU.weight, self.R.weight

    def trainable(self) -> Trainable:
        """Return a core between ``C U`` as it is and ``R``."""
        return Trainable(self.CU.weight, self.CU.weight.detach().clone(), self.R.weight.detach(), holds="left")

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.CU.bias if self.has_bias else None

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
        y: Tensor = self.CU(self.R(input))
        return y


@register
class InterpolativeLinear(FactoredLinear):
    """Keep r rows of the weight and write the other m - r as combinations of them.

    With ``z = R x`` the outputs are ``z`` (the kept rows) and ``T z`` (the others), put into their places by
    ``order``: output ``i`` is entry ``order[i]`` of ``(z, T z)``. Smaller than dense for every ``r < min(m,
    n)``.
    """

    layout = "interpolative"
    faster = (200_000, 0.17)
    order: Tensor
    stores: ClassVar[Stores] = {
        "R.weight": StoredTensor(("rank", "inputs")),
        "T.weight": StoredTensor(("others", "rank")),
        "order": StoredTensor(("outputs",), torch.int64),
    }

    @classmethod
    def sizes(cls, m: int, n: int, rank: Any, inner_rank: Any = None) -> dict[str, Any]:
        """Return the sizes of an m x n layer by name, the rows that are not kept among them."""
        return {**super().sizes(m, n, rank, inner_rank), "others": m - rank}

    def _make_(self, **place: Any) -> None:
        self.R = self._linear(self.in_features, self.rank, **place)
        others = self.out_features - self.rank
        # A child without entries would warn when it is initialised.
        self.T = self._linear(self.rank, others, **place) if others else None
        self.bias = nn.Parameter(torch.zeros(self.out_features, **place)) if self.has_bias else None
        self.register_buffer("order", torch.arange(self.out_features, device=place["device"]))

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from two factors of at most m columns, see :meth:`cur.factors.Folded.interpolative`."""
        check_bias(bias, left.shape[0])
        factors = Folded(wide(left), wide(right)).interpolative()
        rows, coefficients = factors.skeleton.to(right.dtype), factors.coefficients.to(left.dtype)
        order = torch.argsort(torch.cat([factors.chosen, factors.others]))
        return cls.from_rows(rows, coefficients, order, bias=bias, transposed=transposed)

    @classmethod
    def from_rows(
        cls,
        rows: Tensor,
        coefficients: Tensor,
        order: Tensor,
        *,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> Self:
        """Build the layer from ``rows`` (r x n), ``coefficients`` ((m - r) x r), ``order`` (m, int64).

        Parameters
        ----------
        rows : Tensor
            The kept rows, of shape (r, n).
        coefficients : Tensor
            The coefficients of the other rows, of shape (m - r, r).
        order : Tensor
            The places of the kept rows and then of the others: int64, of shape (m,).
        bias : Tensor, optional
            The bias of m entries.
        transposed : bool, default False
            Whether the dense layer stores its weight transposed.

        Raises
        ------
        ValueError
            If `coefficients` has another shape.
        """
        m = order.shape[0]
        rank, n = rows.shape
        if tuple(coefficients.shape) != (m - rank, rank):
            raise ValueError(
                f"`coefficients` must have shape {(m - rank, rank)} for {m} outputs and {rank} kept rows, "
                f"got {tuple(coefficients.shape)}"
            )
        check_bias(bias, m)
        layer = cls(n, m, rank, bias=bias is not None, transposed=transposed, device="meta")
        fill_(layer.R, rows)
        if layer.T is not None:
            fill_(layer.T, coefficients)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layer.order = order.to(torch.int64)
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the coefficients of all m rows (identity at the kept ones) and the kept rows."""
        left = torch.eye(self.rank, dtype=self.R.weight.dtype, device=self.R.weight.device)
        if self.T is not None:
            left = torch.cat([left, self.T.weight])
        return left[self.order], self.R.weight

    def outputs_of(self, factor: str) -> Tensor:
        """Return the places of the kept rows, or of the others."""
        places = torch.argsort(self.order)
        return places[: self.rank] if factor == "R" else places[self.rank :]

    def trainable(self) -> Trainable:
        """Return a core between the coefficients, which stay, and the rows, which become combinations of themselves."""
        left, right = (factor.detach() for factor in self.two_factors())
        return Trainable(self.R.weight, left, right.clone(), holds="right")

    def fault(self) -> str | None:
        """Say so if the order is no permutation."""
        places = torch.arange(self.out_features, device=self.order.device)
        if self.order.is_meta or torch.equal(self.order.sort().values, places):
            return None
        return "order is not a permutation of the outputs"

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.bias

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
        z: Tensor = self.R(input)
        y = z if self.T is None else torch.cat([z, self.T(z)], dim=-1)
        y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias
