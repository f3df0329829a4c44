"""What every layer type says of itself, and what all of them have: a dense weight to compare with, and the way back."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cur._lib.errors import warn
from cur.integrations.nn.grid import IntegerGrid
from cur.integrations.nn.rounded import GridEmbedding, GridLinear
from cur.integrations.nn.tensors import Stores, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from cur.integrations.nn.trainable import Trainable

__all__ = ["CompressedLinear", "check_bias", "fill_", "grid_fields", "scaled", "spec_grid", "wide"]


class CompressedLinear(nn.Module):
    """Replace a linear layer by one whose weight takes fewer parameters.

    The base of the layer types; it is not a layer by itself. A type is one class in one file, made known by
    :func:`~cur.integrations.nn.register`. It has a layout, the tensors that it stores, a largest rank, factors, a
    weight or two factors of one, and ``forward``; whatever else is asked of layers has an answer here that most types
    can keep.

    Parameters
    ----------
    in_features, out_features, rank : int
        Sizes n, m and r; ``1 <= rank <= largest_rank(m, n)``. Of the layouts for neurons, r is how many are kept.
    inner_rank : int, optional
        The rank of the kept part in layouts for neurons, held as rows and coefficients. By default that part is held
        whole.
    bias : bool
        Whether the layer adds a bias of m entries.
    transposed : bool
        Whether the dense layer it replaces is a transformers ``Conv1D`` (weight n x m), to be restored by
        :meth:`to_dense`.
    grid : IntegerGrid, optional
        The grid of factors that are rounded, :class:`~cur.integrations.nn.GridLinear`. By default they are not.
    device, dtype : optional
        The device and dtype of the factors, which are random as in a new ``nn.Linear``.

    Raises
    ------
    ValueError
        If a rank is below one or above the largest.
    """

    layout: ClassVar[str]
    """Name of the layout in plans and checkpoints."""
    bias_names: ClassVar[tuple[str, ...]] = ("bias",)
    """What the bias may be called among the stored tensors."""
    smaller: ClassVar[bool] = True
    """Whether it has a weight of lower rank, or of fewer neurons."""
    by_itself: ClassVar[bool] = True
    """Whether it takes and gives all features of the dense layer, and so can be compared with it alone."""
    by_inputs: ClassVar[bool] = False
    """Whether it takes one of its inputs at a time, as a table of embeddings does: what is kept of the weight then are
    columns, and second moments of inputs are diagonal."""
    faster: ClassVar[tuple[int, float] | None] = None
    """The number of parameters, and the share of the dense ones, that it has to save to be faster than the dense layer:
    measured. None for a type that is not chosen for its speed."""
    stores: ClassVar[Stores]
    """What is stored, but for the bias."""
    factored_stores: ClassVar[Stores] = {}
    """What is stored where there is an inner rank."""
    _limit: ClassVar[str] = "the largest"
    """What the largest rank is, in words."""
    _called: ClassVar[str] = "such a layer"
    """What messages call it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        inner_rank: int | None = None,
        bias: bool = True,
        transposed: bool = False,
        grid: IntegerGrid | None = None,
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
        self.grid = grid
        self._make_(device=device, dtype=dtype)

    def _make_(self, **place: Any) -> None:
        """Make the factors, the bias and the buffers, on a device and of a dtype."""
        raise NotImplementedError

    def _linear(self, in_features: int, out_features: int, *, bias: bool = False, **place: Any) -> nn.Linear:
        """Make a factor, with a weight and a bias to read in any case."""
        if self.grid is None:
            return nn.Linear(in_features, out_features, bias=bias, **place)
        made: Any = GridLinear(in_features, out_features, bias=bias, grid=self.grid, **place)
        return made  # type: ignore[no-any-return]

    def round_(self, factors: Mapping[str, GridLinear | GridEmbedding]) -> None:
        """Put rounded factors in the place of all those that are there, in place.

        Parameters
        ----------
        factors : mapping of str to GridLinear or GridEmbedding
            The rounded factors, all on one grid, by the names of the children that they replace.
        """
        grid = next(iter(factors.values())).grid
        for name, factor in factors.items():
            self.set_submodule(name, factor.train(self.training))
        for part in self.modules():
            if isinstance(part, CompressedLinear):
                part.grid = grid

    @classmethod
    def largest_rank(cls, m: int, n: int) -> int:
        """Return the largest rank of an m x n layer in this layout.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        """
        raise NotImplementedError

    @classmethod
    def largest_inner_rank(cls, m: int, n: int, rank: int) -> int:
        """Return the largest rank of what an m x n layer keeps; 0 if that has none of its own.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        rank : int
            The number of neurons kept.
        """
        return 0

    @classmethod
    def sizes(cls, m: int, n: int, rank: Any, inner_rank: Any = None) -> dict[str, Any]:
        """Return the sizes of an m x n layer by the names that :meth:`tensors` has for them; ranks may be arrays.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        rank : Any
            The rank of the layer, or an array of ranks.
        inner_rank : Any, optional
            The rank of the kept part; None if it is whole.
        """
        return {"outputs": m, "inputs": n, "rank": rank, "inner_rank": inner_rank, "one": 1}

    @classmethod
    def tensors(cls, *, factored: bool = False, grid: IntegerGrid | None = None) -> Stores:
        """Return what layers of this type store, but for the bias, by the names in their state.

        Parameters
        ----------
        factored : bool, default False
            Whether there is an inner rank.
        grid : IntegerGrid, optional
            The grid of rounded factors; None if they are not rounded.
        """
        found = cls.factored_stores if factored else cls.stores
        return found if grid is None else rounded(found, grid)

    @classmethod
    def parameter_count(cls, m: int, n: int, rank: Any, inner_rank: Any = None) -> Any:
        """Count the parameters of an m x n layer of a rank, or of an array of ranks, without the bias.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        rank : Any
            The rank of the layer, or an array of ranks.
        inner_rank : Any, optional
            The rank of the kept part; None if it is whole.

        Returns
        -------
        Any
            The number of parameters, an array for an array of ranks.
        """
        sizes = cls.sizes(m, n, rank, inner_rank)
        found = cls.tensors(factored=inner_rank is not None).values()
        return sum(tensor.count(sizes) for tensor in found if tensor.dtype is None)

    @classmethod
    def numbers(cls, *sizes: Any) -> Any:
        """Return :meth:`parameter_count`, with a warning: it was called this before.

        Parameters
        ----------
        *sizes : Any
            The arguments of :meth:`parameter_count`.
        """
        warn(f"{cls.__name__}.numbers is parameter_count now", DeprecationWarning)
        return cls.parameter_count(*sizes)

    @classmethod
    def nbytes(
        cls, m: int, n: int, rank: Any, inner_rank: Any = None, *, dtype: torch.dtype, grid: IntegerGrid | None = None
    ) -> Any:
        """Count the bytes of the same in a dtype, or on a grid, with steps, zeros and indices.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        rank : Any
            The rank of the layer, or an array of ranks.
        inner_rank : Any, optional
            The rank of the kept part; None if it is whole.
        dtype : torch.dtype
            The dtype of the factors, or of the layer where they are rounded.
        grid : IntegerGrid, optional
            The grid of rounded factors; None if they are not rounded.

        Returns
        -------
        Any
            The number of bytes, an array for an array of ranks.
        """
        sizes = cls.sizes(m, n, rank, inner_rank)
        found = cls.tensors(factored=inner_rank is not None, grid=grid).values()
        return sum(tensor.count(sizes) * (tensor.dtype or dtype).itemsize for tensor in found)

    @classmethod
    def rank_within(cls, m: int, n: int, parameters: float) -> int:
        """Return the largest rank at which an m x n layer takes at most so many parameters; 0 if none does.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        parameters : float
            The number of parameters that the layer may take.
        """
        ranks = range(1, cls.largest_rank(m, n) + 1)
        return bisect_right(ranks, parameters, key=lambda rank: cls.parameter_count(m, n, rank))

    @classmethod
    def sized(cls, stored: Mapping[str, tuple[int, ...]], spec: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes of a layer from the shapes of its stored tensors, by name; what no tensor tells is left out.

        Parameters
        ----------
        stored : mapping of str to tuple of int
            The shapes of the stored tensors, by name.
        spec : mapping
            The description of the layer, as :meth:`spec` gives it.

        Raises
        ------
        KeyError
            With the name of a tensor that is missing.
        """
        found: dict[str, int] = {}
        grid = spec_grid(spec)
        if grid is not None and not grid.signed:  # a row of bytes does not tell how many integers it has
            outputs, inputs = spec["shape"]
            axes = {axis for tensor in cls.tensors(factored="inner_rank" in spec).values() for axis in tensor.axes}
            ranks: dict[str, int] = {key: spec[key] for key in ("rank", "inner_rank") if key in spec and key in axes}
            return {"outputs": outputs, "inputs": inputs, **ranks}
        for key, tensor in cls.tensors(factored="inner_rank" in spec, grid=grid).items():
            for axis, name in enumerate(tensor.axes):
                if name in ("outputs", "inputs", "rank", "inner_rank") and name not in found:
                    found[name] = stored[key][axis]
        return found

    @classmethod
    def cells(cls, m: int, n: int, rank: int, inner_rank: int | None = None) -> dict[str, str]:
        """Return what tables, cards and pages say of an m x n layer.

        Parameters
        ----------
        m : int
            The number of outputs.
        n : int
            The number of inputs.
        rank : int
            The rank of the layer.
        inner_rank : int, optional
            The rank of the kept part; None if it is whole.
        """
        ranks = str(rank) if inner_rank is None else f"{rank}, {inner_rank}"
        return {"shape": f"{m} x {n}", "layout": cls.layout, "rank": ranks}

    def spec(self) -> dict[str, Any]:
        """Return what ``config.json`` says of the layer, as JSON types."""
        found: dict[str, Any] = {"layout": self.layout, "rank": self.rank}
        if self.inner_rank is not None:
            found["inner_rank"] = self.inner_rank
        return found | grid_fields(self.grid, self.shape)

    @classmethod
    def is_spec(cls, spec: Mapping[str, Any]) -> bool:
        """Tell whether such a description has the fields of this type, of the right kinds.

        Parameters
        ----------
        spec : mapping
            The description to look at.

        Returns
        -------
        bool
            Whether it describes a layer of this type.
        """
        fields = {"layout", "rank", "int8", "grid", "shape"} | ({"inner_rank"} if cls.factored_stores else set())
        sizes = [spec.get("rank"), spec.get("inner_rank", 1)]
        known = spec.keys() <= fields and spec.get("int8", True) is True and not {"int8", "grid"} <= spec.keys()
        shape = spec.get("shape", [1, 1])
        if ("grid" in spec) != ("shape" in spec) or not isinstance(shape, list) or len(shape) != 2:
            return False
        sizes += shape
        try:
            spec_grid(spec)
        except ValueError:
            return False
        return known and all(type(size) is int and size > 0 for size in sizes)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], in_features: int, out_features: int, **options: Any) -> Self:
        """Make the layer of such a description, with factors yet to be loaded.

        Parameters
        ----------
        spec : mapping
            The description of the layer that :meth:`spec` returned.
        in_features, out_features : int
            The sizes of the dense layer that is replaced.
        **options
            ``bias``, ``transposed``, ``device`` and ``dtype`` of the constructor.
        """
        known: dict[str, Any] = {"inner_rank": spec.get("inner_rank"), "grid": spec_grid(spec)}
        return cls(in_features, out_features, spec["rank"], **known, **options)

    def fault(self) -> str | None:
        """Say what is wrong with values that were loaded, the name of their tensor first; None if nothing is.

        Returns
        -------
        str or None
            A sentence that says what is wrong, None if nothing is.
        """
        return None

    def damage(self) -> str | None:
        """Say what is wrong with values that were loaded, of the layer or of its rounded factors; None if nothing is.

        Returns
        -------
        str or None
            A sentence that begins with the name of a tensor, None if nothing is wrong.
        """
        for name, part in self.named_modules():
            if isinstance(part, (GridLinear, GridEmbedding)) and (why := part.fault()):
                return f"{name}.{why}"
        return self.fault()

    def trainable(self) -> Trainable | None:
        """Return what healing may train; None if nothing of the layer."""
        return None

    def factors(self) -> dict[str, nn.Linear]:
        """Return the linear layers whose product is the weight, by name, in the order in which they are applied.

        A type whose weight is no product of such layers returns none, and is left as it is where others are rounded.
        """
        return {name: part for name, part in self.named_modules() if isinstance(part, nn.Linear)}

    def outputs_of(self, factor: str) -> Tensor | None:
        """Return which outputs those of a factor are, where every factor gives some of the layer's; None elsewhere.

        Parameters
        ----------
        factor : str
            The name of the factor among :meth:`factors`.

        Returns
        -------
        Tensor or None
            Numbers of outputs, int64, in the order of the factor's own.
        """
        return None

    @property
    def applied(self) -> Any:
        """The layer that :meth:`forward` applies, with its sizes, weight and bias: this one, or a part of it."""
        return self

    def plus(self, left: Tensor, right: Tensor, *, scale: Tensor | None = None) -> CompressedLinear:
        """Return a layer of the same kind whose weight has a product added, of a larger rank where need be.

        Parameters
        ----------
        left : Tensor
            The left factor of what is added to the weight of :attr:`applied`, with a row for each of its outputs.
        right : Tensor
            The right factor, with a column for each of its inputs.
        scale : Tensor, optional
            One factor for each output, by which the sum is multiplied.

        Raises
        ------
        ValueError
            If :meth:`unchangeable` says why that cannot be.
        """
        if why := self.unchangeable():
            raise ValueError(f"nothing can be added to the weight of the layer, which {why}")
        device = next(self.parameters()).device
        left, right = (wide(factor.detach()).to(device) for factor in (left, right))
        layer = self._plus(left, right, None if scale is None else wide(scale.detach()).to(device)[:, None])
        return layer.train(self.training)

    def _plus(self, left: Tensor, right: Tensor, scale: Tensor | None) -> CompressedLinear:
        """Return what :meth:`plus` does, from factors that are not rounded to half precision."""
        raise NotImplementedError

    def unchangeable(self) -> str | None:
        """Say why nothing can be added to the weight, as the end of a sentence; None if it can.

        Returns
        -------
        str or None
            What the layer is, or None.
        """
        if self.grid is not None:
            return f"is rounded to {self.grid}"
        return f"is a {type(self).__name__}" if type(self)._plus is CompressedLinear._plus else None

    def among_dense(self) -> Callable[[Tensor], Tensor]:
        """Return a replacement for use while the layers around it are still dense: it takes and gives all features."""
        return self.for_all_inputs

    def for_all_inputs(self, x: Tensor) -> Tensor:
        """Apply the layer while those before it are still dense.

        Parameters
        ----------
        x : Tensor
            The inputs, of shape (..., n).

        Returns
        -------
        Tensor
            The outputs, of shape (..., m).
        """
        y: Tensor = self(x)
        return y

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the dense layer."""
        return self.out_features, self.in_features

    @property
    def ranks(self) -> tuple[int, int | None]:
        """Rank and inner rank."""
        return self.rank, self.inner_rank

    @property
    def stored(self) -> int:
        """The number of parameters, without the bias."""
        return int(self.parameter_count(*self.shape, *self.ranks))

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``left`` (m x r) and ``right`` (r x n) with ``weight == left @ right``."""
        raise NotImplementedError

    def bias_tensor(self) -> Tensor | None:
        """Return the bias (m entries), or None."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Return the bias of a layer that keeps it in a factor: some models read it, and do not call the layer."""
        if name == "bias" and "bias" not in self.bias_names:
            return self.bias_tensor()
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """The dense weight, m x n, multiplied out at every access (half precision through float32)."""
        return self._product(*self.two_factors())

    @staticmethod
    def _product(left: Tensor, right: Tensor) -> Tensor:
        return (wide(left) @ wide(right)).to(right.dtype)

    @property
    def matrix(self) -> Tensor:
        """The matrix of the linear map, m x n; the weight, but for types that stand in for what is no linear layer."""
        return self.weight

    def adopt_(self, dense: nn.Module) -> None:
        """Take over what else the dense layer has that this one replaces, in place.

        Parameters
        ----------
        dense : nn.Module
            The dense layer, which is not changed.
        """

    def vectors(self, x: Tensor) -> Tensor | None:
        """Return the input vectors, or others of their norms, one for each output; None if the norms are not known.

        Parameters
        ----------
        x : Tensor
            What the layer is called with.
        """
        return x

    @classmethod
    def replaces(cls, dense: nn.Module) -> bool:
        """Say whether layers of this type can stand in for a dense layer or table of this kind.

        Parameters
        ----------
        dense : nn.Module
            The dense layer or table.

        Returns
        -------
        bool
            Whether they can, of the right sizes.
        """
        return not isinstance(dense, (nn.Embedding, nn.EmbeddingBag))

    @classmethod
    def conversions(cls) -> tuple[str, ...]:
        """Name the layouts that its layers can be brought to, its own among them.

        Returns
        -------
        tuple of str
            The names of the layouts.
        """
        return (cls.layout,)

    def to_layout(self, layout: str) -> CompressedLinear:
        """Return the same function in another layout; a layer that has the layout already is returned itself.

        Parameters
        ----------
        layout : str
            The name of the layout to bring it to.

        Raises
        ------
        ValueError
            If the layer cannot be brought to the layout.
        """
        if layout == self.layout:
            return self
        if layout in self.conversions():
            return self._converted(layout)
        others = len(self.conversions()) > 1
        raise ValueError(
            f"`layout` must be one of {', '.join(self.conversions())}, got {layout!r}"
            if others
            else f"`layout` of {self._called} must stay {self.layout!r}, got {layout!r}"
        )

    def _converted(self, layout: str) -> CompressedLinear:
        """Return the same function in another of :meth:`conversions`."""
        raise NotImplementedError

    @classmethod
    def from_two_factors(
        cls, left: Tensor, right: Tensor, *, bias: Tensor | None = None, transposed: bool = False
    ) -> Self:
        """Build the layer whose weight is ``left @ right`` (m x r times r x n), in their dtype and device.

        Parameters
        ----------
        left : Tensor
            The left factor, of shape (m, r).
        right : Tensor
            The right factor, of shape (r, n).
        bias : Tensor, optional
            The bias of m entries.
        transposed : bool, default False
            Whether the dense layer stores its weight transposed.
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
        return f"{sizes}{inner}, bias={self.has_bias}{'' if self.grid is None else f', {self.grid}'}"


def grid_fields(grid: IntegerGrid | None, shape: tuple[int, int]) -> dict[str, Any]:
    """Return what the description of a layer says of its grid; nothing if its factors are not rounded.

    Parameters
    ----------
    grid : IntegerGrid or None
        The grid of its factors.
    shape : (int, int)
        The outputs and inputs of the dense layer, which rows of packed bytes do not tell.
    """
    if grid is None:
        return {}
    return {"int8": True} if grid == IntegerGrid() else {"grid": grid.spec(), "shape": list(shape)}


def spec_grid(spec: Mapping[str, Any]) -> IntegerGrid | None:
    """Return the grid that a description of a layer names; None if its factors are not rounded.

    Parameters
    ----------
    spec : mapping
        The description of the layer, as :meth:`CompressedLinear.spec` gives it.

    Raises
    ------
    ValueError
        If what it names is no grid.
    """
    if "int8" in spec:
        return IntegerGrid()
    return IntegerGrid.from_spec(spec["grid"]) if "grid" in spec else None


def fill_(linear: nn.Linear | nn.Embedding, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear layer a weight, and a copy of a bias if there is one.

    Parameters
    ----------
    linear : nn.Linear or nn.Embedding
        The linear layer or table, which is changed in place.
    weight : Tensor
        The weight that it gets, copied only where it is not contiguous.
    bias : Tensor, optional
        The bias that is copied into it.
    """
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())


def wide(tensor: Tensor) -> Tensor:
    """Return what products of a tensor are formed in: itself, or float32 for half precision.

    Parameters
    ----------
    tensor : Tensor
        The tensor to widen.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def scaled(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Return a tensor, or what it is times a scale if there is one.

    Parameters
    ----------
    tensor : Tensor
        The tensor to scale.
    scale : Tensor, optional
        What it is multiplied by, of a shape that fits; None leaves the tensor as it is.
    """
    return tensor if scale is None else scale * tensor


def check_bias(bias: Tensor | None, m: int) -> None:
    """Raise a ValueError if a bias does not have m entries.

    Parameters
    ----------
    bias : Tensor or None
        The bias to check; None is allowed.
    m : int
        The number of entries it must have.

    Raises
    ------
    ValueError
        If it has another shape.
    """
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"`bias` must have shape {(m,)}, one entry for each output, got {tuple(bias.shape)}")
