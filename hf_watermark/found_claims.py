"""The claim that a suspect is read by: where it was found, whose it is, since when it is public."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hf_watermark.errors import ClaimError
from hf_watermark.evidence import CLAIM_FILE, Claim
from hf_watermark.files import Files
from hf_watermark.key import OwnerKey

__all__ = ["CLAIM_LIMIT", "FoundClaim", "committed_at", "find_claim", "usable_claim"]

CLAIM_LIMIT = 4 * 2**20


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


def usable_claim(
    found: FoundClaim | None, keys: tuple[OwnerKey, OwnerKey], given: bool
) -> tuple[FoundClaim | None, tuple[str, ...]]:
    """The claim to read by, if it is the owner's or the recipient's copy's.

    Args:
        found: The claim that was found, whoever's it is.
        keys: The owner's, and the one that reads: the recipient's, or the owner's again.
        given: Whether the claim was asked for; a foreign one is then an error.

    Returns:
        The claim, or None, and what is to be said of that.

    Raises:
        ClaimError: If it does not belong to the keys, or does not name its carriers.
    """
    if found is None:
        return None, ("The repo holds no claim: the default carriers were read.",)
    signer = next((key for key in keys if found.claim.commits_to(key)), None)
    if signer is None:
        if given:
            raise ClaimError(
                "The claim does not belong to this key",
                expected=f"the commitment {keys[0].commitment[:16]}...",
                got=f"{found.claim.commitment[:16]}...",
                do="pass the claim of this key's owner, or the other key",
            )
        return None, ("The repo's claim commits to another key: the default carriers were read.",)
    where = "the owner's copy" if given else found.files.name if found.files else "the repo"
    found.claim.check_secret_carriers(signer, where)
    if found.claim.hides_carriers:
        raise ClaimError(
            "The public claim does not name its carriers",
            expected="the owner's own copy, which does",
            do="pass it with --claim FILE",
        )
    return found, ()


def committed_at(found: FoundClaim | None) -> str | None:
    """The commit that first published a claim of the same key where this one was found."""
    if found is None or found.files is None or found.files.revision is None:
        return None
    from hf_watermark.hub import HubFiles, first_commit

    identity = (found.claim.public_key, found.claim.commitment)

    def is_theirs(content: bytes) -> bool:
        try:
            claim = Claim.from_bytes(content, CLAIM_FILE)
            claim.check(CLAIM_FILE)
        except ClaimError:
            return False
        return (claim.public_key, claim.commitment) == identity

    assert isinstance(found.files, HubFiles)  # a folder has no revision
    return first_commit(found.files, found.path, is_theirs)


def _read_file(path: Path) -> Claim:
    try:
        with open(path, "rb") as file:
            content = file.read(CLAIM_LIMIT + 1)
    except OSError as error:
        raise ClaimError(f"The claim {path} cannot be read", got=error.strerror) from None
    claim = Claim.from_bytes(content, str(path))
    claim.check(str(path))
    return claim
