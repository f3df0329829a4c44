"""What the drivers share: the checked problem, the search for a rank, certificates.

A driver is a public function that returns a factorization. Imports the public parts below the drivers (subspaces,
selection, linking, bounds, factors) and `cur._lib`.
"""
