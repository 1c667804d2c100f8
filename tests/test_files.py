"""Files of a folder: which are listed, and reading them, also while others write."""

from __future__ import annotations

import os

import numpy as np
import pytest
from safetensors.numpy import save

from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import (
    CheckpointError,
    MalformedCheckpointError,
    NotSafetensorsError,
)
from hf_watermark.files import FileReader, FolderFiles


@pytest.fixture
def folder(tmp_path):
    def write(contents):
        for name, raw in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        return tmp_path

    return write


class TestFolderFiles:
    def test_listing(self, folder):
        path = folder(
            {"a.json": b"1", "sub/b.json": b"22", "sub/deep/c": b"", ".git/config": b"", ".x": b""}
        )
        assert FolderFiles(path).sizes == {".x": 0, "a.json": 1, "sub/b.json": 2}

    def test_the_cache_of_huggingface_hub(self, tmp_path):
        raw = save({"a": np.zeros((4, 3), np.float32)})
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "abc").write_bytes(raw)
        snapshot = tmp_path / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
        (snapshot / "dangling.safetensors").symlink_to("../../blobs/gone")
        assert Checkpoint.open(FolderFiles(snapshot)).shapes() == {"a": (4, 3)}

    def test_what_is_no_file_is_left_out(self, tmp_path):
        os.mkfifo(tmp_path / "model.safetensors")
        with pytest.raises(NotSafetensorsError):
            Checkpoint.open(FolderFiles(tmp_path))

    @pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "missing", "sub"])
    def test_only_listed_paths(self, folder, path):
        files = FolderFiles(folder({"sub/a": b""}))
        for read in (files.reader, lambda path: files.read(path, 10)):
            with pytest.raises(CheckpointError, match="is not in"):
                read(path)

    def test_read(self, folder):
        files = FolderFiles(folder({"a": b"12345"}))
        assert files.read("a", 5) == b"12345"
        assert files.bytes_read == 5
        with pytest.raises(CheckpointError, match="at most 4 bytes; got 5"):
            files.read("a", 4)

    def test_a_file_that_changes(self, folder):
        path = folder({"a": b"12345"})
        reader = FolderFiles(path).reader("a")
        assert reader.read(1, 3) == b"23"
        (path / "a").write_bytes(b"1")
        with pytest.raises(MalformedCheckpointError, match="changed while it was read"):
            reader.read(1, 3)

    @pytest.mark.parametrize("name", ["missing", "file.txt"])
    def test_no_model(self, tmp_path, name):
        (tmp_path / "file.txt").write_text("x")
        with pytest.raises(CheckpointError, match=r"a folder or a \.safetensors file"):
            FolderFiles(tmp_path / name)


class TestFileReader:
    def test_reads(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(bytes(range(100)))
        with FileReader(path) as reader:
            assert (reader.name, reader.size) == (str(path), 100)
            assert reader.read(10, 20) == bytes(range(10, 20))
            assert reader.read(5, 5) == b""
        reader.close()
        assert FileReader(path, "shown").name == "shown"

    def test_truncated_while_open(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(bytes(100))
        with FileReader(path) as reader:
            os.truncate(path, 40)
            with pytest.raises(
                MalformedCheckpointError, match="truncated; expected at least 50 bytes; got 40"
            ):
                reader.read(30, 50)

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="No such file"):
            FileReader(tmp_path / "f")

    def test_what_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(CheckpointError, match="not a regular file"):
                FileReader(path)
