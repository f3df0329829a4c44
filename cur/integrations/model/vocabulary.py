"""The tables of tokens of a model and its output head, and which of them share a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cur.integrations.model.usage import is_transformer
from cur.integrations.nn import CompressedLinear, is_linear, looks_up, tied_to

__all__ = ["vocabulary", "why_dense"]


def vocabulary(model: nn.Module, /) -> dict[str, tuple[str, ...]]:
    """Return the tables of tokens and the output head of a model that can be rounded whole.

    Of a transformer these are the embeddings of its inputs and its output head; of any other module all tables, as its
    other linear layers are rounded wherever they are.

    Parameters
    ----------
    model : nn.Module
        The model to look through.

    Returns
    -------
    dict of str to tuple of str
        By the name of each the names of the others that are tied to its weight; of several that share one the first is
        listed alone.
    """
    return {name: tied for name, tied in _parts(model).items() if not _fault(model, name, tied)}


def why_dense(model: nn.Module, /) -> list[str]:
    """Say of the tables of tokens and the output head that cannot be rounded why that is so.

    Parameters
    ----------
    model : nn.Module
        The model to look through.

    Returns
    -------
    list of str
        A sentence for each.
    """
    faults = (_fault(model, name, tied) for name, tied in _parts(model).items())
    return [sentence for sentence in faults if sentence]


def _parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    wanted = {id(part) for part in _ends(model)}
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        known = {other for tied in found.values() for other in tied}
        if id(module) in wanted and name not in known and not isinstance(module, CompressedLinear):
            found[name] = tuple(tied_to(model, name))
    return found


def _ends(model: Any) -> list[nn.Module]:
    if not is_transformer(model):
        return [module for module in model.modules() if isinstance(module, nn.Embedding)]
    parts = (_called(getattr(model, get, None)) for get in ("get_input_embeddings", "get_output_embeddings"))
    return [part for part in parts if part is not None]


def _called(get: Callable[[], Any] | None) -> nn.Module | None:
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # as models say that they have none
        return None
    return found if isinstance(found, nn.Module) else None


def _fault(model: nn.Module, name: str, tied: tuple[str, ...]) -> str | None:
    for each in (name, *tied):
        module = model.get_submodule(each)
        kind = type(module).__name__
        if looks_up(module) is None and not is_linear(module):
            return f"{each} stays as it is: a {kind} does more than look up rows or multiply"
        if tied and looks_up(module) is None and not isinstance(module, nn.Linear):
            return f"{name} stays as it is: its weight is tied to that of {each}, which stores it transposed"
    module = model.get_submodule(name)
    if isinstance(module, nn.EmbeddingBag):
        return f"{name} stays as it is: bags of embeddings are not rounded whole"
    return None
