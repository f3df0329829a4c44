"""What a user decides about kernels."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KernelSettings"]


@dataclass(frozen=True)
class KernelSettings:
    """Say what kernels may round, and how much memory they may take.

    Attributes
    ----------
    activations : {"exact", "int8"}, default "exact"
        Whether inputs may be rounded to eight bits, which is several times faster and changes what a model says;
        "exact" rounds to the dtype of the inputs alone.
    memory : int, optional
        The bytes that weights multiplied out may take in this process, all together. By default half of what is
        available when the first one is asked for.

    Raises
    ------
    ValueError
        If there is no such choice of activations, or memory is negative.
    """

    activations: str = "exact"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in ("exact", "int8"):
            raise ValueError(
                f"`activations` must be exact or int8, got {self.activations!r}; exact rounds nothing more"
            )
        if self.memory is not None and self.memory < 0:
            raise ValueError(f"`memory` must be 0 or more bytes, got {self.memory}; 0 holds nothing multiplied out")
