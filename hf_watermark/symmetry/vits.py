"""Plain vision transformers: ViT, DeiT, DINOv2, BEiT and those who name their tensors like them.

Before every layer that reads it the residual stream passes a LayerNorm. Once the gains are folded
into the layers behind, any rotation of the stream that keeps the direction (1, ..., 1) keeps the
function, and the hidden units of an MLP may stand in any order. GELU lets no scale and no sign
through. A LayerNorm right behind the embeddings (CLIP) would fix the stream: such models have
another layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_watermark.symmetry.layouts import Axis, Layer, Layout, Shape

__all__ = ["vit_layout"]

# First MLP layer, second, the LayerNorm before them, the layer scale behind: first that is there.
_BLOCKS = (
    ("intermediate.dense", "output.dense", ("layernorm_after",), ("lambda_2",)),
    ("mlp.fc1", "mlp.fc2", ("norm2", "layernorm_after", "layer_norm2"), (
        "layer_scale2.lambda1", "ls2.gamma", "gamma_2", "lambda_2",
    )),
)  # fmt: skip
_STEMS = ("patch_embeddings.projection", "patch_embeddings", "patch_embed.proj", "patch_embedding")
_POSITIONS = ("position_embeddings", "pos_embed", "position_embedding.weight")
_TOKENS = ("cls_token",)
_BLOCK = re.compile(r"(?P<prefix>.*?)(?:encoder\.)?(?:layers?|blocks)\.(?P<number>\d{1,6})\.")
_AFTER_EMBEDDINGS = ("embeddings.norm", "embeddings.layernorm", "pre_layrnorm", "norm_pre")


def vit_layout(shapes: Mapping[str, Shape]) -> Layout | None:
    """The layout of a plain vision transformer; None if it is none."""
    layers: dict[str, Layer] = {}
    axes: dict[str, Axis] = {}
    prefix: str | None = None
    for name in shapes:
        for fc1, fc2, norms, scales in _BLOCKS:
            found = _BLOCK.match(name)
            if found is None or name != f"{found[0]}{fc1}.weight":
                continue
            if f"{found[0]}{fc2}.weight" not in shapes:
                continue
            if prefix not in (None, found["prefix"]):
                return None  # two towers
            prefix, block, number = found["prefix"], found[0], int(found["number"])
            hidden = f"hidden.{number}"
            norm = _first(shapes, [f"{block}{norm}.weight" for norm in norms])
            scale = _first(shapes, [f"{block}{scale}" for scale in scales])
            layers[f"{hidden}.in"] = Layer(name, hidden, "stream", column_gain=norm)
            layers[f"{hidden}.out"] = Layer(
                f"{block}{fc2}.weight", "stream", hidden, row_gain=scale
            )
            axes[hidden] = Axis((f"{hidden}.out", f"{hidden}.in"))  # one of them is the carrier
    if prefix is None or any(f"{prefix}{norm}.weight" in shapes for norm in _AFTER_EMBEDDINGS):
        return None
    places = (f"{prefix}embeddings.", prefix)
    stem = _first(shapes, [f"{p}{stem}.weight" for p in places for stem in _STEMS])
    if not stem:
        return None
    layers["stem"] = Layer(stem, "stream")
    positions = _first(shapes, [f"{p}{name}" for p in places for name in _POSITIONS])
    if positions:
        layers["positions"] = Layer(
            positions,
            columns="stream",
            first=_first(shapes, [f"{p}{token}" for p in places for token in _TOKENS]),
            others=_first(shapes, [f"{stem.removesuffix('weight')}bias"]),
        )
    axes["stream"] = Axis(("stem", "positions"), turns=True)
    return Layout("plain vision transformer", layers, axes)


def _first(shapes: Mapping[str, Shape], names: list[str]) -> str:
    return next((name for name in names if name in shapes), "")
