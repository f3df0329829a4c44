"""A model whose weights are in memory only where they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.auto_factory import _get_model_class

from cur.integrations._forward import body
from cur.integrations.account import check_hashes
from cur.integrations.blockwise.shards import ShardError, Shards
from cur.integrations.layers import block_stacks
from cur.integrations.models import LoadedModel, load_model, quiet
from cur.integrations.tensors import conversions, names_in_model

__all__ = ["Skeleton", "load_skeleton"]


class Skeleton:
    """A model on the meta device, and the shards that its parts are loaded from.

    transformers' own loader fills a part, given the tensors of that part alone; so whatever it does to weights on the
    way, renaming, merging experts, casting, is done here too.

    Parameters
    ----------
    model : PreTrainedModel
        As ``from_pretrained(..., device_map="meta")`` returns it.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    shards : Shards
        Where its weights lie.
    device : torch.device
        Where loaded parts go.

    Attributes
    ----------
    blocks : list of (str, nn.Module)
        Of all stacks, in order.
    starts : list of int
        Number of the first block of each stack.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shards: Shards,
        device: torch.device,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.shards = shards
        self.device = device
        self.stacks = block_stacks(model)
        self.blocks = [block for stack in self.stacks for block in stack]
        self.starts = [sum(len(stack) for stack in self.stacks[:number]) for number in range(len(self.stacks))]
        self._inside = tuple(f"{name}." for name, _ in self.blocks)
        parts = {id(part) for part in body(model).modules()}
        self._body = {
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            if id(module) in parts
            for key in module.state_dict(keep_vars=True)
            if "." not in key
        }
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._targets = self._where_to()
        self._fill_buffers()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        found: torch.dtype = self.model.dtype
        return found

    def load_block(self, index: int) -> None:
        """Bring one block into memory.

        Raises
        ------
        ShardError
            If a tensor is missing, has another shape than the model's, or cannot be read.
        """
        self._load(f"{self.blocks[index][0]}.")

    def free_block(self, index: int) -> None:
        """Let go of one block."""
        self._free(name for name in self._empty if name.startswith(f"{self.blocks[index][0]}."))

    def load_outside(self, *, head: bool = False) -> None:
        """Bring everything but the blocks into memory; what comes behind the body of the model only on request."""
        names = set(self.outside())
        self._load(*sorted(names if head else names & self._body))

    def outside(self) -> list[str]:
        """Name what lies outside the blocks."""
        return [name for name in self.model.state_dict() if not name.startswith(self._inside)]

    def load_tensor(self, name: str) -> torch.Tensor:
        """Bring one tensor outside the blocks into memory, and what is tied to it."""
        self._load(name)
        found: torch.Tensor = self.model.get_parameter_or_buffer(name)
        return found.detach()

    def free_outside(self) -> None:
        """Let go of everything but the blocks; buffers stay."""
        self._free(name for name in self._empty if not name.startswith(self._inside))

    def embeddings(self) -> dict[str, nn.Embedding]:
        """Return the tables of embeddings outside the blocks, by name."""
        return {
            name: module
            for name, module in body(self.model).named_modules()
            if isinstance(module, nn.Embedding) and not f"{self._prefix()}{name}".startswith(self._inside)
        }

    def free_embeddings(self) -> None:
        """Let go of the tables of embeddings, and of what is tied to them."""
        tables = {f"{self._prefix()}{name}.weight" for name in self.embeddings()}
        tied = {name for name, source in self.model.all_tied_weights_keys.items() if source in tables}
        self._free(tables | tied)

    def _free(self, names: Iterable[str]) -> None:
        # The parameters of the beginning come back, so that what is tied stays tied.
        for name in names:
            place, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(place), key, self._empty[name])

    def _prefix(self) -> str:
        inner = body(self.model)
        return "" if inner is self.model else f"{self.model.base_model_prefix}."

    def _where_to(self) -> dict[str, str]:
        """Return the parameter that each stored tensor belongs to, by the names in the files."""
        known = self.model.state_dict()
        named = names_in_model(self.model, self.shards.tensors)
        return {name: target for name, (target, _) in named.items() if target in known}

    def _load(self, *prefixes: str) -> None:
        wanted = sorted(name for name, target in self._targets.items() if target.startswith(prefixes))
        dtype = self.dtype
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            hf_quantizer=getattr(self.model, "hf_quantizer", None),
            weight_mapping=conversions(self.model),  # type: ignore[arg-type]
        )
        read = {name: self.shards.read(name) for name in wanted}
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(
                model=self.model, state_dict=read, load_config=config, disk_offload_index=None
            )
        for name, stored, expected in info.mismatched_keys:
            raise ShardError(
                f"{name} is stored with shape {tuple(stored)}, `config.json` asks for {tuple(expected)}: "
                "configuration and shards do not belong together"
            )
        if info.conversion_errors:
            raise ShardError(f"the checkpoint cannot be converted: {next(iter(info.conversion_errors.values()))}")
        self._tie()
        tied = self.model.all_tied_weights_keys
        lacking = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and name.startswith(prefixes) and name not in tied
        ]
        if lacking:
            raise ShardError(
                f"the checkpoint in {self.shards.directory} lacks {lacking[0]}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + ": it is incomplete, or for another model"
            )

    def _tie(self) -> None:
        for name, source in self.model.all_tied_weights_keys.items():
            parameter = self.model.get_parameter(source)
            if not parameter.is_meta:
                place, _, key = name.rpartition(".")
                setattr(self.model.get_submodule(place), key, parameter)

    def _fill_buffers(self) -> None:
        """Compute the buffers that no checkpoint stores, such as the frequencies of rotary positions."""
        owners: dict[str, list[str]] = {}
        for name, _ in self.model.named_non_persistent_buffers():
            owner, _, key = name.rpartition(".")
            owners.setdefault(owner, []).append(key)
        for owner, keys in owners.items():
            module = self.model.get_submodule(owner)
            for key in keys:
                setattr(module, key, torch.empty_like(module.get_buffer(key), device=self.device))
            # transformers' own way: what is computed here is what `from_pretrained` computes.
            self.model._init_weights(module)


def load_skeleton(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Skeleton:
    """Open a checkpoint without its weights.

    Parameters
    ----------
    model : str or Path
        A directory in the format of transformers with safetensors files, compressed or not, or a hub id.
    dtype : torch.dtype, default torch.float32
        Of the weights when they are loaded.
    device : torch.device or str, default "cpu"
        Where they will be loaded to.

    Returns
    -------
    Skeleton

    Raises
    ------
    ValueError
        As :func:`~cur.integrations.load_model`.
    ShardError
        If weight files are missing, damaged, or contradict each other.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        shards = Shards(directory)
        check_hashes(directory)
        loaded = _hollow(shards, str(model), dtype)
    else:
        from huggingface_hub import snapshot_download

        loaded = load_model(model, dtype=dtype, device_map="meta")  # fetches what is not there yet
        shards = Shards(snapshot_download(str(model), local_files_only=True))
    return Skeleton(loaded.model, loaded.tokenizer, shards, torch.device(device))


def _hollow(shards: Shards, source: str, dtype: torch.dtype) -> LoadedModel:
    """Let transformers load a model of which it is given names, shapes and dtypes alone.

    Given the files, it would map all of them into the address space at once.
    """
    place = str(shards.directory)
    empty = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in shards.tensors.items()
    }
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            config = AutoConfig.from_pretrained(place)
            kind = _get_model_class(config, AutoModelForCausalLM._model_mapping)
            try:
                generation = GenerationConfig.from_pretrained(place)
            except OSError:  # not every checkpoint has one
                generation = None
            model = kind.from_pretrained(
                None, config=config, state_dict=empty, device_map="meta", dtype=dtype, generation_config=generation
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"`model` {source!r} cannot be loaded: {reason}") from error
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = source
    return LoadedModel(model.eval(), tokenizer, source)
