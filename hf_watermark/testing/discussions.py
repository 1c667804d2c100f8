"""Discussions and pull requests."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from hf_watermark.testing.call import Call
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Commit, Entry, Repo, now

__all__ = [
    "create_discussion",
    "discussion_details",
    "list_discussions",
    "open_discussion",
    "record_commit",
    "update_discussion",
]

_PAGE = 25


def _event(thread: dict[str, Any], kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    serial = f"{thread['num']} {len(thread['events'])}"
    event = {
        "id": hashlib.sha1(serial.encode()).hexdigest()[:24],
        "type": kind,
        "createdAt": now(),
        "author": {"name": author},
        "data": data,
    }
    thread["events"].append(event)
    return event


def _comment(thread: dict[str, Any], author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": text, "updatedAt": now(), "author": {"name": author}}
    data = {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
    return _event(thread, "comment", author, data)


def open_discussion(
    repo: Repo, author: str, title: str, text: str, *, base: str | None, status: str
) -> dict[str, Any]:
    """Open a discussion, or a pull request if `base` (a commit id) is given. Does not save."""
    num = len(repo.discussions) + 1
    thread: dict[str, Any] = {
        "num": num,
        "title": title,
        "author": author,
        "status": status,
        "created_at": now(),
        "events": [],
    }
    if base is not None:
        thread |= {"ref": f"refs/pr/{num}", "base": base}
        repo.pulls[thread["ref"]] = base
    _comment(thread, author, text)
    repo.discussions.append(thread)
    return thread


def record_commit(repo: Repo, ref: str, commit: Commit) -> None:
    """Note a commit in the pull request that it was pushed to, if it was to one."""
    for thread in repo.discussions:
        if thread.get("ref") == ref:
            _event(thread, "commit", commit.author, {"subject": commit.title, "oid": commit.id})


def _changes(old: Commit, new: Commit) -> dict[str, Entry | None]:
    paths = [
        path for path in {**old.files, **new.files} if old.files.get(path) != new.files.get(path)
    ]
    return {path: new.files.get(path) for path in sorted(paths)}


def _conflicts(repo: Repo, thread: dict[str, Any]) -> list[str]:
    base, head = repo.commits[thread["base"]], repo.commits[repo.pulls[thread["ref"]]]
    main = repo.resolve("main")
    theirs = _changes(base, main)
    return [
        path
        for path, entry in _changes(base, head).items()
        if path in theirs and theirs[path] != entry
    ]


def _diff(repo: Repo, thread: dict[str, Any]) -> str:
    base, head = repo.commits[thread["base"]], repo.commits[repo.pulls[thread["ref"]]]
    parts = []
    for path in _changes(base, head):
        sides = [commit.files.get(path) for commit in (base, head)]
        if any(side is not None and side.lfs for side in sides):
            parts.append(f"diff --git a/{path} b/{path}\nBinary files differ\n")
            continue
        old, new = (
            repo.read(side).decode("utf-8", "replace").splitlines() if side is not None else []
            for side in sides
        )
        lines = difflib.unified_diff(old, new, f"a/{path}", f"b/{path}", lineterm="")
        parts.append("\n".join([f"diff --git a/{path} b/{path}", *lines, ""]))
    return "".join(parts)


def _summary(repo: Repo, thread: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": thread["num"],
        "title": thread["title"],
        "author": {"name": thread["author"]},
        "createdAt": thread["created_at"],
        "status": thread["status"],
        "isPullRequest": "ref" in thread,
        "repo": {"name": repo.id, "type": repo.type},
        "numComments": sum(event["type"] == "comment" for event in thread["events"]),
    }


async def list_discussions(call: Call) -> Response:
    """GET discussions."""
    query = call.request.query_params
    wanted_type, wanted_status = query.get("type", "all"), query.get("status", "all")
    threads = []
    for thread in reversed(call.repo.discussions):
        kind = "pull_request" if "ref" in thread else "discussion"
        state = "open" if thread["status"] in ("open", "draft") else "closed"
        if wanted_type not in ("all", kind) or wanted_status not in ("all", state):
            continue
        if query.get("author") not in (None, thread["author"]):
            continue
        threads.append(_summary(call.repo, thread))
    page = query.get("p", "0")
    start = _PAGE * int(page) if page.isdigit() else 0
    body = {
        "discussions": threads[start : start + _PAGE],
        "count": len(threads),
        "start": start,
        "numClosedDiscussions": 0,
    }
    return JSONResponse(body)


def _thread(call: Call) -> dict[str, Any]:
    num = call.args[0]
    if not num.isdigit() or not 1 <= int(num) <= len(call.repo.discussions):
        raise Refusal(404, f"No discussion {num}")
    return call.repo.discussions[int(num) - 1]


async def discussion_details(call: Call) -> Response:
    """GET discussions/n."""
    repo, thread = call.repo, _thread(call)
    details = {**_summary(repo, thread), "events": thread["events"], "locked": False}
    if "ref" in thread:
        merged = thread.get("merge_commit")
        details["changes"] = {"base": "refs/heads/main", "mergeCommitId": merged}
        details["filesWithConflicts"] = [] if merged else _conflicts(repo, thread)
        details["diff"] = _diff(repo, thread)
    return JSONResponse(details)


async def create_discussion(call: Call) -> Response:
    """POST discussions. A pull request made here is a draft."""
    repo, user, body = call.repo, call.signed_in, await call.json()
    title = str(body.get("title", "")).strip()
    if not 3 <= len(title) <= 200:
        raise Refusal.bad_request("The title must have 3 to 200 characters")
    pull = bool(body.get("pullRequest"))
    thread = open_discussion(
        repo,
        user.name,
        title,
        str(body.get("description", "")),
        base=repo.resolve("main").id if pull else None,
        status="draft" if pull else "open",
    )
    repo.save()
    return JSONResponse({"num": thread["num"], "pullRequest": pull}, status_code=201)


async def update_discussion(call: Call) -> Response:
    """POST discussions/n/comment, status, title, merge."""
    thread = _thread(call)
    action = _ACTIONS.get("/".join(call.args[1:]))
    if action is None:
        raise Refusal(404, "The loopback Hub does not have this call")
    answer = action(call, thread, await call.json())
    call.repo.save()
    return JSONResponse(answer)


def _require_part(call: Call, thread: dict[str, Any]) -> str:
    """The author and those who may write to the repo."""
    if call.signed_in.name != thread["author"]:
        call.require_write()
    return call.signed_in.name


def _add_comment(call: Call, thread: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    author = call.signed_in.name
    return {"newMessage": _comment(thread, author, str(body.get("comment", "")))}


def _set_status(call: Call, thread: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    author, status = _require_part(call, thread), body.get("status")
    if status not in ("open", "closed") or thread["status"] == "merged":
        raise Refusal.bad_request(f"Cannot change {thread['status']!r} to {status!r}")
    if body.get("comment"):
        _comment(thread, author, str(body["comment"]))
    thread["status"] = status
    return {"newStatus": _event(thread, "status-change", author, {"status": status})}


def _set_title(call: Call, thread: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    author, title = _require_part(call, thread), str(body.get("title", "")).strip()
    if not 3 <= len(title) <= 200:
        raise Refusal.bad_request("The title must have 3 to 200 characters")
    data = {"from": thread["title"], "to": title}
    thread["title"] = title
    return {"newTitle": _event(thread, "title-change", author, data)}


def _merge(call: Call, thread: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    repo, author = call.require_write(), call.signed_in.name
    if "ref" not in thread or thread["status"] != "open":
        kind = "pull request" if "ref" in thread else "discussion"
        raise Refusal.bad_request(f"Cannot merge a {kind} in status {thread['status']!r}")
    conflicts = _conflicts(repo, thread)
    if conflicts:
        raise Refusal(409, f"The pull request has conflicts: {', '.join(conflicts)}")
    if body.get("comment"):
        _comment(thread, author, str(body["comment"]))
    base, head = repo.commits[thread["base"]], repo.commits[repo.pulls[thread["ref"]]]
    main = repo.resolve("main")
    files = dict(main.files)
    for path, entry in _changes(base, head).items():
        if entry is None:
            files.pop(path, None)
        else:
            files[path] = entry
    title = f"{thread['title']} (#{thread['num']})"
    made = call.site.store.add_commit(repo, (main.id, head.id), title, "", author, files)
    repo.branches["main"] = made.id
    thread |= {"status": "merged", "merge_commit": made.id}
    return {"newStatus": _event(thread, "status-change", author, {"status": "merged"})}


_ACTIONS: dict[str, Callable[[Call, dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "comment": _add_comment,
    "status": _set_status,
    "title": _set_title,
    "merge": _merge,
}
