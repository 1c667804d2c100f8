"""A classifier behind real HTTP on 127.0.0.1, that fails when it is told to."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Answering:
    """POST an image, as bytes or in JSON, and get what `classify` says of its bytes.

    `faults` maps the number of a request, from 0, to the response in place of the answer.
    """

    def __init__(self, classify: Callable[[bytes], Any]) -> None:
        self.classify = classify
        self.faults: dict[int, Response] | Callable[[int], Response | None] = {}
        self.requests: list[dict[str, Any]] = []
        self.url = ""

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        told: dict[str, Any] = {"headers": dict(request.headers)}
        if request.headers.get("content-type") == "application/json":
            told["json"] = await request.json()
            body = base64.b64decode(told["json"]["inputs"])
        self.requests.append(told)
        place = len(self.requests) - 1
        fault = self.faults(place) if callable(self.faults) else self.faults.get(place)
        return fault or JSONResponse(self.classify(body))


@contextmanager
def answering(classify: Callable[[bytes], Any]) -> Iterator[Answering]:
    handler = Answering(classify)
    app = Starlette(routes=[Route("/classify", handler.__call__, methods=["POST"])])
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    # Named TCP, or asyncio leaves Nagle's algorithm on: 40 ms for every answer.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    handler.url = f"http://127.0.0.1:{listener.getsockname()[1]}/classify"
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield handler
    finally:
        server.should_exit = True
        thread.join(10)
