"""What a model that is never in memory as a whole predicts: perplexity, and the divergence from another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.rehearsal import Rehearsal
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.measure.text import batches
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, body, evaluating, model_inputs, run
from cur.integrations.report.divergence import Divergence, Reference
from cur.integrations.report.endings import output_head
from cur.integrations.report.perplexity import Perplexity, perplexity

__all__ = ["compare_blockwise", "perplexity_blockwise", "reference_blockwise"]


def perplexity_blockwise(
    streamed: StreamedModel,
    windows: torch.Tensor,
    /,
    *,
    batch_size: int = 1,
    precision: str = "auto",
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Score token windows with a causal language model, block by block; see :func:`~cur.integrations.perplexity`.

    Every block is loaded once. In memory are one block and the hidden states of one batch; those of all windows lie on
    disk.

    Parameters
    ----------
    streamed : StreamedModel
        The model as :func:`load_streamed` returns it; the checkpoint may be compressed.
    windows : torch.Tensor
        Windows of tokens: int64, shape (count, length).
    batch_size : int, default 1
        The number of windows in a forward pass.
    precision : str, default "auto"
        The precision of matrix products, named as for :func:`~cur.integrations.perplexity`.
    scratch : Path, optional
        Directory for hidden states, two values for each token and unit of width. By default it is the system's
        temporary one.
    progress : callable, optional
        Called as ``progress(done, total)``, in windows, block after block.

    Returns
    -------
    Perplexity
        The perplexity, the same as of the whole model in memory.

    Raises
    ------
    TypeError, ValueError, NumericalError
        In the cases in which :func:`~cur.integrations.perplexity` raises them.
    ChainError
        If the model cannot be run block by block; before any window is scored.
    """
    start = time.perf_counter()
    how = _How(batch_size, precision, scratch, progress)
    with _walked(streamed, windows, how) as options:
        result = perplexity(streamed.model, windows, **options)
    return replace(result, seconds=time.perf_counter() - start)


def reference_blockwise(
    streamed: StreamedModel,
    windows: torch.Tensor,
    /,
    *,
    batch_size: int = 1,
    precision: str = "auto",
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Keep what a model predicts, block by block; the parameters are those of :func:`perplexity_blockwise`.

    Parameters
    ----------
    streamed : StreamedModel
        The model as :func:`load_streamed` returns it, dense for instance.
    windows : torch.Tensor
        Windows of tokens: int64, shape (count, length).
    batch_size : int, default 1
        The number of windows in a forward pass.
    precision : str, default "auto"
        The precision of matrix products.
    scratch : Path, optional
        Directory for hidden states. By default it is the system's temporary one.
    progress : callable, optional
        Called as ``progress(done, total)``, in windows, block after block.

    Returns
    -------
    Reference
        What is kept of the model, whose head is read again whenever others are compared with it.
    """
    with _walked(streamed, windows, _How(batch_size, precision, scratch, progress)) as options:
        return Reference(streamed.model, windows, opened=partial(_head_in_memory, streamed), **options)


def compare_blockwise(
    streamed: StreamedModel,
    reference: Reference,
    /,
    *,
    batch_size: int = 1,
    precision: str = "auto",
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with what was kept of another, block by block; see :func:`~cur.integrations.divergence`.

    Parameters
    ----------
    streamed : StreamedModel
        The model as :func:`load_streamed` returns it; the checkpoint may be compressed.
    reference : Reference
        What was kept of the model to compare it with.
    batch_size : int, default 1
        The number of windows in a forward pass.
    precision : str, default "auto"
        The precision of matrix products.
    scratch : Path, optional
        Directory for hidden states. By default it is the system's temporary one.
    progress : callable, optional
        Called as ``progress(done, total)``, in windows, block after block.

    Returns
    -------
    Divergence
        The divergence, the same as of the whole model in memory.
    """
    start = time.perf_counter()
    reference.check(streamed.model)
    with _walked(streamed, reference.windows, _How(batch_size, precision, scratch, progress)) as options:
        result = reference.compare(streamed.model, **options)
    return replace(result, seconds=time.perf_counter() - start)


class _How(NamedTuple):
    """How blocks are walked through, as for :func:`perplexity_blockwise`."""

    batch_size: int
    precision: str
    scratch: Path | None
    progress: Progress | None


@contextmanager
def _walked(streamed: StreamedModel, windows: torch.Tensor, how: _How) -> Iterator[dict[str, Any]]:
    """Run all blocks over windows; from then on the model can be run on these: blocks return what they returned.

    What it yields are the options of who runs it.
    """
    model, count = streamed.model, len(streamed.blocks)
    parts = batches(windows, batch_size=how.batch_size)
    output_head(model)
    check_windows(model, windows)
    total = (count + 1) * len(windows)
    inner = body(model)
    passes = Precision.on(streamed.device, streamed.dtype, how.precision)
    Rehearsal(streamed, parts, passes).check(end=True)

    def watch(done: int, _: int | None, index: int = count) -> None:
        if how.progress is not None:
            how.progress(index * len(windows) + done, total)

    with tempfile.TemporaryDirectory(prefix="cur-", dir=how.scratch) as directory:
        bypass = Bypass(streamed, HiddenStates(Path(directory), streamed.device))
        with bypass.open(), evaluating(model), eager_experts(model):
            streamed.load_outside()
            for index in range(count):
                with bypass.at(index):
                    for number, batch in enumerate(parts):
                        with passes.products():
                            run(inner, model_inputs(inner, batch))
                        watch(min((number + 1) * how.batch_size, len(windows)), None, index)
                bypass.drop_before(index)
            bypass.active = count
            streamed.load_outside(head=True)
            yield {"batch_size": how.batch_size, "precision": passes.name, "progress": watch}
            streamed.free_outside()


@contextmanager
def _head_in_memory(streamed: StreamedModel) -> Iterator[None]:
    """Have the output head of a model in memory, and what is tied to it."""
    head = output_head(streamed.model)
    name = next(name for name, module in streamed.model.named_modules() if module is head)
    tied = streamed.model.all_tied_weights_keys
    for own in (f"{name}.{key}" for key in head.state_dict()):
        streamed.load_tensor(tied.get(own, own))
    yield
    streamed.free_outside()
