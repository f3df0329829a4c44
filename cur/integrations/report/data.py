"""What a compression did: the figures, as data. Tables are in `tables.py`, the model card in `card.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cur._lib.atomic import replace_file
from cur.integrations.files.reading import CheckpointError, read_object
from cur.integrations.model.size import Size
from cur.integrations.nn import IntegerGrid, grid_fields
from cur.integrations.plan.plan import Plan
from cur.integrations.report.divergence import Divergence
from cur.integrations.report.outputs import OutputChange

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CompressionReport", "LayerReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What happened to one linear layer.

    Attributes
    ----------
    name : str
        The name of the layer's module.
    shape : tuple of int
        The numbers of outputs m and inputs n of the layer.
    rank : int
        The number of rows and columns kept.
    layout : str
        The layout in which the factors are stored.
    parameters_before, parameters_after : int
        The number of parameters of the dense weight and of the factors.
    certificate : mapping
        The certificate of the factorization as JSON types: ``norm``, ``value``, ``relative``, ``kind`` and
        the rest.
    relative_error : float
        ``||W - C U R||_F / ||W||_F``, of the factors in the precision of the factorization.
    weighted_error : float
        The relative error with every input feature weighted by its norm over the calibration tokens.
    weighted_bound : float
        Certified bound on it: as computed, and the rounding of the computation.
    rows, columns : tuple of int
        Indices of the rows and columns of W that were kept, in the order of the factors.
    seconds : float
        The seconds that the factorization took.
    spectrum : tuple of (int, float)
        Some singular values of the weight with every input feature weighted by its norm, by their number from 1 on,
        relative to the largest. Empty for layers too large for an SVD.
    output : OutputChange or None
        The change of the layer's output on a batch of text; None unless it was measured.
    inner_rank : int or None
        The rank of the part that a layer keeps after neurons are removed; None if that is held whole.
    grid : IntegerGrid or None
        The grid that the factors are rounded to; None where they are not.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    layout: str
    parameters_before: int
    parameters_after: int
    certificate: Mapping[str, Any]
    relative_error: float
    weighted_error: float
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: float
    weighted_bound: float
    spectrum: tuple[tuple[int, float], ...] = ()
    output: OutputChange | None = None
    inner_rank: int | None = None
    grid: IntegerGrid | None = None

    @property
    def ranks(self) -> tuple[int, int | None]:
        """Rank and inner rank."""
        return self.rank, self.inner_rank

    def spec(self) -> dict[str, Any]:
        """Return what ``config.json`` says of the layer."""
        inner = {} if self.inner_rank is None else {"inner_rank": self.inner_rank}
        return {"layout": self.layout, "rank": self.rank, **inner, **grid_fields(self.grid, self.shape)}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; without a grid where there is none."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.grid is None:
            del found["grid"]
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a report from JSON types.

        Parameters
        ----------
        data : mapping
            The report, as JSON types.
        """
        return cls(
            **{
                **data,
                "shape": tuple(data["shape"]),
                "rows": tuple(data["rows"]),
                "columns": tuple(data["columns"]),
                "spectrum": tuple((int(index), float(value)) for index, value in data["spectrum"]),
                "output": None if data["output"] is None else OutputChange(**data["output"]),
                "grid": None if data.get("grid") is None else IntegerGrid.from_spec(data["grid"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What happened to a model.

    Attributes
    ----------
    plan : Plan
        The plan as it was applied.
    layers : tuple of LayerReport
        The reports on layers, one for each entry of the plan.
    before, after : Size
        The size of the whole model before and after.
    seconds : mapping of str to float
        Wall-clock time of each stage: ``calibrate``, ``plan``, ``decompose``, ``outputs``, and ``swap`` or, block by
        block, ``write``.
    perplexity : mapping of str to float
        The perplexity by state and text, for instance ``{"before, held-out": 13.1}``; empty unless it was measured.
    precision : str
        The precision of matrix products in passes over text, ``"float32"`` for instance; empty where it is not known.
        The plan names that of the calibration, which may have been measured earlier.
    versions : mapping of str to str
        The versions of Python and of the libraries involved.
    source : str
        The place that the dense model was loaded from: an absolute path, or a hub id; empty where it is not known.
    kept : str
        Hash of the parameters that both models have, by which another model is not taken for the dense one; empty where
        it is not known.
    unread : tuple of str
        Names of tensors in the files of the dense model that are no part of it.
    notes : tuple of str
        Sentences on what was left out as the model does not have it.
    account : mapping
        A comparison of the checkpoint with the model that it was made from, as JSON types; see
        :class:`~cur.integrations.store.account.Account`. Empty where that came from no directory.
    divergence : Divergence or None
        How far the compressed model predicts otherwise than the dense one on held-out text; None unless it was
        measured.
    """

    plan: Plan
    layers: tuple[LayerReport, ...]
    before: Size
    after: Size
    seconds: Mapping[str, float]
    perplexity: Mapping[str, float] = field(default_factory=dict)
    precision: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    kept: str = ""
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    account: Mapping[str, Any] = field(default_factory=dict, compare=False)
    divergence: Divergence | None = None

    def sizes(self) -> list[tuple[str, int, int]]:
        """Return what is counted, and how much of it there was before and after; bytes on disk where they are known."""
        rows = [
            ("parameters", self.before.parameters, self.after.parameters),
            ("bytes in memory", self.before.bytes, self.after.bytes),
        ]
        if self.before.file_bytes is not None and self.after.file_bytes is not None:
            rows.append(("bytes on disk", self.before.file_bytes, self.after.file_bytes))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; the plan under ``"plan"``."""
        return {
            "plan": self.plan.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "seconds": dict(self.seconds),
            **({"divergence": self.divergence.to_dict()} if self.divergence is not None else {}),
            "perplexity": dict(self.perplexity),
            "precision": self.precision,
            "versions": dict(self.versions),
            "source": self.source,
            "kept": self.kept,
            "unread": list(self.unread),
            **({"notes": list(self.notes)} if self.notes else {}),
            "account": dict(self.account),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a report from JSON types; a ValueError names what does not belong in one.

        Unlike a plan a report steers nothing, so there is no version to it beyond that of its plan.

        Parameters
        ----------
        data : mapping
            The report, as JSON types.

        Raises
        ------
        ValueError
            If a field is missing, not known or of the wrong kind.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"the report has unknown fields: {', '.join(unknown)}")
        try:
            layers = tuple(LayerReport.from_dict(layer) for layer in data["layers"])
            compared = data.get("divergence")
            return cls(
                **{
                    **data,
                    "plan": Plan.from_dict(data["plan"]),
                    "layers": layers,
                    "before": Size(**data["before"]),
                    "after": Size(**data["after"]),
                    "divergence": None if compared is None else Divergence.from_dict(compared),
                    "unread": tuple(data.get("unread", ())),
                    "notes": tuple(data.get("notes", ())),
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the report is malformed: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the report as JSON.

        Parameters
        ----------
        path : path
            The path of the file to write.
        """
        with replace_file(path) as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from a JSON file.

        Parameters
        ----------
        path : path
            The path of the file to read.

        Raises
        ------
        CheckpointError
            If the file does not hold a report.
        """
        data = read_object(path, remedy="fetch it again, or delete it to go without")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; fetch it again, or delete it to go without") from error
