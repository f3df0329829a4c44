"""A table of embeddings of a lower rank: coefficients of every token, and one map from these to its vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cur.integrations.nn.base import CompressedLinear, fill_
from cur.integrations.nn.registry import register
from cur.integrations.nn.replaceable import has_own_forward
from cur.integrations.nn.rounded import GridEmbedding
from cur.integrations.nn.tensors import StoredTensor, Stores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BAGS", "EmbeddingFactors", "is_table"]

BAGS = ("sum", "mean")
"""How vectors of a bag may be put together: the largest entry of each feature is not linear."""


def is_table(module: nn.Module) -> bool:
    """Say whether a module is one matrix of which it looks up rows: ``nn.Embedding``, or sums or means of such rows.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether it is one; subclasses may do more, and tables that bound the norms of their rows, or have a forward pass
        of their own, do.
    """
    kind = type(module)
    if kind is not nn.Embedding and kind is not nn.EmbeddingBag:
        return False
    table: Any = module
    return table.max_norm is None and not has_own_forward(module) and (kind is nn.Embedding or table.mode in BAGS)


@register
class EmbeddingFactors(CompressedLinear):
    """Look up r coefficients of a token and map them to its d features: ``B A[token]``.

    The n tokens are the inputs of a linear layer whose input is one of them at a time, and the m features its outputs,
    so its weight is the transpose of the table. Where rows of the table are kept, they are the columns of ``B``, and
    the coefficients of their tokens rows of the identity.

    Attributes
    ----------
    bag : str or None
        How the vectors of a bag are put together, as by ``nn.EmbeddingBag``; None for one vector a token.
    padding_idx : int or None
        The token that fills up samples, as for ``nn.Embedding``.
    last_offset : bool
        Whether the last offset of bags is the end of the last one, as for ``nn.EmbeddingBag``.
    """

    layout = "embedding"
    by_inputs = True
    stores: ClassVar[Stores] = {
        "A.weight": StoredTensor(("inputs", "rank")),
        "B.weight": StoredTensor(("outputs", "rank")),
    }
    _limit = "the smaller side"
    _called = "a table of embeddings"

    bag: str | None = None
    padding_idx: int | None = None
    last_offset: bool = False

    def _make_(self, **place: Any) -> None:
        if self.grid is None:
            self.A: Any = nn.Embedding(self.in_features, self.rank, **place)
        else:
            self.A = GridEmbedding(self.in_features, self.rank, grid=self.grid, **place)
        self.B = self._linear(self.rank, self.out_features, **place)

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
        """Say whether a module is a plain table, or one of bags."""
        return is_table(dense)

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the table with ``B = left``, ``A = right^T``; a table has no bias."""
        rank, n = right.shape
        layer = cls(n, left.shape[0], rank, bias=False, device="meta")
        fill_(layer.A, right.mT)
        fill_(layer.B, left)
        return layer

    def adopt_(self, dense: nn.Module) -> None:
        """Take over how bags are put together, and the token for padding."""
        table: Any = dense
        self.bag = table.mode if isinstance(dense, nn.EmbeddingBag) else None
        self.padding_idx = table.padding_idx
        self.last_offset = self.bag is not None and table.include_last_offset

    def spec(self) -> dict[str, Any]:
        """Return what ``config.json`` says of the table, as JSON types."""
        found = super().spec()
        told = {"bag": self.bag, "padding": self.padding_idx, "last_offset": self.last_offset or None}
        return found | {key: value for key, value in told.items() if value is not None}

    @classmethod
    def is_spec(cls, spec: Mapping[str, Any]) -> bool:
        """Tell whether such a description has the fields of a table, of the right kinds."""
        plain = {key: value for key, value in spec.items() if key not in ("bag", "padding", "last_offset")}
        padding, bag = spec.get("padding", 0), spec.get("bag", "sum")
        known = super().is_spec(plain) and bag in BAGS and spec.get("last_offset", True) is True
        return known and type(padding) is int and padding >= 0

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], in_features: int, out_features: int, **options: Any) -> Self:
        """Make the table of such a description, with factors yet to be loaded."""
        layer = super().from_spec(spec, in_features, out_features, **options)
        layer.bag, layer.padding_idx = spec.get("bag"), spec.get("padding")
        layer.last_offset = spec.get("last_offset", False)
        return layer

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the map of the coefficients, and the coefficients of all tokens, one column for each."""
        return self.B.weight, self.A.weight.mT

    @property
    def matrix(self) -> Tensor:
        """The weight of the layer that takes one token at a time, m x n."""
        left, right = self.two_factors()
        return self._product(left, right)

    @property
    def weight(self) -> Tensor:
        """The table, one row for each token, as ``nn.Embedding`` has it, multiplied out at every access."""
        return self.matrix.mT

    def bias_tensor(self) -> Tensor | None:
        """Return None."""
        return None

    def vectors(self, x: Tensor) -> Tensor | None:
        """Return the norms of one-hot inputs, which are one; None for bags, whose inputs have any."""
        return torch.ones(*x.shape, 1, device=x.device) if self.bag is None else None

    def factors(self) -> dict[str, nn.Linear]:
        """Return the coefficients and the map, in the order in which they are applied."""
        parts: dict[str, Any] = {"A": self.A, "B": self.B}
        return parts

    def to_dense(self) -> nn.Module:
        """Return the table as ``nn.Embedding``, or as ``nn.EmbeddingBag``."""
        sizes = {"num_embeddings": self.in_features, "embedding_dim": self.out_features}
        options: dict[str, Any] = {**sizes, "padding_idx": self.padding_idx, "device": "meta"}
        table: nn.Embedding | nn.EmbeddingBag = nn.Embedding(**options)
        if self.bag is not None:
            table = nn.EmbeddingBag(mode=self.bag, include_last_offset=self.last_offset, **options)
        table.weight = nn.Parameter(self.weight.detach().contiguous())
        return table.train(self.training)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up tokens of shape (...); returns (..., m), or of bags one vector for each of these.

        Parameters
        ----------
        input : Tensor
            The tokens, of an integer dtype.
        offsets : Tensor, optional
            The place at which each bag begins, for bags of different lengths in one vector of tokens.
        per_sample_weights : Tensor, optional
            A factor for each token of a bag, of the shape of the tokens.

        Returns
        -------
        Tensor
            The vectors of the tokens, or of the bags.
        """
        if self.bag is None:
            y: Tensor = self.B(self.A(input))
            return y
        rows, tokens, padding = self.A.weight if self.grid is None else None, input, self.padding_idx
        if rows is None:  # all of them would have to be multiplied out
            some, tokens = torch.unique(input, return_inverse=True)
            rows = self.A(some)
            place = (some == padding).nonzero() if padding is not None else some[:0]
            padding = int(place[0]) if len(place) else None
        mixed = nn.functional.embedding_bag(
            tokens,
            rows,
            offsets,
            mode=self.bag,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.last_offset,
            padding_idx=padding,
        )
        mapped: Tensor = self.B(mixed)
        return mapped
