"""Names of another library, and names that say nothing: what a converted file looks like."""

from __future__ import annotations

import re

import torch

from hf_watermark.stress.attacks import NotApplicableError, Tensors

__all__ = ["named_as_in_timm", "named_at_random"]

_TIMM = (
    (r"^.*?encoder\.layer\.", "blocks."),
    (r"intermediate\.dense|mlp\.fc1", "mlp.fc1"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"(\d+)\.output\.dense|(\d+)\.mlp\.fc2", r"\1\2.mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^\w+\.layernorm", "norm"),
    (r"^\w+\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^\w+\.embeddings\.position_embeddings", "pos_embed"),
    (r"^\w+\.embeddings\.cls_token", "cls_token"),
    (r"^classifier", "head"),
)


def named_as_in_timm(tensors: Tensors) -> Tensors:
    """A plain vision transformer as timm names it, queries, keys and values in one tensor.

    Raises:
        NotApplicableError: If it is none.
    """
    if not any(name.endswith("attention.attention.query.weight") for name in tensors):
        raise NotApplicableError("no attention of a plain vision transformer")
    renamed = {}
    for name, tensor in tensors.items():
        if re.search(r"attention\.attention\.(key|value)\.", name):
            continue
        if "attention.attention.query." in name:
            parts = [tensors.get(name.replace("query", part)) for part in ("key", "value")]
            others = [torch.zeros_like(tensor) if part is None else part for part in parts]
            tensor = torch.cat([tensor, *others])
            name = name.replace("attention.attention.query", "attn.qkv")
        for pattern, new in _TIMM:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def named_at_random(tensors: Tensors) -> Tensors:
    """Names that say nothing, in an order that says nothing."""
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0)).tolist()
    return {f"p{place}": tensors[name] for place, name in zip(order, sorted(tensors), strict=True)}
