"""LoRA of PEFT around compressed layers, by the names of the dense ones. Imported where PEFT is, and nowhere else.

PEFT keeps types of layers that are not its own in the configuration of each adapter, not in a table, and a saved
configuration does not have them. So what puts adapters into a model tells every configuration of ours.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraModel, PeftType
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from cur.integrations.model.experts import LinearExperts
from cur.integrations.nn import CompressedLinear

__all__ = ["CompressedLoraModel", "LoraCompressedLinear", "register"]

# What begins with other adapters than these takes their product out of the weight.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


class _Dora(DoraLinearVariant):
    """DoRA beside a layer whose weight is a product: it is formed at every call."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Make the magnitudes of an adapter."""
        magnitudes = DoraLinearLayer(fan_in_fan_out=False)
        magnitudes.update_layer(base_layer=module.seen(), **_parts(module, adapter_name, weights=True))
        module.lora_magnitude_vector[adapter_name] = magnitudes

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add what the adapter changes to the outputs of the layer."""
        dropout = module.lora_dropout[active_adapter]
        plain = isinstance(dropout, nn.Identity) or not module.training
        change: Tensor = module.lora_magnitude_vector[active_adapter](
            dropout(x),
            base_layer=module.seen(),
            base_result=result if plain else None,
            adapter_name=active_adapter,
            **_parts(module, active_adapter, weights=False),
        )
        return result + change


def _parts(module: Any, name: str, *, weights: bool) -> dict[str, Any]:
    parts = {key: getattr(module, key)[name] for key in ("lora_A", "lora_B")}
    if weights:
        parts = {key: part.weight for key, part in parts.items()}
    return {**parts, "scaling": module.scaling[name]}


class LoraCompressedLinear(Linear):
    """Adapters beside a whole compressed layer, in any layout, rounded or not.

    They take and give what the layer does: around neurons that were removed, the kept ones. Merged, they are part of
    the layer, whose rank grows by theirs at most; the layer as it was is kept until they are taken out again.

    Parameters
    ----------
    *args, **options : Any
        What PEFT hands to its own adapters of linear layers: the layer, the name of the adapter, its configuration.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fan_in_fan_out = False  # whichever way the dense layer stored its weight

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.applied.in_features, layer.applied.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants of LoRA that need no stored weight."""
        return {(): None, ("use_dora",): _Dora}

    def seen(self) -> Any:
        """Return weight and bias of the layer under the names that a linear layer has for them."""
        base: Any = self.get_base_layer()
        layer = base.applied
        bias = layer.bias_tensor() if isinstance(layer, CompressedLinear) else layer.bias
        return SimpleNamespace(weight=layer.weight, bias=bias, parameters=layer.parameters)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the layer.

        Parameters
        ----------
        safe_merge : bool, default False
            Whether merged weights that are not finite are refused.
        adapter_names : list of str, optional
            The adapters to merge. Default: the active ones.

        Raises
        ------
        ValueError
            If the layer is rounded, or, with `safe_merge`, the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        before: Any = self.get_base_layer()
        original = self._caches.get("original", before)
        after = before
        for name in names:
            left, right = self.lora_B[name].weight * self.scaling[name], self.lora_A[name].weight
            scale = None
            if name in self.lora_magnitude_vector:
                weight = original.applied.weight.float() + left.float() @ right.float()
                scale = self.lora_magnitude_vector[name].weight / torch.linalg.vector_norm(weight, dim=1)
            after = after.plus(left, right, scale=scale)
        if safe_merge and not all(bool(part.isfinite().all()) for part in after.parameters()):
            raise ValueError(f"the adapters {', '.join(names)} merged would give weights that are not finite")
        learns = any(part.requires_grad for part in before.parameters())
        self._caches["original"] = original
        self.base_layer = after.requires_grad_(learns)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the layer back as it was, bit for bit, with the adapters beside it."""
        if self.merged:
            device = next(self.base_layer.parameters()).device
            self.base_layer = self._caches.pop("original").to(device).train(self.training)
            self.merged_adapters.clear()


class CompressedLoraModel(LoraModel):
    """What puts adapters of LoRA into models, with and without compressed layers."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into a model, refusing before it is changed what compressed layers do not take.

        Parameters
        ----------
        model : nn.Module
            The model, which is changed in place.
        adapter_name : str
            The name of the adapter, whose configuration is known.
        *args, **kwargs
            What PEFT hands over.

        Raises
        ------
        ValueError
            If the configuration asks for what compressed layers do not have.
        """
        if any(isinstance(module, CompressedLinear) for module in model.modules()):
            self._prepare(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare(self, model: nn.Module, config: Any) -> None:
        config._register_custom_module({CompressedLinear: LoraCompressedLinear})
        self._prepare_adapter_config(config, self.get_model_config(model))  # type: ignore[no-untyped-call]
        whole = _whole_layers(model)
        inside = tuple(f"{name}." for name in whole)
        if str(config.target_modules).lower() == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = {name for name in config.target_modules if not name.startswith(inside)} | whole
        found = {name for name, _ in model.named_modules() if self._check_target_module_exists(config, name)}
        changed = _name_experts(model, config, found)
        if named := sorted(found & whole):
            _check(config, named[0])
            _check_layers(model, config, named)
            # A pattern for a layer may fit what it is made of, too.
            parts = {name for name in found if name.startswith(tuple(f"{layer}." for layer in named))}
            found, changed = found - parts, changed or bool(parts)
        if changed:
            config.target_modules = found

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        parts: Any = self.model.named_modules()
        for name, module in parts:
            layer: Any = module.get_base_layer() if isinstance(module, LoraCompressedLinear) else None
            if layer is not None and (why := layer.unchangeable()):
                elsewhere = ", or merge it into the checkpoint that was rounded" if layer.grid is not None else ""
                raise ValueError(
                    f"the adapter {', '.join(map(repr, module.active_adapters))} cannot be merged into {name}, which "
                    f"{why}; keep it beside the checkpoint{elsewhere}"
                )


def _whole_layers(model: nn.Module) -> set[str]:
    """Name the compressed layers, those that have adapters already among them."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, CompressedLinear)}
    outer = [name for name in parts if not any(name.startswith(f"{other}.") for other in parts)]
    return {name.removesuffix(".base_layer") for name in outer}


def _check(config: Any, name: str) -> None:
    """Refuse what needs a weight to read or write in one piece."""
    if config.init_lora_weights not in _BEGINNINGS:
        raise ValueError(
            f"`init_lora_weights` must be one of {', '.join(map(repr, _BEGINNINGS))} for an adapter of a compressed "
            f"layer such as {name}, as others begin by changing a weight that is not stored in one piece; got "
            f"{config.init_lora_weights!r}"
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for option in (*variants, "lora_bias"):
        if option != "use_dora" and getattr(config, option):
            raise ValueError(
                f"`{option}` must not be set for an adapter of a compressed layer such as {name}, which takes LoRA and "
                f"DoRA; got {getattr(config, option)!r}"
            )


def _check_layers(model: nn.Module, config: Any, names: Sequence[str]) -> None:
    """Refuse layers with adapters on their factors, and what PEFT would train of a layer and not save."""
    for name in names:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        inner = [key for key, part in layer.named_modules() if isinstance(part, BaseTunerLayer)]
        if inner:
            raise ValueError(
                f"{name} has an adapter on its factor {inner[0]} already; merge that, or name the factor for this "
                "adapter as well"
            )
        if config.bias == "lora_only" and layer.has_bias:
            raise ValueError(
                f"`bias` must be 'none' or 'all' for an adapter of a compressed layer with a bias such as {name}, got "
                "'lora_only'"
            )


def _name_experts(model: Any, config: Any, found: set[str]) -> bool:
    """Name each expert's layer, in place, where all experts of a block are named at once; say whether there were any.

    transformers has one parameter for all of them, and so has who writes a configuration.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}
    if experts and not isinstance(config.target_modules, str):
        known = copy.deepcopy(config)
        convert_peft_config_for_transformers(known, model=model, conversions=get_model_conversion_mapping(model))
        if now := sorted(set(known.target_parameters or ()) - set(config.target_parameters or ())):
            raise ValueError(
                f"`target_modules` names experts as transformers did before it renamed them, got "
                f"{sorted(config.target_modules)}; name {', '.join(now)}"
            )
    ends = tuple(f".{end}" for end in config.target_parameters or ())
    for name, module in experts.items():
        for family in module.names:
            full = f"{name}.{family}"
            if full in found or f".{full}".endswith(ends):
                found.discard(full)
                found.update(f"{full}.{index}" for index in range(len(getattr(module, family))))
    if experts and config.target_parameters:
        names = [f".{name}" for name, _ in model.named_parameters()]
        config.target_parameters = [
            end for end in config.target_parameters if any(name.endswith(f".{end}") for name in names)
        ]
    # PEFT takes a pattern apart where transformers has renamed experts.
    return bool(experts and found)


def register() -> None:
    """Let PEFT put adapters of LoRA around compressed layers, in this process."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = CompressedLoraModel
