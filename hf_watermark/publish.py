"""Writing evidence where people look: the model card of a repo on the Hub, or of a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hf_watermark.card import updated_card
from hf_watermark.errors import WatermarkError
from hf_watermark.evidence import Claim, Evidence
from hf_watermark.files import Files
from hf_watermark.key import OwnerKey

__all__ = ["CARD_FILE", "push_folder", "read_card_text", "write_card", "write_file"]

CARD_FILE = "README.md"
_CARD_LIMIT = 2**20


def read_card_text(files: Files) -> str | None:
    """The text of the card, line endings and all; None if there is none.

    Raises:
        WatermarkError: If it is not UTF-8.
    """
    if CARD_FILE not in files.sizes:
        return None
    try:
        return files.read(CARD_FILE, _CARD_LIMIT).decode()
    except UnicodeDecodeError:
        raise WatermarkError(
            f"The card of {files.name} cannot be read",
            expected="UTF-8 text",
            do="save it as UTF-8, then run this again",
        ) from None


def write_card(
    files: Files,
    evidence: Evidence,
    claim: Claim | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Put the evidence into the card, leaving every other byte of it as it is.

    On the Hub the commit's parent is the revision that was read, so a card that changed meanwhile
    is never overwritten.

    Args:
        files: The repo at the revision that was read, or the folder.
        evidence: What was found.
        claim: The claim it rests on.
        revision: The branch to write to; the default branch by default.
        token: One that may write.
        create_pr: Open a pull request instead.

    Returns:
        The page of the commit or pull request, or the path of the file.

    Raises:
        CardConflictError: If the repo changed since the evidence was read.
        WatermarkError: If the card cannot be read or written.
    """
    from hf_watermark.transfers import commit_files

    if files.revision is None:
        _check_folder(files, create_pr)
    elif revision == files.revision:
        raise WatermarkError(
            f"The card of {files.name} cannot be written to a commit",
            expected="a branch, or none for the default one",
            got=revision,
            do="leave the revision out, or give a branch or refs/pr/N",
        )
    old = read_card_text(files)
    new = updated_card(old, evidence, None if claim is None else claim.public)
    if files.revision is None:
        path = Path(os.path.expanduser(files.name)) / CARD_FILE
        write_file(path, new.encode())
        return str(path)
    if new == old:
        return f"{files.name}, as it was"
    commit = commit_files(
        files.name,
        {CARD_FILE: new.encode()},
        "Add watermark evidence to the model card",
        parent_commit=files.revision,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    return commit.pull_request_url or commit.url


def _check_folder(files: Files, create_pr: bool) -> None:
    if create_pr:
        raise WatermarkError(
            f"{files.name} is a local folder and has no pull requests",
            do="write its card with --write-card, or give org/name",
        )
    if not os.path.isdir(os.path.expanduser(files.name)):
        raise WatermarkError(
            f"{files.name} is a single file and has no card", do="give the folder that holds it"
        )


def push_folder(
    repo: str, folder: Path, key: OwnerKey, claim: Claim, *, token: str | bool | None = None
) -> str:
    """Push a marked folder, read the mark back from the Hub, and write that into the card.

    Args:
        repo: `org/name`; made if it is missing.
        folder: The marked checkpoint with its public claim.
        key: The owner's.
        claim: The owner's copy of the claim.
        token: One that may write.

    Returns:
        The page of the commit that holds the card.

    Raises:
        WatermarkError: If it cannot be pushed, read or written.
    """
    from hf_watermark.hub import HubFiles
    from hf_watermark.transfers import commit_folder
    from hf_watermark.verify import verify_hub_model

    commit = commit_folder(repo, folder, "Upload marked model", token=token)
    given = claim if claim.carriers_commitment is not None else None
    evidence = verify_hub_model(
        repo, key, claim=given, revision=commit.oid, read="all", token=token
    )
    return write_card(HubFiles(repo, commit.oid, token), evidence, claim, token=token)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that at no moment half of it is there.

    Raises:
        WatermarkError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WatermarkError(
            f"{path} cannot be written", got=error.strerror, do="check rights and space left"
        ) from None
