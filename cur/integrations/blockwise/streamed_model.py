"""A model whose weights are in memory only where they are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from cur.integrations.files.hashes import read_kept
from cur.integrations.files.header import ShardError
from cur.integrations.files.shards import Shards
from cur.integrations.model.adapters import refuse_adapter_directory
from cur.integrations.model.loading import load_model
from cur.integrations.model.opening import open_checkpoint, quiet
from cur.integrations.model.origin import KeptDigest, Origin, kept_names, set_origin_
from cur.integrations.model.running import body
from cur.integrations.model.stored_tensors import conversions, names_in_model
from cur.integrations.model.targets import block_stacks

__all__ = ["StreamedModel", "load_streamed"]


class StreamedModel:
    """A model on the meta device, and the shards that its parts are loaded from.

    transformers' own loader fills a part, given the tensors of that part alone; so whatever it does to weights on the
    way, renaming, merging experts, casting, is done here too.

    Parameters
    ----------
    model : PreTrainedModel
        The model without weights, as ``from_pretrained(..., device_map="meta")`` returns it.
    tokenizer : PreTrainedTokenizerBase
        The model's own tokenizer.
    shards : Shards
        The weight files of the model.
    device : torch.device
        The device that blocks are loaded onto.

    Attributes
    ----------
    blocks : list of (str, nn.Module)
        Name and module of every block, of all stacks in order.
    starts : list of int
        Number of the first block of each stack.
    read : set of str
        Names of tables of embeddings that are read elsewhere than in their own forward pass, so that they stay in
        memory with the rest that is outside of blocks.
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
        self.read: set[str] = set()
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

        Parameters
        ----------
        index : int
            The number of the block.

        Raises
        ------
        ShardError
            If a tensor is missing, has another shape than the model's, or cannot be read.
        """
        prefix = f"{self.blocks[index][0]}."
        self._load(prefix, *sorted(self._tied_with(prefix)))

    def free_block(self, index: int) -> None:
        """Let go of one block.

        Parameters
        ----------
        index : int
            The number of the block.
        """
        prefix = f"{self.blocks[index][0]}."
        sources = {name for name in self._tied_with(prefix) if name.startswith(self._inside)}
        tied = {
            name
            for name, source in self.model.all_tied_weights_keys.items()
            if source in sources or source.startswith(prefix)
        }
        self._free({*sources, *tied, *(name for name in self._empty if name.startswith(prefix))})

    def load_outside(self, *, head: bool = False) -> None:
        """Bring everything but the blocks into memory; what comes behind the body of the model only on request.

        Parameters
        ----------
        head : bool, default False
            Whether the parts after the body of the model are loaded, too.
        """
        names = set(self.outside())
        self._load(*sorted(names if head else names & self._body))

    def outside(self) -> list[str]:
        """Name what lies outside the blocks.

        Returns
        -------
        list of str
            The names of the tensors outside the blocks.
        """
        return [name for name in self.model.state_dict() if not name.startswith(self._inside)]

    def load_tensor(self, name: str) -> torch.Tensor:
        """Bring one tensor outside the blocks into memory, and what is tied to it.

        Parameters
        ----------
        name : str
            The name of the tensor in the model.

        Returns
        -------
        Tensor
            The tensor, in memory.
        """
        self._load(name)
        found: torch.Tensor = self.model.get_parameter_or_buffer(name)
        return found.detach()

    def free_outside(self) -> None:
        """Let go of everything but the blocks; buffers stay."""
        self._free(name for name in self._empty if not name.startswith(self._inside))

    def kept_digest(self, without: Collection[str]) -> str:
        """Return the hash of all parameters but those inside these modules, as of the model in memory.

        Parameters
        ----------
        without : collection of str
            The names of the modules to leave out.
        """
        kept, digest = set(kept_names(self.model, without)), KeptDigest()
        for name in sorted(kept.intersection(self.outside())):
            digest.add(name, self.load_tensor(name))
            self.free_outside()
        for index, (block, module) in enumerate(self.blocks):
            self.load_block(index)
            for key, parameter in module.named_parameters():
                if f"{block}.{key}" in kept:
                    digest.add(f"{block}.{key}", parameter)
            self.free_block(index)
        return digest.hexdigest()

    def embeddings(self) -> dict[str, nn.Embedding]:
        """Return the tables of embeddings outside the blocks, by name."""
        return {
            name: module
            for name, module in body(self.model).named_modules()
            if isinstance(module, nn.Embedding) and not f"{self._prefix()}{name}".startswith(self._inside)
        }

    def free_embeddings(self, names: Collection[str]) -> None:
        """Let go of tables of embeddings, but those that are read, and of what is tied to them.

        Parameters
        ----------
        names : collection of str
            The names of the tables, as from :meth:`embeddings`.
        """
        sources = {self._source(name) for name in names} - {self._source(name) for name in self.read}
        tied = {name for name, source in self.model.all_tied_weights_keys.items() if source in sources}
        self._free(sources | tied)

    def load_embedding(self, name: str) -> None:
        """Bring one table of embeddings back into memory, and what is tied to it.

        Parameters
        ----------
        name : str
            The name of the table, as from :meth:`embeddings`.
        """
        self._load(self._source(name))

    def _source(self, name: str) -> str:
        """Return the name of the parameter that a table of embeddings has, or shares with others."""
        weight = f"{self._prefix()}{name}.weight"
        found: str = self.model.all_tied_weights_keys.get(weight, weight)
        return found

    def _tied_with(self, prefix: str) -> set[str]:
        """Return the parameters that those with names of this beginning are tied to, such as of a block used twice."""
        return {source for name, source in self.model.all_tied_weights_keys.items() if name.startswith(prefix)}

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
        self._compute(prefixes)
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

    def _compute(self, prefixes: tuple[str, ...]) -> None:
        """Compute the parameters that checkpoints leave out, such as the sines of positions in Marian."""
        for name in set(self.model._keys_to_ignore_on_save or ()) - set(self._targets.values()):
            if name in self._empty and name.startswith(prefixes) and name not in self.model.all_tied_weights_keys:
                place, _, key = name.rpartition(".")
                owner, empty = self.model.get_submodule(place), self._empty[name]
                value = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
                setattr(owner, key, nn.Parameter(value, requires_grad=empty.requires_grad))
                self._initialise(place)

    def _tie(self) -> None:
        for name, source in self.model.all_tied_weights_keys.items():
            parameter = self.model.get_parameter(source)
            if not parameter.is_meta:
                place, _, key = name.rpartition(".")
                setattr(self.model.get_submodule(place), key, parameter)

    def _fill_buffers(self) -> None:
        """Compute the buffers that no checkpoint stores, such as the frequencies of rotary positions."""
        filling: set[str] = set()
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            owner, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(owner), key, torch.empty_like(buffer, device=self.device))
            # Some are filled by a module around their owner, as the multipliers of Falcon-H1.
            filling.update(_and_around(owner))
        for name in sorted(filling, key=lambda name: (name != "", name.count(".")), reverse=True):
            # transformers' own way: what is computed here is what `from_pretrained` computes.
            self._initialise(name)

    def _initialise(self, name: str) -> None:
        """Have the innermost model that a module is in, or is, compute what it fills in that module."""
        around = (self.model.get_submodule(outer) for outer in _and_around(name))
        own = next(part for part in around if isinstance(part, PreTrainedModel))
        own._init_weights(self.model.get_submodule(name))


def _and_around(name: str) -> list[str]:
    """Return the name of a module and of those it lies in, from within, the model itself last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def load_streamed(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a checkpoint without its weights.

    Parameters
    ----------
    model : str or Path
        A directory in the format of transformers with safetensors files, compressed or not, or a hub id.
    dtype : torch.dtype or "auto", default "auto"
        The dtype that weights are loaded in; "auto" is the one they are stored in.
    device : torch.device or str, default "cpu"
        The device that weights are loaded onto.
    trust_remote_code : bool, default False
        Whether code that the checkpoint brings is run.

    Returns
    -------
    StreamedModel

    Raises
    ------
    ValueError
        In the cases in which :func:`~cur.integrations.load_model` raises it.
    ShardError
        If weight files are missing, damaged, or contradict each other.
    """
    directory = Path(model).expanduser()
    refuse_adapter_directory(directory if directory.is_dir() else str(model), str(model))
    where = str(directory.absolute())
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        # Fetches what is not there yet.
        load_model(model, dtype=dtype, device_map="meta", trust_remote_code=trust_remote_code)
        where, directory = str(model), Path(snapshot_download(str(model), local_files_only=True))
    shards = Shards(directory)
    with quiet():
        opened = open_checkpoint(directory, str(model), dtype=dtype, hollow=True, trust_remote_code=trust_remote_code)
    set_origin_(opened.model, Origin(source=where, unread=opened.unread, kept=read_kept(directory)))
    return StreamedModel(opened.model, opened.tokenizer, shards, torch.device(device))
