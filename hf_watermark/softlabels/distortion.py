"""What a mark costs its users: distances between clean and served probabilities."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.projections import Doubles

__all__ = ["Distortion", "calibration_error", "expected_price", "log_softmax"]

_BINS = 15


def log_softmax(logits: npt.NDArray[np.floating]) -> Doubles:
    """Log-probabilities of logits (n, K), float64."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    result: Doubles = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return result


def calibration_error(log_probs: Doubles, labels: npt.NDArray[np.integer]) -> float:
    """The expected calibration error over 15 equal bins of confidence, 0 to 1.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3.
    """
    confidence = np.exp(log_probs.max(axis=1))
    right = log_probs.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def expected_price(log_probs: Doubles, psi: Doubles, margin: tuple[float, float]) -> float:
    """Margin mode's price in accuracy, 0 to 1, in the mean over keys, for a calibrated model.

    A swap costs p1 - p2. Over the key's signs, g_c1 - g_c2 has variance 2 mean_b psi_b^2 and is
    nearly Gaussian, so a gap below tau is overturned with chance Q(gap / (lambda sd)).

    Args:
        log_probs: (n, K), clean.
        psi: (n, nb).
        margin: (lambda, tau).
    """
    strength, limit = margin
    top = np.sort(np.exp(log_probs), axis=1)[:, -2:]
    gap = top[:, 1] - top[:, 0]
    spread = strength * np.sqrt(2.0 * np.mean(psi**2, axis=1))
    ratio = gap / np.maximum(spread, 1e-12)
    chance = np.array([0.5 * math.erfc(value / math.sqrt(2.0)) for value in ratio])
    return float(np.mean(gap * chance * (gap < limit)))


@dataclass(frozen=True)
class Distortion:
    """What a mark costs on a user's own data.

    Attributes:
        images: How many were looked at.
        tv: Mean total variation distance between clean and served probabilities, 0 to 1.
        kl: Mean KL(clean || served), nats.
        flips: Rows whose most likely class changed: 0 without margin mode.
        expected_price: Margin mode's loss of accuracy if the clean model is calibrated,
            E[(p1 - p2) 1(swapped)] for this customer's signs, 0 to 1; 0 without margin mode.
        accuracy, ece, nll: (clean, served); None without labels.
    """

    images: int
    tv: float
    kl: float
    flips: int
    expected_price: float
    accuracy: tuple[float, float] | None = None
    ece: tuple[float, float] | None = None
    nll: tuple[float, float] | None = None

    @classmethod
    def between(
        cls,
        clean: npt.NDArray[np.floating],
        served: npt.NDArray[np.floating],
        labels: npt.NDArray[np.integer] | None = None,
    ) -> Distortion:
        """Compare logits (n, K) with logits (n, K); labels (n,) if known."""
        log_p, log_q = log_softmax(clean), log_softmax(served)
        p, q = np.exp(log_p), np.exp(log_q)
        rows = np.arange(len(p))
        before, after = clean.argmax(axis=1), served.argmax(axis=1)
        lost = p[rows, before] - p[rows, after]
        pairs: dict[str, tuple[float, float]] = {}
        if labels is not None:
            pairs = {
                "accuracy": (float(np.mean(before == labels)), float(np.mean(after == labels))),
                "ece": (calibration_error(log_p, labels), calibration_error(log_q, labels)),
                "nll": (-float(log_p[rows, labels].mean()), -float(log_q[rows, labels].mean())),
            }
        return cls(
            images=len(p),
            tv=float(0.5 * np.abs(p - q).sum(axis=1).mean()),
            kl=float((p * (log_p - log_q)).sum(axis=1).mean()),
            flips=int((before != after).sum()),
            expected_price=float(lost.mean()),
            **pairs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"on {self.images} images",
            f"total variation {self.tv:.4f}   KL {self.kl:.4f} nats   argmax flips {self.flips}",
        ]
        if self.flips:
            lines.append(f"expected loss of accuracy {100 * self.expected_price:.2f} points")
        for name, pair in (("accuracy", self.accuracy), ("ECE", self.ece), ("NLL", self.nll)):
            if pair is not None:
                lines.append(f"{name} {pair[0]:.4f} -> {pair[1]:.4f}")
        return "\n".join(lines)
