"""The owner's side file of a soft-label watermark: features and settings, secret like the key.

It holds no signs and no key, but who has it can erase the mark.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.softlabels.features import KINDS, FeatureMap
from hf_watermark.softlabels.secret_files import garbled, read_secret, write_secret

__all__ = ["FILE_FORMAT", "SideFile", "head_norms"]

FILE_FORMAT = "hf-watermark-softlabels/1"
_MAP = ("own", "context", "image", "offset")
_SETTINGS = ("eps", "top_k", "margin", "head", "expected_price")


def head_norms(model: nn.Module, head: str) -> npt.NDArray[np.float32]:
    """The norms of the rows of a layer's weight, (rows,); empty if it has none of its own."""
    try:
        weight = getattr(model.get_submodule(head), "weight", None)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return np.zeros(0, np.float32)
    norms: npt.NDArray[np.float32] = weight.detach().float().flatten(1).norm(dim=1).cpu().numpy()
    return norms


@dataclass(frozen=True, eq=False)
class SideFile:
    """What is stored.

    Attributes:
        map: The calibrated features.
        digests: (n,) uint64, the calibration images.
        head_norms: (K,) float32, the norms of the head's rows, to know the model again.
        settings: JSON: eps, top_k, margin, head, expected_price.
    """

    map: FeatureMap
    digests: npt.NDArray[np.uint64] = field(repr=False)
    head_norms: npt.NDArray[np.float32] = field(repr=False)
    settings: dict[str, Any]

    def save(self, path: str | os.PathLike[str], key: OwnerKey) -> None:
        """Write the file.

        Raises:
            SoftLabelError: If it cannot be written.
        """
        arrays = {name: getattr(self.map, name) for name in _MAP}
        arrays |= {"head_norms": self.head_norms, "digests": self.digests}
        write_secret(path, FILE_FORMAT, key, {"features": self.map.kind, **self.settings}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: OwnerKey) -> SideFile:
        """Read a file that `save` wrote.

        Raises:
            SoftLabelError: If it is missing, garbled, of a newer version, or of another key.
        """
        head, arrays = read_secret(path, FILE_FORMAT, key)
        try:
            settings = {name: head[name] for name in _SETTINGS}
            four = [arrays[name] for name in _MAP]
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
            raise garbled(path, FILE_FORMAT, "arrays or settings that do not fit") from None

    def check(self, model: nn.Module) -> None:
        """Look whether this is the model that was calibrated for.

        Raises:
            SoftLabelError: If its head has another shape.

        Warns:
            UserWarning: If its head has other weights.
        """
        norms = head_norms(model, self.settings["head"])
        if norms.shape != self.head_norms.shape:
            raise SoftLabelError(
                "The watermark was calibrated for another model",
                expected=f"a head of {len(self.head_norms)} rows",
                got=len(norms),
            )
        if not np.allclose(norms, self.head_norms, rtol=0.02, atol=1e-6):
            warnings.warn(
                "The model's head is not the one that the watermark was calibrated for: "
                "calibrate again, and keep the old file for what was served before",
                stacklevel=3,
            )
