"""Sums of products over the inputs of modules, gathered by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from cur.integrations.model.hooks import Hook
from cur.integrations.model.masks import Masks, token_rows
from cur.integrations.nn import dense_weight, looks_up

__all__ = ["InputSums", "add_gram_", "first_false", "mirror_"]

# Blocks of features per second moment: (p + 1) / (2 p) of the products of a full matrix. Of 1, 2, 3, 5, 8 and 12 the
# fastest for 576 and 1,536 features on a CPU.
_TRIANGLE_BLOCKS = 8
# Rows in double precision at once: they stay in the cache of a processor, which is three times as fast as all at once.
_ROWS = 64


class _Sums(NamedTuple):
    """Sums at some time: of how many calls and vectors, and second moments or squares."""

    calls: int
    vectors: int
    total: torch.Tensor


class InputSums:
    """Sums over the inputs of modules, gathered by hooks; modules called with the same tensors share one.

    A module shares the sums of the one that was called first with its tensor, its leader, as long as it is called with
    the tensors of that one; with the first other it goes on with sums of its own.

    Parameters
    ----------
    modules : mapping of str to nn.Module
        The modules whose inputs are summed, by name.
    masks : Masks
        The padding masks of the pass.
    full : bool
        Whether second moments are summed, and not only squares.
    """

    def __init__(self, modules: Mapping[str, nn.Module], masks: Masks, *, full: bool) -> None:
        self.full = full
        self.masks = masks
        self.names: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        tokens = {id(module): looks_up(module) for module in modules.values()}
        self.tables = {key: count for key, count in tokens.items() if count is not None}
        for name, module in modules.items():
            # One module under two names (shared weights) is one module, with one hook.
            self.names.setdefault(id(module), []).append(name)
            self.modules[id(module)] = module
        self.leader: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.begun: dict[int, int] = {}
        self.earlier: dict[int, _Sums] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.products: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}
        self.seen: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int, int]] = {}
        # A backward pass may call the modules a second time.
        self.listening = False

    def hooks(self) -> list[Hook]:
        """Return what sees every module called."""
        return [(module, "before", self._hook(key)) for key, module in self.modules.items()]

    def start(self) -> None:
        """Begin with a batch: what modules are called with counts from now on."""
        self.seen.clear()
        self.earlier.clear()
        self.begun = dict(self.calls)
        self.listening = True

    def finish(self) -> str | None:
        """Name the first module, in the order of the calls, whose inputs are not finite.

        Returns
        -------
        str or None
            The name of the first module whose inputs are not finite, None if all are.

        Raises
        ------
        ValueError
            If the sums of a module that shared those of another are not known.
        """
        self.listening = False
        for key, leader in self.leader.items():
            if self.calls[key] != self.calls[leader]:
                self._part(key, leader, self.earlier.get(leader))
        self.earlier.clear()
        # One question to the device for all modules: each would make the host wait for it.
        first = first_false([torch.isfinite(total).all() for total in self.sums.values()])
        return None if first is None else f"the input of {self.names[list(self.sums)[first]][0]!r}"

    def _hook(self, key: int) -> Callable[..., None]:
        def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.listening:
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{self.names[key][0]!r} is not called with a tensor; its input cannot be measured")
            if self._adds(key, x):
                self._add(key, x)
            self.calls[key] = self.calls.get(key, 0) + 1

        return gather

    def _adds(self, key: int, x: torch.Tensor) -> bool:
        """Say whether a module adds its input to its sums: not where the leader, whose sums it shares, has done so."""
        first = self._first(key, x)
        leader = key if first == key else self.leader[first]
        known = self.leader.get(key)
        if known is None:
            # What a leader was called with before, this module was not.
            known = self.leader[key] = leader if self.calls.get(leader) == 1 else key
        elif known not in (key, leader):
            self._part(key, known, self._so_far(known))
            known = key
        if known == key and self.calls.get(key, 0) > self.begun.get(key, 0) and key not in self.earlier:
            # Those that follow may have been called with the first of its inputs in this pass alone.
            self.earlier[key] = self._so_far(key)
        return known == key

    def _first(self, key: int, x: torch.Tensor) -> int:
        """Return the module that was the first to be called with a tensor in this pass."""
        # Weak references: holding the tensors would keep every activation of the forward pass alive. The
        # version counter tells a tensor that was changed in place between two calls.
        # Tables of different sizes may be asked for the same tokens.
        place = id(x), self.tables.get(key, 0)
        found = self.seen.get(place)
        if found is not None and found[0]() is x and found[1] == x._version:
            return found[2]
        self.seen[place] = (weakref.ref(x), x._version, key)
        return key

    def _so_far(self, key: int) -> _Sums:
        return _Sums(self.calls[key], self.counts[key], self.products.get(key, self.sums[key]).clone())

    def _part(self, key: int, leader: int, shared: _Sums | None) -> None:
        """Let a module that shared the sums of another up to some time go on with its own."""
        if shared is None or self.calls[key] != shared.calls:
            one, other = self.names[key][0], self.names[leader][0]
            raise ValueError(
                f"{one!r} is called with some inputs of {other!r} and not with others; measure these modules in "
                "separate calls"
            )
        self.leader[key], self.counts[key], self.sums[key] = key, shared.vectors, shared.total.clone()
        if leader in self.products:
            self.products[key] = self.sums[key]
            self.sums[key] = self.products[key].diagonal()

    def _add(self, key: int, x: torch.Tensor) -> None:
        mask = self.masks.of(self.modules[key], x)
        if key in self.tables:
            self._count(key, x, mask)
            return
        rows = token_rows(x.detach(), mask, f"the input of {self.names[key][0]!r}")
        if key not in self.sums:
            n = rows.shape[1]
            self.counts[key] = 0
            self.sums[key] = torch.zeros(n, dtype=torch.float64, device=x.device)
            if self.full:
                self.products[key] = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        self.counts[key] += len(rows)
        if self.full:
            add_gram_(self.products[key], rows.to(torch.float64))
            self.sums[key] = self.products[key].diagonal()
        else:
            _add_squares_(self.sums[key], rows)

    def _count(self, key: int, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Count how often each token is looked up."""
        size = self.tables[key]
        tokens = x.detach().reshape(-1, 1)
        if mask is not None and mask.shape == x.shape:
            tokens = token_rows(tokens, mask, f"the input of {self.names[key][0]!r}")
        total = torch.bincount(tokens[:, 0].long(), minlength=size).to(torch.float64)
        if key not in self.sums:
            self.counts[key] = 0
            self.sums[key] = torch.zeros_like(total)
        self.sums[key] += total
        self.counts[key] += len(tokens)

    def lookups(self) -> tuple[str, ...]:
        """Return the names of the tables among the modules."""
        return tuple(name for key in self.names if key in self.tables for name in self.names[key])

    def results(
        self, *, partial: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, int]]:
        """Return sums of squares, second moments and counts by name; modules that share inputs share tensors.

        Parameters
        ----------
        partial : bool, default False
            Whether linear modules that no input reached are allowed; their sums and counts are zero.

        Raises
        ------
        ValueError
            If no input reached a module.
        """
        silent = [
            names[0]
            for key, names in self.names.items()
            if key not in self.leader or self.counts[self.leader[key]] == 0  # an expert that got padding alone
        ]
        if silent and not partial:
            raise ValueError(
                f"no input reached {', '.join(silent[:5])}; give more text, or leave out modules that it does not use"
            )
        for key in self.names.keys() - self.leader.keys():
            n = self.tables.get(key) or dense_weight(self.modules[key], self.names[key][0])[0].shape[1]
            self.leader[key], self.counts[key] = key, 0
            self.sums[key] = torch.zeros(n, dtype=torch.float64)
            if self.full and key not in self.tables:
                self.products[key] = torch.zeros(n, n, dtype=torch.float64)
        for product in self.products.values():
            mirror_(product)
        sums: dict[str, torch.Tensor] = {}
        products: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        final = {key: total.clone().cpu() for key, total in self.sums.items()}
        full = {key: product.cpu() for key, product in self.products.items()}
        for key, names in self.names.items():
            leader = self.leader[key]
            for name in names:
                sums[name], counts[name] = final[leader], self.counts[leader]
                if self.full and key not in self.tables:
                    products[name] = full[leader]
        return sums, products, counts


def first_false(said: list[torch.Tensor]) -> int | None:
    """Return the number of the first of some scalar booleans that is false, in one transfer; None if none is.

    Parameters
    ----------
    said : list of Tensor
        Scalar booleans on one device.
    """
    if not said:
        return None
    place = said[0].device
    answers = torch.stack([one.to(place) for one in said]).tolist()
    return answers.index(False) if False in answers else None


def add_gram_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add ``x^T x`` to the upper block triangle of `total`; :func:`mirror_` fills in the rest at the end.

    Products are taken in the dtype of `x`, sums over calls in that of `total`.

    Parameters
    ----------
    total : Tensor
        The sum, of shape (n, n), which is changed in place.
    x : Tensor
        The vectors to add, of shape (tokens, n).
    """
    for start, stop in _triangle(len(total)):
        rows, place = x[:, start:stop].T, total[start:stop, start:]
        if x.dtype == total.dtype:
            place.addmm_(rows, x[:, start:])
        else:
            place += rows @ x[:, start:]


def mirror_(total: torch.Tensor) -> None:
    """Copy the upper triangle onto the lower one.

    Parameters
    ----------
    total : Tensor
        The sum, of shape (n, n), which is changed in place.
    """
    for start, stop in _triangle(len(total)):
        square = total[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T


def _triangle(n: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last row, exclusive, of each block row of a triangle."""
    step = max(-(-n // _TRIANGLE_BLOCKS), 64)
    for start in range(0, n, step):
        yield start, min(start + step, n)


def _add_squares_(total: torch.Tensor, x: torch.Tensor) -> None:
    for rows in x.split(_ROWS if x.device.type == "cpu" else max(len(x), 1)):  # type: ignore[no-untyped-call]
        total += rows.to(torch.float64).square().sum(0)
