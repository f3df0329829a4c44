"""Running a model for measurement: without its head, inputs in place, a culprit named on failure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

__all__ = ["Progress", "body", "check_finite_weights", "evaluating", "find_nonfinite", "model_inputs", "run"]

Progress: TypeAlias = Callable[[int, "int | None"], object]
"""Called as ``progress(done, total)`` after every batch, in samples; ``total`` is None where unknown."""


def body(model: nn.Module) -> nn.Module:
    """Return the model without its output head, or the model itself where that cannot be told apart."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and put every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not `train(True)`, which would also wake modules that were frozen in evaluation mode.
        for module in training:
            module.training = True


def model_inputs(module: nn.Module, batch: Mapping[str, Any] | torch.Tensor) -> dict[str, Any]:
    """Turn a batch into keyword arguments of ``module.forward``, on the device of its first parameter.

    A bare tensor is taken as ``input_ids``. Labels are left out, the key-value cache is switched off, and a
    batch padded on the left gets position ids that count real tokens only, where the module takes them: many
    models would otherwise count the padding as well, and the result would depend on it.
    """
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch must be a mapping of tensors or one tensor of token ids, got {type(batch).__name__}"
        )
    place = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    inputs = {
        key: value.to(place) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    accepted = inspect.signature(module.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    mask = inputs.get("attention_mask")
    # RoBERTa and its kin number positions from an offset of their own, and pass over padding by themselves.
    numbers_itself = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
    if (
        "position_ids" in accepted
        and "position_ids" not in inputs
        and not numbers_itself
        and _left_padded(mask)
    ):
        inputs["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp_(min=0)
    return inputs


def _left_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def run(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the module; an input it does not take is reported as such."""
    try:
        return module(**inputs)
    except TypeError as error:
        accepted = list(inspect.signature(module.forward).parameters)
        unknown = [key for key in inputs if key not in accepted]
        if unknown and "unexpected keyword" in str(error):
            raise TypeError(
                f"{type(module).__name__} does not take {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join(accepted)}"
            ) from error
        raise


def check_finite_weights(model: nn.Module, names: Mapping[str, nn.Module] | None = None) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity, None if all are finite."""
    modules = {"": model} if names is None else names
    for name, module in modules.items():
        for inner, parameter in module.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                return f"{name}.{inner}" if name else inner
    return None


def find_nonfinite(module: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Say where NaN or infinity first appears, by one more forward pass; a sentence for an error message."""
    weight = check_finite_weights(module)
    if weight is not None:
        return f"the weight {weight!r} holds NaN or infinity"
    culprit: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not culprit and isinstance(first, torch.Tensor) and not bool(torch.isfinite(first).all()):
                culprit.append(name)

        return watch

    handles = [
        part.register_forward_hook(hook(name))
        for name, part in module.named_modules()
        if not any(True for _ in part.children())
    ]
    try:
        run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if culprit:
        return f"the output of {culprit[0]!r} is the first to overflow or lose its value"
    return "no single module is the source"
