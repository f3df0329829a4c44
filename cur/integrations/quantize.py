"""Rounding the weights of a model to few bits, against what its inputs and its loss make important."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cur._lib.atomic import replace_file
from cur.integrations.factor.rounding import RoundedLayer, round_layer
from cur.integrations.factor.tables import round_table
from cur.integrations.files.reading import CheckpointError, read_object
from cur.integrations.measure.propagation import InputMoments, in_order, spread
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.blocks import chain_fault
from cur.integrations.model.running import Progress
from cur.integrations.model.targets import decoder_layers
from cur.integrations.model.usage import is_transformer
from cur.integrations.model.vocabulary import vocabulary, why_dense
from cur.integrations.nn import IntegerGrid, compressed_modules, is_linear, looks_up, swap_
from cur.integrations.plan.methods import ROUNDING_DAMPING
from cur.integrations.store.checkpoint import save
from cur.integrations.store.format import mark_, refuse_other_formats, unique_state

__all__ = [
    "Quantization",
    "asked_grids",
    "grid_of",
    "grids_for",
    "measured_with",
    "quantizable",
    "quantize_",
    "read_grids",
    "save_quantized",
]

_QUANTIZATION = "quantization.json"

_GROUP = 64
"""Entries that share a step below eight bits, unless something else is asked for: a step of two bytes and a zero then
take 0.3 bits of each."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What rounding a model changed.

    Attributes
    ----------
    errors : dict of str to float
        The root mean square change of each layer's outputs, relative to that of the outputs: on the text of the
        statistics, so a little less than on others; without statistics as if entries of its inputs were independent and
        of one size.
    before, after : int
        The bytes of the rounded layers before and after, as they are stored.
    precision : str
        The precision of matrix products in the passes of the statistics, ``"float32"`` for instance; empty where it is
        not known.
    grids : dict of str to dict
        The grid of each layer, as :meth:`~cur.integrations.nn.IntegerGrid.spec` gives it.
    predicted : dict of str to float
        What each layer is expected to cost, in nats per token and to second order, apart from what later layers make up
        for; empty without second moments of output gradients.
    notes : tuple of str
        Sentences on what was left out, and why.
    """

    errors: dict[str, float]
    before: int
    after: int
    precision: str = ""
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def grid_of(bits: int = 8, group: int | str | None = None, *, symmetric: bool | None = None) -> IntegerGrid:
    """Return the grid of some bits, with what is usual where nothing is said.

    Parameters
    ----------
    bits : int, default 8
        The bits of an integer: 2, 3, 4, 5, 6 or 8.
    group : int or "row", optional
        How many neighbours in a row share a step, a multiple of 8. Default: a row for 8 bits, else 64.
    symmetric : bool, optional
        Whether 0 lies in the middle of the grid, so that there are no zeros to store. Default: for 8 bits.

    Raises
    ------
    ValueError
        If there is no such grid.

    Examples
    --------
    >>> str(grid_of()), str(grid_of(4)), str(grid_of(3, "row"))
    ('int8', '4 bits in groups of 64', '3 bits')
    """
    usual = bits == 8 if symmetric is None else symmetric
    if group is None:
        return IntegerGrid(bits, None if bits == 8 else _GROUP, usual)
    if isinstance(group, str) and group != "row":
        raise ValueError(f"`group` must be a multiple of 8 such as 64, or row for one step a row, got {group!r}")
    return IntegerGrid(bits, None if isinstance(group, str) else group, usual)


def read_grids(path: str | os.PathLike[str]) -> dict[str, IntegerGrid]:
    """Read the grid of each layer from the ``quantization.json`` of a checkpoint, perhaps edited.

    Parameters
    ----------
    path : path
        The file, a JSON object with ``grids``.

    Returns
    -------
    dict of str to IntegerGrid
        The grids by the names of the layers.

    Raises
    ------
    CheckpointError
        If the file holds something else.
    """
    remedy = "name the quantization.json of a rounded checkpoint, or one like it"
    grids = read_object(path, remedy=remedy).get("grids")
    if not isinstance(grids, Mapping) or not grids:
        raise CheckpointError(f"{path} has no `grids`; {remedy}")
    found: dict[str, IntegerGrid] = {}
    for name, spec in grids.items():
        try:
            found[name] = IntegerGrid.from_spec(spec)
        except ValueError as error:
            raise CheckpointError(f"{path} has no grid for {name}: {error}") from error
    return found


def quantizable(model: nn.Module, /, *, tables: bool = False) -> list[str]:
    """Name the layers that :func:`quantize_` rounds: compressed ones, and other linear layers of the blocks.

    Linear layers that share their weight with another module are left out, and experts in three-dimensional parameters
    that were not compressed; of a transformer in which no stack of blocks is found, compressed layers are all. Of any
    other module linear layers are rounded wherever they are.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    tables : bool, default False
        Whether the tables of tokens and the output head are named as well, see
        :func:`~cur.integrations.model.vocabulary.vocabulary`; of those that share a weight the first.

    Returns
    -------
    list of str
        The names of the layers.

    Raises
    ------
    ValueError
        If the model has an adapter, some layers are rounded already or offloaded, or there is none to round.
    """
    refuse_adapters(model)
    layers = compressed_modules(model)
    for name, layer in layers.items():
        if layer.grid is not None:
            raise ValueError(
                f"{name} is rounded to {layer.grid} already; start from the checkpoint that it was made from"
            )
    try:
        blocks = tuple(f"{name}." for name, _ in decoder_layers(model)) if is_transformer(model) else ("",)
    except ValueError:
        blocks = ()
    factors = tuple(f"{name}." for name in layers)
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    names = [
        name
        for name, module in model.named_modules()
        if (name in layers and layers[name].factors())
        or (
            is_linear(module)
            and name.startswith(blocks)
            and not name.startswith(factors)
            and owners[id(module.weight)] == 1
        )
    ]
    if tables:
        names += [name for name in vocabulary(model) if name not in names]
    offloaded = [name for name in names if any(part.is_meta for part in model.get_submodule(name).parameters())]
    if offloaded:
        raise ValueError(f"{', '.join(offloaded[:5])} of `model` are offloaded; load the model onto a device")
    if not names:
        raise ValueError("`model` has no compressed layers, and no stack of blocks with linear layers was found in it")
    return names


def quantize_(
    model: nn.Module,
    statistics: Statistics | None = None,
    *,
    grid: IntegerGrid | Mapping[str, IntegerGrid] | None = None,
    tables: IntegerGrid | None = None,
    text: Sequence[Mapping[str, Tensor]] | None = None,
    correction: float = 0.5,
    damping: float = ROUNDING_DAMPING,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Quantization:
    r"""Round the linear layers of a model to few bits, in place.

    The factors of a layer are rounded in the order in which they are applied. With statistics, each is first fitted to
    what the rounded ones before it give: with inputs of second moment ``G``, and products ``P`` of the factors before
    as they were and ``Q`` as they are, a factor ``F`` becomes ``F + F (P - Q) G Q^T (Q G Q^T + d I)^-1``, by least
    squares. Then it is rounded by :func:`~cur.rounding.round_to_grid` under ``Q G Q^T + d I``, so that the errors of
    some entries make up for those of others: along rows, which is GPTQ (Frantar et al., arXiv 2210.17323; Babai's
    nearest plane by Chen et al., arXiv 2507.18553), and along columns as well where the statistics have second moments
    of output gradients.

    With text as well, layers are rounded block after block, each fitted to the inputs that it gets from rounded layers
    before it, whose errors it corrects in part. That needs a model whose blocks hand on one hidden state; of others,
    and of experts, layers are rounded for themselves.

    Parameters
    ----------
    model : nn.Module
        A model, compressed or not. Its :func:`quantizable` layers are rounded.
    statistics : Statistics, optional
        Statistics of this model, with full second moments of the inputs of all its :func:`quantizable` layers, and
        perhaps of their output gradients. Without them every entry goes to the nearest number.
    grid : IntegerGrid or mapping of str to IntegerGrid, optional
        The grid of all layers, or of each by its name; layers that are not named stay as they are. Default: eight bits,
        one step for each row. :func:`grid_of` makes usual ones. Tables and the output head may be named, too.
    tables : IntegerGrid, optional
        The grid of the tables of tokens and of the output head. Default: they stay as they are, but for those that
        `grid` names. What shares a weight is rounded once, and its integers are in memory once. Errors of a head, and
        of a table that it shares, make up for each other under the second moment of the head's inputs, where the
        statistics have it.
    text : sequence of mapping, optional
        Batches that layers are fitted on, those of the statistics for instance.
    correction : float, default 0.5
        How much of the error in a layer's inputs, left by those before it, is corrected, from 0 to 1.
    damping : float, default 0.1
        ``d`` as a multiple of the mean eigenvalue of ``Q G Q^T``. With less, errors go into directions that the text
        of the statistics hardly uses and other text may; with few tokens that can cost more than nearest multiples.
    precision : str, default "auto"
        The precision of matrix products in passes over the text, as for :func:`~cur.integrations.collect`.
    progress : callable, optional
        Called as ``progress(done, total)`` after every layer.

    Returns
    -------
    Quantization

    Raises
    ------
    TypeError
        If the model is no module.
    ValueError
        As :func:`quantizable`; if the model is quantized by another method, the statistics do not cover a layer, a grid
        is for a layer that cannot be rounded, or `damping` or `correction` is out of range.
    NumericalError
        If a weight is NaN or infinite, or a damped second moment is not positive definite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module, got {type(model).__name__}; load it first")
    refuse_adapters(model)
    refuse_other_formats(model)
    if not _is_between(damping, math.inf) or damping == math.inf:
        raise ValueError(f"`damping` must be a number that is at least 0, got {damping!r}")
    if not _is_between(correction, 1.0):
        raise ValueError(f"`correction` must be a number between 0 and 1, got {correction!r}")
    given = None if text is None else list(text)
    if given is not None and statistics is None:
        raise ValueError("`text` needs `statistics`, by which layers are rounded; collect them on it")
    if given is not None and not given:
        raise ValueError("`text` is empty: it must hold at least one batch, or be None")
    grids = asked_grids(model, grid, tables)
    known = vocabulary(model)
    made: dict[str, RoundedLayer] = {}

    def make(name: str, propagated: InputMoments | None = None) -> Callable[[Tensor], Tensor]:
        module = model.get_submodule(name)
        if name in known:
            made[name] = round_table(name, module, grids[name], statistics, tied=known[name], damping=damping)
        else:
            made[name] = round_layer(
                name,
                module,
                grids[name],
                statistics,
                damping=damping,
                propagated=propagated,
                correction=correction,
            )
        if progress is not None:
            progress(len(made), len(grids))
        return made[name].layer

    notes: list[str] = []
    if given is not None:
        if fault := _unfit(model, given):
            notes.append(f"Layers are not fitted to what rounded ones before them give: {fault}.")
        else:
            fitted = [name for name in grids if name not in known]
            in_order(model, spread(given, _widest(statistics, fitted)), fitted, make, precision=precision)
    for name in grids:
        if name not in made:
            make(name)
        made[name].layer.train(model.get_submodule(name).training)
    before = sum(_bytes(model.get_submodule(name)) for name in grids)
    swap_(model, {name: made[name].layer for name in grids})
    mark_(model)
    return Quantization(
        errors={name: made[name].error for name in grids},
        before=before,
        after=sum(_bytes(model.get_submodule(name)) for name in grids),
        precision="" if statistics is None else statistics.precision,
        grids={name: grid.spec() for name, grid in grids.items()},
        predicted={name: lost for name in grids if (lost := made[name].predicted) is not None},
        notes=tuple(notes),
    )


def asked_grids(
    model: nn.Module, grid: IntegerGrid | Mapping[str, IntegerGrid] | None = None, tables: IntegerGrid | None = None
) -> dict[str, IntegerGrid]:
    """Return the grid of each layer, table and head of a model that is rounded, as :func:`quantize_` takes them.

    Parameters
    ----------
    model : nn.Module
        The model to round.
    grid : IntegerGrid or mapping of str to IntegerGrid, optional
        The grid of all layers, or of each by its name, tables and heads among them.
    tables : IntegerGrid, optional
        The grid of tables and heads.

    Returns
    -------
    dict of str to IntegerGrid
        The grids by name.

    Raises
    ------
    TypeError
        If something else than a grid is given.
    ValueError
        As :func:`quantizable` and :func:`grids_for`; if there is no table and no head to round, or one has two grids.
    """
    if tables is not None and not isinstance(tables, IntegerGrid):
        raise TypeError(f"`tables` must be an IntegerGrid or None, got {tables!r}; grid_of(8) is one")
    known = vocabulary(model)
    found: dict[str, IntegerGrid]
    if isinstance(grid, Mapping):
        first = {other: name for name, tied in known.items() for other in tied}
        if shared := [name for name in grid if name in first]:
            raise ValueError(
                f"`grid` names {shared[0]}, whose weight is that of {first[shared[0]]}; name that, for both"
            )
        found = grids_for(quantizable(model, tables=True), grid)
    else:
        found = grids_for(quantizable(model), grid)
    if tables is None:
        return found
    if not known:
        raise ValueError("; ".join(why_dense(model)) or "`tables` must be None: the model has no table of tokens")
    if twice := [name for name in known if name in found and isinstance(grid, Mapping)]:
        raise ValueError(f"`grid` has a grid of {twice[0]} already; leave out `tables`, or that name")
    return found | dict.fromkeys(known, tables)


def measured_with(model: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return what statistics should cover for rounding some layers: modules, and those with gradients of outputs.

    Parameters
    ----------
    model : nn.Module
        The model to round.
    names : iterable of str
        The names of the layers to round.

    Returns
    -------
    list of str, list of str
        The layers with all that shares their weight; and the layers but heads, for whose gradients there would be a
        square of the vocabulary.
    """
    known = vocabulary(model)
    given = list(names)
    modules = [each for name in given for each in (name, *known.get(name, ()))]
    heads = {name for name in known if looks_up(model.get_submodule(name)) is None}
    return modules, [name for name in given if name not in heads]


def grids_for(
    names: Sequence[str], grid: IntegerGrid | Mapping[str, IntegerGrid] | None = None
) -> dict[str, IntegerGrid]:
    """Return the grid of each layer that is rounded.

    Parameters
    ----------
    names : sequence of str
        The layers that can be rounded, by :func:`quantizable`.
    grid : IntegerGrid or mapping of str to IntegerGrid, optional
        The grid of all of them, or of each by its name. Default: eight bits, one step for each row.

    Returns
    -------
    dict of str to IntegerGrid
        The grids by name, in the order of the layers; those that a mapping does not name are left out.

    Raises
    ------
    TypeError
        If something else than a grid is given.
    ValueError
        If a mapping is empty, or names a layer that cannot be rounded.
    """
    if grid is None or isinstance(grid, IntegerGrid):
        return dict.fromkeys(names, grid or IntegerGrid())
    given: Any = grid
    if not isinstance(given, Mapping) or not all(isinstance(one, IntegerGrid) for one in given.values()):
        raise TypeError(
            f"`grid` must be an IntegerGrid, or one by the name of each layer, got {grid!r}; grid_of(4) is one"
        )
    if not grid:
        raise ValueError("`grid` is an empty mapping, which rounds nothing; name the layers, or give one grid for all")
    if unknown := [name for name in grid if name not in names]:
        raise ValueError(
            f"`grid` names {', '.join(unknown[:5])}, which cannot be rounded; known are {', '.join(names[:5])} and "
            f"{max(len(names) - 5, 0)} more"
        )
    return {name: grid[name] for name in names if name in grid}


def _is_between(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= most


def _unfit(model: nn.Module, text: Sequence[Mapping[str, Tensor]]) -> str | None:
    """Say why layers cannot be fitted along the blocks; None if they can."""
    return chain_fault(model, text[0]) if is_transformer(model) else f"{type(model).__name__} is no transformer"


def _widest(statistics: Statistics | None, names: Iterable[str]) -> int:
    """Return the number of inputs of the widest layer."""
    if statistics is None:
        return 1
    try:
        return max(len(statistics.second_moment(name)) for name in names)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error


def save_quantized(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    found: Quantization,
    *,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a rounded model, whole or not at all; see :func:`~cur.integrations.save`.

    Parameters
    ----------
    model : PreTrainedModel
        The model that :func:`quantize_` has changed.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer, which is saved beside the model.
    directory : path
        The directory to create.
    found : Quantization
        The result of :func:`quantize_`, written as ``quantization.json``.
    source : path, optional
        The checkpoint that was rounded. What it says of how it was made stays true of it, and is copied. Default: what
        the model was loaded from, if that is a directory or on the hub.
    overwrite : bool, default False
        Whether a directory that exists may be replaced, as for :func:`~cur.integrations.save`.
    """

    def beside(scratch: Path) -> None:
        with replace_file(scratch / _QUANTIZATION) as stream:
            stream.write((json.dumps(asdict(found), indent=2) + "\n").encode())

    save(model, tokenizer, directory, overwrite=overwrite, source=source, beside=beside)


def _bytes(module: nn.Module) -> int:
    return sum(part.nbytes for part in unique_state(module).values())
