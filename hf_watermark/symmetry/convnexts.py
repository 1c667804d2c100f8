"""ConvNeXt and ConvNeXt V2, as transformers and timm name them.

Depthwise convolutions keep every channel of a stage's stream to itself, so channels may stand in
another order and no more: each block's depthwise filters tell which is which. The hidden units of a
block may stand in any order. LayerNorm lets gains move into the layer behind it, and ignores a
constant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hf_watermark.symmetry.layouts import NUMBER, Axis, Layer, Layout, Shape

__all__ = ["convnext_layouts"]

# A block's parts: depthwise, LayerNorm, first layer, second, layer scale; then the downsampling's
# LayerNorm and convolution.
_TRANSFORMERS = (
    re.compile(rf"(?P<prefix>.*?)encoder\.stages\.({NUMBER})\.layers\.({NUMBER})\.dwconv\.weight"),
    ("dwconv.weight", "layernorm.weight", "pwconv1.weight", "pwconv2.weight"),
    "layer_scale_parameter",
    (
        "encoder.stages.{}.downsampling_layer.0.weight",
        "encoder.stages.{}.downsampling_layer.1.weight",
    ),
)
_TIMM = (
    re.compile(rf"(?P<prefix>.*?)stages\.({NUMBER})\.blocks\.({NUMBER})\.conv_dw\.weight"),
    ("conv_dw.weight", "norm.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
    "gamma",
    ("stages.{}.downsample.0.weight", "stages.{}.downsample.1.weight"),
)


def convnext_layouts(shapes: Mapping[str, Shape]) -> Iterator[Layout]:
    """The layouts of the ConvNeXts that names may stand for."""
    for pattern, parts, scale, (norm, convolution) in (_TRANSFORMERS, _TIMM):
        models: dict[str, list[re.Match[str]]] = {}
        for name in shapes:
            if (match := pattern.fullmatch(name)) is not None:
                models.setdefault(match["prefix"], []).append(match)
        for prefix, found in models.items():
            yield _layout(shapes, prefix, found, parts, scale, norm, convolution)


def _layout(
    shapes: Mapping[str, Shape],
    prefix: str,
    found: list[re.Match[str]],
    parts: tuple[str, ...],
    scale: str,
    norm: str,
    convolution: str,
) -> Layout:
    layers: dict[str, Layer] = {}
    axes: dict[str, Axis] = {}
    fixing: dict[int, list[str]] = {}
    for match in sorted(found, key=lambda match: (int(match[2]), int(match[3]))):
        stage, here = int(match[2]), f"{int(match[2])}.{int(match[3])}"
        block = match[0].removesuffix(parts[0])
        if not all(f"{block}{part}" in shapes for part in parts):
            continue
        stream, hidden = f"stream.{stage}", f"hidden.{here}"
        depthwise, gain, first, second = (f"{block}{part}" for part in parts)
        layers[f"{here}.depthwise"] = Layer(depthwise, stream)
        layers[f"{here}.in"] = Layer(first, hidden, stream, column_gain=gain)
        behind = f"{block}{scale}" if f"{block}{scale}" in shapes else ""
        layers[f"{here}.out"] = Layer(second, stream, hidden, row_gain=behind)
        axes[hidden] = Axis((f"{here}.out", f"{here}.in"))  # one of them is the carrier
        fixing.setdefault(stage, []).append(f"{here}.depthwise")
    for stage, keys in fixing.items():
        down = f"{prefix}{convolution.format(stage)}"
        if down in shapes and stage - 1 in fixing:
            gain = f"{prefix}{norm.format(stage)}"
            layers[f"{stage}.down"] = Layer(
                down,
                f"stream.{stage}",
                f"stream.{stage - 1}",
                column_gain=gain if gain in shapes else "",
            )
        axes[f"stream.{stage}"] = Axis(tuple(keys))
    return Layout("ConvNeXt", layers, axes)
