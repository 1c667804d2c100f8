"""All attacks in the order of the table, and which of them a run takes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hf_watermark.errors import WatermarkError
from hf_watermark.stress import (
    disguises,
    erasure,
    finetuning,
    merging,
    overwriting,
    pruning,
    quantization,
)
from hf_watermark.stress.attacks import Attack

__all__ = ["ATTACKS", "SUITES", "attacks_of"]

ATTACKS: tuple[Attack, ...] = (
    *pruning.ATTACKS,
    *quantization.ATTACKS,
    *finetuning.ATTACKS,
    *erasure.ATTACKS,
    *overwriting.ATTACKS,
    *merging.ATTACKS,
    *disguises.ATTACKS,
)
SUITES = ("quick", "full")


def attacks_of(suite: str = "quick", names: Sequence[str] | None = None) -> tuple[Attack, ...]:
    """The attacks of a suite, or those that are named, in the order of the table.

    Args:
        suite: `quick` or `full`.
        names: Which ones, of either suite.

    Raises:
        WatermarkError: If there is no such suite or attack.
    """
    if suite not in SUITES:
        raise WatermarkError("Unknown suite", expected=" or ".join(SUITES), got=repr(suite))
    if names is None:
        return tuple(attack for attack in ATTACKS if attack.quick or suite == "full")
    known = [attack.name for attack in ATTACKS]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 5, 0.4) or known[:5]
            raise WatermarkError(
                "Unknown attack",
                expected=f"one of {len(known)}, such as {', '.join(close)}",
                got=repr(name)[:80],
                do="see all of them: hf-watermark stress --list",
            )
    if not names:
        raise WatermarkError("No attack was named", do="see all: hf-watermark stress --list")
    return tuple(attack for attack in ATTACKS if attack.name in names)
