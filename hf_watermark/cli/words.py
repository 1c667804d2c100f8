"""The outcome of a check, as a person likes to read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hf_watermark.evidence import Claim, Evidence

__all__ = ["in_words"]

_STYLE = {"found": "green", "not found": "yellow", "not checked": "cyan"}


def in_words(evidence: Evidence, claim: Claim | None) -> str:
    """The verdict, what the number means, where it was read, what it does not prove."""
    colour = _STYLE[evidence.verdict]
    lines = [click.style(evidence.verdict.upper(), fg=colour, bold=True) + f"  {evidence.repo}"]
    lines += ["", *_meaning(evidence), ""]
    lines += [f"  {name:<9} {value}" for name, value in _facts(evidence, claim)]
    lines += ["", *(f"  {note}" for note in evidence.notes)]
    lines += [f"  {line}" for line in _CAVEATS[evidence.verdict]]
    return "\n".join(lines)


_CAVEATS = {
    "found": (
        "Not proven by this alone: that the owner was first. That rests on when the claim was",
        "published; a key that nobody committed to before a dispute proves nothing.",
    ),
    "not found": (
        "Not proven by this: that the model is independent. A mark in the weights does not survive",
        "distillation, and carriers that were renamed or replaced may need the owner's --claim.",
    ),
    "not checked": (),
}


def _meaning(evidence: Evidence) -> list[str]:
    from hf_watermark.report import chance_in_words, rounded_up

    if evidence.log10_p is None:
        return ["  The public part of the claim holds."]
    odds = chance_in_words(evidence.log10_p)
    if evidence.found:
        said = f"A chance of {odds} that an unrelated model agrees this well with the key."
    elif evidence.log10_p > -1.0:
        said = "Unrelated models agree with the key as well as this one does: no evidence."
    else:
        said = f"A chance of {odds} that an unrelated model agrees this well: not enough."
    return [
        f"  {said}",
        f"  (log10 p {rounded_up(evidence.log10_p):.2f}, all {evidence.tries} tries counted; "
        f"the limit set beforehand is p = {evidence.alpha:g})",
    ]


_READINGS = {
    "raw": "every carrier under its own name",
    "raw, one carrier": "one carrier alone, under its own name",
    "renamed": "carriers under other names, told by their order and shapes",
    "renamed, one carrier": "one tensor alone, under another name, told by its shape",
    "aligned": "carriers put back into the order of the owner's original",
    "aligned, one carrier": "one carrier alone, put back into the order of the owner's original",
}


def _facts(evidence: Evidence, claim: Claim | None) -> Iterator[tuple[str, str]]:
    from hf_watermark.safetensors_ranges import quoted

    if evidence.matched is not None:
        yield (
            "bits",
            f"{evidence.matched} of {evidence.bits} of the secret message "
            f"(by chance about {evidence.bits // 2})",
        )
    read, total = evidence.bytes_read, evidence.bytes_total
    share = 100.0 * read / total if total else 0.0
    percent = f"{share:.1f}%" if share >= 0.1 else "less than 0.1%"
    yield "read", f"{_size(read)}, {percent} of the weights' {_size(total)}"
    if evidence.carriers:
        more = len(evidence.carriers) - 1
        first = quoted(evidence.carriers[0])
        yield "from", f"{first} and {more} more" if more else first
    if evidence.reading is not None:
        yield "reading", f"{evidence.reading}: {_READINGS.get(evidence.reading, 'see the docs')}"
    yield "revision", evidence.revision or "none (a folder)"
    if claim is not None:
        # A stranger's text: nobody checked the name, and it may hold a terminal's commands.
        owner = claim.owner if claim.owner.isprintable() else ascii(claim.owner)
        yield "claim", f"signed, under the name {owner}" if owner else "signed"
    if evidence.committed_at is not None:
        yield "since", f"{evidence.committed_at}, the first commit with this key's claim"
    yield "scheme", evidence.scheme
    if evidence.key_fingerprint is not None:
        yield "key", evidence.key_fingerprint
    yield "time", f"{evidence.seconds:.2f} s"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000.0:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000.0
    return f"{value:.1f} GB"
