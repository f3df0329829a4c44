"""Perplexity of a model that is never in memory as a whole."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from cur.integrations.blockwise.bypass import Bypass
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.measure.text import batches
from cur.integrations.model.experts import eager_experts
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, body, evaluating, model_inputs, run
from cur.integrations.report.endings import output_head
from cur.integrations.report.perplexity import Perplexity, perplexity

__all__ = ["perplexity_blockwise"]


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
    """
    start = time.perf_counter()
    model, count = streamed.model, len(streamed.blocks)
    parts = batches(windows, batch_size=batch_size)
    output_head(model)
    check_windows(model, windows)
    total = (count + 1) * len(windows)
    inner = body(model)
    with tempfile.TemporaryDirectory(prefix="cur-", dir=scratch) as directory:
        bypass = Bypass(streamed, HiddenStates(Path(directory), streamed.device))
        passes = Precision.on(streamed.device, streamed.dtype, precision)
        with bypass.open(), evaluating(model), eager_experts(model):
            streamed.load_outside()
            for index in range(count):
                with bypass.at(index):
                    for number, batch in enumerate(parts):
                        with passes.products():
                            run(inner, model_inputs(inner, batch))
                        if progress is not None:
                            progress(index * len(windows) + min((number + 1) * batch_size, len(windows)), total)
                bypass.drop_before(index)
            bypass.active = count
            streamed.load_outside(head=True)

            def watch(done: int, _: int | None) -> None:
                if progress is not None:
                    progress(count * len(windows) + done, total)

            result = perplexity(model, windows, batch_size=batch_size, precision=passes.name, progress=watch)
            streamed.free_outside()
    return replace(result, seconds=time.perf_counter() - start)
