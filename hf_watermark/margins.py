"""The closed form in numbers: what a change does to every bit's margin, and the least that reaches.

A carrier is changed along T known directions only, so its responses, its norm and the responses
after scaling back to that norm follow from T numbers and a T x T matrix a carrier: the weights
themselves are read once before and written once after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_watermark.projections import Doubles

__all__ = ["TOLERANCE", "Grams", "growth", "least_change", "lift", "responses_after"]

TOLERANCE = 1e-3  # of the margin: what counts as reached
_PASSES = 20  # 2 or 3 are usual
_STEPS = 2000  # of the projected gradient; as many bits as directions can bear take hundreds
_ROOM = 2**27  # bytes of Gram matrices that are kept; others are made again for every pass
_LARGEST = 5.0  # growth that is taken seriously: beyond it 98% of a carrier are mark


class Grams:
    """The inner products of the bits' directions in every carrier, each (T, T) float64.

    Args:
        count: n, the number of carriers.
        bits: T.
        make: Makes those of one carrier. As many are kept as there is room for.
    """

    def __init__(self, count: int, bits: int, make: Callable[[int], Doubles]) -> None:
        self._count, self.bits, self._make = count, bits, make
        self._kept: dict[int, Doubles] = {}

    def keep(self, carrier: int, make: Callable[[], Doubles]) -> None:
        """Make one carrier's now, if there is room, from what is at hand."""
        if len(self._kept) < _ROOM // (8 * self.bits**2):
            self._kept[carrier] = make()

    @property
    def kept_bytes(self) -> int:
        """Of those that are kept."""
        return sum(gram.nbytes for gram in self._kept.values())

    def masked(self, free: npt.NDArray[np.bool_]) -> Masked:
        """The same with zeros for the carriers that are not to be changed, (n,)."""
        return Masked(self, free)

    def of(self, carrier: int) -> Doubles:
        """One carrier's."""
        if carrier not in self._kept:
            made = self._make(carrier)
            self.keep(carrier, lambda: made)
            return made
        return self._kept[carrier]

    def __iter__(self) -> Iterator[Doubles]:
        return (self.of(i) for i in range(self._count))


@dataclass(frozen=True)
class Masked:
    """Gram matrices of which some count as zero."""

    grams: Grams
    free: npt.NDArray[np.bool_]

    def __iter__(self) -> Iterator[Doubles]:
        nothing: Doubles = np.zeros((self.grams.bits, self.grams.bits))
        return (self.grams.of(i) if free else nothing for i, free in enumerate(self.free))


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
    largest = float(np.abs(gram).sum(axis=1).max())
    if largest == 0.0:
        return np.zeros_like(deficit)
    step = 1.0 / largest
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
    return _after(v, z, grams, weights)[1]


def responses_after(v: Doubles, z: Doubles, grams: Iterable[Doubles], weights: Doubles) -> Doubles:
    """The responses, (T,), once every carrier is changed by v and scaled back to its norm.

    Args:
        v: Coefficients of the directions, (T,).
        z: Responses of every carrier alone, (n, T).
        grams: Inner products of the directions in every carrier, n of (T, T).
        weights: Weights of every carrier, (n,).
    """
    return _after(v, z, grams, weights)[0]


def _after(
    v: Doubles, z: Doubles, grams: Iterable[Doubles], weights: Doubles
) -> tuple[Doubles, Doubles]:
    moved = np.stack([gram @ v for gram in grams])
    ratio: Doubles = np.sqrt(np.maximum(1.0 + ((2.0 * z + moved) @ v) / weights, 1e-12))
    responses: Doubles = ((z + moved) / ratio[:, None]).sum(axis=0)
    return responses, ratio


def lift(
    z: Doubles, grams: Iterable[Doubles], weights: Doubles, signs: Doubles, margins: Doubles
) -> Doubles:
    """Coefficients v that bring every s_t z_t to its margin, scaling back included.

    Law: where all margins take up to 80% of the carriers' size (1 would leave nothing else),
    `signs * responses_after(v, ...) >= margins * (1 - TOLERANCE)`, with equality up to 2 TOLERANCE
    for every bit that is changed; without scaling back v would be the least change.

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
        after, ratio = _after(v, z, grams, weights)
        lacking = margins - signs * after
        worst = float(np.max(lacking - TOLERANCE * margins))
        if worst < least or worst <= 0.0:
            best, least = v, worst
        # Bits without a change of their own may have more than they need, the others not.
        if float(np.max(np.where(v != 0.0, np.abs(lacking), lacking) - TOLERANCE * margins)) <= 0.0:
            break
        # Scaling back makes t of the responses t / g, g^2 = 1 + |t|^2 / N. Newton's step from there
        # is g (lacking + t <t, lacking> / N): only along t itself is g^3 times as much needed.
        wrong = np.where(v != 0.0, lacking, np.maximum(lacking, 0.0))
        g = min(float(np.average(ratio, weights=weights)), _LARGEST)
        unscaled = signs * after * g
        target = target + g * (wrong + unscaled * float(unscaled @ wrong) / float(weights.sum()))
    return best
