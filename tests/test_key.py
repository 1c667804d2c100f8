"""The owner's secret: what is derived from it, how it is kept, and that it never shows."""

from __future__ import annotations

import base64
import copy
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import pprint
import stat
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_watermark.key as key_module
from hf_watermark import OwnerKey, WatermarkError
from hf_watermark.errors import KeyFileError
from hf_watermark.key import KeyFileWarning

SECRET = bytes(range(32))
KEY = OwnerKey(SECRET, "acme")
DEFAULT_COST = dict(key_module._SCRYPT)

# Files as version 1 wrote them: every later version must read them.
PLAIN = {
    "format": "hf-watermark-key/1",
    "owner": "acme",
    "fingerprint": "d6fc6b9894145c52",
    "secret": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
}
SEALED = {
    "format": "hf-watermark-key/1",
    "owner": "acme",
    "fingerprint": "d6fc6b9894145c52",
    "encrypted": {
        "kdf": "scrypt",
        "n": 1024,
        "r": 8,
        "p": 1,
        "salt": "5REGUoQE5sTF/fp8eNdaeg==",
        "cipher": "chacha20-poly1305",
        "nonce": "ND59kKQ9Q1O0LSPO",
        "sealed": "YwRRrCxFEchz10veBMdhUlEZSEvAu22Q7J05olVOmPNJM7xpPaay2YiCIA1YKeA4",
    },
}
PASSPHRASE = "correct horse"

secrets = st.binary(min_size=32, max_size=32)


@pytest.fixture(scope="module", autouse=True)
def _cheap_scrypt():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(key_module._SCRYPT, "n", 2**4)
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "acme.key"


def written(path: Path, content: object, mode: int = 0o600) -> Path:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(raw)
    path.chmod(mode)
    return path


def leaks(text: str, secret: bytes) -> bool:
    """Whether eight bytes in a row of the secret can be read in a text, in any usual spelling."""
    text = text.lower()
    for start in range(len(secret) - 7):
        part = secret[start : start + 8]
        spellings = [
            part.hex(),
            part.hex(" "),
            part.hex(":"),
            base64.b64encode(part[: len(part) // 3 * 3]).decode(),
            base64.urlsafe_b64encode(part[: len(part) // 3 * 3]).decode(),
            repr(part)[2:-1],
            ", ".join(str(byte) for byte in part),
        ]
        if any(spelling.lower() in text for spelling in spellings):
            return True
    return False


def everything_said(error: BaseException) -> str:
    parts = [str(error), repr(error), repr(error.args), repr(vars(error))]
    return "\n".join([*parts, *traceback.format_exception(error)])


def test_the_leak_detector_detects():
    for text in (
        SECRET.hex(),
        SECRET.hex().upper(),
        base64.b64encode(SECRET).decode(),
        base64.b64encode(b"x" + SECRET).decode(),
        repr(SECRET),
        str(list(SECRET)),
        SECRET[8:24].hex(" "),
    ):
        assert leaks(f"it is {text}!", SECRET), text
    assert not leaks(f"{KEY.fingerprint} {KEY.commitment} {KEY.public_key}", SECRET)


# Derivation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "start"),
    [
        ("", "b094b676a03f09423bf04ffa2c4b8e5d"),
        ("spread-random/message", "e950aa7e65de669bf88a375debc2f458"),
        ("spread-random/signs/0", "ae3723a72a326c9f7e73a1631827b026"),
        ("spread-random/rows/0", "b2b3fca72cb4277a3cc314563e4e3805"),
        ("identity/ed25519", "fbde3cca1926960dbf7eb42957784298"),
        ("é", "c17e122cb4b093b63cd19d57c1e932b6"),
    ],
)
def test_stream_vectors(label, start):
    assert KEY.stream(label, 16).hex() == start


def test_identity_vectors():
    assert KEY.public_key == "ed5a86135dec405f07fd0747b919ea7452cdca0b462ab5b165b05156ff4e3ee2"
    assert KEY.fingerprint == "d6fc6b9894145c52"
    assert KEY.commitment == "3aeda8d9cee2e2c8a073cabab36af5c0c80750ce8d4cff6d902043cec8809605"
    assert KEY.sign(b"message") == (
        "c9a7cbab13798f21a03fcc63fc1e58eeabad6af9e5202bb9c7087463982b944a"
        "67a1d62c6e49bced7d970b19099da9d82ea01f7d3d426da1466f7a5533005805"
    )


@pytest.mark.parametrize(
    ("name", "fingerprint", "commitment"),
    [
        (
            "customer-17",
            "07720e54b70332c8",
            "0203aa2b5b4c37cdc2e9f790b1ff3f12cb468163f61410b23eebc11289d4a2d0",
        ),
        (
            "客户 ü",
            "a9f701f8ff85d453",
            "a0eea4388ba5b638c10845760670a58960d5539c86045149905b41f49da63aa1",
        ),
    ],
)
def test_recipient_vectors(name, fingerprint, commitment):
    recipient = KEY.for_recipient(name)
    assert (recipient.fingerprint, recipient.commitment) == (fingerprint, commitment)
    assert recipient.owner == "acme"


def prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


def shake(label: str, secret: bytes, size: int) -> bytes:
    hashed = hashlib.shake_256()
    for part in (prefixed(b"hf-watermark/1"), prefixed(label.encode("utf-8")), secret):
        hashed.update(part)
    return hashed.digest(size)


@given(secrets, st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 200))
@settings(deadline=None)
def test_stream_is_shake_256_of_prefixed_label_and_secret(secret, label, size):
    assert OwnerKey(secret).stream(label, size) == shake(label, secret, size)


@given(secrets)
@settings(deadline=None, max_examples=25)
def test_identity_from_hashlib_and_cryptography_alone(secret):
    key = OwnerKey(secret, "somebody")
    signer = Ed25519PrivateKey.from_private_bytes(shake("identity/ed25519", secret, 32))
    public = signer.public_key().public_bytes_raw()
    assert key.public_key == public.hex()
    assert key.fingerprint == hashlib.sha256(public).hexdigest()[:16]
    committed = prefixed(b"hf-watermark/1") + prefixed(b"commitment") + secret
    assert key.commitment == hashlib.sha3_256(committed).hexdigest()
    assert key.sign(b"any") == signer.sign(b"any").hex()
    assert key.for_recipient("r") == OwnerKey(shake("recipient/r", secret, 32))
    assert key.sealed("0" * 32) == OwnerKey(shake(f"seal/{'0' * 32}", secret, 32))


def test_signature_fits_the_message_and_no_other():
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY.public_key))
    signature = bytes.fromhex(KEY.sign(b"message"))
    public.verify(signature, b"message")
    with pytest.raises(InvalidSignature):
        public.verify(signature, b"messagf")


@given(secrets, st.text("ab/1", max_size=4), st.text("ab/1", max_size=4))
@settings(deadline=None)
def test_different_labels_and_keys_give_different_streams(secret, label, other):
    key, neighbour = OwnerKey(secret), OwnerKey(secret[:-1] + bytes([secret[-1] ^ 1]))
    assert (key.stream(label, 32) == key.stream(other, 32)) == (label == other)
    assert key.stream(label, 32) != neighbour.stream(label, 32)
    assert key.stream(label, 64)[:32] == key.stream(label, 32)


def test_recipients_differ_from_the_owner_and_from_each_other():
    keys = [KEY, *(KEY.for_recipient(name) for name in ("a", "b", "a/b", "a ", "A"))]
    keys.append(KEY.for_recipient("a").for_recipient("b"))
    keys += [KEY.sealed("0" * 32), KEY.sealed("1" * 32), KEY.for_recipient("a").sealed("0" * 32)]
    keys += [KEY.for_recipient("0" * 32), KEY.for_recipient("seal/" + "0" * 32)]
    assert len({key.commitment for key in keys}) == len({key.public_key for key in keys}) == 12
    assert len(set(keys)) == 12
    assert KEY.for_recipient("a") == KEY.for_recipient("a")


@pytest.mark.parametrize("name", ["", "\udc80", "a\ud800b"])
def test_recipient_names_that_cannot_be_used(name):
    with pytest.raises(KeyFileError, match="recipient"):
        KEY.for_recipient(name)


@pytest.mark.parametrize(
    "secret", [b"", SECRET[:31], SECRET + b"\0", bytearray(SECRET), SECRET.hex(), None]
)
def test_secret_must_be_32_bytes(secret):
    with pytest.raises(KeyFileError, match="32 bytes") as refused:
        OwnerKey(secret)
    assert not leaks(everything_said(refused.value), SECRET)


@pytest.mark.parametrize("owner", ["a\nb", "\x1b[2J", "\ud800", "x" * 201, None, b"acme", "\u202e"])
def test_owner_must_be_a_printable_line(owner):
    with pytest.raises(KeyFileError, match="name"):
        OwnerKey(SECRET, owner)


def test_generate_takes_32_bytes_from_the_operating_system(monkeypatch):
    assert OwnerKey.generate("a") != OwnerKey.generate("a")
    assert OwnerKey.generate("a").owner == "a"
    asked = []
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or SECRET)
    assert OwnerKey.generate() == KEY
    assert asked == [32]


def test_equality_is_of_secrets_alone():
    assert OwnerKey(SECRET, "acme") == OwnerKey(SECRET, "other")
    assert hash(OwnerKey(SECRET, "acme")) == hash(OwnerKey(SECRET, "other"))
    assert OwnerKey(SECRET[::-1], "acme") != KEY
    assert KEY != SECRET
    assert repr(KEY) != KEY


# Files --------------------------------------------------------------------------------------------


@given(secrets, st.text(max_size=20).filter(str.isprintable), st.none() | st.text())
@settings(deadline=None, max_examples=40)
def test_load_returns_what_save_wrote(secret, owner, passphrase):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "k")
        OwnerKey(secret, owner).save(path, passphrase)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = OwnerKey.load(str(path), passphrase)
        assert loaded == OwnerKey(secret)
        assert loaded.owner == owner
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.listdir(folder) == ["k"]
        if passphrase is not None:
            assert not leaks(path.read_text(), secret)
            with pytest.raises(KeyFileError):
                OwnerKey.load(path, passphrase + "x")


def test_default_cost_of_a_guess(path, monkeypatch):
    monkeypatch.setitem(key_module._SCRYPT, "n", DEFAULT_COST["n"])
    KEY.save(path, PASSPHRASE)
    sealed = json.loads(path.read_bytes())["encrypted"]
    assert (sealed["n"], sealed["r"], sealed["p"]) == (2**17, 8, 1)
    assert OwnerKey.load(path, PASSPHRASE) == KEY


def test_files_of_version_1_are_read(path):
    assert OwnerKey.load(written(path, PLAIN)) == KEY
    loaded = OwnerKey.load(written(path, SEALED), PASSPHRASE)
    assert loaded == KEY
    assert loaded.owner == "acme"


def test_salt_and_nonce_are_fresh(tmp_path):
    sealed = []
    for name in ("a", "b"):
        KEY.save(tmp_path / name, PASSPHRASE)
        sealed.append(json.loads((tmp_path / name).read_bytes())["encrypted"])
    assert all(sealed[0][field] != sealed[1][field] for field in ("salt", "nonce", "sealed"))


def test_mode_is_0600_whatever_the_umask(path):
    before = os.umask(0)
    try:
        KEY.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("passphrases", list(itertools.product((None, PASSPHRASE), repeat=2)))
def test_the_same_key_may_be_saved_again(path, passphrases):
    first, second = passphrases
    KEY.save(path, first)
    path.chmod(0o644)
    if first is not None and second is None:
        with pytest.raises(KeyFileError, match="does not hold this key"):
            KEY.save(path, second)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OwnerKey(SECRET, "renamed").save(path, second)
    assert OwnerKey.load(path, second).owner == "renamed"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"my diary",
        PLAIN | {"secret": base64.b64encode(SECRET[::-1]).decode(), "fingerprint": "0" * 16},
        PLAIN | {"format": "hf-watermark-key/2"},
        SEALED | {"fingerprint": "0" * 16},
    ],
)
def test_nothing_else_is_overwritten(path, content, passphrase):
    before = written(path, content).read_bytes()
    with pytest.raises(KeyFileError, match="another path"):
        KEY.save(path, passphrase)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_another_owners_key_is_not_overwritten(path):
    other = OwnerKey.generate("acme")
    for passphrase in (PASSPHRASE, None):
        path.unlink(missing_ok=True)
        other.save(path, passphrase)
        with pytest.raises(KeyFileError, match="another path"):
            KEY.save(path, passphrase)
        with pytest.raises(KeyFileError, match="another path"):
            OwnerKey.generate().save(path, "other")
        assert OwnerKey.load(path, passphrase) == other


def refuse_with(error):
    def refuse(*args, **kwargs):
        raise error

    return refuse


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("os.replace", PermissionError(errno.EACCES, "Permission denied")),
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("os.fdopen", OSError(errno.EMFILE, "Too many open files")),
        ("tempfile.mkstemp", PermissionError(errno.EROFS, "Read-only file system")),
        ("os.replace", KeyboardInterrupt()),
        ("os.fsync", MemoryError()),
    ],
)
def test_a_failed_save_leaves_no_trace(path, monkeypatch, existing, place, error):
    if existing:
        KEY.save(path)
    before = path.read_bytes() if existing else None
    monkeypatch.setattr(place, refuse_with(error))
    expected = KeyFileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as refused:
        KEY.save(path, PASSPHRASE if existing else None)
    monkeypatch.undo()
    if existing:
        assert path.read_bytes() == before
    assert os.listdir(path.parent) == ([path.name] if existing else [])
    if expected is KeyFileError:
        assert error.strerror in str(refused.value)
        assert not leaks(everything_said(refused.value), SECRET)


@contextmanager
def no_superuser():
    """Act as a user whom modes of files bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="modes mean something else here")
def test_modes_that_forbid():
    KEY.sign(b"")  # imported before the rights are gone
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder, "unreadable"), PLAIN, 0o000)
        os.chmod(folder, 0o555)
        with no_superuser():
            with pytest.raises(KeyFileError, match=r"cannot be written.*Permission denied"):
                KEY.save(Path(folder, "acme.key"))
            with pytest.raises(KeyFileError, match=r"cannot be read.*Permission denied"):
                OwnerKey.load(path)
            with pytest.raises(KeyFileError, match="another path"):
                KEY.save(path)
        os.chmod(folder, 0o000)
        with no_superuser(), pytest.raises(KeyFileError, match="cannot be written"):
            KEY.save(Path(folder, "acme.key"))
        os.chmod(folder, 0o700)
        assert os.listdir(folder) == ["unreadable"]


@pytest.mark.parametrize("name", ["missing/acme.key", "file/acme.key", "x" * 300, "a\0b", "."])
def test_places_that_no_key_can_be_in(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError):
        KEY.save(tmp_path / name)
    with pytest.raises(KeyFileError):
        OwnerKey.load(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_can_reach_is_warned_about(path, mode):
    written(path, PLAIN, mode)
    with pytest.warns(KeyFileWarning, match="chmod 600") as caught:
        assert OwnerKey.load(path) == KEY
    assert caught[0].filename == __file__
    assert not leaks(str(caught[0].message), SECRET)


def refused(path: Path, passphrase: str | None = None) -> str:
    with pytest.raises(KeyFileError) as error:
        OwnerKey.load(path, passphrase)
    said = everything_said(error.value)
    assert not leaks(said, SECRET)
    assert "Traceback" not in str(error.value)
    assert str(path) in str(error.value)
    assert passphrase is None or passphrase not in said
    return str(error.value)


def without(fields: dict, *names: str) -> dict:
    return {name: value for name, value in fields.items() if name not in names}


def test_missing_file(path):
    assert "does not exist" in refused(path)
    assert "keygen" in refused(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\0" * 100, "no JSON"),
        (bytes(range(256)), "no JSON"),
        (b"hello", "no JSON"),
        (json.dumps(PLAIN).encode()[:-1], "no JSON"),
        (json.dumps(PLAIN).encode() + b"}", "no JSON"),
        (b"[" * 60_000, "no JSON"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "no JSON"),
        (b"x" * 65_537, "too large"),
        (b"[]", "no key"),
        (b"null", "no key"),
        (b'"hf-watermark-key/1"', "no key"),
        (b"{}", "no key"),
        (PLAIN | {"format": 1}, "no key"),
        (PLAIN | {"format": "hf-watermark/1"}, "another format"),
        (PLAIN | {"format": ""}, "another format"),
        (PLAIN | {"format": "hf-watermark-key/2"}, "version '2'. Update"),
        (PLAIN | {"format": "hf-watermark-key"}, "another version"),
        (without(PLAIN, "secret"), "missing"),
        (without(PLAIN, "fingerprint"), "missing"),
        (PLAIN | {"secret": None}, "wrong type"),
        (PLAIN | {"secret": 5}, "wrong type"),
        (PLAIN | {"secret": list(SECRET)}, "wrong type"),
        (PLAIN | {"secret": SECRET.hex()}, "wrong size"),
        (PLAIN | {"secret": PLAIN["secret"] + "\n"}, "garbled"),
        (PLAIN | {"secret": PLAIN["secret"][:-1]}, "garbled"),
        (PLAIN | {"secret": "é" * 44}, "garbled"),
        (PLAIN | {"secret": base64.b64encode(SECRET[:31]).decode()}, "wrong size"),
        (PLAIN | {"secret": base64.b64encode(SECRET[:31] + b"\0").decode()}, "fingerprint"),
        (PLAIN | {"fingerprint": "0" * 16}, "fingerprint"),
        (PLAIN | {"fingerprint": 5}, "fingerprint"),
        (PLAIN | {"owner": "a\nb"}, "name"),
        (PLAIN | {"owner": "\ud800"}, "name"),
        (PLAIN | {"encrypted": None}, "passphrase"),
    ],
)
def test_bad_files(path, content, expected):
    assert expected in refused(written(path, content))


def test_a_huge_file_is_not_read_whole(path):
    written(path, json.dumps(PLAIN).encode())
    os.truncate(path, 2**40)  # sparse
    assert "too large" in refused(path)


@pytest.mark.parametrize(("fields", "passphrase"), [(PLAIN, None), (SEALED, PASSPHRASE)])
def test_truncated_files(path, fields, passphrase):
    content = json.dumps(fields).encode()
    for size in range(len(content)):
        refused(written(path, content[:size]), passphrase)


def test_wrong_and_missing_passphrase(path):
    written(path, SEALED)
    assert "wrong passphrase" in refused(path, "wrong horse")
    assert "wrong passphrase" in refused(path, "\udc80")
    assert "HF_WATERMARK_PASSPHRASE" in refused(path)


def changed_base64(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[0] ^= 1
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    "edit",
    [
        {"owner": "thief"},
        {"owner": ""},
        {"fingerprint": OwnerKey(SECRET[::-1]).fingerprint},
        {"format": "hf-watermark-key/2"},
        {"encrypted": {}},
        {"encrypted": []},
        {"encrypted": "scrypt"},
        {"encrypted": 5},
    ],
)
def test_edited_head_of_a_sealed_file(path, edit):
    refused(written(path, SEALED | edit), PASSPHRASE)


@pytest.mark.parametrize("field", SEALED["encrypted"])
def test_every_edit_of_the_seal_is_noticed(path, field):
    sealed = SEALED["encrypted"]
    value = sealed[field]
    edits = [None, [], {}, "", "x", "é", -1, 0, 1, 2.5, True, 2**100]
    edits.append(value * 2 if isinstance(value, int) else value + value)
    if field in ("salt", "nonce", "sealed"):
        edits += [changed_base64(value), value[:-4], value + " ", base64.b64encode(b"").decode()]
    edits = [edit for edit in edits if type(edit) is not type(value) or edit != value]
    for edit in edits:
        refused(written(path, SEALED | {"encrypted": sealed | {field: edit}}), PASSPHRASE)
    refused(written(path, SEALED | {"encrypted": without(sealed, field)}), PASSPHRASE)


@pytest.mark.parametrize(
    "cost",
    [
        {"n": 2**40},
        {"n": 2**24},
        {"n": 2**20, "r": 32, "p": 16},
        {"r": 2**24},
        {"p": 2**24},
        {"n": 1000},
        {"n": float("inf")},
        {"n": float("nan")},
        {"n": 1024.0},
        {"n": "1024"},
        {"n": 10**300},
        {"r": -8, "p": -1},
    ],
)
@pytest.mark.timeout(5)
def test_absurd_costs_are_refused_without_paying(path, cost):
    sealed = SEALED["encrypted"] | cost
    assert "garbled" in refused(written(path, SEALED | {"encrypted": sealed}), PASSPHRASE)


def test_a_seal_does_not_fit_another_head(tmp_path):
    """The secret of one sealed file under the owner and fingerprint of another."""
    other = OwnerKey.generate("other")
    other.save(tmp_path / "other", PASSPHRASE)
    blob = json.loads((tmp_path / "other").read_bytes())["encrypted"]
    path = written(tmp_path / "acme", SEALED | {"encrypted": blob})
    assert "changed" in refused(path, PASSPHRASE)


# Nothing leaks ------------------------------------------------------------------------------------


def shown(key: OwnerKey) -> str:
    try:
        raise RuntimeError(key)
    except RuntimeError as error:
        captured = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "\n".join(
        [
            str(key),
            repr(key),
            f"{key}{key!r}{key!s:>60}{key!a}",
            "%s %r" % (key, key),  # noqa: UP031
            format(key),
            str([key, {key: key}, (key,)]),
            pprint.pformat({"key": key}),
            json.dumps({"key": key}, default=str),
            *captured.format(),
        ]
    )


@given(secrets)
@settings(deadline=None)
def test_no_text_of_a_key_holds_its_secret(secret):
    key = OwnerKey(secret, "acme")
    assert not leaks(shown(key), secret)
    assert key.fingerprint in repr(key)


def test_logging_shows_the_fingerprint_alone(caplog):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").error("%s %r", KEY, KEY)
        logging.getLogger("x").warning({"key": KEY})
    assert KEY.fingerprint in caplog.text
    assert not leaks(caplog.text, SECRET)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda key: key, lambda key: {"args": [key]}])
def test_pickling_is_refused(protocol, wrap):
    with pytest.raises(TypeError, match="never pickled") as refused:
        pickle.dumps(wrap(KEY), protocol)
    assert not leaks(everything_said(refused.value), SECRET)


def test_other_ways_of_serializing_are_refused():
    with pytest.raises(TypeError, match="never pickled"):
        ForkingPickler.dumps(KEY)
    target = io.BytesIO()
    with pytest.raises(TypeError, match="never pickled"):
        pickle.Pickler(target).dump([SECRET[:0], KEY])
    assert not leaks(target.getvalue().decode("latin-1"), SECRET)
    with pytest.raises(TypeError) as refused:
        json.dumps(KEY)
    assert not leaks(everything_said(refused.value), SECRET)


def test_torch_save_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="never pickled"):
        torch.save({"args": KEY}, tmp_path / "training_args.bin")
    for path in tmp_path.iterdir():
        assert SECRET[:8] not in path.read_bytes()


def test_copies_are_the_key_itself():
    assert copy.copy(KEY) is KEY
    assert copy.deepcopy({"a": [KEY]})["a"][0] is KEY


def test_no_attributes_to_look_at_or_to_add():
    with pytest.raises(TypeError):
        vars(KEY)
    with pytest.raises(AttributeError):
        KEY.note = "x"
    public = [name for name in dir(KEY) if not name.startswith("_")]
    assert public == [
        "commitment",
        "fingerprint",
        "for_recipient",
        "generate",
        "load",
        "owner",
        "public_key",
        "save",
        "sealed",
        "sign",
        "stream",
    ]


def attempt(action):
    try:
        return action()
    except WatermarkError as error:
        return error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(secrets, st.booleans(), st.data())
@settings(deadline=None, max_examples=150)
def test_no_error_over_a_damaged_file_holds_the_secret(secret, sealed, data):
    key, passphrase = OwnerKey(secret, "acme"), PASSPHRASE if sealed else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "k")
        key.save(path, passphrase)
        raw = path.read_bytes()
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(raw)))
            stop = data.draw(st.integers(start, len(raw)))
            raw = raw[:start] + data.draw(st.binary(max_size=4)) + raw[stop:]
        else:
            fields = json.loads(raw)
            names = list(fields) + [("encrypted", name) for name in fields.get("encrypted", ())]
            name = data.draw(st.sampled_from(names))
            home = fields["encrypted"] if isinstance(name, tuple) else fields
            home[name[1] if isinstance(name, tuple) else name] = data.draw(json_values)
            raw = json.dumps(fields).encode()
        written(path, raw)
        loaded = attempt(lambda: OwnerKey.load(path, passphrase))
        if isinstance(loaded, WatermarkError):
            assert type(loaded) is KeyFileError
            assert not leaks(everything_said(loaded), secret)
        else:  # what was damaged did not matter
            assert loaded == key
        refusal = attempt(lambda: OwnerKey.generate().save(path, passphrase))
        assert type(refusal) is KeyFileError
        assert not leaks(everything_said(refusal), secret)
        assert os.listdir(folder) == ["k"]
