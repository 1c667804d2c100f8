"""Reading a repo's trees, commits and refs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse, Response

from hf_watermark.testing.call import Call
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Commit, Repo, check_path

__all__ = [
    "create_branch",
    "create_tag",
    "delete_branch",
    "delete_tag",
    "list_commits",
    "list_refs",
    "list_tree",
    "paths_info",
]

_EXPANDED_PAGE = 50


def _below(commit: Commit, folder: str) -> dict[str, Any]:
    prefix = f"{folder}/" if folder else ""
    return {path: entry for path, entry in commit.files.items() if path.startswith(prefix)}


def _folder_oid(commit: Commit, folder: str) -> str:
    listing = "\n".join(f"{entry.oid} {path}" for path, entry in _below(commit, folder).items())
    return hashlib.sha1(f"tree {folder}\n{listing}".encode()).hexdigest()


def _item(commit: Commit, path: str) -> dict[str, Any]:
    entry = commit.files.get(path)
    if entry is None:
        return {"type": "directory", "oid": _folder_oid(commit, path), "size": 0, "path": path}
    item = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        item["lfs"] = lfs
    return item


def _expand(repo: Repo, commit: Commit, items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each item the last commit that changed it."""
    expanded = []
    for item in items:
        last = commit
        for older in repo.history(commit):
            files = _below(older, item["path"])
            if item["type"] == "file":
                same = item["path"] in older.files and older.files[item["path"]].oid == item["oid"]
            else:
                same = bool(files) and _folder_oid(older, item["path"]) == item["oid"]
            if not same:
                break
            last = older
        info = {"id": last.id, "title": last.title, "date": last.date}
        expanded.append({**item, "lastCommit": info})
    return expanded


def _folders(commit: Commit) -> set[str]:
    found = set()
    for path in commit.files:
        while "/" in path:
            path = path.rpartition("/")[0]
            found.add(path)
    return found


async def list_tree(call: Call) -> Response:
    """GET tree/rev[/path]."""
    revision, folder = call.revision_and_path()
    commit = call.repo.resolve(revision)
    folders = _folders(commit)
    if folder and folder not in folders:
        raise Refusal.no_such_entry(folder, commit=commit.id)
    prefix = f"{folder}/" if folder else ""
    paths = [p for p in sorted({*folders, *commit.files}) if p.startswith(prefix) and p != folder]
    if not call.flag("recursive"):
        paths = [path for path in paths if "/" not in path[len(prefix) :]]
    expand = call.flag("expand")
    size = min(_EXPANDED_PAGE, call.site.page_size) if expand else None
    chosen, headers = call.page(paths, size)
    items = [_item(commit, path) for path in chosen]
    if expand:
        items = _expand(call.repo, commit, items)
    return JSONResponse(items, headers=headers)


async def paths_info(call: Call) -> Response:
    """POST paths-info/rev. Paths that do not exist are left out."""
    form = await call.form()
    commit = call.repo.resolve(call.only_arg())
    folders = _folders(commit)
    wanted = [path.strip("/") for path in form.get("paths", [])]
    items = [_item(commit, path) for path in wanted if path in commit.files or path in folders]
    if form.get("expand", ["false"])[0].lower() in ("true", "1"):
        items = _expand(call.repo, commit, items)
    return JSONResponse(items)


async def list_commits(call: Call) -> Response:
    """GET commits/rev, newest first."""
    repo = call.repo
    formatted = "formatted" in call.request.query_params.getlist("expand[]")
    commits = []
    for commit in repo.history(repo.resolve(call.only_arg())):
        item: dict[str, Any] = {
            "id": commit.id,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        if formatted:
            item["formatted"] = {"title": commit.title, "message": commit.message}
        commits.append(item)
    chosen, headers = call.page(commits)
    return JSONResponse(chosen, headers=headers)


async def list_refs(call: Call) -> Response:
    """GET refs."""
    repo = call.repo

    def table(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"{prefix}{name}", "targetCommit": sha}
            for name, sha in refs.items()
        ]

    refs = {
        "branches": table(repo.branches, "refs/heads/"),
        "converts": [],
        "tags": table(repo.tags, "refs/tags/"),
    }
    if call.request.query_params.get("include_prs"):
        refs["pullRequests"] = table(repo.pulls, "")
    return JSONResponse(refs)


async def create_branch(call: Call) -> Response:
    """POST branch/name."""
    repo = call.require_write()
    body = await call.json()
    name = call.site.store.check_branch(call.only_arg())
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.resolve(str(body.get("startingPoint", "main"))).id
    repo.save()
    return JSONResponse({"success": True}, status_code=201)


async def delete_branch(call: Call) -> Response:
    """DELETE branch/name."""
    repo = call.require_write()
    name = call.only_arg()
    if name == "main":
        raise Refusal(403, "Cannot delete the main branch")
    if name not in repo.branches:
        raise Refusal.no_such_revision(name)
    del repo.branches[name]
    repo.save()
    return JSONResponse({"success": True})


async def create_tag(call: Call) -> Response:
    """POST tag/rev with the tag's name in the body."""
    repo = call.require_write()
    body = await call.json()
    name = call.site.store.check_branch(check_path(body.get("tag")))
    if name in repo.tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    repo.tags[name] = repo.resolve(call.only_arg()).id
    repo.save()
    return JSONResponse({"success": True}, status_code=201)


async def delete_tag(call: Call) -> Response:
    """DELETE tag/name."""
    repo = call.require_write()
    name = call.only_arg()
    if name not in repo.tags:
        raise Refusal.no_such_revision(name)
    del repo.tags[name]
    repo.save()
    return JSONResponse({"success": True})
