"""The files of a model, wherever they lie: of a repo at one commit, or of a folder."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from hf_watermark.errors import CheckpointError, MalformedCheckpointError
from hf_watermark.safetensors_ranges import Reader, quoted

__all__ = ["SUFFIX", "FileReader", "Files", "FolderFiles", "check_limit"]

SUFFIX = ".safetensors"


class Files(Protocol):
    """The files of one repo at one commit, or of one folder. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The repo id or the folder."""

    @property
    def revision(self) -> str | None:
        """The full commit sha; None for a folder."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file by its path, in POSIX spelling."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""

    def reader(self, path: str) -> Reader:
        """Read ranges of a file; a path that is not in `sizes` is refused."""

    def read(self, path: str, limit: int) -> bytes:
        """Read a whole file of at most ``limit`` bytes; a larger one is refused."""


class FolderFiles:
    """A local folder and the folders right below it, or a single safetensors file.

    Only listed files can be read, so no path leads out of the folder. Links are followed: in the
    cache of huggingface_hub every file is one.

    Args:
        path: The folder or the file.

    Raises:
        CheckpointError: Neither is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.revision: str | None = None
        self._bytes_read = 0
        self._lock = threading.Lock()
        given = Path(os.path.expanduser(path))
        size = _file_size(given)
        if size is not None and given.suffix == SUFFIX:
            self._folder = given.parent
            self.sizes: Mapping[str, int] = {given.name: size}
        elif os.path.isdir(given):
            self._folder = given
            self.sizes = dict(sorted(_list(given, depth=1)))
        else:
            raise CheckpointError(
                f"{quoted(self.name, 300)} cannot be opened as a model",
                expected=f"a folder or a {SUFFIX} file",
                got="nothing there" if size is None else "another file",
                do="check the path",
            )

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._bytes_read

    def reader(self, path: str) -> Reader:
        """Read ranges of a listed file."""
        return _FolderReader(self, path, self._size(path))

    def read(self, path: str, limit: int) -> bytes:
        """Read a whole listed file of at most ``limit`` bytes."""
        size = self._size(path)
        check_limit(self.name, path, size, limit)
        return self._read(path, size, 0, size)

    def _size(self, path: str) -> int:
        if path not in self.sizes:
            raise CheckpointError(f"{quoted(path)} is not in {quoted(self.name, 300)}")
        return self.sizes[path]

    def _read(self, path: str, size: int, start: int, stop: int) -> bytes:
        # Opened for each read: a sharded model has hundreds of files, a process as many handles.
        with FileReader(self._folder / path) as file:
            if file.size != size:
                raise MalformedCheckpointError(
                    f"{quoted(file.name, 300)} changed while it was read",
                    expected=f"{size} bytes",
                    got=f"{file.size}",
                    do="wait until nothing writes to the folder",
                )
            raw = file.read(start, stop)
        with self._lock:
            self._bytes_read += len(raw)
        return raw


class _FolderReader:
    """One file of a `FolderFiles`."""

    def __init__(self, files: FolderFiles, path: str, size: int) -> None:
        self.name = str(files._folder / path)
        self.size = size
        self._files = files
        self._path = path

    def read(self, start: int, stop: int) -> bytes:
        return self._files._read(self._path, self.size, start, stop)


class FileReader:
    """A local file, open until closed; use it as a context manager.

    Args:
        path: The file.
        name: What messages call it; its path by default.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.name = os.fspath(path) if name is None else name
        self._descriptor = -1
        try:
            # A FIFO would block the open for ever, so it is opened without blocking and refused.
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
            self._descriptor = os.open(path, flags)
            status = os.fstat(self._descriptor)
        except OSError as error:
            self.close()
            raise _unreadable(self.name, error) from None
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{quoted(self.name, 300)} is not a regular file")
        self.size = status.st_size

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes from ``start`` up to, not including, ``stop``."""
        parts = []
        position = start
        while position < stop:
            try:
                part = os.pread(self._descriptor, stop - position, position)
            except OSError as error:
                raise _unreadable(self.name, error) from None
            if not part:
                raise MalformedCheckpointError(
                    f"{quoted(self.name, 300)} is truncated",
                    expected=f"at least {stop} bytes",
                    got=f"{position}",
                    do="copy or download it again",
                )
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_limit(owner: str, path: str, size: int, limit: int) -> None:
    """Refuse a file that is too large to be read whole."""
    if size > limit:
        raise CheckpointError(
            f"{quoted(path)} of {quoted(owner, 300)} is too large to be what its name says",
            expected=f"at most {limit} bytes",
            got=f"{size}",
        )


def _list(folder: Path, depth: int, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The regular files of a folder and ``depth`` levels below; hidden folders are left out."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{quoted(str(folder), 300)} cannot be listed", got=error.strerror
        ) from None
    for entry in entries:
        size = _file_size(entry)
        if size is not None:
            yield prefix + entry.name, size
        elif depth and not entry.name.startswith(".") and entry.is_dir():
            yield from _list(entry, depth - 1, f"{prefix}{entry.name}/")


def _file_size(path: Path) -> int | None:
    """Bytes in a regular file, links followed; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _unreadable(name: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{quoted(name, 300)} cannot be read",
        got=error.strerror,
        do="check the path and its rights",
    )
