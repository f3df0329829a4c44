"""A linear layer and a table of embeddings whose weights are stored as integers of a few bits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cur.integrations.kernels import GridWeight, KernelSettings, Product
from cur.integrations.nn.grid import IntegerGrid, pack, unpack

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GridEmbedding", "GridLinear", "OnGrid", "set_kernels_"]


class OnGrid(nn.Module):
    """Hold a matrix of integers on a grid, packed; the base of what computes with it.

    Nothing of it learns. The numbers that the integers stand for are formed in the dtype of the steps.

    Parameters
    ----------
    rows, columns : int
        The shape of the matrix.
    grid : IntegerGrid
        The grid, with its bits and groups along the rows.
    device : torch.device or str, optional
        The device of the tensors. By default torch's own.
    dtype : torch.dtype, optional
        The dtype of the steps, which is that of the layer. By default torch's own.

    Attributes
    ----------
    scale : nn.Parameter, shape (rows, groups)
        The step of each group; its dtype is that of the layer, and no step has more than 16 bits but of 8 symmetric
        bits a row.
    integers : nn.Parameter
        The rounded entries: int8 from -127 to 127, of shape (rows, columns), where 8 bits are symmetric, else uint8 and
        packed, see :func:`~cur.integrations.nn.grid.pack`.
    zeros : nn.Parameter or None
        The integer that stands for 0 in each group, packed likewise; None for a symmetric grid.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        grid: IntegerGrid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None
        self.grid = grid
        self.columns = columns
        kind = torch.int8 if grid.signed else torch.uint8
        count = grid.groups(columns)
        # First, as models ask the first parameter of a part for its dtype.
        self.scale = _fixed(torch.ones(rows, count, device=device, dtype=dtype))
        self.integers = _fixed(torch.zeros(rows, grid.row_bytes(columns), dtype=kind, device=device))
        self.zeros: nn.Parameter | None = None
        if not grid.symmetric:
            self.zeros = _fixed(torch.zeros(rows, grid.row_bytes(count), dtype=torch.uint8, device=device))

    @classmethod
    def _hollow(cls, rows: int, columns: int, grid: IntegerGrid | None, *, bias: bool) -> Self:
        """Return one of a shape and grid, with a bias or without, of which nothing is in memory."""
        raise NotImplementedError

    @classmethod
    def from_integers(
        cls,
        integers: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        zeros: Tensor | None = None,
        grid: IntegerGrid | None = None,
    ) -> Self:
        """Build the layer or table of a matrix of integers, and of a copy of a bias.

        Parameters
        ----------
        integers : Tensor, shape (rows, columns)
            The integers, as for :meth:`set_`.
        scale : Tensor, shape (rows, groups)
            The steps, in the dtype of the layer.
        bias : Tensor, optional
            The bias, with an entry for each row; a table has none.
        zeros : Tensor, optional
            The integers that stand for 0, of the shape of the steps; None for a symmetric grid.
        grid : IntegerGrid, optional
            The grid. By default 8 symmetric bits with one step for each row.

        Returns
        -------
        OnGrid
            The layer or table of these integers.
        """
        rows, columns = integers.shape
        made = cls._hollow(rows, columns, grid, bias=bias is not None)
        made.set_(integers, scale, zeros)
        if bias is not None:
            made.bias = _fixed(bias.detach().clone())
        return made

    def set_(self, integers: Tensor, scale: Tensor, zeros: Tensor | None = None) -> None:
        """Take integers with their steps and zeros, in place.

        Parameters
        ----------
        integers : Tensor, shape (rows, columns)
            From 0 to ``2^bits - 1``; of a symmetric grid from ``1 - 2^(bits - 1)`` to ``2^(bits - 1) - 1``.
        scale : Tensor, shape (rows, groups)
            The steps, in the dtype of the layer.
        zeros : Tensor, optional
            The integers that stand for 0, of the shape of the steps; None for a symmetric grid.
        """
        grid = self.grid
        if not grid.signed:
            integers = pack((integers.to(torch.int16) + grid.offset).to(torch.uint8), grid.bits)
        self.scale, self.integers = _fixed(scale), _fixed(integers)
        self.zeros = None if zeros is None else _fixed(pack(zeros.to(torch.uint8), grid.bits))

    def on_grid(self, rows: Tensor | slice = slice(None)) -> GridWeight:
        """Return integers, steps and zeros of some rows, unpacked.

        Parameters
        ----------
        rows : Tensor or slice, optional
            The rows, as a slice or in one axis; by default all.

        Returns
        -------
        GridWeight
            The rows, of which steps are not copied where a slice is taken.
        """
        return _unpacked(self.grid, self.columns, self.integers, self.scale, self.zeros, rows)

    def fault(self) -> str | None:
        """Say what is wrong with values that were loaded, the name of their tensor first; None if nothing is.

        Returns
        -------
        str or None
            A sentence that says what is wrong, None if nothing is.
        """
        kind = torch.int8 if self.grid.signed else torch.uint8
        for name, part in (("integers", self.integers), ("zeros", self.zeros)):
            wanted = kind if name == "integers" else torch.uint8
            if part is not None and part.dtype != wanted:
                return f"{name} has the dtype {part.dtype}, where {wanted} is stored"
        if not self.scale.is_floating_point():
            return f"scale has the dtype {self.scale.dtype}, where steps are floating-point numbers"
        if not self.scale.is_meta and not bool(torch.isfinite(self.scale).all()):
            return "scale holds NaN or infinity"
        return None

    @property
    def weight(self) -> Tensor:
        """The matrix that the integers stand for, in the dtype of the steps, multiplied out at every access."""
        if len({part.device for part in self.parameters()}) > 1:  # one after the other is tied while a model is loaded
            raise AttributeError("there is no weight while its parts are on different devices")
        return self.on_grid().dense(self.scale.dtype)

    def stored_scale(self) -> Tensor:
        """Return the steps as they are stored: in 16 bits, where that changes nothing."""
        scale = self.scale.detach()
        if self.grid.step_dtype is None or scale.is_meta:
            return scale
        for dtype in (self.grid.step_dtype, torch.bfloat16):
            if torch.equal(scale.to(dtype).to(scale.dtype), scale):
                return scale.to(dtype)
        return scale


class GridLinear(OnGrid):
    """Apply a weight that is stored as integers.

    It is no ``nn.Linear``: adapters of single factors would be merged into a weight that is not stored. Those around
    the layer that it belongs to are kept apart from it.

    Parameters
    ----------
    in_features : int
        The number n of inputs.
    out_features : int
        The number m of outputs.
    bias : bool, default True
        Whether there is a bias, of zeros at first.
    grid : IntegerGrid, optional
        The grid. By default 8 symmetric bits with one step for each row.
    device : torch.device or str, optional
        The device of the tensors. By default torch's own.
    dtype : torch.dtype, optional
        The dtype of the steps and of the bias. By default torch's own.

    Attributes
    ----------
    kernels : KernelSettings
        What its products may round, and how much memory they may take; see :func:`set_kernels_`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        grid: IntegerGrid | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, grid or IntegerGrid(), device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = _fixed(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.kernels = KernelSettings()
        self._product: Product | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget what was arranged of integers and steps that are replaced."""
        super().__setattr__(name, value)
        if name in ("integers", "scale", "zeros", "kernels"):
            self._forget_()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget_()
        moved: Self = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return moved

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._forget_()
        return replica

    def _forget_(self) -> None:
        self.__dict__["_product"] = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was arranged for this machine, which copies and files have no need of."""
        return {**self.__dict__, "_product": None}

    @classmethod
    def _hollow(cls, rows: int, columns: int, grid: IntegerGrid | None, *, bias: bool) -> Self:
        return cls(columns, rows, bias=bias, grid=grid, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``input`` of shape (..., n); returns (..., m).

        Parameters
        ----------
        input : Tensor
            The inputs, of shape (..., n).

        Returns
        -------
        Tensor
            The outputs, of shape (..., m), in the dtype of the inputs.
        """
        return self._multiply()(input, self.bias)

    def _multiply(self) -> Product:
        if self._product is None:
            # of the tensors, and not of the layer: what a kernel holds would outlive it, until cycles are looked for
            stored = self.grid, self.columns, self.integers, self.scale, self.zeros
            self._product = Product(partial(_unpacked, *stored), dtype=self.scale.dtype, settings=self.kernels)
        return self._product

    def kernel(self, tokens: int) -> str:
        """Return the name of what multiplies a number of tokens in the dtype of the steps, measured now if need be.

        Parameters
        ----------
        tokens : int
            The number of tokens in a call.

        Returns
        -------
        str
            The name of the kernel, as ``cur inspect --speed`` shows it.
        """
        return self._multiply().kernel(tokens)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.grid}"


class GridEmbedding(OnGrid):
    """Look up rows that are stored as integers.

    Parameters
    ----------
    num_embeddings : int
        The number n of rows, one for each token.
    embedding_dim : int
        The number r of entries of a row.
    grid : IntegerGrid, optional
        The grid. By default 8 symmetric bits with one step for each row.
    device : torch.device or str, optional
        The device of the tensors.
    dtype : torch.dtype, optional
        The dtype of the steps, and of the rows that are looked up.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        grid: IntegerGrid | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, grid or IntegerGrid(), device=device, dtype=dtype)

    @classmethod
    def _hollow(cls, rows: int, columns: int, grid: IntegerGrid | None, *, bias: bool) -> Self:
        return cls(rows, columns, grid=grid, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Look up tokens of shape (...); returns (..., r), without forming the other rows.

        Parameters
        ----------
        input : Tensor
            The tokens, of an integer dtype.

        Returns
        -------
        Tensor
            The rows of the tokens.
        """
        rows = self.on_grid(input.reshape(-1)).dense(self.scale.dtype)
        return rows.reshape(*input.shape, self.columns)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.scale.shape[0]}, {self.columns}, {self.grid}"


def _unpacked(
    grid: IntegerGrid,
    columns: int,
    integers: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    rows: Tensor | slice = slice(None),
) -> GridWeight:
    """Return what is stored of some rows, an integer in each entry."""
    # what looks up rows refuses numbers that are none, negative ones too
    integers, scale = (_rows(X.detach(), rows) for X in (integers, scale))
    if not grid.signed:
        integers = unpack(integers, grid.bits, columns)
        if zeros is None:
            integers = integers.view(torch.int8) - grid.offset
        else:
            zeros = unpack(_rows(zeros.detach(), rows), grid.bits, scale.shape[-1])
    group = columns if grid.group is None else min(grid.group, columns)
    return GridWeight(integers, scale, zeros, grid.bits, group)


def _rows(X: Tensor, rows: Tensor | slice) -> Tensor:
    return nn.functional.embedding(rows, X) if isinstance(rows, Tensor) else X[rows]


def set_kernels_(model: nn.Module, settings: KernelSettings) -> None:
    """Say for all rounded layers of a model what their products may round and how much memory they may take, in place.

    Parameters
    ----------
    model : nn.Module
        The model with rounded layers.
    settings : KernelSettings
        What products may do.
    """
    for part in model.modules():
        if isinstance(part, GridLinear):
            part.kernels = settings


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
