"""The owner's side file of a soft-label watermark: features and settings, secret like the key.

One safetensors file whose metadata holds one JSON object. It is written with mode 0600 and belongs
to one key; it holds no signs and no key, but who has it can erase the mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.softlabels.features import KINDS, FeatureMap

__all__ = ["FILE_FORMAT", "SideFile"]

FILE_FORMAT = "hf-watermark-softlabels/1"
_METADATA = "hf_watermark"
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class SideFile:
    """What is stored.

    Attributes:
        map: The calibrated features.
        digests: (n,) uint64, the calibration images.
        head_norms: (K,) float32, the norms of the head's rows, to know the model again.
        settings: JSON: eps, top_k, margin, head, expected_price.
    """

    map: FeatureMap
    digests: npt.NDArray[np.uint64]
    head_norms: npt.NDArray[np.float32]
    settings: dict[str, Any]

    def save(self, path: str | os.PathLike[str], key: OwnerKey) -> None:
        """Write the file, atomically, readable by this user alone.

        Raises:
            SoftLabelError: If it cannot be written.
        """
        from safetensors.numpy import save

        head = {
            "format": FILE_FORMAT,
            "fingerprint": key.fingerprint,
            "features": self.map.kind,
            **self.settings,
        }
        tensors: dict[str, npt.NDArray[Any]] = {
            "own": self.map.own,
            "context": self.map.context,
            "image": self.map.image,
            "offset": self.map.offset,
            "head_norms": self.head_norms,
            "digests": self.digests,
        }
        whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        content = save(whole, {_METADATA: json.dumps(head, sort_keys=True)})
        target = Path(path)
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise SoftLabelError(
                f"The watermark cannot be written to {target}",
                got=getattr(error, "strerror", error),
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: OwnerKey) -> SideFile:
        """Read a file that `save` wrote.

        Raises:
            SoftLabelError: If it is missing, garbled, of a newer version, or of another key.
        """
        from safetensors.numpy import load

        where = Path(path)
        try:
            if where.stat().st_size > _MAX_BYTES:
                raise _garbled(where, "a file that is too large")
            content = where.read_bytes()
        except (OSError, ValueError) as error:
            raise SoftLabelError(
                f"The watermark file {where} cannot be read", got=getattr(error, "strerror", error)
            ) from None
        try:
            arrays = load(content)
            size = int.from_bytes(content[:8], "little")
            head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_METADATA])
            found, fingerprint = str(head["format"]), str(head["fingerprint"])
        except Exception:  # safetensors raises errors of its own kind
            raise _garbled(where, "something else") from None
        if found != FILE_FORMAT:
            raise SoftLabelError(
                f"The watermark file {where} is of another version",
                expected=FILE_FORMAT,
                got=repr(found)[:60],
                do="update: pip install -U hf-watermark",
            )
        if fingerprint != key.fingerprint:
            raise SoftLabelError(
                f"The watermark file {where} belongs to another key",
                expected=f"the key {fingerprint[:16]}",
                got=key.fingerprint,
                do="load that key",
            )
        try:
            names = ("eps", "top_k", "margin", "head", "expected_price")
            settings = {name: head[name] for name in names}
            four = [arrays[name] for name in ("own", "context", "image", "offset")]
            kind, nb = head["features"], len(four[3])
            fits = (
                kind in KINDS
                and all(array.dtype == np.float32 for array in four)
                and all(np.isfinite(array).all() for array in four)
                and all(array.ndim == 2 and array.shape[1] == nb for array in four[:3])
            )
            if not fits:
                raise ValueError("arrays")
            digests = arrays["digests"].astype(np.uint64)
            return cls(FeatureMap(kind, *four), digests, arrays["head_norms"], settings)
        except (KeyError, TypeError, ValueError):
            raise _garbled(where, "arrays or settings that are missing or do not fit") from None


def _garbled(path: Path, got: str) -> SoftLabelError:
    return SoftLabelError(
        f"The watermark file {path} is garbled",
        expected=f"a file of format {FILE_FORMAT}",
        got=got,
        do="restore it from a backup: without the features the mark cannot be read",
    )
