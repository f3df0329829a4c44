"""From a model and calibration text to a smaller model: measure, plan, decompose, swap.

:func:`compress` is the four in a row; :func:`make_plan` and :func:`apply_plan_` are the two halves that a
plan lies between. The model is changed only when every factorization has succeeded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cur import ranks
from cur.integrations.budget import BudgetConfig, error_curves, plan_budget
from cur.integrations.calibration import Statistics, collect
from cur.integrations.factorize import factorize
from cur.integrations.gradients import collect_gradients
from cur.integrations.layers import choose_layers, decoder_layers, linear_modules
from cur.integrations.moments import Moments, x_norm
from cur.integrations.nn import LAYOUTS, CompressedLinear, compressed_modules, dense_weight, swap_
from cur.integrations.plan import IMPORTANCES, LINKS, SUBSPACES, Plan, PlanEntry, fingerprint
from cur.integrations.quantizer import mark_
from cur.integrations.report import CompressionReport, LayerReport, model_size, versions
from cur.integrations.text import batches

__all__ = ["BudgetConfig", "CompressConfig", "StageProgress", "apply_plan_", "compress", "make_plan"]

StageProgress: TypeAlias = "Callable[[str, int, int | None], object]"
"""Called as ``progress(stage, done, total)``: ``calibrate`` and ``gradients`` in samples, ``plan`` and ``decompose`` in
layers."""

# Smaller side up to which the full SVD of a layer is a matter of seconds.
_EXACT_UP_TO = 2048

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """How to compress; the defaults are the setting of "CURing Large Models" (arXiv 2501.04211).

    Parameters
    ----------
    layers : int, default 10
        Number of blocks to compress: those of smallest angular distance, never the first or the last.
    targets : str or tuple of str
        Linear layers within a block, by the rules of :func:`~cur.integrations.linear_modules`.
    exclude : str or tuple of str, default ()
        Modules to leave alone, by the same rules.
    rank : int, default 128
        Largest rank. A layer gets this or its break-even rank, the largest at which its factors are smaller
        than its weight, whichever is lower. The paper takes 256 for a width of 4096; 128 suits widths near
        576.
    layout : {"cur", "folded", "interpolative"}, default "cur"
        How the factors are stored.
    importance : {"wanda", "magnitude", "weights"}, default "wanda"
        Whose leading singular subspaces choose rows and columns: ``|W| ||x||``, ``|W|``, or ``W``.
    link : {"optimal", "activation"}, default "optimal"
        Whether the core U minimises ``||W - C U R||_F``, or the same with each input feature weighted by its
        norm ``||x||``. Weighted, the certificate is in the weighted norm too.
    subspace : {"auto", "exact", "randomised"}, default "auto"
        Where singular subspaces come from. ``"auto"``: an SVD for layers whose smaller side is at most 2048, a seeded
        random sketch for larger ones, whose SVD takes minutes.
    precision : {"float32", "float64"}, default "float32"
        Of the factorizations; the factors are stored in the dtype of the weight.
    batch_size : int, default 4
        Windows per forward pass of the calibration; changes the statistics by rounding only.
    seed : int, default 0
        Of every random choice.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    layers: int = 10
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "gate_proj")
    exclude: str | tuple[str, ...] = ()
    rank: int = 128
    layout: str = "cur"
    importance: str = "wanda"
    link: str = "optimal"
    subspace: str = "auto"
    precision: str = "float32"
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("layers", "rank", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
        choices = {
            "layout": tuple(LAYOUTS),
            "importance": IMPORTANCES,
            "link": LINKS,
            "subspace": ("auto", *SUBSPACES),
            "precision": tuple(PRECISIONS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}")


def compress(
    model: PreTrainedModel,
    calibration: Tensor | Iterable[Mapping[str, Tensor]] | Statistics,
    config: CompressConfig | BudgetConfig | None = None,
    *,
    progress: StageProgress | None = None,
) -> CompressionReport:
    """Replace linear layers of a model by factored ones, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place, and only if everything succeeds.
    calibration : Tensor, iterable of mapping, or Statistics
        Token windows (count, length), batches of ``input_ids`` and ``attention_mask``, or statistics of an
        earlier run, which must cover the targets.
    config : CompressConfig or BudgetConfig, optional
        Blocks and a rank, or a budget of parameters. Default: the paper's setting.
    progress : callable, optional
        See :data:`StageProgress`.

    Returns
    -------
    CompressionReport

    Raises
    ------
    ValueError
        If a target matches nothing, has a weight that is tied to another parameter, or `rank` exceeds what
        any target allows; before any forward pass.
    NumericalError
        If a weight or an activation is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cur.integrations import CompressConfig, compress
    >>> _ = torch.manual_seed(0)
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
    >>> windows = torch.randint(50, (4, 16))
    >>> report = compress(model, windows, CompressConfig(layers=2, targets=("gate_proj",), rank=8))
    >>> [(layer.rank, layer.parameters_before, layer.parameters_after) for layer in report.layers]
    [(8, 2048, 832), (8, 2048, 832)]
    """
    config = config or CompressConfig()
    candidates = _candidates(model, config)
    seconds: dict[str, float] = {}
    before = model_size(model)
    start = time.perf_counter()
    if isinstance(calibration, Statistics):
        statistics = calibration
    else:
        statistics = _measure(model, calibration, config, candidates, progress)
    seconds["calibrate"] = time.perf_counter() - start

    start = time.perf_counter()
    plan = make_plan(model, statistics, config, progress=progress)
    seconds["plan"] = time.perf_counter() - start

    start = time.perf_counter()
    precision = config.precision if isinstance(config, CompressConfig) else "float64"
    layers, reports = _decompose(model, plan, statistics, precision, progress)
    seconds["decompose"] = time.perf_counter() - start

    start = time.perf_counter()
    swap_(model, layers)
    mark_(model)
    seconds["swap"] = time.perf_counter() - start
    return CompressionReport(
        plan=_as_done(plan, reports),
        layers=tuple(reports),
        before=before,
        after=model_size(model),
        seconds=seconds,
        versions=versions(),
    )


def _measure(
    model: PreTrainedModel,
    calibration: Tensor | Iterable[Mapping[str, Tensor]],
    config: CompressConfig | BudgetConfig,
    modules: list[str],
    progress: StageProgress | None,
) -> Statistics:
    """Collect what the configuration needs."""

    def stage(name: str) -> Callable[[int, int | None], object] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    given: Iterable[Any] = (
        batches(calibration, batch_size=config.batch_size) if isinstance(calibration, Tensor) else list(calibration)
    )
    statistics = collect(
        model,
        given,
        modules=modules,
        moments="full" if isinstance(config, BudgetConfig) else "diagonal",
        layers=[name for name, _ in decoder_layers(model)],
        progress=stage("calibrate"),
    )
    if isinstance(config, BudgetConfig) and config.gradients:
        return collect_gradients(
            model, given, statistics, modules=modules, seed=config.seed, progress=stage("gradients")
        )
    return statistics


def make_plan(
    model: PreTrainedModel,
    statistics: Statistics,
    config: CompressConfig | BudgetConfig | None = None,
    *,
    progress: StageProgress | None = None,
) -> Plan:
    """Decide which layers are replaced, and at which rank.

    For a :class:`BudgetConfig` see :func:`~cur.integrations.budget.plan_budget`. For a :class:`CompressConfig` the
    rank of a layer is ``min(config.rank, break-even, live input features)``: a feature that was zero on every
    calibration token has no importance, and columns chosen beyond the live ones would be arbitrary.

    Raises
    ------
    ValueError
        As :func:`compress`, or if the statistics have no angular distances or do not cover a target.
    """
    config = config or CompressConfig()
    candidates = _candidates(model, config)
    if isinstance(config, BudgetConfig):
        watch = None if progress is None else lambda done, total: progress("plan", done, total)
        curves = error_curves(model, statistics, config, candidates, progress=watch)
        return plan_budget(model, statistics, config, curves)
    if not statistics.angular:
        raise ValueError(
            "`statistics` holds no angular distances, by which layers are chosen; collect it with `layers`"
        )
    chosen = choose_layers(statistics.angular, config.layers)
    names = linear_modules(model, config.targets, exclude=config.exclude, layers=chosen)
    entries = []
    for name in names:
        if name not in candidates:
            continue
        m, n = dense_weight(model.get_submodule(name), name)[0].shape
        live = int((x_norm(statistics, name) > 0).sum())
        if live == 0:
            raise ValueError(f"no input of {name} was ever different from zero on the calibration text")
        rank = min(config.rank, ranks.break_even(m, n, layout=config.layout), live)
        if rank < 1:
            raise ValueError(f"{name} ({m} x {n}) is too small: no rank saves anything; exclude it")
        entries.append(
            PlanEntry(
                name=name,
                shape=(m, n),
                rank=rank,
                layout=config.layout,
                importance=config.importance,
                link=config.link,
                subspace=_subspace(config.subspace, min(m, n)),
            )
        )
    return Plan(
        entries=tuple(entries),
        fingerprint=fingerprint(model),
        model=str(getattr(model.config, "_name_or_path", "") or ""),
        seed=config.seed,
        calibration=statistics.text_hash or None,
        calibration_tokens=statistics.tokens,
        angular=statistics.angular,
        versions=versions(),
    )


def apply_plan_(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    *,
    precision: str = "float32",
    progress: StageProgress | None = None,
) -> list[LayerReport]:
    """Carry out a plan, in place; the model is changed only if every factorization succeeds.

    Raises
    ------
    PlanError
        If the plan was made for another model.
    NumericalError
        If a weight is NaN or infinite.
    """
    layers, reports = _decompose(model, plan, statistics, precision, progress)
    swap_(model, layers)
    mark_(model)
    return reports


def _candidates(model: PreTrainedModel, config: CompressConfig | BudgetConfig) -> list[str]:
    """Name the layers that could be chosen, refusing before any forward pass what could not be compressed."""
    blocks = decoder_layers(model)
    ends = 0 if isinstance(config, BudgetConfig) else 1
    if isinstance(config, CompressConfig) and config.layers > len(blocks) - 2:
        raise ValueError(
            f"`layers` must be between 1 and {max(len(blocks) - 2, 0)} for a model of {len(blocks)} blocks, whose "
            f"first and last are never chosen, got {config.layers}"
        )
    inside = range(ends, len(blocks) - ends)
    names = linear_modules(model, config.targets, exclude=config.exclude, layers=inside)
    tied = _tied_weights(model)
    factored = tuple(f"{name}." for name in compressed_modules(model))
    limit, widest = 0, ""
    for name in names:
        if name.startswith(factored):
            raise ValueError(f"{name} is a factor of a layer that is compressed already; exclude it")
        weight, _, _ = dense_weight(model.get_submodule(name), name)
        if weight.is_meta:
            raise ValueError(f"the weight of {name} is offloaded; load the model onto a device, or exclude it")
        if other := tied.get(weight.data_ptr(), {name}) - {name}:
            raise ValueError(
                f"the weight of {name} is tied to {', '.join(sorted(other))}; compressing one would leave the "
                "other dense, so exclude it"
            )
        if min(weight.shape) > limit:
            limit, widest = min(weight.shape), f"{name} ({weight.shape[0]} x {weight.shape[1]})"
    if isinstance(config, CompressConfig) and config.rank > limit:
        raise ValueError(
            f"`rank` must be at most {limit}, the smaller side of the largest target {widest}, got {config.rank}"
        )
    return names


def _subspace(asked: str, side: int) -> str:
    if asked != "auto":
        return asked
    return "exact" if side <= _EXACT_UP_TO else "randomised"


def _tied_weights(model: nn.Module) -> dict[int, set[str]]:
    """Return the modules that hold each parameter, by its address; a module under two names is one module."""
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and not parameter.is_meta:
                holders.setdefault(parameter.data_ptr(), set()).add(name)
    return holders


def _decompose(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics,
    precision: str,
    progress: StageProgress | None,
) -> tuple[dict[str, CompressedLinear], list[LayerReport]]:
    plan.check(model)
    moments = Moments(statistics)
    layers: dict[str, CompressedLinear] = {}
    reports: list[LayerReport] = []
    for done, entry in enumerate(plan.entries):
        if progress is not None:
            progress("decompose", done, len(plan.entries))
        module = model.get_submodule(entry.name)
        layers[entry.name], report = factorize(module, entry, moments, dtype=PRECISIONS[precision], seed=plan.seed)
        reports.append(report)
    if progress is not None:
        progress("decompose", len(plan.entries), len(plan.entries))
    return layers, reports


def _as_done(plan: Plan, reports: list[LayerReport]) -> Plan:
    entries = (replace(entry, rank=done.rank) for entry, done in zip(plan.entries, reports, strict=True))
    return replace(plan, entries=tuple(entries))
