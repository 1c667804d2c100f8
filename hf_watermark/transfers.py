"""Whole files to and from the Hub: commits, and downloads of a repo.

Unlike reading ranges this takes huggingface_hub's API class, imported only when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_watermark.connection import Target, refusal
from hf_watermark.errors import CardConflictError, HubError, NetworkGaveUpError
from hf_watermark.hub import HubFiles, bad_repo_id, request_headers
from hf_watermark.safetensors_ranges import quoted

if TYPE_CHECKING:
    import httpx2

__all__ = ["Commit", "commit_files", "commit_folder", "download"]


@dataclass(frozen=True)
class Commit:
    """A commit as the Hub reports it.

    Attributes:
        oid: Its full sha.
        url: Its page.
        pull_request_url: The page of the pull request that holds it, if it was opened as one.
    """

    oid: str
    url: str
    pull_request_url: str | None = None


def commit_files(
    repo_id: str,
    contents: Mapping[str, bytes],
    message: str,
    *,
    parent_commit: str | None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Commit:
    """Write files in one commit.

    Args:
        repo_id: ``org/name``.
        contents: The new bytes by path.
        message: The commit's title.
        parent_commit: The full sha that the contents were made for; the commit fails if the branch
            has moved. None commits on top of anything.
        revision: The branch; the default branch by default.
        create_pr: Open a pull request instead.
        token: See `HubFiles`.

    Raises:
        CardConflictError: The branch is no longer at ``parent_commit``.
        AccessDeniedError: The token may not write.
        HubError: As in `HubFiles`, or the Hub refuses the contents.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    target = Target(repo_id, revision)
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    request_headers(token)
    with _in_our_words(target, "the commit to"):
        done = HfApi(token=token).create_commit(
            repo_id,
            operations,
            commit_message=message,
            parent_commit=parent_commit,
            revision=revision,
            create_pr=create_pr,
        )
    return Commit(done.oid, done.commit_url, done.pr_url)


def commit_folder(
    repo_id: str,
    folder: Path,
    message: str,
    *,
    token: str | bool | None = None,
) -> Commit:
    """Make the repo if it is missing, and write a folder into it in one commit.

    Weights of another layout that the repo held before are deleted in the same commit: loaders
    would prefer a `model.safetensors` that was left behind.

    Args:
        repo_id: ``org/name``.
        folder: What to upload.
        message: The commit's title.
        token: See `HubFiles`.

    Raises:
        AccessDeniedError: The token may not write.
        HubError: As in `HubFiles`, or the Hub refuses the contents.
    """
    from huggingface_hub import HfApi

    request_headers(token)
    api = HfApi(token=token)
    with _in_our_words(Target(repo_id, None), "the upload to"):
        api.create_repo(repo_id, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return Commit(done.oid, done.commit_url, done.pr_url)


def download(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    only: Sequence[str] | None = None,
) -> Path:
    """Fetch a model repo into huggingface_hub's cache, at one commit.

    Args:
        repo_id: ``org/name``.
        revision: A branch, tag or sha; the default branch by default.
        token: See `HubFiles`.
        only: Patterns of the files that are wanted, such as `*.json`; all by default.

    Returns:
        The folder of the snapshot; its files are links.

    Raises:
        HubError: As in `HubFiles`.
    """
    from huggingface_hub import snapshot_download

    files = HubFiles(repo_id, revision, token)  # refused before anything is fetched
    with _in_our_words(Target(repo_id, files.revision), "the download of"):
        fetched = snapshot_download(
            repo_id,
            revision=files.revision,
            token=token,
            allow_patterns=None if only is None else list(only),
        )
        return Path(fetched)


@contextmanager
def _in_our_words(target: Target, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into `HubError`s."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(error.response, target) from None
    except (httpx2.HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise NetworkGaveUpError(
            f"{doing} {target} failed",
            got=type(error).__name__,
            do="check the connection, look what arrived, and run it again",
        ) from None
    except HFValidationError:
        raise bad_repo_id(target.repo_id) from None
    except ValueError as error:  # the Hub's check of the card's YAML, or a malformed parent
        raise HubError(f"{doing} {target} is refused", got=quoted(str(error), 300)) from None


def _refusal(response: httpx2.Response, target: Target) -> HubError:
    if response.status_code in (409, 412):
        return CardConflictError(
            f"{target} changed between reading and writing",
            got=f"HTTP {response.status_code}",
            do="run it again: it starts from the new commit",
        )
    return refusal(response.status_code, response.headers, target)
