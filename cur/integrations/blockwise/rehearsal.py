"""A rehearsal of what is done block by block, before anything is measured or written.

A few tokens go through all blocks, which get drawn numbers in the place of their weights: no file is read, one block is
in memory at a time, and what depends on what is the same. First each block runs when the model calls it, as in the
whole model; then one after the other, as in the run. Where the two differ, or the model cannot be run so, that is said
before the first pass over text.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HeldStates
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.shards import Shards
from cur.integrations.measure.collect import collect
from cur.integrations.measure.propagation import fitting_fault
from cur.integrations.model.blocks import ChainError, after_blocks, chain_fault, unpack
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.hooks import forwards_replaced, hooked
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import body, evaluating, model_inputs, run
from cur.integrations.model.unrolling import unrolled

__all__ = ["Rehearsal"]

# Tokens of the one sample that goes through the blocks.
_TOKENS = 32

# Numbers that are drawn; longer tensors repeat them. A prime, so that no two rows of a matrix are alike.
_DRAWN = 1_000_003

# What two passes over the same numbers may differ by, of the largest: products may be summed in another order.
_NEAR = 1e-3


class Rehearsal:
    """A model without its weights, on a few tokens of a batch.

    Parameters
    ----------
    streamed : StreamedModel
        The model, which is neither read nor changed.
    text : sequence of mapping or Tensor
        The batches that the model will be run on, of which one sample is taken: one with padding, if there is such.
    precision : Precision
        The precision of matrix products in the passes.
    """

    def __init__(self, streamed: StreamedModel, text: Sequence[Any], precision: Precision) -> None:
        # On the meta device a copy costs nothing.
        empty = copy.deepcopy(streamed.model)
        self.streamed = StreamedModel(empty, streamed.tokenizer, _Drawn(streamed.shards), streamed.device)
        self.precision = precision
        self._inner = body(empty)
        sample = _sample(text)
        self.batch = _first_tokens(sample)
        self._wanted = self._known()
        if not self._wanted and self.batch is not sample:  # some take windows of one length alone
            self.batch = sample
            self._wanted = self._known()

    def check(self, names: Sequence[str] | None = None, *, end: bool = False) -> None:
        """Refuse a model whose blocks cannot be run one after the other, each alone in memory.

        Parameters
        ----------
        names : sequence of str, optional
            The names of the layers that will be measured on the way; by default nothing is measured.
        end : bool, default False
            Whether what comes after the blocks is needed as well, as for perplexity.

        Raises
        ------
        ChainError
            If a block depends on more than what the one before it returned and its arguments, so that block by block
            it would be run on something else than in the whole model, or not at all.
        """
        wanted = self._wanted
        if not wanted:  # drawn numbers may be none that a model runs on; what it does with its own, the run will tell
            return
        with self._running(), self.precision.products():
            try:
                fault = self._difference(wanted, names, end=end)
            except ChainError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ChainError(
                    f"{type(self.streamed.model).__name__} cannot be run block by block ({reason}); try it in memory "
                    "as a whole"
                ) from error
        # Where chance has a part, as in hashes of attention, two passes over the whole model differ as well.
        if fault is not None and _are_all_near(self._whole(), wanted):
            raise ChainError(fault)

    def chain_fault(self) -> str | None:
        """Say why the blocks cannot be walked through one after the other, as :func:`chain_fault` says it in memory.

        Returns
        -------
        str or None
            What is in the way, None if walking gives what the model itself gives.

        Raises
        ------
        ChainError
            If it cannot be told because not all blocks are in memory.
        """
        if not self._wanted:
            return None
        with self._running(), self._on_demand(), self.precision.products():
            return chain_fault(self.streamed.model, self.batch)

    def correction_fault(self, names: Sequence[str]) -> str | None:
        """Say why layers cannot be fitted to what compressed ones before them give.

        Parameters
        ----------
        names : sequence of str
            The names of the layers.

        Returns
        -------
        str or None
            What is in the way, in memory as well; None if nothing is.

        Raises
        ------
        ChainError
            If that is so block by block alone.
        """
        if (fault := self.chain_fault()) or not self._wanted:
            return fault
        with self._running():
            return fitting_fault(
                self.streamed.model, self.batch, names, precision=self.precision.name, loaded=self._loaded
            )

    @contextmanager
    def _running(self) -> Iterator[None]:
        model = self.streamed.model
        with evaluating(model), eager_experts(model):
            self.streamed.load_outside()
            yield
            self.streamed.free_outside()

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        self.streamed.load_block(index)
        with unrolled(self.streamed.model):
            yield
        self.streamed.free_block(index)

    @contextmanager
    def _on_demand(self) -> Iterator[None]:
        """Have each block in memory while it is called."""

        def loading(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    self.streamed.load_block(number)
                    try:
                        return original(*args, **kwargs)
                    finally:
                        self.streamed.free_block(number)

                return forward

            return wrap

        with forwards_replaced((block, loading(number)) for number, (_, block) in enumerate(self.streamed.blocks)):
            yield

    def _run(self) -> Any:
        return run(self._inner, model_inputs(self._inner, self.batch))

    def _known(self) -> dict[int, list[Any]]:
        """Return what each block does in the whole model; nothing if that does not run, or not to finite numbers."""
        try:
            found = self._whole()
        except Exception:  # noqa: BLE001 - the code of a model raises what it likes
            return {}
        return found if all(_is_finite(state) for states in found.values() for state in states) else {}

    def _whole(self) -> dict[int, list[Any]]:
        """Return what each block returns in the whole model, whenever it is called; the model's own output last."""
        found: dict[int, list[Any]] = {}
        blocks = [block for _, block in self.streamed.blocks]
        watched = after_blocks(blocks, lambda number, state: found.setdefault(number, []).append(_copied(state)))
        with self._running(), self.precision.products(), self._on_demand(), hooked(watched):
            found[len(blocks)] = [_main(self._run())]
        return found

    def _difference(self, wanted: Mapping[int, list[Any]], names: Sequence[str] | None, *, end: bool) -> str | None:
        """Run one block after the other, and say where one returns something else than in the whole model."""
        count, kind = len(self.streamed.blocks), type(self.streamed.model).__name__
        bypass = Bypass(self.streamed, HeldStates(self.streamed.device))
        with bypass.open():
            for index, (name, _) in enumerate(self.streamed.blocks):
                if index not in wanted:
                    return (
                        f"no input reaches {name}, or its parts are called and not the block itself, so block by block "
                        "it would never run; load the whole model"
                    )
                found = self._alone(bypass, index, names)
                if not _are_near(found, wanted[index][-1]):
                    return (
                        f"{name} of {kind} depends on more than what it is called with, so block by block it would "
                        "be run on something else than in the whole model; load the whole model"
                    )
                bypass.drop_before(index)
            bypass.active = count
            self.streamed.load_outside()
            if end and not _are_near(_main(self._run()), wanted[count][-1]):
                return f"what {kind} returns depends on more than what its last block returned; load the whole model"
        return None

    def _alone(self, bypass: Bypass, index: int, names: Sequence[str] | None) -> Any:
        """Return what a block returns while it alone is in memory, its layers measured as they will be."""
        found: list[Any] = []
        name, block = self.streamed.blocks[index]
        with bypass.at(index), hooked(after_blocks([block], lambda _, state: found.append(_copied(state)))):
            if names is not None:
                collect(
                    self.streamed.model,
                    [self.batch],
                    modules=[layer for layer in names if layer.startswith(f"{name}.")],
                    layers=[name],
                    partial=True,
                    precision=self.precision.name,
                )
            else:
                self._run()
        return found[-1] if found else None


class _Drawn(Shards):
    """The tensors of a checkpoint with drawn numbers in them, the same ones whenever they are asked for."""

    def __init__(self, shards: Shards) -> None:
        self.directory, self.tensors = shards.directory, shards.tensors
        numbers = torch.rand(_DRAWN, generator=torch.Generator().manual_seed(0))
        self._numbers = (2.0 * numbers - 1.0).repeat(2)

    def read(self, name: str) -> Tensor:
        """Return a tensor of the shape and dtype of the one that is stored."""
        stored = self.tensors[name]
        size = math.prod(stored.shape)
        if not stored.dtype.is_floating_point:  # places of rows, and counts: all have a first
            return torch.zeros(stored.shape, dtype=stored.dtype)
        first = zlib.crc32(name.encode()) % _DRAWN
        drawn = self._numbers[first : first + min(size, _DRAWN)]
        # Outputs as large as inputs of matrices; scales and shifts near to one, as no two are to be alike.
        matrix = len(stored.shape) > 1 and size > 0
        drawn = drawn * math.sqrt(3 * stored.shape[0] / size) if matrix else 1.0 + 0.1 * drawn
        drawn, found = drawn.to(stored.dtype), torch.empty(size, dtype=stored.dtype)
        for start in range(0, size, _DRAWN):
            found[start : start + _DRAWN] = drawn[: size - start]
        return found.reshape(stored.shape)


def _sample(text: Sequence[Any]) -> Mapping[str, Any]:
    """Return the first sample with padding, else the first one."""
    batches = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in text]
    batch, place = batches[0], 0
    for one in batches:
        mask = one.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            batch, place = one, int(mask.bool().all(1).to(torch.int8).argmin())
            break
    samples = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    return {
        key: value[place : place + 1] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value
        for key, value in batch.items()
    }


def _first_tokens(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first tokens of a sample of text without padding; the same of others."""
    ids, mask = sample.get("input_ids"), sample.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not (mask is None or bool(mask.all())):
        return sample
    if ids.shape[1] <= _TOKENS:
        return sample
    return {
        key: value[:, :_TOKENS] if isinstance(value, Tensor) and value.shape[:2] == ids.shape else value
        for key, value in sample.items()
    }


def _main(output: Any) -> Any:
    """Return the main output of a model."""
    return unpack(output.to_tuple() if hasattr(output, "to_tuple") else output)[0]


def _copied(state: Any) -> Any:
    """Return a state that stays as it is when the model goes on."""
    return state.clone() if isinstance(state, Tensor) else state


def _is_finite(state: Any) -> bool:
    return not isinstance(state, Tensor) or not state.is_floating_point() or bool(state.isfinite().all())


def _are_all_near(found: Mapping[int, list[Any]], wanted: Mapping[int, list[Any]]) -> bool:
    return all(_are_near(found[number][-1], states[-1]) for number, states in wanted.items())


def _are_near(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return type(found) is type(wanted)
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return found.shape == wanted.shape and bool(torch.allclose(found, wanted, rtol=0.0, atol=_NEAR * scale))
