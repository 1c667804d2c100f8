"""A suspect's layers brought into the reference's order, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_watermark.symmetry.layouts import Layer, Layout, Shape
from hf_watermark.symmetry.matching import Doubles, Indices, equalised, match, rotation

__all__ = ["Alignment", "Side"]

_ROOM = 2**25  # weights in one tensor, 256 MiB in float64; ViT-G's largest holds 13.6 million
_REFINEMENTS = 2


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        layout: How its layers hang together.
        shapes: Every tensor's name and shape.
        read: The tensor of a name, (rows, columns) or (n,), any floating type.
    """

    layout: Layout
    shapes: Mapping[str, Shape]
    read: Callable[[str], npt.NDArray[np.floating]]

    def matrix(self, key: str) -> Doubles | None:
        """A layer with its gains folded in, (rows, channels, taps); None if it does not fit."""
        layer = self.layout.layers[key]
        w = self._whole(layer.weight)
        if w is None:
            return None
        if layer.first or layer.others:
            w = self._with_shifts(w, layer)
        gains = self.gains(key)
        if w is None or gains is None or not _fit(gains, w):
            return None
        if layer.centred:
            w = w - w.mean(axis=0, keepdims=True)  # the LayerNorm behind does, before its gain
        w = w * gains[0].reshape(-1, 1, 1) * gains[1].reshape(1, -1, 1)
        if layer.column_gain:
            w = w - w.mean(axis=1, keepdims=True)  # the normalisation before it takes the mean out
        if w.shape[1] % layer.groups:
            return None
        w = _by_channels(w, layer.groups)
        for place, axis in enumerate((layer.rows, layer.columns)):
            if axis and self.layout.axes[axis].turns:
                w = w - w.mean(axis=place, keepdims=True)  # no rotation moves the mean
        return w

    def gains(self, key: str) -> tuple[Doubles, Doubles] | None:
        """What multiplies a layer's rows and columns, (n,) each; (1,) of one where nothing does."""
        layer = self.layout.layers[key]
        found = []
        for name in (layer.row_gain, layer.column_gain):
            gain = self._whole(name) if name else np.ones((1, 1, 1))
            if gain is None:
                return None
            found.append(gain.reshape(-1))
        return found[0], found[1]

    def _whole(self, name: str) -> Doubles | None:
        shape = [side for i, side in enumerate(self.shapes[name]) if i or side > 1]
        if not shape or 0 in shape or np.prod(shape, dtype=object) > _ROOM:
            return None
        shape += [1] * (2 - len(shape))
        return np.asarray(self.read(name), np.float64).reshape(shape[0], shape[1], -1)

    def _with_shifts(self, w: Doubles, layer: Layer) -> Doubles | None:
        w = w.copy()
        for name, rows in ((layer.first, slice(0, 1)), (layer.others, slice(1, None))):
            shift = self._whole(name) if name else None
            if shift is not None:
                if shift.size != w[0].size:
                    return None
                w[rows] += shift.reshape(w[0].shape)
        return w


class Alignment:
    """Undoes what keeps the function of a suspect but moves its weights.

    Which channel is which is decided by tensors of the reference that are no carriers: its carriers
    are never read. So under the null hypothesis, where the key is independent of the suspect and
    of those tensors, it is independent of the aligned carrier too, and the statistics, which are
    exact for any weights that do not depend on the key, keep their distribution. What is taken
    from the suspect, carriers and all, does not matter to that. The reference must not have been
    trained with the mark that is read: then its other tensors know of it (see `references`).

    Args:
        reference: The owner's own checkpoint.
        suspect: Of the same family.
        carriers: The names of the carriers in the reference, none of which decides anything.
    """

    def __init__(self, reference: Side, suspect: Side, carriers: Collection[str]) -> None:
        self._reference = reference
        self._suspect = suspect
        self._carriers = frozenset(carriers)
        self._found: dict[str, Indices | Doubles | None] = {}
        self._read: tuple[dict[str, Doubles | None], dict[str, Doubles | None]] = ({}, {})

    def carrier(self, name: str) -> npt.NDArray[np.float32] | None:
        """The suspect's layer in place of a carrier, aligned.

        Positive scales of rows and channels are balanced out rather than restored.

        Args:
            name: The carrier's name in the reference.

        Returns:
            (rows, columns) as in the reference, zeros where nothing was matched; None if the
            suspect cannot be aligned.
        """
        key = self._reference.layout.key(name)
        if key is None or key not in self._suspect.layout.layers:
            return None
        try:
            return self._aligned(name, key)
        finally:
            self._forget()

    def name(self, name: str) -> str | None:
        """What a carrier is called in the suspect; None if the suspect has no such layer."""
        key = self._reference.layout.key(name)
        layer = None if key is None else self._suspect.layout.layers.get(key)
        return None if layer is None else layer.weight

    def _aligned(self, name: str, key: str) -> npt.NDArray[np.float32] | None:
        layer = self._reference.layout.layers[key]
        maps = {axis: self._map(axis) for axis in (layer.rows, layer.columns) if axis}
        if any(found is None for found in maps.values()):
            return None
        maps |= self._refined(layer, maps)
        gains = self._reference.gains(key)
        w = self._suspect.matrix(key)
        if w is None or gains is None:
            return None
        for place, axis in enumerate((layer.rows, layer.columns)):
            moved = self._moved(w, place, axis, maps.get(axis))
            if moved is None:
                return None
            w = moved
        shape = self._reference.shapes[name]
        if not _fit(gains, w):
            return None
        w = equalised(w * _sign(gains[0]).reshape(-1, 1, 1) * _sign(gains[1]).reshape(1, -1, 1))
        if len(w) != shape[0] or w.size != np.prod(shape, dtype=object):
            return None
        return w.reshape(len(w), -1).astype(np.float32)

    def _forget(self) -> None:
        """Let go of what was read, but for what fixes a stream: every carrier needs that."""
        axes = self._reference.layout.axes.values()
        kept = {key for axis in axes if axis.turns for key in axis.layers}
        for cache in self._read:
            for key in set(cache) - kept:
                del cache[key]

    def _map(self, axis: str) -> Indices | Doubles | None:
        """How an axis of the suspect lies in the reference: indices, or a rotation."""
        if axis not in self._found:
            self._found[axis] = None  # an axis that leads back to itself stays open
            self._found[axis] = self._solve(axis, {})
        return self._found[axis]

    def _solve(
        self, axis: str, known: Mapping[str, Indices | Doubles | None]
    ) -> Indices | Doubles | None:
        pairs = [
            pair
            for key in self._reference.layout.evidence(axis, self._carriers)
            if (pair := self._pair(key, axis, known)) is not None
        ]
        if not pairs:
            return None
        turns = self._reference.layout.axes[axis].turns
        return (rotation if turns else match)(*_stacked(pairs))

    def _pair(
        self, key: str, axis: str, known: Mapping[str, Indices | Doubles | None]
    ) -> tuple[Doubles, Doubles] | None:
        """A layer of both, the axis first: (n, d) and (m, d); None if it tells nothing."""
        layer = self._reference.layout.layers[key]
        place = 0 if layer.rows == axis else 1
        other = layer.columns if place == 0 else layer.rows
        found = known[other] if other in known else self._map(other) if other else None
        if key not in self._suspect.layout.layers or (other and found is None):
            return None
        ours, theirs = self._matrix(self._reference, key), self._matrix(self._suspect, key)
        if ours is None or theirs is None:
            return None
        moved = self._moved(theirs, 1 - place, other, found)
        if moved is None:
            return None
        axes = self._reference.layout.axes
        if not axes[axis].turns and not (other and axes[other].turns):
            ours, moved = equalised(ours), equalised(moved)
        ours, moved = np.moveaxis(ours, place, 0), np.moveaxis(moved, place, 0)
        if ours.shape[1:] != moved.shape[1:] or (axes[axis].turns and len(ours) != len(moved)):
            return None
        return ours.reshape(len(ours), -1), moved.reshape(len(moved), -1)

    def _matrix(self, side: Side, key: str) -> Doubles | None:
        """A layer, read once while a carrier is aligned."""
        cache = self._read[side is self._suspect]
        if key not in cache:
            cache[key] = side.matrix(key)
        return cache[key]

    def _moved(
        self, w: Doubles, place: int, axis: str, found: Indices | Doubles | None
    ) -> Doubles | None:
        """A layer of the suspect with one axis in the reference's order."""
        if not axis:
            return w
        if found is None:
            return None
        if found.ndim == 2:
            if w.shape[place] != len(found):
                return None
            return np.moveaxis(np.tensordot(found.T, w, (1, place)), 0, place)
        if found.max(initial=-1) >= w.shape[place]:
            return None
        taken = np.take(w, np.maximum(found, 0), axis=place)
        return taken * (found >= 0).reshape([-1 if i == place else 1 for i in range(3)])

    def _refined(
        self, layer: Layer, maps: Mapping[str, Indices | Doubles | None]
    ) -> dict[str, Indices | Doubles | None]:
        """A rotation found again from the units that it matched, and the units by that, in turns.

        The embeddings fix some directions of a stream badly; a layer's matched units fix them all.
        """
        axes = self._reference.layout.axes
        turning = [axis for axis in maps if axes[axis].turns]
        others = [axis for axis in maps if not axes[axis].turns]
        refined = dict(maps)
        if len(turning) != 1 or len(others) != 1:
            return refined
        stream, hidden = turning[0], others[0]
        keys = (
            *self._reference.layout.evidence(stream, self._carriers),
            *self._reference.layout.evidence(hidden, self._carriers),
        )
        for _ in range(_REFINEMENTS):
            pairs = [p for k in keys if (p := self._pair(k, stream, refined)) is not None]
            turned = rotation(*_stacked(pairs))
            if turned is None:
                break
            refined[stream] = turned
            refined[hidden] = self._solve(hidden, refined)
        return refined


def _sign(gain: Doubles) -> Doubles:
    return np.where(gain < 0.0, -1.0, 1.0)


def _fit(gains: tuple[Doubles, Doubles], w: Doubles) -> bool:
    """Whether there is one gain for all, or one for each of a layer's rows and columns."""
    return gains[0].size in (1, w.shape[0]) and gains[1].size in (1, w.shape[1])


def _by_channels(w: Doubles, groups: int) -> Doubles:
    """A layer whose columns are groups of the same channels, the groups among its taps."""
    apart = w.reshape(len(w), groups, w.shape[1] // groups, w.shape[2])
    return np.moveaxis(apart, 1, 3).reshape(len(w), w.shape[1] // groups, -1)


def _stacked(pairs: list[tuple[Doubles, Doubles]]) -> tuple[Doubles, Doubles]:
    """Layers side by side, each of them counting as much as the others."""
    ours = np.concatenate([one / (np.linalg.norm(one) or 1.0) for one, _ in pairs], axis=1)
    theirs = np.concatenate([other / (np.linalg.norm(other) or 1.0) for _, other in pairs], axis=1)
    return ours, theirs
