"""How to compress: what the fields of configurations, in `cur.settings`, may hold, and what they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from cur.integrations.nn import factored
from cur.integrations.plan.blocks import BY_ANGLE, CHOICES
from cur.integrations.plan.layouts import PURPOSES
from cur.integrations.plan.methods import SUBSPACES, RowsEntry, WeightedEntry
from cur.integrations.plan.plan import PRECISIONS, Plan, is_multiple
from cur.scores import IMPORTANCES, LINKS, needs
from cur.selection import SELECTORS
from cur.settings.compress import BudgetSettings, PaperSettings
from cur.settings.former import former

__all__ = ["BUDGETS", "DEFAULT_RANK", "METHODS", "Asked", "BudgetConfig", "CompressConfig"]

DEFAULT_RANK = 128
"""Largest rank where neither one nor a rule of ranks is given."""


@dataclass(frozen=True, kw_only=True)
class CompressConfig(PaperSettings):
    """How to compress; the defaults are the setting of "CURing Large Models" (arXiv 2501.04211).

    Parameters
    ----------
    layers : int, tuple of int or "all", default 10
        A number of blocks, chosen as `choose` says and never the first or the last of a stack, in each stack for itself
        and in proportion to its length; or the indices of blocks, from 0 on through all stacks; or every block.
    choose : {"angular", "position", "random", "last"}, default "angular"
        Whether a number of blocks means those of smallest angular distance, the same with later blocks counting less,
        any, or the last ones.
    span : int, default 1
        Length of the runs that "angular" and "position" choose blocks in, by the angle between the input of the first
        and the output of the last.
    targets : str or tuple of str
        Linear layers within a block, by the rules of :func:`~cur.integrations.linear_modules`.
    exclude : str or tuple of str, default ()
        Modules to leave alone, by the same rules.
    rank : int, optional
        Largest rank. A layer gets this or its break-even rank, the largest at which its factors are smaller
        than its weight, whichever is lower. The paper takes 256 for a width of 4096; 128, the default where none of the
        three rules below is given, suits widths near 576.
    energy : float, optional
        Instead: the smallest rank at which the singular values of the matrix that guides the choice (see `importance`)
        hold this share of the sum of their squares.
    tolerance : float, optional
        Instead: the smallest rank that is certified to have at most this relative error, in the norm of `link`. Layers
        that would not get smaller stay dense.
    effective_rank : bool, default False
        Instead: the effective rank, the exponential of the entropy of the singular values of the guiding matrix.
    layout : {"cur", "folded", "interpolative", "auto"}, default "cur"
        How the factors are stored. ``"auto"``: the smallest that serves the purpose. For inference that is one in which
        the layer is faster than dense, at ranks up to where there is one; layers for which no rank is stay dense.
    purpose : {"inference", "training"}, default "inference"
        Use that the layout "auto" is to serve: training keeps U apart.
    select : str, default "deim"
        What chooses rows and columns, by its name in :data:`cur.selection.SELECTORS`.
    importance : str, default "wanda"
        Matrix whose leading singular subspaces choose rows and columns, by its name in :data:`cur.scores.IMPORTANCES`:
        ``|W| ||x||``, for instance, or ``W`` itself.
    link : str, default "optimal"
        What the core U minimises, by its name in :data:`cur.scores.LINKS`: ``||W - C U R||_F``, or the same with each
        input feature weighted by its norm ``||x||``, or with the inputs' second moments, the change of the layer's
        output. Weighted, the certificate is in the weighted norm too.
    subspace : {"auto", "exact", "randomised"}, default "auto"
        Where singular subspaces come from. ``"auto"``: an SVD for layers whose smaller side is at most 2048, a seeded
        random sketch for larger ones, whose SVD takes minutes.
    precision : {"float32", "float64"}, default "float32"
        Precision of the factorizations; the factors are stored in the dtype of the weight.
    batch_size : int, default 1
        Windows per forward pass of the calibration: more of them take more memory for activations, and keep a GPU
        busy; the statistics change by rounding only.
    seed : int, default 0
        Seed of every random choice.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("rank", "span", "batch_size"):
            value = getattr(self, name)
            if not (name == "rank" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
        self._check_layers()
        rules = [name for name in ("energy", "tolerance", "effective_rank") if getattr(self, name)]
        if len(rules) > 1:
            raise ValueError(f"one rule of ranks can be given, got {' and '.join(f'`{name}`' for name in rules)}")
        for name in ("energy", "tolerance"):
            share: Any = getattr(self, name)
            if share is not None and not (isinstance(share, (int, float)) and 0.0 < share < 1.0):
                raise ValueError(f"`{name}` must be between 0 and 1, both excluded, got {share!r}")
        choices = {
            "choose": CHOICES,
            "layout": ("auto", *factored()),
            "purpose": PURPOSES,
            "select": SELECTORS,
            "importance": IMPORTANCES,
            "link": LINKS,
            "subspace": ("auto", *SUBSPACES),
            "precision": tuple(PRECISIONS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.span > 1 and (self.choose not in BY_ANGLE or not isinstance(self.layers, int)):
            raise ValueError("`span` is for a number of `layers` chosen by angular distance; leave it at 1")

    def _check_layers(self) -> None:
        layers: Any = self.layers
        if isinstance(layers, (tuple, list)):
            if not layers or not all(type(index) is int and index >= 0 for index in layers):
                raise ValueError(f"`layers` must be indices of blocks, from 0 on, at least one, got {layers!r}")
        elif layers != "all" and (type(layers) is not int or layers < 1):
            raise ValueError(f"`layers` must be a positive integer, indices of blocks or 'all', got {layers!r}")

    @property
    def largest_rank(self) -> int | None:
        """The rank that no layer exceeds; None if only the break-even rank is the limit."""
        ruled = self.energy is not None or self.tolerance is not None or self.effective_rank
        return self.rank if self.rank is not None or ruled else DEFAULT_RANK

    @property
    def needs_moments(self) -> bool:
        """Whether full second moments of the inputs are needed."""
        return "moments" in needs(self.importance, self.link)

    @property
    def needs_gradients(self) -> bool:
        """Whether second moments of the gradients at the outputs are needed."""
        return "gradients" in needs(self.importance, self.link)

    # A fixed rank needs neither other text than what is given nor the layers before.
    gradient_checkpointing = False
    own_text = 0.0
    correction = 0.0


METHODS: dict[str, type[WeightedEntry | RowsEntry]] = {"best": WeightedEntry, "rows": RowsEntry}
"""What the methods of a budget do to a layer, by :data:`cur.integrations.plan.plan.METHODS`."""


BUDGETS = ("keep", "parameters", "size", "bits", "tol")
"""The fields of a budget of which one is given."""


@former(allocation="loss")
@dataclass(frozen=True, kw_only=True)
class BudgetConfig(BudgetSettings):
    """How to compress to a budget.

    Parameters
    ----------
    keep : float, optional
        Share of the parameters to keep in the weights of the targeted layers, between 0 and 1. One of this,
        `parameters`, `size`, `bits` and `tol` is given. The budget is never exceeded.
    parameters : int, optional
        Parameters to keep in the whole model, embeddings and all.
    size : int, optional
        Bytes that the weight files of the checkpoint may take on disk, in the dtype that the model has.
    bits : float, optional
        Bits that a number of the targeted layers may take on average: eight times their bytes over their numbers.
    tol : float, optional
        Kullback-Leibler divergence from the dense model, in nats per token on held-out text, that the smallest model
        which stays within it may have: the mean and its 95 percent interval, measured before anything is written.
    rounding : bool, default True
        Whether numbers may be rounded to few bits, weights as well as factors, where a budget is one of bytes or bits,
        or a tolerance: then bits, ranks and neurons share it at one price. For the method "best".
    method : {"best", "rows"}, default "best"
        ``"best"``: the matrices that lose least under second moments. ``"rows"``: rows of the weights themselves and
        the coefficients that give the others, so that what is kept is the model's own, at some loss. Both are stored as
        rows and coefficients, in ``r (m + n - r)`` numbers.
    neurons : bool, default True
        Whether layers may give up neurons between them together, where that costs less than a lower rank of each and
        saves a fifth of the predicted loss in all, or the budget cannot be met otherwise. For the method "best".
    gradients : bool, default True
        Whether the gradients of the loss say how much each output matters. Without, every layer counts by its relative
        error and keeps about three quarters of an even share at least (layers with neurons between them together), and
        calibration needs no backward pass.
    gradient_checkpointing : bool, default False
        Whether gradients take a second forward pass through every block instead of keeping its activations.
    own_text : float, default 0.25
        How much text the model writes, from random first tokens, to be calibrated on that, too, as a multiple of what
        is given: what is kept then serves other domains than that of the given text as well. 0 leaves this out, and
        models that write no text do without.
    correction : float, default 0.5
        How much of the difference between what a layer gets in the dense model and what the compressed layers before it
        give is corrected, from 0 to 1: layers are fitted block after block. 0 leaves this out.
    targets, exclude : str or tuple of str
        Linear layers, by the rules of :func:`~cur.integrations.linear_modules`. By default all in all blocks.
    damping : float, default 1e-4
        Multiple of the mean eigenvalue that is added to all eigenvalues of second moments, for what the calibration
        text did not show.
    batch_size : int, default 1
        Windows per pass of the calibration: more of them take more memory for activations, and keep a GPU busy; the
        statistics change by rounding only.
    seed : int, default 0
        Seed of every random choice.

    Raises
    ------
    TypeError, ValueError
        If not one of `keep`, `parameters`, `size`, `bits` and `tol` is given, or a value is out of range.
    """

    def __post_init__(self) -> None:
        """Check the values."""
        given = {name: getattr(self, name) for name in BUDGETS}
        if sum(value is not None for value in given.values()) != 1:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None) or "none"
            raise TypeError(f"one of {', '.join(f'`{name}`' for name in BUDGETS)} must be given, got {got}")
        keep: Any = self.keep
        if self.bits is not None and not (_is_number(self.bits) and 0.0 < self.bits < math.inf):
            raise ValueError(f"`bits` must be a positive number, such as 4.3, got {self.bits!r}")
        if self.tol is not None and not (_is_number(self.tol) and 0.0 < self.tol < math.inf):
            raise ValueError(f"`tol` must be a positive number of nats per token, such as 0.05, got {self.tol!r}")
        if self.tol is not None and not self.gradients:
            raise ValueError("`tol` needs `gradients` (leave out --no-gradients), by which loss is foreseen")
        if keep is not None and not (_is_number(keep) and 0.0 < keep < 1.0):
            raise ValueError(
                "`keep` must be between 0 and 1, both excluded: the share of parameters to keep in the targeted "
                f"layers; got {keep!r}"
            )
        for name in ("parameters", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not is_multiple(self.own_text):
            raise ValueError(f"`own_text` must be a finite multiple that is at least 0, got {self.own_text!r}")
        if not 0.0 <= self.correction <= 1.0:
            raise ValueError(f"`correction` must be between 0 and 1, got {self.correction!r}")
        if not self.damping >= 0:
            raise ValueError(f"`damping` must be at least 0, got {self.damping!r}")

    # What layers and neurons cost is predicted from second moments.
    needs_moments = True

    @property
    def rounds(self) -> bool:
        """Whether numbers may be rounded to few bits."""
        of_bytes = any(value is not None for value in (self.size, self.bits, self.tol))
        return self.rounding and self.method == "best" and of_bytes

    @property
    def needs_gradients(self) -> bool:
        """Whether second moments of the gradients at the outputs are needed."""
        return self.gradients


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


Asked: TypeAlias = CompressConfig | BudgetConfig | Plan
"""What a compression is to do: a configuration, from which a plan is made, or a plan."""
