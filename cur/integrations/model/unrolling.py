"""Parts of a model whose matrices are no linear layers by themselves, held as linear layers for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cur.integrations.model.experts import LinearExperts, is_experts
from cur.integrations.model.pointwise import LinearConvolution, is_pointwise
from cur.integrations.model.taken_apart import TakenApart
from cur.integrations.nn import swap_

__all__ = ["release_", "rolled", "take_apart", "unroll_", "unrolled"]


def take_apart(module: nn.Module) -> TakenApart | None:
    """Return what holds the matrices of a module as linear layers; None for one that is not taken apart.

    Parameters
    ----------
    module : nn.Module
        The module, which is not changed, and shares its parameters with what is returned.
    """
    if is_experts(module):
        return LinearExperts(module)
    return LinearConvolution(module) if is_pointwise(module) else None


def unroll_(model: nn.Module) -> dict[str, tuple[nn.Module, TakenApart]]:
    """Take apart what a model has that is more than one matrix or stores it otherwise, in place.

    Those are mixtures of experts and convolutions of one point.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.

    Returns
    -------
    dict of str to (nn.Module, TakenApart)
        The module that was there and the one that is there now, by name.
    """
    found = {name: module for name, module in model.named_modules() if name}
    pairs = {name: (module, apart) for name, module in found.items() if (apart := take_apart(module)) is not None}
    swap_(model, {name: linear for name, (_, linear) in pairs.items()})
    return pairs


@contextmanager
def unrolled(model: nn.Module) -> Iterator[None]:
    """Hold experts and convolutions of one point as linear layers for a while; what gets compressed stays so.

    Nothing is copied, and where nothing was compressed the original modules come back.

    Parameters
    ----------
    model : nn.Module
        The model, parts of which are linear layers while the context is open.
    """
    pairs = unroll_(model)
    try:
        yield
    finally:
        places = dict(model.named_modules())
        swap_(
            model,
            {
                name: module
                for name, (module, linear) in pairs.items()
                if places.get(name) is linear and not linear.compressed()
            },
        )


def release_(model: nn.Module) -> None:
    """Copy what is left of modules that were compressed in part, so that the memory of the rest is freed.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.
    """
    for module in model.modules():
        if isinstance(module, TakenApart) and module.compressed():
            for layer in module.modules():
                if type(layer) is nn.Linear:
                    for name, parameter in list(layer._parameters.items()):
                        if parameter is not None and parameter.untyped_storage().nbytes() > parameter.nbytes:
                            copy = nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))
                            setattr(layer, name, copy.requires_grad_(parameter.requires_grad))


def rolled(model: nn.Module, *, compressed: bool = True) -> dict[str, nn.Module]:
    """Return by name, for what was taken apart, the modules that were there before.

    Those of which some are compressed are left out if `compressed` is False.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    compressed : bool, default True
        Whether those with compressed layers are among them.
    """
    return {
        name: module.rolled()
        for name, module in model.named_modules()
        if isinstance(module, TakenApart) and (compressed or not module.compressed())
    }
