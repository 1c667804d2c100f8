"""Image classifiers of transformers, loaded from a folder or the Hub without running their code.

Safetensors only, never a pickle; the auto classes of transformers, never a repo's own modules, and
no kernels that a configuration asks to be fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_watermark.errors import NotSafetensorsError, OutputsError, SoftLabelError
from hf_watermark.folders import source_folder
from hf_watermark.projections import Doubles
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.softlabels.answer_lists import class_names
from hf_watermark.softlabels.answers import logits_of

if TYPE_CHECKING:
    from hf_watermark.softlabels.probe_images import ProbeImages

__all__ = ["Classifier", "load_model", "load_processor"]

Progress = Callable[[int, int], None]
_WANTED = ("*.json", "*.safetensors")
# Whatever a configuration asks for, the model's own attention; it may name kernels on the Hub.
_SAFE = {"trust_remote_code": False, "local_files_only": True}
_ATTENTION = "eager"


class Classifier:
    """A model with its image processor, to be asked about pictures.

    Args:
        source: A folder, or `org/name` on the Hub, of which only JSON and safetensors are fetched.
        revision: Branch, tag or commit of a repo.
        token: For private repos.
        processor: A folder with another `preprocessor_config.json`, if the model has none.

    Raises:
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
        processor: str | os.PathLike[str] | None = None,
    ) -> None:
        folder = source_folder(source, revision, token, _WANTED)
        self.name = str(source)
        self.model = load_model(folder, self.name)
        self._processor = load_processor(folder if processor is None else Path(processor))

    @property
    def classes(self) -> int:
        """K."""
        config: Any = self.model.config
        return int(config.num_labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Its classes' names in its own order; none if its `id2label` tells nothing."""
        config: Any = self.model.config
        return class_names(config.id2label, self.classes)

    def pixel_values(self, images: ProbeImages, batch_size: int = 64) -> Iterator[Tensor]:
        """Pictures as the model takes them, (B, C, H, W), batch by batch.

        Raises:
            OutputsError: If its processor cannot take them.
        """
        for pictures in images.batches(batch_size):
            try:
                yield self._processor(pictures, return_tensors="pt")["pixel_values"]
            except Exception as error:  # whatever a hostile configuration makes it do
                raise OutputsError(
                    f"The image processor of {quoted(self.name, 200)} fails",
                    got=f"{type(error).__name__}: {quoted(str(error), 160)}",
                ) from None

    def answers(
        self,
        images: ProbeImages,
        names: tuple[str, ...],
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Doubles:
        """Log-probabilities (n, K), classes in the order of `names`.

        Args:
            images: The probes.
            names: What the marked model calls its classes.
            batch_size: Images a step.
            progress: Called with images done and planned.

        Raises:
            OutputsError: If it has other classes, or fails.
        """
        order = _order(self.names, names, self.name)
        parts: list[Doubles] = []
        done = 0
        for batch in self.pixel_values(images, batch_size):
            try:
                with torch.inference_mode():
                    logits = logits_of(self.model(pixel_values=batch), labelled=False)
            except (RuntimeError, ValueError, TypeError) as error:
                raise OutputsError(
                    f"{quoted(self.name, 200)} cannot be run",
                    got=f"{type(error).__name__}: {quoted(str(error), 160)}",
                ) from None
            parts.append(logits.double().log_softmax(1).numpy()[:, order])
            done += len(batch)
            if progress is not None:
                progress(done, len(images))
        return np.concatenate(parts)


def _order(own: tuple[str, ...], names: tuple[str, ...], named: str) -> list[int]:
    """Where in the suspect's order each of the marked model's classes stands."""
    if not names:
        raise OutputsError(
            "It is not known what the classes are called",
            expected="an id2label of the marked model",
            do="say what the suspect calls them, in your model's order (--labels FILE)",
        )
    if set(own) != set(names):
        odd = sorted(set(own) ^ set(names))
        raise OutputsError(
            f"{quoted(named, 200)} has other classes",
            expected=", ".join(ascii(name)[:40] for name in names[:5]) + f" ({len(names)})",
            got=f"{len(own)}; {', '.join(ascii(name)[:40] for name in odd[:5])} only on one side",
            do="if it only has other names, say what the suspect calls yours (--labels FILE)",
        )
    return [own.index(name) for name in names]


def load_model(folder: Path, named: str) -> nn.Module:
    """An image classifier of transformers, float32, in evaluation mode, without code of its own.

    Args:
        folder: Of safetensors and a configuration.
        named: What to call it in messages.

    Raises:
        NotSafetensorsError: If there are no safetensors.
        OutputsError: If it is none, or lacks weights.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    if not any(folder.glob("*.safetensors")):
        raise NotSafetensorsError(
            f"{quoted(named, 200)} holds no safetensors",
            expected="model.safetensors",
            do="load it where you trust it, and save_pretrained it again",
        )

    try:
        config = AutoConfig.from_pretrained(folder, attn_implementation=_ATTENTION, **_SAFE)
        model, found = AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            attn_implementation=_ATTENTION,
            output_loading_info=True,
            **_SAFE,
        )
    except Exception as error:  # whatever transformers makes of a stranger's files
        raise OutputsError(
            f"{quoted(named, 200)} cannot be loaded",
            expected="an image classifier that transformers knows, without code of its own",
            got=f"{type(error).__name__}: {quoted(str(error), 200)}",
        ) from None
    if found["missing_keys"]:  # transformers would make them up at random
        missing = sorted(found["missing_keys"])
        raise OutputsError(
            f"{quoted(named, 200)} lacks weights of its classifier",
            got=f"none for {quoted(missing[0], 120)} ({len(missing)} missing)",
        )
    loaded: nn.Module = model.float().eval()
    return loaded


def load_processor(folder: Path) -> Any:
    """The image processor that a folder's `preprocessor_config.json` describes.

    Raises:
        SoftLabelError: If there is none.
    """
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    try:
        return auto.from_pretrained(folder, **_SAFE)
    except Exception as error:
        raise SoftLabelError(
            f"There is no image processor in {quoted(str(folder), 200)}",
            expected="preprocessor_config.json",
            got=type(error).__name__,
            do="name a folder that has the right one (--processor DIR)",
        ) from None
