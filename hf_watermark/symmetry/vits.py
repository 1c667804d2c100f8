"""Plain vision transformers: ViT, DeiT, DINOv2, BEiT and those who name their tensors like them.

Before every layer that reads it the residual stream passes a LayerNorm. Once the gains are folded
into the layers behind, any rotation of the stream that keeps the direction (1, ..., 1) keeps the
function, and the hidden units of an MLP may stand in any order. GELU lets no scale and no sign
through. A LayerNorm right behind the embeddings (CLIP) would fix the stream: such models have
another layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hf_watermark.symmetry.layouts import NUMBER, Axis, Layer, Layout, Shape

__all__ = ["turns_freely", "vit_layouts"]

# First MLP layer, second, the LayerNorm before them, the layer scale behind if there is one.
_BLOCKS = (
    ("intermediate.dense", "output.dense", "layernorm_after", "lambda_2"),  # ViT, DeiT, BEiT
    ("mlp.fc1", "mlp.fc2", "norm2", "layer_scale2.lambda1"),  # DINOv2
    ("mlp.fc1", "mlp.fc2", "layer_norm2", ""),  # SigLIP
    ("mlp.fc1", "mlp.fc2", "layernorm_after", ""),  # ViT's module
    ("mlp.fc1", "mlp.fc2", "norm2", "ls2.gamma"),  # timm
    ("mlp.fc1", "mlp.fc2", "norm2", "gamma_2"),  # timm's BEiT
)
_STEMS = ("patch_embeddings.projection", "patch_embeddings", "patch_embed.proj", "patch_embedding")
_POSITIONS = ("position_embeddings", "pos_embed", "position_embedding.weight")
_TOKENS = ("cls_token",)
_BLOCK = re.compile(rf"(?P<prefix>.*?)(?:encoder\.)?(?:layers?|blocks)\.(?P<number>{NUMBER})\.")
_AFTER_EMBEDDINGS = ("embeddings.norm", "embeddings.layernorm", "pre_layrnorm", "norm_pre")


def vit_layouts(shapes: Mapping[str, Shape]) -> Iterator[Layout]:
    """The layouts of the plain vision transformers that names may stand for."""
    for fc1, fc2, norm, scale in _BLOCKS:
        blocks: dict[str, list[tuple[int, str]]] = {}
        for name in shapes:
            found = _BLOCK.match(name)
            if found is not None and name == f"{found[0]}{fc1}.weight":
                parts = (f"{found[0]}{fc2}.weight", f"{found[0]}{norm}.weight")
                if all(part in shapes for part in parts):
                    blocks.setdefault(found["prefix"], []).append((int(found["number"]), found[0]))
        for prefix, numbered in blocks.items():
            layers, axes = _stem(shapes, prefix)
            if not axes:
                continue
            for number, block in numbered:
                hidden = f"hidden.{number}"
                gain, behind = f"{block}{norm}.weight", _first(shapes, [f"{block}{scale}"])
                first, second = f"{block}{fc1}.weight", f"{block}{fc2}.weight"
                layers[f"{hidden}.in"] = Layer(first, hidden, "stream", column_gain=gain)
                layers[f"{hidden}.out"] = Layer(second, "stream", hidden, row_gain=behind)
                axes[hidden] = Axis((f"{hidden}.out", f"{hidden}.in"))  # one is the carrier
            yield Layout("plain vision transformer", layers, axes)


def turns_freely(shapes: Mapping[str, Shape], layout: Layout) -> bool:
    """Whether nothing fixes the stream: no LayerNorm right behind the embeddings."""
    prefix = re.split(r"embeddings\.|patch_embed\.", layout.layers["stem"].weight)[0]
    return not any(f"{prefix}{norm}.weight" in shapes for norm in _AFTER_EMBEDDINGS)


def _stem(shapes: Mapping[str, Shape], prefix: str) -> tuple[dict[str, Layer], dict[str, Axis]]:
    """What is written into the stream first, and its axis; nothing if that is not there."""
    places = (f"{prefix}embeddings.", prefix)
    stem = _first(shapes, [f"{p}{stem}.weight" for p in places for stem in _STEMS])
    if not stem:
        return {}, {}
    layers = {"stem": Layer(stem, "stream")}
    positions = _first(shapes, [f"{p}{name}" for p in places for name in _POSITIONS])
    if positions:
        layers["positions"] = Layer(
            positions,
            columns="stream",
            first=_first(shapes, [f"{p}{token}" for p in places for token in _TOKENS]),
            others=_first(shapes, [f"{stem.removesuffix('weight')}bias"]),
        )
    return layers, {"stream": Axis(("stem", "positions"), turns=True)}


def _first(shapes: Mapping[str, Shape], names: list[str]) -> str:
    return next((name for name in names if name in shapes), "")
