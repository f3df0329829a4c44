"""Teacher and student on one batch, and the distance between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur.healing.config import HealingConfig
from cur.healing.pair.cache import TeacherCache, TeacherOutputs
from cur.healing.pair.cores import Core, cores_of
from cur.healing.pair.hashing import digest
from cur.healing.pair.objectives import output_losses, relative_distance, token_weights
from cur.healing.pair.sharing import check_pair
from cur.healing.pair.stack import Stack
from cur.integrations.model.blocks import BlockCall
from cur.integrations.model.hooks import outputs_of
from cur.integrations.model.masks import padding_mask
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import model_inputs
from cur.integrations.nn import dense_weight

__all__ = ["Loss", "TeacherStudentPair", "only_cores"]


@dataclass
class Loss:
    """How far the student is from the teacher on a batch.

    Attributes
    ----------
    total : Tensor
        The weighted sum of the losses, a scalar from which gradients flow back.
    parts : dict of str to float
        Each loss without its weight, by the name that :class:`~cur.healing.config.Objectives` has for it.
    """

    total: Tensor
    parts: dict[str, float]


class TeacherStudentPair:
    """A student and its teacher, ready to be compared on batches.

    What lies before the first compressed layer is the same in both: only the teacher runs it.

    Parameters
    ----------
    student, teacher : nn.Module
        The compressed model and the dense one, in evaluation mode.
    config : HealingConfig
        Says what is compared, how far, and in which precision.
    probe : Tensor
        A few token ids, shape (1, tokens).
    cache : TeacherCache, optional
        Where the teacher's part is kept and looked up.
    block : int, optional
        The only block that is in memory, of models that are not: nothing else is healed, and the teacher's part must be
        in the cache. Default: models in memory.

    Attributes
    ----------
    cores : dict of str to Core
        The cores of the student, by the name of the compressed layer.
    student, teacher : Stack
        The blocks of each model, and what comes before and behind them.
    precision : Precision
        The precision of matrix products in both models.
    first, last : int
        Indices of the first and the last block with compressed layers.
    kept, watched, stop : list of int, list of str, int or None
        The parts of the teacher's pass that are needed: hidden states after the blocks `kept`, outputs of the layers
        `watched`, and the block `stop` behind which it may end.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: HealingConfig,
        *,
        probe: Tensor | None,
        cache: TeacherCache | None = None,
        block: int | None = None,
    ) -> None:
        check_pair(student, teacher)
        self.config = config
        whole = config.scope == "model"
        self.student, self.teacher = (Stack(model, probe, whole=whole) for model in (student, teacher))
        self._only = block
        if block is None:
            self.cores: dict[str, Core] = cores_of(student)
        else:
            name, module = self.student.blocks[block]
            self.student.compressed = [block]
            self.cores = {f"{name}.{key}": core for key, core in cores_of(module).items()}
            for key, core in self.cores.items():
                core.name = key
        outside = [n for n in self.cores if not n.startswith(tuple(name + "." for name, _ in self.student.blocks))]
        if outside:
            raise ValueError(f"{', '.join(outside)} of `student` lie outside its blocks; healing reaches blocks only")
        self.first, self.last = self.student.compressed[0], self.student.compressed[-1]
        self.cache = cache
        self.device = next(parameter.device for parameter in student.parameters() if not parameter.is_meta)
        self.precision = Precision.of(student, config.precision)
        goals, count = config.matched, len(self.student.blocks)
        if config.scope == "block":
            kept = {index + shift for index in self.student.compressed for shift in (-1, 0)}
        else:
            kept = {self.first - 1, *(range(self.first, count) if goals.hidden else ())}
        self.kept = sorted(kept)
        self.watched = list(self.cores) if goals.modules else []
        # No head, and no block behind the last that learns, where neither is compared.
        self.stop = self.last if config.scope == "block" else None

    def inside(self, index: int) -> list[str]:
        """Return the names of the compressed layers in a block.

        Parameters
        ----------
        index : int
            The number of the block, counted from 0.
        """
        return [name for name in self.cores if name.startswith(self.student.blocks[index][0] + ".")]

    def key(self) -> str:
        """Return a hash of all that the teacher's outputs depend on."""
        dense = {name: dense_weight(self.teacher.model.get_submodule(name), name)[0] for name in self.cores}
        return digest({}, digest(dense), self.precision.name, self.kept, self.watched, self.stop)

    def teach(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Run the teacher, or look up what it gave for this batch before.

        Parameters
        ----------
        batch : mapping
            The batch to run the teacher on.

        Returns
        -------
        TeacherOutputs
            The parts of the teacher's pass that the comparison needs.
        """
        found = None if self.cache is None else self.cache.read(batch)
        with torch.no_grad(), self.precision.products():
            taught = self._ask(batch) if found is None else found.to(self.device)
            if self.cache is not None and found is None:
                self.cache.write(batch, taught)
            if self.config.scope == "block":
                before, hidden, calls = self._entered(batch)
                taught = replace(taught, hidden={**taught.hidden, before: hidden}, calls=calls)
        return taught

    def _entered(self, batch: Mapping[str, Any]) -> tuple[int, Tensor, dict[int, BlockCall]]:
        """Return the index of the block before, the hidden state that enters, and what blocks are called with."""
        if self._only is None:
            hidden, calls = self.teacher.calls(batch)
            return -1, hidden, dict(enumerate(calls))
        hidden, call = self.teacher.enter(batch, self._only)
        return self._only - 1, hidden, {self._only: call}

    def _ask(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        with outputs_of(self.teacher.model, self.watched) as modules:
            outputs = self.teacher.finish(batch, stop=self.stop)
        return TeacherOutputs(
            {index: outputs.hidden[index] for index in self.kept if index >= 0}, modules, outputs.last
        )

    def loss(self, batch: Mapping[str, Any], taught: TeacherOutputs, *, learning: bool = True) -> Loss:
        """Run the student through the whole network and compare it with the teacher.

        Parameters
        ----------
        batch : mapping
            The batch to run the student on.
        taught : TeacherOutputs
            The teacher's outputs on this batch.
        learning : bool, default True
            Whether gradients are wanted.

        Returns
        -------
        Loss
            The loss and its parts.

        Raises
        ------
        NumericalError
            If the loss is not finite.
        """
        goals = self.config.matched
        mask = self._mask(batch)
        with (
            torch.set_grad_enabled(learning),
            self.precision.products(),
            outputs_of(self.student.model, self.watched) as modules,
        ):
            outputs = self.student.finish(batch, self.first, taught.hidden.get(self.first - 1))
        terms: dict[str, Tensor] = {}
        if goals.hidden:
            indices = range(self.first, len(self.student.blocks))
            terms["hidden"] = _distance(((outputs.hidden[i], taught.hidden[i]) for i in indices), mask)
        if goals.modules:
            terms["modules"] = _distance(((modules[name], wanted) for name, wanted in taught.modules.items()), mask)
        total, parts = _weighed(terms, goals.to_dict())
        # Without a weight the likelihood is still watched, on held-out text.
        if outputs.last is not None and taught.last is not None and (goals.kl or goals.next_token or not learning):
            with self.precision.products():
                value, found = output_losses(
                    outputs.last[:, :-1].flatten(0, 1),
                    taught.last[:, :-1].flatten(0, 1),
                    _labels(batch, mask, self.device),
                    logits=(self.student.logits, self.teacher.logits),
                    kl=goals.kl,
                    next_token=goals.next_token,
                    temperature=goals.temperature,
                    learning=learning,
                )
            total, parts = total + value, parts | found
        return _finite(Loss(total, parts))

    def block_loss(
        self, index: int, batch: Mapping[str, Any], taught: TeacherOutputs, *, learning: bool = True
    ) -> Loss:
        """Run one block of the student on the teacher's hidden state and compare it with the teacher's.

        What the block adds to the hidden state is compared: the state that passes through would drown it.

        Parameters
        ----------
        index : int
            The number of the block, counted from 0.
        batch : mapping
            The batch to run the block on.
        taught : TeacherOutputs
            The teacher's outputs on this batch.
        learning : bool, default True
            Whether gradients are wanted.

        Returns
        -------
        Loss
            The loss and its parts.

        Raises
        ------
        NumericalError
            If the loss is not finite.
        """
        goals, names, mask = self.config.matched, self.inside(index), self._mask(batch)
        if index not in taught.calls:
            raise ValueError(
                "`taught` was made for the scope 'model'; `scope` 'block' needs what blocks are called with"
            )
        before = taught.hidden[index - 1]
        with (
            torch.set_grad_enabled(learning),
            self.precision.products(),
            outputs_of(self.student.model, names if goals.modules else []) as modules,
        ):
            found = taught.calls[index](self.student.blocks[index][1], before)
        terms: dict[str, Tensor] = {}
        if goals.hidden:
            added = (found - before, taught.hidden[index] - before)
            terms["hidden"] = _distance([added], mask)
        if goals.modules:
            terms["modules"] = _distance(((modules[name], taught.modules[name]) for name in names), mask)
        return _finite(Loss(*_weighed(terms, goals.to_dict())))

    def _mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        return padding_mask(model_inputs(self.student.model, batch))


@contextmanager
def only_cores(pair: TeacherStudentPair) -> Iterator[None]:
    """Let nothing but the cores ask for gradients, in either model, for a while.

    Parameters
    ----------
    pair : TeacherStudentPair
        The student that learns and the teacher it learns from.
    """
    asked = [p for stack in (pair.student, pair.teacher) for p in stack.model.parameters() if p.requires_grad]
    factors = [core.factor for core in pair.cores.values()]
    before = [factor.requires_grad for factor in factors]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        for factor in factors:
            factor.requires_grad_(True)
        yield
    finally:
        for factor, was in zip(factors, before, strict=True):
            factor.grad = None
            factor.requires_grad_(was)
        for parameter in asked:
            parameter.requires_grad_(True)


def _weighed(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, dict[str, float]]:
    total = torch.zeros(())
    for name, term in terms.items():
        total = total.to(term.device) + weights[name] * term
    return total, {name: float(term.detach()) for name, term in terms.items()}


def _distance(pairs: Iterable[tuple[Tensor, Tensor]], mask: Tensor | None) -> Tensor:
    return torch.stack([relative_distance(ours, theirs, token_weights(theirs, mask)) for ours, theirs in pairs]).mean()


def _finite(loss: Loss) -> Loss:
    if not bool(torch.isfinite(loss.total.detach())):
        raise NumericalError("the loss of healing is not finite")
    return loss


def _labels(batch: Mapping[str, Any], mask: Tensor | None, device: torch.device) -> Tensor:
    """Return the token that follows each position but the last, shape (batch (length - 1),); -100 at padding."""
    labels: Tensor = batch["input_ids"].to(device)[:, 1:]
    if mask is not None:
        labels = torch.where((mask[:, 1:] & mask[:, :-1]).to(device), labels, -100)
    return labels.flatten()
