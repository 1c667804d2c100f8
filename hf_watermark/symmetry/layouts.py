"""How the layers of a model hang together: which axes they share, and what fixes each axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["NUMBER", "Axis", "Layer", "Layout"]

Shape = tuple[int, ...]

NUMBER = r"(?:0|[1-9][0-9]{0,5})"
"""A number as libraries write it: no decoy passes for layer 1 as `01`, or in another script."""


@dataclass(frozen=True)
class Layer:
    """A tensor as a matrix between two axes, with the gains that act on it.

    Attributes:
        weight: Its name: (rows, columns, ...) once leading ones are dropped.
        rows: The axis of its rows; empty if their order is fixed (positions).
        columns: The axis of its columns; empty if fixed (colours, pixels).
        row_gain: A normalisation's gain or a layer scale behind it; empty if there is none.
        column_gain: The gain of the LayerNorm before it, which makes the mean of its columns
            meaningless, or empty.
        first: What is added to the first row: a class token to its position.
        others: What is added to the other rows: the patches' bias to their positions.
        groups: How often its columns run through their axis, one group behind the other:
            neighbouring patches that are merged.
        centred: Whether the row gain is that of a LayerNorm, which first takes the mean of its
            rows out.
    """

    weight: str
    rows: str = ""
    columns: str = ""
    row_gain: str = ""
    column_gain: str = ""
    first: str = ""
    others: str = ""
    groups: int = 1
    centred: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that it is made of."""
        gains = (self.row_gain, self.column_gain, self.first, self.others)
        return (self.weight, *(name for name in gains if name))


@dataclass(frozen=True)
class Axis:
    """Channels that may stand in another order, or a residual stream that may be turned.

    Attributes:
        layers: The layers that tell which channel is which, by their keys.
        turns: Whether any rotation keeps the function (a stream under LayerNorm alone), rather
            than permutations and positive scales.
    """

    layers: tuple[str, ...]
    turns: bool = False


@dataclass(frozen=True)
class Layout:
    """The layers of one checkpoint by keys that all checkpoints of its family share.

    Attributes:
        family: What kind of model it is, for people.
        layers: Layers by key.
        axes: Axes by name.
    """

    family: str
    layers: Mapping[str, Layer]
    axes: Mapping[str, Axis]
    _keys: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        keys = {layer.weight: key for key, layer in self.layers.items()}
        object.__setattr__(self, "_keys", keys)

    def key(self, name: str) -> str | None:
        """The key of the layer whose weight has this name."""
        return self._keys.get(name)

    def support(self, key: str, carriers: Iterable[str]) -> tuple[str, ...] | None:
        """The tensors that align a layer, none of them a carrier.

        Args:
            key: The layer's.
            carriers: Names of the tensors that may not take part.

        Returns:
            Their names in a fixed order, the gains of the layer itself among them; None if an
            axis of the layer is fixed by carriers alone.
        """
        excluded = frozenset(carriers)
        layer = self.layers[key]
        names = [name for name in (layer.row_gain, layer.column_gain) if name]
        for axis in (layer.rows, layer.columns):
            found = self._of_axis(axis, excluded, frozenset())
            if found is None:
                return None
            names += found
        return tuple(name for name in dict.fromkeys(names) if name not in excluded)

    def evidence(self, axis: str, carriers: frozenset[str]) -> tuple[str, ...]:
        """The keys of the layers that fix an axis, carriers left out."""
        listed = self.axes[axis].layers
        return tuple(
            k for k in listed if k in self.layers and self.layers[k].weight not in carriers
        )

    def _of_axis(
        self, axis: str, carriers: frozenset[str], within: frozenset[str]
    ) -> list[str] | None:
        if not axis:
            return []
        if axis not in self.axes or axis in within:
            return None
        names: list[str] = []
        for key in self.evidence(axis, carriers):
            layer = self.layers[key]
            other = layer.columns if layer.rows == axis else layer.rows
            deeper = self._of_axis(other, carriers, within | {axis})
            if deeper is not None:
                names += [*deeper, *layer.names]
        return names or None
