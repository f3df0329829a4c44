"""How a command runs: its errors in one sentence, its progress, its signals."""

from __future__ import annotations

import functools
import io
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from types import FrameType
from typing import Any, ParamSpec, TextIO, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cur._lib.errors import CURError

__all__ = ["Stages", "bars", "guarded", "note", "output", "print_json"]

P = ParamSpec("P")
T = TypeVar("T")

output = Console()
"""Results."""

note = Console(stderr=True, highlight=False)
"""Everything else, so that standard output holds results alone."""

_SECONDS_BETWEEN_LINES = 60.0

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)

_DESCRIPTIONS = {
    "load": "Loading the model",
    "save": "Saving",
    "sample": "Writing text to calibrate on",
    "calibrate": "Measuring activations",
    "plan": "Sharing the budget",
    "neurons": "Looking at neurons",
    "decompose": "Factorizing weights",
    "quantize": "Rounding weights",
    "before": "Dense, held-out text",
    "after": "Compressed, held-out",
    "healed": "Healed, held-out text",
    "evaluate": "Predictions",
    "reference": "Dense predictions",
}


class Stages(ABC):
    """Shows how far the stages of a command are."""

    def __init__(self) -> None:
        self._descriptions = dict(_DESCRIPTIONS)

    @abstractmethod
    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps of a stage are done."""

    def describe(self, stage: str, description: str) -> None:
        """Say something else of a stage from its next report on.

        Parameters
        ----------
        stage : str
            The name of the stage, as callers of the library report it.
        description : str
            The text that is shown in the place of the name.
        """
        self._descriptions[stage] = description

    def of(self, stage: str, total: int | None = None) -> Callable[[int, int | None], None]:
        """Return a callback for one stage, which is shown at once.

        Parameters
        ----------
        stage : str
            The name of the stage.
        total : int, optional
            The number of its steps, if it is known.
        """
        self(stage, 0, total)
        return lambda done, known: self(stage, done, known)

    @contextmanager
    def busy(self, description: str) -> Iterator[None]:
        """Show a stage without steps while something of unknown length runs.

        Parameters
        ----------
        description : str
            The text that is shown while it runs.
        """
        self(description, 0, None)
        yield
        self(description, 1, 1)


class Bars(Stages):
    """One progress bar for each stage, made when the stage first reports."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Move the bar of a stage."""
        description = self._descriptions.get(stage, stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(description, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total, description=description)


class Lines(Stages):
    """For a log, where nothing is drawn over: a line when a stage first reports, then every minute, and at its end.

    Each says how long the stage has taken, from the last report of the stage before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()
        self._begun: dict[str, float] = {}
        self._next: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Print a line, if it is time for one."""
        now = time.monotonic()
        begun = self._begun.setdefault(stage, self._last)
        self._last = now
        due = self._next.get(stage, now)
        ends = done == total and due < math.inf
        if now < due and not ends:
            return
        self._next[stage] = math.inf if ends else now + _SECONDS_BETWEEN_LINES
        steps = f": {done} of {total}" if total is not None and total > 1 else " ..." if not ends else ""
        note.print(f"{self._descriptions.get(stage, stage)}{steps}, {now - begun:.0f} s", markup=False, soft_wrap=True)


@contextmanager
def bars() -> Iterator[Stages]:
    """Show progress on standard error while the block runs: bars on a terminal, lines elsewhere.

    Yields
    ------
    Stages
        The object that is told how far each stage is, callable as ``stages(stage, done, total)``.
    """
    if not note.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=note) as progress:
        yield Bars(progress)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """Make a command end a user's error with one sentence and code 2, and Ctrl-C with code 130.

    With the environment variable ``CUR_DEBUG`` set the error keeps its traceback.

    Parameters
    ----------
    command : callable
        The function that does what the command is for.

    Returns
    -------
    callable
        The function that typer calls, of the same parameters; while ``as_json`` is given, standard output has results
        alone.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        signal.signal(signal.SIGTERM, _terminated)
        try:
            _quiet()
            _load()
            with _results_alone() if kwargs.get("as_json") else nullcontext():
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            note.print("Interrupted; nothing was left half-written.")
            raise typer.Exit(130) from None
        except (CURError, ValueError, TypeError, OSError, ImportError, MemoryError) as error:
            if os.environ.get("CUR_DEBUG"):
                raise
            note.print(f"[bold red]Error:[/] {_sentence(error)}", soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def print_json(data: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON.

    Parameters
    ----------
    data : mapping
        The result, of values that JSON has.
    """
    print(json.dumps(data), file=_RESULTS.get() or sys.stdout)


@contextmanager
def _results_alone() -> Iterator[None]:
    """Let nothing but results onto standard output, whatever libraries and the code of models print."""
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def _sentence(error: BaseException) -> str:
    from rich.markup import escape

    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return escape(text if text.endswith((".", "!", "?")) else f"{text}.")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that temporary directories go


def _load() -> None:
    """Import what the commands need; what other libraries say meanwhile is of no use to those who type a command."""
    disabled, show = logging.root.manager.disable, warnings.showwarning
    # Not standard error: handlers that are made meanwhile would go on writing to what stands in for it.
    logging.disable(logging.WARNING)
    warnings.showwarning = lambda *_, **__: None
    try:
        with redirect_stdout(io.StringIO()):
            import cur.integrations  # noqa: F401
    finally:
        warnings.showwarning = show
        logging.disable(disabled)


def _quiet() -> None:
    # Set before transformers is imported. Its bars and warnings speak of stages that ours already show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
