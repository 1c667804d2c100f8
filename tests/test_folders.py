"""Folders copied whole, appearing whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from hf_watermark.errors import CheckpointError
from hf_watermark.folders import appearing, copy_folder, free_folder, holds_weights


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: contents by path, None for folders."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fill_and_raise(folder: Path, error, theirs: Path | None = None) -> None:
    with appearing(folder) as unfinished:
        (unfinished / "x").write_bytes(b"1")
        if theirs is not None:
            theirs.parent.mkdir()
            theirs.write_bytes(b"1")
        if error is not None:
            raise error


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "onnx" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    for path in ("a.bin", "onnx/b.txt", "onnx/deep/.hidden", ".gitattributes", "strange ü\n"):
        (folder / path).write_bytes(path.encode())
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


class TestCopyFolder:
    def test_everything(self, source, target):
        paths = list(copy_folder(source, target))
        assert tree(target) == tree(source)
        assert sorted(paths) == [path for path, content in tree(source).items() if content]

    def test_but_bookkeeping_at_the_top(self, source, target):
        for path in (".git/objects", ".cache/huggingface", "onnx/.cache"):
            (source / path).mkdir(parents=True)
            (source / path / "x").write_bytes(b"x")
        list(copy_folder(source, target))
        assert "onnx/.cache/x" in tree(target)
        assert not {".git", ".cache"} & set(tree(target))

    def test_links_are_followed(self, source, target, tmp_path):
        """As in huggingface_hub's cache: every file is a link into another folder."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "1").write_bytes(b"weights")
        (source / "model.safetensors").symlink_to("../blobs/1")
        (source / "linked").symlink_to("onnx")
        list(copy_folder(source, target))
        assert (target / "model.safetensors").read_bytes() == b"weights"
        assert (target / "linked" / "deep" / ".hidden").exists()
        assert not any(path.is_symlink() for path in target.rglob("*"))

    def test_nobody_gets_more_rights(self, source, target):
        for path, mode in (("a.bin", 0o400), ("onnx/b.txt", 0o755), (".gitattributes", 0o666)):
            (source / path).chmod(mode)
        before = os.umask(0o027)
        try:
            list(copy_folder(source, target))
        finally:
            os.umask(before)
        modes = [mode_of(target / path) for path in ("a.bin", "onnx/b.txt", ".gitattributes")]
        assert modes == [0o600, 0o750, 0o640]

    @pytest.mark.parametrize("to", ["..", ".", "../..", "/"])
    def test_links_that_lead_back(self, source, target, to):
        (source / "onnx" / "deep" / "back").symlink_to(to)
        with pytest.raises(CheckpointError, match="a link to a folder that it lies in"):
            list(copy_folder(source, target))

    def test_links_that_lead_back_together(self, source, target, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "to").symlink_to(source)
        (source / "to").symlink_to(tmp_path / "other")
        with pytest.raises(CheckpointError, match="a link to a folder that it lies in"):
            list(copy_folder(source, target))

    def test_broken_links(self, source, target):
        (source / "model.safetensors").symlink_to("../blobs/gone")
        with pytest.raises(CheckpointError, match="got a broken link"):
            list(copy_folder(source, target))

    def test_no_file(self, source, target):
        os.mkfifo(source / "pipe")
        with pytest.raises(CheckpointError, match="expected a file or a folder"):
            list(copy_folder(source, target))

    def test_what_cannot_be_read(self, source, target, monkeypatch):
        def refuse(path, copy):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(CheckpointError, match=r"source/.* cannot be read; got Permission"):
            list(copy_folder(source, target))

    def test_what_cannot_be_written(self, source, target, monkeypatch):
        def refuse(path, copy):
            raise OSError(28, "No space left on device", str(path), None, str(copy))

        monkeypatch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(OSError, match="No space left"):
            list(copy_folder(source, target))


class TestFreeFolder:
    def test_new_or_empty(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "empty").mkdir()
        for path in ("empty", Path("new/deep"), "../" + tmp_path.name + "/x", "~/x", "."):
            if path == ".":
                (tmp_path / "empty").rmdir()
            expected = tmp_path / str(path).replace("~/", "")
            assert free_folder(path) == Path(os.path.normpath(expected))

    def test_taken(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        for path in (tmp_path, tmp_path / "file", "/"):
            with pytest.raises(CheckpointError, match="exists; expected a new or empty folder"):
                free_folder(path)

    @pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-this-name/x"])
    def test_no_path(self, path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            free_folder(path)

    def test_a_mount_point(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(CheckpointError, match="is a mount point"):
            free_folder(tmp_path / "volume")


class TestAppearing:
    def test_at_once(self, tmp_path):
        folder = tmp_path / "a" / "b" / "out"
        before = os.umask(0o027)
        try:
            with appearing(folder) as unfinished:
                (unfinished / "x").write_bytes(b"1")
                assert not folder.exists()
                assert unfinished.parent.name.startswith(".out.")
        finally:
            os.umask(before)
        assert tree(folder) == {"x": b"1"}
        assert mode_of(folder) == 0o750
        assert os.listdir(folder.parent) == ["out"]

    def test_in_place_of_an_empty_one(self, tmp_path):
        folder = tmp_path / "out"
        folder.mkdir(0o700)
        with appearing(folder) as unfinished:
            (unfinished / "x").write_bytes(b"1")
        assert tree(folder) == {"x": b"1"}
        assert mode_of(folder) == 0o700

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_not_at_all(self, tmp_path, error):
        with pytest.raises(error):
            fill_and_raise(tmp_path / "a" / "b" / "out", error)
        assert not tree(tmp_path)

    def test_a_write_that_fails(self, tmp_path):
        with pytest.raises(CheckpointError, match="No space left") as caught:
            fill_and_raise(tmp_path / "a" / "out", OSError(28, "No space left on device"))
        assert "nothing was left behind" in str(caught.value)
        assert not tree(tmp_path)

    def test_somebody_was_faster(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written; got Directory not empty"):
            fill_and_raise(tmp_path / "out", None, theirs=tmp_path / "out" / "theirs")
        assert tree(tmp_path) == {"out": None, "out/theirs": b"1"}

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_bytes(b"1")
        with (
            pytest.raises(CheckpointError, match="cannot be written"),
            appearing(tmp_path / "file" / "out"),
        ):
            pass
        assert tree(tmp_path) == {"file": b"1"}

    def test_long_names(self, tmp_path):
        folder = tmp_path / ("ü" * 127)
        with appearing(folder):
            pass
        assert folder.is_dir()

    def test_the_folder_that_one_is_in(self, tmp_path, monkeypatch):
        folder = tmp_path / "out"
        folder.mkdir()
        monkeypatch.chdir(folder)
        with appearing(free_folder(".")) as unfinished:
            (unfinished / "x").write_bytes(b"1")
        assert tree(folder) == {"x": b"1"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("pytorch_model.bin", True),
        ("onnx/model.onnx", True),
        ("checkpoint-5/model.safetensors", True),
        ("tf_model.h5", True),
        ("flax_model.msgpack", True),
        ("training_args.bin", False),
        ("checkpoint-5/optimizer.pt", False),
        ("rng_state_0.pth", False),
        ("config.json", False),
    ],
)
def test_holds_weights(path, expected):
    assert holds_weights(path) is expected
