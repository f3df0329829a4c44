"""The numbers that learn, their optimizer, and everything of them that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cur._errors import NumericalError
from cur.healing.config import HealingConfig
from cur.healing.cores import Coordinates

__all__ = ["Learner"]


class Learner:
    """AdamW on the coordinates of several cores.

    Parameters
    ----------
    coordinates : mapping of str to Coordinates
        By layer.
    config : HealingConfig
        Rate, decay and clipping.
    """

    def __init__(self, coordinates: Mapping[str, Coordinates], config: HealingConfig) -> None:
        self.coordinates = dict(coordinates)
        self.config = config
        self.optimizer = torch.optim.AdamW(
            [c.values for c in self.coordinates.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.best = self._values()
        self.best_loss = float("inf")
        self.stale = 0

    def step(self, number: int, batches: int) -> float:
        """Take one step with the gradients that lie in the model, the sum over `batches` of them.

        Returns
        -------
        float
            Norm of the gradient before clipping.

        Raises
        ------
        NumericalError
            If the gradient is not finite; nothing has been changed then.
        """
        values = [c.values for c in self.coordinates.values()]
        for c in self.coordinates.values():
            c.take_gradient_()
            if c.values.grad is not None and batches > 1:
                c.values.grad /= batches
        norm = float(nn.utils.get_total_norm([v.grad for v in values if v.grad is not None]))
        if not torch.isfinite(torch.tensor(norm)):
            bad = [n for n, c in self.coordinates.items() if not bool(torch.isfinite(_grad(c.values)).all())]
            raise NumericalError(f"the gradient of {', '.join(bad[:3]) or 'the cores'} is not finite")
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(values, self.config.clip, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.write_()
        return norm

    def write_(self, values: Sequence[Tensor] | None = None) -> None:
        """Store the cores of the present coordinates, or of others, in the model, in place."""
        for index, c in enumerate(self.coordinates.values()):
            c.write_(None if values is None else values[index])

    def judge(self, loss: float) -> bool:
        """Remember the present coordinates if they are the best so far; say whether they are."""
        if loss < self.best_loss:
            self.best, self.best_loss, self.stale = self._values(), loss, 0
            return True
        self.stale += 1
        return False

    def _values(self) -> list[Tensor]:
        return [c.values.detach().clone() for c in self.coordinates.values()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on, as tensors and as JSON."""
        tensors: dict[str, Tensor] = {}
        for (name, c), best in zip(self.coordinates.items(), self.best, strict=True):
            tensors |= {f"{name}/origin": c.origin, f"{name}/P": c.P, f"{name}/Q": c.Q}
            tensors |= {f"{name}/values": c.values, f"{name}/best": best}
            # Before the first step the optimizer holds nothing.
            tensors |= {f"{name}/adam/{key}": value for key, value in self.optimizer.state.get(c.values, {}).items()}
        return tensors, {"best_loss": self.best_loss, "stale": self.stale}

    def restore_(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to a state, in place, the model included."""
        self.best = []
        for name, c in self.coordinates.items():
            place = c.values.device
            mine = {key[len(name) + 1 :]: v.to(place) for key, v in tensors.items() if key.startswith(f"{name}/")}
            c.origin, c.P, c.Q = mine["origin"], mine["P"], mine["Q"]
            c.values.data.copy_(mine["values"])
            self.best.append(mine["best"])
            adam = {key.removeprefix("adam/"): value for key, value in mine.items() if key.startswith("adam/")}
            if adam:
                # The counter of steps stays on the CPU, as the optimizer has it.
                self.optimizer.state[c.values] = {**adam, "step": adam["step"].cpu()}
        self.best_loss, self.stale = float(facts["best_loss"]), int(facts["stale"])
        self.write_()


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(1) if parameter.grad is None else parameter.grad
