"""``python -m cur`` is the command ``cur``."""

from __future__ import annotations

from cur.cli import main

main()
