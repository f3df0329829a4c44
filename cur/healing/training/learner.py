"""The parameters that learn, their optimizer, and all of their state that a resumed run needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur.healing.config import HealingConfig
from cur.healing.pair.cores import Coordinates

__all__ = ["LARGEST_GRADIENT", "Learner"]

LARGEST_GRADIENT = 1.0
"""Norm to which longer gradients in whitened coordinates are shortened."""


# Relative change of the outputs at which the price of a step is measured: far above rounding in bfloat16.
_TRIAL = 0.1


class Learner:
    """AdamW on the coordinates of several cores.

    Parameters
    ----------
    coordinates : mapping of str to Coordinates
        Coordinates in which each core learns, by the layer's name.
    config : HealingConfig
        The configuration, which has the rate, its decay and the clipping.
    before : float, optional
        Held-out loss of the model as it came, before anything was changed: what the best state has to beat.

    Attributes
    ----------
    best : list of Tensor
        The cores of the best state that was seen, copied: a state on disk holds no tensor twice.
    price : float
        Loss that a change of all outputs by their own size, in random directions, would add by the quadratic model;
        measured by :meth:`measure_price`.
    """

    def __init__(
        self, coordinates: Mapping[str, Coordinates], config: HealingConfig, *, before: float | None = None
    ) -> None:
        self.coordinates = dict(coordinates)
        self.config = config
        self.price = 0.0
        self.optimizer = torch.optim.AdamW(
            [c.values for c in self.coordinates.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=0.0,
        )
        cores = [c.core for c in self.coordinates.values()]
        self.best = [(core.value if before is None else core.start).clone() for core in cores]
        self.best_loss = math.inf if before is None else before
        self.stale = 0

    def measure_price(self, loss: Callable[[], float]) -> None:
        """Measure the price of a step: the second difference of the loss along random signs, the model left as it is.

        Parameters
        ----------
        loss : callable
            Returns the loss of the model as it is on some fixed text.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        way = [torch.empty(c.values.shape).bernoulli_(0.5, generator=generator) for c in self.coordinates.values()]
        found = []
        for size in (0.0, _TRIAL, -_TRIAL):
            for c, sign in zip(self.coordinates.values(), way, strict=True):
                c.write_(size * (2 * sign - 1).to(c.values) if size else None)
            found.append(loss())
        self.write_()
        self.price = max((found[1] + found[2]) / 2 - found[0], 0.0) / _TRIAL**2

    def rate(self, number: int, loss: float, tokens: int) -> float:
        r"""Return the relative change of the outputs that a step makes at most.

        A step of size ``s`` along a direction that has the cosine ``c`` with the gradient wins about
        ``2 c s sqrt(p l)`` of a loss ``l`` and costs ``p s^2`` at a price ``p``, so that the best is
        ``s = c sqrt(l / p)``. The gradient of ``t`` tokens in ``n`` parameters has a cosine of about
        ``sqrt(t / (t + n))`` with that of all text. Momentum follows a direction for ``1 / (1 - beta)`` steps, which
        together go no further than ``sqrt(l / p)``. Where the loss is so flat that there is no price, the size that was
        tried stands for that, and nothing changes an output by more than its own size.

        Parameters
        ----------
        number : int
            The number of the step, counted from 0.
        loss : float
            The loss that the step begins at.
        tokens : int
            The number of tokens in all batches of the step.
        """
        parameters = sum(c.values.numel() for c in self.coordinates.values())
        cosine = min(math.sqrt(tokens / (tokens + parameters)), 1 - self.config.betas[0])
        reach = min(math.sqrt(loss / self.price), 1.0) if self.price > 0 else _TRIAL
        return self.config.rate(number) * cosine * reach

    def step(self, number: int, batches: int, *, loss: float, tokens: int) -> dict[str, float]:
        """Take one step with the gradients that lie in the model, the sum over `batches` of them.

        Parameters
        ----------
        number : int
            The number of the step, counted from 0.
        batches : int
            The number of batches whose gradients were added up.
        loss : float
            Mean loss of these batches, and `tokens` in them, which decide the rate.
        tokens : int
            The number of tokens in all batches of the step.

        Returns
        -------
        dict of str to float
            The norm of the gradient before clipping, and the rate.

        Raises
        ------
        NumericalError
            If the gradient is not finite; nothing has been changed then.
        """
        values = [c.values for c in self.coordinates.values()]
        for c in self.coordinates.values():
            c.values.grad = c.take_gradient() / batches
        norm = float(nn.utils.get_total_norm([v.grad for v in values if v.grad is not None]))
        if not torch.isfinite(torch.tensor(norm)):
            bad = [n for n, c in self.coordinates.items() if not bool(torch.isfinite(_grad(c.values)).all())]
            raise NumericalError(f"the gradient of {', '.join(bad[:3]) or 'the cores'} is not finite")
        nn.utils.clip_grads_with_norm_(values, LARGEST_GRADIENT, torch.tensor(norm))
        rate = self.rate(number, loss, tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.write_()
        return {"gradient_norm": norm, "learning_rate": rate}

    def write_(self) -> None:
        """Store the cores of the present coordinates in the model, in place."""
        for c in self.coordinates.values():
            c.write_()

    def write_best_(self) -> None:
        """Store the cores of the best state in the model, in place."""
        for c, best in zip(self.coordinates.values(), self.best, strict=True):
            c.core.write_(best)

    def judge(self, loss: float) -> bool:
        """Remember the present cores if they are the best so far; say whether they are.

        Parameters
        ----------
        loss : float
            The loss on held-out text with the present cores.

        Returns
        -------
        bool
            Whether the present cores are the best so far.
        """
        if loss < self.best_loss:
            self.best = [c.core.value.clone() for c in self.coordinates.values()]
            self.best_loss, self.stale = loss, 0
            return True
        self.stale += 1
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on, as tensors and as JSON."""
        tensors: dict[str, Tensor] = {}
        for (name, c), best in zip(self.coordinates.items(), self.best, strict=True):
            tensors |= {f"{name}/origin": c.origin, f"{name}/P": c.P, f"{name}/Q": c.Q}
            tensors |= {f"{name}/values": c.values, f"{name}/best": best}
            # Before the first step the optimizer holds nothing.
            tensors |= {f"{name}/adam/{key}": value for key, value in self.optimizer.state.get(c.values, {}).items()}
        return tensors, {"best_loss": self.best_loss, "stale": self.stale, "price": self.price}

    def restore_(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to a state, in place, the model included.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The tensors of the state, as :meth:`state` returned them.
        facts : mapping
            The facts of the state, as :meth:`state` returned them.
        """
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
        self.price = float(facts["price"])
        self.write_()


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(1) if parameter.grad is None else parameter.grad
