"""A clean model's pass over many images: what it sees, what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_watermark.errors import SoftLabelError
from hf_watermark.projections import Floats
from hf_watermark.softlabels.answers import logits_of
from hf_watermark.softlabels.lens import image_values
from hf_watermark.softlabels.probes import image_digests
from hf_watermark.softlabels.taps import Tap, find_head

__all__ = ["Images", "Survey", "passes", "resting", "tap_for"]

Images = Tensor | npt.NDArray[Any] | Iterable[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Survey:
    """n images as the clean model sees them.

    Attributes:
        own: (n, d) penultimate features.
        logits: (n, K).
        images: (n, 8 C), the images at 4x4, symmetrised.
        digests: (n,) uint64.
    """

    own: Floats
    logits: Floats
    images: Floats
    digests: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, model: nn.Module, tap: Tap, pixel_values: Images, batch_size: int) -> Survey:
        """Look at images: (n, C, H, W), or batches of them, or of dicts with `pixel_values`.

        Raises:
            AttachError: If the model gives no logits.
            SoftLabelError: If there are no images, or the model gives NaN.
        """
        parts: list[tuple[npt.NDArray[Any], ...]] = []
        for own, logits, batch in passes(model, tap, pixel_values, batch_size):
            tensors = (own.float(), logits.float(), image_values(batch))
            digests = image_digests(batch.float().cpu().numpy())
            parts.append((*(tensor.cpu().numpy() for tensor in tensors), digests))
        if not parts:
            raise SoftLabelError("There are no images", expected="pixel_values (n, C, H, W)")
        seen = cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if not (np.isfinite(seen.own).all() and np.isfinite(seen.logits).all()):
            raise SoftLabelError(
                "The model gives NaN or infinite values", do="check the images and the weights"
            )
        return seen


def tap_for(model: nn.Module, pixel_values: Images, head: str | None) -> tuple[Tap, Images]:
    """A tap on a model's head, and the images again: an iterator's first batch is put back.

    Raises:
        AttachError: If the model gives no logits, or no layer gives K outputs.
        SoftLabelError: If there are no images.
    """
    batches = iter(_batches(pixel_values, 8))
    first = next(batches, None)
    if first is None or not len(first):
        raise SoftLabelError("There are no images", expected="pixel_values (n, C, H, W)")
    with resting(model), torch.no_grad():
        inputs = _inputs(model, first[:8])
        logits = logits_of(model(**inputs), labelled=False)
        name = head or find_head(model, inputs, logits)
    if isinstance(pixel_values, Iterator):
        pixel_values = _chained(first, batches)
    return Tap(model, name), pixel_values


def _chained(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def passes(
    model: nn.Module, tap: Tap, pixel_values: Images, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Penultimate features, clean logits and images, batch by batch, in eval mode."""
    with resting(model):
        for batch in _batches(pixel_values, batch_size):
            with torch.no_grad():
                inputs = _inputs(model, batch)
                tap.listen()
                logits = logits_of(model(**inputs), labelled=False)
                own = tap.heard()
            yield own, logits, batch.to(own.device)


class resting:  # noqa: N801 - a context manager
    """Eval mode for a while; every module is then as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        for module in self._training:
            module.training = True


def _inputs(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """A batch on the model's device, in its dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return {"pixel_values": batch.to(parameter.device, parameter.dtype)}
    return {"pixel_values": batch}


def _batches(pixel_values: Images, batch_size: int) -> Iterator[Tensor]:
    if isinstance(pixel_values, (Tensor, np.ndarray)):
        images = torch.as_tensor(pixel_values)
        if images.ndim != 4:
            raise SoftLabelError(
                "Images have the wrong shape", expected="(n, C, H, W)", got=tuple(images.shape)
            )
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]
        return
    for batch in pixel_values:
        yield torch.as_tensor(batch["pixel_values"] if isinstance(batch, Mapping) else batch)
