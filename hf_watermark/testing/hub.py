"""The server: two listening sockets, one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import uvicorn

from hf_watermark.testing.accounts import Accounts
from hf_watermark.testing.app import HubApp
from hf_watermark.testing.call import Site
from hf_watermark.testing.faults import Faults, ServedRequest
from hf_watermark.testing.in_process import patched_clients
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Repo, Store

__all__ = ["LoopbackHub"]

_HOST = "127.0.0.1"


class _Server(uvicorn.Server):
    """A server that stops at once; uvicorn's own polls and waits, 0.2 s for every test."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait for `stopping`."""
        await self.stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Hang up on every client; what is left of their calls is cancelled with the loop."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for sock in sockets or []:
            sock.close()


class LoopbackHub:
    """A Hub on this machine, for tests and demos only.

    A real HTTP server that `huggingface_hub`, `transformers` and `datasets` use through
    `HF_ENDPOINT`. It keeps everything in one folder, trusts nobody's paths, and knows nothing of
    Xet, Spaces' runtimes, webhooks or rate limits. It is no Hub to keep models on.

    Example:
        ```py
        with LoopbackHub("hub") as hub:
            subprocess.run([...], env={**os.environ, **hub.environment()})
            with hub.in_process():
                HfApi().create_repo("demo/vit")
        ```

    Args:
        folder: Where repos and the clients' caches go. What a former run left is served again,
            but users and tokens are new.
        port: Port of the Hub; 0 for any free one. The second origin always takes a free one.
        user: Name of the user that exists from the start.
        page_size: Entries on a page of a listing.

    Attributes:
        faults: Faults to inject.
        requests: Every request served, oldest first.
        user: The first user's name.
        token: The first user's token.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        port: int = 0,
        *,
        user: str = "demo",
        page_size: int = 1000,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.faults = Faults()
        self.requests: list[ServedRequest] = []
        self.user = user
        self._port = port
        self._store = Store(self.folder)
        self._accounts = Accounts()
        self._site = Site(self._store, self._accounts, page_size)
        self._app = HubApp(self._site, self.faults, self.requests)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.token = self.add_user(user)

    def __repr__(self) -> str:
        return f"LoopbackHub({self._site.endpoint or 'stopped'})"

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return self._running(self._site.endpoint)

    @property
    def cdn_endpoint(self) -> str:
        """The second origin: LFS files are read from and written to it, without a token."""
        return self._running(self._site.cdn_endpoint)

    def _running(self, address: str) -> str:
        if not address:
            raise RuntimeError("the loopback Hub is not running: call start() or use `with`")
        return address

    def start(self) -> LoopbackHub:
        """Start to serve; returns itself."""
        if self._server is not None:
            raise RuntimeError("the loopback Hub is running already")
        sockets = [_listen(self._port), _listen(0)]
        self._port = int(sockets[0].getsockname()[1])
        self._site.endpoint, self._site.cdn_endpoint = (
            f"http://{_HOST}:{sock.getsockname()[1]}" for sock in sockets
        )
        self._app.cdn_port = sockets[1].getsockname()[1]
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL + 1,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=60,
        )
        self._server = _Server(config)
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._serve,
            args=(self._server, sockets, ready),
            name="loopback-hub",
            daemon=True,
        )
        self._thread.start()
        # The sockets listen already: clients that come too early only wait.
        ready.wait(10)
        return self

    def _serve(self, server: _Server, sockets: list[socket.socket], ready: threading.Event) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            ready.set()
            await server.serve(sockets)

        try:
            asyncio.run(main())
        finally:
            ready.set()
            for sock in sockets:
                sock.close()

    def stop(self) -> None:
        """Stop to serve and hang up on every client. Harmless if it does not run."""
        server, thread, loop = self._server, self._thread, self._loop
        self._server = self._thread = self._loop = None
        self._site.endpoint = self._site.cdn_endpoint = ""
        if server is None or thread is None or loop is None:
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(server.stopping.set)
        thread.join(10)

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def home(self) -> Path:
        """The clients' `HF_HOME`."""
        return self.folder / "home"

    def environment(self, token: str | None = None) -> dict[str, str]:
        """What a child process needs in its environment to use this Hub.

        Args:
            token: A token of `add_user`; the first user's if None; `""` for nobody's.
        """
        home = self.home
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": f"{_HOST},localhost",
            "no_proxy": f"{_HOST},localhost",
        }

    def in_process(self, token: str | None = None) -> AbstractContextManager[None]:
        """Point the clients already imported in this process here, until the block ends.

        Args:
            token: As for `environment`.
        """
        return patched_clients(self.environment(token))

    def add_user(self, name: str, *, orgs: Iterable[str] = (), role: str = "write") -> str:
        """Add a user, or one more token of a user, and return the token.

        Args:
            name: The user's name, which is also a namespace for repos.
            orgs: Organisations that the token may write to.
            role: `write` or `read`.
        """
        return self._accounts.add(name, orgs=orgs, role=role)

    def create_repo(
        self,
        repo_id: str,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> None:
        """Create a repo without asking who may."""
        author = repo_id.partition("/")[0]

        def create() -> None:
            repo = self._store.create(repo_type, repo_id, author=author, private=private)
            repo.gated = "auto" if gated else False
            repo.save()

        try:
            self._on_loop(create)
        except Refusal as refusal:
            raise ValueError(refusal.message) from None

    def grant_access(self, repo_id: str, user: str, *, repo_type: str = "model") -> None:
        """Let a user through the gate of a repo."""
        repo = self._find(repo_id, repo_type)

        def grant() -> None:
            repo.granted.append(user)
            repo.save()

        self._on_loop(grant)

    def folder_of(self, repo_id: str, *, repo_type: str = "model") -> Path:
        """The folder that holds every byte of a repo, of all its revisions."""
        return self._find(repo_id, repo_type).folder

    def bytes_of(self, repo_id: str | None = None, *, repo_type: str = "model") -> bytes:
        """Everything stored for a repo, or for all of them, to search for what must not be there.

        Contents of all files of all revisions, names, commit messages, discussions: the contents
        as they are, the rest as UTF-8 JSON.
        """
        root = (
            self.folder / "repos"
            if repo_id is None
            else self.folder_of(repo_id, repo_type=repo_type)
        )
        return b"\n".join(path.read_bytes() for path in _files(root))

    def _find(self, repo_id: str, repo_type: str) -> Repo:
        repo = self._store.find(repo_type, repo_id)
        if repo is None:
            raise KeyError(f"the loopback Hub has no {repo_type} {repo_id!r}")
        return repo

    def _on_loop(self, change: Callable[[], None]) -> None:
        """Make a change in the server's thread, which makes all others."""
        if self._loop is None:
            change()
            return

        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def _listen(port: int) -> socket.socket:
    # With the protocol named, asyncio turns Nagle's algorithm off; else a short answer waits 40 ms.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it; large files go out in fewer, larger writes.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    sock.bind((_HOST, port))
    sock.listen(128)
    sock.setblocking(False)
    return sock
