"""The outcomes of a run as a Markdown table, and in the words of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from hf_watermark.report import markdown_text, rounded_up
from hf_watermark.stress.outcomes import MOST_LOST, Outcome, Record

__all__ = ["in_words", "markdown", "one_line"]

_HEAD = ("attack", "accuracy, %", "lost, points", "BER", "log10 p", "reading", "mark", "seconds")


def markdown(record: Record) -> str:
    """The whole table, with what it rests on below it."""
    before = record.before
    p = f"{rounded_up(before['log10_p']):.1f}"
    reading = str(before["reading"])
    first = ("none", _percent(before["accuracy"]), "", f"{before['ber']:.3f}")
    first_row = (*first, p, reading, "found", "")
    lines = [_row(_HEAD), "|---" * len(_HEAD) + "|", _row(first_row)]
    lines += [_row(_cells(outcome)) for outcome in record.outcomes.values()]
    said = record.settings
    lines += [
        "",
        f"{said['model_type']}, {said['parameters']:,} parameters; the attacker has "
        f"{said['attackers_images']:,} images, accuracy is that on {said['test_images']:,} others. "
        f"Fine-tuning: {said['epochs']} epochs of AdamW at {said['learning_rate']:g}, batch "
        f"{said['batch_size']}; seed {said['seed']}. A mark is removed if p rises above "
        f"{said['alpha']:g} while accuracy falls by less than {100 * MOST_LOST:g} points.",
        "",
        f"{_verdict(record)}",
    ]
    return "\n".join(lines) + "\n"


def in_words(record: Record) -> str:
    """The table for a terminal, and the verdict."""
    rows: list[Sequence[str]] = [_HEAD]
    rows += [_cells(outcome) for outcome in record.outcomes.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    table = [
        "  ".join(
            cell.rjust(width) if 0 < i < 5 or i == 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    before = record.before
    start = (
        f"Before: accuracy {_percent(before['accuracy'])}%, BER {before['ber']:.3f}, "
        f"log10 p {rounded_up(before['log10_p']):.1f}"
    )
    notes = [f"  {o.name}: {o.note}" for o in record.outcomes.values() if o.status != "read"]
    return "\n".join([start, "", *table, *(["", *notes] if notes else []), "", _verdict(record)])


def one_line(outcome: Outcome) -> str:
    """An outcome as it comes in."""
    if outcome.accuracy is None or outcome.log10_p is None:
        return f"{outcome.name}: {outcome.status} ({outcome.note})"
    return (
        f"{outcome.name}: accuracy {_percent(outcome.accuracy)}%, "
        f"log10 p {rounded_up(outcome.log10_p):.1f}, {_mark(outcome)} ({outcome.seconds:.1f} s)"
    )


def _verdict(record: Record) -> str:
    outcomes = record.outcomes.values()
    counted = [o for o in outcomes if o.lost is not None and o.lost < MOST_LOST]
    text = (
        f"The mark stood {len(counted) - len(record.removed)} of the {len(counted)} attacks that "
        f"leave accuracy within {100 * MOST_LOST:g} points."
    )
    if record.removed:
        text += f" Removed by: {', '.join(record.removed)}."
    costly = [o.name for o in outcomes if o.found is False and not o.removed]
    if costly:
        text += f" Lost with the accuracy: {', '.join(costly)}."
    skipped = [o.name for o in outcomes if o.status == "not applicable"]
    if skipped:
        text += f" Not applicable: {', '.join(skipped)}."
    if record.failed:
        text += f" Failed: {', '.join(record.failed)}."
    return text


def _cells(outcome: Outcome) -> tuple[str, ...]:
    if outcome.accuracy is None or outcome.lost is None:
        return (outcome.name, "", "", "", "", "", outcome.status, "")
    return (
        outcome.name,
        _percent(outcome.accuracy),
        f"{100 * outcome.lost:+.1f}",
        "" if outcome.ber is None else f"{outcome.ber:.3f}",
        "" if outcome.log10_p is None else f"{rounded_up(outcome.log10_p):.1f}",
        outcome.reading or "",
        _mark(outcome),
        f"{outcome.seconds:.1f}",
    )


def _mark(outcome: Outcome) -> str:
    if outcome.removed:
        return "REMOVED"
    if outcome.found:
        return "found"
    return outcome.status if outcome.status != "read" else "lost with the accuracy"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"
