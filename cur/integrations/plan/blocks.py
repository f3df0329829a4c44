"""Which blocks of a transformer to compress."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from cur._lib.moved import former_names

__all__ = ["BY_ANGLE", "CHOICES", "choose_blocks", "inner_blocks", "shares"]

__getattr__ = former_names(__name__, (__name__,))

CHOICES = ("angular", "position", "random", "last")
"""How a number of blocks is chosen: those that turn the hidden state least, the same with what is near the end counting
less, any, or the last ones."""

BY_ANGLE = ("angular", "position")
"""Those that need the angular distances of blocks."""

Length: TypeAlias = "int | Sequence[int]"
"""The number of blocks of a stack, or of each stage of a network."""


def inner_blocks(stacks: Sequence[Length]) -> list[int]:
    """Return the indices of all blocks but the first and the last of each stack, from the lengths of the stacks.

    The blocks of all stacks are numbered through. The ends of a stack do what no other block does, and are never
    chosen. A network of stages has two ends, of its first stage and of its last.

    Parameters
    ----------
    stacks : sequence of int or sequence of int
        The number of blocks of each stack; of a network of stages the numbers of their blocks.

    Examples
    --------
    >>> from cur.integrations.plan.blocks import inner_blocks
    >>> inner_blocks([4, 3]), inner_blocks([[2, 2, 3]])
    ([1, 2, 5], [1, 2, 3, 4, 5])
    """
    found: list[int] = []
    first = 0
    for length in map(_blocks, stacks):
        found += range(first + 1, first + length - 1)
        first += length
    return found


def _allowed(stacks: Sequence[Length], among: Collection[int] | None) -> list[int]:
    return [index for index in inner_blocks(stacks) if among is None or index in among]


def _blocks(stack: Length) -> int:
    return stack if isinstance(stack, int) else sum(stack)


def _stages(stacks: Sequence[Length]) -> list[int]:
    """Return the lengths of stacks, those of stages one after the other."""
    return [length for stack in stacks for length in ([stack] if isinstance(stack, int) else stack)]


def shares(count: int, stacks: Sequence[Length], span: int = 1, *, among: Collection[int] | None = None) -> list[int]:
    """Return how many of `count` blocks are chosen in each stack: in proportion to those that may be, and one at least.

    Angles of an encoder, which are means over its tokens, and of its decoder, at the last token, are not comparable, so
    that each stack has a choice of its own. Runs go one after the other to the stack with the most blocks per run that
    it would have without (the method of Adams), of equals to the first.

    Parameters
    ----------
    count : int
        The number of blocks to choose; a multiple of `span`.
    stacks : sequence of int or sequence of int
        The number of blocks of each stack; of a network of stages, which is one, the numbers of their blocks.
    span : int, default 1
        Blocks are chosen in runs of this many.
    among : collection of int, optional
        Indices of the blocks that may be chosen. Default: all but the ends of stacks.

    Returns
    -------
    list of int
        A number for each stack, with the sum `count` if there is room for so many.

    Examples
    --------
    >>> from cur.integrations.plan.blocks import shares
    >>> shares(4, [12, 4]), shares(2, [3, 3])
    ([3, 1], [1, 1])
    """
    ends = list(itertools.accumulate(map(_blocks, stacks), initial=0))
    allowed = _allowed(stacks, among)
    inner = [sum(start <= index < stop for index in allowed) for start, stop in itertools.pairwise(ends)]
    runs = [0] * len(stacks)
    for _ in range(count // span):
        room = [number for number, most in enumerate(inner) if (runs[number] + 1) * span <= most]
        if not room:
            break
        runs[
            max(room, key=lambda number: (math.inf if not runs[number] else inner[number] / runs[number], -number))
        ] += 1
    return [span * number for number in runs]


def choose_blocks(
    distances: Mapping[int, float] | None,
    count: int,
    /,
    *,
    by: str = "angular",
    span: int = 1,
    stacks: Sequence[Length] | None = None,
    among: Collection[int] | None = None,
    seed: int = 0,
) -> list[int]:
    """Choose blocks, by default those that change their input least. The ends of a stack are never chosen.

    Parameters
    ----------
    distances : mapping of int to float, or None
        Angular distance of each run of `span` blocks, keyed by the index of its first block, as
        :meth:`Statistics.angular_spans` has it; for single blocks, :attr:`Statistics.angular`. Only for
        ``by="angular"`` and ``by="position"``.
    count : int
        The number of blocks to choose; a multiple of `span`.
    by : {"angular", "position", "random", "last"}, default "angular"
        ``"position"`` multiplies the distance of a block by the share of its stack that is still to come, itself
        included: what an early block gets wrong goes through all that follow, so later ones are compressed first, as in
        HierarchicalPrune (arXiv 2508.04663). ``"random"`` draws blocks without replacement from a generator seeded by
        `seed`.
    span : int, default 1
        Blocks are chosen in runs of this many, whose inner blocks may turn the state and turn it back. Of all choices
        of runs that do not overlap, the one with the smallest sum of distances.
    stacks : sequence of int or sequence of int, optional
        Number of blocks in each stack; of a network of stages a sequence of the numbers of their blocks: its ends are
        those of the first stage and the last. Default one stack, of as many blocks as `distances` has.
    among : collection of int, optional
        Indices of the blocks that may be chosen. Default: all but the ends of stacks.
    seed : int, default 0
        The seed of the choice ``by="random"``.

    Returns
    -------
    list of int
        Indices of `count` blocks, ascending; of equal distances the lower index.

    Raises
    ------
    ValueError
        If a distance is missing or not finite, or `count` is not between 1 and the number of blocks that may be
        chosen.

    Examples
    --------
    >>> from cur.integrations import choose_blocks
    >>> choose_blocks({0: 0.01, 1: 0.3, 2: 0.1, 3: 0.2, 4: 0.02}, 2)
    [2, 3]
    >>> choose_blocks(None, 2, by="last", stacks=[5])
    [2, 3]
    """
    if by not in CHOICES:
        raise ValueError(f"`by` must be one of {', '.join(CHOICES)}, got {by!r}")
    if span < 1 or (span > 1 and by not in BY_ANGLE):
        raise ValueError(f"`span` must be at least 1, and 1 unless `by` is {' or '.join(BY_ANGLE)}, got {span}")
    if stacks is None:
        if distances is None:
            raise ValueError("one of `distances` and `stacks` must be given: they say how many blocks there are")
        stacks = [len(distances) + span - 1]
    lengths = [_blocks(stack) for stack in stacks]
    inner = _allowed(stacks, among)
    total = sum(lengths)
    if not 1 <= count <= len(inner) or count % span:
        multiple = "" if span == 1 else f", and a multiple of `span`, {span},"
        raise ValueError(
            f"`count` must be between 1 and {len(inner)}{multiple} for a model of {total} blocks "
            f"(the first and the last of a stack are never chosen), got {count}"
        )
    if by == "last":
        return inner[-count:]
    if by == "random":
        return sorted(int(index) for index in np.random.default_rng(seed).permutation(inner)[:count])
    found = dict(distances or {})
    if by == "position":
        ends = np.repeat(np.cumsum(lengths), lengths)
        found = {
            index: distance * float(ends[index] - index) / float(np.repeat(lengths, lengths)[index])
            for index, distance in found.items()
            if 0 <= index < total
        }
    return _least(found, count, span, _stages(stacks), inner)


def _least(
    distances: Mapping[int, float], count: int, span: int, stacks: Sequence[int], inner: Sequence[int]
) -> list[int]:
    allowed = set(inner)
    firsts = [sum(stacks[:number]) for number in range(len(stacks))]
    known = [first + index for first, n in zip(firsts, stacks, strict=True) for index in range(n - span + 1)]
    starts = [index for index in known if all(index + step in allowed for step in range(span))]
    if sorted(distances) != known:
        raise ValueError(
            f"`distances` must have one entry per block, 0 to {sum(stacks) - 1} (runs of {span} begin at blocks of one "
            f"stack), got keys {sorted(distances)}"
        )
    bad = [index for index in sorted(distances) if not math.isfinite(distances[index])]
    if bad:
        raise ValueError(f"`distances` must be finite, they are not for block(s) {bad}")
    if span == 1:
        return sorted(sorted(starts, key=lambda index: (distances[index], index))[:count])
    # table[stop][j]: the cheapest j runs among the blocks before `stop`
    runs, low, high = count // span, min(inner), max(inner)
    table: dict[int, dict[int, tuple[float, tuple[int, ...]]]] = {low: {0: (0.0, ())}}
    for stop in range(low + 1, high + 2):
        here = dict(table[stop - 1])
        start = stop - span
        for number, (cost, chosen) in table[start].items() if start in starts else ():
            longer = (cost + distances[start], (*chosen, start))
            here[number + 1] = min(longer, here.get(number + 1, longer))
        table[stop] = here
    done = table[high + 1].get(runs)
    if done is None:
        raise ValueError(
            f"`count` must leave room for runs of {span} blocks that do not overlap, got {count} of {len(inner)} blocks"
        )
    return sorted(start + step for start in done[1] for step in range(span))
