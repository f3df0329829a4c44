"""How to heal, and what for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cur.settings.option import setting

__all__ = ["HealingSettings", "ObjectiveSettings"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Fields of :class:`~cur.healing.Objectives`."""

    heading: ClassVar[str] = "Objectives"

    kl: float = field(
        default=1.0,
        metadata=setting("Weight of the divergence from the teacher's predictions.", shown="1, 0 by blocks"),
    )
    hidden: float = field(
        default=0.0, metadata=setting("Weight of the distance of hidden states.", shown="0, 1 by blocks")
    )
    modules: float = field(default=0.0, metadata=setting("Weight of the distance of each compressed layer's output."))
    next_token: float = field(default=0.0, metadata=setting("Weight of the negative log-likelihood of the text."))
    temperature: float = field(default=1.0, metadata=setting("Temperature of the predictions that are compared."))


@dataclass(frozen=True, kw_only=True)
class HealingSettings:
    """Fields of :class:`~cur.healing.HealingConfig`."""

    heading: ClassVar[str] = "Healing"

    steps: int = field(
        default=100, metadata=setting("Steps of the optimizer; 0 stops at what comes before.", basic=True)
    )
    batch_size: int = field(default=4, metadata=setting("Windows in a forward pass.", basic=True))
    accumulate: int = field(default=1, metadata=setting("Forward passes in a step."))
    scope: str = field(
        default="model",
        metadata=setting(
            "model (one loss through the whole network) or block (each block by itself; less memory).",
            basic=True,
            shown="model, block with --low-memory",
        ),
    )
    objectives: ObjectiveSettings | None = None
    closed_form: bool = field(default=True, metadata=setting("Whether least squares come first."))
    closed_form_windows: int = 64
    ridge: float = 0.01
    correction: float = 0.3
    metric_windows: int = 8
    natural_steps: int = field(
        default=1,
        metadata=setting("Steps of natural gradient after that, each as long as helps; none with --scope block."),
    )
    learning_rate: float = field(
        default=1.0, metadata=setting("Largest size of a step, relative to what the loss itself asks for.")
    )
    warmup: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = field(
        default="auto",
        metadata=setting(
            "Precision of products in passes over text: float32, bfloat16, or auto, the faster on the device.",
            heading="Loading",
        ),
    )
    gradient_checkpointing: bool = field(default=False, metadata=setting("Less memory, more time."))
    held_out: int = field(default=8, metadata=setting("Windows at the end that are watched, not healed on."))
    evaluate_every: int = field(default=25, metadata=setting("Steps between looks at what is watched."))
    patience: int = field(default=0, metadata=setting("Looks without improvement before it stops; 0: never."))
    save_every: int = field(default=25, metadata=setting("Steps between states on disk."))
    workers: int = field(default=1, metadata=setting("Blocks healed at the same time, with --scope block."))
    seed: int = field(default=0, metadata=setting("Seed of the order of the windows."))
