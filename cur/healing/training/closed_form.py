r"""The best core for given inputs, without a learning rate: least squares, block after block.

A compressed layer computes ``L U (R x) + b``. With the student's own input ``x`` (which carries the errors of the
blocks before), ``z = R x``, and a wanted output ``y``,

.. math:: \min_U \; \sum_t \|H^{1/2} (y_t - b - L U z_t)\|^2 + \lambda \, \|H^{1/2} L (U - U_0)\|_F^2

has the solution ``U = U_0 + M^+ (B - M U_0 G) (G + \lambda I)^-1`` with ``M = L^T H L``, ``G = \sum z z^T`` and
``B = L^T H \sum (y - b) z^T``. Only ``G`` and ``\sum y z^T`` are kept, summed in float64, so that memory does not grow
with the text. Rows and columns were chosen to be well conditioned (condition numbers of C up to 20 and of R x up to 150
were met on a real model), so that normal equations in float64 lose nothing that matters.

The wanted output is ``W (x + s (x' - x))`` with the dense weight ``W`` and the teacher's input ``x'``. ``s = 1`` is the
teacher's output, and corrects what the blocks before did wrong; ``s = 0`` is what the dense layer would make of the
student's input (or, where neurons were removed and the dense layer cannot take it, what the student makes of it).
Least squares against the teacher's output shrinks a layer wherever its input is uncertain, as every regression on noisy
inputs does, and the next blocks suffer from that: a part of the correction does better than all.

``H`` says how much each output matters: the second moment of the gradients of the teacher's loss there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cur._lib.errors import NumericalError
from cur.healing.pair.cores import Core
from cur.healing.pair.pair import TeacherStudentPair
from cur.healing.report import LayerFit
from cur.integrations.model.blocks import BlockCall
from cur.integrations.model.hooks import hooked, inputs_of
from cur.integrations.model.masks import padding_mask, token_rows
from cur.integrations.model.pauses import Course, layer_groups, pauses
from cur.integrations.model.running import model_inputs

__all__ = ["LeastSquares", "closed_form_", "solve_block_"]


class LeastSquares:
    """The normal equations of one core, summed over a stream of inputs and wanted outputs.

    Parameters
    ----------
    core : Core
        The core to solve for, whose present value is ``U_0``.
    metric : Tensor, optional
        ``H``, m x m, positive semidefinite. Default: the identity.

    Examples
    --------
    >>> import torch
    >>> from cur.healing.pair.cores import Core
    >>> from cur.integrations import CURLinear
    >>> _ = torch.manual_seed(0)
    >>> layer, x = CURLinear(6, 5, 3, bias=False), torch.randn(40, 6)
    >>> wanted = x @ (layer.C.weight @ torch.randn(3, 3) @ layer.R.weight).T
    >>> problem = LeastSquares(Core("layer", layer))
    >>> problem.add(x, wanted.detach())
    >>> problem.core.write_(problem.solve(ridge=0.0))
    >>> bool(torch.dist(layer(x), wanted) <= 1e-5 * torch.linalg.norm(wanted))
    True
    """

    def __init__(self, core: Core, metric: Tensor | None = None) -> None:
        self.core = core
        m, r = core.left.shape
        place = core.left.device
        self.metric = None if metric is None else metric.to(place, torch.float64)
        left = core.left.double()
        # The metric of every output costs more than all else, and only serves the report: single precision will do.
        self._seen = left.T if self.metric is None else left.T @ self.metric
        self._single = None if self.metric is None else self.metric.float()
        self.gram = torch.zeros(r, r, dtype=torch.float64, device=place)
        self.cross = torch.zeros(m, r, dtype=torch.float64, device=place)
        self.inside = torch.zeros(r, r, dtype=torch.float64, device=place)
        self.square = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, wanted: Tensor) -> None:
        """Add tokens: their inputs (tokens, n) and the outputs they should have (tokens, m), bias included.

        Parameters
        ----------
        x : Tensor
            The inputs of the layer, of shape (tokens, n).
        wanted : Tensor
            The outputs that it should have, of shape (tokens, m).
        """
        z = (x.float() @ self.core.right.float().T).double()
        bias = self.core.layer.bias_tensor()
        y = wanted.double() if bias is None else wanted.double() - bias.double()
        self.gram += z.T @ z
        self.cross += y.T @ z
        seen = self._seen @ y.T
        self.inside += seen @ seen.T
        single = y.float()
        self.square += float((single * (single if self._single is None else single @ self._single)).sum())

    def _weighted(self, columns: Tensor) -> Tensor:
        return columns if self.metric is None else self.metric @ columns

    def solve(self, *, ridge: float) -> Tensor:
        """Return the best core, float64, r x r.

        Parameters
        ----------
        ridge : float
            ``lambda``, relative to the mean eigenvalue of ``G``.

        Raises
        ------
        NumericalError
            If the sums are not finite.
        """
        left = self.core.left.double()
        M = left.T @ self._weighted(left)
        start = self.core.value
        rest = left.T @ self._weighted(self.cross) - M @ start @ self.gram
        if not bool(torch.isfinite(rest).all()):
            raise NumericalError(f"the inputs or wanted outputs of {self.core.name} are not finite")
        inner, V = torch.linalg.eigh(self.gram)
        outer, P = torch.linalg.eigh(M)
        scale = inner + ridge * inner.mean()
        # What the columns of L, or the inputs, do not reach at all stays as it is.
        step = (P.T @ rest @ V) * _reciprocal(outer)[:, None] * _reciprocal(scale)
        best: Tensor = start + P @ step @ V.T
        return best

    def error(self, U: Tensor) -> float:
        """Return the squared error of a core relative to the squared norm of the wanted outputs, both in ``H``.

        Parameters
        ----------
        U : Tensor
            The core to judge, of shape (r, r).
        """
        left = self.core.left.double()
        M, B = left.T @ self._weighted(left), left.T @ self._weighted(self.cross)
        value = float((U * (M @ U @ self.gram - 2 * B)).sum()) + self.square
        return max(value, 0.0) / self.square if self.square else 0.0

    def floor(self) -> float:
        """Return the relative squared error that is left whatever the core: the outputs outside the span of L."""
        left = self.core.left.double()
        values, P = torch.linalg.eigh(left.T @ self._weighted(left))
        reached = float(((P.T @ self.inside @ P).diagonal() * _reciprocal(values)).sum())
        return max(self.square - reached, 0.0) / self.square if self.square else 0.0


def _reciprocal(values: Tensor) -> Tensor:
    """Return ``1 / values``, zero where they are zero up to rounding."""
    small = len(values) * torch.finfo(values.dtype).eps * values.max()
    return torch.where(values > small, 1 / values, 0.0)


def closed_form_(
    pair: TeacherStudentPair,
    batches: Sequence[Mapping[str, Any]],
    *,
    ridge: float,
    correction: float,
    metrics: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[LayerFit]:
    """Put the best core for some text into every compressed layer, in place, from the first block to the last.

    A block is solved in the order in which it calls its layers, and the layers that are called with one input (query
    and key) together; then the student's hidden states go through the block as it is now. Memory: the hidden states of
    all batches, twice, the teacher's inputs of one block's layers, and what the student's block holds where it pauses.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    batches : sequence of mapping
        The text that outputs are compared on.
    ridge : float
        The weight of the pull towards the present core, see :meth:`LeastSquares.solve`.
    correction : float
        ``s``, from 0 to 1: how much of the difference between the teacher's inputs and the student's is corrected.
    metrics : mapping of str to Tensor, optional
        The metric ``H`` on the outputs of each layer, by the layer's name.
    progress : callable, optional
        Called as ``progress(done, total)`` after every compressed block.

    Returns
    -------
    list of LayerFit
        The fits of the layers, in the order in which they were solved.

    Raises
    ------
    NumericalError
        If an activation is not finite; layers that were solved before stay solved.
    RuntimeError
        If a block does not call its layers in the same order in every batch.
    """
    fits: list[LayerFit] = []
    student, teacher = pair.student, pair.teacher
    with torch.no_grad(), pair.precision.products():
        entered = [teacher.calls(batch) for batch in batches]
        masks = [padding_mask(model_inputs(teacher.model, batch)) for batch in batches]
        theirs, calls = [hidden for hidden, _ in entered], [each for _, each in entered]
        del entered
        ours = theirs
        for index in range(pair.last + 1):
            block, at = teacher.blocks[index][1], [call[index] for call in calls]
            after, wanted = [], []
            for call, hidden in zip(at, theirs, strict=True):
                with inputs_of(teacher.model, pair.inside(index)) as seen:
                    after.append(call(block, hidden))
                wanted.append(seen)
            theirs = after
            if index < pair.first:
                ours = after
                continue
            solved, ours = solve_block_(
                pair, index, at, ours, wanted, masks, ridge=ridge, correction=correction, metrics=metrics or {}
            )
            fits += solved
            if solved and progress is not None:
                progress(student.compressed.index(index) + 1, len(student.compressed))
    return fits


def solve_block_(
    pair: TeacherStudentPair,
    index: int,
    calls: Sequence[BlockCall],
    ours: Sequence[Tensor],
    wanted: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Tensor | None],
    *,
    ridge: float,
    correction: float,
    metrics: Mapping[str, Tensor],
) -> tuple[list[LayerFit], list[Tensor]]:
    """Put the best cores into one block, in place, and take the student's hidden states through it.

    Parameters
    ----------
    pair : TeacherStudentPair
        Student and teacher, of which this block must be in memory.
    index : int
        The number of the block. One without compressed layers is only run.
    calls : sequence of BlockCall
        The arguments of the block besides the hidden state, batch by batch.
    ours : sequence of Tensor
        The hidden states that enter the student's block.
    wanted : sequence of mapping
        Inputs of the teacher's layers that were compressed, by name.
    masks : sequence of Tensor or None
        The padding masks of the batches, as from :func:`~cur.integrations.model.masks.padding_mask`.
    ridge, correction, metrics
        These have the meaning that :func:`closed_form_` gives them.

    Returns
    -------
    list of LayerFit
        The fits of the layers, in the order in which they were solved.
    list of Tensor
        The hidden states behind the block as it is now.

    Raises
    ------
    NumericalError, RuntimeError
        If a system cannot be solved, as in :func:`closed_form_`.
    """
    prefix, block = pair.student.blocks[index]
    names = [name.removeprefix(f"{prefix}.") for name in pair.inside(index)]
    groups = layer_groups(block, calls[0], ours[0], names) if names else []
    courses = [Course(call, block, hidden) for call, hidden in zip(calls, ours, strict=True)]
    fits: list[LayerFit] = []
    with hooked(pauses(block, [group[0] for group in groups])):
        for group in groups:
            named = [f"{prefix}.{name}" for name in group]
            problems = {name: LeastSquares(pair.cores[name], metrics.get(name)) for name in named}
            for course, seen, mask in zip(courses, wanted, masks, strict=True):
                x = course.to_layer(group[0])
                for name, problem in problems.items():
                    dense = pair.teacher.model.get_submodule(name)
                    # After removed neurons the dense layer cannot take these inputs.
                    same = seen[name].shape == x.shape
                    given = dense(x) if same else pair.student.model.get_submodule(name)(x)
                    target = (1.0 - correction) * given + correction * dense(seen[name])
                    with pair.precision.exact():
                        problem.add(token_rows(x, mask, name), token_rows(target, mask, name))
            with pair.precision.exact():
                for name, problem in problems.items():
                    core = pair.cores[name]
                    before = problem.error(core.value)
                    core.write_(problem.solve(ridge=ridge))
                    fits.append(LayerFit(name, before, problem.error(core.value), problem.floor()))
        return fits, [course.to_the_end() for course in courses]
