"""Function-preserving disguises undone before a mark is read.

Channels can be reordered, scaled and negated, residual streams turned, idle units added, all
without a change of what a model computes; a reading of the raw weights then finds nothing. Names
and shapes give a `Layout`: which axes the layers share, and which layers tell what is where on an
axis. `Alignment` compares those layers of a suspect with the same ones of a reference, the owner's
own checkpoint, and brings the suspect's carriers into the reference's order.

No carrier of the reference takes part, so p-values stay what they are: see `Alignment`. Families
that have no layout are read raw.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_watermark.symmetry.alignment import Alignment, Side
from hf_watermark.symmetry.convnexts import convnext_layout
from hf_watermark.symmetry.layouts import Layout, Shape
from hf_watermark.symmetry.resnets import resnet_layout
from hf_watermark.symmetry.vits import vit_layout

__all__ = ["Alignment", "Layout", "Side", "layout_of"]

_FAMILIES = (resnet_layout, vit_layout, convnext_layout)


def layout_of(shapes: Mapping[str, Shape]) -> Layout | None:
    """The layout of a checkpoint from its names and shapes; None if its family has none."""
    return next((found for family in _FAMILIES if (found := family(shapes)) is not None), None)
