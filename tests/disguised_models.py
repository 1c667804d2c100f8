"""Small models of transformers, marked without training, and how each may be disguised."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from marked_models import KEY
from safetensors.torch import load_file, save_file

from hf_watermark.carriers import Carrier, choose_carriers
from hf_watermark.direct import embed_checkpoint
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.projections import Projection
from hf_watermark.scheme import Scheme
from hf_watermark.stress.convnext_disguises import streams_permuted
from hf_watermark.stress.resnet_disguises import channels_permuted, channels_scaled, norms_folded
from hf_watermark.stress.swin_disguises import stem_permuted, stem_shifted, streams_turned
from hf_watermark.stress.vit_disguises import (
    dummies_added,
    gains_moved,
    hidden_permuted,
    rows_shifted,
    shifted,
    turned,
)
from hf_watermark.symmetry import Alignment, Side, layout_of

Tensors = dict[str, torch.Tensor]

_PLAIN = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 10,
}


def _plain(name: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")
    size = {"mlp_ratio": 2} if name == "Dinov2" else {"intermediate_size": 128}
    model = getattr(transformers, f"{name}ForImageClassification")
    return model(config(**_PLAIN, **size))


def _resnet(kind: str, widths: list[int], depths: list[int]) -> transformers.PreTrainedModel:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=widths, depths=depths, layer_type=kind, num_labels=10
        )
    )


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "ViT": lambda: _plain("ViT"),
    "DeiT": lambda: _plain("DeiT"),
    "Dinov2": lambda: _plain("Dinov2"),
    "Beit": lambda: _plain("Beit"),
    "basic": lambda: _resnet("basic", [16, 32, 64], [2, 2, 2]),
    "bottleneck": lambda: _resnet("bottleneck", [64, 128], [2, 2]),
    "ConvNext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=[32, 64], depths=[2, 2], num_stages=2, num_labels=10
        )
    ),
    "Swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1, 2],
            num_heads=[2, 2, 4],
            window_size=4,
            num_labels=10,
        )
    ),
}


def _all_of_a_vit(tensors: Tensors) -> Tensors:
    return turned(dummies_added(hidden_permuted(rows_shifted(gains_moved(tensors)))))


def _all_of_a_resnet(tensors: Tensors) -> Tensors:
    return channels_scaled(norms_folded(channels_scaled(channels_permuted(tensors))), 7)


_VIT = {
    "hidden units permuted": hidden_permuted,
    "dummy neurons": dummies_added,
    "gains moved": gains_moved,
    "rows shifted": rows_shifted,
    "stream turned": turned,
    "all": _all_of_a_vit,
}
DISGUISES: dict[str, dict[str, Callable[[Tensors], Tensors]]] = {
    "ViT": _VIT | {"constants shifted": shifted},
    "DeiT": _VIT | {"constants shifted": shifted},
    "Dinov2": _VIT | {"constants shifted": shifted},
    "Beit": _VIT,
    "basic": {
        "channels permuted": channels_permuted,
        "channels scaled": channels_scaled,
        "norms folded": norms_folded,
        "all": _all_of_a_resnet,
    },
}
DISGUISES["ConvNext"] = {
    "hidden units permuted": hidden_permuted,
    "gains moved": gains_moved,
    "rows shifted": rows_shifted,
    "streams permuted": streams_permuted,
    "all": lambda tensors: streams_permuted(hidden_permuted(rows_shifted(gains_moved(tensors)))),
}
DISGUISES["Swin"] = {
    "hidden units permuted": hidden_permuted,
    "dummy neurons": dummies_added,
    "gains moved": gains_moved,
    "rows shifted": rows_shifted,
    "constants shifted": stem_shifted,
    "streams moved": lambda tensors: streams_turned(stem_permuted(tensors)),
    "all": lambda tensors: streams_turned(
        stem_permuted(
            stem_shifted(dummies_added(hidden_permuted(rows_shifted(gains_moved(tensors)))))
        )
    ),
}
DISGUISES["bottleneck"] = DISGUISES["basic"]
HARMLESS = ("constants shifted", "norms folded")
"""Disguises that the raw reading bears."""


@dataclass(frozen=True)
class Model:
    """A saved model.

    Attributes:
        folder: Where it lies, with its claim if it is marked.
        tensors: Its tensors as saved.
        config: Its config.json.
    """

    folder: Path
    tensors: Tensors
    config: dict[str, Any]

    def logits(self, tensors: Tensors) -> torch.Tensor:
        """What the architecture computes with other tensors, (4, 10)."""
        folder = Path(tempfile.mkdtemp())
        save(folder, tensors, self.config)
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            return model(pixel_values=pixels).logits


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """Save tensors as transformers does; the config follows their shapes."""
    folder.mkdir(exist_ok=True, parents=True)
    first = next((t for n, t in tensors.items() if n.endswith(_FIRST)), None)
    if first is not None and "mlp_ratio" in config:
        config = config | {"mlp_ratio": len(first) // first.shape[1]}
    elif first is not None and "intermediate_size" in config:
        config = config | {"intermediate_size": len(first)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_FIRST = ("0.intermediate.dense.weight", "layer.0.mlp.fc1.weight")


@cache
def model(family: str, seed: int = 0) -> Model:
    """A model with random weights whose gains, biases and statistics are not those of a new one."""
    torch.manual_seed(seed)
    made = MODELS[family]()
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if (
                parameter.ndim == 1
                and ("norm" in name or "lambda" in name or "layer_scale" in name)
                and "bias" not in name
            ):
                parameter.copy_(1.0 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "position" in name or "token" in name:
                parameter.copy_(0.2 * noise)
        for _ in range(5):  # batch statistics
            made.train()(torch.randn(16, 3, 32, 32, generator=random) * 2.0 + 0.3)
    folder = Path(tempfile.mkdtemp())
    made.save_pretrained(folder)
    return _loaded(folder)


@cache
def marked(family: str) -> Model:
    """The first model, marked in closed form, with its claim."""
    folder = Path(tempfile.mkdtemp()) / "marked"
    embed_checkpoint(model(family).folder, KEY, folder)
    return _loaded(folder)


def _loaded(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    return Model(folder, load_file(folder / "model.safetensors"), config)


# Reading, in memory -------------------------------------------------------------------------------


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def side(tensors: Tensors, hidden: tuple[str, ...] = ()) -> Side:
    """One side of an alignment; tensors that are hidden cannot be read."""
    shapes = shapes_of(tensors)
    layout = layout_of(shapes)
    assert layout is not None
    visible = {name: t.numpy() for name, t in tensors.items() if name not in hidden}
    return Side(layout, shapes, visible.__getitem__)


def aligned(reference: Tensors, suspect: Tensors) -> dict[str, np.ndarray]:
    """The suspect's aligned carriers by the reference's names; the reference's stay closed."""
    names = tuple(carrier.name for carrier in carriers_of(reference))
    alignment = Alignment(side(reference, hidden=names), side(suspect), names)
    found = {name: alignment.carrier(name) for name in names}
    assert all(w is not None for w in found.values())
    return found


def carriers_of(tensors: Tensors) -> tuple[Carrier, ...]:
    return choose_carriers(shapes_of(tensors))


def reading(
    reference: Tensors, arrays: dict[str, np.ndarray], key=KEY, scheme: Scheme | None = None
) -> Reading:
    """What a key reads out of arrays in place of the reference's carriers."""
    carriers = carriers_of(reference)
    extraction = Extraction(Projection(key, scheme or Scheme(), carriers))
    for i, carrier in enumerate(carriers):
        extraction.add(i, 0, arrays[carrier.name].reshape(carrier.rows, carrier.columns))
    return extraction.reading()
