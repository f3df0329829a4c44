"""The weight format ``"cur"`` of transformers: how a directory with compressed layers becomes a model.

Importing this module registers the format. `from_pretrained` then builds the base model on the meta device,
the quantizer puts compressed layers of the right shapes into it, and transformers loads the factors like any
weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cur.integrations.files.configuration import check_config
from cur.integrations.files.reading import ADVICE, CheckpointError
from cur.integrations.model.adapters import refuse_adapters
from cur.integrations.model.experts import LinearExperts
from cur.integrations.model.taken_apart import TakenApart
from cur.integrations.model.unrolling import rolled, take_apart
from cur.integrations.nn import LAYOUTS, CompressedLinear, compressed_modules, stand_in, swap_
from cur.integrations.nn.base import spec_grid
from cur.integrations.nn.registry import ranks_of
from cur.integrations.nn.rounded import OnGrid
from cur.integrations.nn.table import WholeTable, is_whole, reading

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "CURConfig",
    "CURQuantizer",
    "CheckpointError",
    "describe",
    "mark_",
    "put_layers_",
    "read_config",
    "refuse_other_formats",
    "unique_state",
]

METHOD = "cur"
"""Value of ``quant_method`` in ``config.json``."""

FORMAT_VERSION = 4
"""Latest version of checkpoints; newer ones are refused."""

_WITHOUT_GRIDS = 3
"""The version that is written where no layer needs more: grids other than int8, and tables, came with version 4."""


@register_quantization_config(METHOD)
class CURConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: JSON types only.

    Parameters
    ----------
    modules : mapping
        The result of :meth:`CompressedLinear.spec` by module name: its ``"layout"`` and what that takes; or
        ``{"shared_with": name}`` for a second name of a layer, or a layer that reads what another one stores.
    format_version : int, optional
        The version of the checkpoint format, at most :data:`FORMAT_VERSION`. By default the first that has all of it.
    experts : sequence of str
        Modules whose experts are stored as one linear layer each, not as three-dimensional parameters.
    weights : str or None
        Name of the weight file, or of the index of its shards, when it is not transformers' own default.
    quant_method : str
        The name by which transformers finds this class.
    **unknown : Any
        The fields that ``config.json`` has besides, each of which is refused.

    Raises
    ------
    CheckpointError
        If the format is newer than this package, or a field is unknown or malformed.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        format_version: int | None = None,
        experts: Sequence[str] = (),
        weights: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version is not None and (type(format_version) is not int or format_version > FORMAT_VERSION):
            raise CheckpointError(
                f"the checkpoint has format version {format_version!r}, this package reads up to "
                f"{FORMAT_VERSION}: "
                "upgrade cur-decomposition"
            )
        if unknown:
            raise CheckpointError(f"`quantization_config` has unknown fields: {', '.join(sorted(unknown))}")
        if not isinstance(modules, Mapping):
            raise CheckpointError(f"`quantization_config` must describe modules by name, got {modules!r}")
        for name, spec in modules.items():
            _check_spec(name, spec)
        if not isinstance(experts, list | tuple) or not all(isinstance(name, str) for name in experts):
            raise CheckpointError(f"`experts` of `quantization_config` must be names of modules, got {experts!r}")
        if format_version is None:
            later = any("grid" in spec or spec.get("layout") == WholeTable.layout for spec in modules.values())
            format_version = FORMAT_VERSION if later else _WITHOUT_GRIDS
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        self.experts = list(experts)
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        data: dict[str, Any] = super().to_dict()
        if self.weights is None:
            del data["weights"]
        if not self.experts:
            del data["experts"]
        return data


@register_quantizer(METHOD)
class CURQuantizer(HfQuantizer):
    """Put compressed layers into a model that is being loaded, and say what may be done with them."""

    quantization_config: CURConfig

    def is_serializable(self) -> bool:
        """Allow `save_pretrained`.

        Returns
        -------
        bool
            True, as every state can be saved.
        """
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow `Trainer`, of adapters beside rounded layers as well."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Allow `Trainer` without an adapter where the factors are ordinary parameters, not rounded."""
        return all(spec_grid(spec) is None for spec in self.quantization_config.modules.values())

    @property
    def is_compileable(self) -> bool:
        """Allow `torch.compile` in `generate`."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight file; the last hook of `from_pretrained` that runs before it looks for one.

        Parameters
        ----------
        config : Any
            The configuration of the model.

        Returns
        -------
        Any
            The configuration, with the name of the weight file.
        """
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        elif getattr(config, "transformers_weights", None) == ADVICE:
            config.transformers_weights = None
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        places = put_layers_(model, self.quantization_config, _stored_shapes(checkpoint_files or ()))
        _retie_(model)
        # The guards of `get_state_dict_and_metadata` have done their work when this code runs.
        named = {*places, *self.quantization_config.modules}
        guards = {rf"(^|\.){re.escape(name)}\.weight$" for name in named} | {re.escape(ADVICE)}
        ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *guards}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in compressed_modules(model).items():
            if fault := layer.damage():
                raise CheckpointError(f"{name}.{fault}: the checkpoint is corrupt")
        # A later `save_pretrained` of this model writes transformers' default names again.
        self.quantization_config.weights = None
        state: Any = model
        state.is_quantized = not self.is_qat_trainable
        _keep_names_(model)
        _keep_size_(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: the state without second names, and the guards.

        Without this package transformers would load the checkpoint with a mere warning and every compressed
        layer initialised at random. An empty tensor under the name of each dense weight that is gone makes
        that an error about sizes, and the name of one more empty tensor, shown in its table, says what to do.
        This holds for every way of saving: `save_pretrained`, `push_to_hub`, `Trainer`.

        Parameters
        ----------
        model : PreTrainedModel
            The model to save.

        Raises
        ------
        ValueError
            If an adapter is attached that transformers does not know of, and would write as if it were weights.
        """
        state: dict[str, torch.Tensor] = model.state_dict()
        if not getattr(model, "_hf_peft_config_loaded", False):  # then transformers writes the adapter alone
            refuse_adapters(model)
            # Merging an adapter changes ranks.
            self.quantization_config.modules = describe(model)
        for name, spec in describe(model).items():
            if "shared_with" in spec:
                for key in _shared(model, name, spec["shared_with"]):
                    del state[f"{name}.{key}"]
                # transformers ties parameters only; an index buffer is small enough to be stored again.
                for key, buffer in model.get_submodule(name).named_buffers():
                    state[f"{name}.{key}"] = buffer.clone()
        for name in compressed_modules(model):
            state[f"{name}.weight"] = torch.empty(0)
        narrow_(state, model)
        state[ADVICE] = torch.empty(0)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        shared = {name: spec["shared_with"] for name, spec in describe(model).items() if "shared_with" in spec}
        tied: dict[str, str] = model.all_tied_weights_keys
        for name, first in shared.items():
            for key in _shared(model, name, first):
                tied.pop(f"{name}.{key}", None)
            tied[f"{name}.weight"] = f"{first}.weight"
        layers = compressed_modules(model)
        if isinstance(dtype, str):  # as transformers reads it from a configuration
            dtype = getattr(torch, dtype)
        swap_(model, {name: layer.to_dense().to(dtype) for name, layer in layers.items()})
        for name, first in shared.items():
            dense: Any = model.get_submodule(name)
            dense.weight = model.get_parameter(f"{first}.weight")
        _restore_ties_(model)
        vars(model).pop(_RESIZE, None)
        if experts := rolled(model):
            swap_(model, experts)
            vars(model).pop("_weight_conversions", None)
        return model


def put_layers_(
    model: nn.Module, config: CURConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, CompressedLinear]:
    """Put compressed layers, with factors yet to be loaded, into the places that a checkpoint says, in place.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is changed in place.
    config : CURConfig
        What the checkpoint says of its compressed layers.
    shapes : mapping of str to tuple of int
        The shapes of the stored tensors, by name.

    Returns
    -------
    dict of str to CompressedLinear
        The layers by the names that they have in the model.

    Raises
    ------
    CheckpointError
        If the model lacks one of the places, or shapes and configuration contradict each other.
    """
    _unroll_(model, config)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, CompressedLinear] = {}
    places: dict[str, CompressedLinear] = {}
    specs = config.modules
    # None of the names at all: `save_pretrained` wrote names of an older convention, which transformers
    # translates while it loads, and compares with the shapes of the skeletons.
    comparable = any(f"{name}.{key}" in shapes for name, spec in specs.items() for key in _stored_keys(spec))
    # Files have names in the order of the alphabet, in which the head comes before the table that it is tied to.
    for name, spec in sorted(specs.items(), key=lambda item: "shared_with" in item[1]):
        if _is_beside(model, name):
            continue
        place = _place(model, modules, name)
        if "shared_with" in spec:
            first = spec["shared_with"]
            if first not in layers:
                raise CheckpointError(f"`config.json` shares {name} with {first}, which it does not describe")
            layers[name] = made = _again(layers[first], modules, _place(model, modules, first), place)
            if isinstance(made, WholeTable) and made is not layers[first]:
                made.take_(spec)
        else:
            layers[name] = _layer(modules[place], name, spec)
            if comparable:
                _compare(name, layers[name], shapes)
        places[place] = layers[name]
    swap_(model, places)
    return places


def unique_state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a module, of tensors with several names the first, and none that share memory.

    Parameters
    ----------
    model : nn.Module
        The module with compressed layers.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    memory: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            found[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            part = value.detach()
            shared = not part.is_meta and part.numel() > 0 and part.untyped_storage().data_ptr() in memory
            found[name] = part.clone() if shared else part
            memory.add(0 if part.is_meta else part.untyped_storage().data_ptr())
    narrow_(found, model)
    return found


def narrow_(state: dict[str, Any], model: nn.Module) -> None:
    """Put steps of rounded factors into the dtype that they are stored in, in place.

    Parameters
    ----------
    state : dict
        The state of the model, perhaps without second names.
    model : nn.Module
        The model, whose steps have the dtype that it computes in.
    """
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, OnGrid) and (key := f"{name}.scale") in state:
            state[key] = part.stored_scale()


def _unroll_(model: nn.Module, config: CURConfig) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {name: _place(model, modules, name) for name in config.experts}
    apart = {name: take_apart(modules[place]) for name, place in places.items()}
    for name, made in apart.items():
        if made is None:
            raise CheckpointError(
                f"`config.json` lists the experts {name}, which is a {type(modules[places[name]]).__name__}: the "
                "configuration and the checkpoint do not belong together"
            )
    swap_(model, {places[name]: made for name, made in apart.items() if made is not None})


def read_config(directory: str | os.PathLike[str]) -> CURConfig:
    """Read what a checkpoint says about its compressed layers, without its weights.

    Parameters
    ----------
    directory : path
        The directory of a compressed checkpoint.

    Returns
    -------
    CURConfig
        The configuration of its compressed layers.

    Raises
    ------
    CheckpointError
        If the directory holds no compressed checkpoint, or one of a newer format.
    """
    data = check_config(directory).get("quantization_config") or {}
    if data.get("quant_method") != "cur":
        raise CheckpointError(f"{directory} is not a compressed checkpoint: its config.json does not say so")
    return CURConfig(**data)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the ``modules`` field of :class:`CURConfig` for a model with compressed layers.

    Parameters
    ----------
    model : nn.Module
        The model with compressed layers.
    """
    first: dict[int, str] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CompressedLinear) or name.rpartition(".")[0] in modules:  # a part of one
            continue
        stored = id(next(module.parameters()))  # which a head that is tied to a table has as well
        if stored in first:
            own = module.own_fields() if isinstance(module, WholeTable) else {}
            modules[name] = {"shared_with": first[stored], **own}
        else:
            first[stored] = name
            modules[name] = module.spec()
    return modules


def refuse_other_formats(model: nn.Module) -> None:
    """Raise a ValueError if a model is quantized by another method than ours.

    Parameters
    ----------
    model : nn.Module
        The model to look at.

    Raises
    ------
    ValueError
        If another quantizer has changed it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, CURQuantizer):
        raise ValueError(
            f"the model is quantized by {type(quantizer).__name__}; compress it before quantizing, or load it in full "
            "precision"
        )


def mark_(model: nn.Module) -> None:
    """Tell transformers that a model holds compressed layers, in place; `save_pretrained` then works on it.

    Of a module that is not one of transformers' own nobody has to be told.

    Parameters
    ----------
    model : nn.Module
        The model, whose configuration is changed in place.

    Raises
    ------
    ValueError
        If the model is quantized by another method.
    """
    refuse_other_formats(model)
    if not isinstance(model, PreTrainedModel):
        return
    # Others are linear layers for the time of the compression alone.
    experts = [name for name, part in model.named_modules() if isinstance(part, TakenApart) and part.compressed()]
    config = CURConfig(describe(model), experts=experts)
    state: Any = model  # these attributes are set, not declared, by transformers itself
    state.hf_quantizer = CURQuantizer(config, pre_quantized=True)
    # transformers refuses `.half()` and `.float()` where it is True, which is right for rounded layers alone.
    state.is_quantized = not state.hf_quantizer.is_qat_trainable
    state.quantization_method = METHOD
    state.config.quantization_config = config
    _retie_(model)
    _keep_names_(model)
    _keep_size_(model)


def _keep_size_(model: PreTrainedModel) -> None:
    """Keep transformers from resizing half of what belongs together: a table, and a head that is no longer dense."""
    state: Any = model
    vars(model).pop(_RESIZE, None)
    if any(isinstance(part, CompressedLinear) for part in _vocabulary(model)):
        state.resize_token_embeddings = MethodType(resize_token_embeddings, model)


_RESIZE = "resize_token_embeddings"


def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """Refuse another number of tokens where tables or heads are compressed; what transformers calls instead of its own.

    Parameters
    ----------
    self : Any
        The model that it is called of.
    new_num_tokens : int, optional
        The number of tokens that is asked for.
    *args, **options : Any
        The other arguments of transformers' own method.

    Returns
    -------
    Any
        The table of the inputs, where the number stays as it is.

    Raises
    ------
    ValueError
        If tables or heads would get another size.
    """
    places = [part for part in _vocabulary(self) if isinstance(part, CompressedLinear)]
    own = self.get_input_embeddings()
    multiple = options.get("pad_to_multiple_of", args[0] if args else None) or 1
    if not places:  # they were multiplied out since
        return type(self).resize_token_embeddings(self, new_num_tokens, *args, **options)
    if own.num_embeddings % multiple or new_num_tokens not in (None, own.num_embeddings):
        raise ValueError(
            f"`new_num_tokens` must stay {own.num_embeddings}, got {new_num_tokens}: the embeddings or the output head "
            f"are compressed ({type(places[0]).__name__}); resize the dense model, and compress it then"
        )
    return own


def _vocabulary(model: Any) -> list[nn.Module]:
    """Return the table of the inputs and the output head, as far as a model has them."""
    parts = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            part = get()
        except (NotImplementedError, AttributeError):
            continue
        parts += [part] if isinstance(part, nn.Module) else []
    return parts


def _keep_names_(model: PreTrainedModel) -> None:
    """Keep `save_pretrained` from converting the layers of experts as if they were the parameters they replace."""
    if any(isinstance(module, LinearExperts) for module in model.modules()):
        state: Any = model
        state._weight_conversions = []


def _check_spec(name: str, spec: Mapping[str, Any]) -> None:
    if isinstance(spec, Mapping):
        fields = {key: spec[key] for key in spec.keys() - {"shared_with"}}
        if isinstance(spec.get("shared_with"), str) and WholeTable.are_fields(fields):
            return
        layout = spec.get("layout")
        if isinstance(layout, str) and layout in LAYOUTS and LAYOUTS[layout].is_spec(spec):
            return
    raise CheckpointError(
        f"`quantization_config` describes {name} as {spec!r}; expected a `layout` ({', '.join(LAYOUTS)}) and what "
        "that takes: a positive integer `rank`, where neurons were removed perhaps an `inner_rank`, and perhaps "
        "`int8`: true or a `grid` with the `shape` of the layer; a type of your own has to be registered first"
    )


def _is_beside(model: nn.Module, name: str) -> bool:
    """Say whether a module belongs to a model around the one that is loaded, as a head does to what has none."""
    prefix = getattr(model, "base_model_prefix", "")
    own = getattr(model, "base_model", None) is model
    return bool(prefix) and own and not name.startswith(f"{prefix}.") and name.partition(".")[0] not in model._modules


def _again(layer: CompressedLinear, modules: Mapping[str, nn.Module], first: str, place: str) -> CompressedLinear:
    """Return a layer for a second place: itself under a second name, or what reads its integers."""
    if modules[place] is modules[first]:
        return layer
    if not is_whole(layer):
        raise CheckpointError(
            f"`config.json` shares {place} with {first}, which are two modules here: the configuration and the "
            "checkpoint do not belong together"
        )
    try:
        return reading(layer, modules[place])
    except ValueError as error:
        raise CheckpointError(f"`config.json` shares {place} with {first}: {error}") from error


def _place(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> str:
    # The checkpoint of a model with a head is also loaded without it (`AutoModel`) and the other way round.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in modules:
            return candidate
    raise CheckpointError(
        f"`config.json` lists the compressed module {name}, which {type(model).__name__} does not have: the "
        "configuration and the checkpoint do not belong together"
    )


def _layer(module: nn.Module, name: str, spec: Mapping[str, Any]) -> CompressedLinear:
    try:
        layer = stand_in(module, name, spec)
    except ValueError as error:
        raise CheckpointError(f"`config.json` asks for {name}: {error}") from error
    if list(layer.shape) != spec.get("shape", list(layer.shape)):
        raise CheckpointError(
            f"`config.json` says {name} is {' x '.join(map(str, spec['shape']))}, which is {layer.shape[0]} x "
            f"{layer.shape[1]} in this model: the configuration and the checkpoint do not belong together"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        layer.requires_grad_(False)
    return layer.train(module.training)


def _stored_shapes(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
                shapes.update({name: tuple(handle.get_slice(name).get_shape()) for name in names})
        except FileNotFoundError as error:
            raise CheckpointError(f"the checkpoint lacks {file}, which its index names") from error
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch it again") from error
    return shapes


def _stored_keys(spec: Mapping[str, Any]) -> Iterable[str]:
    """Return the names in a layer's state, but for the bias."""
    if "shared_with" in spec:
        return ()
    return LAYOUTS[spec["layout"]].tensors(factored="inner_rank" in spec, grid=spec_grid(spec))


def _compare(name: str, layer: CompressedLinear, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {f"{name}.{key}": tuple(value.shape) for key, value in layer.state_dict().items()}
    if layer.grid is not None:  # others than those of its grid, such as zeros of a symmetric one
        own = tuple(f"{name}.{part}." for part, module in layer.named_modules() if isinstance(module, OnGrid))
        if unknown := [key for key in shapes if key.startswith(own) and key not in expected]:
            raise CheckpointError(
                f"the checkpoint has {unknown[0]}, which {name} does not have on a grid of {layer.grid}: the "
                "configuration and the checkpoint do not belong together"
            )
    for key, shape in expected.items():
        if key not in shapes:
            raise CheckpointError(f"the checkpoint lacks {key}, a factor of the compressed module {name}")
        if shapes[key] != shape:
            raise CheckpointError(
                f"`config.json` says {name} has rank {ranks_of(layer)} in layout {layer.layout!r}, so {key} would "
                f"be {shape}, but the stored weights are {shapes[key]}"
            )


def _retie_(model: PreTrainedModel) -> None:
    """Replace, in the table of tied weights, the dense weights of shared layers by their factors."""
    tied: dict[str, str] = model.all_tied_weights_keys
    _restore_ties_(model)
    for name, spec in describe(model).items():
        tied.pop(f"{name}.weight", None)
        tied.pop(f"{name}.bias", None)
        if "shared_with" in spec:
            first = spec["shared_with"]
            keys = {f"{name}.{key}": f"{first}.{key}" for key in _shared(model, name, first)}
            tied |= keys
            _retie_later_(model, (f"{name}.weight", f"{first}.weight"), keys)


def _shared(model: nn.Module, name: str, first: str) -> list[str]:
    """Return the names of the parameters that a layer shares with the first one."""
    own = {id(part) for part in model.get_submodule(first).parameters()}
    return [key for key, part in model.get_submodule(name).named_parameters() if id(part) in own]


_TIES = "_tied_weights_keys"
_DENSE_TIES = "_cur_dense_tied_weights_keys"


def _retie_later_(model: PreTrainedModel, pair: tuple[str, str], keys: Mapping[str, str]) -> None:
    """Tie parameters instead of a pair of weights wherever models list it, for calls of `tie_weights`."""
    for prefix, part in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        target, source = (name.removeprefix(dot) for name in pair)
        if isinstance(part, PreTrainedModel) and (getattr(part, _TIES, None) or {}).get(target) == source:
            state = vars(part)
            state.setdefault(_DENSE_TIES, state.get(_TIES))
            listed = {**getattr(part, _TIES)}
            del listed[target]
            dense, ours = target.removesuffix("weight") + "bias", target.removesuffix("weight") + "W.bias"
            listed |= {one.removeprefix(dot): other.removeprefix(dot) for one, other in keys.items()}
            state[_TIES] = {one.replace(dense, ours): other.replace(dense, ours) for one, other in listed.items()}


def _restore_ties_(model: PreTrainedModel) -> None:
    for part in model.modules():
        state = vars(part)
        if _DENSE_TIES in state:
            listed = state.pop(_DENSE_TIES)
            state.pop(_TIES)
            if listed is not None:
                state[_TIES] = listed
