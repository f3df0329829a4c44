"""Take a tiny random model of every family that the installed transformers registers through all steps.

    python benchmarks/families.py                            # all families of all kinds
    python benchmarks/families.py --kind masked,seq2seq
    python benchmarks/families.py --families t5,whisper --again
    python benchmarks/families.py --page                     # the page and the table alone, from what is there

Kinds are those of the auto classes: causal, masked, seq2seq, image, audio, ctc, speech. Each family is compressed by
the paper's setting, to a budget and block by block, saved, loaded in another process, inspected, asked to generate,
exported dense, converted to another layout and rounded to eight bits. Each runs in processes of its own, with limits
of time and memory, forked from one that has imported transformers. Results go to ``benchmarks/results/families.json``
as they come, and a run goes on where the last one ended; ``--again`` repeats what is there. What transformers itself
cannot build, run or load again at this size is listed with its reason and not counted. At the end the page
``docs/reference/families.md`` is written. Some seconds a family on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import render

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results" / "families.json"
SECONDS = 240
GIGABYTES = 8
_WALL = 10


def run(
    names: Iterable[tuple[str, str]], *, jobs: int = 1, seconds: float = SECONDS
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Take families through all steps, each in processes of its own; yields kind, family and outcome as they come.

    Parameters
    ----------
    names : iterable of (str, str)
        Kinds and families.
    jobs : int, default 1
        How many at once.
    seconds : float
        The limit for one family, of the processor's time.
    """
    # The server that processes are forked from finds modules by this alone.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["family_steps"])
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_one, context, kind, family, seconds): (kind, family) for kind, family in names}
        for done in as_completed(waiting):
            yield (*waiting[done], done.result())


def _one(context: Any, kind: str, family: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="family-") as place:
        outcome = _in_process(context, seconds, "walk", kind, family, place)
        if outcome["steps"]:
            outcome = _in_process(context, seconds, "reload", kind, family, place, outcome)
        return outcome


def _in_process(context: Any, seconds: float, what: str, *arguments: Any) -> dict[str, Any]:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, seconds, what, *arguments))
    process.start()
    there.close()
    try:
        if here.poll(_WALL * seconds):
            with contextlib.suppress(EOFError):
                outcome: dict[str, Any] = here.recv()
                return outcome
            process.join()
            late = process.exitcode == -signal.SIGXCPU
            why = f"fault: {f'not done in {seconds:.0f} s' if late else f'the process ended with {process.exitcode}'}"
        else:
            why = f"fault: not done in {seconds:.0f} s"
        return _lost(arguments, what, why)
    finally:
        process.kill()
        process.join()
        here.close()


def _lost(arguments: tuple[Any, ...], what: str, why: str) -> dict[str, Any]:
    """Return the outcome of a process that did not end by itself: what it had noted, and what it was at."""
    known: dict[str, Any] = arguments[3] if what == "reload" else _noted(Path(arguments[2]))
    known["steps"] = {**known["steps"], "load" if what == "reload" else _next(known["steps"]): why}
    return known


def _noted(place: Path) -> dict[str, Any]:
    from family_steps import Outcome, noted

    return {**Outcome().to_dict(), **noted(place)}


def _next(steps: dict[str, str]) -> str:
    from family_steps import STEPS

    return next((step for step in STEPS if step not in steps and step != "load"), "load")


def _child(
    pipe: Any, seconds: float, what: str, kind: str, family: str, place: str, outcome: dict[str, Any] | None = None
) -> None:
    import torch
    import transformers
    from family_steps import Outcome, reload, walk

    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    # Of the processor, as on a busy machine others may take most of it.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        found = (
            walk(kind, family, Path(place)) if what == "walk" else reload(kind, Path(place), Outcome(**outcome or {}))
        )
    pipe.send(found.to_dict())
    pipe.close()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="", help="kinds, separated by commas; all by default")
    parser.add_argument("--families", default="", help="model types, separated by commas; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="families at once")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one family")
    parser.add_argument("--again", action="store_true", help="repeat what is in the results")
    parser.add_argument("--page", action="store_true", help="write the page from the results alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    data = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: dict[str, dict[str, Any]] = data.get("rows", {})
    if not options.page:
        rows = _run(options, rows)
    for word, count in Counter(render.judged(row) for row in rows.values()).items():
        print(f"{count:4} {word}")
    if options.out == RESULTS:
        render.main()
    return rows


def _run(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    import tiny
    from environment import environment

    kinds = options.kind.split(",") if options.kind else list(tiny.KINDS)
    asked = set(options.families.split(",")) if options.families else None
    names = [
        (kind, family)
        for kind in kinds
        for family in tiny.families(kind)
        if (asked is None or family in asked) and (options.again or f"{kind}/{family}" not in rows)
    ]
    print(f"{len(names)} families", file=sys.stderr)
    for kind, family, outcome in run(names, jobs=options.jobs, seconds=options.seconds):
        rows[f"{kind}/{family}"] = outcome
        print(f"{kind:8} {family:28} {render.judged(outcome):9} {sum(outcome['seconds'].values()):6.1f} s", flush=True)
        for step, ended in {"": outcome["why"], **outcome["steps"]}.items():
            if ended not in ("", "ok", "-"):
                print(f"    {step:9} {ended}", flush=True)
        data = {**environment(), "rows": dict(sorted(rows.items()))}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
