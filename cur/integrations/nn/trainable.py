"""What of a layer may be trained against the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Trainable"]


@dataclass(frozen=True, eq=False)
class Trainable:
    """A square core ``U`` between two frozen factors of a weight ``L U R``, and the parameter in which it is stored.

    Attributes
    ----------
    factor : Tensor
        The parameter that is trained.
    left, right : Tensor
        ``L`` (m x r) and ``R`` (r x n), in the dtype of the layer, no views of `factor`.
    holds : {"core", "left", "right"}
        The product that `factor` stores: ``U`` itself, ``L U`` or ``U R``. In the latter two ``U`` begins as the
        identity.
    """

    factor: Tensor
    left: Tensor
    right: Tensor
    holds: Literal["core", "left", "right"]

    def start(self) -> Tensor:
        """Return the core as it is stored now, float64."""
        if self.holds == "core":
            return self.factor.detach().to(torch.float64, copy=True)
        return torch.eye(len(self.right), dtype=torch.float64, device=self.right.device)

    def stored(self, U: Tensor) -> Tensor:
        """Return what `factor` has to be for a core in float64.

        Parameters
        ----------
        U : Tensor
            The core, of shape (r, r), float64.
        """
        if self.holds == "core":
            return U
        return self.left.double() @ U if self.holds == "left" else U @ self.right.double()

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to the core from that of `factor`, float32.

        Parameters
        ----------
        gradient : Tensor
            The gradient with respect to `factor`.
        """
        gradient = gradient.float()
        if self.holds == "core":
            return gradient
        return self.left.float().T @ gradient if self.holds == "left" else gradient @ self.right.float().T
