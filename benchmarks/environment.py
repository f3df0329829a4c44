"""Say where a figure was measured: processor, cores, threads, versions."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("cur-decomposition", "numpy", "scipy", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Return the machine and the versions, as they stand in the results."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    threads = os.environ.get("OMP_NUM_THREADS") or os.environ.get("OPENBLAS_NUM_THREADS") or str(os.cpu_count())
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": int(threads)},
        "versions": versions,
    }


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Let a script be told the precision of products in passes over text."""
    parser.add_argument("--precision", default="auto", help="of products in passes: float32, bfloat16 or auto")


def precision_of(model: nn.Module, options: argparse.Namespace, kept: str | None = None) -> str:
    """Return the precision of a script's passes: that of the results that are there, if rows are added to them."""
    from cur.integrations.model.precision import Precision, continued

    return Precision.of(model, continued(options.precision, kept, options.out)).name


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
