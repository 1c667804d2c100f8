"""Evidence in the words of people who are no engineers: shared wording, and a page that prints.

The page is one HTML file without scripts or outside resources, so that it can be kept with a
dispute's papers and read offline.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_watermark.evidence import Claim, Evidence
from hf_watermark.significance import odds_in_words

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

__all__ = [
    "LIMITS",
    "chance_in_words",
    "claimed_fingerprint",
    "html_report",
    "markdown_section",
    "markdown_text",
    "rounded_up",
]

LIMITS = (
    "It does not show who made the training data, who holds a copyright, or that the name given "
    "with the key is true. It shows that the weights agree with a key.",
    "A key that was not committed to before the dispute proves nothing: a key can be fitted to any "
    "weights afterwards. What counts is who published a commitment first, so compare the dates of "
    "the commits that first published each claim. The owner of a repository can rewrite its "
    "history; an independent record of the date is stronger.",
    "A mark in the weights does not survive distillation: a model trained on this one's outputs "
    "does not carry it.",
    "A mark that is not found does not prove that a model is independent: marks can be removed.",
)

_MEANINGS = {
    "repo": "The repository, or folder, that was read",
    "revision": "The exact version that was read (a commit)",
    "verdict": "The outcome",
    "log10_p": "Base-10 logarithm of the chance below; -6 means one in a million",
    "alpha": "The chance of a false alarm that was accepted beforehand",
    "bits": "Length of the hidden message",
    "matched": "Bits of the message that were read correctly",
    "tries": "Readings that could have been tried; the chance is corrected for all of them",
    "reading": "Which of these readings decided",
    "scheme": "How the mark is embedded and read; everything that changes the result",
    "carriers": "The tensors (blocks of weights) that were read",
    "key_fingerprint": "Short name of the secret key that was used",
    "committed_at": "The commit that first published the claim",
    "bytes_read": "Bytes that were downloaded or read",
    "bytes_total": "Bytes of all weight files",
    "seconds": "How long the check took",
    "format_version": "Version of this list",
}
_DEFAULT_ALPHA = 1e-6
_LN2 = math.log(2.0)
_ORG_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_MARKUP = re.compile(r"[#$&*<>@\[\]\\_`{|}~]|(?<=www)\.|:(?=/)", re.IGNORECASE)
_TEMPLATES = Path(__file__).parent / "templates"
_WIDTH, _MARGIN = 640.0, 24.0


def rounded_up(log10_p: float) -> float:
    """Two decimals, rounded towards chance: what people read is never better than measured."""
    return -1e12 if log10_p < -1e12 else math.ceil(log10_p * 100) / 100 + 0.0


def chance_in_words(log10_p: float) -> str:
    """A chance as people say it, also beyond what `odds_in_words` is for."""
    return odds_in_words(log10_p) if log10_p > -1e6 else "less than 1 in 10^1000000"


def claimed_fingerprint(claim: Claim | None) -> str | None:
    """How people name the key of a claim; None if its public key is no key."""
    try:
        return hashlib.sha256(bytes.fromhex(claim.public_key)).hexdigest()[:16] if claim else None
    except ValueError:
        return None


def markdown_section(evidence: Evidence, claim: Claim | None = None) -> str:
    """The text of the section of a model card, without its markers and without key material.

    Values from elsewhere (names, revisions) are escaped: they stay one line of text. Carriers that
    a claim keeps secret are neither named nor counted, and a local path is not shown.

    Args:
        evidence: What was measured.
        claim: What is claimed, if there is a claim.
    """
    log10_p = evidence.log10_p
    is_repo = _ORG_NAME.fullmatch(evidence.repo) is not None  # a path stays on its machine
    context = {
        **evidence.to_dict(),
        "claim": claim,
        "owner": _trusted(markdown_text(claim.owner if claim else "")),
        "fingerprint": claimed_fingerprint(claim) or evidence.key_fingerprint,
        "tested_fingerprint": evidence.key_fingerprint,
        "secret_carriers": claim is not None and claim.carriers_commitment is not None,
        "odds": None if log10_p is None else chance_in_words(log10_p),
        "log10_p": None if log10_p is None else f"{rounded_up(log10_p):.2f}",
        "alpha": chance_in_words(_log10(evidence.alpha)),
        "repo": _trusted(evidence.repo if is_repo else "org/name"),
        "limits": tuple(_trusted(limit) for limit in LIMITS),
    }
    return _markdown().get_template("section.md.jinja").render(context).strip("\n")


@cache
def _markdown() -> jinja2.Environment:
    """Templates whose every value is escaped unless it is marked as trusted."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,
        finalize=markdown_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _as_code
    return environment


def _trusted(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)


def markdown_text(value: object) -> str:
    """Any value as one line of Markdown text without markup: character references do not nest."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = "".join(sign if sign.isprintable() else " " for sign in str(value))
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


def _as_code(value: object) -> str:
    """A hash or a name as a code span; character references would show in one."""
    return _trusted(f"`{re.sub(r'[^A-Za-z0-9._/:@+=,-]', '?', str(value)[:200])}`")


@dataclass(frozen=True)
class _Tick:
    """A mark of a scale: its place in the figure and its words."""

    x: float
    label: str


@dataclass(frozen=True)
class _Scale:
    """How far from chance: log10 p from 0, at the left, to beyond what was measured."""

    alpha: float
    measured: float
    measured_label: str
    ticks: tuple[_Tick, ...]

    @classmethod
    def of(cls, log10_p: float, log10_alpha: float) -> _Scale:
        """Room for both values, with round ticks."""
        deepest = min(log10_p, log10_alpha, -1.0) * 1.15
        step = 10.0 ** math.floor(math.log10(-deepest))
        step *= next(m for m in (0.2, 0.5, 1.0, 2.0) if -deepest / (step * m) <= 6)
        step = max(step, 1.0)

        def x(value: float) -> float:
            return round(_MARGIN + (_WIDTH - 2 * _MARGIN) * value / deepest, 1)

        count = math.floor(-deepest / step)
        return cls(
            alpha=x(log10_alpha),
            measured=x(log10_p),
            measured_label=chance_in_words(log10_p),
            ticks=tuple(
                _Tick(x(-k * step), f"1 in 10^{k * step:.0f}" if k else "certain")
                for k in range(count + 1)
            ),
        )


@dataclass(frozen=True)
class _Bell:
    """Matches that models without the mark get, as a closed curve, and those of this model."""

    curve: str
    measured: float
    ticks: tuple[_Tick, ...]

    @classmethod
    def of(cls, matched: int, bits: int, height: float) -> _Bell:
        """Binomial(bits, 1/2), scaled so that its top is at y = 0 and its foot at `height`."""

        def x(k: float) -> float:
            return round(_MARGIN + (_WIDTH - 2 * _MARGIN) * k / bits, 1)

        def log_density(k: float) -> float:
            return -math.lgamma(k + 1) - math.lgamma(bits - k + 1)

        top = log_density(bits / 2)
        steps = 160
        points = (
            f"{x(k)},{height * (1 - math.exp(log_density(k) - top)):.1f}"
            for k in (bits * i / steps for i in range(steps + 1))
        )
        foot = f"{height:.1f}"
        return cls(
            curve=f"M{x(0)},{foot} L{' L'.join(points)} L{x(bits)},{foot} Z",
            measured=x(matched),
            ticks=tuple(
                _Tick(x(k), f"{k}") for k in sorted({0, bits // 4, bits // 2, 3 * bits // 4, bits})
            ),
        )


def html_report(evidence: Evidence, claim: Claim | None = None) -> str:
    """One self-contained page: verdict, the number in words and in figures, how to repeat it.

    Carriers that a claim keeps secret are named in it, as in the evidence itself; the page says so.

    Args:
        evidence: What was measured.
        claim: What was claimed, if there is a claim.
    """
    log10_p, log10_alpha = evidence.log10_p, _log10(evidence.alpha)
    if log10_p is not None:
        log10_p = min(0.0, rounded_up(log10_p))
    fields = evidence.to_dict()
    bell = None
    if evidence.matched is not None and evidence.bits > 0:
        bell = _Bell.of(evidence.matched, evidence.bits, 96.0)
    return (
        _pages()
        .get_template("report.html.jinja")
        .render(
            evidence=evidence,
            claim=claim,
            fingerprint=claimed_fingerprint(claim),
            secret_carriers=claim is not None and claim.carriers_commitment is not None,
            odds=None if log10_p is None else chance_in_words(log10_p),
            log10_p=log10_p,
            tosses=None if log10_p is None else math.floor(-log10_p * math.log(10.0) / _LN2),
            alpha=chance_in_words(log10_alpha),
            scale=None if log10_p is None else _Scale.of(log10_p, log10_alpha),
            bell=bell,
            rows=[(name, _MEANINGS.get(name, ""), _shown(value)) for name, value in fields.items()],
            command=_command(evidence),
            limits=LIMITS,
            raw=json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False),
        )
    )


@cache
def _pages() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(powers=_powers, raised=_raised)
    return environment


def _log10(alpha: float) -> float:
    return math.log10(max(alpha, 1e-300))


def _command(evidence: Evidence) -> str:
    """The arguments that name what was read, safe to paste into a shell."""
    parts = [evidence.repo]
    if evidence.revision is not None:
        parts += ["--revision", evidence.revision]
    if evidence.alpha != _DEFAULT_ALPHA:
        parts += ["--alpha", f"{evidence.alpha:g}"]
    words = [shlex.quote(part) for part in parts]
    return " ".join(f"\\\n  {w}" if w.startswith("--") else w for w in words)


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, list):
        return "\n".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _powers(text: str) -> Markup:
    """`10^18` with a raised exponent; everything else escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"10\^(\d+)", r"10<sup>\1</sup>", str(escape(text))))


def _raised(text: str) -> str:
    """The same for figures, where no markup fits."""
    digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    return re.sub(r"10\^(\d+)", lambda match: "10" + match[1].translate(digits), text)
