"""Layers around removed neurons: producers give fewer outputs, and the next layer takes fewer inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cur.integrations.nn.base import CompressedLinear, check_bias, fill_, scaled, wide
from cur.integrations.nn.factored import InterpolativeLinear
from cur.integrations.nn.registry import register
from cur.integrations.nn.tensors import StoredTensor, Stores
from cur.integrations.nn.trainable import Trainable

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

__all__ = ["KeptInputs", "KeptNeurons", "KeptOutputs"]


class KeptNeurons(CompressedLinear):
    """What the two sides of a layer of neurons share: which of them are kept, and a layer of these alone.

    Attributes
    ----------
    kept : Tensor, shape (neurons,)
        One truth value for each neuron: whether it is kept.
    part : nn.Linear or InterpolativeLinear
        The layer of the kept neurons alone: whole, or of rank `inner_rank`.
    """

    kept: Tensor
    by_itself = False
    _called = "a layer that keeps some neurons"
    _child: ClassVar[str]
    """Name of the part among the children; a factored one is called ``inner``."""

    @property
    def part(self) -> Any:
        """The layer of the kept neurons alone."""
        return getattr(self, self._child if self.inner_rank is None else "inner")

    @property
    def applied(self) -> Any:
        """The layer of the kept neurons, whose inputs and outputs are these alone."""
        return self.part

    def _plus(self, left: Tensor, right: Tensor, scale: Tensor | None) -> CompressedLinear:
        if self.inner_rank is not None:
            part = self.part.plus(left, right, scale=None if scale is None else scale[:, 0])
            return self.from_part(part, self.kept, transposed=self.transposed)
        weight = self.part.weight.detach()
        total = scaled(wide(weight) + left @ right, scale).to(weight.dtype)
        return self.from_part(total, self.kept, bias=self.part.bias, transposed=self.transposed)

    def _make_(self, **place: Any) -> None:
        m, n = self.shape_inside(self.out_features, self.in_features, self.rank)
        if self.inner_rank is None:
            self.add_module(self._child, self._linear(n, m, bias=self.has_bias, **place))
        else:
            self.inner = InterpolativeLinear(n, m, self.inner_rank, bias=self.has_bias, grid=self.grid, **place)
        width = self.largest_rank(self.out_features, self.in_features)
        self.register_buffer("kept", torch.arange(width, device=place["device"]) < self.rank)

    @classmethod
    def shape_inside(cls, m: int, n: int, rank: int) -> tuple[int, int]:
        """Return the outputs and inputs of what an m x n layer keeps.

        Parameters
        ----------
        m : int
            The number of outputs of the dense layer.
        n : int
            The number of inputs of the dense layer.
        rank : int
            The number of neurons kept.
        """
        raise NotImplementedError

    @classmethod
    def shape_outside(cls, m: int, n: int, width: int) -> tuple[int, int]:
        """Return the outputs and inputs of the layer that keeps m x n of a number of neurons.

        Parameters
        ----------
        m : int
            The number of outputs of the kept part.
        n : int
            The number of inputs of the kept part.
        width : int
            The number of neurons of the dense layer.
        """
        raise NotImplementedError

    @classmethod
    def largest_inner_rank(cls, m: int, n: int, rank: int) -> int:
        """Return the smaller side of what is kept."""
        return min(cls.shape_inside(m, n, rank))

    @classmethod
    def sizes(cls, m: int, n: int, rank: Any, inner_rank: Any = None) -> dict[str, Any]:
        """Return the sizes of an m x n layer by name, those inside of its factored part among them."""
        sizes = super().sizes(m, n, rank, inner_rank)
        return sizes if inner_rank is None else {**sizes, "others": cls.shape_inside(m, n, rank)[0] - inner_rank}

    @classmethod
    def from_part(
        cls, part: Tensor | InterpolativeLinear, kept: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer from what it keeps.

        Parameters
        ----------
        part : Tensor or InterpolativeLinear
            The part of the weight that belongs to the kept neurons: r rows, or r columns; or a layer of a lower rank,
            with its bias.
        kept : Tensor, shape (neurons,)
            Truth values, of which r are true.
        bias : Tensor, optional
            An entry for each output of `part`.
        transposed : bool
            Whether the weight is stored transposed, see :class:`CompressedLinear`.
        """
        options: dict[str, Any] = {"transposed": transposed, "device": "meta"}
        count, width = int(kept.sum()), len(kept)
        if isinstance(part, InterpolativeLinear):
            m, n = cls.shape_outside(part.out_features, part.in_features, width)
            layer = cls(n, m, count, inner_rank=part.rank, bias=part.has_bias, **options)
            layer.inner = part
        else:
            rows, columns = part.shape
            check_bias(bias, rows)
            m, n = cls.shape_outside(rows, columns, width)
            layer = cls(n, m, count, bias=bias is not None, **options)
            fill_(layer.part, part, bias)
        layer.kept = kept.clone()  # tensors that are saved must not be shared
        return layer

    def spread(self, part: Tensor) -> Tensor:
        """Return m x n from what belongs to the kept neurons, and zeros.

        Parameters
        ----------
        part : Tensor
            The weight of the kept part.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, m x n: what is kept, and zeros."""
        return self.spread(self.part.weight)

    def _one_hot(self) -> Tensor:
        """Return the columns of the identity at the kept neurons."""
        places = self.kept.nonzero()[:, 0]
        weight = next(self.parameters())
        eye = torch.zeros(len(self.kept), self.rank, dtype=weight.dtype, device=weight.device)
        eye[places, torch.arange(self.rank, device=weight.device)] = 1
        return eye

    def outputs_of(self, factor: str) -> Tensor | None:
        """Return what the factored part says, whose outputs are those of the layer that are kept."""
        if self.inner_rank is None:
            return None
        found: Tensor | None = self.part.outputs_of(factor.rpartition(".")[2])
        return found

    def fault(self) -> str | None:
        """Say so if other neurons are marked than are stored."""
        if not self.kept.is_meta and int(self.kept.sum()) != self.rank:
            return f"kept marks {int(self.kept.sum())} neurons, where {self.rank} are stored"
        inside = None if self.inner_rank is None else self.part.fault()
        return None if inside is None else f"inner.{inside}"

    def forward(self, input: Tensor) -> Tensor:
        """Apply what is kept: to (..., n) before the neurons, to (..., r) behind them.

        Parameters
        ----------
        input : Tensor
            The inputs of the kept part.

        Returns
        -------
        Tensor
            The outputs of the kept part.
        """
        y: Tensor = self.part(input)
        return y


@register
class KeptOutputs(KeptNeurons):
    """Apply the rows of a layer that belong to kept neurons; the output has r entries.

    Its weight has zeros elsewhere, which is exact where the next layer is a :class:`KeptInputs` of the same neurons.
    """

    layout = "outputs"
    bias_names = ("R.bias", "inner.bias")
    _limit = "the outputs"
    _child = "R"
    stores: ClassVar[Stores] = {
        "R.weight": StoredTensor(("rank", "inputs")),
        "kept": StoredTensor(("outputs",), torch.bool),
    }
    factored_stores: ClassVar[Stores] = {
        "inner.R.weight": StoredTensor(("inner_rank", "inputs")),
        "inner.T.weight": StoredTensor(("others", "inner_rank")),
        "inner.order": StoredTensor(("rank",), torch.int64),
        "kept": StoredTensor(("outputs",), torch.bool),
    }

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the number of outputs."""
        return m

    @classmethod
    def shape_inside(cls, m: int, n: int, rank: int) -> tuple[int, int]:
        """Return the shape of the kept rows."""
        return rank, n

    @classmethod
    def shape_outside(cls, m: int, n: int, width: int) -> tuple[int, int]:
        """Return the shape of the layer they are kept of."""
        return width, n

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the columns of the identity at the kept outputs, and the kept rows."""
        return self._one_hot(), self.part.weight

    def spread(self, part: Tensor) -> Tensor:
        """Return m x n from what belongs to the kept rows, and zeros."""
        full = part.new_zeros(self.out_features, self.in_features)
        full[self.kept] = part
        return full

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries, zero at the others), or None."""
        if not self.has_bias:
            return None
        bias: Tensor = self.part.bias
        full = bias.new_zeros(self.out_features)
        full[self.kept] = bias
        return full

    def among_dense(self) -> Callable[[Tensor], Tensor]:
        """Return a layer of all outputs, of which those of neurons that are gone are zero."""
        full = self.to_linear()
        if self.inner_rank is not None:  # multiplied out in float64, as when the neurons were chosen
            left, right = self.part.two_factors()
            full.weight.data.copy_(self.spread(left.double() @ right.double()))
        return full


@register
class KeptInputs(KeptNeurons):
    """Apply a layer to kept neurons alone, the entries of its input that a :class:`KeptOutputs` gives."""

    layout = "inputs"
    bias_names = ("C.bias", "inner.bias")
    _limit = "the inputs"
    _child = "C"
    stores: ClassVar[Stores] = {
        "C.weight": StoredTensor(("outputs", "rank")),
        "kept": StoredTensor(("inputs",), torch.bool),
    }
    factored_stores: ClassVar[Stores] = {
        "inner.R.weight": StoredTensor(("inner_rank", "rank")),
        "inner.T.weight": StoredTensor(("others", "inner_rank")),
        "inner.order": StoredTensor(("outputs",), torch.int64),
        "kept": StoredTensor(("inputs",), torch.bool),
    }

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the number of inputs."""
        return n

    @classmethod
    def shape_inside(cls, m: int, n: int, rank: int) -> tuple[int, int]:
        """Return the shape of the columns."""
        return m, rank

    @classmethod
    def shape_outside(cls, m: int, n: int, width: int) -> tuple[int, int]:
        """Return the shape of the layer they are kept of."""
        return m, width

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return the columns, and the rows of the identity at the kept inputs."""
        return self.part.weight, self._one_hot().mT

    def spread(self, part: Tensor) -> Tensor:
        """Return m x n from what belongs to the kept columns, and zeros."""
        full = part.new_zeros(self.out_features, self.in_features)
        full[:, self.kept] = part
        return full

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        return self.part.bias if self.has_bias else None

    def trainable(self) -> Trainable:
        """Return a core before the columns, or that of the factored part."""
        if self.inner_rank is not None:
            inside: Trainable = self.part.trainable()
            return inside
        right = self.part.weight.detach().clone()
        eye = torch.eye(self.out_features, dtype=right.dtype, device=right.device)
        return Trainable(self.part.weight, eye, right, holds="right")

    def for_all_inputs(self, x: Tensor) -> Tensor:
        """Apply what is kept to those of all inputs that it is for."""
        return self.forward(x[..., self.kept])
