"""A suspect behind HTTP, asked one image at a time as HF inference is; answers are never lost.

An image is posted, as its bytes or in JSON, and JSON comes back. A server that is busy or still
loading is asked again, within limits; when it gives up for good, what it answered so far lies in a
file, and the next run asks for the rest alone.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_watermark.connection import Patience, retry_after
from hf_watermark.errors import NetworkGaveUpError, OutputsError
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.softlabels.answer_log import AnswerLog, image_key

if TYPE_CHECKING:
    import os

    import httpx2

    from hf_watermark.softlabels.probe_images import ProbeImages

__all__ = ["Endpoint"]

Progress = Callable[[int, int], None]
_LIMIT = 4 * 2**20  # bytes of an answer: 21,000 classes with long names take half of it
# A model that is being loaded answers 503 for a minute or two.
_PATIENCE = Patience(tries=12, first_wait=0.5, total=180.0, timeout=60.0)
_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class _Failed(Exception):  # noqa: N818 - caught by the retries, never seen outside
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """A classifier that answers POST requests.

    Args:
        url: http or https. Redirects are not followed.
        form: `bytes`: the image's file is the body. `json`: `{"inputs": base64, "parameters":
            {"top_k": top_k}}`, which gets all classes where the server honours it.
        token: Sent as a bearer token, to this server alone; none is taken from the environment.
        top_k: How many classes to ask for in JSON; None leaves it to the server.
        log: A file of answers, read first and appended to; see `AnswerLog`.
        headers: More headers.
        patience: When to give up on an image.
        limit: The longest answer, bytes.
        progress: Called with images answered and images asked about.

    Raises:
        OutputsError: If the URL or the form makes no sense, or the log is another endpoint's.
    """

    def __init__(
        self,
        url: str,
        *,
        form: str = "bytes",
        token: str | None = None,
        top_k: int | None = None,
        log: str | os.PathLike[str] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: Patience = _PATIENCE,
        limit: int = _LIMIT,
        progress: Progress | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OutputsError("The endpoint is no URL", expected="http(s)://...", got=quoted(url))
        if form not in ("bytes", "json"):
            raise OutputsError("Unknown form", expected="bytes or json", got=repr(form))
        self.url = url
        # Without a user's password and a query, which may hold a token.
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._form, self._top_k = form, top_k
        self._headers = {**(headers or {}), "Accept": "application/json"}
        self._headers["Accept-Encoding"] = "identity"  # a compressed answer could be a bomb
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._log = AnswerLog(log, self.name)
        self._patience, self._limit, self._progress = patience, limit, progress

    def __call__(self, images: ProbeImages) -> list[Any]:
        """The answers to all images, in their order, for `verify_outputs`.

        Raises:
            NetworkGaveUpError: If the server keeps failing; it says how many answers there are.
            OutputsError: If it refuses, or answers no JSON.
        """
        import httpx2

        contents = [image_key(images.encoded(i)) for i in range(len(images))]
        with httpx2.Client(headers=self._headers, timeout=self._patience.timeout) as client:
            for place, key in enumerate(contents):
                if key not in self._log.answers:
                    answer = self._ask(client, images.encoded(place), place, len(images))
                    self._log.add(key, answer)
                if self._progress is not None:
                    self._progress(place + 1, len(contents))
        return [self._log.answers[key] for key in contents]

    def _ask(self, client: httpx2.Client, image: bytes, place: int, planned: int) -> Any:
        begun, pause, tried = time.monotonic(), self._patience.first_wait, 0
        while True:
            tried += 1
            try:
                return self._try(client, image, place)
            except _Failed as failure:
                wait = pause if failure.wait is None else failure.wait
                elapsed = time.monotonic() - begun
                if tried >= self._patience.tries or elapsed + wait > self._patience.total:
                    got = str(failure)
                    if failure.wait is not None:
                        got += f" and a request to wait {failure.wait:g} seconds"
                    raise NetworkGaveUpError(
                        f"gave up on {self.name} at image {place} of {planned}, after {tried} "
                        f"tries; {self._log.said}",
                        got=got,
                        do=self._log.advice,
                    ) from None
            time.sleep(wait)
            pause *= 2

    def _try(self, client: httpx2.Client, image: bytes, place: int) -> Any:
        import httpx2

        try:
            with client.stream("POST", self.url, **self._body(image)) as response:
                status = response.status_code
                if status in (408, 425, 429) or status >= 500:
                    raise _Failed(f"HTTP {status}", retry_after(response))
                body = self._read(response, place)
        except httpx2.TimeoutException as error:
            raise _Failed(f"no answer in time ({type(error).__name__})") from None
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
            raise _Failed(type(error).__name__) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            raise OutputsError(
                f"{self.name} cannot be asked",
                got=type(error).__name__,
                do="check the URL, the token and the proxy settings",
            ) from None
        if status != 200:
            raise OutputsError(
                f"{self.name} refuses image {place}",
                expected="HTTP 200",
                got=f"HTTP {status} {quoted(body[:200].decode('utf-8', 'replace'))}",
                do="check --token and --form",
            )
        try:
            answer = json.loads(body)
        except ValueError:
            raise OutputsError(
                f"{self.name} answers no JSON about image {place}",
                got=quoted(body[:100].decode("utf-8", "replace")),
            ) from None
        if isinstance(answer, dict) and "error" in answer:
            raise _Failed(f"error {quoted(str(answer['error']), 120)}")
        return answer

    def _body(self, image: bytes) -> dict[str, Any]:
        if self._form == "json":
            inputs = base64.b64encode(image).decode()
            more = {} if self._top_k is None else {"parameters": {"top_k": self._top_k}}
            return {"json": {"inputs": inputs, **more}}
        kinds = (kind for start, kind in _TYPES.items() if image.startswith(start))
        kind = next(kinds, "application/octet-stream")
        return {"content": image, "headers": {"Content-Type": kind}}

    def _read(self, response: httpx2.Response, place: int) -> bytes:
        encoding = response.headers.get("content-encoding", "identity")
        body, begun = bytearray(), time.monotonic()
        for part in response.iter_raw():
            body += part
            if len(body) > self._limit or encoding != "identity":
                raise OutputsError(
                    f"{self.name} answers image {place} with too much",
                    expected=f"at most {self._limit:,} bytes of plain JSON",
                    got="more" if encoding == "identity" else f"encoding {quoted(encoding)}",
                )
            if time.monotonic() - begun > self._patience.timeout:  # a body that trickles
                raise _Failed(f"an answer that takes longer than {self._patience.timeout:g} s")
        return bytes(body)
