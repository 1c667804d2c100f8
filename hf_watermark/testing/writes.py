"""Creating, changing and deleting repos, and commits to them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from starlette.responses import JSONResponse, Response

from hf_watermark.testing.accounts import can_write
from hf_watermark.testing.call import Call
from hf_watermark.testing.discussions import open_discussion, record_commit
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.repo_info import front_matter
from hf_watermark.testing.store import Commit, Entry, Repo, check_path
from hf_watermark.testing.uploads import upload_mode

__all__ = [
    "commit",
    "create_repo",
    "delete_repo",
    "preupload",
    "update_settings",
    "validate_yaml",
]


async def _target(call: Call) -> tuple[str, str, dict[str, Any]]:
    body = await call.json()
    user = call.signed_in
    namespace = str(body.get("organization") or user.name)
    repo_type = str(body.get("type") or "model")
    return repo_type, f"{namespace}/{body.get('name')}", body


async def create_repo(call: Call) -> Response:
    """POST api/repos/create."""
    repo_type, repo_id, body = await _target(call)
    call.site.store.folder_of(repo_type, repo_id)
    if not can_write(call.user, repo_id.partition("/")[0]):
        raise Refusal(403, f"You don't have the rights to create a {repo_type} under {repo_id}")
    existing = call.site.store.find(repo_type, repo_id)
    if existing is not None:
        url = f"{call.site.endpoint}{existing.url_path}"
        message = f"You already created this {repo_type} repo"
        raise Refusal(409, message, body={"url": url})
    private = body.get("visibility") == "private" or body.get("private") is True
    author = call.signed_in.name
    repo = call.site.store.create(repo_type, repo_id, author=author, private=private)
    url = f"{call.site.endpoint}{repo.url_path}"
    return JSONResponse({"url": url, "name": repo.id, "id": repo.id})


async def delete_repo(call: Call) -> Response:
    """DELETE api/repos/delete."""
    repo_type, repo_id, _ = await _target(call)
    call.found = call.find_repo(repo_type, repo_id)
    call.site.store.delete(call.require_write())
    return JSONResponse({"success": True})


async def update_settings(call: Call) -> Response:
    """PUT settings: visibility and gate."""
    repo = call.require_write()
    body = await call.json()
    unknown = set(body) - {"visibility", "private", "gated"}
    if unknown:
        raise Refusal.bad_request(f"The loopback Hub has no settings {sorted(unknown)}")
    if "visibility" in body:
        repo.private = body["visibility"] == "private"
    if "private" in body:
        repo.private = bool(body["private"])
    if "gated" in body:
        repo.gated = body["gated"]
    repo.save()
    return JSONResponse({"private": repo.private, "gated": repo.gated})


async def validate_yaml(call: Call) -> Response:
    """POST api/validate-yaml: the metadata of a card."""
    content = str((await call.json()).get("content", ""))
    errors: list[str] = []
    warnings: list[str] = []
    try:
        data = front_matter(content)
    except yaml.YAMLError as error:
        data = {}
        errors.append(f"Invalid YAML: {error}")
    if data is None or data == {}:
        warnings.append("empty or missing yaml metadata in repo card")
    elif not isinstance(data, dict):
        errors.append("The metadata must be an object")
    else:
        errors += _metadata_errors(data)
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [] if errors else [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, status_code=400 if errors else 200)


def _metadata_errors(data: dict[object, object]) -> Iterator[str]:
    for key in ("tags", "datasets"):
        value = data.get(key)
        ok = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if value is not None and not ok and not (key == "datasets" and isinstance(value, str)):
            yield f'"{key}" must be an array of strings'
    for key in ("license", "library_name", "pipeline_tag"):
        value = data.get(key)
        if value is not None and not isinstance(value, (str, list)):
            yield f'"{key}" must be a string'
    index = data.get("model-index")
    if index is not None and not (
        isinstance(index, list)
        and all(isinstance(model, dict) and {"name", "results"} <= set(model) for model in index)
    ):
        yield '"model-index" must be an array of objects with "name" and "results"'


async def preupload(call: Call) -> Response:
    """POST preupload/rev: LFS or not, and what is there already."""
    # Anyone may open a pull request, which starts with this call.
    repo, _ = call.repo, call.signed_in
    if not call.flag("create_pr"):
        _require_push(call, call.only_arg())
    head = repo.resolve(call.only_arg())
    files = []
    for item in (await call.json()).get("files", []):
        try:
            path, size = check_path(item.get("path")), int(item.get("size", 0))
            sample = base64.b64decode(item.get("sample", ""))
        except (AttributeError, TypeError, ValueError):
            raise Refusal.bad_request("Not a file with path, size and sample") from None
        entry = head.files.get(path)
        files.append(
            {
                "path": path,
                "uploadMode": upload_mode(path, size, sample),
                "shouldIgnore": False,
                "oid": entry.etag if entry is not None else None,
            }
        )
    return JSONResponse({"files": files})


def _require_push(call: Call, revision: str) -> None:
    """Writers may push anywhere, the author of a pull request to its ref."""
    for pull in call.repo.discussions:
        if pull.get("ref") == revision and pull["author"] == call.signed_in.name:
            return
    call.require_write()


async def commit(call: Call) -> Response:
    """POST commit/rev[?create_pr=1]."""
    repo, user, revision = call.repo, call.signed_in, call.only_arg()
    create_pr = call.flag("create_pr")
    if not create_pr:
        _require_push(call, revision)
    header, operations = _parse(await call.request.body())
    title, message = str(header.get("summary", "")), str(header.get("description", ""))
    if not title:
        raise Refusal.bad_request("The commit has no summary")
    parent = header.get("parentCommit")
    head = repo.resolve(revision)
    if create_pr:
        base = repo.resolve(str(parent)) if parent else head
    else:
        base = head
        # Shorthands are allowed, as on the Hub.
        if parent and not (len(str(parent)) >= 7 and head.id.startswith(str(parent))):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    ref = repo.find_ref(revision)
    if ref is None and not create_pr:
        raise Refusal.bad_request(f"Not a branch: {revision}")
    files = _apply(repo, base, operations)
    made = call.site.store.add_commit(repo, (base.id,), title, message, user.name, files)
    answer: dict[str, Any] = {
        "success": True,
        "commitOid": made.id,
        "commitUrl": f"{call.site.endpoint}{repo.url_path}/commit/{made.id}",
        "hookOutput": "",
    }
    if create_pr:
        pull = open_discussion(repo, user.name, title, message, base=base.id, status="open")
        repo.pulls[pull["ref"]] = made.id
        record_commit(repo, pull["ref"], made)
        page = f"{call.site.endpoint}{repo.url_path}/discussions/{pull['num']}"
        answer["pullRequestUrl"] = page
    elif ref is not None:
        table, key = ref
        table[key] = made.id
        record_commit(repo, key, made)
    repo.save()
    return JSONResponse(answer)


def _parse(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header and the operations of an NDJSON body."""
    header: dict[str, Any] | None = None
    operations = []
    for line in body.splitlines():
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError):
            raise Refusal.bad_request("The body is not NDJSON of keys and values") from None
        if not isinstance(value, dict):
            raise Refusal.bad_request(f"{key}: the value is not an object")
        if key == "header":
            header = value
        else:
            operations.append((str(key), value))
    if header is None:
        raise Refusal.bad_request("The commit has no header")
    return header, operations


def _apply(
    repo: Repo, base: Commit, operations: list[tuple[str, dict[str, Any]]]
) -> dict[str, Entry]:
    """The tree after the operations."""
    files = dict(base.files)
    for key, value in operations:
        path = check_path(str(value.get("path", "")).rstrip("/"))
        if key == "file":
            _make_room(files, path)
            files[path] = repo.add_blob(_content(value))
        elif key == "lfsFile":
            _make_room(files, path)
            files[path] = _large(repo, value)
        elif key == "deletedFile":
            if path not in files:
                message = "A file with this name doesn't exist"
                raise Refusal(404, message, code="EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            below = [name for name in files if name.startswith(f"{path}/")]
            if not below:
                message = "A folder with this name doesn't exist"
                raise Refusal(404, message, code="EntryNotFound")
            for name in below:
                del files[name]
        else:
            raise Refusal.bad_request(f"The loopback Hub has no operation {key!r}")
    return files


def _make_room(files: dict[str, Entry], path: str) -> None:
    """Refuse a file where a folder is, or under a file."""
    parents = path.split("/")[:-1]
    above = ["/".join(parents[: i + 1]) for i in range(len(parents))]
    if any(name in files for name in above) or any(n.startswith(f"{path}/") for n in files):
        raise Refusal.bad_request(f"A file and a folder would have the same name: {path}")


def _content(value: dict[str, Any]) -> bytes:
    content = str(value.get("content", ""))
    if value.get("encoding") != "base64":
        return content.encode()
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        raise Refusal.bad_request("The content is not base64") from None


def _large(repo: Repo, value: dict[str, Any]) -> Entry:
    oid = str(value.get("oid"))
    path = repo.blob_path(oid)
    if not path.exists():
        raise Refusal.bad_request(f"LFS pointer pointed to a file that does not exist: {oid}")
    size = path.stat().st_size
    if value.get("size", size) != size:
        raise Refusal.bad_request(f"LFS pointer has a wrong size: {value['size']}, is {size}")
    return Entry.large(oid, size)
