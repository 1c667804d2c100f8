"""From arrays to bits: responses, the soft statistic, matches.

A reader rarely needs whole carriers. `Extraction` takes any row blocks of any carriers, in any
order, and gives a `Reading` of what it has seen so far: given the weights and the row signs, every
response is a weighted sum of the key's independent Gaussians, so its variance is known exactly
whatever part of the rows was read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import CarrierError
from hf_watermark.projections import Doubles, Projection
from hf_watermark.significance import log10_binomial_tail, log10_normal_tail

__all__ = ["Extraction", "Reading", "Rows"]

_FAR_FROM_OVERFLOW = 1e76  # the square of what a sum of float32 may reach


@dataclass(frozen=True)
class Reading:
    """What was read, before any correction for the number of tries.

    Attributes:
        soft: S = sum_t s_t z_t / sqrt(sum_t v_t), N(0, 1) for weights that never saw the key.
        matched: How many of the T bits have the sign of the message.
        bits: T.
        decides: `soft` or `bits`.
    """

    soft: float
    matched: int
    bits: int
    decides: str

    @property
    def log10_p(self) -> float:
        """log10 of the deciding statistic's tail, for this one reading."""
        if self.decides == "bits":
            return log10_binomial_tail(self.matched, self.bits)
        return log10_normal_tail(self.soft)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a carrier, checked once for however many keys read them.

    Attributes:
        weights: (rows, columns) float32; float64 where sums could leave float32's range.
        squares: The sum of their squares.
    """

    weights: npt.NDArray[np.floating]
    squares: float

    @classmethod
    def of(cls, block: npt.NDArray[np.floating], columns: int) -> Rows:
        """Check and prepare a block.

        Args:
            block: (rows, columns), or the carrier's own further axes.
            columns: Of the carrier.

        Raises:
            CarrierError: If a weight is not finite: NaN would decode as anything.
        """
        w = np.asarray(block, np.float32).reshape(len(block), columns)
        squares = float(np.einsum("ij,ij->", w, w, dtype=np.float64))
        if not math.isfinite(squares):
            raise CarrierError(
                "A carrier holds weights that are not finite",
                expected="finite numbers",
                got="NaN or Inf",
                do="ask for an intact checkpoint: such a model computes nothing either",
            )
        # A sum of weights near the end of float32's range would leave it: inf - inf decodes as NaN.
        precise = np.float32 if squares * len(w) < _FAR_FROM_OVERFLOW else np.float64
        return cls(w.astype(precise, copy=False), squares)


class Extraction:
    """Responses accumulated over row blocks of carriers.

    Args:
        projection: What the key reads.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._y: dict[int, Doubles] = {}
        self._squares: dict[int, float] = {}
        self._rows: dict[int, int] = {}
        self._signs: dict[int, npt.NDArray[np.int8]] = {}

    def add(self, carrier: int, start: int, block: npt.NDArray[np.floating] | Rows) -> None:
        """Take rows `start` to `start + rows` of a carrier, each row once.

        Args:
            carrier: Its position.
            start: The first row.
            block: See `Rows.of`, or what that made.

        Raises:
            CarrierError: If a weight is not finite: NaN would decode as anything.
        """
        columns = self._projection.columns[carrier]
        rows = block if isinstance(block, Rows) else Rows.of(block, columns)
        w = rows.weights
        if carrier not in self._signs:
            self._signs[carrier] = self._projection.row_signs(carrier)
        u = self._signs[carrier][start : start + len(w)].astype(w.dtype)
        y = (u.T @ w).astype(np.float64)
        self._y[carrier] = self._y[carrier] + y if carrier in self._y else y
        self._squares[carrier] = self._squares.get(carrier, 0.0) + rows.squares
        self._rows[carrier] = self._rows.get(carrier, 0) + len(w)

    def reading(self, carrier: int | None = None) -> Reading:
        """The reading of everything taken so far, or of one carrier alone.

        For `spread`, z_t = sum_i X_i[t] . y_it and v_t = sum_i (out_i / N) ||y_it||^2 with
        y_it = u_it^T W_i / (rms(W_i) sqrt(rows read)); for `mean`, z = X w and v = taps mean(w^2).
        """
        z, v = self._responses(sorted(self._y) if carrier is None else [carrier])
        signs = self._projection.message_signs
        total = float(v.sum())
        return Reading(
            soft=float(signs @ z) / math.sqrt(total) if total > 0.0 else 0.0,
            matched=int(np.count_nonzero(signs * z > 0.0)),
            bits=self._projection.scheme.bits,
            decides=str(self._projection.scheme.decides),
        )

    def agreement(self) -> tuple[float, float]:
        """The sum over bits of s_t z_t, and its variance, of everything taken so far.

        Both add up over parts that share no carrier: S = sum / sqrt(sum of variances).
        """
        z, v = self._responses(sorted(self._y))
        return float(self._projection.message_signs @ z), float(v.sum())

    def _responses(self, carriers: list[int]) -> tuple[Doubles, Doubles]:
        spread = self._projection.scheme.statistic == "spread"
        return self._spread(carriers) if spread else self._mean(carriers)

    def _spread(self, carriers: list[int]) -> tuple[Doubles, Doubles]:
        projection = self._projection
        z, v = np.zeros(projection.scheme.bits), np.zeros(projection.scheme.bits)
        for i in carriers:
            if self._squares[i] == 0.0:
                continue  # nothing but zeros: it says nothing
            rows, columns = self._rows[i], projection.columns[i]
            rms = math.sqrt(self._squares[i] / (rows * columns))
            y = self._y[i] / (rms * math.sqrt(rows))
            z += np.einsum("ij,ij->i", projection.x(i).astype(np.float64), y)
            v += np.einsum("ij,ij->i", y, y) * (projection.rows[i] / projection.weights)
        return z, v

    def _mean(self, carriers: list[int]) -> tuple[Doubles, Doubles]:
        projection = self._projection
        w = [self._y[i][0] / self._rows[i] for i in carriers]
        z = np.zeros(projection.scheme.bits)
        for i, part in zip(carriers, w, strict=True):
            z += projection.x(i).astype(np.float64) @ part
        read = np.concatenate(w) if w else np.zeros(1)
        # Gaussian rows reach over the columns that were read, which may be one carrier's alone.
        taps = read.size if projection.scheme.key_matrix == "random" else projection.taps
        return z, np.full(projection.scheme.bits, taps * float(np.mean(read * read)))
