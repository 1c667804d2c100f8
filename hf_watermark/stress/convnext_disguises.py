"""What moves the weights of a ConvNeXt and keeps its function."""

from __future__ import annotations

import re

import torch

from hf_watermark.stress.attacks import NotApplicableError, Tensors
from hf_watermark.stress.tensors import as_before, generator

__all__ = ["streams_permuted"]


def streams_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The channels of every stage of a ConvNeXt in another order."""
    changed = dict(tensors)
    if not any(name.endswith("dwconv.weight") for name in tensors):
        raise NotApplicableError("no stages of a ConvNeXt")
    stages = sorted({int(m[1]) for name in tensors if (m := re.search(r"stages\.(\d+)\.", name))})
    prefix = next(n for n in tensors if n.endswith("dwconv.weight")).split("encoder.")[0]
    orders = {}
    for stage in stages:
        here = f"{prefix}encoder.stages.{stage}."
        width = len(tensors[f"{here}layers.0.dwconv.weight"])
        orders[stage] = order = torch.randperm(width, generator=generator(seed + stage))
        for name, tensor in tensors.items():
            if not name.startswith(here):
                continue
            if "pwconv1" in name:
                changed[name] = tensor[:, order] if name.endswith("weight") else tensor
            elif "downsampling_layer.0" in name:
                changed[name] = tensor[orders[stage - 1]]
            elif name.endswith("downsampling_layer.1.weight"):
                changed[name] = tensor[order][:, orders[stage - 1]]
            else:
                changed[name] = tensor[order]
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}embeddings."):
            changed[name] = tensor[orders[0]]
        elif name.startswith(f"{prefix}layernorm."):
            changed[name] = tensor[orders[stages[-1]]]
    changed["classifier.weight"] = tensors["classifier.weight"][:, orders[stages[-1]]]
    return as_before(changed, tensors)
