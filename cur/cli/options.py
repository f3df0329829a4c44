"""Options that are about one run of a command, and so are in no configuration file; and those of small commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "Checkpoint", "Out", "Overwrite", "TrustRemoteCode"]

Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a compressed checkpoint.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to create.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it is not empty.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings, where it needs its own.")
]
