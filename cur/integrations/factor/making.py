"""The layers of a plan, made one after the other: on their own, or fitted to what those before them give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cur.integrations.factor.gridded import on_grids
from cur.integrations.factor.methods import Task, make_layers
from cur.integrations.measure.moments import Moments, x_norm
from cur.integrations.measure.propagation import InputMoments, in_order, spread
from cur.integrations.measure.spectra import spectrum
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.blocks import are_in_line
from cur.integrations.nn import CompressedLinear, dense_weight
from cur.integrations.plan.plan import PRECISIONS, Plan
from cur.integrations.report.data import LayerReport

__all__ = ["Making", "corrected", "decompose", "text_for"]


class Making:
    """Some layers of a plan while they are made.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    plan : Plan
        The plan, which has an entry for each layer to make.
    statistics : Statistics
        Statistics that cover the plan's layers.
    progress : callable, optional
        Called as ``progress(done)`` before each layer is made.

    Attributes
    ----------
    layers : dict of str to CompressedLinear
        The layers made so far, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        statistics: Statistics,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.progress = progress
        self.layers: dict[str, CompressedLinear] = {}
        self._reports: dict[str, LayerReport] = {}
        self._entries = {entry.name: entry for entry in plan.entries}
        self._task = Task(
            model=model,
            entries=self._entries,
            moments=Moments(statistics),
            dtype=PRECISIONS[plan.precision],
            seed=plan.seed,
            correction=plan.correction,
        )

    def make(self, name: str, propagated: InputMoments | None = None) -> Callable[[Tensor], Tensor]:
        """Make a layer, fitted to the inputs that it gets if they are known; returns what is called in its place.

        Parameters
        ----------
        name : str
            The name of the layer.
        propagated : InputMoments, optional
            Moments of the inputs that compressed layers before it give; None to fit it to nothing.

        Returns
        -------
        callable
            The replacement to call while later layers are made.
        """
        if self.progress is not None:
            self.progress(len(self.layers))
        entry = self._entries[name]
        made = on_grids(self._task, entry, make_layers(self._task, entry, propagated), propagated)
        for each, (layer, report) in made.layers.items():
            self.layers[each] = layer
            if self._entries[each].of_weight:
                weight = dense_weight(self.model.get_submodule(each), each)[0].detach()
                report = replace(report, spectrum=spectrum(weight, x_norm(self.statistics, each)))
            self._reports[each] = report
        return made.replacement

    def rest(self) -> tuple[dict[str, CompressedLinear], list[LayerReport]]:
        """Make those that are not made yet; returns all layers by name and a report on each, as the plan has them.

        Returns
        -------
        dict of str to CompressedLinear, list of LayerReport
            All layers by name, and a report on each, in the order of the plan.
        """
        for name, layer in self.layers.items():  # perhaps made while the model was in evaluation mode
            layer.train(self.model.get_submodule(name).training)
        for name, entry in self._entries.items():
            if name not in self.layers:
                self.make(entry.made_with)
        names = list(self._entries)
        return {name: self.layers[name] for name in names}, [self._reports[name] for name in names]


def corrected(model: nn.Module, plan: Plan) -> list[str]:
    """Name the layers that are fitted to what compressed ones before them give.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    plan : Plan
        The plan, which says how much is corrected.

    Returns
    -------
    list of str
        The names of the layers that are fitted to the inputs that compressed layers before them give.
    """
    if plan.correction <= 0 or not are_in_line(model):
        return []
    return [entry.name for entry in plan.entries if entry.fits_inputs and not entry.layer_type.by_inputs]


def text_for(plan: Plan, names: Sequence[str], text: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the batches, from all over a text, that layers are fitted on.

    Parameters
    ----------
    plan : Plan
        The plan, which has the shapes of the layers.
    names : sequence of str
        The names of the layers to fit.
    text : sequence of mapping
        The batches to choose from.
    """
    return spread(text, max((entry.shape[1] for entry in plan.entries if entry.name in set(names)), default=1))


def decompose(
    model: nn.Module,
    plan: Plan,
    statistics: Statistics,
    progress: Callable[[str, int, int | None], object] | None = None,
    *,
    text: Sequence[Mapping[str, Any]] | None = None,
    precision: str = "auto",
) -> tuple[dict[str, CompressedLinear], list[LayerReport]]:
    """Make the layers of a plan; return the replacements by name, and a report on each.

    With batches of text, layers of a plan that asks for a correction are fitted to the inputs that compressed layers
    before them give.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    plan : Plan
        The plan, which has an entry for each layer to make.
    statistics : Statistics
        Statistics that cover the plan's layers.
    progress : callable, optional
        Called as ``progress("decompose", done, total)`` before each layer is made.
    text : sequence of mapping, optional
        Batches of text to fit layers on, as far as the plan asks for a correction.
    precision : str, default "auto"
        The precision of matrix products in passes over text.

    Returns
    -------
    dict of str to CompressedLinear, list of LayerReport
        The replacements by the names of their layers, and a report on each.
    """
    plan.check(model)
    total = len(plan.entries)
    making = Making(
        model, plan, statistics, None if progress is None else lambda done: progress("decompose", done, total)
    )
    if text is not None and (names := corrected(model, plan)):
        in_order(model, text_for(plan, names, text), names, making.make, precision=precision)
    layers, reports = making.rest()
    if progress is not None:
        progress("decompose", total, total)
    return layers, reports
