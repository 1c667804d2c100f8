"""What the loopback Hub answers when it says no."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

__all__ = ["Refusal"]


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of the server
    """An HTTP error in the Hub's own words.

    Args:
        status: HTTP status.
        message: Goes into the body's `error` and into `X-Error-Message`.
        code: `X-Error-Code`, from which `huggingface_hub` picks the exception class.
        headers: More headers.
        body: More keys of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.body = dict(body or {})

    @classmethod
    def no_such_repo(cls, *, anonymous: bool) -> Refusal:
        """A missing repo, or a private one that the caller may not know of."""
        if anonymous:
            return cls(401, "Invalid username or password.", code="RepoNotFound")
        return cls(404, "Repository not found", code="RepoNotFound")

    @classmethod
    def no_such_revision(cls, revision: str) -> Refusal:
        """A branch, tag or commit that does not exist."""
        return cls(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    @classmethod
    def no_such_entry(cls, path: str, *, commit: str | None = None) -> Refusal:
        """A file or folder that is not in the commit."""
        headers = {"X-Repo-Commit": commit} if commit else {}
        return cls(404, f"Entry not found: {path}", code="EntryNotFound", headers=headers)

    @classmethod
    def bad_request(cls, message: str) -> Refusal:
        """A request that no client should have sent."""
        return cls(400, message)

    def response(self) -> JSONResponse:
        """The refusal as a response."""
        message = self.message.encode("ascii", "replace").decode().replace("\n", " ")
        headers = {"X-Error-Message": message, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return JSONResponse(
            {"error": self.message, **self.body}, status_code=self.status, headers=headers
        )
