"""How to compress: to a fixed rank in a few blocks, or to a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cur.scores import IMPORTANCES, LINKS, listed
from cur.selection import SELECTORS
from cur.settings.option import setting
from cur.settings.reading import parse_layers, parse_names, parse_size

__all__ = ["BudgetSettings", "PaperSettings"]

_METHOD = "Method"
_TARGETS = setting(
    "Linear layers in each block, separated by commas; or all-linear.",
    heading=_METHOD,
    read=parse_names,
    shown="all-linear with a budget, else q_proj,k_proj,gate_proj",
)
_EXCLUDE = setting("Linear layers to leave alone, separated by commas.", heading=_METHOD, read=parse_names)
_SEED = setting("Seed of every random choice.", heading=_METHOD)


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """Fields of :class:`~cur.integrations.BudgetConfig`."""

    heading: ClassVar[str] = "Budget"

    keep: float | None = field(
        default=None,
        metadata=setting(
            "Share of the targeted layers' parameters to keep, 0 to 1.",
            basic=True,
            excludes="budget",
        ),
    )
    parameters: int | None = field(
        default=None,
        metadata=setting(
            "Instead: most parameters of the whole model.",
            flag="--target-parameters",
            excludes="budget",
        ),
    )
    size: int | None = field(
        default=None,
        metadata=setting(
            "Instead: most bytes of the weight files, such as 200MB.",
            former="--target-size",
            basic=True,
            read=parse_size,
            excludes="budget",
        ),
    )
    bits: float | None = field(
        default=None,
        metadata=setting(
            "Instead: bits for each number of the targeted layers, on average, such as 4.3.",
            basic=True,
            excludes="budget",
        ),
    )
    tol: float | None = field(
        default=None,
        metadata=setting(
            "Instead: the smallest model within so many nats a token of the dense one, such as 0.05.",
            basic=True,
            excludes="budget",
        ),
    )
    method: str = field(
        default="best",
        metadata=setting(
            "best (least loss for the budget), rows (keeps rows of the weights themselves), or paper (fixed rank in a "
            "few blocks).",
            heading=_METHOD,
            shown="best with a budget, paper without",
        ),
    )
    rounding: bool = field(
        default=True,
        metadata=setting(
            "Whether numbers may be rounded to few bits within --size, --bits or --tol. For --method best."
        ),
    )
    neurons: bool = field(
        default=True,
        metadata=setting(
            "Whether layers may give up neurons between them together, where that saves a fifth of the predicted loss. "
            "For --method best.",
        ),
    )
    gradients: bool = field(
        default=True, metadata=setting("Whether gradients say how much each output matters; costs memory and time.")
    )
    gradient_checkpointing: bool = field(default=False, metadata=setting("Gradients in less memory and more time."))
    own_text: float = field(
        default=0.25,
        metadata=setting(
            "How much text the model writes itself to be calibrated on besides, as a multiple of what is given; 0 to "
            "leave it out.",
        ),
    )
    correction: float = field(
        default=0.5,
        metadata=setting(
            "How much of the error of layers before is corrected in each layer, block after block; 0 to leave it out.",
        ),
    )
    targets: str | tuple[str, ...] = field(default="all-linear", metadata=_TARGETS)
    exclude: str | tuple[str, ...] = field(default=(), metadata=_EXCLUDE)
    damping: float = 1e-4
    batch_size: int = 1
    seed: int = field(default=0, metadata=_SEED)


@dataclass(frozen=True, kw_only=True)
class PaperSettings:
    """Fields of :class:`~cur.integrations.CompressConfig`."""

    heading: ClassVar[str] = "Paper"

    layers: int | str | tuple[int, ...] = field(
        default=10,
        metadata=setting(
            "How many blocks to compress, never the first or last of a stack; or which, for instance 3,5-8; or all.",
            read=parse_layers,
            shown="10",
        ),
    )
    choose: str = field(
        default="angular",
        metadata=setting(
            "Which, if their number is given: angular (those that turn the hidden state least), position (the same, "
            "with later blocks counting less), random or last.",
        ),
    )
    span: int = field(default=1, metadata=setting("Choose blocks in runs of this many, by the angle of a whole run."))
    targets: str | tuple[str, ...] = field(default=("q_proj", "k_proj", "gate_proj"), metadata=_TARGETS)
    exclude: str | tuple[str, ...] = field(default=(), metadata=_EXCLUDE)
    rank: int | None = field(
        default=None,
        metadata=setting(
            "Largest rank. A layer never gets one at which its factors would be larger than its weight.",
            shown="128, without one of the next three",
        ),
    )
    energy: float | None = field(
        default=None,
        metadata=setting("Ranks that hold this share of the squared singular values.", excludes="rule of ranks"),
    )
    tolerance: float | None = field(
        default=None,
        metadata=setting("Ranks that are certified to have at most this relative error.", excludes="rule of ranks"),
    )
    effective_rank: bool = field(
        default=False, metadata=setting("Ranks by the entropy of the singular values.", excludes="rule of ranks")
    )
    layout: str = field(
        default="cur",
        metadata=setting(
            "How factors are stored: cur (C, U, R; to train U), folded, interpolative (smallest) or auto (faster than "
            "dense, or left dense).",
            shown="cur, or auto with --for",
        ),
    )
    purpose: str = field(
        default="inference", metadata=setting("What auto is to serve: training or inference.", flag="--for")
    )
    select: str = field(default="deim", metadata=setting(f"What chooses rows and columns: {', '.join(SELECTORS)}."))
    importance: str = field(
        default="wanda",
        metadata=setting(f"Matrix whose singular subspaces they are chosen for ({listed(IMPORTANCES)})."),
    )
    link: str = field(default="optimal", metadata=setting(f"What U minimises ({listed(LINKS)})."))
    subspace: str = "auto"
    precision: str = "float32"
    batch_size: int = 1
    seed: int = field(default=0, metadata=_SEED)
