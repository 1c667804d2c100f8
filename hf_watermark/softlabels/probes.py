"""What the owner knows about images that a suspect is asked about."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Floats
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.secret_files import garbled, read_secret, write_secret

__all__ = ["FILE_FORMAT", "Probes", "image_digests"]

FILE_FORMAT = "hf-watermark-probes/1"


def image_digests(images: npt.NDArray[np.floating]) -> npt.NDArray[np.uint64]:
    """64 bits of SHA-256 of every image's float32 bytes, (n,): to know images again."""
    rows = np.ascontiguousarray(images, np.float32)
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in rows]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


@dataclass(frozen=True, eq=False)
class Probes:
    """The clean model's view of n images, as arrays: what a check needs of it.

    Saved, it fixes probes and references before anyone looks at a suspect, and lets a machine
    without the model judge. The file is secret.

    Attributes:
        key: The owner's; it never shows.
        psi: (n, nb) float32, the features.
        log_probs: (n, K) float32, the clean model's.
        seen: (n,) bool: the image was used in calibration.
        top_k: How many classes are bent; None for all.
        margin: (lambda, tau) of margin mode, or None.
        references: (n, K) log-probabilities of clean models beside the owner's own.
        labels: The names of the K classes, from the model's `id2label`; none if it has no telling
            ones.
    """

    key: OwnerKey
    psi: Floats = field(repr=False)
    log_probs: Floats = field(repr=False)
    seen: npt.NDArray[np.bool_] = field(repr=False)
    top_k: int | None = None
    margin: tuple[float, float] | None = None
    references: tuple[Floats, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = ()

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

    def with_references(self, answers: Sequence[Any]) -> Probes:
        """The same probes with more clean models' answers, (n, K) each, in any shape of outputs.

        Raises:
            OutputsError: If they are no outputs.
            SoftLabelError: If they are about other probes.
        """
        read = [Outputs.read(one, self.classes, self.labels).log_probs for one in answers]
        for one in read:
            if len(one) != len(self):
                raise SoftLabelError(
                    "A reference was asked about other probes",
                    expected=f"{len(self)} rows",
                    got=len(one),
                )
        more = tuple(one.astype(np.float32) for one in read)
        return dataclasses.replace(self, references=self.references + more)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of mode 0600. Law: `Probes.load(path, key)` gives the same.

        Raises:
            SoftLabelError: If it cannot be written.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "psi": self.psi,
            "log_probs": self.log_probs,
            "seen": self.seen,
        }
        arrays |= {f"reference_{i}": one for i, one in enumerate(self.references)}
        margin = None if self.margin is None else list(self.margin)
        head = {"top_k": self.top_k, "margin": margin, "labels": list(self.labels)}
        write_secret(path, FILE_FORMAT, self.key, head, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: OwnerKey) -> Probes:
        """Read a file that `save` wrote.

        Raises:
            SoftLabelError: If it is missing, garbled, of a newer version, or of another key.
        """
        head, arrays = read_secret(path, FILE_FORMAT, key)
        try:
            psi, log_probs, seen = (arrays[name] for name in ("psi", "log_probs", "seen"))
            count = sum(name.startswith("reference_") for name in arrays)
            references = tuple(arrays[f"reference_{i}"] for i in range(count))
            margin, top_k = head["margin"], head["top_k"]
            labels = tuple(head["labels"])
            fits = (
                psi.ndim == log_probs.ndim == 2
                and len(psi) == len(log_probs) == len(seen)
                and all(one.shape == log_probs.shape for one in references)
                and all(np.isfinite(one).all() for one in (psi, log_probs, *references))
                and (top_k is None or isinstance(top_k, int))
                and len(labels) in (0, log_probs.shape[1])
                and all(isinstance(name, str) for name in labels)
            )
            if not fits:
                raise ValueError("arrays")
            pair = None if margin is None else (float(margin[0]), float(margin[1]))
            return cls(key, psi, log_probs, seen.astype(bool), top_k, pair, references, labels)
        except (IndexError, KeyError, TypeError, ValueError):
            raise garbled(path, FILE_FORMAT, "arrays or settings that do not fit") from None
