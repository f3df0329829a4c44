"""What happened while healing: one JSON object a line, and TensorBoard for those who want it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Log"]


class Log:
    """Lines appended to a file, and the same figures as curves.

    Parameters
    ----------
    path : path or None
        File of JSON lines; None writes none. It is appended to, so that a run that was interrupted continues in it.
    tensorboard : path or None
        Directory of TensorBoard events; None writes none.

    Raises
    ------
    ImportError
        If TensorBoard is asked for and not installed.
    """

    def __init__(self, path: str | os.PathLike[str] | None, tensorboard: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._board: Any = None if tensorboard is None else _board(tensorboard)

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Append one event: ``{"event": ..., "step": ..., ...}``.

        Parameters
        ----------
        event : str
            The name of the event.
        step : int
            The number of the step that it belongs to.
        figures : mapping
            Further fields of the line, as JSON types.
        """
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line: a killed process leaves no line in a buffer.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: a run that continues from it will write them again.

        Parameters
        ----------
        step : int
            The number of the last step to keep.
        """
        if self.path is None or not self.path.exists():
            return
        from cur._lib.atomic import replace_file

        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the line that was being written when the process was killed
        with replace_file(self.path) as stream:
            stream.write("".join(f"{line}\n" for line in kept).encode())

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def _board(directory: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("`tensorboard` needs the package of that name; type: pip install tensorboard") from None
    return SummaryWriter(os.fspath(directory))
