"""A linear layer and a table of embeddings whose weights are stored in eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Int8Embedding", "Int8Linear"]


class Int8Linear(nn.Module):
    """Apply a weight that is stored as integers, each row in multiples of a step of its own.

    It computes with the weight that the integers represent, formed anew at every call in the dtype of the steps, in the
    dtype of its inputs. None of it learns, and it is no ``nn.Linear``: adapters of single factors would be merged into
    a weight that is not stored. Those around the layer that it belongs to are kept apart from it.

    Parameters
    ----------
    in_features : int
        The number n of inputs.
    out_features : int
        The number m of outputs.
    bias : bool, default True
        Whether there is a bias, of zeros at first.
    device : torch.device or str, optional
        The device of the tensors. By default torch's own.
    dtype : torch.dtype, optional
        The dtype of the steps and of the bias, in which the layer computes. By default torch's own.

    Attributes
    ----------
    integers : nn.Parameter, shape (m, n)
        The rounded entries, int8 from -127 to 127.
    scale : Tensor, shape (m, 1)
        The step of each row, a buffer; its dtype is that of the layer.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.out_features = out_features
        integers = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, 1, **place))
        self.bias = nn.Parameter(torch.zeros(out_features, **place), requires_grad=False) if bias else None

    @classmethod
    def from_integers(cls, integers: Tensor, scale: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """Build the layer of ``integers * scale``, m x n times m x 1, and a copy of a bias.

        Parameters
        ----------
        integers : Tensor
            The rounded entries, int8, of shape (m, n).
        scale : Tensor
            The step of each row, of shape (m, 1).
        bias : Tensor, optional
            The bias of m entries.

        Returns
        -------
        Int8Linear
            The layer of these integers.
        """
        rows, columns = integers.shape
        layer = cls(columns, rows, bias=bias is not None, device="meta")
        layer.integers = nn.Parameter(integers, requires_grad=False)
        layer.scale = scale
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight that the integers represent, m x n, multiplied out at every access."""
        return self.integers.to(self.scale.dtype) * self.scale

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
        # Who trains adapters widens the parameters around it, and with them its inputs, but no buffers.
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """Look up rows that are stored as integers, each in multiples of a step of its own.

    Parameters
    ----------
    num_embeddings : int
        The number n of rows, one for each token.
    embedding_dim : int
        The number r of entries of a row.
    device : torch.device or str, optional
        The device of the integers and steps.
    dtype : torch.dtype, optional
        The dtype of the steps, and of the rows that are looked up.

    Attributes
    ----------
    integers : nn.Parameter, shape (n, r)
        The rounded entries, int8 from -127 to 127.
    scale : Tensor, shape (n, 1)
        The step of each row, a buffer; its dtype is that of the rows that are looked up.
    """

    scale: Tensor
    bias: None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        integers = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scale", torch.ones(num_embeddings, 1, device=device, dtype=dtype))

    @classmethod
    def from_integers(cls, integers: Tensor, scale: Tensor) -> Int8Embedding:
        """Build the table of ``integers * scale``, n x r times n x 1.

        Parameters
        ----------
        integers : Tensor
            The rounded entries, int8, of shape (n, r).
        scale : Tensor
            The step of each row, of shape (n, 1).

        Returns
        -------
        Int8Embedding
            The table of these integers.
        """
        rows, columns = integers.shape
        table = cls(rows, columns, device="meta")
        table.integers = nn.Parameter(integers, requires_grad=False)
        table.scale = scale
        return table

    @property
    def weight(self) -> Tensor:
        """The table that the integers represent, n x r, multiplied out at every access."""
        return self.integers.to(self.scale.dtype) * self.scale

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
        return self.integers[input].to(self.scale.dtype) * self.scale[input]

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return f"{self.integers.shape[0]}, {self.integers.shape[1]}"
