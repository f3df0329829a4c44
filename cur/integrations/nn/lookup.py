"""What a table of embeddings does with the rows that it looks up: gives them, or a multiple of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.nn.replaceable import has_own_forward

__all__ = ["ScaledEmbedding", "Times", "times_of"]

# Rows and tokens that a class is tried with, and what stands for a number that is not in memory.
_ROWS = 5
_UNKNOWN = 1.7


@dataclass(frozen=True)
class Times:
    """The number that looked up rows are multiplied by.

    Attributes
    ----------
    value : float
        The number, 1 for a plain table.
    rounded : bool
        Whether it is rounded to the dtype of the rows first, as in Gemma.
    """

    value: float = 1.0
    rounded: bool = False

    def applied(self, rows: Tensor) -> Tensor:
        """Multiply rows.

        Parameters
        ----------
        rows : Tensor
            The rows, in the dtype of the table.

        Returns
        -------
        Tensor
            The rows times the number, in their dtype.
        """
        if self.value == 1.0:
            return rows
        if self.rounded:
            return rows * torch.tensor(self.value, dtype=rows.dtype, device="cpu")
        return rows * self.value


class ScaledEmbedding(nn.Embedding):
    """Look up rows and multiply them by a number.

    Parameters
    ----------
    *sizes : Any
        The arguments of ``nn.Embedding``.
    times : Times
        The number that rows are multiplied by.
    **options : Any
        The options of ``nn.Embedding``.
    """

    def __init__(self, *sizes: Any, times: Times, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.times = times

    def forward(self, input: Tensor) -> Tensor:
        """Look up tokens and multiply their rows.

        Parameters
        ----------
        input : Tensor
            The tokens, of an integer dtype.

        Returns
        -------
        Tensor
            The vectors of the tokens.
        """
        return self.times.applied(super().forward(input))


def times_of(module: nn.Module) -> Times | None:
    """Return what a table multiplies its rows by; None for a module that is no table of this kind.

    A subclass of ``nn.Embedding`` is tried with other rows than its own: it is one if it gives these, or these times a
    number that it holds. Without memory, on the device ``"meta"``, that number is not known, and any is returned.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    Times or None
        The number, None if the module does more, bounds the norms of its rows, or has a forward pass of its own.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or has_own_forward(module):
        return None
    if type(module) is nn.Embedding:
        return Times()
    if isinstance(module, ScaledEmbedding):
        return module.times
    return _tried(module)


@torch.no_grad()
def _tried(module: nn.Embedding) -> Times | None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, module.embedding_dim, generator=generator, dtype=torch.float32, device="cpu")
    tokens = torch.tensor([[0, 3], [4, 1]], device="cpu")
    own = [value for value in vars(module).values() if isinstance(value, float)]
    buffers = {id(one): _number(one, own) for one in module.buffers() if one.ndim == 0 and one.is_floating_point()}
    possible = [Times()]
    possible += [Times(value, rounded) for value in (*own, *buffers.values()) for rounded in (False, True)]
    for dtype in (torch.float32, torch.bfloat16):  # where rounding a number shows
        found = _looked_up(module, rows.to(dtype), tokens, buffers)
        if found is None:
            return None
        wanted = rows.to(dtype)[tokens]
        possible = [
            times
            for times in possible
            if found.dtype == dtype and found.shape == wanted.shape and torch.equal(found, times.applied(wanted))
        ]
    return possible[0] if possible else None


def _number(buffer: Tensor, known: list[float]) -> float:
    """Return the number in a buffer: of numbers that the module holds the one that was rounded to it."""
    if buffer.is_meta:
        return _UNKNOWN
    value = float(buffer)
    return next((one for one in known if float(torch.tensor(one, dtype=buffer.dtype, device="cpu")) == value), value)


def _looked_up(module: nn.Embedding, rows: Tensor, tokens: Tensor, buffers: Mapping[int, float]) -> Tensor | None:
    """Return what a module of the same kind looks up in other rows; None if it cannot be tried."""
    memo: dict[int, Any] = {
        key: torch.full((), value, dtype=torch.float32, device="cpu") for key, value in buffers.items()
    }
    memo[id(module.weight)] = nn.Parameter(rows, requires_grad=False)
    tried = copy.deepcopy(module, memo)
    tried.num_embeddings = len(rows)
    try:
        found: Any = type(tried).forward(tried.to("cpu"), tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  (whatever a module says that takes other inputs)
        return None
    return found if isinstance(found, Tensor) else None
