"""Users, tokens and what they may do."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Repo

__all__ = ["Accounts", "User", "can_download", "can_read", "can_write"]

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,40}[A-Za-z0-9])?")


@dataclass(frozen=True)
class User:
    """A user and the role of one token of theirs (`write` or `read`)."""

    name: str
    orgs: tuple[str, ...]
    role: str

    def whoami(self) -> dict[str, Any]:
        """The answer of `whoami-v2`."""
        return {
            "type": "user",
            "id": f"user-{self.name}",
            "name": self.name,
            "fullname": self.name,
            "email": f"{self.name}@loopback.invalid",
            "emailVerified": True,
            "canPay": False,
            "isPro": False,
            "periodEnd": None,
            "avatarUrl": "",
            "orgs": [
                {
                    "type": "org",
                    "id": f"org-{org}",
                    "name": org,
                    "fullname": org,
                    "isEnterprise": False,
                    "canPay": False,
                    "roleInOrg": "admin",
                }
                for org in self.orgs
            ],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "loopback", "role": self.role},
            },
        }


class Accounts:
    """Tokens and their users, in memory only."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}
        self._lock = threading.Lock()

    def add(self, name: str, *, orgs: Iterable[str] = (), role: str = "write") -> str:
        """Add a user, or one more token of a user, and return the token.

        Raises:
            ValueError: A name that no user can have, or a role that no token has.
        """
        orgs = tuple(orgs)
        for candidate in (name, *orgs):
            if _NAME.fullmatch(candidate) is None:
                raise ValueError(f"not a user or organisation name: {candidate!r}")
        if role not in ("write", "read"):
            raise ValueError(f"role: expected 'write' or 'read', got {role!r}")
        token = f"hf_{secrets.token_hex(17)}"
        with self._lock:
            self._users[token] = User(name, orgs, role)
        return token

    def of(self, authorization: str | None) -> User | None:
        """The user of an `Authorization` header; None without one.

        Raises:
            Refusal: 401 for a token that nobody has.
        """
        if not authorization:
            return None
        scheme, _, token = authorization.partition(" ")
        user = self._users.get(token.strip()) if scheme.lower() == "bearer" else None
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user


def _owns(user: User | None, namespace: str) -> bool:
    return user is not None and (namespace == user.name or namespace in user.orgs)


def can_read(user: User | None, repo: Repo) -> bool:
    """Whether the user may know that the repo exists."""
    return not repo.private or _owns(user, repo.namespace)


def can_download(user: User | None, repo: Repo) -> bool:
    """Whether the user may read files: `can_read`, and past the gate."""
    if not can_read(user, repo):
        return False
    if not repo.gated or _owns(user, repo.namespace):
        return True
    return user is not None and user.name in repo.granted


def can_write(user: User | None, namespace: str) -> bool:
    """Whether the user's token may write to a namespace."""
    return user is not None and user.role == "write" and _owns(user, namespace)
