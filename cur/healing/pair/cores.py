"""The core of a compressed layer: its r x r parameters that learn, in every layout, and the coordinates of learning."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur.integrations.nn import CompressedLinear, compressed_modules, grids_of

__all__ = ["Coordinates", "Core", "cores_of"]


class Core:
    r"""The square core ``U`` in the weight ``L U R`` of a compressed layer, whatever its layout.

    ``L`` (m x r) and ``R`` (r x n) are frozen, so the weight moves by ``L dU R`` only: it stays in the span of the
    kept columns and rows (Theorem 4.3 of arXiv 2501.04211). What is stored of it, and what ``L`` and ``R`` are, says
    the type of the layer by :meth:`~cur.integrations.nn.CompressedLinear.trainable`: ``U`` itself in the layout
    ``"cur"``, and otherwise a factor that becomes ``L U`` or ``U R``, of which ``U`` is the identity before healing.

    Parameters
    ----------
    name : str
        Name of the layer, for messages.
    layer : CompressedLinear
        The compressed layer, whose core :meth:`write_` changes.

    Attributes
    ----------
    left, right : Tensor
        ``L`` and ``R``, in the dtype of the layer.
    start, value : Tensor
        ``U`` when this object was made, and as last written; float64.
    """

    def __init__(self, name: str, layer: CompressedLinear) -> None:
        self.name = name
        self.layer = layer
        what = layer.trainable()
        if what is None:
            raise TypeError(f"{name} is a {type(layer).__name__}, of which healing trains nothing")
        self.what = what
        self.factor, self.left, self.right = what.factor, what.left, what.right
        self.start = self.value = what.start()

    @property
    def rank(self) -> int:
        """Side r of the core."""
        return len(self.start)

    @torch.no_grad()
    def write_(self, U: Tensor) -> None:
        """Store a core (r x r) in the layer, in place, rounded once to the layer's dtype.

        Parameters
        ----------
        U : Tensor
            The new core, of shape (r, r).

        Raises
        ------
        NumericalError
            If it is not finite; the layer is unchanged then.
        """
        if not bool(torch.isfinite(U).all()):
            raise NumericalError(f"the core of {self.name} is not finite")
        U = U.double()
        self.factor.copy_(self.what.stored(U))
        self.value = U

    def take_gradient(self) -> Tensor:
        """Return the gradient with respect to the core (float32, r x r), and clear it in the layer.

        A core that the loss did not reach has a gradient of zero.
        """
        gradient, self.factor.grad = self.factor.grad, None
        if gradient is None:
            return torch.zeros(self.rank, self.rank, device=self.factor.device)
        return self.what.gradient(gradient)


class Coordinates:
    r"""Coordinates ``D`` of a core, ``U = U_0 + P D Q``, in which one step means the same in every direction.

    Equal steps of the entries of ``U`` change the output of the layer by amounts that differ by orders of magnitude,
    and a first-order method needs as many steps as that spread asks for. With ``M = L^T H L``,
    ``G = E[(R x)(R x)^T]`` over the text, ``P P^T ~ M^-1`` and ``Q^T Q ~ G^-1``, the mean square of the change of the
    output, measured in ``H``, is ``||D||_F^2 / r^2`` in units of the mean square of the output itself. So a learning
    rate is the relative change of the output that one step of Adam makes, alike for all layers and models, and weight
    decay is a ridge towards ``U_0`` in the norm of the outputs. With ``H`` from gradients these are the coordinates of
    the Kronecker-factored natural gradient (Martens and Grosse, arXiv 1503.05671), frozen at the start.

    Parameters
    ----------
    core : Core
        The core; its present value is ``U_0``.
    moment : Tensor
        The second moment ``G`` of what the core is applied to: float64, r x r.
    output : float
        ``E[y^T H y]`` of the layer's outputs ``y``.
    damping : float
        Added to the eigenvalues of ``M`` and ``G``, relative to their mean, so that directions which the text hardly
        shows are not blown up.
    metric : Tensor, optional
        The metric ``H`` on the outputs, m x m; the identity by default.

    Notes
    -----
    ``P`` and ``Q`` are eigenvectors scaled by the inverse roots of eigenvalues. Any rotation of them would whiten as
    well; Adam, which scales every coordinate by itself, does best in the eigenbasis (Vyas et al., arXiv 2409.11321).
    """

    def __init__(
        self, core: Core, moment: Tensor, output: float, *, damping: float, metric: Tensor | None = None
    ) -> None:
        self.core = core
        self.origin = core.value
        left = _wide(core.left)
        outer = left.T @ (left if metric is None else metric.to(left) @ left)
        self.P = (_inverse_root(outer, damping) * (math.sqrt(output) / core.rank)).float()
        self.Q = _inverse_root(moment, damping).T.float()
        self.values = nn.Parameter(torch.zeros(core.rank, core.rank, device=self.origin.device))

    @classmethod
    def plain(cls, core: Core) -> Coordinates:
        """Return coordinates that only keep their place until a state is restored into them.

        Parameters
        ----------
        core : Core
            The core that the coordinates belong to.
        """
        eye = torch.eye(core.rank, dtype=torch.float64, device=core.value.device)
        return cls(core, eye, 1.0, damping=1.0)

    def take_gradient(self) -> Tensor:
        """Return the gradient with respect to the coordinates, and clear it in the layer."""
        return self.P.T @ self.core.take_gradient() @ self.Q.T

    def write_(self, values: Tensor | None = None) -> None:
        """Store the core of these coordinates, by default the present ones, in the layer, in place.

        Parameters
        ----------
        values : Tensor, optional
            The coordinates to store, instead of the present ones.
        """
        values = self.values.detach() if values is None else values
        self.core.write_(self.origin + (self.P @ values @ self.Q).double())

    def begin_here_(self) -> None:
        """Make the present core the origin."""
        self.origin = self.core.value
        self.values.data.zero_()


def cores_of(model: nn.Module) -> dict[str, Core]:
    """Return the core of every compressed layer by name; layers of which nothing may be trained have none.

    Parameters
    ----------
    model : nn.Module
        The model with compressed layers.

    Raises
    ------
    ValueError
        If the model has no compressed layer, none of which anything may be trained, or one that is on the meta device
        or rounded to few bits.
    """
    layers: Mapping[str, CompressedLinear] = compressed_modules(model)
    if not layers:
        raise ValueError("`student` has no compressed layer: compress it first; there is nothing to heal")
    if grids := grids_of(layers.values()):
        raise ValueError(
            f"`student` is rounded to {grids}; heal the checkpoint that it was made from, and round it then"
        )
    offloaded = [name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters())]
    if offloaded:
        raise ValueError(f"{', '.join(offloaded[:5])} of `student` are offloaded; load the model onto a device")
    cores = {name: Core(name, layer) for name, layer in layers.items() if layer.trainable() is not None}
    if not cores:
        kinds = sorted({layer.layout for layer in layers.values()})
        raise ValueError(f"`student` has compressed layers of the layouts {', '.join(kinds)} alone, which do not learn")
    return cores


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """Return ``V (E + damping mean(E))^(-1/2)`` for the eigenvalue decomposition ``V E V^T`` of a moment."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    mean = values.mean()
    if not bool(mean > 0):
        return torch.eye(len(values), dtype=moment.dtype, device=moment.device)
    root: Tensor = vectors / (values + damping * mean).sqrt()
    return root
