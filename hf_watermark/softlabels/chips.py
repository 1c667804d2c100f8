"""What the key says about soft labels: the rotation of the features, every customer's signs.

A chip is one pair of a feature and a class. The rotation comes from the owner's key and is shared
by all customers; each customer has signs of their own, so the same features tell them apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hf_watermark.key import OwnerKey
from hf_watermark.projections import Doubles, standard_normal

__all__ = ["chip_signs", "rotation"]


def chip_signs(key: OwnerKey, features: int, classes: int) -> npt.NDArray[np.int8]:
    """The signs S of one customer's chips, (features, classes) of -1 and +1.

    Args:
        key: The owner's, or `key.for_recipient(customer)`.
        features: How many features there are, nb.
        classes: How many classes, K.
    """
    size = features * classes
    raw = np.frombuffer(key.stream("softlabels/1/signs", -(-size // 8)), np.uint8)
    return 2 * np.unpackbits(raw)[:size].astype(np.int8).reshape(features, classes) - 1


def rotation(key: OwnerKey, size: int) -> Doubles:
    """A uniformly random orthogonal matrix, (size, size) float64.

    The Q of the QR decomposition of Gaussians, with the signs that make R's diagonal positive:
    Mezzadri 2007, "How to generate random matrices from the classical compact groups", section 5.
    """
    raw = np.frombuffer(key.stream(f"softlabels/1/rotation/{size}", 4 * size * size), "<u4")
    gaussians = standard_normal(raw.astype(np.uint32)).astype(np.float64).reshape(size, size)
    q, r = np.linalg.qr(gaussians)
    oriented: Doubles = q * np.where(np.diag(r) < 0.0, -1.0, 1.0)
    return oriented
