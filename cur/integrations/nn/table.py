"""A table of embeddings that keeps its rows whole, on a grid of few bits; and layers that read what it stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from cur.integrations.nn.base import CompressedLinear, fill_
from cur.integrations.nn.lookup import ScaledEmbedding, Times, times_of
from cur.integrations.nn.registry import register
from cur.integrations.nn.rounded import GridEmbedding, GridLinear, OnGrid
from cur.integrations.nn.tensors import StoredTensor, Stores
from cur.integrations.nn.whole import WholeLinear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WholeTable", "is_whole", "reading"]

_Kind = TypeVar("_Kind", bound=OnGrid)

_FIELDS = {"padding", "times"}


@register
class WholeTable(CompressedLinear):
    """Look up whole rows, whose rank is the smaller side; what is saved are their bits.

    As of every table the tokens are the inputs, so its weight as a linear layer is the transpose. An output head that
    is tied to it is a :class:`~cur.integrations.nn.WholeLinear` of the same integers, see :func:`reading`.

    Attributes
    ----------
    padding_idx : int or None
        The token that fills up samples, as for ``nn.Embedding``.
    times : Times
        The number that rows are multiplied by, as in Gemma; it is no part of the weight.
    """

    layout = "table"
    by_inputs = True
    smaller = False
    stores: ClassVar[Stores] = {"W.weight": StoredTensor(("inputs", "outputs"))}
    _limit = "the smaller side"
    _called = "a whole table"

    padding_idx: int | None = None
    times: Times = Times()

    def _make_(self, **place: Any) -> None:
        sizes = self.in_features, self.out_features
        self.W: Any = nn.Embedding(*sizes, **place)
        if self.grid is not None:
            self.W = GridEmbedding(*sizes, grid=self.grid, **place)

    @property
    def num_embeddings(self) -> int:
        """The number of tokens, as ``nn.Embedding`` calls it."""
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        """The number of features, as ``nn.Embedding`` calls it."""
        return self.out_features

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the smaller side."""
        return min(m, n)

    @classmethod
    def replaces(cls, dense: nn.Module) -> bool:
        """Say whether a module is a table whose rows it gives, or gives a multiple of."""
        return times_of(dense) is not None

    @classmethod
    def from_rounded(cls, W: GridEmbedding) -> Self:
        """Build the table of rounded rows.

        Parameters
        ----------
        W : GridEmbedding
            The rounded rows, one for each token.

        Returns
        -------
        WholeTable
            The table of these rows.
        """
        n, m = W.scale.shape[0], W.columns
        layer = cls(n, m, min(m, n), bias=False, device="meta")
        layer.round_({"W": W})
        return layer

    def adopt_(self, dense: nn.Module) -> None:
        """Take over the token for padding, and what rows are multiplied by."""
        table: Any = dense
        self.padding_idx = table.padding_idx
        self.times = times_of(dense) or Times()

    def spec(self) -> dict[str, Any]:
        """Return what ``config.json`` says of the table, as JSON types."""
        return super().spec() | self.own_fields()

    def own_fields(self) -> dict[str, Any]:
        """Return what the description says of looking up, and not of what is stored: no two tables have to share it."""
        found: dict[str, Any] = {} if self.padding_idx is None else {"padding": self.padding_idx}
        return found if self.times == Times() else {**found, "times": asdict(self.times)}

    def take_(self, fields: Mapping[str, Any]) -> None:
        """Look up as such fields say, in place.

        Parameters
        ----------
        fields : mapping
            What :meth:`own_fields` returned, perhaps among others.
        """
        self.padding_idx = fields.get("padding")
        self.times = Times(**fields.get("times", {}))

    @classmethod
    def are_fields(cls, fields: Mapping[str, Any]) -> bool:
        """Tell whether these are fields that :meth:`own_fields` returns.

        Parameters
        ----------
        fields : mapping
            The fields to look at.

        Returns
        -------
        bool
            Whether no others are among them, and all are of the right kinds.
        """
        padding, times = fields.get("padding", 0), fields.get("times", asdict(Times()))
        known = isinstance(times, Mapping) and times.keys() == {"value", "rounded"}
        kinds = known and type(times["value"]) in (int, float) and type(times["rounded"]) is bool
        return fields.keys() <= _FIELDS and kinds and type(padding) is int and padding >= 0

    @classmethod
    def is_spec(cls, spec: Mapping[str, Any]) -> bool:
        """Tell whether such a description has the fields of a table, of the right kinds."""
        own = {key: value for key, value in spec.items() if key in _FIELDS}
        return super().is_spec({key: spec[key] for key in spec.keys() - _FIELDS}) and cls.are_fields(own)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], in_features: int, out_features: int, **options: Any) -> Self:
        """Make the table of such a description, with rows yet to be loaded."""
        if spec["rank"] != min(in_features, out_features):
            raise ValueError(
                f"`rank` of a whole table of {in_features} x {out_features} must be its smaller side, got "
                f"{spec['rank']}"
            )
        layer = super().from_spec(spec, in_features, out_features, **options)
        layer.take_(spec)
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the transpose of the table and the identity of side n, or of side m and the transpose."""
        W = self.matrix
        eye = torch.eye(self.rank, dtype=W.dtype, device=W.device)
        return (W, eye) if self.in_features == self.rank else (eye, W)

    @property
    def matrix(self) -> Tensor:
        """The weight of the layer that takes one token at a time, m x n."""
        return self.weight.mT

    @property
    def weight(self) -> Tensor:
        """The table, one row for each token, as ``nn.Embedding`` has it."""
        found: Tensor = self.W.weight
        return found

    def bias_tensor(self) -> Tensor | None:
        """Return None."""
        return None

    def vectors(self, x: Tensor) -> Tensor | None:
        """Return the norms of one-hot inputs, which are one; None where rows are multiplied."""
        return torch.ones(*x.shape, 1, device=x.device) if self.times == Times() else None

    def factors(self) -> dict[str, nn.Linear]:
        """Return the table."""
        parts: dict[str, Any] = {"W": self.W}
        return parts

    def to_dense(self) -> nn.Module:
        """Return the table as ``nn.Embedding``, or as one that multiplies its rows."""
        sizes = {"num_embeddings": self.in_features, "embedding_dim": self.out_features}
        options: dict[str, Any] = {**sizes, "padding_idx": self.padding_idx, "device": "meta"}
        table = nn.Embedding(**options) if self.times == Times() else ScaledEmbedding(times=self.times, **options)
        fill_(table, self.weight)
        return table.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Look up tokens of shape (...); returns (..., m).

        Parameters
        ----------
        input : Tensor
            The tokens, of an integer dtype.

        Returns
        -------
        Tensor
            The vectors of the tokens.
        """
        return self.times.applied(self.W(input))


def is_whole(layer: nn.Module) -> bool:
    """Say whether a layer holds one rounded matrix, which other layers may read as well.

    Parameters
    ----------
    layer : nn.Module
        The layer to look at.

    Returns
    -------
    bool
        Whether it is a rounded :class:`WholeTable` or :class:`~cur.integrations.nn.WholeLinear`.
    """
    return isinstance(layer, (WholeTable, WholeLinear)) and layer.grid is not None


def reading(layer: CompressedLinear, dense: nn.Module) -> CompressedLinear:
    """Return the layer for the place of a dense one whose weight is tied to that of another, of the same integers.

    A linear layer multiplies with them, and a table looks rows up. Both hold the same parameters, which are in memory
    once and are stored once.

    Parameters
    ----------
    layer : WholeTable or WholeLinear
        The rounded layer in the place of the other one.
    dense : nn.Module
        The dense layer or table to replace, which is not changed.

    Raises
    ------
    ValueError
        If the dense layer stores its weight transposed, or is neither.
    """
    stored: Any = layer.get_submodule("W")
    rows, columns = stored.scale.shape[0], stored.columns
    made: WholeTable | WholeLinear
    if times_of(dense) is not None:
        made = WholeTable.from_rounded(_filled(GridEmbedding(rows, columns, stored.grid, device="meta"), stored))
        made.adopt_(dense)
    elif isinstance(dense, nn.Linear):
        linear = GridLinear(columns, rows, bias=False, grid=stored.grid, device="meta")
        if dense.bias is not None:
            linear.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        made = WholeLinear.from_rounded(_filled(linear, stored))
    else:
        raise ValueError(
            f"a {type(dense).__name__} cannot read what the layout {layer.layout!r} stores; leave the layer dense"
        )
    return made.train(dense.training)


def _filled(hollow: _Kind, stored: OnGrid) -> _Kind:
    """Give a layer or table without values the parameters of another one."""
    hollow.scale, hollow.integers, hollow.zeros = stored.scale, stored.integers, stored.zeros
    return hollow
