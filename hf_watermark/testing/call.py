"""One API call: who asks what of which repo."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

from starlette.requests import Request

from hf_watermark.testing.accounts import Accounts, User, can_download, can_read, can_write
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Repo, Store

__all__ = ["Call", "Site"]

T = TypeVar("T")


@dataclass
class Site:
    """What all calls share."""

    store: Store
    accounts: Accounts
    page_size: int
    endpoint: str = ""
    cdn_endpoint: str = ""
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def sign(self, action: str, path: str) -> str:
        """A URL of the second origin that needs no token, for one action on one path."""
        return f"{self.cdn_endpoint}{path}?signature={self._signature(action, path)}"

    def check_signature(self, action: str, path: str, signature: str) -> None:
        """Refuse a URL that `sign` did not make."""
        if not hmac.compare_digest(self._signature(action, path), signature):
            raise Refusal(403, "SignatureDoesNotMatch")

    def _signature(self, action: str, path: str) -> str:
        return hmac.new(self._secret, f"{action} {path}".encode(), hashlib.sha256).hexdigest()


@dataclass
class Call:
    """A request to the API, its user, and what is left of its path.

    Attributes:
        site: The Hub's state.
        request: The request.
        user: Who asks; None without a token.
        args: The percent-decoded segments after the verb.
        found: The repo in question, already checked to be readable; None for calls about none.
    """

    site: Site
    request: Request
    user: User | None
    args: Sequence[str] = ()
    found: Repo | None = None

    @property
    def repo(self) -> Repo:
        """The repo in question."""
        assert self.found is not None
        return self.found

    @property
    def signed_in(self) -> User:
        """The user, or a 401."""
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def find_repo(self, repo_type: str, repo_id: str) -> Repo:
        """A repo that the user may know of, or the Hub's way to deny that it exists."""
        repo = self.site.store.find(repo_type, repo_id)
        if repo is None or not can_read(self.user, repo):
            raise Refusal.no_such_repo(anonymous=self.user is None)
        return repo

    def require_download(self) -> Repo:
        """The repo, if the user is past its gate."""
        if not can_download(self.user, self.repo):
            status = 401 if self.user is None else 403
            message = f"Access to model {self.repo.id} is restricted."
            raise Refusal(status, message, code="GatedRepo")
        return self.repo

    def require_write(self) -> Repo:
        """The repo, if the user's token may write to it."""
        if not can_write(self.signed_in, self.repo.namespace):
            raise Refusal(403, f"You don't have the rights to write to {self.repo.id}")
        return self.repo

    def revision_and_path(self) -> tuple[str, str]:
        """Split `args`; an unquoted `refs/pr/1` is understood as well as `refs%2Fpr%2F1`."""
        parts = list(self.args)
        taken = 3 if parts[:1] == ["refs"] and len(parts) >= 3 else 1
        return "/".join(parts[:taken]), "/".join(parts[taken:]).strip("/")

    def only_arg(self) -> str:
        """The revision, branch or tag that is the rest of the path."""
        return "/".join(self.args)

    async def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object (or nothing)."""
        body = await self.request.body()
        try:
            value = json.loads(body) if body else {}
        except ValueError:
            raise Refusal.bad_request("The body is not JSON") from None
        if not isinstance(value, dict):
            raise Refusal.bad_request("The body is not a JSON object")
        return value

    async def form(self) -> Mapping[str, list[str]]:
        """The body as a form, or as JSON with the same keys."""
        if "json" in self.request.headers.get("content-type", ""):
            raw = await self.json()
            return {
                key: [str(one) for one in (value if isinstance(value, list) else [value])]
                for key, value in raw.items()
            }
        return parse_qs((await self.request.body()).decode())

    def flag(self, name: str) -> bool:
        """A true-or-false query parameter."""
        return self.request.query_params.get(name, "").lower() in ("true", "1")

    def page(
        self, items: Sequence[T], size: int | None = None
    ) -> tuple[Sequence[T], dict[str, str]]:
        """The page that the query's cursor asks for, and headers that link the next one."""
        size = size or self.site.page_size
        cursor = self.request.query_params.get("cursor", "0")
        start = int(cursor) if cursor.isdigit() else 0
        headers = {}
        if start + size < len(items):
            query = [(k, v) for k, v in self.request.query_params.multi_items() if k != "cursor"]
            query.append(("cursor", str(start + size)))
            raw_path = self.request.scope["raw_path"].decode("ascii")
            headers["Link"] = f'<{self.site.endpoint}{raw_path}?{urlencode(query)}>; rel="next"'
        return items[start : start + size], headers
