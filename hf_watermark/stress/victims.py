"""The model under attack: loaded from its folder, with what turns pictures into its input."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_watermark.errors import OutputsError, WatermarkError
from hf_watermark.folders import source_folder
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.softlabels.answer_lists import class_names
from hf_watermark.softlabels.classifiers import load_model, load_processor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Victim"]

_WANTED = ("*.json", "*.safetensors")
_BILINEAR = 2  # as PIL numbers its filters
_SIDE = 224  # where neither a processor nor the configuration says


class Victim:
    """An image classifier of transformers.

    Args:
        source: A folder, or `org/name` on the Hub, of which JSON and safetensors are fetched.
        revision: Branch, tag or commit of a repo.
        token: For private repos.
        device: Where it and the images lie, as torch names it.

    Raises:
        WatermarkError: If there is no such device.
        NotSafetensorsError: If there are no safetensors.
        OutputsError: If it is no image classifier of transformers.
        HubError: If it cannot be fetched.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        device: str = "cpu",
    ) -> None:
        self.device = _usable(device)
        self.folder = source_folder(source, revision, token, _WANTED)
        self.name = str(source)
        self.model: Any = load_model(self.folder, self.name).to(self.device)
        has_own = (self.folder / "preprocessor_config.json").exists()
        self._processor = load_processor(self.folder) if has_own else None

    @property
    def classes(self) -> int:
        """K."""
        return int(self.model.config.num_labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Its classes' names in its own order; none if its `id2label` tells nothing."""
        return class_names(self.model.config.id2label, self.classes)

    @property
    def digest(self) -> str:
        """SHA-256 of its weights as loaded, and of their names."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def pixel_values(self, pictures: list[Image]) -> Tensor:
        """Pictures as the model takes them, (B, C, H, W) float32.

        By the folder's own `preprocessor_config.json`; without one, scaled to the configuration's
        `image_size`, values from -1 to 1.

        Raises:
            OutputsError: If its processor cannot take them.
        """
        if self._processor is None:
            return torch.stack([self._plainly(picture) for picture in pictures])
        try:
            values = self._processor(pictures, return_tensors="pt")["pixel_values"]
            return torch.as_tensor(values, dtype=torch.float32)
        except Exception as error:  # whatever a hostile configuration makes it do
            raise OutputsError(
                f"The image processor of {quoted(self.name, 200)} fails",
                got=f"{type(error).__name__}: {quoted(str(error), 160)}",
            ) from None

    def _plainly(self, picture: Image) -> Tensor:
        config = self.model.config
        size = getattr(config, "image_size", None) or _SIDE
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(config, "num_channels", 3)
        if channels not in (1, 3):
            raise WatermarkError(
                f"{quoted(self.name, 200)} takes no pictures",
                expected="1 or 3 channels",
                got=f"{channels}",
                do="add its preprocessor_config.json",
            )
        coloured = picture.convert("L" if channels == 1 else "RGB").resize(
            (width, height), _BILINEAR
        )
        values = np.asarray(coloured, np.float32).reshape(height, width, channels)
        return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no weights")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise WatermarkError(
            f"The device {quoted(name, 60)} cannot be used",
            expected="cpu, or an accelerator that torch sees",
            got=quoted(str(error).splitlines()[0], 160),
        ) from None
    return device
