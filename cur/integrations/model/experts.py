"""Mixtures of experts whose weights are three-dimensional parameters, as one linear layer per expert.

transformers keeps the matrices of all experts of a block in one parameter of shape (experts, out, in). With every
expert a module of its own, named ``experts.gate_up_proj.3``, calibration, plans, compressed layers, adapters and
checkpoints need no second way of doing things.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.model.taken_apart import TakenApart, to_linear

__all__ = [
    "LinearExperts",
    "eager_experts",
    "inside_experts",
    "is_experts",
    "three_axes",
]

# What `transformers.integrations.moe.use_experts_implementation` puts on every class that keeps to its interface.
# The attribute of a configuration that names the way in which experts are multiplied with.
_EXPERTS = "_experts_implementation"

_Convolution = (nn.Conv1d, nn.ConvTranspose1d)

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Say whether a module holds experts as three-dimensional parameters and keeps to transformers' interface.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether its experts can be turned into linear layers.
    """
    if isinstance(module, LinearExperts) or not all(hasattr(module, name) for name in _INTERFACE):
        return False
    if getattr(module, "_is_expert_parallel", False):
        return False
    weights = [module._parameters.get(name) for name in _names(module)]
    return all(weight is not None and weight.ndim == 3 for weight in weights)


def three_axes(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module with three axes of which nothing is known, by their names in it.

    Known are those of convolutions, tables and offsets that are the same for a whole axis, and experts that
    :func:`is_experts` accepts: these are taken apart. Any other may be experts in a way of their own, the heads of an
    attention (XLNet), or blocks on a diagonal (RecurrentGemma); it stays as it is.

    Parameters
    ----------
    module : nn.Module
        The module to look at, without those inside of it.
    """
    if isinstance(module, _Convolution) or is_experts(module):
        return {}
    own = dict(module.named_parameters(recurse=False))
    return {name: value for name, value in own.items() if value.ndim == 3 and min(value.shape) > 1}


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


class LinearExperts(TakenApart):
    """The experts of one block, each matrix an ``nn.Linear`` or its compressed stand-in.

    Parameters
    ----------
    experts : nn.Module
        A module that :func:`is_experts` accepts. Its weights are not copied: the linear layers are views of them.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.shell = _without_parameters(experts)
        self.names = _names(experts)
        for name in self.names:
            weight = experts._parameters[name]
            bias = experts._parameters.get(f"{name}_bias")
            setattr(self, name, nn.ModuleList(_linears(weight, bias, transposed=bool(self.shell.is_transposed))))
        self.routed: tuple[int, Tensor] | None = None
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts.

        Parameters
        ----------
        hidden_states : Tensor, shape (tokens, width)
            The hidden states of all tokens.
        top_k_index : Tensor, shape (tokens, k)
            Experts of each token; the number of experts means none.
        top_k_weights : Tensor, shape (tokens, k)
            The weights of the chosen experts in the sum.

        Returns
        -------
        Tensor
            The weighted sum of the experts' outputs, of shape (tokens, width).
        """
        up, down = (getattr(self, name) for name in self.names)
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(up):
                continue
            token, place = torch.where(top_k_index == expert)
            # For those who watch an expert: how many tokens there are, and which of them it gets.
            self.routed = len(hidden_states), token
            state = up[expert](hidden_states[token])
            state = self.shell._apply_gate(state) if self.shell.has_gate else self.shell.act_fn(state)
            state = down[expert](state)
            if getattr(self.shell, "has_post_expert_norm", False):
                state = self.shell.post_expert_norm(state)
            total.index_add_(0, token, (state * top_k_weights[token, place, None]).to(total.dtype))
        self.routed = None
        return total

    def rolled(self) -> nn.Module:
        """Return the experts as transformers has them, multiplied out and copied into three-dimensional parameters."""
        experts = _without_parameters(self.shell)
        for name in self.names:
            layers = [to_linear(layer) for layer in getattr(self, name)]
            weight = torch.stack([layer.weight.detach() for layer in layers])
            if self.shell.is_transposed:
                weight = weight.mT.contiguous()
            setattr(experts, name, nn.Parameter(weight))
            if self.shell.has_bias:
                setattr(experts, f"{name}_bias", nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])))
        done: nn.Module = experts.train(self.training)
        return done


def inside_experts(model: nn.Module) -> set[str]:
    """Name the modules inside experts that are linear layers, which get some of the tokens of a batch.

    Parameters
    ----------
    model : nn.Module
        The model, or a block of it.

    Returns
    -------
    set of str
        The names of these modules.
    """
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for inner, _ in module.named_modules()
    }


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Let transformers multiply with the experts one by one for a while, by products that every precision reaches.

    Its grouped products are its own: neither autocast nor a mode of PyTorch's functions knows them.

    Parameters
    ----------
    model : nn.Module
        The model whose experts are run one by one.
    """
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    changed = [config for config in configs.values() if getattr(config, _EXPERTS, None) not in (None, "eager")]
    before = [getattr(config, _EXPERTS) for config in changed]
    for config in changed:
        setattr(config, _EXPERTS, "eager")
    try:
        yield
    finally:
        for config, was in zip(changed, before, strict=True):
            setattr(config, _EXPERTS, was)


def _without_parameters(experts: nn.Module) -> Any:
    """Return a module of the same class and settings, its activation and norms included, without weights of its own."""
    shell: Any = object.__new__(type(experts))
    shell.__dict__.update(experts.__dict__)
    shell._parameters = {}
    shell._modules = dict(experts._modules)
    # transformers would initialise the weights that are not there.
    shell._is_hf_initialized = True
    return shell


def _linears(weight: Any, bias: Any, *, transposed: bool) -> Iterator[nn.Linear]:
    for index in range(len(weight)):
        matrix = weight.detach()[index]
        matrix = matrix.T if transposed else matrix
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
        yield linear
