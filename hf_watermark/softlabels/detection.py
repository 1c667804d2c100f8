"""Reading a customer's signs out of a suspect's answers.

Every statistic here is linear in the signs: t = sum(S A) / ||A||, with weights A (nb, K) made from
the suspect's outputs, the features and clean references alone. For a suspect that never saw answers
bent by S, the signs are independent of A, and t is a Rademacher sum of unit variance, whatever the
suspect, the probes and the references: `significance.log10_rademacher_tail` bounds its tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hf_watermark.projections import Doubles
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.probes import Probes

__all__ = [
    "CLASSES",
    "PAIR",
    "agreement",
    "class_weights",
    "fewest_probes",
    "pair_weights",
    "probes_needed",
]

CLASSES, PAIR = "all classes", "top pair"  # the names of the readings
_SHARE = 0.25  # of the probes, at most, is spent on directions that references explain
_DUST = 1e-6  # of the largest singular value: below it covariates repeat each other
_LEVEL = 0.3  # of the mean: how far directions are levelled
_RIDGE = 3.0  # times the mean eigenvalue of the pair reading's design
_MOST_PAIRS = 4000  # probes of the pair reading: its kernel is (n, n)


def fewest_probes(features: int) -> int:
    """How many probes a check needs: two for every feature."""
    return 2 * features


def agreement(weights: Doubles, signs: npt.NDArray[np.int8]) -> float:
    """T = sum(S A) / ||A||: 0 for weights of zeros, at most sqrt(nb K).

    Args:
        weights: A, (nb, K).
        signs: S, (nb, K).
    """
    norm = float(np.linalg.norm(weights))
    return float((weights * signs).sum()) / norm if norm > 0.0 else 0.0


def class_weights(outputs: Outputs, probes: Probes, references: Sequence[Doubles] = ()) -> Doubles:
    """How every class moves with every feature, (nb, K).

    The suspect's centred log-probabilities are freed, class by class, of what the clean models say
    of that class, centred and brought to the same length probe by probe, and correlated with the
    features, freed of the same. Signs weigh alike along every direction of the features; where
    answers move more than elsewhere, it is for reasons of the suspect's own, and those directions
    are levelled.

    In margin mode, where labels teach little but which of two classes is ahead, the correlation of
    that preference with the features counts as much.

    Args:
        outputs: The suspect's, n probes.
        probes: The owner's view of the same.
        references: (n, K) log-probabilities of clean models beside the owner's own.
    """
    clean: Doubles = probes.log_probs.astype(np.float64)
    given = [(_centred(one), np.exp(one)) for one in (clean, *references)]
    bases = [
        _basis(np.stack([x[:, j] for pair in given for x in pair], axis=1))
        for j in range(clean.shape[1])
    ]
    residual = _centred(_freed(bases, _centred(outputs.log_probs)))
    if probes.top_k is not None and probes.top_k < probes.classes:
        bent = np.argpartition(-clean, probes.top_k - 1, axis=1)[:, : probes.top_k]
        mask = np.zeros(clean.shape)
        np.put_along_axis(mask, bent, 1.0, axis=1)
        mean = (residual * mask).sum(axis=1, keepdims=True) / probes.top_k
        residual = (residual - mean) * mask
    psi = probes.psi.astype(np.float64)
    # Freeing the answers once more is freeing the features: psi'(I - BB')r.
    weights = _levelled(psi.T @ _freed(bases, _unit_rows(residual)))
    if probes.margin is None:
        return weights
    preference, sides = _preference(outputs, clean, references, np.arange(len(clean)))
    return _unit(weights) + _unit(psi.T @ (preference[:, None] * sides))


def pair_weights(outputs: Outputs, probes: Probes, references: Sequence[Doubles] = ()) -> Doubles:
    """How the clean model's top two classes move against each other with the features, (nb, K).

    For margin mode: probes count by how often a random key overturns their gap. With x_i =
    psi_i (e_c1 - e_c2)' the weights are the ridge regression of the suspect's preference of c1 over
    c2 on x; its penalty is thrice the mean eigenvalue of the design.

    Args:
        outputs: The suspect's, n probes.
        probes: The owner's view of the same, in margin mode.
        references: As in `class_weights`.
    """
    assert probes.margin is not None
    strength, limit = probes.margin
    clean = probes.log_probs.astype(np.float64)
    first, second = _top_two(clean)
    gap = _pick(np.exp(clean), first) - _pick(np.exp(clean), second)
    near = np.argsort(gap, kind="stable")[:_MOST_PAIRS]
    near = near[gap[near] < limit]
    if len(near) < 2:
        return np.zeros((probes.features, probes.classes))
    psi = probes.psi[near].astype(np.float64)
    spread = strength * np.sqrt(2.0 * np.mean(psi**2, axis=1))
    # d E[p1 > p2] / d key at a gap, up to a factor: the density of the key's push there.
    weight = np.exp(-0.5 * (gap[near] / spread) ** 2)
    preference, sides = _preference(outputs, clean, references, near)
    residual = weight * preference
    kernel = (psi @ psi.T) * (sides @ sides.T)
    ridge = _RIDGE * float(np.trace(kernel)) / min(len(near), psi.shape[1] * probes.classes)
    dual = np.linalg.solve(kernel + ridge * np.eye(len(near)), residual)
    weights: Doubles = psi.T @ (dual[:, None] * sides)
    return weights


def probes_needed(t: float, probes: int, wanted: float) -> int | None:
    """How many probes would lift t to `wanted` if it grows like their square root; a guess.

    None if t is too small to tell a mark from chance.
    """
    return None if t < 1.5 else max(probes, math.ceil(probes * (wanted / t) ** 2))


def _preference(
    outputs: Outputs, clean: Doubles, references: Sequence[Doubles], rows: npt.NDArray[np.int64]
) -> tuple[Doubles, Doubles]:
    """How much the suspect prefers the clean model's top class to the second, and which they are.

    Returns:
        The difference of log-probabilities, freed of the clean models' and with outliers drawn in,
        (n,), and e_c1 - e_c2, (n, K), for the rows asked for.
    """
    first, second = _top_two(clean[rows])

    def of(log_probs: Doubles) -> Doubles:
        return _pick(log_probs[rows], first) - _pick(log_probs[rows], second)

    sides = np.zeros((len(rows), clean.shape[1]))
    np.put_along_axis(sides, first[:, None], 1.0, axis=1)
    np.put_along_axis(sides, second[:, None], -1.0, axis=1)
    columns = [np.stack([of(one), of(np.exp(one))], axis=1) for one in (clean, *references)]
    basis = _basis(np.concatenate([*columns, sides], axis=1))
    residual = _without(basis, of(outputs.log_probs)[:, None])[:, 0]
    scale = float(np.median(np.abs(residual)))
    return residual / np.sqrt(residual**2 + scale**2 + 1e-30), sides


def _top_two(clean: Doubles) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    order = np.argsort(-clean, axis=1, kind="stable")
    return order[:, 0], order[:, 1]


def _centred(log_probs: Doubles) -> Doubles:
    centred: Doubles = log_probs - log_probs.mean(axis=1, keepdims=True)
    return centred


def _freed(bases: Sequence[Doubles], x: Doubles) -> Doubles:
    """Every column of an array (n, K) without what its class's basis explains."""
    return np.stack([_without(basis, x[:, j : j + 1])[:, 0] for j, basis in enumerate(bases)], 1)


def _basis(columns: Doubles) -> Doubles:
    """An orthonormal basis (n, m) of 1 and the leading directions of standardised columns."""
    n = len(columns)
    x = columns - columns.mean(axis=0)
    scale = x.std(axis=0)
    x = x[:, scale > 1e-12] / scale[scale > 1e-12]
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    kept = int((singular > _DUST * singular.max(initial=0.0)).sum())
    constant = np.full((n, 1), 1.0 / math.sqrt(n))
    return np.concatenate([constant, left[:, : min(kept, int(_SHARE * n))]], axis=1)


def _without(basis: Doubles, x: Doubles) -> Doubles:
    """An array (n, m) less its projection on an orthonormal basis."""
    left: Doubles = x - basis @ (basis.T @ x)
    return left


def _levelled(weights: Doubles) -> Doubles:
    """(A A' + ridge)^(-1/2) A for weights A (nb, K)."""
    size, directions = np.linalg.eigh(weights @ weights.T)
    ridge = _LEVEL * float(size.mean())
    if not ridge > 0.0:
        return weights
    level = directions / np.sqrt(np.maximum(size, 0.0) + ridge)
    levelled: Doubles = level @ (directions.T @ weights)
    return levelled


def _unit(weights: Doubles) -> Doubles:
    norm = float(np.linalg.norm(weights))
    return weights / norm if norm > 0.0 else weights


def _unit_rows(x: Doubles) -> Doubles:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Doubles = x / np.where(norms > 1e-12, norms, 1.0)
    return unit


def _pick(x: Doubles, column: npt.NDArray[np.int64]) -> Doubles:
    picked: Doubles = np.take_along_axis(x, column[:, None], axis=1)[:, 0]
    return picked
