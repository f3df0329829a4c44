"""The methods of a plan: what each can be told, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cur.integrations.nn import (
    EmbeddingFactors,
    InterpolativeLinear,
    KeptInputs,
    KeptOutputs,
    WholeLinear,
    WholeTable,
    factored,
    grids_of,
    tied_to,
)
from cur.integrations.plan.entry import PlanEntry, PlanError, register_method
from cur.scores import IMPORTANCES, LINKS, needs
from cur.selection import SELECTORS
from cur.weighted.rows import own_rows
from cur.weighted.truncation import square_errors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Self

__all__ = [
    "ROUNDING_DAMPING",
    "SUBSPACES",
    "CUREntry",
    "NeuronsBeforeEntry",
    "NeuronsEntry",
    "RankEntry",
    "RoundedEntry",
    "RowsEntry",
    "WeightedEntry",
]

SUBSPACES = ("exact", "randomised")
"""Where the singular subspaces come from: an SVD, or a seeded random sketch, for layers too large for one."""


ROUNDING_DAMPING = 0.1
"""Multiple of the mean eigenvalue that is added to second moments for rounding. With less, errors go into directions
that the text of the statistics hardly uses and other text may."""


@dataclass(frozen=True, kw_only=True)
class RankEntry(PlanEntry):
    """Give a layer a weight of a lower rank; the base of the methods that do.

    Parameters
    ----------
    rank : int
        The rank of the weight, at most the largest that the layout has for the shape.
    """

    rank: int

    def check(self) -> None:
        """Refuse a rank that the layout does not have."""
        _check_count(self, "rank", self.rank)

    @property
    def ranks(self) -> tuple[int, int | None]:
        """The rank, and no other."""
        return self.rank, None

    def found(self, rank: int) -> Self:
        """Return the entry with the rank that was found."""
        return replace(self, rank=rank)


@register_method
@dataclass(frozen=True, kw_only=True)
class CUREntry(RankEntry):
    """Keep chosen columns and rows of the weight, with a core between them.

    Parameters
    ----------
    importance : str
        What rows and columns are chosen by, by its name in :data:`cur.scores.IMPORTANCES`.
    link : str
        What the core minimises, by its name in :data:`cur.scores.LINKS`.
    subspace : str
        Where singular subspaces come from, one of :data:`SUBSPACES`.
    select : str
        What chooses rows and columns, by its name in :data:`cur.selection.SELECTORS`.
    """

    method = "cur"

    layout: str = "cur"
    importance: str = "wanda"
    link: str = "optimal"
    subspace: str = "exact"
    select: str = "deim"

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Name all layouts of factored weights, and that of tables of embeddings."""
        return (*factored(), EmbeddingFactors.layout)

    def check(self) -> None:
        """Refuse unknown choices."""
        super().check()
        choices: dict[str, Collection[str]] = {
            "importance": IMPORTANCES,
            "link": LINKS,
            "subspace": SUBSPACES,
            "select": SELECTORS,
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise PlanError(f"`{key}` of {self.name} must be one of {', '.join(known)}, got {getattr(self, key)!r}")

    @property
    def needs_moments(self) -> bool:
        """Whether the importance or the link asks for them."""
        return "moments" in needs(self.importance, self.link)

    @property
    def needs_gradients(self) -> bool:
        """Whether the importance or the link asks for them."""
        return "gradients" in needs(self.importance, self.link)

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return what chose rows and columns."""
        importance, select = (", ".join(sorted({getattr(e, key) for e in entries})) for key in ("importance", "select"))
        by = "DEIM" if select == "deim" else f"`{select}`"
        return f"Rows and columns were chosen by {by} on the importance `{importance}`."


@dataclass(frozen=True, kw_only=True)
class _UnderMoments(PlanEntry):
    """What the methods have that minimise an error under second moments.

    Parameters
    ----------
    gradients : bool
        Whether outputs are weighted by the second moments of their gradients.
    damping : float
        Multiple of the mean eigenvalue that is added to second moments.
    """

    fits_inputs = True

    gradients: bool = False
    damping: float = 0.0

    def check(self) -> None:
        """Refuse what is no damping and no truth value."""
        super().check()
        damping: Any = self.damping
        if not isinstance(damping, (int, float)) or not 0.0 <= damping < math.inf:
            raise PlanError(f"`damping` of {self.name} must be a number that is at least 0, got {damping!r}")
        if not isinstance(self.gradients, bool):
            raise PlanError(f"`gradients` of {self.name} must be true or false, got {self.gradients!r}")

    @property
    def needs_moments(self) -> bool:
        """Always."""
        return True

    @property
    def needs_gradients(self) -> bool:
        """Whether outputs are weighted by them."""
        return self.gradients


def _moments(entries: Sequence[Any]) -> str:
    return "second moments of inputs" + (" and output gradients" if entries[0].gradients else "")


@register_method
@dataclass(frozen=True, kw_only=True)
class WeightedEntry(_UnderMoments, RankEntry):
    """Put the nearest matrix of its rank under second moments in the place of the weight."""

    method = "weighted"

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Name all layouts of factored weights, and that of tables of embeddings."""
        return (*factored(), EmbeddingFactors.layout)

    @staticmethod
    def square_errors(W: Tensor, **weights: Any) -> Any:
        """Return the squares of its weighted errors at the ranks 0, 1, ..., the smaller side.

        Parameters
        ----------
        W : Tensor
            The weight of the layer.
        **weights : Any
            The weights of its rows and columns.
        """
        return square_errors(W, **weights)

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return under what it is the nearest."""
        return f"Weights are the nearest of their rank under {_moments(entries)}."


@register_method
@dataclass(frozen=True, kw_only=True)
class RowsEntry(_UnderMoments, RankEntry):
    """Keep chosen rows of the weight, and the best coefficients of the others under second moments."""

    method = "rows"

    layout: str = InterpolativeLinear.layout

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Name those that keep rows, of a weight or of a table of embeddings."""
        return (InterpolativeLinear.layout, EmbeddingFactors.layout)

    @staticmethod
    def square_errors(W: Tensor, **weights: Any) -> Any:
        """Return the squares of its weighted errors at the ranks 0, 1, ..., the smaller side.

        Parameters
        ----------
        W : Tensor
            The weight of the layer.
        **weights : Any
            The weights of its rows and columns.
        """
        return own_rows(W, **weights).square_errors

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return what chose the rows."""
        return f"The rows kept are the original weights' own, chosen by DEIM under {_moments(entries)}."


@register_method
@dataclass(frozen=True, kw_only=True)
class RoundedEntry(_UnderMoments, PlanEntry):
    """Keep the whole weight, rounded to a grid of few bits under second moments.

    Parameters
    ----------
    tied : tuple of str
        The names of the other modules that read the same weight, as an output head does that is tied to the table of
        the inputs: one entry is for all of them, by the name of the first.
    """

    method = "rounded"
    of_weight = False

    layout: str = WholeLinear.layout
    damping: float = ROUNDING_DAMPING
    tied: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse to be without a grid, and ties to what is no name."""
        super().check()
        if self.grid is None:
            raise PlanError(f"`grid` of {self.name} must say what it is rounded to for the method {self.method!r}")
        tied: Any = self.tied
        if not isinstance(tied, (list, tuple)) or not all(isinstance(name, str) for name in tied):
            raise PlanError(f"`tied` of {self.name} must be names of modules, got {self.tied!r}")
        object.__setattr__(self, "tied", tuple(tied))  # JSON has lists

    def check_among(self, entries: Mapping[str, PlanEntry]) -> None:
        """Refuse an entry of their own for modules that are tied to it.

        Parameters
        ----------
        entries : mapping of str to PlanEntry
            All entries of the plan, by the names of their layers.

        Raises
        ------
        PlanError
            If one of them has one.
        """
        if twice := [name for name in self.tied if name in entries]:
            raise PlanError(
                f"`entries` must not hold {twice[0]}, whose weight is that of {self.name}: one entry is for both"
            )

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model in which the weight is tied to that of other modules.

        Parameters
        ----------
        model : nn.Module
            The dense model that the plan is for.

        Raises
        ------
        PlanError
            If the modules that share the weight are others than the entry says.
        """
        if set(found := tied_to(model, self.name)) != set(self.tied):
            raise PlanError(
                f"`tied` of {self.name} must name the modules that share its weight, {found}, got {list(self.tied)}"
            )

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of all that read the weight."""
        return (self.name, *self.tied)

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Name the layouts of whole weights, of linear layers and of tables."""
        return (WholeLinear.layout, WholeTable.layout)

    @property
    def ranks(self) -> tuple[int, int | None]:
        """The smaller side, and no other."""
        return min(self.shape), None

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return what weights were rounded to."""
        return f"Whole weights of {len(entries)} layers were rounded to {grids_of(entries)} under {_moments(entries)}."


@dataclass(frozen=True, kw_only=True)
class _AroundNeurons(_UnderMoments):
    """The entry of a layer on either side of removed neurons.

    Parameters
    ----------
    neurons : int
        The number of neurons kept; ``rank`` in the JSON.
    inner_rank : int or None
        The rank of what belongs to the kept neurons, if that is factored as well.
    """

    method = "neurons"
    of_weight = False
    keys: ClassVar[Mapping[str, str]] = {"neurons": "rank"}

    neurons: int
    inner_rank: int | None = None

    def check(self) -> None:
        """Refuse more neurons or a higher rank than there are."""
        super().check()
        _check_count(self, "rank", self.neurons)
        inner = self.layer_type.largest_inner_rank(*self.shape, self.neurons)
        if self.inner_rank is not None and not (type(self.inner_rank) is int and 1 <= self.inner_rank <= inner):
            raise PlanError(
                f"`inner_rank` of {self.name} must be null or an integer between 1 and {inner}, the largest of what "
                f"belongs to {self.neurons} neurons, got {self.inner_rank!r}"
            )

    @property
    def ranks(self) -> tuple[int, int | None]:
        """How many neurons are kept, and the rank of what belongs to them."""
        return self.neurons, self.inner_rank

    @classmethod
    def said(cls, entries: Sequence[Any]) -> str:
        """Return what became of the neurons."""
        return (
            "Between some layers neurons are gone, and the layers around them were fitted to those left "
            f"under {_moments(entries)}; a second rank is that of what is left."
        )


@register_method
@dataclass(frozen=True, kw_only=True)
class NeuronsEntry(_AroundNeurons):
    """Remove inputs of a layer: it chooses the neurons to keep, and is fitted to them."""

    layout: str = KeptInputs.layout

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Return the layout of the next layer."""
        return (KeptInputs.layout,)

    def check_among(self, entries: Mapping[str, PlanEntry]) -> None:
        """Refuse to be without layers before.

        Parameters
        ----------
        entries : mapping of str to PlanEntry
            All entries of the plan, by the names of their layers.

        Raises
        ------
        PlanError
            If no entry of a producer names this one as its consumer.
        """
        if not any(entry.made_with == self.name for entry in entries.values() if entry is not self):
            raise PlanError(
                f"`entries` must hold, beside {self.name}, the layers before, whose `consumer` it is; make the plan "
                "again, or take it out"
            )


@register_method
@dataclass(frozen=True, kw_only=True)
class NeuronsBeforeEntry(_AroundNeurons):
    """Remove outputs of a layer: the neurons that the next layer does not keep.

    Parameters
    ----------
    consumer : str
        The name of the next layer, whose entry keeps as many neurons.
    """

    layout: str = KeptOutputs.layout
    consumer: str

    @classmethod
    def layouts(cls) -> Sequence[str]:
        """Return the layout of the layers that produce the neurons."""
        return (KeptOutputs.layout,)

    @property
    def made_with(self) -> str:
        """The name of the next layer."""
        return self.consumer

    def check(self) -> None:
        """Refuse an entry without a next layer.

        Raises
        ------
        PlanError
            If `consumer` is not the name of a layer.
        """
        super().check()
        if not isinstance(self.consumer, str):
            raise PlanError(
                f"`consumer` of {self.name} must name the next layer, in the layout {self.layout!r}, got "
                f"{self.consumer!r}"
            )

    def check_among(self, entries: Mapping[str, PlanEntry]) -> None:
        """Refuse to keep other neurons than the next layer.

        Parameters
        ----------
        entries : mapping of str to PlanEntry
            All entries of the plan, by the names of their layers.

        Raises
        ------
        PlanError
            If the next layer has no entry, or keeps another number of neurons.
        """
        consumer = entries.get(self.consumer)
        kept = (consumer.neurons, consumer.shape[1]) if isinstance(consumer, NeuronsEntry) else None
        if kept != (self.neurons, self.shape[0]):
            got = "none" if kept is None else "{} of {}".format(*kept)
            raise PlanError(
                f"`rank` of {self.name} must be that of {self.consumer}, an entry of the layout "
                f"{KeptInputs.layout!r}, got {self.neurons} of {self.shape[0]} and {got}: they have the same neurons, "
                "so change both"
            )


def _check_count(entry: PlanEntry, key: str, count: Any) -> None:
    m, n = entry.shape
    limit = entry.layer_type.largest_rank(m, n)
    if type(count) is not int or not 1 <= count <= limit:
        raise PlanError(
            f"`{key}` of {entry.name} must be an integer between 1 and {limit}, the largest of {m} x {n} in the "
            f"layout {entry.layout!r}, got {count!r}"
        )
