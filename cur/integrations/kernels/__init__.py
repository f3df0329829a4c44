"""Products with weights in few bits: the fastest on this machine for each shape, dtype and number of tokens.

A :class:`GridWeight` is what such a layer stores, before it is arranged for any kernel; a :class:`Product` multiplies
with it. A kernel is a function with an entry (:class:`Kernel`), which says what it takes, what it holds and whether it
rounds its inputs. Knows torch, and packages that may be missing; no layers and no models.
"""

from cur.integrations.kernels import compiled, dense, integer, packed  # noqa: F401  (their kernels become known)
from cur.integrations.kernels.entry import KERNELS, Kernel, kernel
from cur.integrations.kernels.product import Product
from cur.integrations.kernels.settings import KernelSettings
from cur.integrations.kernels.weight import GridWeight

__all__ = [
    "GridWeight",
    "KERNELS",
    "Kernel",
    "KernelSettings",
    "Product",
    "kernel",
]
