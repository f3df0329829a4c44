"""A model larger than memory as a source of blocks: each is loaded when its turn comes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cur.integrations.blockwise.calibrate import Calibration
from cur.integrations.blockwise.distributed import ProcessGroup
from cur.integrations.blockwise.journal import Journal
from cur.integrations.blockwise.rehearsal import Rehearsal
from cur.integrations.blockwise.score import compare_blockwise, reference_blockwise
from cur.integrations.blockwise.streamed_model import StreamedModel, load_streamed
from cur.integrations.blockwise.writer import fill
from cur.integrations.factor.making import Making, corrected, text_for
from cur.integrations.measure.propagation import in_order
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.precision import Precision
from cur.integrations.model.size import Size, model_size, weight_bytes
from cur.integrations.model.source import source_of
from cur.integrations.model.unrolling import release_, rolled, unroll_, unrolled
from cur.integrations.nn import CompressedLinear, stand_in, swap_
from cur.integrations.plan.config import Asked, BudgetConfig
from cur.integrations.plan.make import Layers
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport, LayerReport
from cur.integrations.report.divergence import Divergence
from cur.integrations.report.endings import output_head
from cur.integrations.report.outputs import output_changes
from cur.integrations.sources import Clock, Source, StageProgress, silent, uncorrected
from cur.integrations.store.checkpoint import REPORT, save
from cur.integrations.store.format import mark_, unique_state

__all__ = ["Streamed"]

T = TypeVar("T")

# The step of the journal that says that the statistics are in the file that was asked for.
_SAVED = "statistics-saved"

_COMPARED = "compared"


class Streamed(Source):
    """A model of which a block is in memory at a time, with a journal of what is finished.

    Parameters
    ----------
    streamed : StreamedModel
        The model, whose blocks are loaded in turn.
    text : list
        Batches, all of them; each process runs its share.
    journal : Journal
        The journal of the run, whose directory holds statistics, hidden states and factors.
    group : ProcessGroup
        The processes that share the work.
    precision : Precision
        The precision of matrix products in passes over text, the same in all processes.
    file : Path, optional
        A file of statistics: read if it exists, else written, as for :class:`~cur.integrations.sources.InMemory`.
    progress : StageProgress, optional
        Told how far each stage is.
    announce : callable, optional
        Called with sentences on what was found, by the leading process.

    Attributes
    ----------
    fault : str or None
        Why layers are not corrected, as a rehearsal has found; None if they are.
    stored : Path or None
        A file of statistics that was there when the run began.
    compressed : PreTrainedModel
        After :meth:`replace_layers`, on the meta device.
    """

    offloaded = True
    text: list[Any]

    def __init__(
        self,
        streamed: StreamedModel,
        text: list[Any],
        *,
        journal: Journal,
        group: ProcessGroup,
        precision: Precision,
        file: Path | None = None,
        progress: StageProgress | None = None,
        announce: Callable[[str], object] | None = None,
    ) -> None:
        self.streamed = streamed
        self.model = streamed.model
        self.text = text
        self.journal = journal
        self.group = group
        self.leads = group.leads
        self.precision = precision
        self.progress = progress
        self.announce = announce if announce is not None and group.leads else silent
        self.clock = Clock()
        self.before = replace(model_size(self.model), file_bytes=weight_bytes(streamed.shards.directory))
        self.compressed: Any = None
        self._file = file
        # What this run wrote itself, before it was ended, is not what it was begun with.
        self.stored = file if file is not None and file.exists() and journal.facts(_SAVED) is None else None
        self._calibration: Calibration | None = None
        self._reports: list[LayerReport] = []
        self.fault: str | None = None

    def rehearse(self, asked: Asked, names: Sequence[str], *, end: bool) -> None:
        """Refuse a model that cannot be run block by block, before anything is measured or written.

        Parameters
        ----------
        asked : Asked
            The configuration to plan by, or the plan to apply.
        names : sequence of str
            The names of the layers to measure.
        end : bool
            Whether the perplexity of the model is measured as well.

        Raises
        ------
        ChainError
            In the cases in which :meth:`Rehearsal.check` and :meth:`Rehearsal.correction_fault` raise it.
        """
        rehearsal = Rehearsal(self.streamed, self.text, self.precision)
        rehearsal.check(names if self.stored is None else None, end=end)
        if asked.correction:
            self.fault = rehearsal.correction_fault(names)

    def settled(self, asked: Asked) -> tuple[Asked, tuple[str, ...]]:
        """Leave out what a rehearsal could not do, as in memory."""
        if self.fault is None or not isinstance(asked, (BudgetConfig, Plan)):
            return asked, ()
        note = uncorrected(self.fault)
        self.announce(note)
        return replace(asked, correction=0.0), (note,)

    def check(self, asked: Asked) -> list[str]:
        """Name the layers to measure, refusing what could not be compressed, and what lies outside of the blocks."""
        names = super().check(asked)
        inside = {name for part in self.by_block(names).values() for name in part}
        if outside := [name for name in names if name not in inside]:
            raise ValueError(
                f"{outside[0]} lies outside of the blocks, which needs the whole model in memory; leave out block by "
                "block compression (--low-memory), or take it out of the plan"
            )
        return names

    def known(self) -> Statistics | None:
        """Return statistics that are in a file, without second moments, which are read block by block."""
        return None if self.stored is None else Statistics.load(self.stored, moments=False)

    def use(self, known: Statistics, names: Sequence[str], asked: Asked) -> Statistics:
        """Run the first batch alone, on which the change of each layer's output is measured."""
        return self._measured(names, asked)

    def write_text(self, share: float, *, seed: int) -> float:
        """Refuse to: a pass over all blocks for every word would be a pass over the disk."""
        raise ValueError(
            "`own_text` must be 0 block by block (--own-text 0): every word would take a pass over all blocks"
        )

    def measure(self, names: Sequence[str], asked: Asked, *, own_text: float = 0.0) -> Statistics:
        """Measure what is not measured yet; second moments stay on disk."""
        statistics = self._measured(names, asked)
        if self._file is not None and self.group.leads:
            self._measuring.save(self._file)
            self.journal.finish(_SAVED)
        return statistics

    def layers(self, statistics: Statistics) -> Layers:
        """Return the layers, a block of them in memory at a time, each process a share of the blocks."""
        return _Blocks(self, statistics)

    def factor(self, plan: Plan, statistics: Statistics) -> list[LayerReport]:
        """Factor block after block; factors go to disk.

        Each process takes a share of the blocks. Where layers are fitted to what compressed ones before them give, one
        process goes through all blocks and the others wait for it.
        """
        with self.clock.stage("outputs"):
            self.streamed.load_outside()
        named = {entry.name: entry for entry in plan.entries}
        blocks = self.by_block(list(named))
        names = corrected(self.model, plan)
        with self.clock.stage("decompose"):
            if names:
                if self.leads and any(self._factored(index) is None for index in blocks):
                    self._factor_in_order(plan, names, blocks)
                self.group.gather(None)
            else:
                self._measuring.bypass.free_embeddings()
                for index, inside in self.each(blocks, "decompose", step="factors"):
                    with self._making(plan, index, inside):
                        pass
        self.streamed.free_outside()
        found: dict[str, LayerReport] = {}
        for index in blocks:
            facts = self._factored(index) or {}
            found |= {data["name"]: LayerReport.from_dict(data) for data in facts["reports"]}
        self._reports = [found[entry.name] for entry in plan.entries]
        return self._reports

    def _factor_in_order(self, plan: Plan, names: list[str], blocks: dict[int, list[str]]) -> None:
        """Make the layers block after block, each fitted to the inputs that those before it give.

        In memory are one block and the hidden states of the text that layers are fitted on. Blocks that an earlier run
        finished are walked through with the factors that it stored.
        """
        makes: list[Callable[..., Callable[[torch.Tensor], torch.Tensor]]] = []
        done = 0

        @contextmanager
        def loaded(index: int) -> Iterator[None]:
            nonlocal done
            self.streamed.load_block(index)
            with unrolled(self.model):
                if index not in blocks:
                    yield
                elif (facts := self._factored(index)) is not None:
                    for stage, seconds in facts["seconds"].items():
                        self.clock.add(stage, seconds)
                    stored = self._stored_layers(index, facts)
                    makes[:] = [lambda name, _: stored[name]]
                    yield
                else:
                    with self._making(plan, index, blocks[index]) as making:
                        makes[:] = [making.make]
                        yield
            self.streamed.free_block(index)
            if index == self.streamed.starts[-1]:  # from here on blocks get hidden states
                self._measuring.bypass.free_embeddings()
            if self.progress is not None:
                done += len(blocks.get(index, ()))
                self.progress("decompose", done, len(plan.entries))

        in_order(
            self.model,
            text_for(plan, names, self.text),
            names,
            lambda name, propagated: makes[0](name, propagated),
            precision=self.precision.name,
            loaded=loaded,
        )

    @contextmanager
    def _making(self, plan: Plan, index: int, names: Sequence[str]) -> Iterator[Making]:
        """Make the layers of a block that is in memory, some while this lasts and the others at its end; store them."""
        # A plan of this block alone, as its weights are all that is in memory.
        begin = time.perf_counter()
        part = replace(plan, entries=tuple(entry for entry in plan.entries if entry.name in set(names)))
        part.check(self.model)
        making = Making(self.model, part, self.statistics_of(index))
        yield making
        layers, reports = making.rest()
        middle = time.perf_counter()
        # From the hidden state that measuring stored for this block: no block before it has to run again.
        self._measuring.bypass.active = index
        with self._measuring.bypass.open():
            changes = output_changes(self.model, layers, self.text[0])
        outputs = time.perf_counter() - middle
        self.clock.add("decompose", -outputs)
        self.clock.add("outputs", outputs)
        file = self._factors(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        # As they are stored in the end: steps of rounded factors in 16 bits, which only the values tell.
        save_file(
            {f"{name}.{key}": value for name, it in layers.items() for key, value in unique_state(it).items()}, file
        )
        done = [replace(report, output=changes.get(report.name)).to_dict() for report in reports]
        spent = {"decompose": time.perf_counter() - begin - outputs, "outputs": outputs}
        self.journal.finish(f"factors-{index:04}", [file], reports=done, seconds=spent)

    def _factored(self, index: int) -> dict[str, Any] | None:
        """Return what the journal says of a block that is factored, None if it is not."""
        return self.journal.facts(f"factors-{index:04}")

    def _stored_layers(self, index: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the replacements, by name, of the layers of a block that was finished earlier."""
        tensors, found = self.factors(index), {}
        for data in facts["reports"]:
            report = LayerReport.from_dict(data)
            layer = _empty(report, self.model.get_submodule(report.name))
            own = {key.removeprefix(f"{report.name}."): value for key, value in tensors.items()}
            layer.load_state_dict(
                {key: own[key].to(like.dtype) for key, like in layer.state_dict().items()}, assign=True
            )
            found[report.name] = layer.to(self.streamed.device).among_dense()
        return found

    def replace_layers(self) -> Size:
        """Make the compressed model, without its weights; the dense one stays as it is."""
        # On the meta device a copy costs nothing; the dense model is still needed for the weights that are copied.
        final = copy.deepcopy(self.model)
        unroll_(final)
        swap_(final, {done.name: _empty(done, final.get_submodule(done.name)) for done in self._reports})
        swap_(final, rolled(final, compressed=False))
        release_(final)
        mark_(final)
        self.compressed = final
        return model_size(final)

    def kept(self) -> str:
        """Return nothing: the hash is found while the weights are written."""
        return ""

    def judged(self, windows: torch.Tensor) -> Callable[[Path | None], Divergence]:
        """Compare both in the end: the dense model is still there, and its blocks are read once more."""
        output_head(self.model)

        def compared(written: Path | None) -> Divergence:
            assert written is not None
            facts = self.journal.facts(_COMPARED)
            if facts is None:
                streamed = self.streamed
                how: dict[str, Any] = {"precision": self.precision.name, "scratch": self.journal.directory}
                reference = reference_blockwise(streamed, windows, progress=self.watch("before"), **how)
                made = load_streamed(written, dtype=streamed.dtype, device=streamed.device)
                facts = compare_blockwise(made, reference, progress=self.watch("after"), **how).to_dict()
                self.journal.finish(_COMPARED, **facts)
            return Divergence.from_dict(facts)

        return compared

    def save(
        self, report: CompressionReport, target: Path, *, overwrite: bool, max_shard_size: int | str
    ) -> CompressionReport:
        """Write the checkpoint tensor by tensor, one block of the dense model in memory at a time."""
        streamed = self.streamed

        def write(place: Path) -> CompressionReport:
            kept = fill(
                self.compressed,
                streamed,
                place,
                max_shard_size,
                replaced=self.factors,
                dtypes=self.dtypes(),
                progress=self.progress,
            )
            return replace(report, kept=kept)

        with self.clock.stage("write"):
            save(
                self.compressed,
                streamed.tokenizer,
                target,
                report=report,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                source=source_of(streamed.model) or streamed.shards.directory,
                weights=write,
            )
        return replace(CompressionReport.load(target / REPORT), seconds=self.clock.seconds)

    def factors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the factors in one block by name; none if no layer of it is compressed.

        Parameters
        ----------
        index : int
            The number of the block.
        """
        if not self._factors(index).exists():
            return {}
        with safe_open(self._factors(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes in which factors are stored, by name; other than those that a model computes in."""
        found: dict[str, torch.dtype] = {}
        for index in range(len(self.streamed.blocks)):
            if self._factors(index).exists():
                with safe_open(self._factors(index), framework="pt") as file:
                    found |= {name: file.get_slice(name)[:0].dtype for name in file.keys()}  # noqa: SIM118
        return found

    def statistics_of(self, index: int) -> Statistics:
        """Return the statistics of one block, second moments and all.

        Parameters
        ----------
        index : int
            The number of the block.
        """
        return self._measuring.of_block(index)

    def by_block(self, names: Sequence[str]) -> dict[int, list[str]]:
        """Return the names of layers by the number of the block that they are in.

        Parameters
        ----------
        names : sequence of str
            The names of the layers.
        """
        found: dict[int, list[str]] = {}
        for index, (block, _) in enumerate(self.streamed.blocks):
            inside = [name for name in names if name.startswith(f"{block}.")]
            if inside:
                found[index] = inside
        return found

    def each(
        self, blocks: dict[int, list[str]], stage: str, *, step: str | None = None
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield this process's blocks, each while it is in memory, those finished left out; then meet the others.

        Parameters
        ----------
        blocks : dict of int to list of str
            The names of layers by the number of their block.
        stage : str
            The name of the stage, for progress.
        step : str, optional
            The name under which the journal has what is finished; None to leave out no block.

        Yields
        ------
        (int, list of str)
            The number of a block in memory, and the names of its layers.
        """
        own = self.group.share(list(blocks))
        total = sum(len(blocks[index]) for index in own)
        done = 0
        for index in own:
            if self.progress is not None:
                self.progress(stage, done, total)
            facts = None if step is None else self.journal.facts(f"{step}-{index:04}")
            if facts is not None:
                for name, seconds in facts["seconds"].items():
                    self.clock.add(name, seconds)
            else:
                self.streamed.load_block(index)
                with unrolled(self.model):
                    yield index, blocks[index]
                self.streamed.free_block(index)
            done += len(blocks[index])
        if self.progress is not None:
            self.progress(stage, total, total)
        self.group.gather(None)

    @property
    def _measuring(self) -> Calibration:
        assert self._calibration is not None, "statistics come first"
        return self._calibration

    def _measured(self, names: Sequence[str], asked: Asked) -> Statistics:
        self._calibration = Calibration(
            self.streamed,
            self.text,
            names,
            journal=self.journal,
            group=self.group,
            full=asked.needs_moments,
            precision=self.precision,
            stored=self.stored,
        )
        statistics = self._calibration.run(self.watch("calibrate"))
        self.clock.add("calibrate", self._calibration.earlier)
        return statistics

    def _factors(self, index: int) -> Path:
        return self.journal.directory / "factors" / f"{index:04}.safetensors"


class _Blocks(Layers):
    """The layers of a model of which a block is in memory at a time."""

    offloaded = True

    def __init__(self, source: Streamed, statistics: Statistics) -> None:
        super().__init__(source.model, statistics)
        self.source = source

    def groups(self, names: list[str]) -> Iterator[tuple[list[str], Statistics]]:
        for index, inside in self.source.each(self.source.by_block(names), "plan"):
            yield inside, self.source.statistics_of(index)

    def gather(self, found: dict[str, T]) -> dict[str, T]:
        return {name: value for part in self.source.group.gather(found) for name, value in part.items()}


def _empty(report: LayerReport, dense: nn.Module) -> CompressedLinear:
    """Return the compressed layer of a report without its factors, on the meta device."""
    made = stand_in(dense, report.name, report.spec(), device="meta")
    return made.train(dense.training)
