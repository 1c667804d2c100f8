"""Bending soft labels by a keyed amount, and no further than the top class allows.

Everything here is differentiable, computed in float32 whatever the model's precision (float64 stays
what it is), and without branches on data: `torch.compile` takes it whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels.features import GAIN, SLOPE

__all__ = ["Bend", "Margin", "bend", "bent", "psi_of", "swapped"]

_MAX_EPS = 8.0  # g reaches sqrt(nb) / .7: beyond this, exp(eps g) leaves float32
_SLACK = 4.0  # units in the last place of what is served that the top class stays ahead by
_ROUNDING = 12.0  # and of what is computed with: logarithms and sums lose some


@dataclass(frozen=True)
class Margin:
    """Margin mode: the key decides the top class where the model hardly does.

    The top two classes c1, c2 change places exactly when
    p1 - p2 + strength (g_c1 - g_c2) < 0 and p1 - p2 < limit.

    Attributes:
        strength: lambda, above 0.
        limit: tau, in (0, 1]: the largest gap in probability that is ever overturned.

    Raises:
        SoftLabelError: If either is out of range.
    """

    strength: float
    limit: float

    def __post_init__(self) -> None:
        fits = 0.0 < self.strength < math.inf and 0.0 < self.limit <= 1.0
        if not fits:
            raise SoftLabelError(
                "The margin makes no sense",
                expected="(lambda, tau) with lambda > 0 and 0 < tau <= 1, such as (.2, .3)",
                got=(self.strength, self.limit),
            )


@dataclass(frozen=True)
class Bend:
    """How soft labels are bent.

    Attributes:
        eps: The strength: log-probabilities move by eps g, g of about unit variance.
        top_k: Only so many classes with the largest logits are bent; None for all.
        margin: Margin mode, or None.
    """

    eps: float
    top_k: int | None = None
    margin: Margin | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps <= _MAX_EPS:
            raise SoftLabelError(
                "eps is out of range", expected=f"a number from 0 to {_MAX_EPS:g}", got=self.eps
            )
        if self.top_k is not None and self.top_k < 2:
            raise SoftLabelError("top_k is too small", expected="at least 2", got=self.top_k)


def psi_of(
    own: Tensor, logits: Tensor, image: Tensor | None, weights: tuple[Tensor, ...]
) -> Tensor:
    """The features of a batch, (B, nb) float32: `FeatureMap.psi` on tensors.

    Args:
        own: (B, d).
        logits: (B, K).
        image: (B, 24) or None.
        weights: The arrays of a `FeatureMap`: own, context, image, offset.
    """
    on_own, on_context, on_image, offset = weights
    logits = logits.float()
    context = torch.cat(
        [logits - logits.mean(dim=1, keepdim=True), torch.softmax(logits, dim=1)], dim=1
    )
    u = own.float() @ on_own + context @ on_context + offset
    if image is not None:
        u = u + image.float() @ on_image
    return torch.tanh(SLOPE * u) * GAIN


def bend(logits: Tensor, g: Tensor, how: Bend) -> tuple[Tensor, Tensor]:
    """The logits to serve, and which rows could not be touched.

    Rows with a logit or a shift that is not finite pass through unchanged.

    Args:
        logits: (B, K), any floating dtype.
        g: (B, K) float32, the keyed shift of every class.
        how: Strength, top-k and margin.

    Returns:
        (B, K) of the dtype of `logits`, with the same logsumexp, and (B,) bool. Law: the argmax is
        that of `logits`, or of `swapped(logits, g)` in margin mode, strictly wherever the latter's
        is strict; rows with ties at the top keep their logits.
    """
    broken = ~(torch.isfinite(logits).all(dim=1) & torch.isfinite(g).all(dim=1))
    skip = broken[:, None]
    base = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(skip, 0.0)
    g = g.to(base.dtype).masked_fill(skip, 0.0)
    if how.margin is not None:
        base = swapped(base, g, how.margin)
    served = bent(base, g, how, torch.finfo(logits.dtype).eps)
    served = _with_the_top_of(base.to(logits.dtype), served.to(logits.dtype))
    return torch.where(skip, logits, served), broken


def swapped(logits: Tensor, g: Tensor, margin: Margin) -> Tensor:
    """Margin mode's clean answer: `logits` (B, K) with the top two exchanged where g says so."""
    top = torch.topk(logits, 2, dim=1)
    p = torch.exp(top.values - torch.logsumexp(logits, dim=1, keepdim=True))
    gap = p[:, 0] - p[:, 1]
    push = g.gather(1, top.indices)
    overturned = (gap + margin.strength * (push[:, 0] - push[:, 1]) < 0) & (gap < margin.limit)
    values = torch.where(overturned[:, None], top.values.flip(1), top.values)
    return logits.scatter(1, top.indices, values)


def bent(logits: Tensor, g: Tensor, how: Bend, resolution: float) -> Tensor:
    """log(p + a (q - p)) + logsumexp(logits), q = softmax(log p + eps g), (B, K) float32.

    a in [0, 1] is the largest that keeps the top class ahead by a few units of `resolution`, the
    relative step of the dtype that will be served. Law: eps = 0 changes nothing.
    """
    if how.eps == 0.0:
        return logits
    if how.top_k is None or how.top_k >= logits.shape[1]:
        return logits + _log_ratio(logits, how.eps * g, resolution)
    # Among the top k alone: their total mass, and every other class, stay as they are.
    top = torch.topk(logits, how.top_k, dim=1)
    moved = _log_ratio(top.values, how.eps * g.gather(1, top.indices), resolution)
    return logits.scatter(1, top.indices, top.values + moved)


def _log_ratio(logits: Tensor, shift: Tensor, resolution: float) -> Tensor:
    """Log of (served / clean probability), from ratios to the top class that never underflow."""
    log_q_over_p = shift - torch.logsumexp(torch.log_softmax(logits, dim=1) + shift, 1, True)
    top = logits.argmax(dim=1, keepdim=True)
    peak = logits.gather(1, top)
    units = _SLACK * resolution + _ROUNDING * torch.finfo(logits.dtype).eps
    slack = torch.exp(units * peak.abs().clamp(min=1.0))
    clean = torch.exp(logits - peak)
    ahead_clean = 1.0 - slack * clean
    ahead_full = torch.exp(log_q_over_p.gather(1, top)) - slack * clean * torch.exp(log_q_over_p)
    # ahead(a) is linear: it falls to 0 at a = clean / (clean - full) if full is negative.
    # (Where the clean lead is within the slack already there is no such a, nor a gradient of it.)
    caught = (ahead_full < 0) & (ahead_clean > 0)
    room = torch.where(caught, ahead_clean - ahead_full, 1.0)
    a = torch.where(caught, ahead_clean / room, 1.0).clamp(0.0, 1.0)
    a = torch.where(ahead_clean > 0, a, 0.0).scatter(1, top, 1.0)
    return torch.log1p(a.amin(dim=1, keepdim=True) * torch.expm1(log_q_over_p))


def _with_the_top_of(clean: Tensor, served: Tensor) -> Tensor:
    """`served`, but `clean` in rows where rounding cost the top class its lead."""
    top = clean.argmax(dim=1, keepdim=True)
    others = served.scatter(1, top, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(served.gather(1, top) > others, served, clean)
