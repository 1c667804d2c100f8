"""The secret features of an image that decide how its soft labels are bent.

psi = tanh(1.2 u) / .7, where u is a keyed rotation of whitened principal components of what the
model knows about an image beyond its own answer: the features are residualised on
[1, logits, probabilities] first, so that nothing in the outputs alone betrays them.

`H` takes the model's own penultimate features, which cost nothing at serving time. `M` replaces
three eighths of them by the image itself, 4x4 RGB and symmetrised under horizontal flips: a
student of another architecture finds those easier to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Doubles, Floats
from hf_watermark.softlabels.chips import rotation

__all__ = ["GAIN", "IMAGE_VALUES", "KINDS", "SLOPE", "FeatureMap", "context_of", "images_needed"]

KINDS = ("H", "M")
SLOPE, GAIN = 1.2, 1.0 / 0.7  # tanh(1.2 u) / .7 of a Gaussian u has about unit variance
IMAGE_VALUES = 24  # 4 rows x 2 columns x 3 colours: what is left of 4x4 RGB under flips
_SMALLEST_VARIANCE = 1e-5  # of the largest: whitening would turn up what bfloat16 rounds away
_ROUNDING = 1e-9  # of the mean variance: what residuals keep of a feature that the outputs tell
_IMAGES_PER_COEFFICIENT = 4


def context_of(logits: npt.NDArray[np.floating]) -> Doubles:
    """[centred logits, probabilities], (n, 2K) float64, of logits (n, K)."""
    z = logits.astype(np.float64)
    z = z - z.mean(axis=1, keepdims=True)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return np.concatenate([z, p / p.sum(axis=1, keepdims=True)], axis=1)


def images_needed(width: int, classes: int, count: int) -> int:
    """The fewest calibration images for `count` features of a model `width` wide."""
    return _IMAGES_PER_COEFFICIENT * (1 + min(2 * classes, width // 2) + min(count, width))


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """From a model's penultimate features, logits and low-resolution image to psi.

    u = own @ `own` + context @ `context` + image @ `image` + `offset`.

    Attributes:
        kind: `H` or `M`.
        own: (d, nb) float32, d the width of the model's penultimate features.
        context: (2K, nb) float32.
        image: (24, nb) float32; no rows for `H`.
        offset: (nb,) float32.
    """

    kind: str
    own: Floats = field(repr=False)
    context: Floats = field(repr=False)
    image: Floats = field(repr=False)
    offset: Floats = field(repr=False)

    @property
    def count(self) -> int:
        """How many features there are, nb."""
        return int(self.offset.shape[0])

    @property
    def width(self) -> int:
        """The width d of the penultimate features."""
        return int(self.own.shape[0])

    @property
    def classes(self) -> int:
        """How many classes, K."""
        return int(self.context.shape[0]) // 2

    @classmethod
    def fit(
        cls,
        key: OwnerKey,
        kind: str,
        count: int,
        own: npt.NDArray[np.floating],
        logits: npt.NDArray[np.floating],
        image: npt.NDArray[np.floating] | None = None,
    ) -> FeatureMap:
        """Learn the map from calibration images.

        Args:
            key: The owner's; gives the rotation.
            kind: `H` or `M`.
            count: How many features are wanted; there may be fewer when the model is narrow.
            own: (n, d) penultimate features.
            logits: (n, K).
            image: (n, 24), for `M` alone.

        Raises:
            SoftLabelError: If the features hold nothing that the outputs do not.
        """
        context = context_of(logits)
        # As many directions of the outputs as leave half of the width: with K > d (ImageNet on a
        # ViT-B) the logits span everything, and residuals on all of them would be empty.
        basis = _leading(context, logits.shape[1], limit=max(1, own.shape[1] // 2))
        blocks = [own.astype(np.float64)]
        counts = [count]
        if kind == "M":
            assert image is not None  # the wrapper makes it for M
            counts = [count - min(IMAGE_VALUES, 3 * count // 8), min(IMAGE_VALUES, 3 * count // 8)]
            blocks.append(image.astype(np.float64))
        centre = context.mean(axis=0)
        explained = (context - centre) @ basis
        maps, back, u = [], [], []
        for block, wanted in zip(blocks, counts, strict=True):
            x = block - block.mean(axis=0)
            slope = np.linalg.lstsq(explained, x, rcond=None)[0]
            floor = _ROUNDING * float(np.mean(x * x))
            whitening = _whitening(x - explained @ slope, wanted, floor)
            maps.append(whitening)
            back.append(basis @ slope @ whitening)
            u.append((x - explained @ slope) @ whitening)
        together = np.concatenate(u, axis=1)
        mix = _whitening(together, together.shape[1]) if kind == "M" else np.eye(together.shape[1])
        if mix.shape[1] == 0:
            raise SoftLabelError(
                "The model's features hold nothing that its outputs do not",
                expected=f"penultimate features wider than {2 * logits.shape[1]}",
                got=own.shape[1],
            )
        mix = mix @ rotation(key, mix.shape[1])
        rows = np.split(mix, np.cumsum([part.shape[1] for part in maps])[:-1])
        weights = [part @ turn for part, turn in zip(maps, rows, strict=True)]
        on_context = -np.sum([part @ turn for part, turn in zip(back, rows, strict=True)], axis=0)
        offset = -(centre @ on_context)
        for block, weight in zip(blocks, weights, strict=True):
            offset = offset - block.mean(axis=0) @ weight
        empty = np.zeros((0, mix.shape[1]))
        return cls(
            kind,
            weights[0].astype(np.float32),
            on_context.astype(np.float32),
            (weights[1] if kind == "M" else empty).astype(np.float32),
            offset.astype(np.float32),
        )

    def psi(
        self,
        own: npt.NDArray[np.floating],
        logits: npt.NDArray[np.floating],
        image: npt.NDArray[np.floating] | None = None,
    ) -> Doubles:
        """The features of images, (n, nb); arguments as in `fit`."""
        u = own.astype(np.float64) @ self.own + context_of(logits) @ self.context + self.offset
        if image is not None and self.kind == "M":
            u = u + image.astype(np.float64) @ self.image
        psi: Doubles = np.tanh(SLOPE * u) * GAIN
        return psi


def _leading(context: Doubles, classes: int, limit: int) -> Doubles:
    """Orthogonal directions of the outputs that vary, logits and probabilities on one scale."""
    x = context - context.mean(axis=0)
    scale = np.concatenate(
        [np.full(classes, max(float(block.std()), 1e-12)) for block in np.split(x, 2, axis=1)]
    )
    variance, vectors = np.linalg.eigh((x / scale).T @ (x / scale) / len(x))
    keep = np.argsort(-variance)[:limit]
    keep = keep[variance[keep] > _SMALLEST_VARIANCE * variance.max()]
    directions: Doubles = vectors[:, keep] / scale[:, None]
    return directions


def _whitening(x: Doubles, count: int, floor: float = 0.0) -> Doubles:
    """(d, m) with x @ result white, its m <= `count` columns by falling variance of x (n, d).

    Components of a variance below `floor` are left out.
    """
    variance, vectors = np.linalg.eigh(x.T @ x / len(x))
    keep = np.argsort(-variance)[:count]
    keep = keep[variance[keep] > max(_SMALLEST_VARIANCE * variance.max(), floor)]
    vectors = vectors[:, keep]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    white: Doubles = vectors * np.where(largest < 0.0, -1.0, 1.0) / np.sqrt(variance[keep])
    return white
