"""Where a model is while it is compressed: in memory as a whole, or, in `blockwise`, one block at a time."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from cur.integrations.factor.making import decompose
from cur.integrations.measure.collect import collect
from cur.integrations.measure.generated_text import own_text, writing_fault
from cur.integrations.measure.propagation import fitting_fault
from cur.integrations.measure.statistics import Statistics
from cur.integrations.measure.text import batches
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.blocks import ChainError, chain_fault
from cur.integrations.model.limits import check_windows
from cur.integrations.model.origin import Origin, changed_modules, kept_digest, origin_of, set_origin_
from cur.integrations.model.precision import Precision
from cur.integrations.model.size import Size, model_size, weight_bytes
from cur.integrations.model.targets import found_stacks
from cur.integrations.model.unrolling import release_, unrolled
from cur.integrations.model.usage import is_transformer, usage_of
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import CompressedLinear, looks_up, swap_
from cur.integrations.plan.config import Asked, BudgetConfig
from cur.integrations.plan.make import Layers, candidates, chooses_by_angle
from cur.integrations.plan.plan import Plan
from cur.integrations.plan.vocabulary_curves import priced_vocabulary
from cur.integrations.report.data import CompressionReport, LayerReport
from cur.integrations.report.divergence import Divergence, Reference
from cur.integrations.report.outputs import output_changes
from cur.integrations.store.checkpoint import REPORT, save
from cur.integrations.store.format import mark_

__all__ = [
    "TOL_IN_MEMORY",
    "Clock",
    "InMemory",
    "Source",
    "StageProgress",
    "as_batches",
    "busy",
    "silent",
    "uncorrected",
]

TOL_IN_MEMORY = (
    "`tol` needs the whole model in memory (--in-memory) and one process, where plans are tried; block by block give "
    "`size` or `bits`"
)
"""What is said where a tolerance cannot be met."""

StageProgress: TypeAlias = "Callable[[str, int, int | None], object]"
"""Called as ``progress(stage, done, total)``.

``load`` and ``save`` have no steps; ``sample``, ``calibrate``, ``before`` and ``after`` count samples; ``plan`` and
``decompose`` layers, ``neurons`` feed-forward networks, ``write`` blocks.
"""


class Clock:
    """The seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as a stage.

        Parameters
        ----------
        name : str
            The name of the stage.
        """
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count more seconds, or fewer, to a stage.

        Parameters
        ----------
        name : str
            The name of the stage.
        seconds : float
            The seconds to count, negative to take some away.
        """
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Source(ABC):
    """A model that is compressed, and the text that it is measured on.

    Attributes
    ----------
    model : nn.Module
        Dense; its weights may be in memory a block at a time.
    text : list or None
        The text to measure on, in batches; None where statistics replace it.
    precision : Precision
        The precision of matrix products in passes over text.
    before : Size
        The size of the dense model.
    clock : Clock
        The seconds of each stage, for the report.
    progress : StageProgress or None
        Told how far each stage is.
    announce : callable
        Called with sentences on what was found.
    compressed : nn.Module
        The compressed model that :meth:`replace_layers` makes; perhaps the same object.
    made : Any
        The layers that :meth:`factor` made last, which may be put back after others were tried.
    """

    leads = True
    """Whether this process writes; of several that share the work one does."""

    offloaded = False
    """Whether weights are in memory only while their block is."""

    model: Any
    text: list[Any] | None
    precision: Precision
    before: Size
    clock: Clock
    progress: StageProgress | None
    announce: Callable[[str], object]
    compressed: Any
    made: Any

    def watch(self, stage: str) -> Callable[[int, int | None], object] | None:
        """Return a callback for the steps of one stage.

        Parameters
        ----------
        stage : str
            The name of the stage.
        """
        return None if self.progress is None else functools.partial(self.progress, stage)

    @property
    def origin(self) -> Origin:
        """Where the model came from."""
        return origin_of(self.model)

    def check(self, asked: Asked) -> list[str]:
        """Name the layers to measure, refusing before any forward pass what could not be compressed.

        Parameters
        ----------
        asked : Asked
            The configuration to plan by, or the plan to apply.

        Returns
        -------
        list of str
            The names of the layers to measure.
        """
        if isinstance(asked, Plan):
            asked.check(self.model)
            return [name for entry in asked.entries for name in entry.measured]
        with unrolled(self.model):
            names = candidates(self.model, asked, offloaded=self.offloaded)
        if isinstance(asked, BudgetConfig) and not self.offloaded:
            names += [
                each
                for name, tied in priced_vocabulary(self.model, asked).items()
                for each in (name, *tied)
                if each not in names
            ]
        return names

    def settled(self, asked: Asked) -> tuple[Asked, tuple[str, ...]]:
        """Return what can be asked of the model, and a sentence for everything that is left out.

        Parameters
        ----------
        asked : Asked
            The configuration to plan by, or the plan to apply.

        Returns
        -------
        Asked, tuple of str
            The same, or a configuration without what the model does not have.
        """
        return asked, ()

    @abstractmethod
    def known(self) -> Statistics | None:
        """Return statistics to use instead of measuring, None if there are none."""

    def use(self, known: Statistics, names: Sequence[str], asked: Asked) -> Statistics:
        """Prepare to go on with statistics that are known; returns them.

        Parameters
        ----------
        known : Statistics
            The statistics that are known.
        names : sequence of str
            The names of the layers that they should cover.
        asked : Asked
            The configuration to plan by, or the plan to apply.

        Returns
        -------
        Statistics
            The statistics to go on with.
        """
        return known

    @abstractmethod
    def write_text(self, share: float, *, seed: int) -> float:
        """Add text that the model writes itself, as a multiple of what is there; returns how much there was.

        Parameters
        ----------
        share : float
            The amount of text to write, as a multiple of the text that is there.
        seed : int
            The seed of the draws.

        Returns
        -------
        float
            The share that was written: `share`, or 0 if the model writes no text.
        """

    @abstractmethod
    def measure(self, names: Sequence[str], asked: Asked, *, own_text: float = 0.0) -> Statistics:
        """Measure some layers on the text, of which the model may have written some, and keep the statistics.

        Parameters
        ----------
        names : sequence of str
            The names of the layers to measure.
        asked : Asked
            The configuration to plan by, or the plan to apply.
        own_text : float, default 0.0
            The amount of text that the model wrote itself, as a multiple of the rest.

        Returns
        -------
        Statistics
            The statistics of these layers.
        """

    @abstractmethod
    def layers(self, statistics: Statistics) -> Layers:
        """Return the layers with their statistics, for a plan.

        Parameters
        ----------
        statistics : Statistics
            Statistics that cover the layers.
        """

    @abstractmethod
    def factor(self, plan: Plan, statistics: Statistics) -> list[LayerReport]:
        """Factor the layers of a plan; returns a report on each, in the order of the plan. The model stays as it is.

        Parameters
        ----------
        plan : Plan
            The plan to apply.
        statistics : Statistics
            Statistics that cover the plan's layers.

        Returns
        -------
        list of LayerReport
            A report on each layer, in the order of the plan.
        """

    @abstractmethod
    def replace_layers(self) -> Size:
        """Put the factors in the place of the layers; returns the size of the compressed model.

        Returns
        -------
        Size
            The size of the compressed model.
        """

    @abstractmethod
    def kept(self) -> str:
        """Return the hash of the parameters that the compressed model shares with the dense one; empty if unknown."""

    @abstractmethod
    def judged(self, windows: Tensor) -> Callable[[Path | None], Divergence]:
        """Prepare to compare the compressed model with the dense one, which may be gone by then.

        Parameters
        ----------
        windows : Tensor
            Windows of tokens: int64, shape (count, length).

        Returns
        -------
        callable
            A function that compares them, given the directory that the compressed model was written to; None for what
            is in memory.

        Raises
        ------
        TypeError
            If the model is not a causal language model.
        """

    def on_trial(self, compare: Callable[[Path | None], Divergence]) -> Divergence:
        """Compare the model, with the layers that were made last, with the dense one, and leave it as it is.

        Parameters
        ----------
        compare : callable
            The function that :meth:`judged` returned.

        Returns
        -------
        Divergence
            How far the predictions are from the dense model's.

        Raises
        ------
        ValueError
            If the model is not in memory as a whole.
        """
        raise ValueError(TOL_IN_MEMORY)

    @abstractmethod
    def save(
        self, report: CompressionReport, target: Path, *, overwrite: bool, max_shard_size: int | str
    ) -> CompressionReport:
        """Write the compressed model; returns the report with what was found out on the way.

        Parameters
        ----------
        report : CompressionReport
            The report to save with the model.
        target : Path
            The path of the directory to create.
        overwrite : bool
            Whether a directory that exists may be replaced.
        max_shard_size : int or str
            The largest size of one file, in bytes or as text such as ``"5GB"``.

        Returns
        -------
        CompressionReport
            The report, with what was found out while writing.
        """


class InMemory(Source):
    """A model that is in memory, and is changed there.

    Parameters
    ----------
    model : nn.Module
        The dense model, which :meth:`replace_layers` alone changes.
    text : list or None
        The text to measure on, as batches of ``input_ids`` and ``attention_mask``.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer, which is saved beside the model.
    statistics : Statistics or Path, optional
        Statistics to use instead of measuring. A file is read if it exists, else it is written.
    precision : str, default "auto"
        The precision of matrix products in passes over text, as for :func:`~cur.integrations.collect`.
    progress : StageProgress, optional
        Told how far each stage is.
    announce : callable, optional
        Called with sentences on what was found.
    """

    def __init__(
        self,
        model: nn.Module,
        text: list[Any] | None,
        *,
        tokenizer: Any = None,
        statistics: Statistics | Path | None = None,
        precision: str = "auto",
        progress: StageProgress | None = None,
        announce: Callable[[str], object] | None = None,
    ) -> None:
        refuse_adapters(model)
        self.model = self.compressed = model
        self.text = text
        self.tokenizer = tokenizer
        self.precision = Precision.of(model, precision)  # one for all passes
        self.clock = Clock()
        self.progress = progress
        self.announce = announce or silent
        origin = origin_of(model)
        self.before = replace(model_size(model), file_bytes=weight_bytes(origin.source) if origin.source else None)
        self._statistics = statistics
        self.made: dict[str, CompressedLinear] = {}

    def check(self, asked: Asked) -> list[str]:
        """Name the layers to measure, refusing what could not be compressed, and text that the model cannot take."""
        names = super().check(asked)
        if self.text is not None:
            check_windows(self.model, self.text, name="calibration")
        return names

    def settled(self, asked: Asked) -> tuple[Asked, tuple[str, ...]]:
        """Leave out what the model does not have.

        That is text of its own, a loss of a module that is no transformer, and blocks that can be walked through.
        """
        if self.text is None or not isinstance(asked, (BudgetConfig, Plan)):
            return asked, ()
        self.check(asked)
        notes: list[str] = []
        given = self._statistics
        measured = (isinstance(given, Path) and given.exists()) or isinstance(given, Statistics)
        if not is_transformer(self.model) and isinstance(asked, BudgetConfig):
            asked = replace(asked, own_text=0.0)
            if asked.gradients and not measured and usage_of(self.model).loss is None:
                asked = replace(asked, gradients=False)
                notes.append(
                    "No loss is known, so layers count by the error of their outputs alone; pass "
                    "`loss(output, batch)` for gradients."
                )
        if asked.own_text and not measured and (fault := writing_fault(self.model)):
            asked = replace(asked, own_text=0.0)
            notes.append(f"No text of the model's own was measured: {fault}.")
        if asked.correction and (fault := self._correction_fault(asked)):
            asked = replace(asked, correction=0.0)
            notes.append(uncorrected(fault))
        for note in notes:
            self.announce(note)
        return asked, tuple(notes)

    def _correction_fault(self, asked: Asked) -> str | None:
        """Say why layers cannot be fitted to what compressed ones before them give, as a pass over one batch tells."""
        assert self.text is not None
        if fault := chain_fault(self.model, self.text[0]):
            return fault
        names = self.check(asked)
        with unrolled(self.model):
            return fitting_fault(self.model, self.text[0], names, precision=self.precision.name)

    def known(self) -> Statistics | None:
        """Return statistics that were given, or are in a file."""
        given = self._statistics
        if isinstance(given, Path):
            return Statistics.load(given) if given.exists() else None
        return given

    def use(self, known: Statistics, names: Sequence[str], asked: Asked) -> Statistics:
        """Say which tables and heads stay as they are, as these statistics do not have them."""
        if isinstance(asked, BudgetConfig) and (
            lacking := [name for name in priced_vocabulary(self.model, asked) if name not in known.counts]
        ):
            self.announce(
                f"{', '.join(lacking)} stay as they are: the statistics do not have them; measure again without."
            )
        return known

    def write_text(self, share: float, *, seed: int) -> float:
        """Add text that the model writes itself; see :func:`~cur.integrations.measure.generated_text.own_text`."""
        assert self.text is not None
        if not is_transformer(self.model):
            return 0.0
        size = max(len(next(iter(batch.values()))) for batch in self.text)
        own = own_text(
            self.model,
            self.text,
            share=share,
            batch_size=size,
            seed=seed,
            precision=self.precision.name,
            progress=self.watch("sample"),
        )
        self.text = [*self.text, *own]
        return share if own else 0.0

    def measure(self, names: Sequence[str], asked: Asked, *, own_text: float = 0.0) -> Statistics:
        """Collect what a configuration or a plan needs, in one pass."""
        if self.text is None:
            raise ValueError("`text` must be given where no statistics are")
        measure = functools.partial(
            collect,
            self.model,
            self.text,
            modules=list(names),
            moments="full" if asked.needs_moments else "diagonal",
            gradients=_with_gradients(self.model, asked, names),
            gradient_checkpointing=asked.gradient_checkpointing,
            partial=True,
            seed=asked.seed,
            precision=self.precision.name,
            progress=self.watch("calibrate"),
        )
        with unrolled(self.model):
            by_angle = chooses_by_angle(self.model, asked)
            stacks = found_stacks(self.model) if by_angle or is_transformer(self.model) else []
            try:
                found = measure(layers=[name for stack in stacks for name, _ in stack])
            except ChainError:
                if by_angle:
                    raise
                found = measure(layers=())
        found = replace(found, own_text=own_text)
        if isinstance(self._statistics, Path):
            found.save(self._statistics)
        return found

    def layers(self, statistics: Statistics) -> Layers:
        """Return all layers at once."""
        return Layers(self.model, statistics, self.progress)

    def factor(self, plan: Plan, statistics: Statistics) -> list[LayerReport]:
        """Factor all layers, fitted to the inputs that compressed ones give, and compare outputs on the first batch."""
        with unrolled(self.model):
            with self.clock.stage("decompose"):
                self.made, reports = decompose(
                    self.model, plan, statistics, self.progress, text=self.text, precision=self.precision.name
                )
            if self.text is None:  # outputs are compared on a batch, which statistics do not hold
                return reports
            with self.clock.stage("outputs"):
                changes = output_changes(self.model, self.made, self.text[0])
                return [replace(done, output=changes.get(done.name)) for done in reports]

    def replace_layers(self) -> Size:
        """Swap the layers of the model."""
        with unrolled(self.model), self.clock.stage("swap"):
            swap_(self.model, self.made)
            # Of experts in one tensor, those that stay dense are views that would keep all of it in memory.
            release_(self.model)
            mark_(self.model)
        return model_size(self.model)

    def kept(self) -> str:
        """Return the hash of what was not compressed, which the model remembers."""
        origin = replace(origin_of(self.model), kept=kept_digest(self.model, changed_modules(self.model)))
        set_origin_(self.model, origin)
        return origin.kept

    def on_trial(self, compare: Callable[[Path | None], Divergence]) -> Divergence:
        """Put the layers into their places, compare, and put the dense ones back."""
        with unrolled(self.model):
            dense = swap_(self.model, self.made)
            try:
                return compare(None)
            finally:
                swap_(self.model, dense)

    def judged(self, windows: Tensor) -> Callable[[Path | None], Divergence]:
        """Keep what the dense model predicts."""
        how = self.precision.name
        reference = Reference(self.model, windows, precision=how, progress=self.watch("before"))
        return lambda _: reference.compare(self.model, precision=how, progress=self.watch("after"))

    def save(
        self, report: CompressionReport, target: Path, *, overwrite: bool, max_shard_size: int | str
    ) -> CompressionReport:
        """Write the model."""
        with busy(self.progress, "save"):
            save(
                self.model,
                self.tokenizer,
                target,
                report=report,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
            )
        return CompressionReport.load(target / REPORT)


@contextmanager
def busy(progress: StageProgress | None, stage: str) -> Iterator[None]:
    """Report a stage without steps while something of unknown length runs.

    Parameters
    ----------
    progress : StageProgress or None
        Called with the stage; None to report nothing.
    stage : str
        The name of the stage.
    """
    if progress is not None:
        progress(stage, 0, None)
    yield
    if progress is not None:
        progress(stage, 1, 1)


def uncorrected(fault: str) -> str:
    """Return the sentence that a report has where layers are not fitted to those before them.

    Parameters
    ----------
    fault : str
        What is in the way.
    """
    return f"Layers are not fitted to what compressed ones before them give: {fault}."


def silent(_: str) -> None:
    """Take a sentence that nobody wants to hear.

    Parameters
    ----------
    _ : str
        A sentence that is dropped.
    """


def as_batches(calibration: Any, batch_size: int, model: nn.Module | None = None) -> list[Any]:
    """Return batches of token windows, or the batches that were given, as a list: two passes may be made over them.

    Parameters
    ----------
    calibration : Tensor or iterable
        Windows of tokens, or batches.
    batch_size : int
        The number of windows in a batch, for windows.
    model : nn.Module, optional
        The model that reads them: of a module that is no transformer, one tensor or mapping is one batch. Default: a
        transformer.

    Raises
    ------
    TypeError
        If the calibration is no iterable.
    ValueError
        If there is no batch.
    """
    if model is not None and not is_transformer(model) and isinstance(calibration, (Tensor, Mapping)):
        return [calibration]
    if isinstance(calibration, Tensor):
        return list(batches(calibration, batch_size=batch_size))
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"`calibration` must be a tensor or an iterable of batches, got {type(calibration).__name__}; pass a list "
            "of batches, or a DataLoader"
        )
    given = list(calibration)
    if not given:
        raise ValueError("`calibration` is empty: it must hold at least one batch")
    return given


def _with_gradients(model: nn.Module, asked: Asked, names: Sequence[str]) -> list[str]:
    """Return the layers at whose outputs gradients are measured: of a head they would be a square of the vocabulary."""
    if isinstance(asked, Plan):
        names = [entry.name for entry in asked.entries if entry.needs_gradients]
    if not asked.needs_gradients:
        return []
    ends = {each for name, tied in vocabulary(model).items() for each in (name, *tied)}
    return [name for name in names if name not in ends or looks_up(model.get_submodule(name)) is not None]
