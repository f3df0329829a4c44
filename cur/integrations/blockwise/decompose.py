"""Plans and factors of single blocks, on disk until the checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cur.integrations.blockwise.calibrate import Calibration
from cur.integrations.compress import decompose
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.experts import unrolled
from cur.integrations.model.targets import linear_modules
from cur.integrations.nn import CompressedLinear, dense_weight, layer_class
from cur.integrations.plan.budget import error_curves, joint_curves, plan_budget
from cur.integrations.plan.config import BudgetConfig, CompressConfig
from cur.integrations.plan.make import chosen_blocks, layer_entries, plan_of
from cur.integrations.plan.plan import Plan, PlanEntry
from cur.integrations.plan.rate_distortion import LayerCurve, NeuronCurve
from cur.integrations.report.data import LayerReport
from cur.integrations.report.outputs import output_changes

__all__ = ["Decomposition"]

Progress = Callable[[str, int, "int | None"], object]


class Decomposition:
    """The factors of a model, block by block.

    Parameters
    ----------
    calibration : Calibration
        Run, with its journal and processes.
    statistics : Statistics
        What it returned.
    config : CompressConfig, BudgetConfig or Plan
        What is wanted.
    progress : callable, optional
        As for :func:`~cur.integrations.compress`.

    Attributes
    ----------
    outputs : float
        Seconds of this run that the changes of outputs took.
    earlier : dict of str to float
        Seconds that runs before this one, ended in some way, spent on blocks that this one need not factor, by stage.
    """

    def __init__(
        self,
        calibration: Calibration,
        statistics: Statistics,
        config: CompressConfig | BudgetConfig | Plan,
        progress: Progress | None = None,
    ) -> None:
        self.calibration = calibration
        self.skeleton = calibration.skeleton
        self.model = calibration.skeleton.model
        self.journal = calibration.journal
        self.team = calibration.team
        self.statistics = statistics
        self.config = config
        self.progress = progress
        self.outputs = 0.0
        self.earlier = {"decompose": 0.0, "outputs": 0.0}

    def plan(self) -> Plan:
        """Decide which layers are replaced at which rank; every block that may be is loaded once.

        Returns
        -------
        Plan
            That of the whole model, the same in all processes.
        """
        config = self.config
        if isinstance(config, Plan):
            return config
        with unrolled(self.model):
            if isinstance(config, BudgetConfig):
                names = self.calibration.names
                curves, neurons = self._curves(self._by_block(names), config)
                return plan_budget(self.model, self.statistics, config, [curves[name] for name in names], neurons)
            chosen = chosen_blocks(self.model, self.statistics, config)
            wanted = set(linear_modules(self.model, config.targets, exclude=config.exclude, layers=chosen))
            names = [name for name in self.calibration.names if name in wanted]
        entries = self._entries(self._by_block(names), config)
        with unrolled(self.model):
            found = [entries[name] for name in names if name in entries]
            return plan_of(self.model, self.statistics, config, found, names)

    def carry_out(self, plan: Plan, probe: Any) -> list[LayerReport]:
        """Factor the layers of a plan, each process a share of the blocks; return reports in the order of the plan."""
        named = {entry.name: entry for entry in plan.entries}
        for index, names in self._each(self._by_block(list(named)), "factors", "decompose"):
            begin = time.perf_counter()
            part = replace(plan, entries=tuple(named[name] for name in names))
            layers, reports = decompose(self.model, part, self.calibration.of_block(index))
            middle = time.perf_counter()
            self.calibration.tunnel.active = index
            with self.calibration.tunnel.open():
                changes = output_changes(self.model, layers, probe)
            outputs = time.perf_counter() - middle
            self.outputs += outputs
            file = self._file(index)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()},
                file,
            )
            done = [asdict(replace(report, output=changes.get(report.name))) for report in reports]
            spent = {"decompose": time.perf_counter() - begin - outputs, "outputs": outputs}
            self.journal.finish(f"factors-{index:04}", [file], reports=done, seconds=spent)
        found: dict[str, LayerReport] = {}
        for index in self._by_block(list(named)):
            facts = self.journal.facts(f"factors-{index:04}") or {}
            found |= {data["name"]: LayerReport.from_dict(data) for data in facts["reports"]}
        return [found[entry.name] for entry in plan.entries]

    def stand_in(self, report: LayerReport, dense: nn.Module) -> CompressedLinear:
        """Return the compressed layer of a report without its factors, on the meta device."""
        weight, bias, transposed = dense_weight(dense, report.name)
        m, n = weight.shape
        made: CompressedLinear = layer_class(report.layout)(
            n,
            m,
            report.rank,
            inner_rank=report.inner_rank,
            bias=bias is not None,
            transposed=transposed,
            device="meta",
            dtype=weight.dtype,
        )
        return made.train(dense.training).requires_grad_(next(dense.parameters()).requires_grad)

    def factors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the factors in one block by name; none if no layer of it is compressed."""
        if not self._file(index).exists():
            return {}
        with safe_open(self._file(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _curves(
        self, blocks: dict[int, list[str]], config: BudgetConfig
    ) -> tuple[dict[str, LayerCurve], list[NeuronCurve]]:
        found: dict[str, LayerCurve] = {}
        neurons: dict[int, list[NeuronCurve]] = {}
        for index, names in self._each(blocks, None, "plan"):
            statistics = self.calibration.of_block(index)
            found |= {curve.name: curve for curve in error_curves(self.model, statistics, config, names)}
            neurons[index] = joint_curves(self.model, statistics, config, names)
        layers = {name: curve for part in self.team.gather(found) for name, curve in part.items()}
        groups = {index: curves for part in self.team.gather(neurons) for index, curves in part.items()}
        return layers, [curve for index in sorted(groups) for curve in groups[index]]

    def _entries(self, blocks: dict[int, list[str]], config: CompressConfig) -> dict[str, PlanEntry]:
        found: dict[str, PlanEntry] = {}
        for index, names in self._each(blocks, None, "plan"):
            entries = layer_entries(self.model, self.calibration.of_block(index), config, names)
            found |= {entry.name: entry for entry in entries}
        return {name: entry for part in self.team.gather(found) for name, entry in part.items()}

    def _each(self, blocks: dict[int, list[str]], step: str | None, stage: str) -> Any:
        """Yield this process's blocks, each while it is in memory, those finished left out; then meet the others."""
        own = self.team.share(list(blocks))
        total = sum(len(blocks[index]) for index in own)
        done = 0
        for index in own:
            if self.progress is not None:
                self.progress(stage, done, total)
            facts = None if step is None else self.journal.facts(f"{step}-{index:04}")
            if facts is not None:
                for name, seconds in facts["seconds"].items():
                    self.earlier[name] += seconds
            else:
                self.skeleton.load_block(index)
                with unrolled(self.model):
                    yield index, blocks[index]
                self.skeleton.free_block(index)
            done += len(blocks[index])
        if self.progress is not None:
            self.progress(stage, total, total)
        self.team.gather(None)

    def _by_block(self, names: Sequence[str]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for index, (block, _) in enumerate(self.skeleton.blocks):
            inside = [name for name in names if name.startswith(f"{block}.")]
            if inside:
                found[index] = inside
        return found

    def _file(self, index: int) -> Path:
        return self.journal.directory / "factors" / f"{index:04}.safetensors"
