"""The command ``cur``: a thin caller of public functions.

Nothing here is imported by the rest of the package. Modules that load torch are imported inside the commands,
so that ``cur --help`` answers at once.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit code 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    try:
        from cur.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "tomli", "tomli_w"):
            raise
        print(
            f"The command line needs {error.name}, not installed here; type: "
            "pip install 'cur-decomposition[cli,transformers]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="cur")
