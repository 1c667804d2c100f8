"""Making a claim about a checkpoint, finding the claim that a suspect should be read by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_watermark.carriers import Carrier, named_carriers, natural_order
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import CarrierMissingError, ClaimError
from hf_watermark.evidence import CLAIM_FILE, Claim, ClaimedCarrier, Seal, canonical_json
from hf_watermark.files import Files
from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme
from hf_watermark.symmetry import layout_of

__all__ = [
    "FoundClaim",
    "check_digests",
    "find_claim",
    "locate_carriers",
    "make_claim",
    "reference_digest",
    "reference_digests",
    "reference_tensors",
]

CLAIM_LIMIT = 4 * 2**20


def make_claim(
    checkpoint: Checkpoint,
    key: OwnerKey,
    scheme: Scheme,
    names: Sequence[str],
    *,
    secret_carriers: bool = False,
    references: Mapping[str, str] | None = None,
    seal: Seal | None = None,
) -> Claim:
    """The signed claim of `key` over tensors of a checkpoint.

    Args:
        checkpoint: What will be published.
        key: The owner's.
        scheme: How the mark was embedded.
        names: The carriers' names in the checkpoint, in the order of the key's streams.
        secret_carriers: Keep the names out of the public copy.
        references: From `reference_digests`, if the tensors that they cover never felt the mark;
            they allow an aligned reading.
        seal: The mark that they never felt, if it is not the key's own; nothing without references.

    Returns:
        The owner's own copy; publish its `public` form.

    Raises:
        CarrierMissingError: If the checkpoint has no tensor of that name.
        CarrierError: If one is named twice, is no matrix, or none is named.
    """
    references = references or {}
    claimed = []
    for carrier in named_carriers(checkpoint.shapes(), names):
        span, digest = checkpoint.tensors[carrier.name], _digest(checkpoint, carrier.name)
        reference = references.get(carrier.name)
        claimed.append(ClaimedCarrier(carrier.name, span.shape, span.dtype, digest, reference))
    return Claim.make(
        key,
        scheme,
        tuple(claimed),
        secret_carriers=secret_carriers,
        seal=seal if references else None,
    )


def reference_tensors(
    shapes: Mapping[str, tuple[int, ...]], carriers: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The tensors that an aligned reading of each carrier needs of the owner's checkpoint.

    No carrier is among them. A carrier that cannot be aligned is left out.

    Args:
        shapes: The owner's tensors.
        carriers: The carriers' names.
    """
    layout = layout_of(shapes)
    supports = {}
    for name in carriers:
        key = None if layout is None else layout.key(name)
        if layout is not None and key is not None:
            support = layout.support(key, carriers)
            if support is not None and all(support_name in shapes for support_name in support):
                supports[name] = support
    return supports


def reference_digests(checkpoint: Checkpoint, carriers: Sequence[str]) -> dict[str, str]:
    """What a claim says of the tensors that align each of its carriers, by the carrier's name."""
    supports = reference_tensors(checkpoint.shapes(), carriers)
    names = {name for support in supports.values() for name in support}
    digests = {name: _digest(checkpoint, name) for name in sorted(names)}
    return {
        carrier: reference_digest({name: digests[name] for name in support})
        for carrier, support in supports.items()
    }


def reference_digest(digests: Mapping[str, str]) -> str:
    """One digest of several tensors, from the sha256 of each by its name, in their order."""
    return hashlib.sha256(canonical_json(list(digests.items()))).hexdigest()


def _digest(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256()
    for part in checkpoint.iter_bytes(name):
        digest.update(part)
    return digest.hexdigest()


def locate_carriers(
    checkpoint: Checkpoint,
    carriers: Sequence[Carrier],
    first_rows: Sequence[npt.NDArray[np.float32]],
) -> list[str]:
    """Where the carriers of a module ended up in a checkpoint that was saved from it.

    transformers renames tensors on saving (ViT's `layers.0.mlp.fc1` becomes
    `encoder.layer.0.intermediate.dense`), so the contents decide.

    Args:
        checkpoint: The saved model.
        carriers: The module's carriers, in order.
        first_rows: Some first rows of each, (r, columns), as they were when it was saved.

    Returns:
        Their names in the checkpoint, in order.

    Raises:
        CarrierMissingError: If one is not there.
    """
    shapes = checkpoint.shapes()
    names: list[str] = []
    for carrier, rows in zip(carriers, first_rows, strict=True):
        same = sorted((n for n, s in shapes.items() if s == carrier.shape), key=natural_order)
        same.sort(key=lambda name: name != carrier.name)
        for name in same:
            if name not in names and np.array_equal(checkpoint.read_rows(name, 0, len(rows)), rows):
                names.append(name)
                break
        else:
            raise CarrierMissingError(
                "A carrier of the model is not in what was saved",
                expected=f"{carrier.name[:120]!r} of shape {list(carrier.shape)}",
                got=f"{len(same)} tensors of that shape with other contents",
                do="save the whole model (merge adapters first), then embed or claim again",
            )
    return names


def check_digests(checkpoint: Checkpoint, claim: Claim) -> int:
    """Check that the claimed carriers are in the checkpoint, byte for byte.

    Returns:
        How many there are.

    Raises:
        ClaimError: If one is missing or differs.
    """
    for claimed in claim.carriers:
        span = checkpoint.tensors.get(claimed.name)
        where = f"{claimed.name[:120]!r} in {checkpoint.files.name}"
        if span is None or (span.shape, span.dtype) != (claimed.shape, claimed.dtype):
            got = "no such tensor" if span is None else f"{span.dtype} {list(span.shape)}"
            raise ClaimError(
                f"The weights are not those claimed: {where}",
                expected=f"{claimed.dtype} {list(claimed.shape)}",
                got=got,
                do="verify with --key: a changed copy still carries the mark",
            )
        digest = _digest(checkpoint, claimed.name)
        if digest != claimed.sha256:
            raise ClaimError(
                f"The weights are not those claimed: {where}",
                expected=f"sha256 {claimed.sha256[:16]}...",
                got=f"{digest[:16]}...",
                do="verify with --key: a changed copy still carries the mark",
            )
    return len(claim.carriers)


@dataclass(frozen=True)
class FoundClaim:
    """A claim with a signature that fits, and where it was found.

    Attributes:
        claim: The claim.
        files: The repo or folder it lies in; None if it was given as a file or an object.
        path: The file that holds it there.
    """

    claim: Claim
    files: Files | None
    path: str = CLAIM_FILE


def find_claim(
    suspect: Files,
    given: Claim | str | os.PathLike[str] | None,
    token: str | bool | None,
    fingerprint: str | None = None,
) -> FoundClaim | None:
    """The claim that was given, else the suspect's own; its signature is checked.

    A second owner's mark moves the first one's claim to `watermark-FINGERPRINT.json`: that of the
    key in hand goes before `watermark.json`.

    Args:
        suspect: The repo or folder that is verified.
        given: A claim, a file, a folder, a repo id, or None.
        token: For the Hub.
        fingerprint: Of the key in hand, if there is one.

    Raises:
        ClaimError: If it is missing where it was said to be, unreadable, or edited.
    """
    if isinstance(given, Claim):
        given.check("the claim that was passed")
        return FoundClaim(given, None)
    if given is not None and os.path.isfile(given):
        return FoundClaim(_read_file(Path(given)), None)
    files = suspect
    if given is not None:
        from hf_watermark.hub import open_files

        files = open_files(given, None, token)
    moved = f"watermark-{fingerprint}.json"
    path = moved if moved in files.sizes else CLAIM_FILE
    if path not in files.sizes:
        if given is None:
            return None
        raise ClaimError(
            f"There is no claim in {files.name}",
            expected=CLAIM_FILE,
            got=f"{len(files.sizes)} other files",
            do="pass the owner's copy of the claim with --claim",
        )
    claim = Claim.from_bytes(files.read(path, CLAIM_LIMIT), files.name)
    claim.check(files.name)
    return FoundClaim(claim, files, path)


def _read_file(path: Path) -> Claim:
    try:
        with open(path, "rb") as file:
            content = file.read(CLAIM_LIMIT + 1)
    except OSError as error:
        raise ClaimError(f"The claim {path} cannot be read", got=error.strerror) from None
    claim = Claim.from_bytes(content, str(path))
    claim.check(str(path))
    return claim
