"""The closed form over a checkpoint on disk: measured, solved, written into a copy.

Carriers are read by row blocks and nothing of a block is kept, so memory is bounded by what the key
has for one carrier, not by the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from hf_watermark.carriers import Carrier
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import CarrierError
from hf_watermark.key import OwnerKey
from hf_watermark.margins import TOLERANCE, Grams, growth, lift, responses_after
from hf_watermark.projections import Doubles, Floats, Projection
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.scheme import Scheme
from hf_watermark.significance import log10_normal_tail

__all__ = ["ClosedForm", "Mark", "Progress", "rounded"]

Progress = Callable[[int, int], None]

_PIECE = 2**18  # weights at a time: what is made of them stays in the cache
_ROUNDS = 5  # of asking for more where rounding swallowed a part: bfloat16 takes 0 or 1
_LEAST_SHARE = 0.25  # below it a change is swallowed nearly whole, and what is left says little
_SMALL, _LARGE = 1e-20, 1e30  # where a sum of squares in float32 loses nothing at its ends


@dataclass(frozen=True)
class Response:
    """What one carrier says.

    Attributes:
        z: Its responses alone, (T,), in natural sigmas of all carriers together.
        variance: Their variance given the weights and the row signs, (T,).
        rms: Root mean square of its weights.
    """

    z: Doubles
    variance: Doubles
    rms: float


class Mark:
    """What one or several keys want of the same carriers, as one message of all their bits.

    Args:
        keys: The owner's, and a recipient's.
        scheme: Of all of them.
        carriers: In the order of the keys' streams.
    """

    def __init__(
        self, keys: Sequence[OwnerKey], scheme: Scheme, carriers: Sequence[Carrier]
    ) -> None:
        self._keys, self._scheme = keys, scheme
        self.carriers = carriers
        self.weights = np.array([float(carrier.weights) for carrier in carriers])
        projections = self._projections()
        self.signs = np.concatenate([p.message_signs for p in projections])
        self.margin = projections[0].margin

    @property
    def own(self) -> slice:
        """The bits of the first key."""
        return slice(0, self._scheme.bits)

    def directions(self, carrier: int) -> Directions:
        """The directions of one carrier, made from the keys and not kept: a model has many."""
        projections = self._projections()
        u = np.concatenate([p.row_signs(carrier) for p in projections], axis=1)
        x = np.concatenate([p.x(carrier) for p in projections], axis=0)
        return Directions(u.astype(np.float32), x, self.weights.sum())

    def _projections(self) -> list[Projection]:
        return [Projection(key, self._scheme, self.carriers) for key in self._keys]


@dataclass(frozen=True)
class Directions:
    """The T directions of one carrier, u_t x_t^T rms(W) / sqrt(out).

    Attributes:
        u: Row signs, (out, T) float32.
        x: Projection rows, (T, M) float32.
        total: N, the weights of all carriers.
    """

    u: Floats
    x: Floats
    total: float

    def gram(self) -> Doubles:
        """Their inner products, (T, T) float64, in units of rms(W)^2."""
        inner: Doubles = ((self.x @ self.x.T) * (self.u.T @ self.u)).astype(np.float64)
        inner /= len(self.u)
        return inner

    def scaled(self, v: Doubles, rms: float) -> Floats:
        """U' of the change U' X that the coefficients v make of a carrier of this rms."""
        return self.u * (v * (rms / math.sqrt(len(self.u)))).astype(np.float32)


class Sums:
    """y = u^T W and the sum of squares of one carrier, gathered over row blocks."""

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self._y = np.zeros(directions.x.shape, np.float32)
        self._squares = 0.0
        self._size = len(directions.u) * directions.x.shape[1]

    def add(self, start: int, w: Floats) -> None:
        """Take the rows from `start` on, (rows, M) float32, each row once."""
        with np.errstate(over="ignore", invalid="ignore"):  # `response` tells
            self._y += self._directions.u[start : start + len(w)].T @ w
            self._squares += square_sum(w)

    def response(self) -> Response | None:
        """What the rows taken so far say; None if they are all zero, or beyond float32's range."""
        rms, rows = math.sqrt(self._squares / self._size), len(self._directions.u)
        if rms == 0.0 or not np.isfinite(self._y).all():
            return None
        y = self._y.astype(np.float64) / (rms * math.sqrt(rows))
        return Response(
            z=np.einsum("ij,ij->i", self._directions.x.astype(np.float64), y),
            variance=np.einsum("ij,ij->i", y, y) * (rows / self._directions.total),
            rms=rms,
        )


def rounded(w: Floats, dtype: str) -> tuple[npt.NDArray[np.generic], Floats]:
    """Weights as a safetensors dtype stores them, little-endian, and what a reader gets of that.

    Args:
        w: float32, of any shape.
        dtype: F32, F16 or BF16.
    """
    if dtype == "F32":
        return w.astype("<f4", copy=False), w
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = w.astype("<f2")
        return half, half.astype(np.float32)
    # bfloat16 is the upper half of float32: round to nearest, ties to even.
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    upper &= np.uint32(1)
    upper += np.uint32(0x7FFF)
    upper += bits
    upper &= np.uint32(0xFFFF0000)
    return (upper >> np.uint32(16)).astype("<u2"), upper.view(np.float32)


def square_sum(w: Floats) -> float:
    """The sum of squares of contiguous weights, 0 only if all are zero."""
    total = float(np.vdot(w, w))  # ten times as fast as in float64
    if _SMALL < total < _LARGE:
        return total
    return float(np.einsum("ij,ij->", w, w, dtype=np.float64))


class ClosedForm:
    """One embedding: `measure`, `solve`, `write` every file that is copied, then `settle`.

    Args:
        checkpoint: The source.
        mark: What is wanted.
        progress: Called with weights done and weights to do, each time with more.

    Attributes:
        planned: Weights to do.
        v: Coefficients of the change, (T,); zero if the mark is there already.
        changes: ||dW|| / ||W|| of every carrier, as written.
    """

    def __init__(
        self, checkpoint: Checkpoint, mark: Mark, progress: Progress | None = None
    ) -> None:
        self._checkpoint, self._mark, self._progress = checkpoint, mark, progress
        self._done = 0
        self.planned = 2 * sum(carrier.weights for carrier in mark.carriers)
        self._grams = Grams(
            len(mark.carriers), len(mark.signs), lambda i: mark.directions(i).gram()
        )
        self._before: list[Response] = []
        self._after: list[Response] = []
        self._wanted = np.full(len(mark.signs), mark.margin)
        # A little more than is demanded, so that a machine that rounds otherwise finds it there.
        self._asked = self._wanted * (1.0 + TOLERANCE)
        self.v: Doubles = np.zeros(len(mark.signs))
        self.changes = [0.0] * len(mark.carriers)
        self._scales: Doubles = np.ones(len(mark.carriers))
        self._predicted: Doubles = np.zeros(len(mark.signs))

    def count(self, done: int) -> None:
        """Tell how many weights are done."""
        done = min(done, self.planned)
        if self._progress is not None and done > self._done:
            self._progress(done, self.planned)
        self._done = max(done, self._done)

    @property
    def reached(self) -> Doubles:
        """s_t z_t as it stands, (T,)."""
        total: Doubles = self._mark.signs * np.sum([r.z for r in self._after], axis=0)
        return total

    def log10_p(self) -> float:
        """log10 p of the first key's soft statistic."""
        own = self._mark.own
        v = float(np.sum([r.variance for r in self._after], axis=0)[own].sum())
        return log10_normal_tail(float(self.reached[own].sum()) / math.sqrt(v))

    def measure(self) -> None:
        """Read all carriers once."""
        for i, carrier in enumerate(self._mark.carriers):
            directions = self._mark.directions(i)
            sums = Sums(directions)
            for start, w in self._pieces(carrier):
                sums.add(start, w)
                self.count(self._done + w.size)
            self._before.append(_response(sums, carrier))
            self._grams.keep(i, directions.gram)
        self._after = list(self._before)

    def solve(self) -> None:
        """Find the least change, zero if the mark is there.

        Raises:
            CarrierError: If no change can reach the margin.
        """
        if self._is_reached():
            return
        predicted = self._lift()
        if float((self._asked - predicted).max()) > 2.0 * TOLERANCE * self._mark.margin:
            self._refuse(predicted, "use fewer bits or less strength")

    def write(self, file: str, target: Path) -> None:
        """Write the changed carriers of one file into its copy.

        Args:
            file: Its path in the source.
            target: The folder of the copy.
        """
        for i, carrier in enumerate(self._mark.carriers):
            if self.v.any() and self._checkpoint.tensors[carrier.name].file == file:
                self._after[i], self.changes[i] = self._rewrite(i, target)

    def settle(self, target: Path) -> None:
        """Once all files are written: ask for more where rounding swallowed a part.

        Rounding to 8 bits of mantissa does that to slight changes; what is left of a change tells
        how much more is needed.

        Raises:
            CarrierError: If rounding keeps the margin out of reach.
        """
        start = self._mark.signs * self._z.sum(axis=0)
        for _ in range(_ROUNDS):
            if self._is_reached():
                return
            raised = self._predicted - start
            share = float((self.reached - start) @ raised) / float(raised @ raised)
            lacking = np.maximum(self._wanted - self.reached, 0.0)
            self._asked = self._asked + lacking / min(max(share, _LEAST_SHARE), 1.0)
            self._lift()
            for file in self._checkpoint.weight_files:
                self.write(file, target)
        if self._is_reached():
            return
        self._refuse(
            self.reached,
            "use fewer bits or more strength, or mark the checkpoint in F32 before casting it",
        )

    def _lift(self) -> Doubles:
        """Solve for what is asked; s_t z_t as it should be then, (T,)."""
        z, mark = self._z, self._mark
        self.v = lift(z, self._grams, mark.weights, mark.signs, self._asked)
        self._scales = 1.0 / growth(self.v, z, self._grams, mark.weights)
        self._predicted = mark.signs * responses_after(self.v, z, self._grams, mark.weights)
        return self._predicted

    @property
    def _z(self) -> Doubles:
        """The responses of every carrier alone before any change, (n, T)."""
        return np.stack([response.z for response in self._before])

    def _is_reached(self) -> bool:
        lacking = float((self._wanted - self.reached).max())
        return lacking <= TOLERANCE * self._mark.margin

    def _refuse(self, got: Doubles, do: str) -> NoReturn:
        raise CarrierError(
            "The carriers cannot hold the margin",
            expected=f"every bit at {self._mark.margin:.2f} sigmas",
            got=f"{float(got.min()):.2f} at the weakest",
            do=do,
        )

    def _pieces(self, carrier: Carrier) -> Iterator[tuple[int, Floats]]:
        step = max(1, _PIECE // carrier.columns)
        for start in range(0, carrier.rows, step):
            stop = min(start + step, carrier.rows)
            yield start, self._checkpoint.read_rows(carrier.name, start, stop)

    def _rewrite(self, i: int, target: Path) -> tuple[Response, float]:
        """Write one carrier into the copy; what a reader finds there, and how far it moved."""
        carrier, rms = self._mark.carriers[i], self._before[i].rms
        span = self._checkpoint.tensors[carrier.name]
        directions = self._mark.directions(i)
        u = directions.scaled(self.v, rms)
        sums = Sums(directions)
        moved = 0.0
        # Weights next to infinity may overflow here: they are refused at the end.
        overflowing = np.errstate(over="ignore", invalid="ignore")
        with overflowing, open(target / span.file, "r+b") as file:
            for start, w in self._pieces(carrier):
                changed = u[start : start + len(w)] @ directions.x
                changed += w
                changed *= np.float32(self._scales[i])
                stored, changed = rounded(changed, span.dtype)
                file.seek(span.start + start * span.row_bytes)
                file.write(stored.data)
                sums.add(start, changed)
                w -= changed
                moved += square_sum(w)
                self.count(self._done + w.size)
        return _response(sums, carrier), math.sqrt(moved / carrier.weights) / rms


def _response(sums: Sums, carrier: Carrier) -> Response:
    response = sums.response()
    if response is None:
        raise CarrierError(
            f"The carrier {quoted(carrier.name, 120)} cannot be marked",
            expected="weights well within the range of their dtype",
            got="nothing but zeros, or numbers next to infinity",
            do="name other carriers",
        )
    return response
