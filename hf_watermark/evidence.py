"""What is claimed, and what was found: frozen records, canonical JSON, Ed25519 signatures."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_watermark.carriers import Carrier
from hf_watermark.errors import ClaimError, SchemeError
from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme

__all__ = [
    "CLAIM_FILE",
    "CLAIM_FORMAT",
    "Claim",
    "ClaimedCarrier",
    "Evidence",
    "Seal",
    "canonical_json",
]

CLAIM_FILE = "watermark.json"
CLAIM_FORMAT = "hf-watermark/1"
_MAX_CARRIERS = 10_000
_HEX = re.compile(r"[0-9a-f]+")


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value) is not None


def _is_line(value: object, longest: int) -> bool:
    """One printable line: no control codes for a terminal, no lone surrogates."""
    return isinstance(value, str) and len(value) <= longest and value.isprintable()


@dataclass(frozen=True)
class ClaimedCarrier:
    """A carrier as a claim lists it.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its safetensors dtype.
        sha256: Digest of its bytes in the file, 64 hexadecimal digits.
        reference: Digest of the tensors beside it that an aligned reading compares a suspect with;
            None where there is no such reading.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    reference: str | None = None

    @property
    def carrier(self) -> Carrier:
        """The carrier as the projections see it."""
        return Carrier(self.name, self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sha256": self.sha256,
        }
        return fields if self.reference is None else fields | {"reference": self.reference}

    @classmethod
    def from_dict(cls, fields: Any) -> ClaimedCarrier:
        """Read one entry of a claim; the caller turns `ValueError` into its own error."""
        name, shape, dtype, digest = (fields[k] for k in ("name", "shape", "dtype", "sha256"))
        sides_fit = (
            isinstance(shape, list)
            and 2 <= len(shape) <= 5
            and all(type(side) is int and 0 < side < 2**31 for side in shape)
        )
        texts_fit = all(_is_line(text, 999) and text for text in (name, dtype))
        reference = fields.get("reference")
        digests_fit = _is_hex(digest, 64) and (reference is None or _is_hex(reference, 64))
        if not (sides_fit and texts_fit and digests_fit):
            raise ValueError("carrier")
        return cls(name, tuple(shape), dtype, digest, reference)


@dataclass(frozen=True)
class Seal:
    """The second mark of a model that was trained with its first: see `WatermarkLoss.seal`.

    Attributes:
        scheme: The scheme's name.
        nonce: Names its key, `OwnerKey.sealed(nonce)`; 32 hexadecimal digits.
    """

    scheme: str
    nonce: str

    @classmethod
    def from_dict(cls, fields: Any) -> Seal:
        """Read a claim's; the caller turns what this raises into its own error."""
        if not _is_hex(fields["nonce"], 32):
            raise ValueError("nonce")
        return cls(Scheme.from_name(fields["scheme"]).name, fields["nonce"])


@dataclass(frozen=True)
class Claim:
    """What an owner publishes with the weights, before any dispute: `watermark.json`.

    Public carriers are listed with digests. Carriers that the owner named stay secret: the public
    claim holds only `carriers_commitment`, a salted hash of the list, and the owner's own copy
    holds the list beside it. The signature covers the public form of either, so both copies carry
    the same one.

    Attributes:
        scheme: The scheme's name.
        carriers: The carriers in the order of the key's streams; empty in the public copy of a
            claim whose carriers are secret.
        commitment: H(domain || secret) of the key.
        public_key: The key's Ed25519 identity.
        owner: The owner's name, for people; may be empty.
        carriers_commitment: Salted hash of secret carriers, else None.
        seal: What aligned readings look for with its own key; None: they look for the mark itself.
        signature: Ed25519 over the canonical public form, empty until signed.
    """

    scheme: str
    carriers: tuple[ClaimedCarrier, ...]
    commitment: str
    public_key: str
    owner: str = ""
    carriers_commitment: str | None = None
    seal: Seal | None = None
    signature: str = ""

    @classmethod
    def make(
        cls,
        key: OwnerKey,
        scheme: Scheme,
        carriers: tuple[ClaimedCarrier, ...],
        *,
        secret_carriers: bool = False,
        seal: Seal | None = None,
    ) -> Claim:
        """The signed claim of `key` over `carriers` (the owner's own copy if they are secret)."""
        claim = cls(
            scheme=scheme.name,
            carriers=carriers,
            commitment=key.commitment,
            public_key=key.public_key,
            owner=key.owner,
            carriers_commitment=_commit_carriers(key, carriers) if secret_carriers else None,
            seal=seal,
        )
        return dataclasses.replace(claim, signature=key.sign(claim._signed_bytes()))

    @property
    def public(self) -> Claim:
        """The copy to publish: without the list if the carriers are secret."""
        if self.carriers_commitment is None:
            return self
        return dataclasses.replace(self, carriers=())

    @property
    def hides_carriers(self) -> bool:
        """Whether this copy lacks the list of its carriers."""
        return self.carriers_commitment is not None and not self.carriers

    def commits_to(self, key: OwnerKey) -> bool:
        """Whether this is a claim of `key`: anyone can copy a commitment, but not sign for it."""
        ours = hmac.compare_digest(self.public_key, key.public_key)
        return ours and hmac.compare_digest(self.commitment, key.commitment)

    def check(self, where: str) -> None:
        """Check the signature.

        Raises:
            ClaimError: If it does not fit: the claim was edited after signing.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            identity = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public_key))
            identity.verify(bytes.fromhex(self.signature), self._signed_bytes())
        except (InvalidSignature, ValueError):
            raise ClaimError(
                f"The claim in {where} was edited",
                expected="a signature by the claim's own public key over its content",
                got="one that does not fit",
                do="pass the owner's untouched copy with --claim",
            ) from None

    def check_secret_carriers(self, key: OwnerKey, where: str) -> None:
        """Check that an owner's copy lists the carriers that the public claim committed to.

        Raises:
            ClaimError: If it lists others.
        """
        if self.carriers_commitment is None or self.hides_carriers:
            return
        if not hmac.compare_digest(self.carriers_commitment, _commit_carriers(key, self.carriers)):
            raise ClaimError(
                f"The claim in {where} lists other carriers than it committed to",
                do="pass the owner's untouched copy with --claim",
            )

    def _signed_bytes(self) -> bytes:
        fields = self.public.to_dict()
        del fields["signature"]
        return b"hf-watermark/1 claim\n" + canonical_json(fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the keys of `watermark.json`."""
        fields: dict[str, Any] = {
            "format": CLAIM_FORMAT,
            "scheme": self.scheme,
            "owner": self.owner,
            "carriers": [carrier.to_dict() for carrier in self.carriers],
            "commitment": self.commitment,
            "public_key": self.public_key,
            "signature": self.signature,
        }
        if self.carriers_commitment is not None:
            fields["carriers_commitment"] = self.carriers_commitment
        if self.seal is not None:
            fields["seal"] = dataclasses.asdict(self.seal)
        return fields

    def to_bytes(self) -> bytes:
        """The content of `watermark.json`. Law: `Claim.from_bytes(c.to_bytes(), "") == c`."""
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Claim:
        """Parse a claim from an untrusted place; the signature is not checked here.

        Args:
            content: The file.
            where: Where it came from, for messages.

        Raises:
            ClaimError: If it is no claim, or of a newer format.
        """
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise _unreadable(where, "no JSON") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("format"), str):
            raise _unreadable(where, "JSON that is no claim")
        if fields["format"] != CLAIM_FORMAT:
            raise ClaimError(
                f"The claim in {where} is of another format",
                expected=CLAIM_FORMAT,
                got=repr(fields["format"])[:60],
                do="update: pip install -U hf-watermark",
            )
        try:
            listed = fields["carriers"]
            if not isinstance(listed, list) or len(listed) > _MAX_CARRIERS:
                raise ValueError("carriers")
            hidden = fields.get("carriers_commitment")
            fits = (
                _is_hex(fields["commitment"], 64)
                and _is_hex(fields["public_key"], 64)
                and _is_hex(fields["signature"], 128)
                and _is_line(fields["owner"], 200)
                and (hidden is None or _is_hex(hidden, 64))
                and (listed or hidden is not None)
            )
            if not fits:
                raise ValueError("fields")
            return cls(
                scheme=Scheme.from_name(fields["scheme"]).name,
                carriers=tuple(ClaimedCarrier.from_dict(entry) for entry in listed),
                commitment=fields["commitment"],
                public_key=fields["public_key"],
                owner=fields["owner"],
                carriers_commitment=hidden,
                seal=Seal.from_dict(fields["seal"]) if "seal" in fields else None,
                signature=fields["signature"],
            )
        except (KeyError, TypeError, ValueError, SchemeError):
            raise _unreadable(where, "fields that are missing or of the wrong type") from None


def _unreadable(where: str, got: str) -> ClaimError:
    return ClaimError(
        f"The claim in {where} is unreadable",
        expected=f"JSON of format {CLAIM_FORMAT}",
        got=got,
        do="pass the owner's untouched copy with --claim",
    )


def _commit_carriers(key: OwnerKey, carriers: tuple[ClaimedCarrier, ...]) -> str:
    salt = key.stream("claim/carriers", 32)
    listed = canonical_json([carrier.to_dict() for carrier in carriers])
    return hashlib.sha3_256(salt + listed).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The outcome of one check. `to_dict` gives the JSON keys of the command line.

    Attributes:
        repo: `org/name` or a folder.
        revision: Full commit sha that was read, None for a folder.
        verdict: `found`, `not found` or `not checked`.
        log10_p: Base-10 logarithm of the chance that a model which never saw the key reads this
            well in any of the tries (already corrected for them); None if not checked.
        alpha: The chance that was accepted beforehand.
        bits: T.
        matched: How many bits of the message were read correctly; None if not checked.
        tries: How many readings were allowed for.
        reading: Which of them decided: `raw`, `raw, one carrier`, `renamed`, `aligned`, ...; None
            if none.
        scheme: The scheme's name.
        carriers: Names of the tensors that were read.
        key_fingerprint: Whose key; None without a key.
        committed_at: The commit that first published the claim, or None.
        bytes_read: Bytes fetched in all.
        bytes_total: Bytes of the model's weight files.
        seconds: Wall time.
        notes: Remarks for people, not part of the JSON.
    """

    FORMAT_VERSION: ClassVar[int] = 1

    repo: str
    revision: str | None
    verdict: str
    log10_p: float | None
    alpha: float
    bits: int
    matched: int | None
    tries: int
    reading: str | None
    scheme: str
    carriers: tuple[str, ...]
    key_fingerprint: str | None
    committed_at: str | None
    bytes_read: int
    bytes_total: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the mark was found."""
        return self.verdict == "found"

    @property
    def ber(self) -> float | None:
        """The bit error rate, 0 to 1."""
        return None if self.matched is None else 1.0 - self.matched / self.bits

    def to_dict(self) -> dict[str, Any]:
        """The contract's JSON keys, in its order, with plain types."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "notes"
        }
        fields["carriers"] = list(self.carriers)
        fields["seconds"] = round(self.seconds, 3)
        if self.log10_p == -math.inf:
            fields["log10_p"] = -1e308  # JSON has no infinity
        fields["format_version"] = self.FORMAT_VERSION
        return fields

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
