"""Statistics of what flows into the linear layers of a model, streamed over calibration text."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from cur._errors import NumericalError
from cur.integrations._forward import (
    Progress,
    body,
    check_finite_weights,
    evaluating,
    find_nonfinite,
    model_inputs,
    run,
)
from cur.integrations.statistics import Statistics

__all__ = ["Statistics", "collect"]

# Blocks of features per second moment: (p + 1) / (2 p) of the products that a full matrix takes, 0.6 for p =
# 5.
_TRIANGLE_BLOCKS = 5


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | torch.Tensor],
    /,
    *,
    modules: Sequence[str],
    moments: Literal["diagonal", "full"] = "diagonal",
    layers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    r"""Measure the inputs of modules and how much each block turns the hidden state.

    One pass over the text does both. For the inputs ``x`` (one per token) of each module,
    ``moments="diagonal"`` sums ``x**2`` per feature and ``moments="full"`` sums ``x x^T``. Sums are taken in
    float64. Padded positions (zeros of ``attention_mask``) count for nothing, so that the result depends on
    batch size and padding by rounding only. Modules that are called with the very same tensor (the query, key
    and value projections) share one sum.

    For each block ``i`` of `layers` the angular distance of CURing (arXiv 2501.04211) is the mean over
    samples of ``arccos(cos(h[i-1], h[i])) / pi``, between 0 and 1, where ``h[i]`` is the block's output at
    the last token of the sample that is not padding and ``h[-1]`` the input of the first block. It is kept
    for every pair of blocks.

    The head of the model is not run unless one of the `modules` belongs to it.

    Parameters
    ----------
    model : nn.Module
        A transformer, or any module that is called with the entries of a batch as keyword arguments.
    batches : iterable of mapping or torch.Tensor
        Mappings with ``input_ids`` and, where there is padding, ``attention_mask``, both of shape (batch,
        length); a bare tensor stands for ``input_ids``.
    modules : sequence of str
        Full names of the modules to measure.
    moments : {"diagonal", "full"}, default "diagonal"
        Memory, for a module of n inputs: n or n**2 numbers of 8 bytes.
    layers : sequence of str, optional
        Full names of the blocks, in order, as :func:`cur.integrations.decoder_layers` has them. Default: no
        angular distances.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in samples; ``total`` is None for a bare
        iterator.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If there is no batch, no token, no such module, a module that received nothing, or a module whose
        input does not have one row per token although there is padding.
    NumericalError
        If a weight, an input or a hidden state is NaN or infinite; the message names where it began.
    """
    if moments not in ("diagonal", "full"):
        raise ValueError(f"`moments` must be 'diagonal' or 'full', got {moments!r}")
    measured = _find(model, modules, "modules")
    blocks = _find(model, layers or (), "layers")
    if not measured and not blocks:
        raise ValueError("`modules` and `layers` are both empty: there is nothing to measure")
    bad = check_finite_weights(model, measured)
    if bad is not None:
        raise NumericalError(f"the weight {bad!r} holds NaN or infinity; the model cannot be calibrated")

    inner = body(model)
    inside = {id(part) for part in inner.modules()}
    if not all(id(part) in inside for part in (*measured.values(), *blocks.values())):
        inner = model
    total = _total_samples(batches)
    inputs_of = _Inputs(measured, full=moments == "full")
    hidden = _Hidden(blocks)
    digest = hashlib.sha256()
    tokens = samples = 0
    handles = [*inputs_of.attach(), *hidden.attach()]
    try:
        with evaluating(model):
            for batch in batches:
                inputs = model_inputs(inner, batch)
                mask = _mask(inputs)
                rows, counted = _digest(digest, inputs, mask)
                if counted == 0:
                    raise ValueError("a batch holds no token that is not padding")
                inputs_of.start(mask)
                hidden.start(mask)
                run(inner, inputs)
                broken = inputs_of.finish() or hidden.finish()
                if broken:
                    raise NumericalError(f"{broken} is not finite; {find_nonfinite(inner, inputs)}")
                samples += rows
                tokens += counted
                if progress is not None:
                    progress(samples, total)
    finally:
        for handle in handles:
            handle.remove()
    if samples == 0:
        raise ValueError("`batches` is empty: calibration needs at least one batch")
    sums, products, counts = inputs_of.results()
    config = getattr(model, "config", None)
    return Statistics(
        tokens=tokens,
        samples=samples,
        square_sums=sums,
        products=products,
        counts=counts,
        angles=hidden.angles / samples if blocks else None,
        layers=tuple(layers or ()),
        text_hash=digest.hexdigest(),
        model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
    )


def _find(model: nn.Module, names: Sequence[str], parameter: str) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise TypeError(
            f"`{parameter}` must be a sequence of names, got the string {names!r}; write [{names!r}]"
        )
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"`{parameter}` names what {type(model).__name__} does not have: {', '.join(missing[:5])}"
        )
    return {name: known[name] for name in names}


def _total_samples(batches: Iterable[Any]) -> int | None:
    if not isinstance(batches, Sequence):
        return None
    sizes = [next(iter(b.values())) if isinstance(b, Mapping) else b for b in batches]
    return sum(len(size) for size in sizes)


def _mask(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the padding mask as booleans, None where every position counts."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"`attention_mask` must have shape (batch, length), got {tuple(mask.shape)}")
    kept: torch.Tensor = mask.bool()
    empty = ~kept.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"sample {int(empty.nonzero()[0])} of a batch is all padding; leave it out")
    return None if bool(kept.all()) else kept


def _digest(digest: Any, inputs: Mapping[str, Any], mask: torch.Tensor | None) -> tuple[int, int]:
    """Add the samples to the hash, padding left out, and count them and their tokens."""
    ids = inputs.get("input_ids")
    if ids is None:
        ids = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    tokens = 0
    for index, row in enumerate(ids.cpu()):
        kept = row if mask is None or mask.shape != ids.shape else row[mask[index].cpu()]
        digest.update(len(kept).to_bytes(8, "little"))
        digest.update(
            kept.contiguous().numpy().astype("<i8" if not kept.is_floating_point() else "<f8").tobytes()
        )
        tokens += len(kept)
    return len(ids), tokens


class _Inputs:
    """Sums over the inputs of modules, gathered by hooks; modules called with the same tensor share one."""

    def __init__(self, modules: Mapping[str, nn.Module], *, full: bool) -> None:
        self.full = full
        self.names: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        for name, module in modules.items():
            # One module under two names (shared weights) is one module, with one hook.
            self.names.setdefault(id(module), []).append(name)
            self.modules[id(module)] = module
        self.leader: dict[int, int] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.products: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}
        self.mask: torch.Tensor | None = None
        self.seen: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        return [
            module.register_forward_pre_hook(self._hook(key), with_kwargs=True)
            for key, module in self.modules.items()
        ]

    def start(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.seen.clear()

    def finish(self) -> str | None:
        """Name the first module, in the order of the calls, whose inputs are not finite."""
        for key, total in self.sums.items():
            if not bool(torch.isfinite(total).all()):
                return f"the input of {self.names[key][0]!r}"
        return None

    def _hook(self, key: int) -> Callable[..., None]:
        def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, torch.Tensor):
                raise TypeError(
                    f"{self.names[key][0]!r} is not called with a tensor; its input cannot be measured"
                )
            leader = self._leader(key, x)
            known = self.leader.setdefault(key, leader)
            if known != leader:
                raise ValueError(
                    f"{self.names[key][0]!r} first had the input of {self.names[known][0]!r} and then that "
                    "of "
                    f"{self.names[leader][0]!r}; measure these modules in separate calls"
                )
            if leader == key:
                self._add(key, x)

        return gather

    def _leader(self, key: int, x: torch.Tensor) -> int:
        # Weak references: holding the tensors would keep every activation of the forward pass alive. The
        # version counter tells a tensor that was changed in place between two calls.
        found = self.seen.get(id(x))
        if found is not None and found[0]() is x and found[1] == x._version:
            return key if self.leader.get(key) == key else found[2]
        self.seen[id(x)] = (weakref.ref(x), x._version, key)
        return key

    def _add(self, key: int, x: torch.Tensor) -> None:
        rows = _rows(x, self.mask, self.names[key][0])
        if key not in self.sums:
            n = rows.shape[1]
            self.counts[key] = 0
            self.sums[key] = torch.zeros(n, dtype=torch.float64, device=x.device)
            if self.full:
                self.products[key] = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        wide = rows.to(torch.float64)
        self.counts[key] += len(rows)
        if self.full:
            add_gram_(self.products[key], wide)
            self.sums[key] = self.products[key].diagonal()
        else:
            self.sums[key] += wide.square().sum(0)

    def results(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, int]]:
        silent = [names[0] for key, names in self.names.items() if key not in self.leader]
        if silent:
            raise ValueError(
                f"no input reached {', '.join(silent[:5])}; leave out modules that the text does not use"
            )
        for product in self.products.values():
            mirror_(product)
        sums: dict[str, torch.Tensor] = {}
        products: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        final = {key: total.clone().cpu() for key, total in self.sums.items()}
        full = {key: product.cpu() for key, product in self.products.items()}
        for key, names in self.names.items():
            leader = self.leader[key]
            for name in names:
                sums[name], counts[name] = final[leader], self.counts[leader]
                if self.full:
                    products[name] = full[leader]
        return sums, products, counts


def add_gram_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add ``x^T x`` to the upper block triangle of `total`; :func:`mirror_` fills in the rest at the end."""
    n = total.shape[0]
    step = max(-(-n // _TRIANGLE_BLOCKS), 64)
    for start in range(0, n, step):
        stop = min(start + step, n)
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def mirror_(total: torch.Tensor) -> None:
    """Copy the upper triangle onto the lower one."""
    total.copy_(total.triu() + total.triu(1).T)


def _rows(x: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    if x.shape[:-1] == mask.shape or len(flat) == mask.numel():
        return flat[mask.reshape(-1).to(x.device)]
    raise ValueError(
        f"the input of {name!r} has shape {tuple(x.shape)}, which has not one row per token of a batch of "
        "shape "
        f"{tuple(mask.shape)}, so padding cannot be told apart; calibrate with unpadded text"
    )


class _Hidden:
    """Angles between the hidden states of blocks at the last token of each sample, summed over samples."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.blocks = blocks
        self.angles = torch.zeros(len(blocks) + 1, len(blocks) + 1, dtype=torch.float64)
        self.mask: torch.Tensor | None = None
        self.states: list[torch.Tensor] = []

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        if not self.blocks:
            return []
        first = next(iter(self.blocks.values()))
        before = first.register_forward_pre_hook(self._before, with_kwargs=True)
        return [before, *(block.register_forward_hook(self._after) for block in self.blocks.values())]

    def start(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.states.clear()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, state: torch.Tensor) -> None:
        rows = torch.arange(len(state), device=state.device)
        if self.mask is None:
            last = torch.full_like(rows, state.shape[1] - 1)
        else:
            mask = self.mask.to(state.device)
            last = state.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
        self.states.append(state[rows, last].to("cpu", torch.float64))

    def finish(self) -> str | None:
        """Add the angles of one batch; name the first block whose output is not finite."""
        if not self.blocks:
            return None
        names = list(self.blocks)
        if len(self.states) != len(names) + 1:
            raise ValueError(
                f"`layers` must be blocks that run once each and in order, got {', '.join(names[:3])} ..."
            )
        for index, state in enumerate(self.states):
            if not bool(torch.isfinite(state).all()):
                return f"the input of {names[0]!r}" if index == 0 else f"the output of {names[index - 1]!r}"
        states = torch.stack(self.states, dim=1)  # (batch, blocks + 1, width)
        self.angles += _angular_distances(states).sum(0)
        return None


def _angular_distances(states: torch.Tensor) -> torch.Tensor:
    """Pairwise angles over pi between vectors, shape (..., count, width) to (..., count, count).

    By ``2 atan2(|u - v|, |u + v|)`` for unit vectors (Kahan), since arccos loses half of the digits where it
    matters, at small angles.
    """
    unit = nn.functional.normalize(states, dim=-1, eps=math.ulp(0.0))
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(unit, unit, compute_mode=exact)
    return 2 / math.pi * torch.atan2(apart, torch.cdist(unit, -unit, compute_mode=exact))
