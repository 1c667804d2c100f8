"""Bounded, retried GETs: a body that is whole, no longer than asked for, or an error that says why.

huggingface_hub's own `http_backoff` is not used for three reasons: it obeys any Retry-After (an
hour, if a server says so), a body cut in the middle is beyond its retries, and it warns on stderr
about what then succeeds. The client, its pool and its hooks are huggingface_hub's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_watermark.errors import (
    AccessDeniedError,
    HubError,
    NetworkGaveUpError,
    RepoMissingError,
    RevisionMissingError,
)
from hf_watermark.safetensors_ranges import quoted

if TYPE_CHECKING:
    import httpx2

__all__ = [
    "Answer",
    "Connection",
    "FileMissingError",
    "Patience",
    "Target",
    "TooLongError",
    "refusal",
    "retry_after",
]

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT_RESET = re.compile(r"r=0\s*;\s*t=(\d{1,9})")
_DRAINED = 64 * 2**10  # an error page up to here is read, so that its connection can be reused
_STALL_SECONDS = 30.0
_STALL_RATE = 10_000.0  # bytes per second; slower than this for long is a stall
_DO_TOKEN = "check the spelling; for a private repo pass --token or set HF_TOKEN"
_DO_RETRY = "check the connection and https://status.huggingface.co, then run it again"


class FileMissingError(HubError):
    """The repo has no such file at this commit."""


class TooLongError(NetworkGaveUpError):
    """A body longer than what it was said to be, or than anyone wants."""


@dataclass(frozen=True)
class Patience:
    """How long to go on when a server fails.

    Args:
        tries: Requests at most.
        first_wait: Seconds before the second try; each further wait is twice as long.
        total: Seconds after which no further try starts.
        timeout: Seconds without a byte, or without a connection, until a try has failed.
    """

    tries: int = 5
    first_wait: float = 0.5
    total: float = 15.0
    timeout: float = 10.0


@dataclass(frozen=True)
class Target:
    """What a request is about, for messages."""

    repo_id: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f" at {quoted(self.revision, 64)}"
        file = "" if self.file is None else f"{quoted(self.file, 200)} of "
        return f"{file}{quoted(self.repo_id, 120)}{revision}"


@dataclass(frozen=True)
class Answer:
    """A whole body, and the URL of the next page of a listing if there is one."""

    body: bytes
    next_url: str | None


class _Failed(Exception):  # noqa: N818 - caught by the retries, never seen outside
    """One try failed in a way that another may not."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Connection:
    """GETs through a shared client. Safe to use from several threads.

    Args:
        session: Returns the client to use.
        headers: Sent with each request; the authorization is dropped when another origin is
            redirected to.
        patience: When to give up.
    """

    def __init__(
        self, session: Callable[[], httpx2.Client], headers: Mapping[str, str], patience: Patience
    ) -> None:
        self._session = session
        # A compressed answer would break ranges, and could be a bomb.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._patience = patience

    def get(
        self,
        url: str,
        target: Target,
        *,
        limit: int,
        span: tuple[int, int] | None = None,
        size: int | None = None,
        count: Callable[[int], None] = lambda received: None,
    ) -> Answer:
        """Get a body of at most ``limit`` bytes, or exactly the bytes of a range.

        Args:
            url: What to get.
            target: What messages call it.
            limit: A longer body is refused before it is read.
            span: ``(start, stop)`` of the range, ``stop`` excluded; None for the whole.
            size: Length of the whole file where it is known.
            count: Told the length of every part that arrives, of failed tries too.

        Raises:
            NetworkGaveUpError: Every try failed, or an answer makes no sense.
            HubError: The server refuses; see `refusal`.
        """
        begun = time.monotonic()
        pause = self._patience.first_wait
        tried = 0
        while True:
            tried += 1
            try:
                return self._try(url, target, limit, span, size, count)
            except _Failed as failure:
                wait = pause if failure.retry_after is None else failure.retry_after
                elapsed = time.monotonic() - begun
                if tried >= self._patience.tries or elapsed + wait > self._patience.total:
                    what = f"gave up on {_ranged(target, span)} after {tried} tries"
                    got = str(failure)
                    if failure.retry_after is not None:
                        got += f" and a request to wait {failure.retry_after:g} seconds"
                    raise NetworkGaveUpError(what, got=got, do=_DO_RETRY) from None
            time.sleep(wait)
            pause *= 2

    def _try(
        self,
        url: str,
        target: Target,
        limit: int,
        span: tuple[int, int] | None,
        size: int | None,
        count: Callable[[int], None],
    ) -> Answer:
        import httpx2

        headers = dict(self._headers)
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        try:
            with self._session().stream(
                "GET",
                url,
                headers=headers,
                timeout=self._patience.timeout,
                follow_redirects=True,
            ) as response:
                _check_status(response, target, span)
                expected = _expected_length(response, target, limit, span, size)
                body = _read_body(response, target, limit, expected, count)
                return Answer(body, response.links.get("next", {}).get("url"))
        # The texts of httpx2's errors may quote headers, hence a token; only these are plain.
        except httpx2.TimeoutException as error:
            raise _Failed(f"no answer in time ({type(error).__name__})") from None
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
            raise _Failed(f"{type(error).__name__}: {quoted(str(error), 160)}") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            raise NetworkGaveUpError(
                f"{_ranged(target, span)} cannot be requested",
                got=type(error).__name__,
                do="check HF_ENDPOINT, the token and the proxy settings",
            ) from None
        except ConnectionError:  # huggingface_hub's hook in offline mode
            raise NetworkGaveUpError(
                f"{_ranged(target, span)} cannot be read in offline mode",
                do="unset HF_HUB_OFFLINE, or give a local folder",
            ) from None


def refusal(status: int, headers: Mapping[str, str], target: Target) -> HubError:
    """The error for an answer that another try will not change.

    Args:
        status: HTTP status.
        headers: The response's headers, looked up in lower case.
        target: What was asked for.
    """
    code = headers.get("x-error-code", "")
    message = headers.get("x-error-message", "")
    if code == "GatedRepo":
        return AccessDeniedError(
            f"{target} is gated",
            got=f"HTTP {status}",
            do="accept its conditions on its page, then pass --token or set HF_TOKEN",
        )
    if message == "Access to this resource is disabled.":
        return AccessDeniedError(f"{target} is disabled by the Hub", got=f"HTTP {status}")
    if code == "RevisionNotFound":
        return RevisionMissingError(
            f"there is no {target}",
            expected="a branch, a tag, refs/pr/N or a full commit sha",
            got=f"HTTP {status}",
        )
    if code == "EntryNotFound" or (status == 404 and code != "RepoNotFound" and target.file):
        return FileMissingError(f"there is no {target}", got=f"HTTP {status}")
    if status == 401 and message.startswith("Invalid credentials"):
        return AccessDeniedError(
            f"the Hub does not accept the token for {target}",
            got=f"HTTP {status}",
            do="make a new one at https://huggingface.co/settings/tokens",
        )
    if code == "RepoNotFound" or status in (401, 404):
        return RepoMissingError(
            f"there is no repo {target}, or it is private", got=f"HTTP {status}", do=_DO_TOKEN
        )
    if status == 403:
        return AccessDeniedError(
            f"this token has no rights to do this with {target}",
            got=f"HTTP {status}",
            do="pass --token or set HF_TOKEN with the rights that are needed",
        )
    if status in (400, 413, 422):
        return HubError(f"the request about {target} is refused", got=quoted(message, 200))
    return NetworkGaveUpError(f"the server refuses {target}", got=f"HTTP {status}", do=_DO_RETRY)


def _check_status(response: httpx2.Response, target: Target, span: tuple[int, int] | None) -> None:
    """Pass 200 for a whole, 206 for a range; raise for the rest."""
    status = response.status_code
    if status == (200 if span is None else 206):
        return
    if status == 200:
        raise NetworkGaveUpError(
            f"the server ignored the range for {_ranged(target, span)}; nothing was downloaded",
            expected="HTTP 206",
            got="HTTP 200",
            do="check for a proxy that strips Range, or download the model and give its folder",
        )
    _drain(response)
    if status in (408, 425, 429) or status >= 500:
        raise _Failed(f"HTTP {status}", retry_after(response))
    if response.history and status in (401, 403):  # a signed URL that expired: a new one may do
        raise _Failed(f"HTTP {status} from {quoted(response.url.host)}")
    raise refusal(status, response.headers, target)


def _expected_length(
    response: httpx2.Response,
    target: Target,
    limit: int,
    span: tuple[int, int] | None,
    size: int | None,
) -> int | None:
    """The body's length where it is known; raise if it is not the body that was asked for."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise _nonsense(target, span, "a plain body", f"encoding {quoted(encoding)}")
    if span is None:
        if limit < _declared_length(response) < math.inf:
            raise _too_long(target, limit)
        return size
    found = response.headers.get("content-range", "no Content-Range")
    match = _CONTENT_RANGE.fullmatch(found)
    right = f"bytes {span[0]}-{span[1] - 1}/{'*' if size is None else size}"
    if (
        match is None
        or (int(match[1]), int(match[2]) + 1) != span
        or (size is not None and match[3] not in ("*", str(size)))
    ):
        raise _nonsense(target, span, right, quoted(found))
    return span[1] - span[0]


def _read_body(
    response: httpx2.Response,
    target: Target,
    limit: int,
    expected: int | None,
    count: Callable[[int], None],
) -> bytes:
    begun = time.monotonic()
    most = limit if expected is None else expected
    body = bytearray()
    for part in response.iter_raw():
        count(len(part))
        body += part
        if len(body) > most:
            raise _too_long(target, most)
        if time.monotonic() - begun > _STALL_SECONDS + len(body) / _STALL_RATE:
            raise _Failed(f"a body that trickles, {len(body)} bytes so far")
    if expected is not None and len(body) < expected:
        raise _Failed(f"a body cut after {len(body)} of {expected} bytes")
    return bytes(body)


def _drain(response: httpx2.Response) -> None:
    if _declared_length(response) <= _DRAINED:
        deadline = time.monotonic() + 1
        for _ in response.iter_raw():
            if time.monotonic() > deadline:
                break


def _declared_length(response: httpx2.Response) -> float:
    """Bytes by Content-Length; infinity without one."""
    declared = response.headers.get("content-length", "")
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else math.inf


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, from Retry-After or the Hub's RateLimit."""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked[:9])
    if response.status_code != 429:
        return None
    limited = _RATE_LIMIT_RESET.search(response.headers.get("ratelimit", ""))
    return float(limited[1]) if limited else None


def _ranged(target: Target, span: tuple[int, int] | None) -> str:
    return str(target) if span is None else f"bytes {span[0]} to {span[1]} of {target}"


def _nonsense(
    target: Target, span: tuple[int, int] | None, expected: str, got: str
) -> NetworkGaveUpError:
    return NetworkGaveUpError(
        f"the answer for {_ranged(target, span)} makes no sense",
        expected=expected,
        got=got,
        do="check for a proxy, or download the model and give its folder",
    )


def _too_long(target: Target, limit: int) -> TooLongError:
    return TooLongError(
        f"the answer for {target} is too long",
        expected=f"at most {limit} bytes",
        do="check for a proxy, or download the model and give its folder",
    )
