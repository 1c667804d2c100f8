"""The owner's secret, and everything that is derived from it.

`OwnerKey` holds 32 bytes from the operating system. Row signs, projections, message bits, the
signing identity and recipients' keys are streams of SHAKE-256 over a length-prefixed label and
those bytes, so the same key gives the same marks on every machine, and no stream tells anything
about another. Only the fingerprint, the public key and the commitment are ever shown.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import math
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

from hf_watermark.errors import KeyFileError

__all__ = ["FILE_FORMAT", "KeyFileWarning", "OwnerKey", "write_secret_file"]

FILE_FORMAT = "hf-watermark-key/1"
_DOMAIN = b"hf-watermark/1"
_SECRET_BYTES = 32
_MAX_FILE_BYTES = 64 * 1024
# RFC 7914's interactive setting doubled thrice: 128 MiB and about a third of a second a guess.
_SCRYPT = {"n": 2**17, "r": 8, "p": 1}
_MAX_WORK = 2**23  # n r p: 1 GiB at most; a file may ask for more, or for what no machine has


class KeyFileWarning(UserWarning):
    """A key file can be read by other users of the machine."""


def write_secret_file(target: Path, content: bytes) -> None:
    """Write a file of mode 0600 at once or not at all.

    Raises:
        OSError: If it cannot be written.
        ValueError: For a path with a null byte.
    """
    # mkstemp makes the file 0600 from the start; replace() is atomic within a folder.
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # an interrupt too must not leave the secret behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


class OwnerKey:
    """The secret of one owner, or of one recipient of an owner's model.

    Args:
        secret: 32 bytes.
        owner: A name for people, not a secret; it appears in claims.

    Raises:
        KeyFileError: If `secret` is not 32 bytes or `owner` is no printable line.
    """

    __slots__ = ("_owner", "_public_key", "_secret")

    def __init__(self, secret: bytes, owner: str = "") -> None:
        if not isinstance(secret, bytes) or len(secret) != _SECRET_BYTES:
            raise KeyFileError("The owner's secret has the wrong size", expected="32 bytes")
        if not isinstance(owner, str) or len(owner) > 200 or not (owner.isprintable() or not owner):
            raise KeyFileError(
                "The owner's name cannot be used", expected="one printable line of up to 200 signs"
            )
        self._secret = secret
        self._owner = owner
        self._public_key: bytes | None = None

    @classmethod
    def generate(cls, owner: str = "") -> OwnerKey:
        """A fresh key from the operating system's generator."""
        return cls(os.urandom(_SECRET_BYTES), owner)

    # Identity ---------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The owner's name, for people."""
        return self._owner

    @property
    def public_key(self) -> str:
        """The Ed25519 public key, 64 hexadecimal digits."""
        if self._public_key is None:
            self._public_key = self._signer().public_key().public_bytes_raw()
        return self._public_key.hex()

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 of the public key: how people name the key."""
        return hashlib.sha256(bytes.fromhex(self.public_key)).hexdigest()[:16]

    @property
    def commitment(self) -> str:
        """SHA3-256(domain || secret) in hexadecimal: binds to this key, reveals nothing of it."""
        material = _prefixed(_DOMAIN) + _prefixed(b"commitment") + self._secret
        return hashlib.sha3_256(material).hexdigest()

    def sign(self, message: bytes) -> str:
        """The Ed25519 signature of `message` under the key's identity, 128 hexadecimal digits."""
        signature: bytes = self._signer().sign(message)
        return signature.hex()

    def _signer(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.stream("identity/ed25519", 32))

    # Derivation -------------------------------------------------------------------------------

    def stream(self, label: str, size: int) -> bytes:
        """The first `size` bytes of the key's stream named `label`.

        SHAKE-256(len(domain) || domain || len(label) || label || secret), lengths as 8 bytes,
        big-endian. Law: a shorter stream is a prefix of a longer one of the same label.
        """
        material = _prefixed(_DOMAIN) + _prefixed(label.encode()) + self._secret
        return hashlib.shake_256(material).digest(size)

    def for_recipient(self, name: str) -> OwnerKey:
        """The key that marks the copy handed to `name`: the owner can remake it, nobody else can.

        Raises:
            KeyFileError: If `name` is empty, or holds halves of signs that UTF-8 cannot write.
        """
        if not name:
            raise KeyFileError("A recipient needs a name", expected="a name that is not empty")
        try:
            secret = self.stream(f"recipient/{name}", _SECRET_BYTES)
        except UnicodeEncodeError:
            raise KeyFileError(
                "The recipient's name cannot be used", expected="text that UTF-8 can write"
            ) from None
        return OwnerKey(secret, self._owner)

    def sealed(self, nonce: str) -> OwnerKey:
        """The key of a seal: see `WatermarkLoss.seal`. No recipient's name leads to it.

        Args:
            nonce: The claim's.
        """
        return OwnerKey(self.stream(f"seal/{nonce}", _SECRET_BYTES), self._owner)

    # Files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Write the key to `path`, atomically, readable by this user alone (mode 0600).

        Args:
            path: The file; an existing one is kept unless it already holds this key.
            passphrase: Encrypts the secret (scrypt, ChaCha20-Poly1305) if given.

        Raises:
            KeyFileError: If the file holds something else, or cannot be written.
        """
        target = Path(path)
        if os.path.exists(target) and not self._is_in(target, passphrase):
            raise KeyFileError(
                f"{target} exists and does not hold this key",
                do="choose another path: an overwritten key is lost for good",
            )
        head: dict[str, Any] = {
            "format": FILE_FORMAT,
            "owner": self._owner,
            "fingerprint": self.fingerprint,
        }
        if passphrase is None:
            head["secret"] = base64.b64encode(self._secret).decode()
        else:
            head["encrypted"] = _seal(self._secret, passphrase, _bound(head))
        content = (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode()
        try:
            write_secret_file(target, content)
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise KeyFileError(
                f"The key cannot be written to {target}", got=getattr(error, "strerror", error)
            ) from None

    def _is_in(self, path: Path, passphrase: str | None) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KeyFileWarning)
                return hmac.compare_digest(self.load(path, passphrase)._secret, self._secret)
        except KeyFileError:
            return False

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> OwnerKey:
        """Read a key file.

        Args:
            path: The file that `save` wrote.
            passphrase: Needed when the file is encrypted.

        Raises:
            KeyFileError: If the file is missing, empty, garbled or of a newer version, or the
                passphrase is missing or wrong.

        Warns:
            KeyFileWarning: If other users of the machine can read the file.
        """
        path = Path(path)
        fields = _read_fields(path)
        if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            warnings.warn(
                f"{path} can be read by other users; run: chmod 600 {path}",
                KeyFileWarning,
                stacklevel=2,
            )
        try:
            owner, fingerprint = str(fields.get("owner", "")), fields["fingerprint"]
            if "encrypted" in fields:
                secret = _unseal(path, fields["encrypted"], passphrase, _bound(fields))
            else:
                secret = base64.b64decode(fields["secret"], validate=True)
            key = cls(secret, owner)
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise _garbled(path, "fields that are missing or of the wrong type") from None
        except KeyFileError as error:
            if error.what.startswith("The owner's"):
                raise _garbled(path, error.what) from None
            raise
        if key.fingerprint != fingerprint:
            raise _garbled(path, "a secret that does not match the file's fingerprint")
        return key

    # Nothing leaks ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"OwnerKey(fingerprint={self.fingerprint!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OwnerKey):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __copy__(self) -> OwnerKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnerKey:
        return self

    def __reduce__(self) -> NoReturn:
        # torch.save and multiprocessing would carry the secret into files and pipes.
        raise TypeError("An OwnerKey is never pickled: save it, and load it where it is needed")


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise KeyFileError(
            f"The key file {path} does not exist", do="make one: hf-watermark keygen"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise KeyFileError(
            f"The key file {path} cannot be read", got=getattr(error, "strerror", error)
        ) from None
    if not content.strip():
        raise _garbled(path, "an empty file")
    if len(content) > _MAX_FILE_BYTES:
        raise _garbled(path, "a file that is too large")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        raise _garbled(path, "no JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), str):
        raise _garbled(path, "JSON that is no key")
    name, _, version = fields["format"].partition("/")
    if name != FILE_FORMAT.partition("/")[0]:
        raise _garbled(path, "a file of another format")
    if fields["format"] != FILE_FORMAT:
        raise KeyFileError(
            f"The key file {path} is of another version",
            expected=f"version {FILE_FORMAT.partition('/')[2]}",
            got=f"version {version[:20]!r}",
            do="update: pip install -U hf-watermark",
        )
    return fields


def _garbled(path: Path, got: str) -> KeyFileError:
    return KeyFileError(
        f"The key file {path} is garbled",
        expected=f"a file of format {FILE_FORMAT}",
        got=got,
        do="restore it from a backup: without the secret the mark cannot be read",
    )


def _bound(fields: dict[str, Any]) -> bytes:
    """What the seal binds beside the secret, so that nobody can rename a sealed key."""
    names = ("format", "owner", "fingerprint")
    return json.dumps([str(fields.get(name, "")) for name in names]).encode()


def _seal(secret: bytes, passphrase: str, bound: bytes) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    salt, nonce = os.urandom(16), os.urandom(12)
    sealed = ChaCha20Poly1305(_stretch(passphrase, salt, **_SCRYPT)).encrypt(nonce, secret, bound)
    return {
        "kdf": "scrypt",
        **_SCRYPT,
        "salt": base64.b64encode(salt).decode(),
        "cipher": "chacha20-poly1305",
        "nonce": base64.b64encode(nonce).decode(),
        "sealed": base64.b64encode(sealed).decode(),
    }


def _unseal(path: Path, sealed: dict[str, Any], passphrase: str | None, bound: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    if passphrase is None:
        raise KeyFileError(
            f"The key file {path} is encrypted",
            expected="its passphrase",
            got="none",
            do="set HF_WATERMARK_PASSPHRASE, or pass passphrase=",
        )
    cost = {name: sealed[name] for name in _SCRYPT}
    if (
        (sealed["kdf"], sealed["cipher"]) != ("scrypt", "chacha20-poly1305")
        or not all(type(factor) is int and factor >= 1 for factor in cost.values())
        or math.prod(cost.values()) > _MAX_WORK
    ):
        raise _garbled(path, "an unknown way of encrypting")
    raw = {
        name: base64.b64decode(sealed[name], validate=True) for name in ("salt", "nonce", "sealed")
    }
    key = _stretch(passphrase, raw["salt"], **cost)
    try:
        return ChaCha20Poly1305(key).decrypt(raw["nonce"], raw["sealed"], bound)
    except InvalidTag:
        raise KeyFileError(
            f"The key file {path} does not open",
            expected="its passphrase",
            got="a wrong passphrase, or a file that was changed",
        ) from None


def _stretch(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    # A passphrase from the environment may hold bytes that are no UTF-8, as lone surrogates.
    raw = passphrase.encode(errors="surrogatepass")
    return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(raw)
