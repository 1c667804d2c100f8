"""Serving file contents, whole or in ranges, from the Hub or from the second origin."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hf_watermark.testing.call import Call, Site
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Entry

__all__ = ["BlobResponse", "resolve", "serve_blob"]

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)
_CHUNK = 2 * 1024 * 1024


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open span that a `Range` header asks for; None if it asks for no single one.

    Raises:
        Refusal: 416 if the span lies outside the file.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None
    if start >= stop:
        headers = {"Content-Range": f"bytes */{size}"}
        raise Refusal(416, "Requested range not satisfiable", headers=headers)
    return start, stop


class BlobResponse(Response):
    """A file, or a span of it, streamed in large chunks; stops when the client hangs up."""

    def __init__(self, path: Path, size: int, headers: dict[str, str], span: str | None) -> None:
        chosen = _span(span, size)
        self.path = path
        self.start, self.stop = chosen or (0, size)
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Content-Length": str(self.stop - self.start),
            **headers,
        }
        if chosen is not None:
            headers["Content-Range"] = f"bytes {self.start}-{self.stop - 1}/{size}"
        self.status_code = 200 if chosen is None else 206
        self.background = None
        self.body = b""
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.stop - self.start
                while left and not gone.done():
                    chunk = file.read(min(_CHUNK, left))
                    left = left - len(chunk) if chunk else 0
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _disposition(path: str) -> str:
    name = quote(path.rpartition("/")[2])
    return f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"


async def resolve(call: Call) -> Response:
    """HEAD or GET [T/]R/resolve/rev/path."""
    repo = call.require_download()
    revision, path = call.revision_and_path()
    commit = repo.resolve(revision)
    entry = commit.entry(path)
    headers = {
        "X-Repo-Commit": commit.id,
        "ETag": f'"{entry.etag}"',
        "Content-Disposition": _disposition(path),
    }
    if not entry.lfs:
        span = call.request.headers.get("range")
        return BlobResponse(repo.blob_path(entry.sha256), entry.size, headers, span)
    headers |= {
        "Accept-Ranges": "bytes",
        "X-Linked-Size": str(entry.size),
        "X-Linked-Etag": f'"{entry.sha256}"',
        "Location": _cdn_url(call.site, repo.type, repo.id, commit.id, path),
    }
    return Response(status_code=302, headers=headers)


def _cdn_url(site: Site, repo_type: str, repo_id: str, commit: str, path: str) -> str:
    return site.sign("GET", f"/cdn/{repo_type}s/{repo_id}/resolve/{commit}/{quote(path)}")


async def serve_blob(call: Call) -> Response:
    """HEAD or GET on the second origin: no token, a signature instead."""
    raw_path = call.request.scope["raw_path"].decode("ascii")
    call.site.check_signature("GET", raw_path, call.request.query_params.get("signature", ""))
    repo_type, namespace, name, _, commit, *path = call.args
    repo = call.site.store.find(repo_type[:-1], f"{namespace}/{name}")
    if repo is None:
        raise Refusal(404, "NoSuchKey")
    entry: Entry = repo.resolve(commit).entry("/".join(path))
    headers = {"ETag": f'"{entry.sha256}"', "Content-Disposition": _disposition(path[-1])}
    span = call.request.headers.get("range")
    return BlobResponse(repo.blob_path(entry.sha256), entry.size, headers, span)
