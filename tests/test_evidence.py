"""Claims that cannot be edited, borrowed or garbled; evidence in the contract's JSON."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_watermark import Claim, Evidence, OwnerKey, Scheme
from hf_watermark.errors import ClaimError
from hf_watermark.evidence import CLAIM_FILE, CLAIM_FORMAT, ClaimedCarrier, canonical_json

KEY = OwnerKey(bytes(range(32)), "acme")
THIEF = OwnerKey(b"\x07" * 32, "acme")
CARRIERS = (
    ClaimedCarrier("vit.encoder.layer.0.intermediate.dense.weight", (64, 32), "F32", "0a" * 32),
    ClaimedCarrier("conv.weight", (16, 8, 3, 3), "BF16", "ff" * 32),
)
CLAIM = Claim.make(KEY, Scheme(), CARRIERS)
SECRET = Claim.make(KEY, Scheme(), CARRIERS, secret_carriers=True)

SIGNATURE = (
    "f00ddd0834bd1fe054a062e51d66ee815151d1c3eb790c887c20d056e7e29d88"
    "361b3a65fa128d39499d0cbcfd01bec1ddfb12a4225401ead0083f850130030b"
)
# `watermark.json` as version 1 wrote it: every later version must verify it.
RELEASED = """{
  "format": "hf-watermark/1",
  "scheme": "spread-random-64-projection-auto-soft",
  "owner": "acme",
  "carriers": [
    {
      "name": "vit.encoder.layer.0.intermediate.dense.weight",
      "shape": [
        64,
        32
      ],
      "dtype": "F32",
      "sha256": "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"
    },
    {
      "name": "conv.weight",
      "shape": [
        16,
        8,
        3,
        3
      ],
      "dtype": "BF16",
      "sha256": "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
    }
  ],
  "commitment": "3aeda8d9cee2e2c8a073cabab36af5c0c80750ce8d4cff6d902043cec8809605",
  "public_key": "ed5a86135dec405f07fd0747b919ea7452cdca0b462ab5b165b05156ff4e3ee2",
  "signature": "@"
}
""".replace("@", SIGNATURE)

lines = st.text(max_size=200).filter(str.isprintable)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
claimed = st.builds(
    ClaimedCarrier,
    st.text(min_size=1, max_size=30).filter(str.isprintable),
    st.lists(st.integers(1, 2**31 - 1), min_size=2, max_size=5).map(tuple),
    st.sampled_from(["F32", "BF16", "F16", "F8_E4M3"]),
    digests,
)


@st.composite
def claims(draw) -> Claim:
    return Claim.make(
        OwnerKey(draw(st.binary(min_size=32, max_size=32)), draw(lines)),
        Scheme(bits=draw(st.integers(1, 4096)), strength=draw(st.sampled_from([None, 0.05]))),
        tuple(draw(st.lists(claimed, min_size=1, max_size=4))),
        secret_carriers=draw(st.booleans()),
    )


# Round trips and signatures -----------------------------------------------------------------------


def test_a_released_claim_verifies():
    claim = Claim.from_bytes(RELEASED.encode(), "here")
    claim.check("here")
    assert claim == CLAIM
    assert claim.commits_to(KEY)
    assert CLAIM.to_bytes().decode() == RELEASED
    assert (CLAIM_FILE, CLAIM_FORMAT) == ("watermark.json", "hf-watermark/1")


@given(claims())
@settings(max_examples=50, deadline=None)
def test_round_trip_and_signature(claim):
    for copied in (claim, claim.public):
        again = Claim.from_bytes(copied.to_bytes(), "")
        assert again == copied
        again.check("")
    assert claim.public.public == claim.public
    assert claim.public.signature == claim.signature


def test_the_signature_is_over_the_canonical_public_form():
    """Written out, so that a verifier in another language knows what to hash."""
    for claim in (CLAIM, SECRET):
        fields = json.loads(claim.public.to_bytes())
        signature = bytes.fromhex(fields.pop("signature"))
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(claim.public_key))
        public.verify(signature, b"hf-watermark/1 claim\n" + text.encode())


def test_layout_does_not_matter_to_the_signature():
    fields = json.loads(CLAIM.to_bytes())
    for content in (
        json.dumps(fields, indent=None),
        json.dumps(dict(reversed(fields.items())), indent=7),
        json.dumps(fields, ensure_ascii=True).replace(": ", ":\r\n"),
    ):
        again = Claim.from_bytes(content.encode(), "")
        again.check("")
        assert again == CLAIM


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.recursive(st.none() | st.integers() | texts, st.lists, max_leaves=5), st.randoms())
@settings(deadline=None)
def test_canonical_json_is_one_spelling(value, generator):
    fields = {"b": value, "a": 1, "é": [value, {"z": 0, "y": value}]}
    items = list(fields.items())
    generator.shuffle(items)
    content = canonical_json(dict(items))
    assert content == canonical_json(fields)
    assert json.loads(content) == fields


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_has_no_numbers_that_json_has_not(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [value]})


# Edits --------------------------------------------------------------------------------------------


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        yield path
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))
    else:
        yield path


def at(value, path):
    for step in path:
        value = value[step]
    return value


def put(fields, path, new):
    edited = copy.deepcopy(fields)
    at(edited, path[:-1])[path[-1]] = new
    return edited


def passes(content: bytes) -> bool:
    """Whether a reader without any key would take it for signed."""
    try:
        Claim.from_bytes(content, "there").check("there")
    except ClaimError:
        return False
    return True


def edits_of(value):
    yield from (None, True, 5, -1, 2.5, [], {}, "", "x", [value], str(value) + " ")
    if isinstance(value, str):
        yield value[:-1]
        yield value[:-1] + ("0" if value[-1] != "0" else "1")
        yield value.upper()
        yield "0" * len(value)
    if isinstance(value, int):
        yield value + 1
        yield float(value)
    if isinstance(value, list):
        yield value[::-1]
        yield value[:-1]
        yield [*value, value[-1] if value else 8]


@pytest.mark.parametrize("path", list(leaves(json.loads(RELEASED))), ids=str)
def test_every_edit_of_a_claim_is_noticed(path):
    fields = json.loads(RELEASED)
    value = at(fields, path)
    for new in edits_of(value):
        if type(new) is type(value) and new == value:
            continue
        assert not passes(json.dumps(put(fields, path, new)).encode()), new


def test_every_field_is_needed():
    fields = json.loads(CLAIM.to_bytes())
    for name in fields:
        assert not passes(json.dumps({k: v for k, v in fields.items() if k != name}).encode())
    for name in fields["carriers"][0]:
        edited = copy.deepcopy(fields)
        del edited["carriers"][0][name]
        assert not passes(json.dumps(edited).encode())


@pytest.mark.parametrize(
    "edit",
    [
        {"scheme": "spread-random-32-projection-auto-soft"},
        {"scheme": "spread-random-064-projection-auto-soft"},
        {"owner": "thief"},
        {"owner": ""},
        {"carriers": []},
        {"carriers_commitment": "0" * 64},
        {"carriers": [], "carriers_commitment": "0" * 64},
        {"public_key": THIEF.public_key},
        {"public_key": "0" * 64},
        {"public_key": "01" + "0" * 62},
        {"commitment": THIEF.commitment},
        {"signature": "0" * 128},
        {"signature": THIEF.sign(CLAIM._signed_bytes())},
        {"signature": KEY.sign(b"")},
    ],
)
def test_meaningful_edits_are_noticed(edit):
    assert not passes(json.dumps(json.loads(CLAIM.to_bytes()) | edit).encode())


def test_carriers_in_another_order_are_another_claim():
    fields = json.loads(CLAIM.to_bytes())
    assert not passes(json.dumps(fields | {"carriers": fields["carriers"][::-1]}).encode())


def test_what_is_not_part_of_a_claim_is_dropped():
    """Nothing unsigned is ever read: unknown names carry nothing, and the last of a name counts."""
    fields = json.loads(CLAIM.to_bytes()) | {"note": "trust me", "carriers_commitment": None}
    assert Claim.from_bytes(json.dumps(fields).encode(), "") == CLAIM
    twice = CLAIM.to_bytes().replace(b'"owner": "acme"', b'"owner": "acme", "owner": "thief"')
    assert b"thief" in twice
    assert not passes(twice)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{" * 9_999]
)
def test_what_is_no_claim(content):
    with pytest.raises(ClaimError, match="The claim in org/repo is unreadable"):
        Claim.from_bytes(content, "org/repo")


@pytest.mark.parametrize("version", ["hf-watermark/2", "hf-watermark", "", "x" * 10_000, "\x1b[2J"])
def test_other_formats_are_named(version):
    content = json.dumps(json.loads(CLAIM.to_bytes()) | {"format": version}).encode()
    with pytest.raises(ClaimError, match="another format") as refused:
        Claim.from_bytes(content, "org/repo")
    assert len(str(refused.value)) < 300
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "a\nFOUND", "\ud800", "\u202eemca", "x" * 1000, "a\tb", "\x00", "\u2028"]
)
def test_texts_that_could_fool_a_terminal_are_refused(text):
    fields = json.loads(CLAIM.to_bytes())
    for path in (("owner",), ("carriers", 0, "name"), ("carriers", 0, "dtype"), ("scheme",)):
        with pytest.raises(ClaimError, match="unreadable"):
            Claim.from_bytes(json.dumps(put(fields, path, text)).encode(), "")


@pytest.mark.parametrize(
    "shape",
    [[], [64], [2] * 6, [0, 8], [-1, 8], [True, 8], [8.0, 8], ["8", 8], [2**31, 8], [10**30, 8], 8],
)
def test_shapes_that_no_carrier_has(shape):
    fields = put(json.loads(CLAIM.to_bytes()), ("carriers", 0, "shape"), shape)
    with pytest.raises(ClaimError, match="unreadable"):
        Claim.from_bytes(json.dumps(fields).encode(), "")


def test_too_many_carriers():
    fields = json.loads(CLAIM.to_bytes())
    fields["carriers"] = fields["carriers"][:1] * 10_001
    with pytest.raises(ClaimError, match="unreadable"):
        Claim.from_bytes(json.dumps(fields).encode(), "")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{"format": "hf-watermark/1", "carriers": {}}')
@example(b'{"format": "hf-watermark/1", "scheme": "\\ud800"}')
@settings(deadline=None)
def test_hostile_bytes_raise_a_claim_error_and_nothing_else(content):
    with pytest.raises(ClaimError):
        Claim.from_bytes(content, "org/repo")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_claims_raise_a_claim_error_and_nothing_else(data):
    fields = json.loads((SECRET if data.draw(st.booleans()) else CLAIM).to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path in leaves(fields) if path]))
        fields = put(fields, path, data.draw(json_values))
    try:
        claim = Claim.from_bytes(json.dumps(fields).encode(), "org/repo")
    except ClaimError:
        return
    # What was read can be worked with: written, checked, compared, scheme and shapes used.
    assert Claim.from_bytes(claim.to_bytes(), "") == claim
    assert not claim.commits_to(THIEF)
    assert Scheme.from_name(claim.scheme).name == claim.scheme
    assert all(carrier.carrier.weights > 0 for carrier in claim.carriers)
    assert claim.owner.isprintable()
    try:
        claim.check("org/repo")
    except ClaimError:
        return
    assert claim.public == (SECRET if claim.carriers_commitment else CLAIM).public


@given(st.integers(0, len(RELEASED) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte(place, byte):
    content = bytearray(CLAIM.to_bytes())
    content[place] = byte
    try:
        claim = Claim.from_bytes(bytes(content), "")
        claim.check("")
    except ClaimError:
        return
    assert claim == CLAIM  # white space


def test_truncated_claims():
    content = CLAIM.to_bytes()
    for size in range(len(content) - 2):
        assert not passes(content[:size])


# Whose it is --------------------------------------------------------------------------------------


def test_a_claim_commits_to_its_key_alone():
    assert CLAIM.commits_to(KEY)
    assert CLAIM.commits_to(OwnerKey(bytes(range(32)), "another name"))
    assert not CLAIM.commits_to(THIEF)
    assert not CLAIM.commits_to(KEY.for_recipient("a"))
    assert Claim.make(KEY.for_recipient("a"), Scheme(), CARRIERS).commits_to(KEY.for_recipient("a"))


def test_a_foreign_commitment_under_ones_own_signature_is_nobodys():
    """A commitment is public: a thief can copy it, and sign it with a key of their own."""
    stolen = dataclasses.replace(
        CLAIM, commitment=KEY.commitment, public_key=THIEF.public_key, signature=""
    )
    stolen = dataclasses.replace(stolen, signature=THIEF.sign(stolen._signed_bytes()))
    stolen.check("the thief's repo")
    assert not stolen.commits_to(KEY)
    assert not stolen.commits_to(THIEF)
    other = dataclasses.replace(CLAIM, commitment=THIEF.commitment)
    assert not other.commits_to(KEY)
    assert not other.commits_to(THIEF)


def test_a_claim_tells_nothing_of_the_secret():
    secret = bytes(range(32))
    for claim in (CLAIM, SECRET):
        for text in (repr(claim), claim.to_bytes().decode()):
            assert secret.hex()[:16] not in text
            assert KEY.stream("identity/ed25519", 32).hex()[:16] not in text


# Secret carriers ----------------------------------------------------------------------------------


def test_the_public_copy_names_nothing():
    public = SECRET.public
    content = public.to_bytes().decode()
    for carrier in CARRIERS:
        assert carrier.name not in content
        assert carrier.sha256 not in content
    assert json.loads(content)["carriers"] == []
    assert (public.hides_carriers, SECRET.hides_carriers, CLAIM.hides_carriers) == (
        True,
        False,
        False,
    )
    assert public.signature == SECRET.signature != CLAIM.signature
    for claim in (public, SECRET):
        claim.check("")
        claim.check_secret_carriers(KEY, "")
        assert claim.commits_to(KEY)
    assert CLAIM.public is CLAIM
    CLAIM.check_secret_carriers(THIEF, "")  # nothing is secret


def test_the_commitment_to_carriers_cannot_be_guessed():
    """Names and shapes of known models are few: without a salt of the key's a list would do."""
    listed = canonical_json([carrier.to_dict() for carrier in CARRIERS])
    assert SECRET.carriers_commitment != hashlib.sha3_256(listed).hexdigest()
    salt = KEY.stream("claim/carriers", 32)
    assert SECRET.carriers_commitment == hashlib.sha3_256(salt + listed).hexdigest()
    other = Claim.make(THIEF, Scheme(), CARRIERS, secret_carriers=True)
    assert other.carriers_commitment != SECRET.carriers_commitment


@pytest.mark.parametrize(
    "carriers",
    [
        CARRIERS[::-1],
        CARRIERS[:1],
        (*CARRIERS, CARRIERS[0]),
        (dataclasses.replace(CARRIERS[0], name="other.weight"), CARRIERS[1]),
        (dataclasses.replace(CARRIERS[0], shape=(32, 64)), CARRIERS[1]),
        (dataclasses.replace(CARRIERS[0], sha256="00" * 32), CARRIERS[1]),
        (dataclasses.replace(CARRIERS[0], dtype="F16"), CARRIERS[1]),
    ],
)
def test_an_owners_copy_lists_what_the_public_one_committed_to(carriers):
    edited = Claim.from_bytes(dataclasses.replace(SECRET, carriers=carriers).to_bytes(), "")
    edited.check("")  # the public form is untouched
    with pytest.raises(ClaimError, match="other carriers than it committed to"):
        edited.check_secret_carriers(KEY, "")
    with pytest.raises(ClaimError):
        SECRET.check_secret_carriers(THIEF, "")


@pytest.mark.parametrize("commitment", ["0" * 64, None, "", "0" * 63, 5])
def test_the_commitment_to_carriers_is_signed(commitment):
    for claim in (SECRET, SECRET.public):
        fields = json.loads(claim.to_bytes()) | {"carriers_commitment": commitment}
        assert not passes(json.dumps(fields).encode())


# Evidence -----------------------------------------------------------------------------------------

EVIDENCE = Evidence(
    repo="org/repo",
    revision="a" * 40,
    verdict="found",
    log10_p=-118.25,
    alpha=1e-6,
    bits=64,
    matched=63,
    tries=7,
    reading="raw",
    scheme=Scheme().name,
    carriers=("a.weight", "b.weight"),
    key_fingerprint=KEY.fingerprint,
    committed_at="b" * 40,
    bytes_read=1_234,
    bytes_total=5_678,
    seconds=0.123456,
    notes=("a remark",),
)
NOT_CHECKED = dataclasses.replace(
    EVIDENCE,
    revision=None,
    verdict="not checked",
    log10_p=None,
    matched=None,
    tries=0,
    reading=None,
    key_fingerprint=None,
    committed_at=None,
)

CONTRACT = [
    "repo",
    "revision",
    "verdict",
    "log10_p",
    "alpha",
    "bits",
    "matched",
    "tries",
    "reading",
    "scheme",
    "carriers",
    "key_fingerprint",
    "committed_at",
    "bytes_read",
    "bytes_total",
    "seconds",
    "format_version",
]


@pytest.mark.parametrize("evidence", [EVIDENCE, NOT_CHECKED])
def test_json_has_exactly_the_keys_of_the_contract(evidence):
    assert list(evidence.to_dict()) == CONTRACT
    assert list(json.loads(evidence.to_json())) == CONTRACT
    assert "\n" not in evidence.to_json()
    assert "a remark" not in evidence.to_json()


def test_json_by_value():
    assert EVIDENCE.to_dict() == {
        "repo": "org/repo",
        "revision": "a" * 40,
        "verdict": "found",
        "log10_p": -118.25,
        "alpha": 1e-6,
        "bits": 64,
        "matched": 63,
        "tries": 7,
        "reading": "raw",
        "scheme": "spread-random-64-projection-auto-soft",
        "carriers": ["a.weight", "b.weight"],
        "key_fingerprint": "d6fc6b9894145c52",
        "committed_at": "b" * 40,
        "bytes_read": 1_234,
        "bytes_total": 5_678,
        "seconds": 0.123,
        "format_version": 1,
    }
    assert json.loads(EVIDENCE.to_json()) == EVIDENCE.to_dict()


@given(st.none() | st.floats(max_value=0.0, allow_nan=False), st.floats(0.0, 1e9))
@settings(deadline=None)
def test_json_is_finite_and_keeps_the_number(log10_p, seconds):
    evidence = dataclasses.replace(EVIDENCE, log10_p=log10_p, seconds=seconds)
    fields = json.loads(evidence.to_json(), parse_constant=pytest.fail)
    expected = -1e308 if log10_p == -math.inf else log10_p
    assert fields["log10_p"] == expected
    assert log10_p is None or fields["log10_p"] >= log10_p  # never more flattering


@pytest.mark.parametrize("log10_p", [math.nan, math.inf])
def test_a_p_value_that_is_none_is_never_told_as_one(log10_p):
    evidence = dataclasses.replace(EVIDENCE, log10_p=log10_p)
    with pytest.raises(ValueError, match="JSON"):
        evidence.to_json()


def test_verdict_and_error_rate():
    assert EVIDENCE.found is True
    assert EVIDENCE.ber == pytest.approx(1 / 64)
    assert (NOT_CHECKED.found, NOT_CHECKED.ber) == (False, None)
    missing = dataclasses.replace(EVIDENCE, verdict="not found", matched=0)
    assert (missing.found, missing.ber) == (False, 1.0)


def test_records_are_values():
    for record, field in ((EVIDENCE, "log10_p"), (CLAIM, "owner"), (CARRIERS[0], "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, None)
        assert hash(record) == hash(copy.deepcopy(record))
    EVIDENCE.to_dict()["carriers"].append("x")
    assert EVIDENCE.to_dict()["carriers"] == ["a.weight", "b.weight"]
