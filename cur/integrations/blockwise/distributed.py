"""Several processes at one task, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cur._lib.errors import CURError
from cur.integrations.measure.statistics import Statistics

__all__ = ["ProcessGroup", "ProcessGroupError"]

T = TypeVar("T")

# A rank waits this long for the others; a block of a large model on a slow disk takes minutes.
_PATIENCE = timedelta(hours=2)


class ProcessGroupError(CURError, RuntimeError):
    """Another process of the run has ended."""


class ProcessGroup:
    """The processes of a run; one where ``torchrun`` started none.

    Attributes
    ----------
    rank : int
        Number of this process; 0 writes what is written once.
    size : int
        The number of processes.
    device : torch.device
        The device on which sums over processes are formed.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device | None = None) -> Iterator[ProcessGroup]:
        """Meet the other processes, and part from them at the end.

        Parameters
        ----------
        device : torch.device, optional
            This process's own. On CUDA devices sums are added up there, by NCCL; everything else goes over gloo.

        Yields
        ------
        ProcessGroup
            The group of all processes.
        """
        self.device = device or self.device
        if self.size == 1 or dist.is_initialized():
            yield self
            return
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        with _told():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=_PATIENCE)
        try:
            yield self
        finally:
            dist.destroy_process_group()

    def share(self, items: Sequence[T]) -> list[T]:
        """Return every `size`-th of some items, this process's own.

        Parameters
        ----------
        items : sequence of T
            The items to share among the processes.
        """
        return list(items[self.rank :: self.size])

    def agree(self, value: T) -> T:
        """Return the value of rank 0 everywhere; an error there is raised everywhere.

        Parameters
        ----------
        value : T
            The value of this process.
        """
        if self.size == 1:
            return value
        held: list[Any] = [value]
        with _told():
            dist.broadcast_object_list(held, src=0)
        agreed: T = held[0]
        return agreed

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, everywhere.

        Parameters
        ----------
        value : T
            The value of this process.
        """
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        with _told():
            dist.all_gather_object(held, value)
        return held

    def reduce(self, own: Statistics) -> Statistics:
        """Add up the statistics of all processes: sums in float64, angles weighted by samples.

        The order of the summands is another than in one process, so that results differ by rounding: a few units of
        1e-16 relative to the sums, all of whose terms are squares or products.

        Parameters
        ----------
        own : Statistics
            The statistics of this process.

        Returns
        -------
        Statistics
            The statistics of all processes together.
        """
        if self.size == 1:
            return own
        counts = self.gather((own.tokens, own.samples, dict(own.counts)))
        samples = sum(part[1] for part in counts)
        return replace(
            own,
            tokens=sum(part[0] for part in counts),
            samples=samples,
            counts={name: sum(part[2][name] for part in counts) for name in own.counts},
            square_sums=self._sums(own.square_sums),
            products=self._sums(own.products),
            angles=None if own.angles is None else self._sum(own.angles * own.samples) / samples,
        )

    def _sums(self, tensors: Any) -> dict[str, torch.Tensor]:
        owner: dict[int, str] = {}
        shared = self.gather({name: owner.setdefault(id(tensor), name) for name, tensor in tensors.items()})
        done: dict[tuple[str, ...], torch.Tensor] = {}
        found = {}
        for name, tensor in tensors.items():
            # Modules that share their input share a tensor, and go on sharing it if they do so in all processes: of an
            # expert that the text of one does not reach every layer has zeros of its own there.
            key = tuple(part[name] for part in shared)
            if key not in done:
                done[key] = self._sum(tensor)
            found[name] = done[key]
        return found

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.to(self.device, copy=True)
        with _told():
            dist.all_reduce(total)
        return total.to(tensor.device)


@contextmanager
def _told() -> Iterator[None]:
    """Say in one sentence what a broken connection means."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessGroupError(
            "another process of this run has ended or cannot be reached; what was finished is kept: start the same "
            f"command again and it goes on from there ({str(error).strip().splitlines()[0][:200]})"
        ) from error
