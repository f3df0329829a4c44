"""Linear layers that hold fewer numbers than the dense ones they stand for.

Three layouts of the same rank-r weight of an m x n layer (m outputs, n inputs), smallest last:

========================  ==========================================  ======================
layout                    children                                    numbers kept
========================  ==========================================  ======================
:class:`CURLinear`        ``R`` (r x n), ``U`` (r x r), ``C`` (m x r)  ``r (m + n) + r^2``
:class:`FoldedLinear`     ``R`` (r x n), ``CU`` (m x r)                ``r (m + n)``
:class:`InterpolativeLinear`  ``R`` (r x n), ``T`` ((m - r) x r)       ``r (m + n - r)``
========================  ==========================================  ======================

Two more layouts belong together, where neurons between layers are given up (r of k kept):

========================  ==========================================  ======================
layout                    children                                    numbers kept
========================  ==========================================  ======================
:class:`KeptOutputs`      ``R`` (r x n), of the layers before          ``r n``
:class:`KeptInputs`       ``C`` (m x r), of the layer behind           ``r m``
========================  ==========================================  ======================

Instead of either child there may be an :class:`InterpolativeLinear` of an inner rank, ``inner``.

In a model that was rounded to eight bits the children are :class:`Int8Linear`, and layers that nothing was taken from
are :class:`WholeLinear`, with one child ``W`` (m x n).

Every other factor is a child ``nn.Linear``, so that adapters, quantizers and hooks that look for linear layers find
them.
"""

from cur.integrations.nn.base import CompressedLinear
from cur.integrations.nn.factored import FACTORED, CURLinear, FactoredLinear, FoldedLinear, InterpolativeLinear
from cur.integrations.nn.int8 import Int8Linear
from cur.integrations.nn.kept import NEURONS, KeptInputs, KeptNeurons, KeptOutputs
from cur.integrations.nn.modules import LAYOUTS, compressed_modules, dense_weight, layer_class, swap_
from cur.integrations.nn.whole import WholeLinear

__all__ = [
    "FACTORED",
    "LAYOUTS",
    "NEURONS",
    "CURLinear",
    "CompressedLinear",
    "FactoredLinear",
    "FoldedLinear",
    "Int8Linear",
    "InterpolativeLinear",
    "KeptInputs",
    "KeptNeurons",
    "KeptOutputs",
    "WholeLinear",
    "compressed_modules",
    "dense_weight",
    "layer_class",
    "swap_",
]
