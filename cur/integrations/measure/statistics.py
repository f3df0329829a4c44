"""Statistics of a model on a text: what they hold, and their way to disk and back."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cur._lib.versions import packages
from cur.integrations.model.unrolling import unrolled
from cur.integrations.nn import dense_weight

__all__ = ["Statistics", "by_stack"]

_FORMAT = "cur-statistics"
_FORMAT_VERSION = 1
_SUMS = "square_sums"
_KINDS = (_SUMS, "products", "output_products")


def _versions() -> dict[str, str]:
    return packages("cur-decomposition", "torch", "transformers")


def by_stack(blocks: Sequence[str]) -> list[list[str]]:
    """Group the names of blocks by the list that holds them, as ``encoder.block`` holds ``encoder.block.0``.

    Parameters
    ----------
    blocks : sequence of str
        The names of the blocks, in order.

    Returns
    -------
    list of list of str
        The names of each stack, in order.
    """
    stacks: dict[str, list[str]] = {}
    for name in blocks:
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    return list(stacks.values())


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistics:
    """The statistics of a model on a text, which compression uses.

    Modules that share their input share one tensor in each mapping.

    Attributes
    ----------
    tokens : int
        The number of tokens seen, without padding.
    samples : int
        The number of samples seen, which are rows of batches.
    square_sums : mapping of str to torch.Tensor
        Sum of ``x**2`` per input feature of each module, float64, shape (in,), on the CPU.
    products : mapping of str to torch.Tensor
        Sum of ``x x^T``, float64, shape (in, in); empty unless full moments were asked for.
    counts : mapping of str to int
        Input vectors summed, per module; `tokens` for a module that runs once per token.
    output_products : mapping of str to torch.Tensor
        Sum of ``g g^T`` over the gradients ``g`` of the loss with respect to each module's outputs, float64,
        shape (out, out); empty unless gradients were collected.
    output_counts : mapping of str to int
        The number of gradients summed, by module.
    angles : torch.Tensor or None
        Mean angular distances between hidden states, float64, shape (L + 1, L + 1) for a stack of L blocks; row and
        column 0 is the input of the first block, i + 1 for the output of block i. Of several stacks, as in an
        encoder-decoder, the diagonal blocks; zeros elsewhere. None if no blocks were named.
    layers : tuple of str
        The names of the blocks, one stack after the other.
    own_text : float
        The amount of text that the model wrote itself, as a multiple of the text it was given.
    text_hash : str
        SHA-256 of the token ids or other inputs, sample by sample without padding.
    model : str
        The name of the model.
    precision : str
        The precision of matrix products in the passes, ``"float32"`` for instance; empty where it is not known.
    versions : mapping of str to str
        Versions of the packages that measured.
    lookups : tuple of str
        The names of tables of embeddings, which take one input at a time: `square_sums` says how often each token came,
        and the second moment is diagonal.
    """

    tokens: int
    samples: int
    square_sums: Mapping[str, torch.Tensor]
    counts: Mapping[str, int]
    products: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output_products: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output_counts: Mapping[str, int] = field(default_factory=dict)
    angles: torch.Tensor | None = None
    layers: tuple[str, ...] = ()
    own_text: float = 0.0
    text_hash: str = ""
    model: str = ""
    precision: str = ""
    versions: Mapping[str, str] = field(default_factory=_versions)
    lookups: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kind = "full" if self.products else "diagonal"
        return (
            f"Statistics(model={self.model!r}, tokens={self.tokens}, samples={self.samples}, "
            f"modules={len(self.square_sums)}, moments={kind!r}, layers={len(self.layers)})"
        )

    @property
    def angular(self) -> dict[int, float]:
        """Angular distance of block i: from the output of block i - 1 (the input of block 0) to its own."""
        return self.angular_spans(1)

    def angular_spans(self, span: int, /) -> dict[int, float]:
        """Angular distance from the input of block i to the output of block ``i + span - 1``, of the same stack.

        Parameters
        ----------
        span : int
            The number of blocks in a run.

        Returns
        -------
        dict of int to float
            The angular distance by the number of the first block; empty if no angles were measured.

        Raises
        ------
        ValueError
            If angles were measured between neighbours alone, and `span` is larger than 1.
        """
        if self.angles is None:
            return {}
        found: dict[int, float] = {}
        first = corner = 0
        for names in by_stack(self.layers):
            for index in range(len(names) - span + 1):
                angle = float(self.angles[corner + index, corner + index + span])
                if math.isnan(angle):
                    raise ValueError(
                        f"the statistics hold no angles over {span} blocks: they were measured block by block, between "
                        "neighbours alone; collect them in memory, or pass `span=1`"
                    )
                found[first + index] = angle
            first += len(names)
            corner += len(names) + 1
        return found

    def x_norm(self, name: str, /) -> torch.Tensor:
        """Return the 2-norm of each input feature over all tokens, float64, shape (in,), for WANDA.

        Parameters
        ----------
        name : str
            The name of the module.
        """
        return self._get(self.square_sums, name, "no statistics").sqrt()

    def second_moment(self, name: str, /) -> torch.Tensor:
        """Return ``E[x x^T]`` of a module's inputs, float64, shape (in, in); of a table its diagonal, shape (in,).

        Parameters
        ----------
        name : str
            The name of the module.
        """
        if name in self.lookups:
            return self.square_sums[name] / max(self.counts[name], 1)
        total = self._get(self.products, name, "no second moments (collect them with `moments='full'`)")
        return total / max(self.counts[name], 1)

    def output_moment(self, name: str, /) -> torch.Tensor:
        """Return ``E[g g^T]`` of the gradients at a module's outputs, float64, shape (out, out).

        Parameters
        ----------
        name : str
            The name of the module.
        """
        total = self._get(
            self.output_products,
            name,
            "no gradients (measure them with `collect(gradients=...)`, or add them with `collect_gradients`)",
        )
        return total / self.output_counts[name]

    def check(self, model: nn.Module) -> None:
        """Check that the statistics are of a model with these layers.

        Parameters
        ----------
        model : nn.Module
            The model that the statistics should be of.

        Raises
        ------
        ValueError
            If a layer is missing, or has another number of inputs.
        """
        with unrolled(model):
            modules = dict(model.named_modules(remove_duplicate=False))
        other = f"the statistics are of {self.model or 'another model'}"
        for name, sums in self.square_sums.items():
            if name not in modules:
                raise ValueError(f"{other}: {name} is not in this one; collect them again")
            inputs = int(dense_weight(modules[name], name)[0].shape[1])
            if len(sums) != inputs:
                raise ValueError(
                    f"{other}: they have {len(sums)} inputs of {name}, which has {inputs} here; collect them again"
                )

    def _get(self, where: Mapping[str, torch.Tensor], name: str, lacking: str) -> torch.Tensor:
        try:
            return where[name]
        except KeyError:
            raise KeyError(f"these statistics hold {lacking} of {name!r}; they cover {len(where)} modules") from None

    def save(self, path: str | Path, /) -> None:
        """Write the statistics to one safetensors file, whole or not at all.

        Parameters
        ----------
        path : path
            The path of the file to write.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        shared: dict[str, dict[str, str]] = {}
        for kind in _KINDS:
            owner: dict[int, str] = {}
            shared[kind] = {}
            for name, tensor in getattr(self, kind).items():
                shared[kind][name] = owner.setdefault(id(tensor), name)
                if owner[id(tensor)] == name:
                    tensors[f"{kind}/{name}"] = tensor.contiguous()
        if self.angles is not None:
            tensors["angles"] = self.angles
        path = Path(path).expanduser()
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            try:
                save_file(tensors, temporary, metadata=self.metadata(shared))
            except SafetensorError as error:
                raise OSError(f"the statistics could not be written to {str(path)!r}: {error}") from error
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def metadata(self, shared: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Return the header of a file of statistics; `shared` says by kind under which name a tensor is stored.

        Parameters
        ----------
        shared : mapping of str to mapping
            The name under which each tensor is stored, by kind and name.
        """
        facts = {
            "tokens": self.tokens,
            "samples": self.samples,
            "counts": dict(self.counts),
            "output_counts": dict(self.output_counts),
            "layers": list(self.layers),
            "own_text": self.own_text,
            "text_hash": self.text_hash,
            "model": self.model,
            "precision": self.precision,
            "versions": dict(self.versions),
            "shared": shared,
            **({"lookups": list(self.lookups)} if self.lookups else {}),
        }
        return {"format": _FORMAT, "format_version": str(_FORMAT_VERSION), "facts": json.dumps(facts)}

    @classmethod
    def load(cls, path: str | Path, /, *, modules: Collection[str] | None = None, moments: bool = True) -> Statistics:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : path
            The path of the file to read.
        modules : collection of str, optional
            Read only what is there of these. Default: everything.
        moments : bool, default True
            Whether full second moments are read where they are there.

        Returns
        -------
        Statistics
            The statistics that the file holds.

        Raises
        ------
        ValueError
            If the file does not exist, is damaged, is of another kind or of a newer format.
        """
        try:
            with safe_open(Path(path).expanduser(), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{str(path)!r} does not hold calibration statistics of this package")
                if int(metadata["format_version"]) > _FORMAT_VERSION:
                    raise ValueError(
                        f"{str(path)!r} has format {metadata['format_version']}, this version of the "
                        "package reads up "
                        f"to {_FORMAT_VERSION}; upgrade it: pip install -U cur-decomposition"
                    )
                facts = json.loads(metadata["facts"])
                shared: dict[str, dict[str, str]] = {
                    kind: {
                        name: owner
                        for name, owner in (facts["shared"][kind] if moments or kind == _SUMS else {}).items()
                        if modules is None or name in modules
                    }
                    for kind in _KINDS
                }
                wanted = {f"{kind}/{owner}" for kind in _KINDS for owner in shared[kind].values()}
                tensors = {key: file.get_tensor(key) for key in wanted | ({"angles"} & set(file.keys()))}
        except FileNotFoundError:
            raise ValueError(f"statistics file {str(path)!r} does not exist") from None
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"statistics file {str(path)!r} cannot be read: {error}") from error
        parts: dict[str, dict[str, torch.Tensor]] = {
            kind: {name: tensors[f"{kind}/{owner}"] for name, owner in shared[kind].items()} for kind in _KINDS
        }
        return cls(
            tokens=facts["tokens"],
            samples=facts["samples"],
            counts=facts["counts"],
            output_counts=facts["output_counts"],
            angles=tensors.get("angles"),
            layers=tuple(facts["layers"]),
            own_text=facts.get("own_text", 0.0),
            text_hash=facts["text_hash"],
            model=facts["model"],
            precision=facts.get("precision", ""),
            versions=facts["versions"],
            lookups=tuple(name for name in facts.get("lookups", ()) if name in parts[_SUMS]),
            **parts,
        )
