"""From what is typed to the values of fields that have no single type."""

from __future__ import annotations

import re

__all__ = ["parse_layers", "parse_names", "parse_size"]


def parse_size(text: str) -> int:
    """Return a size such as "200MB", "1.5 GiB" or "123456" in bytes.

    Parameters
    ----------
    text : str
        The size as it was typed: a number, perhaps with k, m, g or t, an i for powers of 1024, and a B.

    Raises
    ------
    ValueError
        If it is no such size.

    Examples
    --------
    >>> parse_size("200MB"), parse_size("1.5 KiB"), parse_size("12")
    (200000000, 1536, 12)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"--size must be a number of bytes, or one with a unit such as 200MB, got {text!r}")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_layers(text: str) -> int | str | tuple[int, ...]:
    """Return a number of blocks ("10"), "all", or indices ("3,5-8"; of a single block "3,").

    Parameters
    ----------
    text : str
        The blocks as they were typed.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> parse_layers("10"), parse_layers("all"), parse_layers("3,5-8"), parse_layers("3,")
    (10, 'all', (3, 5, 6, 7, 8), (3,))
    """
    if text == "all":
        return text
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None and part.strip():
            raise ValueError(f"--layers must be a number of blocks, indices such as 3,5-8, or all, got {text!r}")
        if match is not None:
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise ValueError(f"--layers must be a number of blocks, indices such as 3,5-8, or all, got {text!r}")
    return tuple(sorted(set(found)))


def parse_names(text: str) -> str | tuple[str, ...]:
    """Return names that are separated by commas; "all-linear" stands for itself.

    Parameters
    ----------
    text : str
        The names as they were typed.

    Examples
    --------
    >>> parse_names("q_proj, k_proj"), parse_names("all-linear")
    (('q_proj', 'k_proj'), 'all-linear')
    """
    if text == "all-linear":
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())
