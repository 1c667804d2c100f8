"""What moves the weights of a ResNet and keeps its function."""

from __future__ import annotations

import re

import torch

from hf_watermark.stress.attacks import NotApplicableError, Tensors
from hf_watermark.stress.tensors import as_before, generator

__all__ = ["channels_permuted", "channels_scaled", "norms_folded"]


def _convolutions(tensors: Tensors) -> dict[str, tuple[str, str]]:
    """Each convolution's output and input axis, by its name without `convolution.weight`."""
    prefix = next((n for n in tensors if n.endswith("embedder.embedder.convolution.weight")), None)
    if prefix is None:
        raise NotApplicableError("no convolutions of a ResNet with batch normalisation")
    stem = prefix[: -len("convolution.weight")]
    found, stream = {stem: ("stem", "")}, "stem"
    blocks: dict[str, list[str]] = {}
    for name in sorted(tensors):
        if match := re.fullmatch(
            r"(.*stages\.\d+\.layers\.\d+\.)layer\.\d\.convolution.weight", name
        ):
            blocks.setdefault(match[1], []).append(name[: -len("convolution.weight")])
    for block, layers in blocks.items():
        into = stream
        if f"{block}shortcut.convolution.weight" in tensors:
            stream = block
            found[f"{block}shortcut."] = (stream, into)
        axes = [into, *(f"{block}{k}" for k in range(1, len(layers))), stream]
        for k, layer in enumerate(layers):
            found[layer] = (axes[k + 1], axes[k])
    return found


def _norm(tensors: Tensors, layer: str) -> dict[str, torch.Tensor]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {part: tensors[f"{layer}normalization.{part}"] for part in parts}


def channels_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """Every axis of a ResNet in another order."""
    found = _convolutions(tensors)
    orders: dict[str, torch.Tensor] = {}
    for layer, (rows, _) in found.items():
        width = len(tensors[f"{layer}convolution.weight"])
        orders.setdefault(rows, torch.randperm(width, generator=generator(seed + len(orders))))
    changed = dict(tensors)
    for layer, (rows, columns) in found.items():
        w = tensors[f"{layer}convolution.weight"][orders[rows]]
        changed[f"{layer}convolution.weight"] = w[:, orders[columns]] if columns else w
        for part, value in _norm(tensors, layer).items():
            changed[f"{layer}normalization.{part}"] = value[orders[rows]]
    last = list(found.values())[-1][0]
    changed["classifier.1.weight"] = tensors["classifier.1.weight"][:, orders[last]]
    return as_before(changed, tensors)


def channels_scaled(tensors: Tensors, seed: int = 0) -> Tensors:
    """Signs and sizes of all rows, which batch normalisation ignores; sizes that ReLU lets pass."""
    found = _convolutions(tensors)
    changed = dict(tensors)
    passed: dict[str, torch.Tensor] = {}
    inner = {axis for _, axis in found.values() if axis and axis[-1].isdecimal()}
    for number, (layer, (rows, columns)) in enumerate(found.items()):
        random = generator(seed + number)
        w, norm = changed[f"{layer}convolution.weight"], _norm(tensors, layer)
        factor = torch.exp(torch.randn(len(w), generator=random) * 0.5)
        factor *= torch.where(torch.rand(len(w), generator=random) < 0.5, -1.0, 1.0)
        w = w * factor.reshape(-1, 1, 1, 1)
        norm["running_mean"] = norm["running_mean"] * factor
        norm["running_var"] = (norm["running_var"] + 1e-5) * factor**2 - 1e-5
        norm["weight"] = norm["weight"] * factor.sign()
        if rows in inner:
            passed[rows] = torch.exp(torch.randn(len(w), generator=random) * 0.5)
            norm["weight"], norm["bias"] = (norm[p] * passed[rows] for p in ("weight", "bias"))
        if columns in passed:
            # The normalisation behind sees the same: its inputs are as before.
            w = w / passed[columns].reshape(1, -1, 1, 1)
        changed[f"{layer}convolution.weight"] = w
        changed |= {f"{layer}normalization.{part}": value for part, value in norm.items()}
    return as_before(changed, tensors)


def norms_folded(tensors: Tensors) -> Tensors:
    """Batch normalisations folded into the convolutions; what is left of them adds a bias."""
    changed = dict(tensors)
    for layer in _convolutions(tensors):
        norm = _norm(tensors, layer)
        factor = norm["weight"] / torch.sqrt(norm["running_var"] + 1e-5)
        w = tensors[f"{layer}convolution.weight"]
        changed[f"{layer}convolution.weight"] = w * factor.reshape(-1, 1, 1, 1)
        changed[f"{layer}normalization.weight"] = torch.ones_like(factor)
        changed[f"{layer}normalization.bias"] = norm["bias"] - norm["running_mean"] * factor
        changed[f"{layer}normalization.running_mean"] = torch.zeros_like(factor)
        changed[f"{layer}normalization.running_var"] = torch.ones_like(factor) - 1e-5
    return as_before(changed, tensors)
