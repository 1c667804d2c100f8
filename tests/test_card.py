from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_watermark.card import (
    BEGIN,
    END,
    read_card,
    updated_card,
    without_watermark,
)
from hf_watermark.errors import CardError, WatermarkError
from hf_watermark.evidence import CLAIM_FORMAT, Claim, ClaimedCarrier, Evidence
from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme

KEY = OwnerKey(bytes(range(32)), "acme")
CARRIERS = tuple(
    ClaimedCarrier(
        f"vit.encoder.layer.{i}.attention.output.dense.weight", (768, 768), "F32", f"{i:02x}" * 32
    )
    for i in range(12)
)
CLAIM = Claim.make(KEY, Scheme(), CARRIERS)
EVIDENCE = Evidence(
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
    carriers=tuple(carrier.name for carrier in CARRIERS),
    key_fingerprint=KEY.fingerprint,
    committed_at="89abcdef0123456789abcdef0123456789abcdef",
    bytes_read=1_000_000,
    bytes_total=343_000_000,
    seconds=1.25,
)
LATER = dataclasses.replace(EVIDENCE, log10_p=-33.0, revision=None, matched=64)
UNTESTED = dataclasses.replace(
    EVIDENCE, verdict="not checked", log10_p=None, matched=None, reading=None, key_fingerprint=None
)
SECRET_CLAIM = Claim.make(KEY, Scheme(), CARRIERS, secret_carriers=True)

GOLDEN = Path(__file__).parent.parent / "model_cards"


def update(text: str | None, evidence: Evidence = EVIDENCE, claim: Claim | None = CLAIM) -> str:
    return updated_card(text, evidence, claim)


def front_matter(card: str) -> dict:
    match = re.match(r"\ufeff?\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1] + "\n")


def section(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END) + len(END)]


# Golden cards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "evidence", "claim"),
    [
        ("new-card.md", None, EVIDENCE, CLAIM),
        ("user-card.md", "user-card.input.md", EVIDENCE, CLAIM),
        ("not-tested-card.md", None, UNTESTED, SECRET_CLAIM.public),
    ],
)
def test_golden(name, source, evidence, claim):
    text = None if source is None else (GOLDEN / source).read_bytes().decode()
    card = updated_card(text, evidence, claim)
    if os.environ.get("HF_WATERMARK_REGENERATE"):
        (GOLDEN / name).write_bytes(card.encode())
    assert card == (GOLDEN / name).read_bytes().decode()
    assert updated_card(card, evidence, claim) == card
    if text is not None:
        assert without_watermark(card) == text


# Laws ------------------------------------------------------------------------------------------

TAGS = [
    "",
    "tags:\n",
    "tags:   \n",
    "tags: # none yet\n",
    "tags: []\n",
    "tags: [ ]  # none\n",
    "tags: [vision, 'vit']\n",
    "tags: [vision,\n  vit, # the model\n  ]  # end\n",
    'tags: ["a, b", "#c"]\n',
    "tags:\n- vision\n- vit # the model\n",
    "tags:\n  - vision\n  # a comment in between\n\n  - 'vit'\n  # and one at the end\n",
    'tags:\n    -   "vision"\n',
    '"tags":\n- vision\n',
    "'tags' : [vision]\n",
    "tags:\n# before\n- vision\n-   vit\n",
    "tags: vision # one\n",
    "tags: 'vision, vit'\n",
    "tags: a, b\n",
    "tags: 2024\n",
    "tags:\n  vision\n",
    "tags: ~\n",
    "tags: null # later\n",
    "tags: ''\n",
    "tags:\n- |\n  block\n",
    "tags:\n- >-\n  folded\n  scalar\n",
    "tags:\n- watermarked\n",
    "tags:\n- name: x\n  deep: [1]\n",
]
PARTS = [
    "license: mit\n",
    "# by hand\n",
    "\n",
    "thumbnail:\n",
    "version: 1.10\n",
    "language:\n- en\n- no\n",
    'pretty_name: "Café 🐱: \\"x\\""\n',
    "widget: [{src: a.jpg}, {src: b.jpg}]\n",
    "inference: false   # costs\n",
    "description: |\n  two\n   lines\n\n\n",
    "keep: |+\n  kept\n\n",
    "folded: >-\n  a\n  b\n",
    "long: a plain scalar\n  that goes on\n",
    "model-index:\n- name: x\n  results:\n  - task: {type: t}\n    metrics:\n    - value: 0.910\n",
    "date: 2024-01-02\n",
    "nan: .nan\n",
    "yes: on\n",
    "7: seven\n",
]
BODIES = st.one_of(
    st.sampled_from(
        [
            "",
            "# Title\n\nText.\n",
            "\n# Title\n\n---\n\nrule above\n",
            "no end of line",
            "```\nopen fence\n",
            "\n\n\n",
            "<!-- a comment -->\n",
            "tail\\\n",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
)


@st.composite
def front_matters(draw):
    parts = draw(st.lists(st.sampled_from(PARTS), unique=True, max_size=6))
    tags = draw(st.sampled_from(TAGS))
    parts.insert(draw(st.integers(0, len(parts))), tags)
    text = "".join(parts)
    if draw(st.booleans()):
        text = "".join(f"  {line}" for line in text.splitlines(keepends=True))
    return text


@st.composite
def cards(draw):
    body = draw(BODIES)
    if draw(st.booleans()):
        front = draw(front_matters()) or "\n"
        body = f"---\n{front}---{draw(st.sampled_from(['', ' ', '   ']))}\n{body}"
    if draw(st.booleans()):
        body = body.replace("\r\n", "\n").replace("\n", "\r\n")
    return draw(st.sampled_from(["", "", "\ufeff"])) + body


def lawful(text: str) -> None:
    card = update(text)
    assert update(card) == card
    assert without_watermark(card) == text
    again = update(card, LATER)
    assert without_watermark(again) == text
    assert update(again) == card
    assert again.replace(section(again), "").count(BEGIN) == 0
    data = front_matter(card)
    assert data["watermark"] == read_card(card)
    assert "watermark" in data["tags"]
    assert card.startswith("\ufeff") == text.startswith("\ufeff")
    if "\n" not in text.replace("\r\n", "") and "\r\n" in text:
        assert "\n" not in card.replace("\r\n", "")


@settings(max_examples=150, deadline=None)
@given(cards())
@example("x")
@example("x\r")
@example("a\nb\r")
@example("a\r\nb\nc")
@example("---\n\n---\n")
@example("---\n\n---")
@example("---\n---\n# Two rules, no front matter\n")
@example("\n\n---\nlicense: mit\n---\n")
@example("---\ntags: []\n---")
@example("---\nlicense: mit\r\n---\nx")
def test_laws(text):
    if not text.strip("\ufeff \t\r\n"):
        assert update(text) == update(None)
        return
    try:
        front = read_or_none(text)
    except CardError:
        with pytest.raises(CardError):
            update(text)
        return
    lawful(text)
    if front is not None:  # nothing of the user's was lost or moved
        mine = {k: v for k, v in front_matter(update(text)).items() if k in front and k != "tags"}
        assert repr(mine) == repr({k: v for k, v in front.items() if k != "tags"})


def read_or_none(text: str) -> dict | None:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(text.removeprefix("\ufeff"))
    if match is None:
        return None
    try:
        data = yaml.safe_load(match[2] + "\n")
    except (yaml.YAMLError, ValueError):
        raise CardError("invalid") from None
    if data is not None and not isinstance(data, dict):
        raise CardError("no mapping")
    return data or {}


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("around", [("", ""), ("license: mit\n", "base_model: x\n"), ("# c\n", "")])
@pytest.mark.parametrize("tags", TAGS)
def test_laws_for_every_form_of_tags(tags, around, line_break):
    front = around[0] + tags + around[1] or "\n"
    text = f"---\n{front}---\n# Title\n".replace("\n", line_break)
    lawful(text)
    old, new = front_matter(text) or {}, front_matter(update(text))
    before = old.get("tags")
    before = [] if before in (None, "") else before if isinstance(before, list) else [before]
    assert new["tags"] == [*before, "watermark"]
    for line in around:
        assert line.replace("\n", line_break) in update(text)
    kept = [line for line in text.split(line_break) if "tags" not in line]
    lines = iter(update(text).split(line_break))
    if not isinstance(old.get("tags"), str | int) and "~" not in tags and "[" not in tags:
        assert all(line in lines for line in kept)  # an ordered subset


def test_second_run_replaces_in_place():
    card = update("---\nlicense: mit\n---\n# Title\n")
    card = card.replace("---\n# Title", "later: key # mine\n---\n# Title") + "\nAdded below.\n"
    again = update(card, LATER)
    assert again.index("watermark:") < again.index("later: key # mine") < again.index("# Title")
    assert again.endswith(f"{END}\n\nAdded below.\n")
    assert read_card(again)["log10_p"] == -33.0
    assert "revision" not in read_card(again)
    assert without_watermark(again) == (
        "---\nlicense: mit\nlater: key # mine\n---\n# Title\n\n\nAdded below.\n"
    )


def test_flow_mapping_of_ours_is_replaced():
    card = update("---\nlicense: mit\n---\nx\n")
    head, rest = card.split("watermark:\n", 1)
    flow = f"{head}watermark: {{format: hf-watermark/1, log10_p: -1}} # reformatted\ntags:\n"
    assert update(flow + rest.split("tags:\n", 1)[1]) == card


@pytest.mark.parametrize(
    "front",
    [
        "{license: mit, tags: [a]}\n",
        "base: &b [x]\ntags: *b\n",
        "tags: &t [a]\nother: *t\n",
        "? tags\n: - a\n",
        "tags: |\n  several\n  lines\n",
        "a: 1\n...\n",
    ],
)
def test_rare_yaml_keeps_its_data(front):
    text = f"---\n{front}---\n# Title\n"
    card = update(text)
    old, new = yaml.safe_load(front), front_matter(card)
    assert new.pop("watermark") == read_card(card)
    new_tags, old_tags = new.pop("tags"), old.pop("tags", [])
    assert new_tags == [*(old_tags if isinstance(old_tags, list) else [old_tags]), "watermark"]
    assert new == old
    assert card.split("---\n", 2)[2].startswith("# Title\n")
    assert update(card) == card


def test_aliases_that_explode_are_bounded():
    front = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 40):
        front += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    for end in ("", "tags: *a39\n", "watermark: *a39\n"):
        text = f"---\n{front}{end}---\n"
        assert read_card(text) is None
        if end.startswith("watermark"):
            with pytest.raises(CardError, match="another kind"):
                update(text)
        else:
            assert read_card(update(text)) is not None


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "front",
    [
        "a: [1\n",
        "a: b: c\n",
        "\tx: 1\n",
        "just words\n",
        "- a\n- b\n",
        "a: 2024-13-45\n",
        "a: !!python/object:os.system {}\n",
        "a: !!bool maybe\n",
        "a: " + "[" * 5000 + "\n",
        "a: *nowhere\n",
        "tags: {a: b}\n",
        "watermark: true\n",
        "watermark: {by: us}\n",
    ],
)
def test_bad_front_matter_is_refused(front):
    with pytest.raises(CardError, match=r"README\.md") as caught:
        update(f"---\n{front}---\n# Title\n")
    assert isinstance(caught.value, WatermarkError)
    assert caught.value.do
    assert read_card(f"---\n{front}---\n# Title\n") in (None, {"by": "us"})


@pytest.mark.parametrize(
    "body",
    [
        BEGIN,
        END,
        f"{END}\n{BEGIN}",
        f"{BEGIN}\n{BEGIN}\n{END}\n{END}",
        f"{BEGIN}\n{END}\ntext\n{BEGIN}\n{END}",
        f"{BEGIN}\ntext\n{BEGIN}\n{END}",
    ],
)
def test_damaged_markers_are_refused(body):
    text = f"# Title\n\n{body}\n\nprecious text\n"
    with pytest.raises(CardError, match="markers"):
        update(text)
    with pytest.raises(CardError, match="markers"):
        without_watermark(text)


# The section -----------------------------------------------------------------------------------

HOSTILE = [
    END,
    f"x\n{END}\n# Verified owner",
    "a | b | c",
    "```\n# out",
    "</td></table><script>alert(1)</script>",
    "[click](https://evil.example)",
    "www.evil.example https://evil.example",
    "\u202eevil\u2028line\x00",
    "![x](data:image/png;base64,AA)",
    "**bold** _em_ ~~gone~~ $x$ {{ 7*7 }} {% raw %}",
    "<!--",
    "-->",
    "& &lt;b&gt;",
]


@pytest.mark.parametrize("bad", HOSTILE)
def test_foreign_values_cannot_break_out(bad):
    claim = dataclasses.replace(CLAIM, owner=bad, commitment=bad, public_key=bad)
    evidence = dataclasses.replace(
        EVIDENCE, repo=bad, revision=bad, committed_at=bad, scheme=bad, key_fingerprint=bad
    )
    for text in (None, "# Title\n"):
        card = updated_card(text, evidence, claim)
        assert updated_card(card, evidence, claim) == card
        body = card[re.match(r"---\n.*?\n---\n", card, re.DOTALL).end() :]
        assert body.count(BEGIN) == body.count(END) == 1
        assert "<" not in body.replace(BEGIN, "").replace(END, "")
        lines = section(body).splitlines()
        clean = section(update("# Title\n")).splitlines()
        assert [line[:3] for line in lines if line[:1] in "#`|-"] == [
            line[:3] for line in clean if line[:1] in "#`|-"
        ]
        assert all(line.count("|") in (0, 3) for line in lines)
        assert "](" not in body
        assert "https://" not in re.sub("`[^`]*`", "", body)


@pytest.mark.parametrize("bad", HOSTILE)
def test_foreign_values_render_as_their_own_text(bad):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    card = update("# T\n", claim=dataclasses.replace(CLAIM, owner=bad))
    tokens = markdown.parse(section(card).removeprefix(BEGIN).removesuffix(END))
    row = next(i for i, token in enumerate(tokens) if token.content.startswith("Name given"))
    value = next(token for token in tokens[row + 1 :] if token.type == "inline")
    assert {child.type for child in value.children} <= {"text", "text_special"}
    shown = "".join(child.content for child in value.children)
    assert shown == " ".join("".join(c if c.isprintable() else " " for c in bad).split())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_owner_stays_on_its_line(owner):
    text = section(update("# T\n", claim=dataclasses.replace(CLAIM, owner=owner)))
    plain = section(update("# T\n", claim=dataclasses.replace(CLAIM, owner="x")))
    missing = not "".join(c for c in owner if c.isprintable()).strip()
    assert len(text.splitlines()) == len(plain.splitlines()) - missing


def test_words_and_numbers():
    text = section(update(None))
    assert "a claim, and how to check it" in text
    assert "A chance of **1 in 10^18** that an unrelated model agrees this well" in text
    assert "-18.43" in text  # rounded towards chance
    assert "63 of 64" in text
    assert KEY.fingerprint in text
    assert "verify_hub_model acme/vit-cats --key owner.key" in text
    assert "pip install hf-watermark" in text
    assert "verified owner" not in text.lower()
    assert "copyright" in text
    assert "distillation" in text


def test_rounding_never_flatters():
    for log10_p in (-18.4399, -6.0001, -0.0001, -1234.56789):
        card = update(None, dataclasses.replace(EVIDENCE, log10_p=log10_p))
        assert log10_p <= read_card(card)["log10_p"] <= log10_p + 0.01
    card = update(None, dataclasses.replace(EVIDENCE, log10_p=float("-inf")))
    assert read_card(card)["log10_p"] < -1e9
    assert len(card) < 6000


def test_other_verdicts():
    text = update(None, dataclasses.replace(EVIDENCE, verdict="not found", log10_p=-0.3))
    assert "do not agree with it" in text
    text = update(None, UNTESTED)
    assert "Ownership was not tested" in text
    assert "log10_p" not in read_card(text)
    text = update(None, EVIDENCE, None)
    assert "No claim file" in text
    assert set(read_card(text)) == {"format", "scheme", "log10_p", "revision"}


@pytest.mark.parametrize("claim", [SECRET_CLAIM, SECRET_CLAIM.public])
def test_secret_carriers_and_key_stay_secret(claim):
    card = update(None, claim=claim)
    assert "kept secret" in card
    assert "encoder" not in card
    assert "12" not in re.sub(r"[0-9a-f]{16,}", "", card)
    assert bytes(range(32)).hex() not in card


def test_local_path_is_not_published():
    evidence = dataclasses.replace(EVIDENCE, repo="/home/jane/secret-project/out", revision=None)
    card = update("# Title\n", evidence)
    assert "jane" not in card
    assert "verify_hub_model org/name --key" in card
    assert update(None, evidence).count("secret-project") == 0


def test_other_key_than_the_claims_is_told():
    other = KEY.for_recipient("customer-17")
    card = update(None, dataclasses.replace(EVIDENCE, key_fingerprint=other.fingerprint))
    assert f"Fingerprint of the key tested | `{other.fingerprint}`" in card


# Reading ---------------------------------------------------------------------------------------


def test_read_card_gives_the_contract():
    assert read_card(update("---\nlicense: mit\n---\nx")) == {
        "format": CLAIM_FORMAT,
        "scheme": EVIDENCE.scheme,
        "commitment": KEY.commitment,
        "public_key": KEY.public_key,
        "log10_p": -18.43,
        "revision": EVIDENCE.revision,
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "---\n---\n",
        "---\nwatermark: yes\n---\n",
        "---\nwatermark:\n---\n",
        "---\n[\n---\n",
    ],
)
def test_read_card_of_others(text):
    assert read_card(text) is None


def test_read_card_keeps_plain_values_only():
    text = "---\nwatermark: {format: x, 7: y, deep: {a: b}, list: [1], scheme: null}\n---\n"
    assert read_card(text) == {"format": "x", "scheme": None}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_read_card_never_raises(text):
    read_card(text)
    read_card(f"---\n{text}\n---\n")


def test_without_watermark_leaves_other_cards_alone():
    for text in ("", "x", "---\ntags: [watermark]\n---\nx", "---\nwatermark: true\n---\n"):
        assert without_watermark(text) == text


def test_the_hub_reads_our_cards():
    from huggingface_hub import ModelCard

    text = (GOLDEN / "user-card.input.md").read_bytes().decode()
    data = ModelCard(update(text)).data
    assert data.tags == ["vision", "image-classification", "acme-2026", "watermark"]
    assert data.to_dict()["watermark"]["commitment"] == KEY.commitment
