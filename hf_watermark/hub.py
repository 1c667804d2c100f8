"""Repos on the Hub: read at one commit by ranges, asked for their history.

Reading costs a request for the listing and one per range. It imports huggingface_hub's client but
not its API class, which takes twice as long to import: `transfers` does.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from hf_watermark.connection import (
    Connection,
    FileMissingError,
    Patience,
    Target,
    TooLongError,
)
from hf_watermark.errors import AccessDeniedError, HubError, NetworkGaveUpError
from hf_watermark.files import Files, FolderFiles, check_limit
from hf_watermark.safetensors_ranges import Reader, quoted

if TYPE_CHECKING:
    pass

__all__ = ["HubFiles", "bad_repo_id", "first_commit", "open_files", "request_headers"]

_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_ORG_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LISTING_LIMIT = 64 * 2**20
_COMMITS_PER_PAGE = 1000
_MAX_PAGES = 50
_CLAIM_LIMIT = 2**20


class HubFiles:
    """The files of a model repo at one commit, read by ranges.

    The revision is resolved once: a push in the middle of the reading changes nothing. Safe to use
    from several threads.

    Args:
        repo_id: ``org/name``.
        revision: A branch, tag, ``refs/pr/N`` or sha; the default branch by default.
        token: As in huggingface_hub: a token, None for the saved one, False for none. It is sent to
            the Hub only, not to where the Hub redirects.
        patience: When to give up on a failing server.

    Raises:
        RepoMissingError: No such repo, or it is private and the token may not see it.
        AccessDeniedError: The token may not read it.
        RevisionMissingError: No such revision.
        NetworkGaveUpError: The server cannot be reached, keeps failing, or answers nonsense.
        HubError: The repo id is malformed.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        *,
        patience: Patience | None = None,
    ) -> None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise bad_repo_id(repo_id) from None
        self.name = repo_id
        self._endpoint = constants.ENDPOINT
        self._connection = Connection(get_session, request_headers(token), patience or Patience())
        self._bytes_read = 0
        self._lock = threading.Lock()
        target = Target(repo_id, revision)
        at = "" if revision is None else f"/revision/{quote(revision, safe='', errors='replace')}"
        url = f"{self._endpoint}/api/models/{repo_id}{at}?blobs=true"
        info = _parse(self._connection.get(url, target, limit=_LISTING_LIMIT).body, target)
        try:
            self.revision: str = info["sha"]
            self.sizes: Mapping[str, int] = {
                sibling["rfilename"]: sibling["size"] for sibling in info["siblings"]
            }
        except (KeyError, TypeError):
            raise _nonsense(target, "a sha and files with sizes") from None
        if not (
            isinstance(self.revision, str)
            and _SHA.fullmatch(self.revision)
            and all(isinstance(path, str) for path in self.sizes)
            and all(type(size) is int and size >= 0 for size in self.sizes.values())
        ):
            raise _nonsense(target, "a sha and files with sizes")

    @property
    def bytes_read(self) -> int:
        """Bytes received from files so far, those of failed tries included."""
        return self._bytes_read

    def reader(self, path: str) -> Reader:
        """Read ranges of a file in the listing.

        Raises:
            HubError: It is not there.
        """
        return _HubReader(self, path, self._size(path))

    def read(self, path: str, limit: int) -> bytes:
        """Read a whole file of at most ``limit`` bytes.

        Raises:
            HubError: It is not there, or could not be read.
            CheckpointError: It is larger.
        """
        size = self._size(path)
        check_limit(self.name, path, size, limit)
        return self._get(path, self.revision, limit, size=size) if size else b""

    def read_at(self, path: str, commit: str, limit: int) -> bytes | None:
        """Read a whole file as another commit has it; None where it does not."""
        try:
            return self._get(path, commit, limit)
        except FileMissingError:
            return None

    def commits(self) -> list[str]:
        """The shas of this commit and its ancestors, newest first.

        Raises:
            HubError: There are more than 50,000.
        """
        target = Target(self.name, self.revision)
        url: str | None = (
            f"{self._endpoint}/api/models/{self.name}/commits/{self.revision}"
            f"?limit={_COMMITS_PER_PAGE}"
        )
        found: list[str] = []
        for _ in range(_MAX_PAGES):
            answer = self._connection.get(url or "", target, limit=_LISTING_LIMIT)
            page = _parse(answer.body, target)
            try:
                found += [str(commit["id"]) for commit in page]
            except (KeyError, TypeError):
                raise _nonsense(target, "a list of commits") from None
            url = answer.next_url
            if url is None:
                return found
            if urlsplit(url)[:2] != urlsplit(self._endpoint)[:2]:  # it would get the token
                raise _nonsense(target, "the next page at the same origin")
        raise HubError(f"{target} has too long a history", expected=f"at most {len(found)} commits")

    def _size(self, path: str) -> int:
        if path not in self.sizes:
            raise FileMissingError(f"there is no {Target(self.name, self.revision, path)}")
        return self.sizes[path]

    def _get(
        self,
        path: str,
        revision: str,
        limit: int,
        *,
        span: tuple[int, int] | None = None,
        size: int | None = None,
    ) -> bytes:
        url = f"{self._endpoint}/{self.name}/resolve/{revision}/{quote(path, errors='replace')}"
        target = Target(self.name, revision, path)
        return self._connection.get(
            url, target, limit=limit, span=span, size=size, count=self._count
        ).body

    def _count(self, received: int) -> None:
        with self._lock:
            self._bytes_read += received


class _HubReader:
    """One file of a `HubFiles`."""

    def __init__(self, files: HubFiles, path: str, size: int) -> None:
        self.name = f"{files.name}/{path}"
        self.size = size
        self._get = partial(files._get, path, files.revision, size=size)

    def read(self, start: int, stop: int) -> bytes:
        return self._get(stop - start, span=(start, stop)) if start < stop else b""


def open_files(
    where: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    *,
    patience: Patience | None = None,
) -> Files:
    """Open ``org/name`` on the Hub, or a local folder or safetensors file.

    What exists locally wins, as in `from_pretrained`; but a folder has no revisions, so with one
    ``org/name`` is the repo, also beside a folder of that name, such as a Trainer's output.

    Args:
        where: A repo id or a path; a path that starts with ``.``, ``/`` or ``~`` is never a repo.
        revision: Of a repo only.
        token: See `HubFiles`.
        patience: See `HubFiles`.

    Raises:
        HubError: It is neither, or a revision is asked of a folder.
        CheckpointError: A path that is not there.
    """
    text = os.fspath(where)
    path = os.path.expanduser(text)
    is_path = not isinstance(where, str) or text.startswith((".", "~")) or os.path.isabs(path)
    is_repo_id = _ORG_NAME.fullmatch(text) is not None
    asks_for_repo = is_repo_id and revision is not None and not os.path.isfile(path)
    if is_path or ("\0" not in path and os.path.exists(path) and not asks_for_repo):
        if revision is not None:
            raise HubError(
                f"{quoted(text, 300)} is a local folder and has no revision {quoted(revision)}",
                do="leave the revision out, or give org/name",
            )
        return FolderFiles(path)
    if not is_repo_id:
        raise bad_repo_id(text)
    return HubFiles(text, revision, token, patience=patience)


def first_commit(
    files: HubFiles, path: str, accept: Callable[[bytes], bool], limit: int = _CLAIM_LIMIT
) -> str | None:
    """The commit that first published an acceptable version of a file.

    Found by bisection, in 1 + log2(commits) requests or so. Law: the commit has an acceptable
    version and its predecessor in the history does not. Where a version was removed and
    published again, any of its publications may be found, so the answer is never earlier than
    the truth. The history is what the Hub shows now: its owner can rewrite it.

    Args:
        files: The repo at the commit to start from.
        path: The file.
        accept: Whether its bytes count.
        limit: Versions of more bytes do not count.

    Returns:
        A full commit sha; None if the version at the pinned commit does not count.
    """

    def has(commit: str) -> bool:
        try:
            content = files.read_at(path, commit, limit)
        except TooLongError:
            return False
        return content is not None and accept(content)

    if path not in files.sizes or files.sizes[path] > limit or not has(files.revision):
        return None
    commits = files.commits()
    with_it, without = 0, len(commits)  # the oldest commit's predecessor is empty
    while without - with_it > 1:
        middle = (with_it + without) // 2
        if has(commits[middle]):
            with_it = middle
        else:
            without = middle
    return commits[with_it] if commits else files.revision


def request_headers(token: str | bool | None) -> dict[str, str]:
    """The headers of each request; raise for a token that could not be one.

    `build_hf_headers` is not used: it asks the Hub which coding agents there are, before anything
    else and without a retry (huggingface_hub 2.4). A token with a line break would end up quoted
    in the HTTP client's error.
    """
    from importlib import metadata

    from huggingface_hub import __version__, constants

    try:
        own_version = metadata.version("hf-watermark")
    except metadata.PackageNotFoundError:
        own_version = "unknown"
    headers = {"user-agent": f"hf-watermark/{own_version}; hf_hub/{__version__}"}
    try:
        if token is True or (token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
            from huggingface_hub import get_token  # 20 ms more, which a given token saves

            sent = get_token()
        else:
            sent = token or None
    except Exception as error:  # an exchange of tokens that HF_OIDC_RESOURCE asks for
        raise AccessDeniedError(
            "the saved token cannot be had", got=type(error).__name__, do="pass --token"
        ) from None
    if sent is None:
        if token is True:
            raise AccessDeniedError(
                "no token is saved on this machine", do="pass --token, or set HF_TOKEN"
            )
        return headers
    if not (sent.isascii() and sent.isprintable()):
        raise AccessDeniedError(
            "the token holds characters that no token holds", do="copy it again"
        )
    headers["authorization"] = f"Bearer {sent}"
    return headers


def _parse(body: bytes, target: Target) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _nonsense(target, "JSON") from None


def _nonsense(target: Target, expected: str) -> NetworkGaveUpError:
    return NetworkGaveUpError(
        f"the Hub's answer about {target} makes no sense",
        expected=expected,
        do="check HF_ENDPOINT and the proxy settings",
    )


def bad_repo_id(repo_id: str) -> HubError:
    """What to raise for something that is neither a repo id nor a path."""
    return HubError(
        f"{quoted(repo_id, 120)} is neither a repo nor a folder that exists",
        expected="org/name or a path",
        do="check the spelling; a folder may be written with ./ in front",
    )
