from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark.evidence import Claim, ClaimedCarrier, Evidence
from hf_watermark.key import OwnerKey
from hf_watermark.report import chance_in_words, html_report, markdown_text, rounded_up
from hf_watermark.scheme import Scheme

KEY = OwnerKey(bytes(range(32)), "acme")
CARRIER = ClaimedCarrier("vit.encoder.layer.0.output.dense.weight", (768, 3072), "F32", "ab" * 32)
CLAIM = Claim.make(KEY, Scheme(), (CARRIER,))
FOUND = Evidence(
    repo="acme/vit-cats",
    revision="0123456789abcdef0123456789abcdef01234567",
    verdict="found",
    log10_p=-18.4327,
    alpha=1e-6,
    bits=64,
    matched=63,
    tries=3,
    reading="raw",
    scheme=Scheme().name,
    carriers=(CARRIER.name,),
    key_fingerprint=KEY.fingerprint,
    committed_at="89abcdef0123456789abcdef0123456789abcdef",
    bytes_read=1_000_000,
    bytes_total=343_000_000,
    seconds=1.25,
    notes=("The classifier was replaced.",),
)
MISSED = dataclasses.replace(FOUND, verdict="not found", log10_p=-0.31, matched=35)
UNTESTED = dataclasses.replace(
    FOUND, verdict="not checked", log10_p=None, matched=None, reading=None, key_fingerprint=None
)


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "rect", "line", "circle", "path", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("evidence", [FOUND, MISSED, UNTESTED])
@pytest.mark.parametrize("claim", [CLAIM, None])
def test_page_is_whole_and_self_contained(evidence, claim):
    text = html_report(evidence, claim)
    page = Page(text)
    assert text.startswith("<!doctype html>\n<html lang=")
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.seen)
    fetching = {"href", "src", "srcset", "action", "data", "background"}
    assert not [a for a in page.attributes if a[1] in fetching or a[1].startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert page.seen.count("h1") == 1
    assert page.seen.count("svg") == 2 * (evidence is not UNTESTED)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labelled = [value for _, name, value in page.attributes if name == "aria-labelledby"]
    assert set(" ".join(labelled).split()) == set(ids)


def test_words():
    page = Page(html_report(FOUND, CLAIM))
    words = " ".join(page.words.split())
    assert "Found This model agrees with the key far better than chance allows." in words
    assert "A chance of 1 in 1018 that an unrelated model agrees this well." in words
    assert "10<sup>18</sup>" in html_report(FOUND, CLAIM)
    assert "calling 61 tosses of a coin" in words  # 2^61 < 10^18.43 < 2^62
    assert "all 3 readings" in words
    assert "this model: 63 of 64" in words
    assert "does not show who made the training data" in words
    assert "The classifier was replaced." in words
    assert "verified owner" not in words.lower()
    assert "Not found This model does not agree" in " ".join(
        Page(html_report(MISSED)).words.split()
    )
    assert "Not checked Ownership was not tested" in " ".join(
        Page(html_report(UNTESTED)).words.split()
    )


@pytest.mark.parametrize("evidence", [FOUND, MISSED, UNTESTED])
def test_raw_json_is_the_evidence(evidence):
    text = html_report(evidence)
    raw = html.unescape(re.findall(r"<pre>(\{.*?\})</pre>", text, re.DOTALL)[0])
    assert json.loads(raw) == evidence.to_dict()
    for name in evidence.to_dict():
        assert f"<small>{name}</small>" in text


def test_command_repeats_the_check():
    words = Page(html_report(dataclasses.replace(FOUND, alpha=1e-9, repo="./my model"))).words
    assert (
        "verify_hub_model './my model' \\\n  --revision 0123456789abcdef0123456789abcdef01234567"
        " \\\n  --alpha 1e-09 \\\n  --key owner.key"
    ) in words


@pytest.mark.parametrize(
    "bad", ["</pre><script>alert(1)</script>", '"><img src=x onerror=y>', "{{ 7*7 }}", "\u202e&lt;"]
)
def test_foreign_values_are_text(bad):
    claim = dataclasses.replace(CLAIM, owner=bad, commitment=bad, public_key=bad)
    evidence = dataclasses.replace(
        FOUND, repo=bad, revision=bad, carriers=(bad,), scheme=bad, notes=(bad,), committed_at=bad
    )
    page, clean = Page(html_report(evidence, claim)), Page(html_report(FOUND, CLAIM))
    different = {tag for tag in page.seen if page.seen.count(tag) != clean.seen.count(tag)}
    assert different <= {"p", "strong"}  # the note that the keys differ
    assert bad in page.words


def test_secret_carriers_come_with_a_warning():
    secret = Claim.make(KEY, Scheme(), (CARRIER,), secret_carriers=True)
    assert "Do not publish it" in html_report(FOUND, secret.public)
    assert "Do not publish it" not in html_report(FOUND, CLAIM)


def test_another_key_is_told():
    other = dataclasses.replace(FOUND, key_fingerprint=KEY.for_recipient("x").fingerprint)
    assert "is not the key of this claim" in html_report(other, CLAIM)
    assert "is not the key of this claim" not in html_report(FOUND, CLAIM)


@settings(max_examples=60, deadline=None)
@given(
    log10_p=st.one_of(st.floats(-1e308, 0), st.floats(-400, 0), st.just(float("-inf"))),
    log10_alpha=st.floats(-300, -0.01),
    bits=st.integers(0, 4096),
    share=st.floats(0, 1),
)
def test_figures_stay_in_their_frame(log10_p, log10_alpha, bits, share):
    evidence = dataclasses.replace(
        FOUND, log10_p=log10_p, alpha=10**log10_alpha, bits=bits, matched=int(bits * share)
    )
    page = Page(html_report(evidence))
    for _, name, value in page.attributes:
        if name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(value) <= 640
    for numbers in re.findall(r'd="([^"]*)"', html_report(evidence)):
        pairs = [point.split(",") for point in re.findall(r"[-\d.]+,[-\d.]+", numbers)]
        assert all(0 <= float(x) <= 640 and -1 <= float(y) <= 97 for x, y in pairs)


@given(st.floats(-1e6, 0))
def test_rounding_goes_towards_chance(log10_p):
    assert log10_p <= rounded_up(log10_p) < log10_p + 0.0101


def test_chances_beyond_words():
    assert chance_in_words(-18.4) == "1 in 10^18"
    assert len(chance_in_words(-1e308)) < 40
    assert len(chance_in_words(float("-inf"))) < 40


@given(st.text())
def test_markdown_text_is_one_plain_line(text):
    shown = markdown_text(text)
    assert len(shown.splitlines()) <= 1
    assert not set("<>|`*[]{}\\$") & set(shown)
    assert html.unescape(shown).split() == markdown_words(text) or "&" in text


def markdown_words(text: str) -> list[str]:
    return "".join(sign if sign.isprintable() else " " for sign in text).split()
