"""Compressed layers in a model: which layers can be compressed, finding them, and putting them in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cur.integrations.nn.base import CompressedLinear
from cur.integrations.nn.embedding import EmbeddingFactors, is_table
from cur.integrations.nn.lookup import times_of
from cur.integrations.nn.registry import layer_class
from cur.integrations.nn.replaceable import carry_hooks_, has_own_forward
from cur.integrations.nn.table import is_whole, reading

__all__ = [
    "compressed_modules",
    "dense_weight",
    "dtype_of",
    "grids_of",
    "is_head",
    "is_linear",
    "layout_for",
    "learn_as_",
    "looks_up",
    "made_of",
    "stand_in",
    "swap_",
    "tied_to",
]

# Units of rounding by which a subclass may differ from `nn.Linear`: it may add its bias afterwards.
_ROUNDING = 64


def dense_weight(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, bool]:
    """Return weight (out x in, a view), bias and whether the layer stores its weight transposed.

    A table of embeddings is the layer that takes one token at a time: its inputs are the tokens.

    Parameters
    ----------
    module : nn.Module
        The linear layer or table to look into.
    name : str
        The name of the layer, for errors.

    Raises
    ------
    TypeError
        If the module is neither an ``nn.Linear``, a transformers ``Conv1D`` nor a table of embeddings, or a subclass
        that does more than :func:`is_linear` and :func:`~cur.integrations.nn.lookup.times_of` allow: it may keep its
        weight in another form (quantized, adapted).
    """
    if is_linear(module) and isinstance(module, nn.Linear):
        return module.weight, module.bias, False
    if type(module) is Conv1D:
        return module.weight.T, module.bias, True
    if is_table(module) or times_of(module) is not None:
        table: Any = module
        return table.weight.T, None, False
    if parts := made_of(module):
        raise TypeError(
            f"the weight of {name} is computed from {', '.join(parts)}; make it a parameter first "
            "(`remove_parametrizations`, `prune.remove`), or exclude it from the targets"
        )
    raise TypeError(
        f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D layers can be compressed, and "
        "subclasses that do what these do, so exclude it from the targets"
    )


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is one matrix times a vector: ``nn.Linear``, or ``Conv1D`` as in GPT-2.

    ``Conv1D`` of transformers holds the transpose: its weight has shape (in, out). A subclass of ``nn.Linear`` is one
    if on random inputs it gives what ``nn.Linear`` would give with its weight and bias.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether it is a linear layer.
    """
    if made_of(module) or has_own_forward(module):
        return False
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    # Layers of one class, size and settings are tried once.
    settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    key = (type(module), module.bias is None, module.weight.dtype, tuple(module.weight.shape), repr(settings))
    if key not in _TRIED:
        _TRIED[key] = _multiplies(module)
    return _TRIED[key]


_TRIED: dict[Any, bool] = {}


def made_of(module: nn.Module) -> list[str]:
    """Name the parameters that the weight of a layer is computed from, where it is none itself.

    A layer is such a one while it is pruned, or its weight normalized or otherwise parametrized.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    list of str
        The names within the module; empty where the weight is a parameter.
    """
    if "weight" in module._parameters or not isinstance(module, (nn.Linear, Conv1D)):
        return []
    return [name for name, _ in module.named_parameters() if name != "bias"]


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Try a layer on random inputs; one without weights in memory with random ones."""
    shape = (module.out_features, module.in_features)
    if tuple(module.weight.shape) != shape or not module.weight.is_floating_point():
        return False
    generator = torch.Generator().manual_seed(0)
    tried = copy.deepcopy(module) if module.weight.is_meta else module
    if module.weight.is_meta:
        tried.to_empty(device="cpu")
        for parameter in tried.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
    x = torch.randn(2, 3, module.in_features, generator=generator, device="cpu").to(tried.weight)
    try:
        found: Any = type(tried).forward(tried, x)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  (whatever a module says that takes other inputs)
        return False
    wanted = nn.functional.linear(x, tried.weight, tried.bias)
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    allowed = _ROUNDING * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return bool(((found - wanted).abs() <= allowed).all())


def looks_up(module: nn.Module) -> int | None:
    """Return the number of tokens that a table of embeddings has, compressed or not; None for any other module.

    Parameters
    ----------
    module : nn.Module
        The module to look at.
    """
    if isinstance(module, CompressedLinear):
        return module.in_features if module.by_inputs else None
    table: Any = module
    return int(table.num_embeddings) if is_table(module) or times_of(module) is not None else None


def is_head(module: object) -> bool:
    """Say whether a module can be the output head of a model, dense or compressed: one that multiplies.

    Parameters
    ----------
    module : object
        What the model calls its output head, perhaps None.

    Returns
    -------
    bool
        Whether it takes hidden states and gives a number for each token.
    """
    return isinstance(module, nn.Linear) or (isinstance(module, CompressedLinear) and not module.by_inputs)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype that a linear layer computes in, dense or compressed.

    Parameters
    ----------
    layer : nn.Module
        The linear layer to ask.

    Returns
    -------
    torch.dtype
        That of its first parameter, which of a rounded one are its steps.
    """
    return next(layer.parameters()).dtype


def layout_for(module: nn.Module, layout: str) -> str:
    """Return the layout in which a dense layer is stored where linear layers have another one.

    Parameters
    ----------
    module : nn.Module
        The dense layer or table.
    layout : str
        The layout of linear layers.
    """
    return EmbeddingFactors.layout if is_table(module) else layout


def stand_in(
    dense: nn.Module, name: str, spec: Mapping[str, Any], *, device: torch.device | str | None = None
) -> CompressedLinear:
    """Return the layer that a description asks for in the place of a dense one, with factors yet to be loaded.

    Parameters
    ----------
    dense : nn.Module
        The layer that it replaces, whose weight may be missing.
    name : str
        The name of the layer, for messages.
    spec : mapping
        The description of the layer, as :meth:`CompressedLinear.spec` gives it.
    device : optional
        Default: that of the dense layer.

    Raises
    ------
    ValueError
        If no layer of these sizes can be made.
    """
    weight, bias, transposed = dense_weight(dense, name)
    m, n = weight.shape
    kind = layer_class(spec["layout"])
    if not kind.replaces(dense):
        raise ValueError(f"the layout `{kind.layout}` is not for a {type(dense).__name__}")
    made = kind.from_spec(
        spec,
        n,
        m,
        bias=bias is not None,
        transposed=transposed,
        device=weight.device if device is None else device,
        dtype=weight.dtype,
    )
    for part in made.modules():
        # transformers would initialise factors, by rules for dense layers of these names.
        part._is_hf_initialized = True  # type: ignore[assignment]
    learn_as_(made, dense)
    return made


def learn_as_(layer: nn.Module, dense: nn.Module) -> None:
    """Freeze of a layer what is frozen of the one that it stands in for: its weight, its bias, both or none of them.

    Parameters
    ----------
    layer : nn.Module
        The layer, which is changed in place.
    dense : nn.Module
        The layer that it stands in for.
    """
    learns = {"weight": False, "bias": False}
    for name, parameter in dense.named_parameters():
        learns[_weight_or_bias(name)] |= parameter.requires_grad
    for name, parameter in layer.named_parameters():
        if not learns[_weight_or_bias(name)]:
            parameter.requires_grad_(False)


def _weight_or_bias(name: str) -> str:
    return "bias" if name.rpartition(".")[2] == "bias" else "weight"


def compressed_modules(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return every compressed layer of a model by name; a layer shared by two parents appears once.

    What such a layer is made of is not listed.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    """
    found: dict[str, CompressedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear) and not (name and name.rpartition(".")[0] in found):
            found[name] = module
    return found


def grids_of(layers: Iterable[Any]) -> str:
    """Say what layers are rounded to, in words; empty if none is.

    Parameters
    ----------
    layers : iterable
        Compressed layers, or what is known of them: with a ``grid``, None where a layer is not rounded.

    Returns
    -------
    str
        The grids, for instance ``"4 bits in groups of 64, int8"``.
    """
    return ", ".join(sorted({str(layer.grid) for layer in layers if layer.grid is not None}))


def swap_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put other modules in the place of named ones, in place.

    A module that several parents share is replaced under each of them by the same new module, so it stays
    shared. A module whose weight is tied to that of one that is replaced by a rounded whole layer gets a layer that
    reads the same integers, unless it is named itself. Hooks of the modules go over to those that replace them.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.
    replacements : mapping of str to nn.Module
        New module by the dotted name of the one it replaces.

    Returns
    -------
    dict of str to nn.Module
        The modules that were there, by name: put in their places again, they leave the model as it was.
    """
    replacements = {**_tied_layers(model, replacements), **replacements}
    replaced = {name: model.get_submodule(name) for name in replacements}
    new = {id(module): replacements[name] for name, module in replaced.items()}
    places = [
        (parent, child_name, new[id(child)])
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if id(child) in new
    ]
    for name, module in replaced.items():
        carry_hooks_(replacements[name], module)
    for parent, child_name, module in places:
        setattr(parent, child_name, module)
    return replaced


def _tied_layers(model: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return what else is replaced: the modules that read the weight of one that becomes a rounded whole layer."""
    found: dict[str, nn.Module] = {}
    for name, layer in replacements.items():
        if isinstance(layer, CompressedLinear) and is_whole(layer):
            for other in tied_to(model, name):
                if other not in replacements:
                    found[other] = reading(layer, model.get_submodule(other))
    return found


def tied_to(model: nn.Module, name: str) -> list[str]:
    """Name the other modules whose weight is the very parameter that a module has as its weight, or will be.

    While transformers loads a model, what will be tied is only listed.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    name : str
        The name of the module.

    Returns
    -------
    list of str
        The names, in the order of the model; a module under two names is one module.
    """
    module = model.get_submodule(name)
    listed: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})

    def source(place: str) -> str:
        return listed.get(f"{place}.weight", f"{place}.weight")

    def is_tied(other: str, part: nn.Module) -> bool:
        weight = part._parameters.get("weight")
        own = module._parameters.get("weight")
        return weight is not None and own is not None and (weight is own or source(other) == source(name))

    return [other for other, part in model.named_modules() if part is not module and is_tied(other, part)]
