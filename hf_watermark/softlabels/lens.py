"""What all customers share: the tap on the model and the calibrated features, as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_watermark.errors import NotCalibratedError, SoftLabelError
from hf_watermark.softlabels.features import FeatureMap
from hf_watermark.softlabels.perturbation import psi_of
from hf_watermark.softlabels.taps import Tap

__all__ = ["Lens", "image_values"]

_ARRAYS = ("own", "context", "image", "offset")


def image_values(pixel_values: Tensor) -> Tensor:
    """The image at 4x4, averaged with its mirror image: (B, C, H, W) -> (B, 8 C) float32."""
    small = nn.functional.adaptive_avg_pool2d(pixel_values.float(), 4)
    return ((small + small.flip(3)) / 2)[:, :, :, :2].flatten(1)


class Lens(nn.Module):
    """Penultimate features, logits and pixels in, psi out.

    The arrays are buffers that no `state_dict` holds, and stay float32 when the model is cast.
    """

    own: Tensor
    context: Tensor
    image: Tensor
    offset: Tensor
    untouched: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.map: FeatureMap | None = None
        self.tap: Tap | None = None
        for name in _ARRAYS:
            self.register_buffer(name, torch.zeros(0), persistent=False)
        # A tensor: counting on a Python integer would break a compiled graph at every batch.
        self.register_buffer("untouched", torch.zeros((), dtype=torch.int64), persistent=False)

    def fit(self, feature_map: FeatureMap, device: torch.device) -> None:
        """Take up a calibration."""
        self.map = feature_map
        self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lens:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.map is not None:
            device = self.untouched.device
            for name in _ARRAYS:
                array = np.ascontiguousarray(getattr(self.map, name))
                self.register_buffer(name, torch.from_numpy(array).to(device), persistent=False)
        return self

    def require(self) -> tuple[FeatureMap, Tap]:
        """The calibration.

        Raises:
            NotCalibratedError: If there is none.
        """
        if self.map is None or self.tap is None:
            raise NotCalibratedError(
                "The watermark is not calibrated",
                do="call served.calibrate(pixel_values), or SoftLabelWatermark.load(...)",
            )
        return self.map, self.tap

    def psi(self, own: Tensor, logits: Tensor, pixel_values: Any) -> Tensor:
        """The features of a batch, (B, nb) float32.

        Args:
            own: (B, d).
            logits: (B, K).
            pixel_values: (B, C, H, W); looked at for `M` alone.

        Raises:
            SoftLabelError: If these are not the shapes of the calibration.
        """
        feature_map, _ = self.require()
        if logits.shape[1] != feature_map.classes or own.shape[1] != feature_map.width:
            raise SoftLabelError(
                "The watermark was calibrated for another model",
                expected=f"{feature_map.classes} classes, {feature_map.width} features",
                got=f"{logits.shape[1]} classes, {own.shape[1]} features",
                do="calibrate it for this one",
            )
        image = None
        if feature_map.kind == "M":
            if not isinstance(pixel_values, Tensor):
                raise SoftLabelError(
                    "Features of kind M need the image",
                    expected="pixel_values=",
                    do="pass it, or calibrate with features='H'",
                )
            image = image_values(pixel_values)
        weights = (self.own, self.context, self.image, self.offset)
        return psi_of(own, logits, image, weights)
