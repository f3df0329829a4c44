"""Statistics of a model, block by block: every block is loaded once, and every hidden state is computed once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cur.integrations.blockwise.bypass import KEPT, Bypass
from cur.integrations.blockwise.distributed import ProcessGroup
from cur.integrations.blockwise.hidden_states import HiddenStates
from cur.integrations.blockwise.journal import Journal
from cur.integrations.blockwise.streamed_model import StreamedModel
from cur.integrations.files.tensor_file import TensorFile
from cur.integrations.measure.collect import collect
from cur.integrations.measure.statistics import Statistics, by_stack
from cur.integrations.model.hashing import Seen
from cur.integrations.model.masks import Masks
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import body, evaluating, model_inputs, run

__all__ = ["Calibration", "text_hash"]


class Calibration:
    """The pass over a model that measures it.

    Parameters
    ----------
    streamed : StreamedModel
        The model, whose blocks are loaded in turn.
    given : sequence
        Batches, all of them; each process runs its share.
    names : sequence of str
        The names of the layers to measure.
    journal : Journal
        The journal of the run, which keeps statistics block by block.
    group : ProcessGroup
        The processes that share the work.
    full : bool
        Whether full second moments are gathered.
    precision : Precision
        The precision of matrix products in the passes, the same in all processes.
    stored : Path, optional
        A file of statistics to use instead of measuring; then only the first batch is run, on which the
        change of each layer's output is measured.

    Attributes
    ----------
    earlier : float
        Seconds that runs before this one, ended in some way, spent on blocks that this one need not measure.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        given: Sequence[Any],
        names: Sequence[str],
        *,
        journal: Journal,
        group: ProcessGroup,
        full: bool,
        precision: Precision,
        stored: Path | None = None,
    ) -> None:
        if len(given) < group.size:
            raise ValueError(
                f"{group.size} processes share {len(given)} batches of calibration text: start no more processes than "
                "batches, or lower `batch_size`"
            )
        self.streamed = streamed
        self.given = list(given)
        self.names = list(names)
        self.journal = journal
        self.group = group
        self.full = full
        self.precision = precision
        self.stored = stored
        self.running = self.given if stored is None else self.given[:1]
        self.states = HiddenStates(journal.directory / "states", streamed.device)
        self.bypass = Bypass(streamed, self.states)
        self.earlier = 0.0
        self._inputs = body(streamed.model)

    def of_block(self, index: int) -> Statistics:
        """Return the statistics of one block, as they were stored.

        Parameters
        ----------
        index : int
            The number of the block.
        """
        if self.stored is not None:
            inside = f"{self.streamed.blocks[index][0]}."
            return Statistics.load(self.stored, modules=[name for name in self.names if name.startswith(inside)])
        return Statistics.load(self._file(index))

    def run(self, progress: Callable[[int, int | None], object] | None = None) -> Statistics:
        """Measure what is not measured yet.

        Parameters
        ----------
        progress : callable, optional
            Called as ``progress(done, total)`` after every batch of every block.

        Returns
        -------
        Statistics
            Statistics of all blocks, without second moments, which :meth:`of_block` has.
        """
        own = self.group.share(self.running)
        count = len(self.streamed.blocks)
        spent = self.group.agree(self._finished())
        # The states of another number of processes, or of a run that was killed, may be incomplete.
        if 0 < len(spent) < count and not all(self.group.gather(self._ready(len(spent) - 1, own))):
            spent = []
        first, self.earlier = len(spent), sum(spent)
        for index in range(first):
            facts = self.journal.facts(_step(index)) or {}
            self.streamed.read.update(facts["read"])
            self.bypass.starts.update(facts["starts"])
        with self.bypass.open():
            if first < count:
                self.streamed.load_outside()
                if first > 0:
                    self.bypass.free_embeddings()
            for index in range(first, count):
                self._measure(index, own, progress)
        self.streamed.free_outside()
        return self._merged() if self.stored is None else Statistics.load(self.stored, moments=False)

    def save(self, path: Path) -> None:
        """Write the statistics of all blocks into one file, as :meth:`Statistics.save` does, block by block.

        Parameters
        ----------
        path : Path
            The path of the file to write.
        """
        whole = self._merged()
        shared: dict[str, dict[str, str]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for index in range(len(self.streamed.blocks)):
            with safe_open(self._file(index), framework="pt") as part:
                for kind, owners in json.loads(part.metadata()["facts"])["shared"].items():
                    shared.setdefault(kind, {}).update(owners)
                for key in set(part.keys()) - {"angles"}:
                    shape = part.get_slice(key).get_shape()
                    tensors[key] = torch.empty(shape, dtype=torch.float64, device="meta")
        if whole.angles is not None:
            tensors["angles"] = whole.angles
        scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            file = TensorFile(scratch, tensors, whole.metadata(shared))
            for index in range(len(self.streamed.blocks)):
                with safe_open(self._file(index), framework="pt") as part:
                    for key in set(part.keys()) - {"angles"}:
                        file.write(key, part.get_tensor(key))
            if whole.angles is not None:
                file.write("angles", whole.angles)
            file.close()
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def _finished(self) -> list[float]:
        """Return the seconds of all blocks, from the first on, whose statistics are there."""
        spent: list[float] = []
        for index in range(len(self.streamed.blocks)):
            facts = self.journal.facts(_step(index))
            if facts is None:
                break
            spent.append(facts["seconds"])
        return spent

    def _keys(self, batches: Sequence[Any]) -> list[str]:
        return [self.bypass.key(model_inputs(self._inputs, batch)) for batch in batches]

    def _ready(self, index: int, own: Sequence[Any]) -> bool:
        """Say whether all that block `index + 1` needs is stored and intact."""
        places = [self.bypass.place(index), *(place for kind in KEPT for place in self.states.places(kind))]
        facts = self.journal.facts(_step(index)) or {}
        places += [self.bypass.place(end - 1) for end in facts.get("starts", ()) if 0 < end <= index]
        return all(self.states.intact(place, key) for place in places for key in self._keys(own))

    def _measure(self, index: int, own: list[Any], progress: Callable[[int, int | None], object] | None) -> None:
        name = self.streamed.blocks[index][0]
        before = index * len(self.running)
        whole = len(self.streamed.blocks) * len(self.running)
        each = len(self.running) / max(len(own), 1)
        begin = time.perf_counter()
        done = 0

        def step(*_: Any) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(before + round(done * each), whole)

        with self.bypass.at(index):
            if self.stored is None:
                statistics = collect(
                    self.streamed.model,
                    own,
                    modules=[layer for layer in self.names if layer.startswith(f"{name}.")],
                    moments="full" if self.full else "diagonal",
                    layers=[name],
                    partial=True,
                    precision=self.precision.name,
                    progress=step,
                )
            else:
                with evaluating(self.streamed.model), self.precision.products():
                    for batch in own:
                        run(self._inputs, model_inputs(self._inputs, batch))
                        step()
        files = []
        if self.stored is None:
            statistics = self.group.reduce(statistics)
            files.append(self._file(index))
        if self.group.leads:
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                replace(statistics, text_hash=text_hash(self._inputs, self.given)).save(file)
            found = {"read": sorted(self.streamed.read), "starts": sorted(self.bypass.starts)}
            self.journal.finish(_step(index), files, seconds=time.perf_counter() - begin, **found)
        self.group.agree(True)  # nobody removes what a run that is killed now would need
        if self.group.leads:
            # The first batch stays everywhere: on it the change of each layer's output is measured.
            self.bypass.drop_before(index, keep=self._keys(self.given[:1])[0])

    def _file(self, index: int) -> Path:
        return self.journal.directory / "statistics" / f"{index:04}.safetensors"

    def _merged(self) -> Statistics:
        parts = [self.of_block(index) for index in range(len(self.streamed.blocks))]
        names = tuple(name for name, _ in self.streamed.blocks)
        return replace(
            parts[0],
            square_sums=_united([part.square_sums for part in parts]),
            counts=_united([part.counts for part in parts]),
            products={},
            angles=_neighbours(names, parts),
            layers=names,
        )


def text_hash(model: Any, given: Sequence[Mapping[str, Any] | torch.Tensor]) -> str:
    """Return the hash of all calibration inputs, as :func:`~cur.integrations.collect` computes it.

    Parameters
    ----------
    model : Any
        The model, which says what its inputs are called.
    given : sequence of mapping or Tensor
        The batches of text.
    """
    seen, masks = Seen(), Masks(model)
    for batch in given:
        inputs = model_inputs(model, batch)
        masks.start(inputs, batch)
        seen.add(inputs, masks.of_inputs)
    return seen.hexdigest()


def _step(index: int) -> str:
    return f"statistics-{index:04}"


def _united(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _neighbours(names: tuple[str, ...], parts: Sequence[Statistics]) -> torch.Tensor:
    """Return the matrix of angular distances with those between neighbours alone; NaN for pairs that never met."""
    corners = []
    first = 0
    for stack in by_stack(names):
        angles = torch.full((len(stack) + 1, len(stack) + 1), torch.nan, dtype=torch.float64).fill_diagonal_(0.0)
        for offset in range(len(stack)):
            measured = parts[first + offset].angles
            if measured is not None:
                angles[offset, offset + 1] = angles[offset + 1, offset] = measured[0, 1]
        corners.append(angles)
        first += len(stack)
    whole: torch.Tensor = torch.block_diag(*corners)  # type: ignore[no-untyped-call]
    return whole
