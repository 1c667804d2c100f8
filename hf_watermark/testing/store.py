"""Repos on disk: blobs named by their SHA-256, commits and refs as JSON.

Layout of a repo's folder (`repos/<type>s/<namespace>/<name>`): `repo.json` (settings, refs,
discussions), `commits/<id>.json` (message and the whole tree), `blobs/<sha256>`. File paths of a
repo are keys of JSON objects only and never become paths on this disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_watermark.testing.refusal import Refusal

__all__ = ["REPO_TYPES", "Commit", "Entry", "Repo", "Store", "check_path", "now"]

REPO_TYPES = ("model", "dataset", "space")

_NAMESPACE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,40}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9_](?:[\w./-]{0,120}[A-Za-z0-9_])?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")

_LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet", "*.arrow", "*.pt", "*.onnx", "*.zip")
_GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS
).encode()


def now() -> str:
    """This moment as the Hub writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_path(path: object) -> str:
    """A file path of a repo, or a refusal if no repo could hold it."""
    if not isinstance(path, str) or not path or len(path) > 4096 or "\0" in path or "\\" in path:
        raise Refusal.bad_request(f"Invalid path: {path!r}")
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts):
        raise Refusal.bad_request(f"Invalid path: {path!r}")
    return path


@dataclass(frozen=True)
class Entry:
    """A file in a commit.

    Attributes:
        oid: Git's SHA-1 of the blob, or of the pointer if the file is in LFS.
        size: Bytes of the content.
        sha256: Names the blob in the repo's folder.
        lfs: Whether downloads are redirected to the second origin.
    """

    oid: str
    size: int
    sha256: str
    lfs: bool

    @classmethod
    def regular(cls, data: bytes) -> Entry:
        """The entry of content kept in git itself."""
        return cls(_git_oid(data), len(data), hashlib.sha256(data).hexdigest(), False)

    @classmethod
    def large(cls, sha256: str, size: int) -> Entry:
        """The entry of content kept in LFS."""
        return cls(_git_oid(_pointer(sha256, size)), size, sha256, True)

    @property
    def etag(self) -> str:
        """What the client caches the content under."""
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer."""
        return len(_pointer(self.sha256, self.size))


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return text.encode()


@dataclass(frozen=True)
class Commit:
    """A commit with its whole tree."""

    id: str
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]

    def entry(self, path: str) -> Entry:
        """The file at a path.

        Raises:
            Refusal: 404 with `EntryNotFound`.
        """
        entry = self.files.get(path)
        if entry is None:
            raise Refusal.no_such_entry(path, commit=self.id)
        return entry


@dataclass
class Repo:
    """One repo: settings, refs, commits, discussions. Only the server's thread changes it."""

    folder: Path
    type: str
    namespace: str
    name: str
    private: bool = False
    gated: str | bool = False
    created_at: str = field(default_factory=now)
    granted: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def url_path(self) -> str:
        """The repo's page, without the endpoint."""
        return f"/{self.id}" if self.type == "model" else f"/{self.type}s/{self.id}"

    def find_ref(self, revision: str) -> tuple[dict[str, str], str] | None:
        """The table and the key of a branch or a pull request's ref that can be moved."""
        if revision.startswith("refs/heads/"):
            revision = revision[len("refs/heads/") :]
        if revision in self.branches:
            return self.branches, revision
        return (self.pulls, revision) if revision in self.pulls else None

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request's ref, or (abbreviated) commit id.

        Raises:
            Refusal: 404 with `RevisionNotFound`.
        """
        ref = self.find_ref(revision)
        tag = revision[len("refs/tags/") :] if revision.startswith("refs/tags/") else revision
        if ref is not None:
            return self.commits[ref[0][ref[1]]]
        if tag in self.tags:
            return self.commits[self.tags[tag]]
        if revision in self.commits:
            return self.commits[revision]
        if len(revision) >= 7:
            hits = [commit for sha, commit in self.commits.items() if sha.startswith(revision)]
            if len(hits) == 1:
                return hits[0]
        raise Refusal.no_such_revision(revision)

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors along the first parents, newest first."""
        while True:
            yield commit
            if not commit.parents:
                return
            commit = self.commits[commit.parents[0]]

    def blob_path(self, sha256: str) -> Path:
        """Where the content with this digest is, or would be."""
        if _SHA256.fullmatch(sha256) is None:
            raise Refusal.bad_request(f"Not a sha256: {sha256!r}")
        return self.folder / "blobs" / sha256

    def read(self, entry: Entry) -> bytes:
        """The whole content of a small file."""
        return self.blob_path(entry.sha256).read_bytes()

    def add_blob(self, data: bytes) -> Entry:
        """Keep content in git and return its entry."""
        entry = Entry.regular(data)
        path = self.blob_path(entry.sha256)
        if not path.exists():
            _write(path, data)
        return entry

    def save(self) -> None:
        """Write everything but the commits."""
        keys = ["type", "namespace", "name", "private", "gated", "created_at", "granted"]
        keys += ["branches", "tags", "pulls", "discussions"]
        _write_json(self.folder / "repo.json", {key: getattr(self, key) for key in keys})


class Store:
    """All repos of one folder.

    Args:
        folder: Where to keep them; what a former run left there is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uploads = folder / "uploads"
        # Clients cache trees by commit id: the salt keeps ids of two runs apart.
        self._salt = secrets.token_bytes(16)
        self._count = itertools.count()
        self._repos: dict[tuple[str, str], Repo] = {}
        (folder / "repos").mkdir(parents=True, exist_ok=True)
        self.uploads.mkdir(exist_ok=True)
        for path in sorted((folder / "repos").glob("*/*/*/repo.json")):
            repo = _load(path.parent)
            self._repos[repo.type, repo.id] = repo

    def __iter__(self) -> Iterator[Repo]:
        return iter(list(self._repos.values()))

    def find(self, repo_type: str, repo_id: str) -> Repo | None:
        """The repo, or None."""
        return self._repos.get((repo_type, repo_id))

    def folder_of(self, repo_type: str, repo_id: str) -> Path:
        """The folder of a repo, which need not exist.

        Raises:
            Refusal: 400 for a type or an id that no repo can have.
        """
        namespace, _, name = repo_id.partition("/")
        fits = _NAMESPACE.fullmatch(namespace) and _NAME.fullmatch(name)
        if not fits or repo_type not in REPO_TYPES or ".." in name or name.endswith(".git"):
            raise Refusal.bad_request(f"Invalid repo: {repo_type} {repo_id!r}")
        return self.folder / "repos" / f"{repo_type}s" / namespace / name

    def create(self, repo_type: str, repo_id: str, *, author: str, private: bool) -> Repo:
        """Create a repo with the Hub's first commit, which holds `.gitattributes`."""
        folder = self.folder_of(repo_type, repo_id)
        if (repo_type, repo_id) in self._repos:
            raise Refusal(409, f"You already created this {repo_type} repo: {repo_id}")
        (folder / "blobs").mkdir(parents=True)
        (folder / "commits").mkdir()
        namespace, _, name = repo_id.partition("/")
        repo = Repo(folder, repo_type, namespace, name, private=private)
        files = {".gitattributes": repo.add_blob(_GITATTRIBUTES)}
        first = self.add_commit(repo, (), "initial commit", "", author, files)
        repo.branches["main"] = first.id
        repo.save()
        self._repos[repo_type, repo_id] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        """Delete a repo and every byte of it."""
        del self._repos[repo.type, repo.id]
        shutil.rmtree(repo.folder)

    def add_commit(
        self,
        repo: Repo,
        parents: Iterable[str],
        title: str,
        message: str,
        author: str,
        files: Mapping[str, Entry],
    ) -> Commit:
        """Write a commit; moving a ref to it is the caller's part."""
        serial = f"{next(self._count)} {repo.type} {repo.id}".encode()
        sha = hashlib.sha1(self._salt + serial).hexdigest()
        ordered = dict(sorted(files.items()))
        commit = Commit(sha, tuple(parents), title, message, author, now(), ordered)
        _write_json(repo.folder / "commits" / f"{sha}.json", asdict(commit))
        repo.commits[sha] = commit
        return commit

    @staticmethod
    def check_branch(name: str) -> str:
        """A name for a branch or a tag, or a refusal."""
        if _BRANCH.fullmatch(name) is None or ".." in name or "//" in name:
            raise Refusal.bad_request(f"Invalid branch or tag name: {name!r}")
        return name


def _load(folder: Path) -> Repo:
    settings = json.loads((folder / "repo.json").read_text(encoding="utf-8"))
    repo = Repo(folder=folder, **settings)
    for path in (folder / "commits").glob("*.json"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["files"] = {name: Entry(**entry) for name, entry in raw["files"].items()}
        raw["parents"] = tuple(raw["parents"])
        repo.commits[raw["id"]] = Commit(**raw)
    return repo


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _write_json(path: Path, value: object) -> None:
    # Not escaped to ASCII: a search for leaked bytes must find them as they are.
    _write(path, json.dumps(value, ensure_ascii=False, indent=1).encode())
