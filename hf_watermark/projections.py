"""From the key: row signs u, projection rows X and message bits b; responses and their gradient.

The streams are read the same way on every machine: integers from SHAKE-256, and Gaussians through
an inverse distribution function that uses nothing but IEEE 754's correctly rounded operations
(sums, products, quotients, square roots), which `log` and `exp` of a C library are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme

__all__ = ["Matrix", "Projection", "standard_normal"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Matrix(Protocol):
    """Anything with rows and columns, such as a `Carrier`."""

    @property
    def rows(self) -> int:
        """Output rows."""

    @property
    def columns(self) -> int:
        """Inputs of one output row."""


# Wichura 1988, "Algorithm AS 241: The percentage points of the normal distribution", PPND16:
# ratios of polynomials, constant term first; the far branch (beyond 5 sigma of sqrt(-log p)) is
# not needed for 32-bit integers.
_CENTRE_NUMERATOR = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_CENTRE_DENOMINATOR = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_TAIL_NUMERATOR = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_TAIL_DENOMINATOR = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
_CHUNK = 1 << 13  # values at a time: the intermediate arrays stay in the cache


def _horner(coefficients: Sequence[float], x: Doubles) -> Doubles:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total


def _log(x: Doubles) -> Doubles:
    """Natural logarithm of positive normal numbers from correctly rounded operations alone.

    x = m 2^e, m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < .172.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner([1.0 / k for k in range(1, 24, 2)], s * s)
    return 2.0 * s * series + (exponent - low) * 0.6931471805599453


def standard_normal(integers: npt.NDArray[np.uint32]) -> Floats:
    """Standard normal numbers from uniform 32-bit integers: Phi^-1((k + 1/2) / 2^32).

    Args:
        integers: Any shape.

    Returns:
        float32 of the same shape, the same on every machine. The largest is 6.3 sigmas: the tails
        are lighter than the normal's, which errs on the side of larger p-values.
    """
    flat = integers.reshape(-1)
    result = np.empty(flat.shape, np.float32)
    for start in range(0, flat.size, _CHUNK):
        p = (flat[start : start + _CHUNK].astype(np.float64) + 0.5) * 2.0**-32
        q = p - 0.5
        r = 0.180625 - q * q
        x = q * _horner(_CENTRE_NUMERATOR, r) / _horner(_CENTRE_DENOMINATOR, r)
        tail = np.flatnonzero(np.abs(q) > 0.425)
        if tail.size:
            s = np.sqrt(-_log(np.minimum(p[tail], 1.0 - p[tail]))) - 1.6
            far = _horner(_TAIL_NUMERATOR, s) / _horner(_TAIL_DENOMINATOR, s)
            x[tail] = np.where(q[tail] < 0.0, -far, far)
        result[start : start + _CHUNK] = x
    return result.reshape(integers.shape)


class Projection:
    """What a key reads out of carriers of given shapes under a scheme.

    Carriers are known by their position. N is the number of weights of all carriers, T the bits,
    M_i the columns and out_i the rows of carrier i.

    Args:
        key: The owner's, or a recipient's.
        scheme: Statistic, key matrix and bits are used.
        matrices: One per carrier, in order.
    """

    def __init__(self, key: OwnerKey, scheme: Scheme, matrices: Sequence[Matrix]) -> None:
        self._key = key
        self.scheme = scheme
        self.rows = tuple(matrix.rows for matrix in matrices)
        self.columns = tuple(matrix.columns for matrix in matrices)
        self.weights = sum(r * c for r, c in zip(self.rows, self.columns, strict=True))
        self._label = f"{scheme.statistic}-{scheme.key_matrix}"
        self._x: dict[int, Floats] = {}

    @cached_property
    def message(self) -> npt.NDArray[np.int8]:
        """The message bits b, (T,) of 0 and 1."""
        raw = np.frombuffer(
            self._key.stream(f"{self._label}/message", -(-self.scheme.bits // 8)), np.uint8
        )
        return np.unpackbits(raw)[: self.scheme.bits].astype(np.int8)

    @property
    def message_signs(self) -> Doubles:
        """The bits as signs, s = 2b - 1, (T,) of -1.0 and +1.0."""
        return 2.0 * self.message.astype(np.float64) - 1.0

    @property
    def margin(self) -> float:
        """The response that every bit should reach when embedding, in natural sigmas."""
        return self.scheme.margin(self.weights)

    def row_signs(self, carrier: int) -> npt.NDArray[np.int8]:
        """The secret signs u of one carrier's output rows, (out_i, T) of -1 and +1.

        For the statistic `mean` they are all +1: one column for every bit.
        """
        rows, bits = self.rows[carrier], self.scheme.bits
        if self.scheme.statistic == "mean":
            return np.ones((rows, 1), np.int8)
        width = -(-bits // 8)
        raw = self._key.stream(f"{self._label}/signs/{carrier}", rows * width)
        unpacked = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(rows, width), axis=1)
        return (2 * unpacked[:, :bits].astype(np.int8)) - 1

    def x(self, carrier: int) -> Floats:
        """The projection rows X_i of one carrier, (T, M_i) float32.

        `spread`: N(0, out_i / N), which spends the same relative distortion on every carrier.
        `mean`: N(0, 1), or the one-hot rows of the paper's `direct` and `diff` over all carriers.
        """
        if carrier not in self._x:
            self._x[carrier] = self._make_x(carrier)
        return self._x[carrier]

    def _make_x(self, carrier: int) -> Floats:
        shape = (self.scheme.bits, self.columns[carrier])
        if self.scheme.key_matrix != "random":
            start = sum(self.columns[:carrier])
            return self._one_hot[:, start : start + shape[1]]
        raw = self._key.stream(f"{self._label}/rows/{carrier}", 4 * math.prod(shape))
        x = standard_normal(np.frombuffer(raw, "<u4").astype(np.uint32).reshape(shape))
        if self.scheme.statistic == "spread":
            x *= np.float32(math.sqrt(self.rows[carrier] / self.weights))
        return x

    @cached_property
    def _one_hot(self) -> Floats:
        """The paper's `direct` and `diff` matrices over the columns of all carriers, (T, M)."""
        bits, total = self.scheme.bits, sum(self.columns)
        raw = np.frombuffer(self._key.stream(f"{self._label}/columns", 8 * total), "<u8")
        order = np.argsort(raw, kind="stable")
        x = np.zeros((bits, total), np.float32)
        rows = np.arange(bits)
        x[rows, order[:bits]] = 1.0
        if self.scheme.key_matrix == "diff":  # no column twice: every message can be written
            x[rows, order[bits : 2 * bits]] = -1.0
        return x

    def responses(self, arrays: Sequence[npt.NDArray[np.floating]]) -> Doubles:
        """z, (T,) float64, in natural sigmas: N(0, 1) each for weights that never saw the key.

        A carrier of zeros says nothing: its part is 0.

        Args:
            arrays: The carriers, (out_i, ...) each.
        """
        return self._raw_responses(arrays) / self._scale(arrays)

    def gradient(self, arrays: Sequence[npt.NDArray[np.floating]], dz: Doubles) -> list[Doubles]:
        """The exact gradient of sum_t dz_t z_t with respect to the carriers, in their shapes.

        For `spread`, with z_it the part of carrier i and N_i its weights,
        dz_t/dW_i = u_it x_it^T / (sqrt(out_i) rms_i) - z_it W_i / (N_i rms_i^2);
        for `mean` the same with w in place of W. A carrier of zeros has none: 0.

        Args:
            arrays: The carriers, (out_i, ...) each.
            dz: The weights of the responses, (T,).
        """
        if self.scheme.statistic == "mean":
            return self._gradient_of_mean(arrays, dz)
        gradients = []
        for i, array in enumerate(arrays):
            w = np.asarray(array, np.float64).reshape(self.rows[i], self.columns[i])
            u, x = self.row_signs(i).astype(np.float64), self.x(i).astype(np.float64)
            rms, root = math.sqrt(float(np.mean(w * w))), math.sqrt(self.rows[i])
            if rms == 0.0:
                gradients.append(np.zeros(np.shape(array)))
                continue
            part = float(dz @ (x * (u.T @ w)).sum(axis=1)) / (rms * root)
            g = (u * dz) @ x / (rms * root) - part * w / (w.size * rms * rms)
            gradients.append(g.reshape(np.shape(array)))
        return gradients

    def _gradient_of_mean(
        self, arrays: Sequence[npt.NDArray[np.floating]], dz: Doubles
    ) -> list[Doubles]:
        means = [self._mean(i, array) for i, array in enumerate(arrays)]
        w = np.concatenate(means)
        x = np.concatenate([self.x(i) for i in range(len(arrays))], axis=1).astype(np.float64)
        scale = self._scale(arrays)
        if not w.any():
            return [np.zeros(np.shape(array)) for array in arrays]
        g = dz @ x / scale - float(dz @ (x @ w)) / scale * w / float(w @ w)
        pieces = np.split(g, np.cumsum(self.columns)[:-1])
        return [
            np.broadcast_to(piece / rows, (rows, piece.size)).reshape(np.shape(array)).copy()
            for piece, rows, array in zip(pieces, self.rows, arrays, strict=True)
        ]

    def _mean(self, carrier: int, array: npt.NDArray[np.floating]) -> Doubles:
        w = np.asarray(array, np.float64).reshape(self.rows[carrier], self.columns[carrier])
        mean: Doubles = w.mean(axis=0)
        return mean

    def _raw_responses(self, arrays: Sequence[npt.NDArray[np.floating]]) -> Doubles:
        z = np.zeros(self.scheme.bits)
        for i, array in enumerate(arrays):
            x = self.x(i).astype(np.float64)
            if self.scheme.statistic == "mean":
                z += x @ self._mean(i, array)
                continue
            w = np.asarray(array, np.float64).reshape(self.rows[i], self.columns[i])
            y = self.row_signs(i).astype(np.float64).T @ w
            norm = math.sqrt(float(np.mean(w * w))) * math.sqrt(self.rows[i])
            z += (x * y).sum(axis=1) / (norm or 1.0)
        return z

    def _scale(self, arrays: Sequence[npt.NDArray[np.floating]]) -> float:
        """One natural sigma of the raw responses."""
        if self.scheme.statistic == "spread":
            return 1.0
        w = np.concatenate([self._mean(i, array) for i, array in enumerate(arrays)])
        return math.sqrt(self.taps * float(np.mean(w * w))) or 1.0

    @property
    def taps(self) -> int:
        """||X[t]||^2 in expectation for `mean`: how many squared weights one response sums."""
        return {"random": sum(self.columns), "direct": 1, "diff": 2}[self.scheme.key_matrix]
