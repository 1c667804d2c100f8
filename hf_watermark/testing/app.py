"""The ASGI application: log, faults, and which call goes where."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from hf_watermark.testing.call import Call, Site
from hf_watermark.testing.faults import Fault, Faults, ServedRequest
from hf_watermark.testing.refusal import Refusal

from . import discussions, downloads, repo_info, trees, uploads, writes

__all__ = ["HubApp"]

Handler = Callable[[Call], Awaitable[Response]]

# Calls about one repo: api/<type>s/<namespace>/<name>/<verb>/...
_REPO_CALLS: dict[tuple[str, str], Handler] = {
    ("GET", ""): repo_info.repo_info,
    ("GET", "revision"): repo_info.repo_info,
    ("GET", "tree"): trees.list_tree,
    ("POST", "paths-info"): trees.paths_info,
    ("GET", "commits"): trees.list_commits,
    ("GET", "refs"): trees.list_refs,
    ("POST", "branch"): trees.create_branch,
    ("DELETE", "branch"): trees.delete_branch,
    ("POST", "tag"): trees.create_tag,
    ("DELETE", "tag"): trees.delete_tag,
    ("PUT", "settings"): writes.update_settings,
    ("POST", "preupload"): writes.preupload,
    ("POST", "commit"): writes.commit,
}


class _Cut(Exception):  # noqa: N818 - not an error: ends a response early
    """The fault's limit on the body is reached."""


class HubApp:
    """Both origins of the loopback Hub.

    Args:
        site: The Hub's state.
        faults: Faults to inject.
        log: Every request is appended here before it is served.
    """

    def __init__(self, site: Site, faults: Faults, log: list[ServedRequest]) -> None:
        self.site = site
        self.faults = faults
        self.log = log
        self.cdn_port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        origin = "cdn" if scope["server"][1] == self.cdn_port else "hub"
        request = Request(scope, receive)
        query = scope["query_string"].decode("ascii", "replace")
        served = ServedRequest(
            method=scope["method"],
            path=scope["raw_path"].decode("ascii", "replace") + (f"?{query}" if query else ""),
            origin=origin,
            range=request.headers.get("range"),
            authorization=request.headers.get("authorization"),
        )
        self.log.append(served)
        fault = served.fault = self.faults.take(served)
        sender = _Sender(send, served, fault, self.faults)

        async def counted() -> Message:
            message = await receive()
            served.received += len(message.get("body", b""))
            return message

        if fault is not None:
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.ignore_range:
                headers = [(key, value) for key, value in scope["headers"] if key != b"range"]
                scope = {**scope, "headers": headers}
        response = await self._respond(Request(scope, counted), served, fault)
        try:
            await response(scope, counted, sender)
        except _Cut:
            # Returning before the promised length makes the server close the connection.
            return
        except Exception:
            served.error = traceback.format_exc()
            raise

    async def _respond(
        self, request: Request, served: ServedRequest, fault: Fault | None
    ) -> Response:
        try:
            if fault is not None and fault.status is not None:
                return Refusal(fault.status, "Injected fault").response()
            if served.origin == "cdn":
                return await self._cdn(request)
            return await self._hub(request)
        except Refusal as refusal:
            return refusal.response()
        except ClientDisconnect:
            return Refusal.bad_request("The client hung up").response()
        except Exception:
            served.error = traceback.format_exc()
            return JSONResponse({"error": served.error}, status_code=500)

    async def _cdn(self, request: Request) -> Response:
        parts = _segments(request)
        call = Call(self.site, request, None, parts[1:])
        if request.method in ("GET", "HEAD") and parts[0] == "cdn" and len(parts) >= 7:
            return await downloads.serve_blob(call)
        if request.method == "PUT" and parts[0] == "lfs" and len(parts) == 6:
            return await uploads.receive_blob(call)
        raise Refusal(404, "NoSuchKey")

    async def _hub(self, request: Request) -> Response:
        user = self.site.accounts.of(request.headers.get("authorization"))
        call = Call(self.site, request, user)
        parts = _segments(request)
        if parts[0] == "api":
            return await self._api(call, parts[1:])
        repo_type = "model"
        if parts[0] in ("datasets", "spaces"):
            repo_type, parts = parts[0][:-1], parts[1:]
        if len(parts) >= 5 and parts[2] == "resolve" and request.method in ("GET", "HEAD"):
            call.found = call.find_repo(repo_type, "/".join(parts[:2]))
            call.args = parts[3:]
            return await downloads.resolve(call)
        if parts[2:5] == ["info", "lfs", "objects"] and len(parts) == 6:
            handler = {"batch": uploads.lfs_batch, "verify": uploads.lfs_verify}.get(parts[5])
            if handler is not None and parts[1].endswith(".git") and request.method == "POST":
                call.found = call.find_repo(repo_type, "/".join(parts[:2])[: -len(".git")])
                return await handler(call)
        raise _unknown(request)

    async def _api(self, call: Call, parts: list[str]) -> Response:
        method = call.request.method
        fixed: dict[tuple[str, str], Handler] = {
            ("GET", "whoami-v2"): _whoami,
            ("POST", "repos/create"): writes.create_repo,
            ("DELETE", "repos/delete"): writes.delete_repo,
            ("POST", "validate-yaml"): writes.validate_yaml,
        }
        handler = fixed.get((method, "/".join(parts)))
        if handler is not None:
            return await handler(call)
        if parts[0] not in ("models", "datasets", "spaces"):
            raise _unknown(call.request)
        repo_type = parts[0][:-1]
        if len(parts) == 1 and method == "GET":
            call.args = [repo_type]
            return await repo_info.list_repos(call)
        if len(parts) < 3:
            raise Refusal.no_such_repo(anonymous=call.user is None)
        call.found = call.find_repo(repo_type, "/".join(parts[1:3]))
        verb = parts[3] if len(parts) > 3 else ""
        call.args = parts[4:]
        handler = _REPO_CALLS.get((method, verb))
        if verb == "discussions":
            handler = _discussion_call(method, len(call.args))
        if verb == "auth-check" and method == "GET":
            handler = _auth_check
        if handler is None:
            raise _unknown(call.request)
        return await handler(call)


def _segments(request: Request) -> list[str]:
    # From the raw path: `refs%2Fpr%2F1` is one segment.
    raw = request.scope["raw_path"].decode("ascii", "replace").strip("/")
    return [unquote(part) for part in raw.split("/")]


def _unknown(request: Request) -> Refusal:
    return Refusal(404, f"The loopback Hub has no {request.method} {request.url.path}")


def _discussion_call(method: str, depth: int) -> Handler | None:
    if method == "GET":
        return discussions.discussion_details if depth == 1 else discussions.list_discussions
    if method == "POST":
        return discussions.update_discussion if depth else discussions.create_discussion
    return None


async def _whoami(call: Call) -> Response:
    return JSONResponse(call.signed_in.whoami())


async def _auth_check(call: Call) -> Response:
    if list(call.args) == ["write"]:
        call.require_write()
    else:
        call.require_download()
    return JSONResponse({"success": True})


class _Sender:
    """Counts what is sent and bends it as the fault says."""

    def __init__(
        self, send: Send, served: ServedRequest, fault: Fault | None, faults: Faults
    ) -> None:
        self._send = send
        self._served = served
        self._fault = fault
        self._faults = faults
        self._is_head = served.method == "HEAD"

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(self._start(message))
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self._send(message)

    def _start(self, message: Message) -> Message:
        fault, status = self._fault, message["status"]
        self._served.status = status
        if fault is None:
            return message
        if fault.needs_body and 300 <= status < 400:
            self._faults.give_back(fault)
            self._fault = self._served.fault = None
            return message
        headers = [
            (key, value)
            for key, value in message.get("headers", [])
            if key.decode("latin-1").lower() not in fault.header
        ]
        for key, text in fault.header.items():
            if text is not None:
                headers.append((key.encode("latin-1"), text.encode("latin-1")))
        return {**message, "headers": headers}

    async def _body(self, message: dict[str, Any] | Message) -> None:
        body: bytes = b"" if self._is_head else message.get("body", b"")
        limit = self._fault.cut_body if self._fault is not None else None
        cut = limit is not None and self._served.sent + len(body) > limit
        if cut and limit is not None:
            body = body[: limit - self._served.sent]
        # Counted before it is sent: the client may look at the log as soon as it has the bytes.
        self._served.sent += len(body)
        if cut:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            raise _Cut
        await self._send({**message, "body": body})
