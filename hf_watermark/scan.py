"""One suspect against many recipients: whose copy is it?"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_watermark.carriers import Carrier
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import find_claim
from hf_watermark.errors import SchemeError
from hf_watermark.evidence import Claim
from hf_watermark.extraction import Extraction
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Floats, Projection
from hf_watermark.readings import Plan
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.scheme import Scheme
from hf_watermark.significance import corrected, log10_normal_tail
from hf_watermark.verify import DEFAULT_ALPHA, what_to_read

__all__ = ["Trace", "trace"]

Progress = Callable[[int, int], None]

# What is tried first: at 1% distortion 2^20 weights read 10 sigmas, enough for a million names.
_FIRST_LOOK = 2**20


@dataclass(frozen=True)
class Trace:
    """Whose copy a suspect is.

    Attributes:
        repo: `org/name` or a folder.
        revision: Full commit sha that was read, None for a folder.
        recipient: Who was named, or None.
        log10_p: log10 of the chance that an unmarked copy names anyone so firmly, corrected for
            all recipients and looks.
        alpha: The chance of a false name that was accepted.
        tries: Recipients times looks.
        runner_up_log10_p: The same for the next best recipient; None if there is only one.
        bytes_read: Bytes fetched.
        seconds: Wall time.
    """

    repo: str
    revision: str | None
    recipient: str | None
    log10_p: float
    alpha: float
    tries: int
    runner_up_log10_p: float | None
    bytes_read: int
    seconds: float

    @property
    def found(self) -> bool:
        """Whether anyone was named."""
        return self.recipient is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = dataclasses.asdict(self)
        fields["verdict"] = "found" if self.found else "not found"
        for name in ("log10_p", "runner_up_log10_p"):
            if fields[name] == -math.inf:
                fields[name] = -1e308  # JSON has no infinity
        return fields


def trace(
    repo: str | os.PathLike[str],
    key: OwnerKey,
    recipients: Sequence[str],
    *,
    claim: Claim | str | os.PathLike[str] | None = None,
    alpha: float = DEFAULT_ALPHA,
    revision: str | None = None,
    token: str | bool | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Name the recipient whose mark a suspect carries.

    The carriers are read once; every recipient's statistic is taken from what was read.

    Args:
        repo: `org/name`, or a folder.
        key: The owner's.
        recipients: The names that copies were marked for.
        claim: As in `verify_hub_model`.
        alpha: The chance of a false name that is accepted, all recipients and looks counted.
        revision: Of a repo.
        token: For the Hub.
        executor: Where recipients are judged; threads by default. (A key is never pickled, so a
            pool of processes cannot take it.)
        progress: Called with recipients judged and planned.

    Raises:
        SchemeError: If no recipient, or one twice, is named.
        WatermarkError: As in `verify_hub_model`.
    """
    from hf_watermark.hub import open_files

    started = time.perf_counter()
    _check_names(recipients)
    files = open_files(repo, revision, token)
    found = find_claim(files, claim, token, key.fingerprint)
    checkpoint = Checkpoint.open(files)
    scheme, carriers = what_to_read(checkpoint, found, key, given=claim is not None)
    plan = Plan.make(carriers, checkpoint.shapes(), progressive=False)
    if scheme.decides != "soft" or not plan.assignments:
        raise SchemeError("Recipients are traced by the soft statistic in whole models only")
    names = dict(plan.assignments[0])
    looks = _looks(carriers, names)
    tries = len(recipients) * len(looks)
    keys = [key.for_recipient(name) for name in recipients]
    done = 0
    best = np.full(len(recipients), math.inf)
    own = None if executor is not None else ThreadPoolExecutor(os.cpu_count() or 1)
    pool = executor if executor is not None else own
    assert pool is not None  # one of the two
    try:
        for look in looks:
            totals = np.zeros((len(recipients), 2))
            for i, rows in look.items():
                w = _rows(checkpoint, carriers[i], names[i], rows)

                def judge(one: OwnerKey, i: int = i, w: Floats = w) -> tuple[float, float]:
                    return _response(one, scheme, carriers, i, w)

                for r, sums in enumerate(pool.map(judge, keys)):
                    totals[r] += sums
                    done += 1
                    if progress is not None:
                        progress(done, sum(len(other) for other in looks) * len(recipients))
            for r, (response, variance) in enumerate(totals):
                soft = response / math.sqrt(variance) if variance > 0.0 else 0.0
                best[r] = min(best[r], corrected(log10_normal_tail(soft), tries))
            if best.min() <= math.log10(alpha):
                break
    finally:
        if own is not None:
            own.shutdown()
    order = np.argsort(best, kind="stable")
    named = best[order[0]] <= math.log10(alpha)
    return Trace(
        repo=files.name,
        revision=files.revision,
        recipient=recipients[order[0]] if named else None,
        log10_p=float(best[order[0]]),
        alpha=alpha,
        tries=tries,
        runner_up_log10_p=float(best[order[1]]) if len(order) > 1 else None,
        bytes_read=files.bytes_read,
        seconds=time.perf_counter() - started,
    )


def _check_names(recipients: Sequence[str]) -> None:
    if not recipients:
        raise SchemeError(
            "No recipients are named",
            expected="the names that copies were marked for",
            do="list them, one a line in a file",
        )
    ((name, count),) = Counter(recipients).most_common(1)
    if count > 1:
        raise SchemeError(
            "A recipient is named more than once",
            expected="each name once: every name counts as a try",
            got=f"{quoted(name)} {count} times",
            do="remove the repetitions",
        )


def _looks(carriers: Sequence[Carrier], names: dict[int, str]) -> list[dict[int, int]]:
    """Rows of each carrier to take: enough of the first ones, then everything."""
    first: dict[int, int] = {}
    left = _FIRST_LOOK
    for i in names:
        if left <= 0:
            break
        rows = min(carriers[i].rows, -(-left // carriers[i].columns))
        first[i] = rows
        left -= rows * carriers[i].columns
    everything = {i: carriers[i].rows for i in names}
    return [first] if first == everything else [first, everything]


def _rows(checkpoint: Checkpoint, carrier: Carrier, name: str, rows: int) -> Floats:
    step = max(1, 2**19 // carrier.columns)
    blocks = [(name, start, min(start + step, rows)) for start in range(0, rows, step)]
    return np.concatenate(checkpoint.read_blocks(blocks))


def _response(
    key: OwnerKey, scheme: Scheme, carriers: Sequence[Carrier], carrier: int, w: Floats
) -> tuple[float, float]:
    """One recipient's sum_t s_t z_t and its variance in one carrier."""
    extraction = Extraction(Projection(key, scheme, carriers))
    extraction.add(carrier, 0, w)
    return extraction.agreement()
