"""Running a model for measurement: without its head, inputs in place and watched, a culprit named on failure."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cur.integrations.experts import LinearExperts
from cur.integrations.precision import Precision

__all__ = [
    "Masks",
    "Progress",
    "Seen",
    "all_finite",
    "body",
    "call_groups",
    "check_finite_weights",
    "checkpointing",
    "decoder_mask",
    "evaluating",
    "find_modules",
    "find_nonfinite",
    "inputs_of",
    "model_inputs",
    "padding_mask",
    "run",
    "token_rows",
    "total_samples",
]

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


@contextmanager
def checkpointing(blocks: Sequence[nn.Module], precision: Precision) -> Iterator[None]:
    """Keep only the inputs of blocks for the backward pass, and run each block again then, in the same precision."""

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

    wrappers: list[Any] = list(blocks)
    for block in wrappers:
        block.forward = wrapped(block.forward)
    try:
        yield
    finally:
        for block in wrappers:
            del block.forward


def model_inputs(module: nn.Module, batch: Mapping[str, Any] | torch.Tensor) -> dict[str, Any]:
    """Turn a batch into keyword arguments of ``module.forward``, on the device of its first parameter.

    A bare tensor is taken as ``input_ids``. Labels are left out, the key-value cache is switched off, and a
    batch padded on the left gets position ids that count real tokens only, where the module takes them: many
    models would otherwise count the padding as well, and the result would depend on it.
    """
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping of tensors or one tensor of token ids, got {type(batch).__name__}")
    # Of a model that is in memory block by block, most parameters are on no device.
    place = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    inputs = {
        key: value.to(place) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    accepted = inspect.signature(module.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if _is_encoder_decoder(module) and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
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


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _shifted(labels: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return what a decoder reads when it is to say `labels`: the start token, and each label but the last."""
    config: Any = module.config
    start, padding = config.decoder_start_token_id, config.pad_token_id
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, start if padding is None else padding)


def _left_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def run(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call the module; an input it does not take, and one that it fails for want of, is reported as such."""
    try:
        return module(**inputs)
    except TypeError as error:
        accepted = list(inspect.signature(module.forward).parameters)
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
    given = ", ".join(key for key, value in inputs.items() if isinstance(value, torch.Tensor))
    return (TypeError if isinstance(error, TypeError) else ValueError)(
        f"{type(module).__name__} cannot be run on {given} alone ({reason}); give batches with all that it reads"
    )


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Return whether no entry is NaN or infinite, as a scalar on the device; one pass, and no array of answers."""
    # `torch.isfinite` makes three arrays of the size of x: 20 times slower on a CPU.
    return torch.isfinite(torch.stack(torch.aminmax(x))).all() if x.numel() else torch.tensor(True, device=x.device)


def check_finite_weights(model: nn.Module, names: Mapping[str, nn.Module] | None = None) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity, None if all are finite."""
    modules = {"": model} if names is None else names
    for name, module in modules.items():
        for inner, parameter in module.named_parameters():
            held = parameter.is_floating_point() and not parameter.is_meta
            if held and not bool(all_finite(parameter)):
                return f"{name}.{inner}" if name else inner
    return None


def find_nonfinite(model: nn.Module, module: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Say where NaN or infinity first appears, by one more forward pass of `module`, a part of `model`."""
    weight = check_finite_weights(model)
    if weight is not None:
        return f"the weight {weight!r} holds NaN or infinity"
    culprit: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not culprit and isinstance(first, torch.Tensor) and not bool(all_finite(first)):
                culprit.append(name)

        return watch

    leaves = ((name, part) for name, part in model.named_modules() if next(part.children(), None) is None)
    handles = [part.register_forward_hook(hook(name)) for name, part in leaves]
    try:
        run(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if culprit:
        return f"the output of {culprit[0]!r} is the first to overflow or lose its value"
    return "no single module is the source"


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Gather what the named modules are called with, the last time if several."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                seen[name] = args[0]

        return before

    with _before(model, {name: keep(name) for name in names}):
        yield seen


def call_groups(model: nn.Module, names: Iterable[str], forward: Callable[[], object]) -> list[list[str]]:
    """Return names of modules in the order in which they are called, those called in turn with one tensor together."""
    groups: list[list[str]] = []
    last: list[torch.Tensor] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if last and args and args[0] is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = args[:1]

        return before

    with _before(model, {name: note(name) for name in names}):
        forward()
    return groups


@contextmanager
def _before(model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, tuple[Any, ...]], None]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_modules(model: nn.Module, names: Sequence[str], parameter: str) -> dict[str, nn.Module]:
    """Look up modules by full name; all names of a shared module are known."""
    if isinstance(names, str):
        raise TypeError(f"`{parameter}` must be a sequence of names, got the string {names!r}; write [{names!r}]")
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"`{parameter}` names what {type(model).__name__} does not have: {', '.join(missing[:5])}")
    return {name: known[name] for name in names}


def total_samples(batches: Iterable[Any]) -> int | None:
    """Return the number of samples in all batches, None where only a pass could tell."""
    if not isinstance(batches, Sequence):
        return None
    sizes = [next(iter(b.values())) if isinstance(b, Mapping) else b for b in batches]
    return sum(len(size) for size in sizes)


def padding_mask(inputs: Mapping[str, Any], key: str = "attention_mask") -> torch.Tensor | None:
    """Return the padding mask as booleans, None where every position counts."""
    mask = inputs.get(key)
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"`{key}` must have shape (batch, length), got {tuple(mask.shape)}")
    kept: torch.Tensor = mask.bool()
    empty = ~kept.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"sample {int(empty.nonzero()[0])} of a batch is all padding; leave it out")
    return None if bool(kept.all()) else kept


def decoder_mask(batch: Mapping[str, Any] | torch.Tensor) -> torch.Tensor | None:
    """Return the padding mask of a decoder that reads an encoder: its own, or the labels that are not -100."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("labels")
    if "decoder_attention_mask" in batch or not isinstance(labels, torch.Tensor):
        return padding_mask(batch, "decoder_attention_mask")
    return padding_mask({"labels": labels != -100}, "labels") if labels.ndim == 2 else None


class Masks:
    """Which positions count in what a module is called with.

    In an encoder-decoder the modules of the decoder see its own positions, except where they are called with what the
    encoder returned. An expert sees the tokens that are routed to it.

    Parameters
    ----------
    model : nn.Module
        Whose parts are asked about.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of_inputs: torch.Tensor | None = None
        self.of_decoder: torch.Tensor | None = None
        self._inside: set[int] = set()
        self._encoder: nn.Module | None = None
        self._encoded: weakref.ref[torch.Tensor] | None = None
        self._experts = {
            id(part): experts
            for experts in model.modules()
            if isinstance(experts, LinearExperts)
            for part in experts.modules()
        }
        if _is_encoder_decoder(model):
            known: Any = model
            self._inside = {id(part) for part in known.get_decoder().modules()}
            self._encoder = known.get_encoder()

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Watch what the encoder returns."""
        return [] if self._encoder is None else [self._encoder.register_forward_hook(self._after)]

    def start(self, inputs: Mapping[str, Any], batch: Mapping[str, Any] | torch.Tensor) -> None:
        """Take the masks of one batch."""
        self.of_inputs = padding_mask(inputs)
        self.of_decoder = decoder_mask(batch)

    def of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of `x`, with which `module` is called, or that it returns."""
        encoded = self._encoded is not None and self._encoded() is x
        mask = self.of_decoder if id(module) in self._inside and not encoded else self.of_inputs
        experts = self._experts.get(id(module))
        if mask is None or experts is None or experts.routed is None:
            return mask
        count, token = experts.routed
        return mask.reshape(-1).to(token.device)[token] if count == mask.numel() else mask

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self._encoded = weakref.ref(output[0])


def token_rows(x: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the vectors of real tokens in what a module is called with or returns, shape (tokens, width)."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    if x.shape[:-1] == mask.shape or len(flat) == mask.numel():
        return flat[mask.reshape(-1).to(x.device)]
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}, which has not one row per token of a batch of "
        "shape "
        f"{tuple(mask.shape)}, so padding cannot be told apart; calibrate with unpadded text"
    )


class Seen:
    """What a pass has seen: numbers of samples and tokens, and a hash of all inputs without padding."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.reads_tokens = False
        self._digest = hashlib.sha256()

    def add(self, inputs: Mapping[str, Any], mask: torch.Tensor | None) -> None:
        """Count and hash one batch.

        Token ids count one by one; images, sounds and other inputs that are not token ids, as one token a sample.
        """
        ids = inputs.get("input_ids")
        named = {"input_ids": ids} if ids is not None else _measured(inputs)
        named |= {key: value for key, value in inputs.items() if key == "decoder_input_ids"}
        first = next(iter(named.values()))
        before = self.tokens
        self.reads_tokens = not first.is_floating_point()
        for index in range(len(first)):
            for values in named.values():
                row = values[index].cpu()
                if values is first and mask is not None and mask.shape == values.shape:
                    row = row[mask[index].cpu()]
                self._digest.update(len(row).to_bytes(8, "little"))
                kind = "<f8" if row.is_floating_point() else "<i8"
                self._digest.update(_exact(row).numpy().astype(kind).tobytes())
                if values is first:
                    self.tokens += 1 if row.is_floating_point() else len(row)
        self.samples += len(first)
        if self.tokens == before:
            raise ValueError("a batch holds no token")

    def hexdigest(self) -> str:
        """Return the SHA-256 of the inputs so far, each sample with its length before it."""
        return self._digest.hexdigest()


def _measured(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"a batch must hold tensors, got {', '.join(inputs) or 'nothing'}")
    key = next(iter(tensors))
    return {key: tensors[key]}


def _exact(row: torch.Tensor) -> torch.Tensor:
    # NumPy has no bfloat16.
    return row.contiguous().double() if row.is_floating_point() else row.contiguous()
