"""The YAML of a card, edited as text; test_card.py holds the laws of whole cards."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_watermark.evidence import CLAIM_FORMAT
from hf_watermark.front_matter import line_break_of, parse, split_card, with_keys, without_keys

FIELDS = {"format": CLAIM_FORMAT, "log10_p": -18.43}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("tags: [a, b]  # c\n", "tags: [a, b, watermark]  # c\n"),
        ("tags: []\n", "tags: [watermark]\n"),
        ("tags:\n- a # c\n", "tags:\n- a # c\n- watermark\n"),
        ("tags:\n    - 'a'\n", "tags:\n    - 'a'\n    - 'watermark'\n"),
        ("tags:\nb: 1\n", "tags:\n- watermark\nb: 1\n"),
        ("tags: a # c\n", "tags: # hf-watermark: was a # c\n- a\n- watermark\n"),
        ("tags: ~\n", "tags: # hf-watermark: was ~\n- watermark\n"),
        ("tags:\n- watermark\n- b\n", "tags:\n- watermark\n- b\n"),
        ("tags: watermark\n", "tags: watermark\n"),
    ],
)
def test_tags_keep_their_style(tags, expected):
    front = with_keys(tags, FIELDS, "\n")
    assert front == f"{expected}watermark:\n  format: hf-watermark/1\n  log10_p: -18.43\n"
    assert with_keys(front, FIELDS, "\n") == front
    if "watermark" not in (parse(tags)["tags"] or ()):
        assert without_keys(front) == tags


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("-a: \t\r\n\ufeff"), max_size=40))
@example("\ufeff---\r\na: 1\r\n---\r\n# Title\r\n")
@example("---\n---\n# Two rules, no front matter\n")
def test_the_parts_of_a_card_joined_are_the_card(text):
    parts = split_card(text)
    assert "".join(parts) == text
    assert any(parts[1:4]) == all(parts[1:4])


@pytest.mark.parametrize(
    ("text", "expected"), [("a\r\nb\n", "\r\n"), ("a\nb\r\n", "\n"), ("a\rb", "\n"), ("", "\n")]
)
def test_line_break(text, expected):
    assert line_break_of(text) == expected
