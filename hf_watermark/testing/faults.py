"""Faults on demand, and a log of what was served."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Fault", "Faults", "ServedRequest"]


@dataclass
class ServedRequest:
    """One request as it was served. Fields are filled in while the answer is sent.

    Attributes:
        method: HTTP method.
        path: Raw path with its query, percent-encoded as the client sent it.
        origin: `hub`, or `cdn` for the second origin.
        range: The `Range` header, or None.
        authorization: The `Authorization` header, or None.
        status: HTTP status; 0 until it is known.
        sent: Body bytes handed to the socket.
        received: Body bytes read from the client.
        fault: The fault that was injected, or None.
        error: Traceback of a bug in the loopback Hub itself, or None.
    """

    method: str
    path: str
    origin: str
    range: str | None = None
    authorization: str | None = field(default=None, repr=False)
    status: int = 0
    sent: int = 0
    received: int = 0
    fault: Fault | None = None
    error: str | None = None


@dataclass(eq=False)
class Fault:
    """What goes wrong with the requests that match. See `Faults.add`."""

    method: str | None
    path: re.Pattern[str]
    origin: str | None
    status: int | None
    times: int | None
    delay: float
    cut_body: int | None
    ignore_range: bool
    header: Mapping[str, str | None]
    skip: int
    hits: int = 0

    def matches(self, request: ServedRequest) -> bool:
        """Whether the fault is about this request, and would show in its answer."""
        if self.needs_body and request.method == "HEAD":
            return False
        if self.ignore_range and self.cut_body is None and request.range is None:
            return False
        return (
            self.method in (None, request.method)
            and self.origin in (None, request.origin)
            and self.path.search(request.path) is not None
        )

    @property
    def needs_body(self) -> bool:
        """Whether a redirect would waste it."""
        return self.status is None and (self.cut_body is not None or self.ignore_range)


class Faults:
    """The faults to inject, tried in the order in which they were added."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        *,
        method: str | None = None,
        path: str = "",
        origin: str | None = None,
        status: int | None = None,
        times: int | None = 1,
        delay: float = 0.0,
        cut_body: int | None = None,
        ignore_range: bool = False,
        header: Mapping[str, str | None] | None = None,
        skip: int = 0,
    ) -> Fault:
        """Add a fault.

        A download of an LFS file is two requests, first to the Hub, which redirects, then to the
        second origin; the paths of both contain `/resolve/` and the file's name. Faults of the body
        (`cut_body`, `ignore_range`) are not used up by what cannot show them: a HEAD, a redirect,
        a request without a range.

        Args:
            method: `GET`, `HEAD`, ...; None matches all.
            path: Regular expression searched in the raw path with its query.
            origin: `hub` or `cdn`; None matches both.
            status: Answer with this status instead.
            times: How many requests it hits; None for all.
            delay: Seconds to wait before the answer.
            cut_body: Close the connection after this many bytes of the body.
            ignore_range: Answer 200 with the whole body.
            header: Response headers to replace, or to remove (None).
            skip: How many matching requests to let through first.

        Returns:
            The fault; its `hits` counts what it did.
        """
        upper = None if method is None else method.upper()
        if origin not in (None, "hub", "cdn"):
            raise ValueError(f"origin: expected 'hub', 'cdn' or None, got {origin!r}")
        fault = Fault(
            method=upper,
            path=re.compile(path),
            origin=origin,
            status=status,
            times=times,
            delay=delay,
            cut_body=cut_body,
            ignore_range=ignore_range,
            header={key.lower(): value for key, value in (header or {}).items()},
            skip=skip,
        )
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def take(self, request: ServedRequest) -> Fault | None:
        """The fault that hits this request, if any, counted."""
        with self._lock:
            for fault in self._faults:
                if not fault.matches(request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                if fault.times is None or fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    def give_back(self, fault: Fault) -> None:
        """Undo the count of a fault that could not show."""
        with self._lock:
            fault.hits -= 1
