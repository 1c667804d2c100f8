"""Swin Transformers of the first version, as transformers and timm name them.

The stream of the first stage starts behind a LayerNorm with gains of its own, so its channels may
stand in another order and no more. The patch convolution tells which is which, once what all of
its rows share is taken out: that LayerNorm ignores it. The stream of every later stage starts with
the linear layer that merges four neighbouring patches, so it may be turned like that of a plain
vision transformer; the rows of that layer tell how. The hidden units of an MLP may stand in any
order.

Swin V2 normalises behind its layers, with gains that fix every stream. It has the same names, but
the gains of its merging are as many as the rows, not the columns: it has no layout here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hf_watermark.symmetry.layouts import NUMBER, Axis, Layer, Layout, Shape

__all__ = ["swin_layouts"]

_BLOCK = re.compile(
    rf"(?P<stages>(?P<prefix>.*?)(?:encoder\.)?layers)\."
    rf"(?P<stage>{NUMBER})\.blocks\.(?P<block>{NUMBER})\."
)
# First MLP layer, second, the LayerNorm before them.
_PARTS = (
    ("intermediate.dense", "output.dense", "layernorm_after"),  # as transformers saves them
    ("mlp.fc1", "mlp.fc2", "layernorm_after"),  # its module
    ("mlp.fc1", "mlp.fc2", "norm2"),  # timm
)
# Patch convolution, the LayerNorm behind it.
_STEMS = (
    ("embeddings.patch_embeddings.projection", "embeddings.norm"),
    ("patch_embed.proj", "patch_embed.norm"),
)
_MERGED = 4  # neighbours


def swin_layouts(shapes: Mapping[str, Shape]) -> Iterator[Layout]:
    """The layouts of the Swin Transformers that names may stand for."""
    for parts in _PARTS:
        models: dict[tuple[str, str], dict[int, list[re.Match[str]]]] = {}
        for name in shapes:
            found = _BLOCK.match(name)
            if found is None or name != f"{found[0]}{parts[0]}.weight":
                continue
            if all(f"{found[0]}{part}.weight" in shapes for part in parts):
                blocks = models.setdefault((found["prefix"], found["stages"]), {})
                blocks.setdefault(int(found["stage"]), []).append(found)
        for (prefix, stages), blocks in models.items():
            for ahead in (1, 0):  # timm's newer files name a merging after the stage behind it
                layout = _layout(shapes, prefix, stages, blocks, parts, ahead)
                if layout is not None:
                    yield layout


def _layout(
    shapes: Mapping[str, Shape],
    prefix: str,
    stages: str,
    blocks: Mapping[int, list[re.Match[str]]],
    parts: tuple[str, str, str],
    ahead: int,
) -> Layout | None:
    """The stages that hang together, each behind the one before; None if there is but one."""
    stem, norm = _stem(shapes, prefix)
    width = shapes.get(norm, ())
    layers = {"stem": Layer(stem, "stream.0", row_gain=norm, centred=True)}
    axes = {"stream.0": Axis(("stem",))}
    for stage in range(len(blocks)):
        stream = f"stream.{stage}"
        if stage > 0:
            merging = f"{stages}.{stage - ahead}.downsample"
            gain, down = f"{merging}.norm.weight", f"{merging}.reduction.weight"
            merged, shape = tuple(_MERGED * side for side in width), shapes.get(down, ())
            if not merged or (shapes.get(gain), shape[1:]) != (merged, merged):
                break
            width = shape[:1]
            layers[f"{stage}.down"] = Layer(
                down, stream, f"stream.{stage - 1}", column_gain=gain, groups=_MERGED
            )
            axes[stream] = Axis((f"{stage}.down",), turns=True)
        for block in blocks.get(stage, ()):
            hidden = f"hidden.{stage}.{block['block']}"
            first, second, gain = (f"{block[0]}{part}.weight" for part in parts)
            layers[f"{hidden}.in"] = Layer(first, hidden, stream, column_gain=gain)
            layers[f"{hidden}.out"] = Layer(second, stream, hidden)
            axes[hidden] = Axis((f"{hidden}.out", f"{hidden}.in"))  # one of them is the carrier
    return Layout("Swin Transformer", layers, axes) if "1.down" in layers else None


def _stem(shapes: Mapping[str, Shape], prefix: str) -> tuple[str, str]:
    """The patch convolution and the LayerNorm behind it, empty if they are not there."""
    for convolution, norm in _STEMS:
        weight, gain = f"{prefix}{convolution}.weight", f"{prefix}{norm}.weight"
        if weight in shapes and gain in shapes:
            return weight, gain
    return "", ""
