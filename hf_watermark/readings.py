"""Which readings of a suspect are tried, in what order, and how many that makes.

Everything is fixed by names and shapes before a weight is read: the schedule of row blocks, the
assignments of the suspect's tensors to the carriers, and with them the number of tries that every
p-value is corrected for. Looks at growing parts of the rows come first; where they say nothing,
every carrier is judged alone (all but one may have been replaced), and where tensors were renamed,
or layers deleted, inserted and renumbered, every same-shaped tensor in place of every carrier.
Last, where the owner's original is at hand, the carriers are read once more with disguises undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hf_watermark.carriers import Carrier, choose_carriers, natural_order
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import AlignmentError, CarrierError, CarrierMissingError
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.projections import Projection
from hf_watermark.significance import corrected

__all__ = ["Finding", "Plan", "read_suspect"]

Shape = tuple[int, ...]
Assignment = Mapping[int, str]
Progress = Callable[[int, int], None]
Align = Callable[[int], tuple[str, npt.NDArray[np.float32]]]

# A first look of 2^18 weights is 1 MiB in float32. The growth of sqrt(2) keeps what is read close
# to what is needed; each look costs one round trip and, as a try, 0.03 of log10 p.
_FIRST_LOOK = 2**18
_GROWTH = math.sqrt(2.0)
_PIECE = 2**19  # weights that are fetched at once; eight pieces are under way together
_TOGETHER = 8


@dataclass(frozen=True)
class Plan:
    """What will be tried.

    Attributes:
        carriers: The carriers, in the order of the key's streams.
        assignments: Which tensor is read as which carrier; each is tried pooled, look by look.
        looks: Fractions of the rows, growing, the last one 1.
        pairs: Tensors of other names tried one by one in place of carriers, where the names of the
            suspect cannot be trusted: one is missing, or the default rule leads elsewhere.
        aligned: Carriers that are read once more with disguises undone, pooled and alone.
        aligned_looks: How many of them are pooled at each look, growing.
    """

    carriers: tuple[Carrier, ...]
    assignments: tuple[Assignment, ...]
    looks: tuple[float, ...]
    pairs: tuple[tuple[int, str], ...]
    aligned: tuple[int, ...] = ()
    aligned_looks: tuple[int, ...] = ()

    @classmethod
    def make(
        cls,
        carriers: Sequence[Carrier],
        shapes: Mapping[str, Shape],
        *,
        progressive: bool = True,
        aligned: Sequence[int] = (),
    ) -> Plan:
        """Plan the readings of a suspect from names and shapes alone.

        Args:
            carriers: What the claim lists, or the default choice.
            shapes: The suspect's tensors.
            progressive: Look at growing parts of the rows, rather than at everything at once.
            aligned: Positions of the carriers that may be aligned if all else fails.

        Raises:
            CarrierMissingError: If no tensor could be any of the carriers.
        """
        by_name = {i: c.name for i, c in enumerate(carriers) if shapes.get(c.name) == c.shape}
        assignments: list[Assignment] = [by_name] if by_name else []
        pairs: list[tuple[int, str]] = []
        chosen = _chosen(shapes)
        if len(by_name) < len(carriers) or chosen != tuple(carriers):
            by_shape: dict[Shape, list[str]] = {}
            for name in sorted(shapes, key=natural_order):
                by_shape.setdefault(shapes[name], []).append(name)
            # A layer deleted or inserted renumbers the rest: present names may be wrong ones.
            pairs = [
                (i, name)
                for i, carrier in enumerate(carriers)
                for name in by_shape.get(carrier.shape, ())
                if name != carrier.name
            ]
            for guess in _guesses(carriers, chosen, by_shape):
                if guess not in assignments:
                    assignments.append(guess)
        if not assignments and not pairs and not aligned:
            raise _missing(carriers, len(shapes))
        weights = sum(carrier.weights for carrier in carriers)
        looks = [_FIRST_LOOK / weights]
        while looks[-1] * _GROWTH < 0.75:
            looks.append(looks[-1] * _GROWTH)
        if not progressive or looks[0] >= 0.75:
            looks = []
        together = [2**k for k in range(len(aligned).bit_length()) if 2**k < len(aligned)]
        return cls(
            tuple(carriers),
            tuple(assignments),
            (*looks, 1.0),
            tuple(pairs),
            tuple(aligned),
            (*(together if progressive else ()), len(aligned)) if aligned else (),
        )

    @property
    def tries(self) -> int:
        """How many readings this allows for, whether or not all of them are made."""
        alone = sum(len(assignment) for assignment in self.assignments if len(assignment) > 1)
        aligned = len(self.aligned_looks) + (len(self.aligned) if len(self.aligned) > 1 else 0)
        return len(self.looks) * len(self.assignments) + alone + len(self.pairs) + aligned


def _missing(carriers: Sequence[Carrier], tensors: int) -> CarrierMissingError:
    return CarrierMissingError(
        "The suspect has none of the carriers",
        expected=f"{len(carriers)} tensors such as {carriers[0].name[:120]!r} "
        f"of shape {list(carriers[0].shape)}",
        got=f"{tensors} tensors of other shapes",
        do="check that this is a copy of the claimed architecture",
    )


def _chosen(shapes: Mapping[str, Shape]) -> tuple[Carrier, ...]:
    """The default choice for the suspect; nothing if none of its tensors qualifies."""
    try:
        return choose_carriers(shapes)
    except CarrierError:
        return ()


def _guesses(
    carriers: Sequence[Carrier], chosen: Sequence[Carrier], by_shape: Mapping[Shape, list[str]]
) -> Iterator[Assignment]:
    """Assignments that renaming leaves intact: by the rule, and by order among equal shapes."""
    if [c.shape for c in chosen] == [c.shape for c in carriers]:
        yield {i: carrier.name for i, carrier in enumerate(chosen)}
    ordered: dict[int, str] = {}
    for shape in {carrier.shape for carrier in carriers}:
        places = [i for i, carrier in enumerate(carriers) if carrier.shape == shape]
        if len(by_shape.get(shape, ())) == len(places):
            ordered.update(zip(places, by_shape[shape], strict=True))
    if ordered:
        yield dict(sorted(ordered.items()))


@dataclass(frozen=True)
class Finding:
    """The reading that decided, or the best of all if none did.

    Attributes:
        reading: What was read.
        log10_p: Its p-value, corrected for the plan's tries.
        how: `raw`, `renamed` or `aligned`, and `, one carrier` if one alone decided.
        carriers: The tensors it was read from.
        note: Why the aligned reading, if one was planned, could not be made.
    """

    reading: Reading
    log10_p: float
    how: str
    carriers: tuple[str, ...]
    note: str = ""


def read_suspect(
    checkpoint: Checkpoint,
    projection: Projection,
    plan: Plan,
    alpha: float,
    progress: Progress | None = None,
    align: Align | None = None,
    aligned: Projection | None = None,
) -> Finding:
    """Read a suspect as planned, until the corrected p-value is at most alpha.

    Args:
        checkpoint: The suspect.
        projection: What the key reads, over `plan.carriers`.
        plan: The readings.
        alpha: The chance of a false alarm that is accepted.
        progress: Called with weights read and weights planned.
        align: From a carrier's position to its name and weights in the suspect, disguises undone;
            called for the carriers that the plan aligns, if all else fails.
        aligned: What is read there instead of `projection`, over the same carriers.

    Returns:
        The finding that passed, or the best one if none did.

    Raises:
        CarrierError: If none passed and some tensor could not be read: a planted tensor of NaN
            neither hides a mark nor lets it pass for absent.
        AlignmentError: If there was nothing to read but what could not be aligned.
    """
    best: Finding | None = None
    unreadable: CarrierError | None = None
    unaligned: AlignmentError | None = None
    for findings in _attempts(checkpoint, projection, plan, progress, align, aligned):
        try:
            for finding in findings:
                if best is None or finding.log10_p < best.log10_p:
                    best = finding
                if best.log10_p <= math.log10(alpha):
                    return best
        except AlignmentError as error:
            unaligned = error
        except CarrierError as error:
            unreadable = unreadable or error
    if unreadable is not None:
        raise unreadable
    if best is None:  # a plan has an assignment, a pair, or something to align
        raise unaligned or _missing(plan.carriers, len(checkpoint.tensors))
    return best if unaligned is None else replace(best, note=str(unaligned))


def _attempts(
    checkpoint: Checkpoint,
    projection: Projection,
    plan: Plan,
    progress: Progress | None,
    align: Align | None,
    aligned: Projection | None,
) -> Iterator[Iterator[Finding]]:
    """The readings in the order of the plan; those of one attempt share what was fetched."""
    count = _Count(plan, progress)
    for assignment in plan.assignments:
        yield _pooled(checkpoint, projection, plan, assignment, count)
    places: dict[str, list[int]] = {}
    for i, name in plan.pairs:
        places.setdefault(name, []).append(i)
    for name, carriers in places.items():
        yield _replacing(checkpoint, projection, plan, name, carriers, count)
    if align is not None and plan.aligned:
        yield _aligned(projection if aligned is None else aligned, plan, align, count)


def _pooled(
    checkpoint: Checkpoint,
    projection: Projection,
    plan: Plan,
    assignment: Assignment,
    count: _Count,
) -> Iterator[Finding]:
    """All carriers together, look by look; then each alone."""
    direct = all(plan.carriers[i].name == name for i, name in assignment.items())
    how = "raw" if direct else "renamed"
    extraction = Extraction(projection)
    done = 0.0
    for look in plan.looks:
        for i, start, block in _blocks(checkpoint, plan, assignment, done, look, count):
            extraction.add(i, start, block)
        done = look
        yield _finding(extraction.reading(), plan, how, assignment.values())
    if len(assignment) > 1:
        for i, name in assignment.items():
            yield _finding(extraction.reading(i), plan, f"{how}, one carrier", [name])


def _replacing(
    checkpoint: Checkpoint,
    projection: Projection,
    plan: Plan,
    name: str,
    carriers: Sequence[int],
    count: _Count,
) -> Iterator[Finding]:
    """One tensor in place of each of several carriers of its shape."""
    extractions = {i: Extraction(projection) for i in carriers}
    for _, start, block in _blocks(checkpoint, plan, {carriers[0]: name}, 0.0, 1.0, count):
        for i, extraction in extractions.items():
            extraction.add(i, start, block)
    for i, extraction in extractions.items():
        yield _finding(extraction.reading(i), plan, "renamed, one carrier", [name])


def _aligned(projection: Projection, plan: Plan, align: Align, count: _Count) -> Iterator[Finding]:
    """The carriers with disguises undone: pooled, look by look; then each alone.

    A carrier that cannot be aligned is left out; an error if none can.
    """
    extraction = Extraction(projection)
    names: dict[int, str] = {}
    problem: AlignmentError | None = None
    for done, i in enumerate(plan.aligned, 1):
        try:
            name, w = align(i)
        except AlignmentError as error:
            problem = problem or error
        else:
            extraction.add(i, 0, w)
            names[i] = name
        count.add(plan.carriers[i].weights)
        if done in plan.aligned_looks and names:
            yield _finding(extraction.reading(), plan, "aligned", names.values())
    if len(plan.aligned) > 1:
        for i, name in names.items():
            yield _finding(extraction.reading(i), plan, "aligned, one carrier", [name])
    if problem is not None:
        raise problem


def _finding(reading: Reading, plan: Plan, how: str, names: Iterable[str]) -> Finding:
    return Finding(reading, corrected(reading.log10_p, plan.tries), how, tuple(names))


class _Count:
    """How many weights were read, told to whoever watches."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        pooled = sum(plan.carriers[i].weights for a in plan.assignments for i in a)
        places = {name: i for i, name in plan.pairs}
        others = (*places.values(), *plan.aligned)
        self._planned = pooled + sum(plan.carriers[i].weights for i in others)

    def add(self, weights: int) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress(self._done, self._planned)


def _blocks(
    checkpoint: Checkpoint,
    plan: Plan,
    assignment: Assignment,
    done: float,
    look: float,
    count: _Count,
) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
    """Row blocks between two looks, fetched several at a time, in bounded memory."""
    pieces: list[tuple[int, str, int, int]] = []
    for i, name in assignment.items():
        carrier = plan.carriers[i]
        start, end = _row(carrier, done), _row(carrier, look)
        step = max(1, _PIECE // carrier.columns)
        pieces += [(i, name, row, min(row + step, end)) for row in range(start, end, step)]
    for at in range(0, len(pieces), _TOGETHER):
        together = pieces[at : at + _TOGETHER]
        arrays = checkpoint.read_blocks([piece[1:] for piece in together], _TOGETHER)
        for (i, _, start, _), array in zip(together, arrays, strict=True):
            count.add(array.size)
            yield i, start, array


def _row(carrier: Carrier, fraction: float) -> int:
    return min(carrier.rows, math.ceil(carrier.rows * fraction))
