"""Linear layers that hold a factored weight, and the exact conversions between their layouts.

Three layouts of the same rank-r weight of an m x n layer (m outputs, n inputs), smallest last:

========================  ==========================================  ======================
layout                    children                                    numbers kept
========================  ==========================================  ======================
:class:`CURLinear`        ``R`` (r x n), ``U`` (r x r), ``C`` (m x r)  ``r (m + n) + r^2``
:class:`FoldedLinear`     ``R`` (r x n), ``CU`` (m x r)                ``r (m + n)``
:class:`InterpolativeLinear`  ``R`` (r x n), ``T`` ((m - r) x r)       ``r (m + n - r)``
========================  ==========================================  ======================

Two more layouts belong together, where neurons between layers are given up (r of k kept):

========================  ==========================================  ======================
layout                    children                                    numbers kept
========================  ==========================================  ======================
:class:`KeptOutputs`      ``R`` (r x n), of the layers before          ``r n``
:class:`KeptInputs`       ``C`` (m x r), of the layer behind           ``r m``
========================  ==========================================  ======================

Every factor is a child ``nn.Linear``, so that adapters, quantizers and hooks that look for linear layers find
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cur import ranks
from cur.selection import deim

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "FACTORED",
    "LAYOUTS",
    "CURLinear",
    "CompressedLinear",
    "FoldedLinear",
    "InterpolativeLinear",
    "KeptInputs",
    "KeptOutputs",
    "compressed_modules",
    "dense_weight",
    "swap_",
]


class CompressedLinear(nn.Module):
    """Stand in for a linear layer with a weight that takes fewer numbers.

    The base of the layouts; it is not a layer by itself.

    Parameters
    ----------
    in_features, out_features, rank : int
        Sizes n, m and r; ``1 <= rank <= largest_rank(m, n)``. Of the layouts for neurons, r is how many are kept.
    bias : bool
        Whether the layer adds a bias of m entries.
    transposed : bool
        Whether the dense layer it stands for is a transformers ``Conv1D`` (weight n x m), to be restored by
        :meth:`to_dense`.

    Raises
    ------
    ValueError
        If the rank is below one or above the largest.
    """

    layout: ClassVar[str]
    """Name of the layout in plans and checkpoints."""
    _limit: ClassVar[str] = "the smaller side"

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, transposed: bool = False
    ) -> None:
        super().__init__()
        limit = self.largest_rank(out_features, in_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"`rank` must be between 1 and {limit}, {self._limit} of a {out_features} x {in_features} layer, "
                f"got {rank}; choose a rank in that range"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.has_bias = bias
        self.transposed = transposed

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the largest rank of an m x n layer in this layout."""
        return min(m, n)

    @classmethod
    def numbers(cls, m: int, n: int, rank: int) -> int:
        """Count the numbers of an m x n layer of a rank, but for the bias."""
        return ranks.parameters(m, n, rank, layout=cls.layout)

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer whose weight is ``left @ right`` (m x r times r x n), in their dtype and device."""
        raise NotImplementedError

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
        return (_wide(left) @ _wide(right)).to(right.dtype)

    def to_layout(self, layout: str) -> CompressedLinear:
        """Return the same function in another layout, exact up to rounding.

        A layer that has the layout already is returned itself. One brought *to* the layout ``"cur"`` gets ``U = I``:
        what its core was is no longer known.

        Raises
        ------
        ValueError
            If the layout is unknown.
        """
        if layout == self.layout:
            return self
        if layout not in FACTORED:
            raise ValueError(f"`layout` must be one of {', '.join(FACTORED)}, got {layout!r}")
        left, right = self.two_factors()
        layer: CompressedLinear = LAYOUTS[layout].from_two_factors(
            left.detach(), right.detach(), bias=_detached(self.bias_tensor()), transposed=self.transposed
        )
        return layer.train(self.training)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` of the same function."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.has_bias, device="meta")
        linear.weight = nn.Parameter(self.weight.detach())
        bias = _detached(self.bias_tensor())
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
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
        return f"{sizes}, bias={self.has_bias}"


class CURLinear(CompressedLinear):
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, transposed=transposed)
        self.R = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, rank, bias=False, device=device, dtype=dtype)
        self.C = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls, C: Tensor, U: Tensor, R: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from ``C`` (m x r), ``U`` (r x r), ``R`` (r x n) and a bias of m entries.

        The factors keep their dtype and device.

        Raises
        ------
        ValueError
            If the shapes do not chain.
        """
        if C.ndim != 2 or R.ndim != 2 or U.shape != (C.shape[1], R.shape[0]) or C.shape[1] != R.shape[0]:
            raise ValueError(
                f"`C`, `U`, `R` must have shapes (m, r), (r, r), (r, n), got {tuple(C.shape)}, "
                f"{tuple(U.shape)}, "
                f"{tuple(R.shape)}; pass the factors of one CUR factorization with as many rows as columns"
            )
        _check_bias(bias, C.shape[0])
        layer = cls(R.shape[1], C.shape[0], R.shape[0], bias=bias is not None, transposed=transposed, device="meta")
        _fill(layer.R, R)
        _fill(layer.U, U)
        _fill(layer.C, C, bias)
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
        return (_wide(self.C.weight) @ _wide(self.U.weight)).to(self.C.weight.dtype), self.R.weight

    @property
    def weight(self) -> Tensor:
        """The dense weight ``C U R``, m x n, multiplied out at every access."""
        # Not through `two_factors`, which rounds C U to the stored dtype first: in bfloat16 that would be
        # lost twice.
        product = _wide(self.C.weight) @ (_wide(self.U.weight) @ _wide(self.R.weight))
        return product.to(self.R.weight.dtype)

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.C.bias if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (..., n); returns (..., m)."""
        y: Tensor = self.C(self.U(self.R(x)))
        return y


class FoldedLinear(CompressedLinear):
    """Apply ``x -> (C U) (R x) + bias``: two products and r^2 fewer numbers than :class:`CURLinear`."""

    layout = "folded"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, transposed=transposed)
        self.R = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.CU = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer with ``C U = left``, ``R = right``."""
        _check_bias(bias, left.shape[0])
        layer = cls(
            right.shape[1],
            left.shape[0],
            right.shape[0],
            bias=bias is not None,
            transposed=transposed,
            device="meta",
        )
        _fill(layer.R, right)
        _fill(layer.CU, left, bias)
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``C U`` and ``R``."""
        return self.CU.weight, self.R.weight

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.CU.bias if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (..., n); returns (..., m)."""
        y: Tensor = self.CU(self.R(x))
        return y


class InterpolativeLinear(CompressedLinear):
    """Keep r rows of the weight and write the other m - r as combinations of them.

    With ``z = R x`` the outputs are ``z`` (the kept rows) and ``T z`` (the others), put into their places by
    ``order``: output ``i`` is entry ``order[i]`` of ``(z, T z)``. Smaller than dense for every ``r < min(m,
    n)``.
    """

    layout = "interpolative"
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, transposed=transposed)
        self.R = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        # A child without entries (rank == m) would warn when it is initialised; there is nothing to combine
        # then.
        self.T = (
            nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
            if rank < out_features
            else None
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.arange(out_features, device=device))

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from any two factors: r independent rows of ``left`` are chosen by DEIM.

        With ``left = Q S`` (thin QR) and the chosen rows ``p``, ``left = (Q Q_p^-1) left_p`` also when
        ``left`` is rank-deficient, and DEIM keeps ``Q_p`` well conditioned.
        """
        _check_bias(bias, left.shape[0])
        m = left.shape[0]
        basis = torch.linalg.qr(_wide(left)).Q
        kept = torch.as_tensor(deim(basis), device=left.device)
        mask = torch.ones(m, dtype=torch.bool, device=left.device)
        mask[kept] = False
        rest = torch.arange(m, device=left.device)[mask]
        rows = (_wide(left)[kept] @ _wide(right)).to(right.dtype)
        coefficients = torch.linalg.solve(basis[kept].mT, basis[rest].mT).mT.to(left.dtype)
        order = torch.empty(m, dtype=torch.int64, device=left.device)
        order[torch.cat([kept, rest])] = torch.arange(m, device=left.device)
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
        """Build the layer from ``rows`` (r x n), ``coefficients`` ((m - r) x r), ``order`` (m, int64)."""
        m = order.shape[0]
        rank, n = rows.shape
        if tuple(coefficients.shape) != (m - rank, rank):
            raise ValueError(
                f"`coefficients` must have shape {(m - rank, rank)} for {m} outputs and {rank} kept rows, "
                "got "
                f"{tuple(coefficients.shape)}"
            )
        _check_bias(bias, m)
        layer = cls(n, m, rank, bias=bias is not None, transposed=transposed, device="meta")
        _fill(layer.R, rows)
        if layer.T is not None:
            _fill(layer.T, coefficients)
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

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape (..., n); returns (..., m)."""
        z: Tensor = self.R(x)
        y = z if self.T is None else torch.cat([z, self.T(z)], dim=-1)
        y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


class _Kept(CompressedLinear):
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


class KeptOutputs(_Kept):
    """Apply the rows of a layer that belong to kept neurons; the output has r entries.

    Its weight has zeros elsewhere, which is exact where the layer behind is a :class:`KeptInputs` of the same neurons.
    """

    layout = "outputs"
    _limit = "the outputs"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, transposed=transposed)
        self.R = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        self.register_buffer("kept", torch.arange(out_features, device=device) < rank)

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
        _check_bias(bias, len(rows))
        layer = cls(rows.shape[1], len(kept), len(rows), bias=bias is not None, transposed=transposed, device="meta")
        _fill(layer.R, rows, bias)
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


class KeptInputs(_Kept):
    """Apply a layer to kept neurons alone, the entries of its input that a :class:`KeptOutputs` gives."""

    layout = "inputs"
    _limit = "the inputs"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, transposed=transposed)
        self.C = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("kept", torch.arange(in_features, device=device) < rank)

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
        _check_bias(bias, len(columns))
        layer = cls(
            len(kept), len(columns), columns.shape[1], bias=bias is not None, transposed=transposed, device="meta"
        )
        _fill(layer.C, columns, bias)
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


FACTORED = ranks.LAYOUTS
"""Layouts of factored weights, of which any can be had from any other."""

LAYOUTS: dict[str, type[Any]] = {
    cls.layout: cls for cls in (CURLinear, FoldedLinear, InterpolativeLinear, KeptOutputs, KeptInputs)
}
"""Layer class of each layout name."""


def layer_class(layout: str) -> type[Any]:
    """Return the layer class of a layout name; a ValueError names the known ones."""
    try:
        return LAYOUTS[layout]
    except KeyError:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}") from None


def dense_weight(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, bool]:
    """Return weight (out x in, a view), bias and whether the layer stores its weight transposed.

    Raises
    ------
    TypeError
        If the module is neither a plain ``nn.Linear`` nor a transformers ``Conv1D``; a subclass may keep its
        weight in another form (quantized, adapted), so it is refused by name.
    """
    if type(module) is nn.Linear:
        return module.weight, module.bias, False
    if type(module) is Conv1D:
        return module.weight.T, module.bias, True
    raise TypeError(
        f"{name} is a {type(module).__name__}; only plain nn.Linear and Conv1D layers can be compressed, "
        "so exclude it from the targets"
    )


def compressed_modules(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return every compressed layer of a model by name; a layer shared by two parents appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def swap_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put other modules in the place of named ones, in place.

    A module that several parents share is replaced under each of them by the same new module, so it stays
    shared.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    replacements : mapping of str to nn.Module
        New module by the dotted name of the one it replaces.
    """
    new = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    places = [
        (parent, child_name, new[id(child)])
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if id(child) in new
    ]
    for parent, child_name, module in places:
        setattr(parent, child_name, module)


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_bias(bias: Tensor | None, m: int) -> None:
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"`bias` must have shape {(m,)}, one entry for each output, got {tuple(bias.shape)}")
