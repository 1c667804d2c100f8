"""Was a suspect distilled from marked answers, and whose? From its outputs alone."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import OutputsError, SchemeError
from hf_watermark.projections import Doubles
from hf_watermark.significance import corrected, log10_rademacher_tail
from hf_watermark.softlabels.detection import (
    CLASSES,
    PAIR,
    agreement,
    class_weights,
    fewest_probes,
    pair_weights,
    probes_needed,
)
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.probes import Probes

__all__ = ["OutputEvidence", "Served", "judge"]


class Served(Protocol):
    """What can look at probes: a `SoftLabelWatermark`."""

    @property
    def recipient(self) -> str | None:
        """Whose view it is; None for the owner's own."""

    def probes(self, pixel_values: Any) -> Probes:
        """The clean model's view of images."""


@dataclass(frozen=True, kw_only=True)
class OutputEvidence:
    """The outcome of one check of a suspect's outputs.

    Attributes:
        verdict: `found` or `not found`.
        log10_p: Base-10 logarithm of an upper bound on the chance that a model which never learnt
            from answers with these signs agrees so well, corrected for `tries`.
        t: The statistic that decided, in standard deviations; sqrt(bits) at most.
        alpha: The chance that was accepted beforehand.
        bits: The customer's signs in play, features times classes.
        matched: How many of them agree with the suspect; about half by chance.
        probes: How many probes were used.
        tries: Recipients times readings, all counted.
        reading: `all classes`, or `top pair` in margin mode.
        outputs: What the outputs were found to be.
        recipient: Whose signs agree best; None for the owner's own.
        references: How many clean models were allowed for, the owner's own among them.
        probes_needed: An estimate of the probes that would reach alpha, if t grows like their
            square root as it does until it saturates; None if t is too small to say.
        key_fingerprint: Whose key.
        seconds: Wall time.
        suspect: Who was asked, as far as it is known: a repo, folder, file or endpoint.
        revision: The full commit sha of a repo; None for others.
        notes: Remarks for people, not part of the JSON.
    """

    FORMAT_VERSION: ClassVar[int] = 1

    verdict: str
    log10_p: float
    t: float
    alpha: float
    bits: int
    matched: int
    probes: int
    tries: int
    reading: str
    outputs: str
    recipient: str | None
    references: int
    probes_needed: int | None
    key_fingerprint: str
    seconds: float
    suspect: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the mark was found."""
        return self.verdict == "found"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        names = [field.name for field in fields(self) if field.name != "notes"]
        return {name: getattr(self, name) for name in names} | {
            "seconds": round(self.seconds, 3),
            "format_version": self.FORMAT_VERSION,
        }

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def judge(
    outputs: Any,
    pixel_values: Any,
    served: Served | Probes,
    references: Sequence[Any] = (),
    recipient: str | Sequence[str] | None = None,
    alpha: float = 1e-6,
) -> OutputEvidence:
    """`hf_watermark.verify.verify_outputs`; see there."""
    started = time.perf_counter()
    if not (isinstance(alpha, (int, float)) and 0.0 < alpha < 1.0):
        raise SchemeError("alpha is out of range", expected="between 0 and 1", got=alpha)
    if isinstance(served, Probes):
        probes, names = served, _names(recipient, None)
    else:
        probes, names = served.probes(pixel_values), _names(recipient, served.recipient)
    suspect = Outputs.read(_answers(outputs, pixel_values), probes.classes, probes.labels)
    _check_size(suspect, probes)
    probes = probes.with_references([_answers(one, pixel_values) for one in references])
    clean = [one.astype(np.float64) for one in probes.references]
    readings: list[tuple[str, Doubles]] = [(CLASSES, class_weights(suspect, probes, clean))]
    if probes.margin is not None:
        readings.append((PAIR, pair_weights(suspect, probes, clean)))
    signs = {name: probes.signs(name) for name in names}
    tries = len(names) * len(readings)
    best: tuple[float, str | None, str, Doubles] | None = None
    for name in names:
        for reading, weights in readings:
            t = agreement(weights, signs[name])
            if best is None or t > best[0]:
                best = (t, name, reading, weights)
    assert best is not None  # one name and one reading at least
    t, name, reading, weights = best
    log10_p = corrected(log10_rademacher_tail(t), tries)
    return OutputEvidence(
        verdict="found" if log10_p <= math.log10(alpha) else "not found",
        log10_p=log10_p,
        t=t,
        alpha=alpha,
        bits=weights.size,
        matched=int((weights * signs[name] > 0.0).sum()),
        probes=len(probes),
        tries=tries,
        reading=reading,
        outputs=suspect.kind,
        recipient=name,
        references=1 + len(clean),
        probes_needed=probes_needed(t, len(probes), _t_for(alpha / tries)),
        key_fingerprint=probes.key.fingerprint,
        seconds=time.perf_counter() - started,
        notes=_notes(probes, suspect),
    )


def _names(recipient: str | Sequence[str] | None, own: str | None) -> list[str | None]:
    if recipient is None or isinstance(recipient, str):
        return [recipient if recipient is not None else own]
    if not recipient or len(set(recipient)) != len(recipient):
        raise SchemeError(
            "Recipients must be named, each once", got=f"{len(recipient)} names, some twice"
        )
    return list(recipient)


def _answers(model: Any, pixel_values: Any) -> Any:
    """Outputs as they are, or those of a callable."""
    return model(pixel_values) if callable(model) else model


def _check_size(suspect: Outputs, probes: Probes) -> None:
    if len(suspect.labels) != len(probes):
        raise OutputsError(
            "There is not one output for every probe",
            expected=f"{len(probes)} rows",
            got=len(suspect.labels),
        )
    needed = fewest_probes(probes.features)
    if len(probes) < needed:
        raise OutputsError(
            "Too few probes for the features of the mark",
            expected=f"at least {needed}, two for each of {probes.features} features",
            got=len(probes),
            do="ask the suspect about more images",
        )


def _t_for(p: float) -> float:
    """The smallest t that the bound takes below `p`, to three decimals."""
    low, high = 0.0, 60.0
    while high - low > 1e-3:
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high) if log10_rademacher_tail(middle) > math.log10(p) else (low, middle)
        )
    return high


def _notes(probes: Probes, suspect: Outputs) -> tuple[str, ...]:
    notes = []
    used: npt.NDArray[np.bool_] = probes.seen
    if used.any():
        notes.append(
            f"{int(used.sum())} of {len(probes)} probes were used to calibrate the features; "
            "take fresh ones"
        )
        warnings.warn(notes[-1], stacklevel=4)
    if suspect.labels_only and probes.margin is None:
        notes.append("Labels alone hold little of a mark that was served without margin mode.")
    return tuple(notes)
