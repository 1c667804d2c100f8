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
from hf_watermark.symmetry.convnexts import convnext_layouts
from hf_watermark.symmetry.layouts import Layout, Shape
from hf_watermark.symmetry.resnets import resnet_layouts
from hf_watermark.symmetry.swins import swin_layouts
from hf_watermark.symmetry.vits import turns_freely, vit_layouts

__all__ = ["Alignment", "Layout", "Side", "closest", "layout_of", "layouts_of"]


def layouts_of(shapes: Mapping[str, Shape]) -> tuple[Layout, ...]:
    """All layouts that a stranger's names may stand for: he may have added decoys."""
    families = (resnet_layouts, vit_layouts, convnext_layouts, swin_layouts)
    return tuple(layout for family in families for layout in family(shapes))


def layout_of(shapes: Mapping[str, Shape]) -> Layout | None:
    """The layout of an owner's checkpoint; None if its family has none."""
    found = [
        layout
        for layout in layouts_of(shapes)
        if "stream" not in layout.axes or turns_freely(shapes, layout)
    ]
    return max(found, key=lambda layout: len(layout.layers), default=None)


def closest(layouts: tuple[Layout, ...], reference: Layout) -> Layout | None:
    """The layout that shares most layers with the reference's, then most names.

    What a library loads has the names that it expects: a decoy has others, or fewer.
    """

    def shared(layout: Layout) -> tuple[int, int]:
        keys = layout.layers.keys() & reference.layers.keys()
        same = sum(layout.layers[key] == reference.layers[key] for key in keys)
        return len(keys), same

    related = [layout for layout in layouts if layout.family == reference.family]
    return max(related, key=shared, default=None)
