"""Matrices to test with: one function a family, all of the same signature.

``make(m, n, rng)`` gives an m x n float64 or complex128 array of norm about one, unless the family is about scale. Real
families are cast to the dtype under test by `cast`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Family = Callable[[int, int, np.random.Generator], np.ndarray]


def orthonormal(m: int, k: int, rng: np.random.Generator, *, is_complex: bool = False) -> np.ndarray:
    X = rng.standard_normal((m, k))
    if is_complex:
        X = X + 1j * rng.standard_normal((m, k))
    return np.linalg.qr(X)[0]


def with_spectrum(m: int, n: int, s: np.ndarray, rng: np.random.Generator, *, is_complex: bool = False) -> np.ndarray:
    """A matrix of random singular vectors and the given singular values."""
    k = len(s)
    return (orthonormal(m, k, rng, is_complex=is_complex) * s) @ orthonormal(n, k, rng, is_complex=is_complex).conj().T


def random(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((m, n)) / np.sqrt(m * n)


def low_rank_plus_noise(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    k = max(1, min(m, n) // 4)
    noise = 10.0 ** -rng.integers(1, 14)
    return with_spectrum(m, n, np.linspace(1, 0.5, k), rng) + noise * random(m, n, rng)


def rank_deficient(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    k = max(1, min(m, n) // 2)
    return rng.standard_normal((m, k)) @ rng.standard_normal((k, n)) / np.sqrt(m * n * k)


def zero(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((m, n))


def graded(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Singular values from 1 to 1e-16."""
    return with_spectrum(m, n, np.logspace(0, -16, min(m, n)), rng)


def graded_rows(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows whose sizes go from 1 to 1e-16, in random order."""
    return rng.permutation(np.logspace(0, -16, m))[:, None] * rng.standard_normal((m, n)) / np.sqrt(n)


def geometric(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return with_spectrum(m, n, rng.uniform(0.3, 0.95) ** np.arange(min(m, n)), rng)


def slow_decay(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return with_spectrum(m, n, 1.0 / np.arange(1, min(m, n) + 1), rng)


def flat(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """All singular values equal: no subspace leads."""
    return with_spectrum(m, n, np.ones(min(m, n)), rng)


def step(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    k = max(1, min(m, n) // 3)
    s = np.full(min(m, n), 10.0 ** -rng.integers(2, 15))
    s[:k] = 1.0
    return with_spectrum(m, n, s, rng)


def repeated_columns(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    few = rng.standard_normal((m, max(1, n // 3)))
    return few[:, rng.integers(0, few.shape[1], n)] / np.sqrt(m * n)


def nearly_repeated_rows(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    few = rng.standard_normal((max(1, m // 3), n))
    noise = 10.0 ** -rng.integers(6, 16)
    return (few[rng.integers(0, few.shape[0], m)] + noise * rng.standard_normal((m, n))) / np.sqrt(m * n)


def spikes(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Almost nothing but a few entries."""
    A = np.zeros((m, n))
    count = max(1, m * n // 20)
    A[rng.integers(0, m, count), rng.integers(0, n, count)] = rng.standard_normal(count)
    return A


def outliers(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Columns of very different sizes, as the activations of language models have."""
    return random(m, n, rng) * np.exp(3 * rng.standard_normal(n))


def complex_random(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((m, n)) + 1j * rng.standard_normal((m, n))) / np.sqrt(2 * m * n)


def complex_geometric(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return with_spectrum(m, n, rng.uniform(0.3, 0.95) ** np.arange(min(m, n)), rng, is_complex=True)


def constant(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """One number, whose multiples are rounded the same way everywhere."""
    return np.full((m, n), rng.choice([0.1, 1 / 3, 0.7, 1e-3]) / np.sqrt(m * n))


def small_integers(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-3, 4, (m, n)) * 1.0


def few_rows(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns that come again and again, exactly."""
    few = rng.uniform(0, 1, (1 + m // 8, 1 + n // 8))
    return few[np.ix_(rng.integers(0, few.shape[0], m), rng.integers(0, few.shape[1], n))] / np.sqrt(m * n)


def hilbert(m: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    return 1.0 / (np.arange(1.0, m + 1)[:, None] + np.arange(n))


def cauchy(m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return 1.0 / (np.sort(rng.uniform(0, 1, m))[:, None] + np.sort(rng.uniform(0.01, 1, n)))


def lehmer(m: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    i, j = np.arange(1.0, m + 1)[:, None], np.arange(1.0, n + 1)
    return np.minimum(i, j) / np.maximum(i, j)


def kahan(m: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Kahan's triangular matrix, on which pivoted QR misjudges the rank."""
    theta = 1.2
    i, j = np.arange(m)[:, None], np.arange(n)
    upper = np.where(i == j, 1.0, np.where(j > i, -np.cos(theta), 0.0))
    return np.sin(theta) ** i * upper


def wilkinson(m: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Partial pivoting grows by a factor of two a step; the pivots are the rows in order."""
    i, j = np.arange(m)[:, None], np.arange(n)
    A = np.where(i == j, 1.0, np.where(j < i, -1.0, 0.0))
    A[:, -1] = 1.0
    return A


def circulant(m: int, n: int, rng: np.random.Generator | None = None) -> np.ndarray:
    N = max(m, n)
    return ((np.arange(n) - np.arange(m)[:, None]) % N + 1.0) / N


FAMILIES: dict[str, Family] = {
    f.__name__: f
    for f in (
        random,
        low_rank_plus_noise,
        rank_deficient,
        zero,
        graded,
        graded_rows,
        geometric,
        slow_decay,
        flat,
        step,
        repeated_columns,
        nearly_repeated_rows,
        spikes,
        outliers,
        complex_random,
        complex_geometric,
        constant,
        small_integers,
        few_rows,
        hilbert,
        cauchy,
        lehmer,
        kahan,
        wilkinson,
        circulant,
    )
}

SHAPES = ((30, 20), (20, 30), (40, 6), (6, 40), (12, 12), (1, 9), (9, 1), (1, 1), (2, 3), (60, 45))
"""Tall, wide, square, one row, one column, one entry."""

DTYPES = ("float32", "float64", "complex64", "complex128")


def cast(A: np.ndarray, dtype: str) -> np.ndarray:
    """`A` in `dtype`; a complex family has no real counterpart and keeps to the complex dtype of that precision."""
    if np.iscomplexobj(A) and not dtype.startswith("complex"):
        dtype = {"float32": "complex64", "float64": "complex128"}[dtype]
    return np.ascontiguousarray(A.astype(dtype))


def remainder(A: np.ndarray, *factors: np.ndarray) -> np.ndarray:
    """``A`` minus the product of thin matrices, in exact arithmetic, rounded to extended precision at the end.

    Floating-point numbers are integers times powers of two, and Python's integers have any length.
    """
    if any(np.iscomplexobj(X) for X in (A, *factors)):
        m, n = A.shape
        E = remainder(_embedded(A), *(_embedded(X) for X in factors))
        return E[:m, :n] + 1j * E[:m, n:]
    first, *rest = (_integers(X) for X in factors)
    product, exponent = first
    for X, e in rest:
        product, exponent = np.dot(product, X), exponent + e
    whole, e = _integers(A)
    low = min(e, exponent)
    difference = (whole << (e - low)) - (product << (exponent - low))
    return _rounded(difference, low)


def _embedded(X: np.ndarray) -> np.ndarray:
    """The real matrix that multiplies as the complex one does."""
    return np.block([[X.real, X.imag], [-X.imag, X.real]])


def _integers(X: np.ndarray) -> tuple[np.ndarray, int]:
    """A matrix as whole numbers times one power of two."""
    mantissa, exponent = np.frexp(np.asarray(X).astype(np.longdouble))
    mantissa, exponent = np.ldexp(mantissa, 64), exponent.astype(np.int64) - 64
    low = int(exponent[mantissa != 0].min(initial=0)) if np.any(mantissa) else 0
    numbers = np.vectorize(int, otypes=[object])(mantissa)
    return numbers << np.where(mantissa == 0, 0, exponent - low).astype(object), low


def _rounded(numbers: np.ndarray, exponent: int) -> np.ndarray:
    """Whole numbers times a power of two in extended precision, whose range no product leaves."""
    shift = max(int(abs(numbers).max(initial=0)).bit_length() - CHUNK, 0)
    E = np.zeros(numbers.shape, dtype=np.longdouble)
    while True:  # down to the last bit, since weights may bring out small entries
        leading = numbers >> shift
        E = E + np.ldexp(leading.astype(np.float64).astype(np.longdouble), shift + exponent)
        if shift == 0:
            return E
        numbers = numbers - (leading << shift)
        shift = max(shift - CHUNK, 0)


CHUNK = 52
"""Bits that are brought to floating point at once."""


def frobenius(E: np.ndarray) -> float:
    """The Frobenius norm, safe against overflow and in the precision of `E`."""
    largest = np.max(np.abs(E), initial=0.0)
    return float(largest * np.sqrt(np.sum(np.abs(E / largest) ** 2))) if largest > 0 else 0.0


def spectral(E: np.ndarray) -> float:
    """The 2-norm; LAPACK has nothing wider than double, which perturbs it by a few units of roundoff of itself."""
    size = float(np.max(np.abs(E), initial=0.0))
    scaled = E / size if size > 0 else E
    return size * float(np.linalg.norm(scaled.astype(np.complex128 if np.iscomplexobj(E) else np.float64), 2))
