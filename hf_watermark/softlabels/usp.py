"""One perturbation for everyone, and its paired detector: are these answers the marked API's?

The unified soft-label perturbation (USP) of Chien & Shen 2022 has one key and no customers, and a
detector that judges single outputs; they report 98.68% balanced accuracy. Their construction is not
public: this one bends with the owner's own signs, as `SoftLabelWatermark` serves without a
customer, and needs no training. For every input the owner recomputes the clean answer p and the
marked answer q, and asks which of them the suspect's answer is nearer to.

It tells two kinds of numbers, which are not to be confused. A verdict on one output is right with
an *accuracy* that is measured (`paired_accuracy`), not guaranteed. The set's log10_p is a bound
that holds exactly, whatever the suspect is: under H0 the answers are independent of the key.

Both are about answers of the marked model itself, passed on as they are or rounded. A student
distilled from them has opinions of its own: `hf_watermark.verify.verify_outputs` finds students.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hf_watermark.errors import OutputsError, SchemeError
from hf_watermark.projections import Doubles
from hf_watermark.significance import log10_rademacher_tail
from hf_watermark.softlabels.detection import agreement
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.perturbation import bend
from hf_watermark.softlabels.surveys import Images

if TYPE_CHECKING:
    from hf_watermark.softlabels.wrapper import SoftLabelWatermark

__all__ = [
    "Pair",
    "PairedAccuracy",
    "PairedEvidence",
    "paired_accuracy",
    "paired_test",
    "residuals",
]

_FLOOR = 1e-12  # of a probability at full precision
_MOST_DECIMALS = 6  # more are not told from full precision
_TOLERANCE = 1e-3  # nats: what another batch size or machine may change
# An answer is called marked if it is at least twice as near to q as to p. An unrelated model's is
# about as far from both; "nearer to q" alone would be a coin's toss.
_RATIO = math.log(2.0)


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """What the owner recomputes for n inputs.

    Attributes:
        clean: (n, K) log-probabilities p.
        marked: (n, K) log-probabilities q.
        psi: (n, nb), the features.
        signs: (nb, K) int8, S.
    """

    clean: Doubles
    marked: Doubles
    psi: Doubles
    signs: npt.NDArray[np.int8]

    @classmethod
    def of(cls, served: SoftLabelWatermark, pixel_values: Images, batch_size: int = 64) -> Pair:
        """Both answers of a calibrated watermark; arguments as in its `probes`."""
        probes = served.probes(pixel_values, batch_size)
        signs = probes.signs(served.recipient)
        g = probes.psi @ signs.astype(np.float32) / np.float32(math.sqrt(probes.features))
        bent, _ = bend(torch.from_numpy(probes.log_probs), torch.from_numpy(g), served.how)
        marked: Doubles = bent.double().log_softmax(1).numpy()
        return cls(probes.log_probs.astype(np.float64), marked, probes.psi.astype(float), signs)


@dataclass(frozen=True, kw_only=True)
class PairedEvidence:
    """The outcome of one paired test.

    Attributes:
        verdict: `found` or `not found`, for the set.
        log10_p: Base-10 logarithm of an upper bound on the chance that answers which are
            independent of the key agree with its signs so well. Exact: it assumes nothing else.
        t: The statistic behind it, in standard deviations.
        alpha: The chance that was accepted beforehand.
        marked: (n,) bool, the verdict on every output. No p-value: see `paired_accuracy`.
        scores: (n,), log(distance to p / distance to q), above log 2 for `marked`.
        undecided: How many outputs p and q look alike for at this precision; never `marked`.
        outputs: What the answers were found to be.
    """

    verdict: str
    log10_p: float
    t: float
    alpha: float
    marked: npt.NDArray[np.bool_] = field(repr=False)
    scores: Doubles = field(repr=False)
    undecided: int
    outputs: str

    @property
    def found(self) -> bool:
        """Whether the set was found to carry the mark."""
        return self.verdict == "found"


@dataclass(frozen=True)
class PairedAccuracy:
    """How often verdicts on single outputs are right, measured on a user's own inputs.

    Attributes:
        images: How many.
        decimals: What the answers were rounded to; None for full precision.
        marked: The share of marked answers that are called marked, 0 to 1.
        clean: The share of clean answers that are not.
        undecided: The share of inputs whose p and q look alike at this precision.
        flips: Inputs whose most likely class differs: 0 without margin mode.
    """

    images: int
    decimals: int | None
    marked: float
    clean: float
    undecided: float
    flips: int

    @property
    def balanced(self) -> float:
        """The mean of `marked` and `clean`."""
        return 0.5 * (self.marked + self.clean)


def paired_test(
    answers: Any,
    pixel_values: Images | None,
    served: SoftLabelWatermark | Pair,
    alpha: float = 1e-6,
    batch_size: int = 64,
) -> PairedEvidence:
    """Whether answers come from a marked model, one by one and as a set.

    The set's statistic is t = sum(S A) / ||A||, A = sum_i psi_i r_i', with r_i the answer's centred
    log-distance from p at unit length. Under H0 the signs S are independent of A, and t is a
    Rademacher sum: `log10_rademacher_tail`. One answer of ten classes reaches t of about 3, ten
    answers about 10.

    Args:
        answers: (n, K) probabilities or logarithms, rounded or top-k as they may be.
        pixel_values: The inputs, (n, C, H, W); not used with a `Pair`.
        served: The calibrated watermark as it served, or a `Pair` of it.
        alpha: For the set's verdict.
        batch_size: For one large tensor.

    Raises:
        OutputsError: If the answers are no distributions, labels alone, or not one for every input.
        SchemeError: If alpha is no chance.
    """
    if not 0.0 < alpha < 1.0:
        raise SchemeError("alpha is out of range", expected="between 0 and 1", got=alpha)
    if not isinstance(served, Pair):
        served = Pair.of(served, _given(pixel_values), batch_size)
    read = _checked(answers, served)
    y, decimals, shown = _as_seen(np.asarray(answers, np.float64))
    p, q = (_rounded(one, decimals) for one in (served.clean, served.marked))
    y = _logs(y, decimals)
    scores = np.log((_distance(y - p, shown) + _TOLERANCE) / (_distance(y - q, shown) + _TOLERANCE))
    weights = served.psi.T @ _directions(y - p, shown)
    t = agreement(weights, served.signs)
    log10_p = log10_rademacher_tail(t)
    return PairedEvidence(
        verdict="found" if log10_p <= math.log10(alpha) else "not found",
        log10_p=log10_p,
        t=t,
        alpha=alpha,
        marked=scores > _RATIO,
        scores=scores,
        undecided=int((_distance(p - q, shown) < _TOLERANCE).sum()),
        outputs=read.kind,
    )


def paired_accuracy(
    served: SoftLabelWatermark | Pair,
    pixel_values: Images | None = None,
    decimals: int | None = None,
    batch_size: int = 64,
) -> PairedAccuracy:
    """How often `paired_test` is right about a single output, on inputs of yours.

    Args:
        served: The calibrated watermark, or a `Pair` of it.
        pixel_values: The inputs; not used with a `Pair`.
        decimals: Round both answers to so many.
        batch_size: For one large tensor.
    """
    pair = served if isinstance(served, Pair) else Pair.of(served, _given(pixel_values), batch_size)
    kinds = []
    for log_probs in (pair.marked, pair.clean):
        p = np.exp(log_probs)
        kinds.append(paired_test(p if decimals is None else p.round(decimals), None, pair))
    of_marked, of_clean = kinds
    return PairedAccuracy(
        images=len(pair.clean),
        decimals=decimals,
        marked=float(of_marked.marked.mean()),
        clean=1.0 - float(of_clean.marked.mean()),
        undecided=of_clean.undecided / len(pair.clean),
        flips=int((pair.clean.argmax(1) != pair.marked.argmax(1)).sum()),
    )


def residuals(answers: Any, pair: Pair) -> Doubles:
    """How far answers are from the clean ones, (n, K) nats, 0 where nothing was shown.

    Both at the precision of the answers; arguments and errors as in `paired_test`.
    """
    _checked(answers, pair)
    y, decimals, shown = _as_seen(np.asarray(answers, np.float64))
    return np.where(shown, _logs(y, decimals) - _rounded(pair.clean, decimals), 0.0)


def _checked(answers: Any, pair: Pair) -> Outputs:
    read = Outputs.read(answers, pair.clean.shape[1])
    if read.labels_only:
        raise OutputsError("Labels alone cannot be paired", expected="probabilities", got="labels")
    if len(read.labels) != len(pair.clean):
        raise OutputsError(
            "There is not one answer for every input",
            expected=f"{len(pair.clean)} rows",
            got=len(read.labels),
        )
    return read


def _given(pixel_values: Images | None) -> Images:
    if pixel_values is None:
        raise OutputsError("The inputs are missing", expected="pixel_values (n, C, H, W)")
    return pixel_values


def _as_seen(values: Doubles) -> tuple[Doubles, int | None, npt.NDArray[np.bool_]]:
    """Probabilities, their decimals, and which of them were shown: top-k answers hide some."""
    logarithms = bool((values <= 1e-6).all() and (values < 0.0).any())
    p: Doubles = np.exp(values) if logarithms else np.clip(values, 0.0, 1.0)
    decimals = None if logarithms else _decimals(p)
    if decimals is None:
        return p, None, p > 0.0
    # A zero was rounded if nothing is missing, and was not shown otherwise.
    slack = 2e-3 + 0.5 * 10.0**-decimals * p.shape[1]
    return p, decimals, (p > 0.0) | (p.sum(axis=1, keepdims=True) > 1.0 - slack)


def _decimals(p: Doubles) -> int | None:
    """How many decimals probabilities were rounded to, None at full precision.

    Stricter than `Outputs`: a sure model's tiny values are not what rounding leaves.
    """
    for decimals in range(1, _MOST_DECIMALS + 1):
        nearest = p.round(decimals)
        if np.abs(p - nearest).max() < 7e-8 and ((p == 0.0) | (nearest > 0.0)).all():
            return decimals
    return None


def _rounded(log_probs: Doubles, decimals: int | None) -> Doubles:
    """Log-probabilities as they would look at this precision."""
    p = np.exp(log_probs)
    return _logs(p if decimals is None else p.round(decimals), decimals)


def _logs(p: Doubles, decimals: int | None) -> Doubles:
    floor = _FLOOR if decimals is None else 0.5 * 10.0**-decimals
    logs: Doubles = np.log(np.maximum(p, floor))
    return logs


def _distance(x: Doubles, shown: npt.NDArray[np.bool_]) -> Doubles:
    """Lengths of rows where they were shown, (n,)."""
    lengths: Doubles = np.sqrt((np.where(shown, x, 0.0) ** 2).sum(axis=1))
    return lengths


def _directions(x: Doubles, shown: npt.NDArray[np.bool_]) -> Doubles:
    """Rows centred over what was shown, at unit length; those within the tolerance are 0."""
    count = np.maximum(shown.sum(axis=1, keepdims=True), 1)
    x = np.where(shown, x - np.where(shown, x, 0.0).sum(axis=1, keepdims=True) / count, 0.0)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Doubles = np.where(length > _TOLERANCE, x / np.maximum(length, _TOLERANCE), 0.0)
    return unit
