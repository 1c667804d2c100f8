"""Evidence <-> model card: one section, two YAML keys, and everything else byte for byte as found.

Pure text functions: no network, no files but the templates of this package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_watermark.errors import CardError
from hf_watermark.evidence import CLAIM_FORMAT, Claim, Evidence
from hf_watermark.front_matter import (
    TAG,
    line_break_of,
    parse,
    split_card,
    with_keys,
    without_keys,
)
from hf_watermark.report import markdown_section, markdown_text, rounded_up

__all__ = [
    "BEGIN",
    "END",
    "read_card",
    "updated_card",
    "without_watermark",
]

BEGIN = "<!-- hf-watermark:begin -->"
END = "<!-- hf-watermark:end -->"

_LONGEST_READ = 2**20


def updated_card(text: str | None, evidence: Evidence, claim: Claim | None) -> str:
    """The card with our section and YAML keys inserted or replaced, all else as found.

    Laws: `updated_card(updated_card(t, e, c), e, c) == updated_card(t, e, c)`;
    `without_watermark(updated_card(t, e, c)) == t` if `t` had no part of ours, no tag `watermark`,
    and a front matter that can be edited in place (flow mappings and aliases cannot).

    Args:
        text: README.md, decoded without newline translation; None or blank makes a new card.
        evidence: What was measured.
        claim: What is claimed, if there is a claim; a secret list of carriers is not shown.

    Raises:
        CardError: If the YAML is invalid, the markers are damaged, or `watermark` is the user's.
    """
    fields = _fields(evidence, claim)
    if text is None or not text.strip("\ufeff \t\r\n"):
        return _new_card(evidence, claim, fields)
    line_break = line_break_of(text)
    section = _section(evidence, claim).replace("\n", line_break)
    bom, opening, front, closing, body = split_card(text)
    if not opening:
        opening, closing = f"---{line_break}", f"---{line_break}"
    front = with_keys(front, fields, line_break)
    place = _place_of_section(body)
    if place is not None:
        body = body[: place[0]] + section + body[place[1] :]
    elif text.endswith(("\r", "\n")):
        body += line_break + section + line_break
    else:  # a missing final line break stays missing, which tells `without_watermark` about it
        body += 2 * line_break + section
    return bom + opening + front + closing + body


def without_watermark(text: str) -> str:
    """The card without our section, our YAML key and the tag; see the laws of `updated_card`.

    Raises:
        CardError: If the YAML is invalid or the markers are damaged.
    """
    bom, opening, front, closing, body = split_card(text)
    rest = closing + body
    place = _place_of_section(rest)
    if place is not None:
        before, section, after = rest[: place[0]], rest[slice(*place)], rest[place[1] :]
        line_break = "\r\n" if section.startswith("\r\n", len(BEGIN)) else "\n"
        if not after:
            rest = before.removesuffix(line_break).removesuffix(line_break)
        elif after == line_break:
            rest = before.removesuffix(line_break)
        else:
            rest = before + after.removeprefix(line_break)
    if opening:
        front = without_keys(front)
        if not front:  # it held nothing but ours: a front matter of the user has at least a line
            opening, rest = "", rest[len(closing) :]
    return bom + opening + front + rest


def read_card(text: str) -> dict[str, Any] | None:
    """The `watermark` mapping of a card from anywhere, its plain values only; None if it has none.

    Never raises: a card is untrusted, and what it says is a claim.
    """
    try:
        _, opening, front, _, _ = split_card(text)
        if not opening or len(front) > _LONGEST_READ:
            return None
        found = parse(front).get("watermark")
    except CardError:
        return None
    if not isinstance(found, dict):
        return None
    plain = (str, int, float, type(None))
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, plain)}


# The parts -------------------------------------------------------------------------------------


def _fields(evidence: Evidence, claim: Claim | None) -> dict[str, Any]:
    fields = {
        "format": CLAIM_FORMAT,
        "scheme": evidence.scheme,
        "commitment": claim.commitment if claim else None,
        "public_key": claim.public_key if claim else None,
        "log10_p": evidence.to_dict()["log10_p"],
        "revision": evidence.revision,
    }
    if fields["log10_p"] is not None:
        fields["log10_p"] = rounded_up(fields["log10_p"])
    return {name: value for name, value in fields.items() if value is not None}


def _section(evidence: Evidence, claim: Claim | None) -> str:
    return f"{BEGIN}\n{markdown_section(evidence, claim)}\n{END}"


def _new_card(evidence: Evidence, claim: Claim | None, fields: dict[str, Any]) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(
        ModelCardData(tags=[TAG], watermark=fields),
        template_path=str(Path(__file__).parent / "templates" / "card.md.jinja"),
        front_matter=with_keys("", fields, "\n").rstrip("\n"),
        title=markdown_text(Path(evidence.repo).name) or "Model",
        section=_section(evidence, claim),
    )
    return f"{card}\n"


def _place_of_section(body: str) -> tuple[int, int] | None:
    begins = [match.start() for match in re.finditer(re.escape(BEGIN), body)]
    ends = [match.end() for match in re.finditer(re.escape(END), body)]
    if not begins and not ends:
        return None
    if len(begins) == len(ends) == 1 and begins[0] < ends[0]:
        return begins[0], ends[0]
    raise CardError(
        "The markers of the hf-watermark section in README.md are damaged",
        expected=f"one {BEGIN} before one {END}",
        got=f"{len(begins)} and {len(ends)}" + (", in reverse" if len(begins) == len(ends) else ""),
        do="delete these comments and what is left of the section between them, and run it again",
    )
