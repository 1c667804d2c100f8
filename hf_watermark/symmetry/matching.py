"""Which channel of a suspect is which of the reference, and how its residual stream is turned."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["equalised", "match", "rotation"]

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_TABLE = 2**27  # cosines, 512 MiB in float32: 8,192 units against twice as many
_WIDEST = 2048  # of a stream that may be turned: seconds; ViT-G's is 1,664 wide
# What no pair settles is assigned jointly: cubic in time, at most a second or two at this size.
_JOINTLY = 1024
_BALANCING_ROUNDS = 4


def equalised(w: Doubles) -> Doubles:
    """A layer with the positive scales of its rows and of its input channels taken out.

    Law: multiplying rows and channels by positive numbers changes nothing but rounding, and the
    small remainder that the rounds of balancing leave.

    Args:
        w: (rows, channels, taps). Zero rows and channels stay zero.

    Returns:
        The same shape; rows and channels have a root mean square of about one.
    """
    w = w.copy()
    for _ in range(_BALANCING_ROUNDS):
        for axes in ((0, 2), (1, 2)):
            peak = np.abs(w).max(axis=axes, keepdims=True, initial=0.0)
            w /= np.where(peak > 0.0, peak, 1.0)  # first, lest squares leave the range of floats
            size = np.sqrt(np.mean(w * w, axis=axes, keepdims=True))
            w /= np.where(size > 0.0, size, 1.0)
    return w


def match(reference: Doubles, suspect: Doubles) -> Indices:
    """For each row of the reference the suspect's row that is it, by the cosine with its sign.

    Rows that choose each other are matched; the others, if they are not too many, are assigned so
    that the sum of cosines is largest (Crouse 2016, in `scipy.optimize.linear_sum_assignment`).
    Added rows stay over.

    Args:
        reference: (n, d).
        suspect: (m, d).

    Returns:
        (n,), each at most once, -1 where none is left, or a row is zero; all of them if there are
        too many to compare.
    """
    if len(reference) * len(suspect) > _TABLE:
        return np.full(len(reference), -1, np.intp)
    cosines = _unit_rows(reference) @ _unit_rows(suspect).T
    found = np.full(len(reference), -1, np.intp)
    if cosines.size == 0:
        return found
    forth, back = cosines.argmax(axis=1), cosines.argmax(axis=0)
    each_other = back[forth] == np.arange(len(reference))
    found[each_other] = forth[each_other]
    found[~reference.any(axis=1)] = -1
    taken = np.zeros(len(suspect), bool)
    taken[found[found >= 0]] = True
    left = np.flatnonzero((found < 0) & reference.any(axis=1))
    free = np.flatnonzero(~taken & suspect.any(axis=1))
    if 0 < left.size <= _JOINTLY and 0 < free.size <= 4 * _JOINTLY:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(cosines[np.ix_(left, free)], maximize=True)
        found[left[rows]] = free[columns]
    return found


def rotation(reference: Doubles, suspect: Doubles) -> Doubles | None:
    """The orthogonal Q with suspect = Q reference as nearly as possible (Schönemann 1966).

    Args:
        reference: (h, n).
        suspect: (h, n).

    Returns:
        (h, h); None if there is none to speak of.
    """
    if len(reference) > _WIDEST:
        return None
    try:
        left, _, right = np.linalg.svd(suspect @ reference.T)
    except np.linalg.LinAlgError:
        return None
    turned: Doubles = left @ right
    return turned


def _unit_rows(w: Doubles) -> npt.NDArray[np.float32]:
    peak = np.abs(w).max(axis=1, keepdims=True, initial=0.0)
    w = w / np.where(peak > 0.0, peak, 1.0)
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    return (w / np.where(norm > 0.0, norm, 1.0)).astype(np.float32)
