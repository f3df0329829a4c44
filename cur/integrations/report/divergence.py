"""How far a language model predicts otherwise than another: Kullback-Leibler divergence of the next token."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur._lib.interval import interval
from cur.integrations.measure.text import batches
from cur.integrations.model.finite import all_finite, find_nonfinite
from cur.integrations.model.limits import check_windows
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import Progress, model_inputs
from cur.integrations.report.endings import output_head, predicting, unrounded
from cur.integrations.report.perplexity import exponential

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Divergence", "Reference", "divergence"]

# Shares of the logits that are in memory at once: those of both models are, with what is computed of them.
_SHARES = 4


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far a model predicts otherwise than a reference, on token windows.

    Attributes
    ----------
    kl : tuple of float
        The Kullback-Leibler divergence ``KL(reference || model)`` of the distributions of the next token, in nats: of
        each window the mean over its tokens.
    same : tuple of float
        The share of the tokens of each window after which both models have the same most likely token.
    perplexity : float
        The perplexity of the model on the windows, as :func:`~cur.integrations.perplexity` has it.
    reference_perplexity : float
        The perplexity of the reference on the windows.
    tokens : int
        The number of predictions compared: one after each token of each window.
    seconds : float
        The seconds that the passes of the model took, with the comparison.
    precision : str
        The precision of matrix products in the passes of the model, ``"float32"`` for instance.
    """

    kl: tuple[float, ...]
    same: tuple[float, ...]
    perplexity: float
    reference_perplexity: float
    tokens: int
    seconds: float
    precision: str

    @property
    def windows(self) -> int:
        """The number of windows compared."""
        return len(self.kl)

    @property
    def mean(self) -> float:
        """The divergence, in nats per token."""
        return interval(self.kl)[0]

    @property
    def half_width(self) -> float:
        """Half the length of the 95 percent interval of :attr:`mean`, by Student's t distribution over the windows.

        Infinite for one window, of which no interval can be had.
        """
        return interval(self.kl)[1]

    @property
    def upper(self) -> float:
        """The upper end of the interval, to decide by: infinite for one window."""
        return self.mean + self.half_width

    @property
    def same_top(self) -> float:
        """The share of tokens after which both models have the same most likely token."""
        return interval(self.same)[0]

    @property
    def same_top_half_width(self) -> float:
        """Half the length of the 95 percent interval of :attr:`same_top`, as :attr:`half_width` has it."""
        return interval(self.same)[1]

    @property
    def remark(self) -> str:
        """A sentence on what was compared, and what an interval is."""
        if self.windows == 1:
            return f"Predictions of {self.tokens:,} tokens in one window were compared, of which no interval is known."
        return (
            f"Predictions of {self.tokens:,} tokens in {self.windows} windows were compared; ± is half the 95 % "
            "interval by Student's t over the windows."
        )

    @property
    def said(self) -> str:
        """The divergence with its interval, without its unit."""
        return _figure(self.mean, self.half_width, ".4g")

    def figures(self, reference: str = "the dense model") -> dict[str, str]:
        """Return the divergence and the share of the same top tokens as text, with their intervals.

        Parameters
        ----------
        reference : str, default "the dense model"
            The name of the reference.

        Returns
        -------
        dict of str to str
            The figures by what they are, the divergence first.
        """
        return {
            f"KL divergence from {reference}": f"{self.said} nats per token",
            "Same most likely token": f"{_figure(100 * self.same_top, 100 * self.same_top_half_width, '.1f')} %",
        }

    def lines(self, reference: str = "the reference") -> list[str]:
        """Return all figures as lines of a text, the divergence first.

        Parameters
        ----------
        reference : str, default "the reference"
            The name of the reference.

        Returns
        -------
        list of str
            A line each for the divergence, the share of the same top tokens, and the perplexities.
        """
        return [
            *(f"{name}: {value}" for name, value in self.figures(reference).items()),
            f"Perplexity: {self.perplexity:.2f}, of {reference} {self.reference_perplexity:.2f}",
        ]

    def __str__(self) -> str:
        said = "; ".join(self.lines())
        return f"{said}. {self.remark} ({self.seconds:.1f} s, products in {self.precision})"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON types, the divergence first; an interval of one window, which has none, is None.

        Returns
        -------
        dict
            The means with their intervals, then the fields.
        """
        return {
            "mean": self.mean,
            "half_width": _or_none(self.half_width),
            "same_top": self.same_top,
            "same_top_half_width": _or_none(self.same_top_half_width),
            **{key: value for key, value in asdict(self).items() if not isinstance(value, tuple)},
            "windows": self.windows,
            "kl": list(self.kl),
            "same": list(self.same),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read figures from JSON types; those that follow from others are computed again.

        Parameters
        ----------
        data : mapping
            The figures, as :meth:`to_dict` returns them.

        Raises
        ------
        KeyError
            If a figure is missing.
        """
        values = {one.name: data[one.name] for one in fields(cls)}
        return cls(**{**values, "kl": tuple(data["kl"]), "same": tuple(data["same"])})


class Reference:
    """What a language model predicts on windows of tokens, kept to compare others with it.

    Kept are its last hidden states, in main memory and in the dtype of the model, and its end: the head, and what
    scales or caps logits after it. So the rest of the model may be changed or thrown away, and the states are some
    hundred times smaller than logits. Of a model whose logits depend on more than these states the logits themselves
    are kept, in files that go with the reference.

    Parameters
    ----------
    model : nn.Module
        The causal language model of transformers to compare others with.
    windows : torch.Tensor
        int64, shape (count, length), as :func:`cur.integrations.token_windows` returns.
    batch_size : int, default 1
        Windows per forward pass; changes the result by rounding only.
    precision : str, default "auto"
        The precision of matrix products in the passes, as for :func:`~cur.integrations.perplexity`.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in windows.
    opened : callable, optional
        Returns a context in which the tensors of the head are in memory, where they are not always. The head is then
        not checked against changes.

    Raises
    ------
    TypeError
        If the model is not a causal language model, or `windows` is not an integer matrix.
    ValueError
        If a token is outside the model's vocabulary, or there is no such precision.
    NumericalError
        If a hidden state is not finite; the message names where that began.
    OSError
        If logits are kept, and the disk is full or cannot be written.

    Examples
    --------
    A model that is compressed in place is compared with what it was.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cur.integrations import CompressConfig, Reference, compress
    >>> _ = torch.manual_seed(0)
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape))
    >>> windows = torch.randint(50, (8, 16))
    >>> reference = Reference(model, windows[4:])
    >>> _ = compress(model, windows[:4], CompressConfig(layers=2, targets=("gate_proj",), rank=8))
    >>> found = reference.compare(model)
    >>> 0 < found.mean < found.upper < 0.01
    True
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        /,
        *,
        batch_size: int = 1,
        precision: str = "auto",
        progress: Progress | None = None,
        opened: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self.vocabulary = output_head(model).out_features
        parts = batches(windows, batch_size=batch_size)
        check_windows(model, windows)
        self.windows = windows.cpu().clone()
        self.states: list[Tensor | _Stored] = []
        self._opened: Callable[[], AbstractContextManager[object]] = opened or nullcontext
        self._name = type(model).__name__
        self.passes = passes = Precision.of(model, precision)
        with predicting(model, windows, passes) as predictor:
            self._ending = predictor.ending
            for batch in parts:
                states = predictor.states(batch)
                if not bool(all_finite(states)):
                    raise NumericalError(
                        f"the hidden states of window {len(self.states)} are not finite; "
                        f"{find_nonfinite(model, model, model_inputs(model, batch))}"
                    )
                kept = states.cpu().unbind()
                self.states += kept if predictor.ending is not None else map(_Stored, kept)
                if progress is not None:
                    progress(len(self.states), len(windows))
        self._digest = "" if opened or self._ending is None else _digest(self._ending.head)

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose predictions are not of the same tokens, before any pass.

        Parameters
        ----------
        model : nn.Module
            The model that is to be compared.

        Raises
        ------
        TypeError
            If the model is not a causal language model.
        ValueError
            If its vocabulary is another.
        """
        check_vocabulary(model, self._name, self.vocabulary)
        check_windows(model, self.windows)

    def compare(
        self,
        model: nn.Module,
        /,
        *,
        batch_size: int = 1,
        precision: str = "auto",
        progress: Progress | None = None,
    ) -> Divergence:
        """Compare a model with this one; the parameters are those of :func:`divergence`.

        Parameters
        ----------
        model : nn.Module
            The causal language model to compare.
        batch_size : int, default 1
            Windows per forward pass; changes the result by rounding only.
        precision : str, default "auto"
            The precision of matrix products in the passes: by default that of the reference, if the weights of both
            have one dtype.
        progress : callable, optional
            Called as ``progress(done, total)`` after every batch, in windows.

        Returns
        -------
        Divergence

        Raises
        ------
        TypeError
            If the model is not a causal language model.
        ValueError
            If its vocabulary is another, there is no such precision, or the head of the reference was changed in place.
        NumericalError
            If the divergence is not finite; the message names where that began.
        """
        self.check(model)
        parts = batches(self.windows, batch_size=batch_size)
        passes = Precision.of(model, precision)
        if precision == "auto" and passes.dtype == self.passes.dtype:
            passes = Precision.of(model, self.passes.name)  # another would be a divergence as well
        begin = time.perf_counter()
        rows: list[Tensor] = []
        with predicting(model, self.windows, passes) as predictor, self._end(passes) as ending:
            step = max(predictor.step // _SHARES, 1)
            for batch in parts:
                states, ids = predictor.states(batch), batch["input_ids"]
                expected = torch.stack([_read(kept) for kept in self.states[len(rows) : len(rows) + len(ids)]])
                flat = (states.flatten(0, 1), expected.flatten(0, 1), ids.roll(-1, dims=1).flatten())
                parts_of = zip(*(torch.split(each, step) for each in flat), strict=True)
                found = torch.cat(
                    [_compared(ending(g.to(h.device)), predictor.logits(h), after) for h, g, after in parts_of], dim=1
                ).view(-1, *ids.shape)
                if not bool(all_finite(found)):
                    raise NumericalError(
                        f"the divergence of window {len(rows)} is not finite; "
                        f"{find_nonfinite(model, model, model_inputs(model, batch))}"
                    )
                rows += found.unbind(1)
                if progress is not None:
                    progress(len(rows), len(self.windows))
        return _summed(rows, time.perf_counter() - begin, passes.name)

    @contextmanager
    def _end(self, passes: Precision) -> Iterator[Callable[[Tensor], Tensor]]:
        """Have the end of the model in memory, as it was."""
        if self._ending is None:  # what is kept are logits
            yield lambda logits: logits
            return
        with self._opened(), unrounded(self._ending.head, passes):
            if self._digest and self._digest != _digest(self._ending.head):
                raise ValueError(
                    f"`reference` must have the output head that it was made with, that of {self._name} was changed in "
                    "place since; make it of a copy of the model (copy.deepcopy), or change layers by replacing them"
                )
            yield self._ending


def divergence(
    model: nn.Module,
    reference: nn.Module | Reference,
    windows: Tensor | None = None,
    /,
    *,
    batch_size: int = 1,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Divergence:
    r"""Compare what a causal language model predicts with what another does, each window on its own.

    After every token of a window both models have a distribution of the next one. With ``p`` of the reference and ``q``
    of the model the divergence is

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_t p_t (\log p_t - \log q_t) \ge 0,

    the nats per token that a code for the model's predictions wastes where the reference's hold; it is zero only where
    both are the same. Unlike perplexity on a small text it does not fall by luck. The interval of the mean is that of
    Student's t distribution over the means of windows, which count as independent draws: more windows make it shorter.
    Log-probabilities are taken in float32 and summed in float64, for a few tokens at a time.

    Parameters
    ----------
    model : nn.Module
        The causal language model of transformers to compare, compressed for instance.
    reference : nn.Module or Reference
        The model to compare it with, dense for instance; or what was kept of one, which then needs not be in memory.
    windows : torch.Tensor, optional
        int64, shape (count, length), as :func:`cur.integrations.token_windows` returns. Default: those of a
        :class:`Reference`.
    batch_size : int, default 1
        Windows per forward pass; changes the result by rounding only.
    precision : str, default "auto"
        The precision of matrix products in the passes, as for :func:`~cur.integrations.perplexity`. Weights in half
        precision are rounded while a model runs, and two models each in its way, which is a divergence as well.
    progress : callable, optional
        Called as ``progress(done, total)`` after every batch, in windows of both models.

    Returns
    -------
    Divergence

    Raises
    ------
    TypeError
        If a model is not a causal language model, or `windows` is not an integer matrix.
    ValueError
        If the models have different vocabularies, `windows` are not those of the reference, a token is outside the
        vocabulary, or there is no such precision.
    NumericalError
        If the divergence is not finite; the message names where that began.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cur.integrations import divergence
    >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape))
    >>> found = divergence(model, model, torch.randint(50, (4, 16)))
    >>> found.mean, found.same_top, found.tokens
    (0.0, 1.0, 64)
    """
    if isinstance(reference, Reference):
        if windows is not None and not torch.equal(windows.cpu(), reference.windows):
            raise ValueError(
                "`windows` must be those that the reference was made of, got others; leave them out, or make a "
                "reference of these"
            )
        return reference.compare(model, batch_size=batch_size, precision=precision, progress=progress)
    if windows is None:
        raise ValueError("`windows` must be given with a reference that is a model; pass windows of tokens")
    check_vocabulary(model, type(reference).__name__, output_head(reference).out_features)
    check_windows(model, windows)
    total = 2 * len(windows)
    kept = Reference(
        reference,
        windows,
        batch_size=batch_size,
        precision=precision,
        progress=None if progress is None else lambda done, _: progress(done, total),
    )
    return kept.compare(
        model,
        batch_size=batch_size,
        precision=precision,
        progress=None if progress is None else lambda done, _: progress(len(windows) + done, total),
    )


class _Stored:
    """A tensor in a file, which goes with this object."""

    def __init__(self, tensor: Tensor) -> None:
        handle, name = tempfile.mkstemp(prefix="cur-", suffix=".safetensors")
        os.close(handle)
        self._file = Path(name)
        weakref.finalize(self, self._file.unlink, missing_ok=True)
        save_file({"": tensor.contiguous()}, self._file)

    def read(self) -> Tensor:
        return load_file(self._file)[""]


def _read(kept: Tensor | _Stored) -> Tensor:
    return kept.read() if isinstance(kept, _Stored) else kept


def check_vocabulary(model: nn.Module, name: str, vocabulary: int) -> None:
    """Refuse a model that does not predict as many tokens as a reference.

    Parameters
    ----------
    model : nn.Module
        The causal language model that is to be compared.
    name : str
        The name of the reference, for the error.
    vocabulary : int
        The number of tokens that the reference predicts.

    Raises
    ------
    TypeError
        If the model is not a causal language model.
    ValueError
        If its vocabulary is another.
    """
    own = output_head(model).out_features
    if own != vocabulary:
        raise ValueError(
            f"`reference` must predict the tokens that the model does, which has a vocabulary of {own}, {name} has one "
            f"of {vocabulary}; compare a model with the one that it was made from"
        )


def _compared(expected: Tensor, logits: Tensor, after: Tensor) -> Tensor:
    """Return of each token divergence, whether the top token is the same, and the losses of model and reference."""
    p, q = expected.to(logits.device).float().log_softmax(-1), logits.float().log_softmax(-1)
    same = p.argmax(-1) == q.argmax(-1)
    target = after.to(q.device)[:, None]
    losses = [-each.gather(1, target)[:, 0] for each in (q, p)]
    chance = p.exp()
    # What has no chance counts nothing, also where the model says so with minus infinity.
    divergence = p.sub_(q).mul_(chance).masked_fill_(chance == 0, 0).sum(-1, dtype=torch.float64)
    return torch.stack([divergence, *(each.double() for each in (same, *losses))])


def _summed(rows: list[Tensor], seconds: float, precision: str) -> Divergence:
    """Return the figures of windows, each of shape (4, tokens) as :func:`_compared` has them."""
    each = torch.stack(rows).cpu()
    kl, same = each[:, :2].mean(-1).T.tolist()
    # The last token of a window is followed by none. Added up as for perplexity, window by window.
    ours, theirs = (
        sum(float(window[:-1].sum()) for window in each[:, place]) / (len(each) * (each.shape[-1] - 1))
        for place in (2, 3)
    )
    return Divergence(
        kl=tuple(kl),
        same=tuple(same),
        perplexity=exponential(ours),
        reference_perplexity=exponential(theirs),
        tokens=each[:, 0].numel(),
        seconds=seconds,
        precision=precision,
    )


def _digest(head: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for tensor in head.state_dict().values():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _figure(mean: float, half: float, form: str) -> str:
    return f"{mean:{form}}" if math.isinf(half) else f"{mean:{form}} ± {half:{form}}"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
