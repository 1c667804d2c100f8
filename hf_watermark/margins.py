"""The closed form in numbers: what a change does to every bit's margin, and the least that reaches.

A carrier is changed along T known directions only, so its responses, its norm and the responses
after scaling back to that norm follow from T numbers and a T x T matrix a carrier: the weights
themselves are read once before and written once after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_watermark.carriers import Carrier
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Doubles, Floats, Projection
from hf_watermark.scheme import Scheme

__all__ = [
    "TOLERANCE",
    "Directions",
    "Grams",
    "Mark",
    "Response",
    "Sums",
    "growth",
    "least_change",
    "lift",
    "responses_after",
    "rounded",
]

TOLERANCE = 1e-3  # of the margin: what counts as reached
_PASSES = 20  # 2 to 4 are usual; more where the margin takes half of the carriers' size
_STEPS = 2000  # of the projected gradient; as many bits as directions can bear take hundreds
_ROOM = 2**27  # bytes of Gram matrices that are kept; others are made again for every pass


def least_change(deficit: Doubles, gram: Doubles) -> Doubles:
    """The a of least a^T gram a with gram a >= deficit; a >= 0 comes with it.

    It is its own vector of multipliers (Karush, Kuhn and Tucker): where a > 0 nothing is given
    beyond the deficit, so it also solves the dual, least a^T gram a / 2 - deficit^T a over a >= 0.
    That is what accelerated projected gradient steps solve, restarted when they turn back
    (O'Donoghue and Candes 2015, section 3.2), without ever touching the carriers.

    Args:
        deficit: How much every bit lacks, (T,); negative where it has more than enough.
        gram: Inner products of the bits' directions, (T, T), positive definite.

    Returns:
        a, (T,) float64.
    """
    # The largest sum of a row bounds the largest eigenvalue, and is cheap at thousands of bits.
    step = 1.0 / max(float(np.abs(gram).sum(axis=1).max()), 1e-300)
    a = np.maximum(deficit, 0.0) * step
    previous, momentum = a, 1.0
    for _ in range(_STEPS):
        faster = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum * momentum))
        point = a + (momentum - 1.0) / faster * (a - previous)
        previous, momentum = a, faster
        a = np.maximum(point + step * (deficit - gram @ point), 0.0)
        if float((point - a) @ (a - previous)) > 0.0:
            momentum = 1.0
        if float(np.max(np.abs(a - previous))) <= 1e-10 * float(np.max(a)):
            break
    return a


def growth(v: Doubles, z: Doubles, grams: Iterable[Doubles], weights: Doubles) -> Doubles:
    """By what factor the norm of every carrier grows when it is changed by v, (n,)."""
    added = np.array([v @ gram @ v for gram in grams])
    ratio: Doubles = np.sqrt(np.maximum(1.0 + (2.0 * (z @ v) + added) / weights, 1e-12))
    return ratio


def responses_after(v: Doubles, z: Doubles, grams: Iterable[Doubles], weights: Doubles) -> Doubles:
    """The responses, (T,), once every carrier is changed by v and scaled back to its norm.

    Args:
        v: Coefficients of the directions, (T,).
        z: Responses of every carrier alone, (n, T).
        grams: Inner products of the directions in every carrier, n of (T, T).
        weights: Weights of every carrier, (n,).
    """
    moved = np.stack([gram @ v for gram in grams])
    ratio = np.sqrt(np.maximum(1.0 + ((2.0 * z + moved) @ v) / weights, 1e-12))
    after: Doubles = ((z + moved) / ratio[:, None]).sum(axis=0)
    return after


def lift(
    z: Doubles, grams: Iterable[Doubles], weights: Doubles, signs: Doubles, margins: Doubles
) -> Doubles:
    """Coefficients v that bring every s_t z_t to its margin, scaling back included.

    Law: `signs * responses_after(v, ...) >= margins * (1 - TOLERANCE)` wherever any v that is found
    by raising what is asked for can reach them.

    Args:
        z: Responses of every carrier alone, (n, T).
        grams: Inner products of the directions in every carrier, n of (T, T); gone through several
            times.
        weights: Weights of every carrier, (n,).
        signs: Message signs s, (T,).
        margins: What s_t z_t should reach, (T,).

    Returns:
        v, (T,): W_i changes by sum_t v_t u_it x_it^T rms(W_i) / sqrt(out_i). Zero if every margin
        is reached already. Where the margins are out of reach, the nearest that was found.
    """
    lacking = margins - signs * z.sum(axis=0)
    v = best = np.zeros_like(margins)
    least = float(np.max(lacking - TOLERANCE * margins))
    if least <= 0.0:
        return v
    total = np.zeros((len(v), len(v)))
    for gram in grams:
        total += gram
    signed = total * np.outer(signs, signs)
    target = lacking
    for _ in range(_PASSES):
        v = signs * least_change(target, signed)
        lacking = margins - signs * responses_after(v, z, grams, weights)
        worst = float(np.max(lacking - TOLERANCE * margins))
        if worst < least or worst <= 0.0:
            best, least = v, worst
        # Bits without a change of their own may have more than they need, the others not.
        if float(np.max(np.where(v != 0.0, np.abs(lacking), lacking) - TOLERANCE * margins)) <= 0.0:
            break
        target = target + np.where(v != 0.0, lacking, np.maximum(lacking, 0.0))
    return best


@dataclass(frozen=True)
class Response:
    """What one carrier says.

    Attributes:
        z: Its responses alone, (T,), in natural sigmas of all carriers together.
        variance: Their variance given the weights and the row signs, (T,).
        rms: Root mean square of its weights.
    """

    z: Doubles
    variance: Doubles
    rms: float


class Mark:
    """What one or several keys want of the same carriers, as one message of all their bits.

    Args:
        keys: The owner's, and a recipient's.
        scheme: Of all of them.
        carriers: In the order of the keys' streams.
    """

    def __init__(
        self, keys: Sequence[OwnerKey], scheme: Scheme, carriers: Sequence[Carrier]
    ) -> None:
        self._keys, self._scheme = keys, scheme
        self.carriers = carriers
        self.weights = np.array([float(carrier.weights) for carrier in carriers])
        projections = self._projections()
        self.signs = np.concatenate([p.message_signs for p in projections])
        self.margin = projections[0].margin

    @property
    def own(self) -> slice:
        """The bits of the first key."""
        return slice(0, self._scheme.bits)

    def directions(self, carrier: int) -> Directions:
        """The directions of one carrier, made from the keys and not kept: a model has many."""
        projections = self._projections()
        u = np.concatenate([p.row_signs(carrier) for p in projections], axis=1)
        x = np.concatenate([p.x(carrier) for p in projections], axis=0)
        return Directions(u.astype(np.float32), x, self.weights.sum())

    def _projections(self) -> list[Projection]:
        return [Projection(key, self._scheme, self.carriers) for key in self._keys]


@dataclass(frozen=True)
class Directions:
    """The T directions of one carrier, u_t x_t^T rms(W) / sqrt(out).

    Attributes:
        u: Row signs, (out, T) float32.
        x: Projection rows, (T, M) float32.
        total: N, the weights of all carriers.
    """

    u: Floats
    x: Floats
    total: float

    def gram(self) -> Doubles:
        """Their inner products, (T, T) float64, in units of rms(W)^2."""
        inner: Doubles = ((self.x @ self.x.T) * (self.u.T @ self.u)).astype(np.float64)
        inner /= len(self.u)
        return inner

    def scaled(self, v: Doubles, rms: float) -> Floats:
        """U' of the change U' X that the coefficients v make of a carrier of this rms."""
        return self.u * (v * (rms / math.sqrt(len(self.u)))).astype(np.float32)


class Grams:
    """The Gram matrices of all carriers, as many of them kept as there is room for."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._kept: dict[int, Doubles] = {}
        self._most = _ROOM // (8 * len(mark.signs) ** 2)

    def add(self, carrier: int, directions: Directions) -> None:
        """Keep a carrier's while its directions are at hand, if there is room."""
        if len(self._kept) < self._most:
            self._kept[carrier] = directions.gram()

    def __iter__(self) -> Iterator[Doubles]:
        for i in range(len(self._mark.carriers)):
            yield self._kept[i] if i in self._kept else self._mark.directions(i).gram()


class Sums:
    """y = u^T W and the sum of squares of one carrier, gathered over row blocks."""

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self._y = np.zeros(directions.x.shape, np.float32)
        self._squares = 0.0
        self._size = len(directions.u) * directions.x.shape[1]

    def add(self, start: int, w: Floats) -> None:
        """Take the rows from `start` on, (rows, M) float32, each row once."""
        with np.errstate(over="ignore", invalid="ignore"):  # `response` tells
            self._y += self._directions.u[start : start + len(w)].T @ w
            self._squares += float(np.einsum("ij,ij->", w, w, dtype=np.float64))

    def response(self) -> Response | None:
        """What the rows taken so far say; None if they are all zero, or beyond float32's range."""
        rms, rows = math.sqrt(self._squares / self._size), len(self._directions.u)
        if rms == 0.0 or not np.isfinite(self._y).all():
            return None
        y = self._y.astype(np.float64) / (rms * math.sqrt(rows))
        return Response(
            z=np.einsum("ij,ij->i", self._directions.x.astype(np.float64), y),
            variance=np.einsum("ij,ij->i", y, y) * (rows / self._directions.total),
            rms=rms,
        )


def rounded(w: Floats, dtype: str) -> tuple[npt.NDArray[np.generic], Floats]:
    """Weights as a safetensors dtype stores them, little-endian, and what a reader gets of that.

    Args:
        w: float32, of any shape.
        dtype: F32, F16 or BF16.
    """
    if dtype == "F32":
        return w.astype("<f4", copy=False), w
    if dtype == "F16":
        with np.errstate(over="ignore"):  # an infinity is refused when the responses are read
            half = w.astype("<f2")
        return half, half.astype(np.float32)
    # bfloat16 is the upper half of float32: round to nearest, ties to even.
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return upper.astype("<u2"), (upper << np.uint32(16)).view(np.float32)
