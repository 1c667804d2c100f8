"""What the owner knows about images that a suspect is asked about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_watermark.key import OwnerKey
from hf_watermark.projections import Floats
from hf_watermark.softlabels.chips import chip_signs

__all__ = ["Probes", "image_digests"]


def image_digests(images: npt.NDArray[np.floating]) -> npt.NDArray[np.uint64]:
    """64 bits of SHA-256 of every image's float32 bytes, (n,): to know images again."""
    rows = np.ascontiguousarray(images, np.float32)
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in rows]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


@dataclass(frozen=True)
class Probes:
    """The clean model's view of n images, as arrays: what a check needs of it.

    Attributes:
        key: The owner's; it never shows.
        psi: (n, nb) float32, the features.
        log_probs: (n, K) float32, the clean model's.
        seen: (n,) bool: the image was used in calibration.
        top_k: How many classes are bent; None for all.
        margin: (lambda, tau) of margin mode, or None.
    """

    key: OwnerKey
    psi: Floats
    log_probs: Floats
    seen: npt.NDArray[np.bool_]
    top_k: int | None = None
    margin: tuple[float, float] | None = None

    @property
    def features(self) -> int:
        """Nb."""
        return int(self.psi.shape[1])

    @property
    def classes(self) -> int:
        """K."""
        return int(self.log_probs.shape[1])

    def __len__(self) -> int:
        return int(self.psi.shape[0])

    def signs(self, recipient: str | None) -> npt.NDArray[np.int8]:
        """One customer's signs, (nb, K); None for the owner's own."""
        key = self.key if recipient is None else self.key.for_recipient(recipient)
        return chip_signs(key, self.features, self.classes)
