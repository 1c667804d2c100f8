"""The seal: a second mark for carriers that were trained with their first, put on afterwards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

from hf_watermark.direct import seal_scheme
from hf_watermark.evidence import Seal
from hf_watermark.key import OwnerKey
from hf_watermark.parts import Part
from hf_watermark.projected_step import ProjectedStep
from hf_watermark.projections import Projection

__all__ = ["put_on"]

logger = logging.getLogger(__name__)

_ROUNDS = 3  # each mark disturbs the other by a few percent of its own change
_REACHED = 0.9  # of the margin


def put_on(
    key: OwnerKey, mark: Projection, parts: Sequence[Part], restore: Callable[[], None]
) -> Seal | None:
    """Change carriers by the least that gives them a seal beside the mark.

    Args:
        key: The mark's.
        mark: What it reads.
        parts: Of the carriers, in order.
        restore: Brings the mark back to its margins.

    Returns:
        What to claim; None, with the reason in the log, if the carriers cannot hold both.
    """
    carriers = [part.carrier for part in parts]
    free = [part.carrier for part in parts if part.parameter.requires_grad]
    scheme = seal_scheme(mark.weights)
    room = scheme.capacity(sum(c.weights for c in free), sum(c.columns for c in free))
    if scheme.bits > room - (mark.scheme.bits if mark.scheme.statistic == "spread" else 0):
        logger.warning("Not sealed: the carriers have no room for %d more bits", scheme.bits)
        return None
    seal = Seal(scheme.name, _nonce(key, parts))
    projection = Projection(key.sealed(seal.nonce), scheme, carriers)
    step = ProjectedStep(projection, carriers)
    for _ in range(_ROUNDS):
        step.apply(parts)
        restore()
    reached = projection.message_signs * step.responses(parts).detach().double().cpu().numpy()
    if float(reached.min()) >= _REACHED * projection.margin:
        return seal
    logger.warning("Not sealed: the carriers cannot hold the margin")  # or hold NaN
    return None


def _nonce(key: OwnerKey, parts: Sequence[Part]) -> str:
    """Other weights give another one, so no training ever saw its key. It reveals nothing."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.whole().float().cpu().contiguous().numpy().tobytes())
    return key.stream(f"nonce/seal/{digest.hexdigest()}", 16).hex()
