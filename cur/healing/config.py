"""How to heal, as one value that can be printed, compared and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cur.integrations.model.precision import NAMES
from cur.settings.former import former
from cur.settings.healing import HealingSettings, ObjectiveSettings

__all__ = ["HealingConfig", "Objectives"]

SCOPES = ("model", "block")


@dataclass(frozen=True, kw_only=True)
class Objectives(ObjectiveSettings):
    """What the student is asked to match: weights of the four losses, of which at least one is positive.

    Parameters
    ----------
    kl : float, default 1.0
        Divergence of the student's next-token distribution from the teacher's, in nats per token. For the scope
        ``"model"`` only.
    hidden : float, default 0.0
        Distance of the hidden states after every block from the first compressed one on, relative to the size of each
        channel in the teacher: 1 is as bad as predicting zero. The mean over blocks. The paper (arXiv 2501.04211) has
        0.9, with 0.1 of `next_token`, for a distance that is not relative.
    modules : float, default 0.0
        Distance of the outputs of every compressed layer, relative as in `hidden`; the mean over layers.
    next_token : float, default 0.0
        Negative log-likelihood of the text, in nats per token. For the scope ``"model"`` only.
    temperature : float, default 1.0
        Temperature by which the logits of teacher and student are divided in `kl`.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, all are zero, or the temperature is not positive.
    """

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("kl", "hidden", "modules", "next_token"):
            _check(name, getattr(self, name), minimum=0.0)
        if not (self.kl or self.hidden or self.modules or self.next_token):
            raise ValueError("`objectives` must have a positive weight; without one there is nothing to learn")
        _check("temperature", self.temperature, minimum=0.0, exclusive=True)

    def to_dict(self) -> dict[str, float]:
        """Return the fields as JSON types."""
        return asdict(self)


@former(final_rate=0.0, weight_decay=0.0, clip=1.0, damping=0.01)
@dataclass(frozen=True, kw_only=True)
class HealingConfig(HealingSettings):
    """How to heal a compressed model.

    Parameters
    ----------
    steps : int, default 100
        Steps of the optimizer; zero leaves it at what comes before. With the scope ``"block"``, steps of every block.
    batch_size : int, default 4
        Windows in a forward pass.
    accumulate : int, default 1
        Forward passes per step.
    scope : {"model", "block"}, default "model"
        ``"model"``: one loss through the whole network. ``"block"``: every compressed block is fed the teacher's hidden
        states and healed by itself, with the memory and the gradient of one block.
    objectives : Objectives, optional
        Default: ``Objectives(kl=1)``; for the scope ``"block"``, ``Objectives(kl=0, hidden=1)``.
    closed_form : bool, default True
        Whether the best cores for the teacher's outputs are found by least squares before the first step.
    closed_form_windows : int, default 64
        Windows of the text, evenly spread, that this looks at.
    ridge : float, default 0.01
        Pull of the least-squares problem towards the cores as they are, relative to the mean eigenvalue of the inputs'
        second moment.
    correction : float, default 0.3
        How much of the difference between the teacher's inputs and the student's the closed form corrects, from 0 to 1.
    metric_windows : int, default 8
        Windows over which gradients say how much each output matters to the closed form and to the whitened
        coordinates; 0 lets all count alike.
    natural_steps : int, default 1
        Steps of natural gradient between the closed form and those of the optimizer, each as long as lowers the loss of
        held-out text. The scope ``"block"`` leaves them out. See :func:`~cur.healing.training.natural.natural_step_`.
    learning_rate : float, default 1.0
        Largest size of a step, relative to what the quadratic model of the loss asks for; see
        :meth:`~cur.healing.training.learner.Learner.rate`.
    warmup : int, default 5
        Steps over which the rate rises; it falls to zero as a cosine afterwards.
    betas : tuple of float, default (0.9, 0.95)
        Decay rates of the two running means of AdamW.
    precision : {"auto", "float32", "bfloat16"}, default "auto"
        Precision of the products in forward and backward passes; cores, losses and least squares are float32 or
        float64. ``"auto"`` is what is faster on the device, see :class:`~cur.integrations.model.precision.Precision`;
        reports, logs and states name it, and a run that goes on does so in the precision in which it was begun.
    gradient_checkpointing : bool, default False
        Whether blocks are run a second time in the backward pass instead of keeping their activations.
    held_out : int, default 8
        Windows at the end of the text that are not healed on, but watched; 0 watches nothing. They should not have been
        calibrated on: layers fitted to a text lose less on it than elsewhere.
    evaluate_every : int, default 25
        Steps between looks at them.
    patience : int, default 0
        Looks without improvement after which healing stops; 0 never stops early. In any case the best state that was
        seen is what is kept.
    save_every : int, default 25
        Steps between states on disk, where a directory for them is given.
    workers : int, default 1
        Blocks healed at the same time, with the scope ``"block"``. The result does not depend on it.
    seed : int, default 0
        Seed of the order of the windows.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    objectives: Objectives | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in _COUNTS.items():
            value: Any = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")
        for name, allowed in (("scope", SCOPES), ("precision", NAMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        _check("ridge", self.ridge, minimum=0.0)
        _check("learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        _check("correction", self.correction, minimum=0.0)
        if self.correction > 1:
            raise ValueError(f"`correction` must be at most 1, got {self.correction!r}")
        betas: Sequence[float] = self.betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {self.betas!r}")
        if self.steps == 0 and not self.closed_form and not (self.natural_steps and self.scope == "model"):
            raise ValueError(
                "nothing would be healed: ask for `steps`, `closed_form` or, with the `scope` 'model', `natural_steps`"
            )
        if self.scope == "block" and (self.matched.kl or self.matched.next_token):
            raise ValueError(
                "with `scope` 'block' no loss reaches the output: `objectives` may weigh `hidden` and `modules` only"
            )
        if self.workers > 1 and self.scope == "model":
            raise ValueError("`workers` heal blocks side by side: they need `scope` 'block'")

    @property
    def matched(self) -> Objectives:
        """The objectives, with the default of the scope."""
        if self.objectives is not None:
            return self.objectives
        return Objectives() if self.scope == "model" else Objectives(kl=0.0, hidden=1.0)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        Parameters
        ----------
        step : int
            The number of the step, counted from 0.
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        data = asdict(self)
        data["objectives"] = self.matched.to_dict()
        data["betas"] = list(self.betas)
        return data


_COUNTS = {
    "steps": 0,
    "batch_size": 1,
    "accumulate": 1,
    "closed_form_windows": 1,
    "metric_windows": 0,
    "natural_steps": 0,
    "warmup": 0,
    "held_out": 0,
    "evaluate_every": 1,
    "patience": 0,
    "save_every": 1,
    "workers": 1,
    "seed": 0,
}


def _check(name: str, value: float, *, minimum: float, exclusive: bool = False) -> None:
    if (
        type(value) not in (int, float)
        or not math.isfinite(value)
        or value < minimum
        or (exclusive and value == minimum)
    ):
        rule = "positive" if exclusive else f"at least {minimum:g}"
        raise ValueError(f"`{name}` must be a finite number, {rule}, got {value!r}")
