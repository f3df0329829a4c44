"""What a pass over text has seen, as counts and a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from cur.integrations.model.usage import Inputs

__all__ = ["Seen"]


class Seen:
    """What a pass has seen: numbers of samples and tokens, and a hash of all inputs without padding."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.reads_tokens = False
        self._digest = hashlib.sha256()

    def add(self, inputs: Mapping[str, Any], mask: torch.Tensor | None) -> None:
        """Count and hash one batch.

        Token ids count one by one; images, sounds and other inputs that are not token ids, as one token a sample, as
        does whatever is read by a module that is not one of transformers' own.

        Parameters
        ----------
        inputs : mapping
            The keyword arguments that the model is called with.
        mask : Tensor or None
            The padding mask of the batch; None if it has no padding.

        Raises
        ------
        ValueError
            If the batch holds no token.
        """
        if isinstance(inputs, Inputs):
            self._add_samples(list(inputs.values()))
            return
        ids = inputs.get("input_ids")
        named = {"input_ids": ids} if ids is not None else _measured(inputs)
        named |= {key: value for key, value in inputs.items() if key == "decoder_input_ids"}
        first = next(iter(named.values()))
        before = self.tokens
        self.reads_tokens = not first.is_floating_point()
        for index in range(len(first)):
            for values in named.values():
                row = values[index].cpu()
                if values is first and mask is not None and mask.shape == values.shape:
                    row = row[mask[index].cpu()]
                self._digest.update(len(row).to_bytes(8, "little"))
                kind = "<f8" if row.is_floating_point() else "<i8"
                self._digest.update(_exact(row).numpy().astype(kind).tobytes())
                if values is first:
                    self.tokens += 1 if row.is_floating_point() else len(row)
        self.samples += len(first)
        if self.tokens == before:
            raise ValueError("a batch holds no token")

    def _add_samples(self, tensors: list[torch.Tensor]) -> None:
        """Count the samples of tensors, and hash these sample by sample, so that batches do not matter."""
        count = len(tensors[0]) if tensors[0].ndim else 1
        whole = [tensor for tensor in tensors if not tensor.ndim or len(tensor) != count]
        rows = [
            _exact(tensor.cpu()).reshape(count, -1).view(torch.uint8).reshape(count, -1)
            for tensor in tensors
            if tensor.ndim and len(tensor) == count and tensor.numel()
        ]
        if not count or (not rows and not whole):
            raise ValueError("a batch holds no sample")
        for data in ([torch.cat(rows, dim=1)] if rows else []) + [_exact(one.cpu()).reshape(-1) for one in whole]:
            self._digest.update(data.numpy().tobytes())
        self.samples += count
        self.tokens += count

    def hexdigest(self) -> str:
        """Return the SHA-256 of the inputs so far, each sample with its length before it."""
        return self._digest.hexdigest()


def _measured(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"a batch must hold tensors, got {', '.join(inputs) or 'nothing'}")
    key = next(iter(tensors))
    return {key: tensors[key]}


def _exact(row: torch.Tensor) -> torch.Tensor:
    # NumPy has no bfloat16.
    return row.contiguous().double() if row.is_floating_point() else row.contiguous()
