"""Small image classifiers of transformers, and images, for the tests of soft labels."""

from __future__ import annotations

import functools

import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark

KEY = OwnerKey(bytes(range(32)), "acme")


def images(n: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def vit(classes: int = 10, seed: int = 0, width: int = 48) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=classes,
    )
    return sharpened(ViTForImageClassification(config))


def resnet(classes: int = 10, seed: int = 0, width: int = 64) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, width], depths=[1] * 4, num_labels=classes
    )
    return sharpened(ResNetForImageClassification(config))


@torch.no_grad()
def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """In eval mode, with a head whose logits are centred and vary by about two."""
    model.eval()
    x = images(256, seed=99)
    *_, (_, head) = (pair for pair in model.named_modules() if isinstance(pair[1], torch.nn.Linear))
    head.weight.mul_(2.0 / model(x).logits.std(0).mean())
    head.bias.sub_(model(x).logits.mean(0))
    return model


@functools.cache
def calibrated(
    classes: int = 10,
    features: str = "H",
    margin: tuple[float, float] | None = None,
    eps: float = 1.0,
    family: str = "vit",
    count: int | None = None,
) -> SoftLabelWatermark:
    """Made once for every setting: tests must not change it."""
    model = {"vit": vit, "resnet": resnet}[family](classes)
    served = SoftLabelWatermark(model, KEY, eps, features, margin, count=count)
    return served.calibrate(images(640))
