"""Running a model for measurement: without its head, inputs in place and watched, a culprit named on failure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cur.integrations.model.adapters import is_adapter
from cur.integrations.model.hooks import forwards_replaced
from cur.integrations.model.precision import Precision
from cur.integrations.model.usage import Inputs, first_tensor, is_transformer

__all__ = ["Progress", "body", "checkpointing", "evaluating", "find_modules", "model_inputs", "run", "total_samples"]

Progress: TypeAlias = Callable[[int, "int | None"], object]
"""Called as ``progress(done, total)`` after every batch, in samples; ``total`` is None where unknown."""


_DECODED = "decoder_input"
"""What the inputs of a decoder begin with: ids, embeddings or values."""

_GIVEN = re.compile(r"(.*_)?(input|pixel)_(ids|values|features)")
"""What transformers calls the tensors of text, images and sound that a model is given."""


def body(model: nn.Module) -> nn.Module:
    """Return the model without its output head, or the model itself where that cannot be told apart.

    Nor can it where the rest is called with other tensors than the whole, as Perceiver's, which reads arrays, and not
    images.

    Parameters
    ----------
    model : nn.Module
        The model to look into.
    """
    inner = getattr(model, "base_model", None) if is_transformer(model) else None
    # What PEFT calls so has the head.
    if not isinstance(inner, nn.Module) or is_adapter(model):
        return model
    read = taken(inner)
    return inner if all(name in read for name in taken(model) if _GIVEN.fullmatch(name)) else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and put every module back into its own mode afterwards.

    Parameters
    ----------
    model : nn.Module
        The model, whose mode is changed for a while.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Not `train(True)`, which would also wake modules that were frozen in evaluation mode.
        for module in training:
            module.training = True


@contextmanager
def checkpointing(blocks: Sequence[nn.Module], precision: Precision) -> Iterator[None]:
    """Keep only the inputs of blocks for the backward pass, and run each block again then, in the same precision.

    Parameters
    ----------
    blocks : sequence of nn.Module
        The blocks that run a second time in the backward pass.
    precision : Precision
        The precision that both runs have.
    """

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            # Blocks are run in evaluation mode: there is no random state to restore.
            return checkpoint(
                forward,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), precision.products()),
                **kwargs,
            )

        return again

    with forwards_replaced((block, wrapped) for block in blocks):
        yield


def model_inputs(module: nn.Module, batch: Any) -> dict[str, Any]:
    """Turn a batch into keyword arguments of ``module.forward``, on the device of its first parameter.

    Of a module that is not one of transformers' own, into :class:`~cur.integrations.model.usage.Inputs`.

    A bare tensor is taken as ``input_ids``. Labels are left out, the key-value cache is switched off, and a
    batch padded on the left gets position ids that count real tokens only, where the module takes them: many
    models would otherwise count the padding as well, and the result would depend on it.

    Parameters
    ----------
    module : nn.Module
        The module that is to be called.
    batch : mapping or Tensor
        The batch, or a bare tensor of token ids; of other modules also a tuple or a list.

    Returns
    -------
    dict
        The keyword arguments to call the module with.

    Raises
    ------
    TypeError
        If the batch is neither a mapping nor a tensor.
    ValueError
        If a batch for an encoder-decoder has no inputs of the decoder.
    """
    # Of a model that is in memory block by block, most parameters are on no device.
    place = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    if not is_transformer(module):
        return Inputs(module, batch, place)
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping of tensors or one tensor of token ids, got {type(batch).__name__}")
    inputs = {
        key: value.to(place) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    accepted = taken(module)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if is_encoder_decoder(module) and not any(name.startswith(_DECODED) for name in inputs):
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"a batch for the encoder-decoder {type(module).__name__} must have `decoder_input_ids` or `labels`, "
                f"got {', '.join(batch)}; give batches with both in Python, commands read text alone"
            )
        inputs["decoder_input_ids"] = _shifted(labels.to(place), module)
    mask = inputs.get("attention_mask")
    # RoBERTa and its kin number positions from an offset of their own, and pass over padding by themselves.
    numbers_itself = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
    if "position_ids" in accepted and "position_ids" not in inputs and not numbers_itself and _left_padded(mask):
        inputs["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp_(min=0)
    return inputs


def is_encoder_decoder(module: nn.Module) -> bool:
    """Say whether a model reads with one stack of blocks and writes with another."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    # A classifier may keep the configuration of both and have the encoder alone, as Whisper's has.
    return any(name.startswith(_DECODED) for name in taken(module))


def taken(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what a module takes: of one that hands on all that it gets, what the modules inside take.

    Parameters
    ----------
    module : nn.Module
        The module. The decoder of BART, alone, is such a wrapper.
    """
    found = inspect.signature(module.forward).parameters
    if all(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in found.values()):
        return {name: one for part in module.children() for name, one in taken(part).items()} or found
    return found


def _shifted(labels: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return what a decoder reads when it is to say `labels`: the start token, and each label but the last."""
    config: Any = module.config
    start, padding = config.decoder_start_token_id, config.pad_token_id
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, start if padding is None else padding)


def _left_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def run(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the module; an input it does not take, and one that it fails for want of, is reported as such.

    Parameters
    ----------
    module : nn.Module
        The module to call.
    inputs : mapping
        The keyword arguments to call it with.

    Returns
    -------
    Any
        The output of the module.

    Raises
    ------
    TypeError
        If the module does not take an input, or cannot run with these.
    OutOfMemoryError
        If the device has too little memory.
    """
    try:
        return inputs.call(module) if isinstance(inputs, Inputs) else module(**inputs)
    except TypeError as error:
        accepted = list(taken(module))
        unknown = [key for key in inputs if key not in accepted]
        if unknown and "unexpected keyword" in str(error):
            raise TypeError(
                f"{type(module).__name__} does not take {', '.join(map(repr, unknown))}; it takes {', '.join(accepted)}"
            ) from error
        raise _cannot_run(module, inputs, error) from error
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError) as error:
        raise _cannot_run(module, inputs, error) from error


def _cannot_run(module: nn.Module, inputs: Mapping[str, Any], error: Exception) -> Exception:
    """Return what says that a model failed in code of its own: text alone is not what it reads, for the most part."""
    reason = " ".join(str(error).split()) or type(error).__name__
    kind = TypeError if isinstance(error, TypeError) else ValueError
    if isinstance(inputs, Inputs):
        return kind(
            f"{type(module).__name__} cannot be run on a batch ({reason}); where a batch is not its arguments, pass "
            "`forward(module, batch)`"
        )
    given = ", ".join(key for key, value in inputs.items() if isinstance(value, torch.Tensor))
    return kind(
        f"{type(module).__name__} cannot be run on {given} alone ({reason}); give batches with all that it reads"
    )


def find_modules(model: nn.Module, names: Sequence[str], parameter: str) -> dict[str, nn.Module]:
    """Look up modules by full name; all names of a shared module are known.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    names : sequence of str
        The full names of the modules.
    parameter : str
        The name of the parameter that errors speak of.

    Returns
    -------
    dict of str to nn.Module
        The modules by name, in the order of `names`.

    Raises
    ------
    TypeError
        If `names` is a string.
    ValueError
        If the model has no module of a name.
    """
    if isinstance(names, str):
        raise TypeError(f"`{parameter}` must be a sequence of names, got the string {names!r}; write [{names!r}]")
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"`{parameter}` names what {type(model).__name__} does not have: {', '.join(missing[:5])}")
    return {name: known[name] for name in names}


def total_samples(batches: Iterable[Any]) -> int | None:
    """Return the number of samples in all batches, None where only a pass could tell.

    Parameters
    ----------
    batches : iterable
        The batches to count, which are not run through.
    """
    if not isinstance(batches, Sequence):
        return None
    firsts = [first_tensor(batch) for batch in batches]
    return sum(len(first) for first in firsts if first is not None and first.ndim)
