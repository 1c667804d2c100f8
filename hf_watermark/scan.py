"""One suspect against many recipients: whose copy is it?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_watermark.carriers import Carrier
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import AlignmentError, SchemeError
from hf_watermark.evidence import Claim
from hf_watermark.extraction import Extraction, Rows
from hf_watermark.found_claims import find_claim, usable_claim
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Doubles, Floats, Projection
from hf_watermark.readings import Plan
from hf_watermark.references import Aligner, aligner_of
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.scheme import Scheme
from hf_watermark.significance import corrected, log10_normal_tail
from hf_watermark.threads import one_thread
from hf_watermark.verify import DEFAULT_ALPHA, check_align, check_alpha, check_key, what_to_read

__all__ = ["Lineup", "Trace", "trace"]

Progress = Callable[[int, int], None]

_PIECE = 2**19  # weights that are fetched at once
_BATCH = 8  # recipients that a thread judges before it asks for more
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
        reading: `raw`, or `aligned` where disguises were undone first.
        runner_up_log10_p: The same for the next best recipient; None if there is only one.
        bytes_read: Bytes fetched.
        seconds: Wall time.
        note: Why disguises were not undone, if nobody was named and they were not.
    """

    repo: str
    revision: str | None
    recipient: str | None
    log10_p: float
    alpha: float
    tries: int
    reading: str
    runner_up_log10_p: float | None
    bytes_read: int
    seconds: float
    note: str = ""

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
    align: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Name the recipient whose mark a suspect carries.

    The carriers are read once; every recipient's statistic is taken from what was read. BLAS runs
    on one thread meanwhile, in the whole process.

    Args:
        repo: `org/name`, or a folder.
        key: The owner's.
        recipients: The names that copies were marked for.
        claim: As in `verify_hub_model`.
        alpha: The chance of a false name that is accepted, all recipients and looks counted.
        align: As in `verify_hub_model`: `auto` undoes disguises if the raw weights name nobody and
            `claim` leads to the owner's original, marked in closed form.
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
    check_key(key)
    check_alpha(alpha)
    check_align(align)
    _check_names(recipients)
    files = open_files(repo, revision, token)
    checkpoint = Checkpoint.open(files)
    found, _ = usable_claim(
        find_claim(files, claim, token, key.fingerprint), (key, key), claim is not None
    )
    scheme, carriers = what_to_read(checkpoint, found)
    aligner, note = None, ""
    if align == "auto":
        aligner, note = aligner_of(checkpoint, key.for_recipient(recipients[0]), found, claim)
    lineup = Lineup(checkpoint, key, recipients, scheme, carriers, aligner)
    best = np.full(len(recipients), math.inf)
    with one_thread(), contextlib.ExitStack() as stack:
        pool = executor or stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
        for softs in lineup.looks(pool, progress):
            tails = [corrected(log10_normal_tail(soft), lineup.tries) for soft in softs]
            best = np.minimum(best, tails)
            if best.min() <= math.log10(alpha):
                break
    order = np.argsort(best, kind="stable")
    named = best[order[0]] <= math.log10(alpha)
    others = (None if found is None else found.files, None if aligner is None else aligner.files)
    sources = {id(one): one for one in (files, *others) if one is not None}
    return Trace(
        repo=files.name,
        revision=files.revision,
        recipient=recipients[order[0]] if named else None,
        log10_p=float(best[order[0]]),
        alpha=alpha,
        tries=lineup.tries,
        reading="aligned" if named and lineup.is_aligned else "raw",
        runner_up_log10_p=float(best[order[1]]) if len(order) > 1 else None,
        bytes_read=sum(one.bytes_read for one in sources.values()),
        seconds=time.perf_counter() - started,
        note="" if named else note or lineup.note,
    )


class Lineup:
    """Every recipient's statistic, taken from one read of a suspect.

    Args:
        checkpoint: The suspect.
        key: The owner's.
        recipients: Names.
        scheme: By which copies were marked.
        carriers: In which tensors.
        aligner: What undoes disguises, for one more look at the carriers that it can align.

    Raises:
        SchemeError: If bits decide in the scheme, or the suspect has none of the carriers under
            their names, and none to align.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        key: OwnerKey,
        recipients: Sequence[str],
        scheme: Scheme,
        carriers: Sequence[Carrier],
        aligner: Aligner | None = None,
    ) -> None:
        aligned = () if aligner is None else aligner.positions
        plan = Plan.make(carriers, checkpoint.shapes(), progressive=False, aligned=aligned)
        if scheme.decides != "soft" or not (plan.assignments or aligned):
            raise SchemeError("Recipients are traced by the soft statistic in whole models only")
        self._checkpoint = checkpoint
        self._keys = [key.for_recipient(name) for name in recipients]
        self._scheme = scheme
        self._carriers = plan.carriers
        self._names = dict(plan.assignments[0]) if plan.assignments else {}
        self._looks = _looks(plan.carriers, self._names)
        self._aligner, self._aligned = aligner, aligned
        self.is_aligned = False  # whether the look that was yielded last is
        self.note = ""  # why carriers could not be aligned

    @property
    def tries(self) -> int:
        """Recipients times looks."""
        return len(self._keys) * (len(self._looks) + bool(self._aligned))

    def looks(self, pool: Executor, progress: Progress | None = None) -> Iterator[Doubles]:
        """The soft statistics of all recipients, look by look.

        Law: for a recipient whose mark the suspect does not carry, each is N(0, 1), whatever the
        weights are, and independent of the other recipients'. Looks at the same weights are not
        independent of each other.

        Args:
            pool: Where recipients are judged.
            progress: Called with readings done and readings planned.

        Yields:
            (recipients,) float64, one array a look.
        """
        held: dict[int, Floats] = {}  # what was read of carriers that are not complete yet
        sums: dict[int, Doubles] = {}  # of those that are: (recipients, 2)
        planned = len(self._keys) * (sum(map(len, self._looks)) + len(self._aligned))
        done = 0
        for look in self._looks:
            totals = np.zeros((len(self._keys), 2))
            for i, rows in look.items():
                if i in sums:
                    totals += sums[i]
                else:
                    w = self._read(i, rows, held.pop(i, None))
                    judged = self._judged(i, w, pool, progress, done, planned)
                    totals += judged
                    if rows == self._carriers[i].rows:
                        sums[i] = judged
                    else:
                        held[i] = w
                done += len(self._keys)
            yield _soft(totals)
        if self._aligner is not None:
            totals = self._undisguised(self._aligner, pool, progress, done, planned)
            self.is_aligned = True
            yield _soft(totals)

    def _undisguised(
        self,
        aligner: Aligner,
        pool: Executor,
        progress: Progress | None,
        done: int,
        planned: int,
    ) -> Doubles:
        """All recipients' sums in the aligned carriers; those that cannot be aligned add nothing.

        Raises:
            AlignmentError: If none can, and nothing else was there to read.
        """
        totals = np.zeros((len(self._keys), 2))
        problem: AlignmentError | None = None
        for i in self._aligned:
            try:
                _, w = aligner.carrier(i)
            except AlignmentError as error:
                problem = problem or error
            else:
                totals += self._judged(i, w, pool, progress, done, planned)
            done += len(self._keys)
        if problem is not None:
            if not self._looks and not totals.any():
                raise problem
            self.note = str(problem)
        return totals

    def _judged(
        self,
        i: int,
        w: Floats,
        pool: Executor,
        progress: Progress | None,
        done: int,
        planned: int,
    ) -> Doubles:
        """All recipients' sums in one carrier, (recipients, 2)."""
        parts: list[tuple[float, float]] = []
        for some in pool.map(self._judge(i, w), _batches(self._keys)):
            parts += some
            if progress is not None:
                progress(done + len(parts), planned)
        return np.array(parts)

    def _read(self, i: int, rows: int, before: Floats | None) -> Floats:
        columns = self._carriers[i].columns
        start = 0 if before is None else len(before)
        step = max(1, _PIECE // columns)
        blocks = [
            (self._names[i], first, min(first + step, rows)) for first in range(start, rows, step)
        ]
        read = [
            block.reshape(len(block), columns) for block in self._checkpoint.read_blocks(blocks)
        ]
        return np.concatenate(read if before is None else [before, *read])

    def _judge(
        self, i: int, w: Floats
    ) -> Callable[[Sequence[OwnerKey]], list[tuple[float, float]]]:
        """What gives recipients' sums of s_t z_t and their variances in one carrier."""
        rows = Rows.of(w, self._carriers[i].columns)

        def judge(keys: Sequence[OwnerKey]) -> list[tuple[float, float]]:
            found = []
            for key in keys:
                extraction = Extraction(Projection(key, self._scheme, self._carriers))
                extraction.add(i, 0, rows)
                found.append(extraction.agreement())
            return found

        return judge


def _batches(keys: Sequence[OwnerKey]) -> list[Sequence[OwnerKey]]:
    return [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]


def _soft(totals: Doubles) -> Doubles:
    responses, variances = totals.T
    softs = np.zeros(len(totals))  # of weights that are all zero: they say nothing
    np.divide(responses, np.sqrt(variances), out=softs, where=variances > 0.0)
    return softs


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
    if not names:
        return []
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
