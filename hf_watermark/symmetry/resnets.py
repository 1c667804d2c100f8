"""ResNets, of basic and of bottleneck layers, as transformers, timm and torchvision name them.

The channels of the stream (one axis a stage) and those between the convolutions of a block may
stand in any order. Behind a batch normalisation and before a ReLU they may be scaled by positive
numbers; the sign of a convolution's rows means nothing before the normalisation's gain is folded
in, and their size is taken out before anything is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hf_watermark.symmetry.layouts import NUMBER, Axis, Layer, Layout, Shape

__all__ = ["resnet_layouts"]

_CONVOLUTION = re.compile(
    rf"(?P<prefix>.*?)encoder\.stages\.(?P<stage>{NUMBER})\.layers\.(?P<block>{NUMBER})\."
    r"layer\.(?P<place>[0-9])\.convolution\.weight"
    rf"|(?P<tprefix>(?:.*\.)?)layer(?P<tstage>{NUMBER})\.(?P<tblock>{NUMBER})\."
    r"conv(?P<tplace>[0-9])\.weight"
)
Place = tuple[int, int, int]


def resnet_layouts(shapes: Mapping[str, Shape]) -> Iterator[Layout]:
    """The layouts of the ResNets that names may stand for."""
    models: dict[tuple[bool, str], dict[Place, str]] = {}
    for name in shapes:
        matched = _CONVOLUTION.fullmatch(name)
        if matched is None:
            continue
        ours = matched["stage"] is not None
        if ours:
            place = (int(matched["stage"]), int(matched["block"]), int(matched["place"]))
        else:
            place = (
                int(matched["tstage"]) - 1, int(matched["tblock"]), int(matched["tplace"]) - 1
            )  # fmt: skip
        prefix = matched["prefix"] if ours else matched["tprefix"]
        models.setdefault((ours, prefix), {})[place] = name
    for (ours, prefix), found in models.items():
        layout = _layout(shapes, ours, prefix, found)
        if layout is not None:
            yield layout


def _layout(
    shapes: Mapping[str, Shape], ours: bool, prefix: str, found: Mapping[Place, str]
) -> Layout | None:
    stem = f"{prefix}embedder.embedder.convolution.weight" if ours else f"{prefix}conv1.weight"
    if stem not in shapes:
        return None
    layers = {"stem": _layer(shapes, stem, "stem", "")}
    axes = {"stem": Axis(("stem",))}
    stream = "stem"
    for stage, block in sorted({place[:2] for place in found}):
        into = stream
        depth = next(k for k in range(11) if (stage, block, k) not in found)
        if depth < 2:
            continue
        first = found[stage, block, 0]
        shortcut = (
            first.replace("layer.0.convolution", "shortcut.convolution")
            if ours
            else first.replace("conv1.weight", "downsample.0.weight")
        )
        here = f"{stage}.{block}"
        if shortcut in shapes:
            stream = f"stream.{here}"
            layers[f"{here}.shortcut"] = _layer(shapes, shortcut, stream, into)
            axes[stream] = Axis((f"{here}.shortcut",))
        between = ["", *(f"hidden.{here}.{k}" for k in range(1, depth)), ""]
        between[0], between[-1] = into, stream
        for k in range(depth):
            name = found[stage, block, k]
            layers[f"{here}.{k}"] = _layer(shapes, name, between[k + 1], between[k])
        axes[between[1]] = Axis((f"{here}.0",) if depth > 2 else (f"{here}.0", f"{here}.1"))
        if depth > 2:
            axes[between[-2]] = Axis((f"{here}.{depth - 1}",))
    return Layout("ResNet", layers, axes)


def _layer(shapes: Mapping[str, Shape], name: str, rows: str, columns: str) -> Layer:
    """A convolution with the batch normalisation behind it, unless that was folded in."""
    if name.endswith("convolution.weight"):
        norm = name.replace("convolution.weight", "normalization")
    elif name.endswith("downsample.0.weight"):
        norm = name.replace("downsample.0.weight", "downsample.1")
    else:
        norm = re.sub(r"conv(\d)\.weight$", r"bn\1", name)
    gain = f"{norm}.weight"
    return Layer(name, rows, columns, row_gain=gain if gain in shapes else "")
