"""A suspect's outputs in whatever shape they come: log-probabilities, rounded, top-k, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import OutputsError
from hf_watermark.projections import Doubles
from hf_watermark.softlabels.answer_lists import is_named, scores_by_class

__all__ = ["Outputs"]

_FLOOR = 1e-6  # below it a probability says more about the arithmetic than about the model
_SUM = 2e-3  # what the sum of float16 probabilities may miss
_DECIMALS = 5  # an output with more is not told from full precision
_BLOCK = 64


@dataclass(frozen=True, eq=False, repr=False)
class Outputs:
    """Outputs of a suspect on n probes.

    Attributes:
        kind: What they were found to be, in words for people.
        log_probs: (n, K) float64, finite. Where a value was rounded to 0 or left out it is that of
            a floor: half a unit of the last decimal; for top-k the missing mass spread evenly, but
            no more than the smallest value shown; 1e-6 at full precision. For labels alone they
            are 0 for the label and -1 elsewhere: only the pattern matters.
        labels: (n,) the most likely classes, first of ties.
        labels_only: Whether nothing but labels was given.
    """

    kind: str
    log_probs: Doubles
    labels: npt.NDArray[np.int64]
    labels_only: bool

    @classmethod
    def read(cls, values: Any, classes: int, names: Sequence[str] = ()) -> Outputs:
        """Tell what outputs are, and bring them into one shape.

        Args:
            values: (n,) integer labels, or (n, K) probabilities or their natural logarithms; 0 or
                -inf where a top-k answer is silent. Or lists of labels and scores, see
                `answer_lists`.
            classes: K.
            names: What the suspect calls the classes, in the order of the marked model's.

        Raises:
            OutputsError: If they have NaN, another number of classes, labels that do not exist, or
                rows that are no distribution, or labels that are not among `names`.
        """
        if is_named(values):
            values = scores_by_class(values, names)
        array = np.asarray(values)
        if array.ndim == 1 and array.size and array.dtype.kind in "iu":
            return cls._of_labels(array, classes)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiub":
            raise OutputsError(
                "The outputs have the wrong shape",
                expected=f"(probes, {classes}) probabilities, or (probes,) integer labels",
                got=f"{array.shape} of {array.dtype}",
            )
        if array.shape[1] != classes:
            raise OutputsError(
                "The outputs have another number of classes",
                expected=classes,
                got=array.shape[1],
                do="bring the suspect's classes into the order of the marked model's",
            )
        p = array.astype(np.float64)
        broken = np.isnan(p).any(axis=1)
        if broken.any():
            raise OutputsError(
                "The outputs hold NaN", expected="numbers", got=f"NaN in {broken.sum()} rows"
            )
        logarithms = bool((p <= 1e-6).all() and (p < 0.0).any())
        return cls._of_probabilities(np.exp(p) if logarithms else p, logarithms)

    @classmethod
    def _of_labels(cls, labels: npt.NDArray[Any], classes: int) -> Outputs:
        if labels.min() < 0 or labels.max() >= classes:
            raise OutputsError(
                "A label does not exist",
                expected=f"0 to {classes - 1}",
                got=f"{labels.min()} to {labels.max()}",
            )
        pattern = np.where(labels[:, None] == np.arange(classes), 0.0, -1.0)
        return cls("labels only", pattern, labels.astype(np.int64), True)

    @classmethod
    def _of_probabilities(cls, p: Doubles, logarithms: bool) -> Outputs:
        classes = p.shape[1]
        if p.min() < -1e-6 or p.max() > 1.0 + _SUM:
            raise _not_distributions(p, "values outside 0 to 1")
        p = np.clip(p, 0.0, 1.0)
        total = p.sum(axis=1)
        shown = (p > 0.0).sum(axis=1)
        decimals = None if logarithms else _decimals(p)
        if (shown == 1).all() and (p.max(axis=1) == 1.0).all():
            return cls._of_labels(p.argmax(axis=1), classes)
        most = int(shown.max())
        # A rounded answer has zeros too, but not everywhere the same number of them.
        even = most < classes and float((shown == most).mean()) > 0.9
        unit = 0.0 if decimals is None else 0.5 * 10.0**-decimals
        tolerance = _SUM + unit * classes
        # Answers that leave out unlikely classes, however many, miss their mass.
        silent = (shown < classes) & (total < 1.0 - tolerance)
        top_k = even or bool(silent.any())
        wrong = (total > 1.0 + tolerance) | ((total < 1.0 - tolerance) & ~silent)
        if wrong.any() or not total.all():
            raise _not_distributions(p, f"{int(wrong.sum()) or 1} rows that do not")
        floor = np.full(len(p), max(unit, _FLOOR))
        if top_k:
            missing = np.maximum(1.0 - total, 0.0) / np.maximum(classes - shown, 1)
            smallest = np.where(p > 0.0, p, np.inf).min(axis=1)
            floor = np.maximum(np.minimum(missing, smallest), floor)
        words = ["log-probabilities" if logarithms else "probabilities"]
        if top_k:
            words.append(f"top {most} only" if even else "unlikely classes left out")
        if decimals is not None:
            words.append(f"rounded to {decimals} decimals")
        filled = np.where(p > 0.0, np.maximum(p, max(unit, _FLOOR)), floor[:, None])
        return cls(", ".join(words), np.log(filled), p.argmax(axis=1), False)


def _decimals(p: Doubles) -> int | None:
    """How many decimals the values were rounded to, None at full precision."""
    for decimals in range(1, _DECIMALS + 1):
        if all(
            np.abs(block - np.round(block, decimals)).max() < 2e-7
            for block in np.array_split(p, -(-len(p) // _BLOCK))
        ):
            return decimals
    return None


def _not_distributions(p: Doubles, got: str) -> OutputsError:
    total = p.sum(axis=1)
    worst = int(np.abs(total - 1.0).argmax())
    return OutputsError(
        "The outputs are no probabilities",
        expected="rows that sum to 1, or their logarithms",
        got=f"{got} (row {worst} sums to {total[worst]:.3g})",
        do="apply the softmax to logits first; leave 0 where a top-k answer is silent",
    )
