"""Linear layers that hold fewer parameters than the dense ones they replace.

Three layouts of the same rank-r weight of an m x n layer (m outputs, n inputs), smallest last:

========================  ==========================================  ======================
layout                    children                                    parameters
========================  ==========================================  ======================
:class:`CURLinear`        ``R`` (r x n), ``U`` (r x r), ``C`` (m x r)  ``r (m + n) + r^2``
:class:`FoldedLinear`     ``R`` (r x n), ``CU`` (m x r)                ``r (m + n)``
:class:`InterpolativeLinear`  ``R`` (r x n), ``T`` ((m - r) x r)       ``r (m + n - r)``
========================  ==========================================  ======================

Two more layouts belong together, where neurons between layers are removed (r of k kept):

========================  ==========================================  ======================
layout                    children                                    parameters
========================  ==========================================  ======================
:class:`KeptOutputs`      ``R`` (r x n), of the layers before          ``r n``
:class:`KeptInputs`       ``C`` (m x r), of the next layer             ``r m``
========================  ==========================================  ======================

Instead of either child there may be an :class:`InterpolativeLinear` of an inner rank, ``inner``.

A table of embeddings (n tokens of m features) is a linear layer that takes one input at a time:

========================  ==========================================  ======================
layout                    children                                    parameters
========================  ==========================================  ======================
:class:`EmbeddingFactors`  ``A`` (n x r), ``B`` (m x r)                ``r (m + n)``
========================  ==========================================  ======================

In a model that was rounded to few bits the children are :class:`GridLinear`, and layers that nothing was taken from
are :class:`WholeLinear`, with one child ``W`` (m x n), or :class:`WholeTable` for a table (n x m).

Every other factor is a child ``nn.Linear``, or ``nn.Embedding``, so that adapters, quantizers and hooks that look for
such layers find them.

Each type is a class in a file of its own or beside those it belongs to, which describes itself to all others: what is
asked of a layer is a method of :class:`CompressedLinear`. :func:`register` makes one known. Imports nothing of
`integrations`.
"""

from typing import Any

from cur._lib.errors import warn
from cur.integrations.nn.base import CompressedLinear, grid_fields
from cur.integrations.nn.embedding import EmbeddingFactors, is_table
from cur.integrations.nn.factored import CURLinear, FactoredLinear, FoldedLinear, InterpolativeLinear, factored
from cur.integrations.nn.grid import IntegerGrid
from cur.integrations.nn.kept import KeptInputs, KeptNeurons, KeptOutputs
from cur.integrations.nn.modules import (
    compressed_modules,
    dense_weight,
    dtype_of,
    grids_of,
    is_head,
    is_linear,
    layout_for,
    learn_as_,
    looks_up,
    made_of,
    stand_in,
    swap_,
    tied_to,
)
from cur.integrations.nn.registry import LAYOUTS, cells, layer_class, register
from cur.integrations.nn.replaceable import has_own_forward, held_beside
from cur.integrations.nn.rounded import GridEmbedding, GridLinear, set_kernels_
from cur.integrations.nn.table import WholeTable
from cur.integrations.nn.tensors import StoredTensor, Stores
from cur.integrations.nn.trainable import Trainable
from cur.integrations.nn.whole import WholeLinear

__all__ = [
    "LAYOUTS",
    "CURLinear",
    "CompressedLinear",
    "EmbeddingFactors",
    "FactoredLinear",
    "FoldedLinear",
    "GridEmbedding",
    "GridLinear",
    "IntegerGrid",
    "InterpolativeLinear",
    "KeptInputs",
    "KeptNeurons",
    "KeptOutputs",
    "StoredTensor",
    "Stores",
    "Trainable",
    "WholeLinear",
    "WholeTable",
    "cells",
    "compressed_modules",
    "dense_weight",
    "dtype_of",
    "factored",
    "grid_fields",
    "grids_of",
    "has_own_forward",
    "held_beside",
    "is_head",
    "is_linear",
    "is_table",
    "layer_class",
    "layout_for",
    "learn_as_",
    "looks_up",
    "made_of",
    "register",
    "set_kernels_",
    "stand_in",
    "swap_",
    "tied_to",
]


def __getattr__(name: str) -> Any:
    """Return what had a name of its own until it could be asked of the types."""
    if name == "FACTORED":
        warn("cur.integrations.nn.FACTORED is gone; ask cur.integrations.nn.factored()", DeprecationWarning)
        return tuple(factored())
    if name == "NEURONS":
        warn("cur.integrations.nn.NEURONS is gone; ask `by_itself` of the layer types", DeprecationWarning)
        return tuple(layout for layout, kind in LAYOUTS.items() if not kind.by_itself)
    if name in ("Int8Embedding", "Int8Linear"):
        found = GridEmbedding if name == "Int8Embedding" else GridLinear
        warn(f"cur.integrations.nn.{name} is {found.__name__} now", DeprecationWarning)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
