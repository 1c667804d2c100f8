"""A checkpoint's folder: found or downloaded, copied whole, and appearing whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from hf_watermark.errors import CheckpointError
from hf_watermark.hub import open_files
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.transfers import download

__all__ = ["appearing", "copy_folder", "free_folder", "holds_weights", "source_folder"]

_SKIPPED = (".git", ".cache")  # a clone's history, the bookkeeping of huggingface_hub
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


def source_folder(
    source: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    only: Sequence[str] | None = None,
) -> Path:
    """The folder that a path names, or that a repo of the Hub is downloaded to.

    Args:
        source: A folder, or `org/name`.
        revision: Of a repo.
        token: See `HubFiles`.
        only: Patterns of the files of a repo that are wanted; all by default.

    Raises:
        CheckpointError: If there is no such folder.
        HubError: If the repo cannot be downloaded.
    """
    files = open_files(source, revision, token)
    if files.revision is not None:
        return download(files.name, files.revision, token, only)
    folder = Path(os.path.expanduser(files.name))
    if not folder.is_dir():
        raise CheckpointError(
            f"{quoted(files.name, 300)} is a file", expected="the folder of the checkpoint"
        )
    return folder


def free_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that is not there yet, or empty.

    Raises:
        CheckpointError: If something is there, or nothing can be.
    """
    try:
        folder = Path(path).expanduser().resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"The output {quoted(str(folder), 300)} exists",
                expected="a new or empty folder",
                do="choose another",
            )
        if os.path.ismount(folder):
            raise CheckpointError(
                f"The output {quoted(str(folder), 300)} is a mount point",
                expected="a folder that can appear in one step",
                do="choose a new folder in it",
            )
    except (OSError, ValueError, RuntimeError) as error:  # a null byte; the ~ of nobody
        _refuse(os.fspath(path), error)
    return folder


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder that takes its name when it is complete, and vanishes if it never is.

    Whatever kills the process, even at once, nothing but a hidden folder beside it can be left.

    Raises:
        CheckpointError: If it cannot be written.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    hidden = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp's own folder is closed to others for good; the one in it follows the umask.
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))
        unfinished = hidden / "model"
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            shutil.copymode(folder, unfinished)
            folder.rmdir()
        os.replace(unfinished, folder)
        missing = []
    except OSError as error:
        _refuse(folder, error)
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def copy_folder(folder: Path, target: Path) -> Iterator[str]:
    """Copy all files but `.git` and `.cache`, following links.

    Nobody gets more rights than on the original, and the owner those to write.

    Yields:
        The path of each file once it is copied, in POSIX spelling.

    Raises:
        CheckpointError: If something is no file, or a link leads back.
    """
    try:
        for path in _walk(folder, frozenset(folder.resolve().parents), _SKIPPED):
            relative = path.relative_to(folder)
            copy = target / relative
            if path.is_dir():
                copy.mkdir()
                continue
            mode = stat.S_IMODE(path.stat().st_mode) & 0o777 | 0o600
            os.close(os.open(copy, os.O_CREAT | os.O_WRONLY, mode))  # the umask applies
            shutil.copyfile(path, copy)
            yield relative.as_posix()
    except OSError as error:
        named = Path(os.fsdecode(error.filename or ""))
        if error.filename2 is None and folder in (named, *named.parents):
            raise CheckpointError(
                f"{quoted(str(named), 300)} cannot be read", got=error.strerror
            ) from None
        raise


def holds_weights(path: str) -> bool:
    """Whether a file may hold a model's weights, by its name."""
    name = path.rsplit("/", 1)[-1].lower()
    return name.endswith(_WEIGHTS) and not name.startswith(_NO_WEIGHTS)


def _walk(folder: Path, above: frozenset[Path], skipped: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files and folders, a folder before what it holds."""
    real = folder.resolve()
    if real in above:
        raise CheckpointError(
            f"{quoted(str(folder), 300)} is a link to a folder that it lies in", do="remove it"
        )
    for path in sorted(folder.iterdir()):
        if path.name in skipped:
            continue
        if path.is_dir():
            yield path
            yield from _walk(path, above | {real})
        elif path.is_file():
            yield path
        else:
            raise CheckpointError(
                f"{quoted(str(path), 300)} cannot be copied",
                expected="a file or a folder",
                got="a broken link" if path.is_symlink() else "something else",
                do="complete the download, or remove it",
            )


def _refuse(folder: object, error: Exception) -> NoReturn:
    raise CheckpointError(
        f"{quoted(str(folder), 300)} cannot be written",
        got=getattr(error, "strerror", None) or error,
        do="make room or choose another folder; nothing was left behind",
    ) from None
