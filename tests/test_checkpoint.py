"""Which files hold the weights, and reading them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import (
    CarrierError,
    CarrierMissingError,
    CheckpointError,
    MalformedCheckpointError,
    NotSafetensorsError,
)
from hf_watermark.files import FolderFiles

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(*names: str, rows: int = 4) -> dict[str, np.ndarray]:
    return {
        name: np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + 100 * place
        for place, name in enumerate(names)
    }


@pytest.fixture
def folder(tmp_path):
    def write(**contents):
        return write_all({name.replace("__", "."): raw for name, raw in contents.items()})

    def write_all(contents):
        for name, raw in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
        return tmp_path

    write.all = write_all
    return write


@pytest.fixture
def sharded(folder):
    return folder.all(
        {
            SHARDS[0]: save(tensors("a", "b")),
            SHARDS[1]: save(tensors("c")),
            INDEX: {
                "metadata": {"total_size": 1},
                "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]},
            },
        }
    )


def open_at(path) -> Checkpoint:
    return Checkpoint.open(FolderFiles(path))


class TestChoice:
    def test_single(self, folder):
        raw = save(tensors("a", "b"))
        path = folder.all({"model.safetensors": raw, "config.json": {}})
        checkpoint = open_at(path)
        assert checkpoint.weight_files == ("model.safetensors",)
        assert checkpoint.shapes() == {"a": (4, 3), "b": (4, 3)}
        assert checkpoint.bytes_total == len(raw)
        assert checkpoint.tensors["a"].file == "model.safetensors"
        assert checkpoint.files.revision is None

    def test_sharded(self, sharded):
        checkpoint = open_at(sharded)
        assert checkpoint.weight_files == SHARDS
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        assert checkpoint.tensors["c"].file == SHARDS[1]
        assert checkpoint.bytes_total == sum((sharded / shard).stat().st_size for shard in SHARDS)
        np.testing.assert_array_equal(checkpoint.read_rows("b", 1, 3), tensors("a", "b")["b"][1:3])

    def test_the_single_file_wins_over_an_index(self, sharded):
        (sharded / "model.safetensors").write_bytes(save(tensors("other")))
        assert set(open_at(sharded).tensors) == {"other"}

    def test_the_single_file_wins_over_others(self, folder):
        path = folder.all(
            {"model.safetensors": save(tensors("a")), "model.fp16.safetensors": b"", "x.bin": b""}
        )
        assert open_at(path).weight_files == ("model.safetensors",)

    @pytest.mark.parametrize("name", ["weights.safetensors", "diffusion_pytorch_model.safetensors"])
    def test_the_one_other_file(self, folder, name):
        assert open_at(folder.all({name: save(tensors("a"))})).weight_files == (name,)

    def test_the_name_that_another_library_loads(self, folder):
        path = folder.all(
            {
                "adapter_model.safetensors": save(tensors("a")),
                "adapter_model.fp16.safetensors": b"not read",
            }
        )
        assert open_at(path).weight_files == ("adapter_model.safetensors",)

    def test_another_index(self, sharded):
        os.rename(sharded / INDEX, sharded / "diffusion_pytorch_model.safetensors.index.json")
        assert open_at(sharded).weight_files == SHARDS

    @pytest.mark.parametrize(
        "names",
        [
            ["one.safetensors", "two.safetensors"],
            ["diffusion_pytorch_model.safetensors", "adapter_model.safetensors"],
            list(SHARDS),
            ["a.safetensors.index.json", "b.safetensors.index.json"],
        ],
    )
    def test_unclear(self, folder, names):
        path = folder.all({name: save(tensors("a")) for name in names})
        with pytest.raises(CheckpointError, match="not clear which file") as caught:
            open_at(path)
        assert all(name in str(caught.value) for name in names)
        assert "give its path" in str(caught.value)

    def test_a_file_by_its_path(self, folder):
        path = folder.all(
            {"one.safetensors": save(tensors("a")), "two.safetensors": save(tensors("b"))}
        )
        checkpoint = open_at(path / "two.safetensors")
        assert set(checkpoint.tensors) == {"b"}
        assert checkpoint.files.name == str(path / "two.safetensors")
        assert list(checkpoint.files.sizes) == ["two.safetensors"]

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "m.PTH", "a.ckpt", "tf_model.h5", "m.msgpack"]
    )
    def test_pickles(self, folder, name):
        with pytest.raises(NotSafetensorsError, match="never opened") as caught:
            open_at(folder.all({name: b"\x80\x04."}))
        message = str(caught.value)
        assert name in message
        assert "save_pretrained" in message
        assert "spaces/safetensors/convert" in message

    def test_nothing(self, folder):
        with pytest.raises(NotSafetensorsError, match="got no weight file"):
            open_at(folder.all({"config.json": {}}))

    def test_only_below(self, folder):
        with pytest.raises(NotSafetensorsError, match=r"'unet/model.safetensors' in folders below"):
            open_at(folder.all({"unet/model.safetensors": save(tensors("a"))}))


class TestIndex:
    @pytest.mark.parametrize(
        "path",
        [
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/../../model.safetensors",
            "..\\model.safetensors",
            "C:model.safetensors",
            "./model.safetensors",
            "a//model.safetensors",
            "pytorch_model.bin",
            "",
            "a\0.safetensors",
        ],
    )
    def test_paths_outside(self, folder, path):
        at = folder.all({INDEX: {"weight_map": {"a": path}}, "pytorch_model.bin": b""})
        with pytest.raises(MalformedCheckpointError, match="outside the repo or at no safetensors"):
            open_at(at)

    def test_a_missing_shard(self, sharded):
        (sharded / SHARDS[1]).unlink()
        with pytest.raises(MalformedCheckpointError, match=f"shard '{SHARDS[1]}'.*is missing"):
            open_at(sharded)

    @pytest.mark.parametrize(
        "index",
        [
            [],
            {},
            {"weight_map": []},
            {"weight_map": {}},
            {"weight_map": {"a": 1}},
            {"weight_map": {"a": None}},
            b"{",
            b"\xff",
            b"[" * 100_000,
            b'{"weight_map": 1' + b"0" * 5000 + b"}",
        ],
    )
    def test_malformed(self, folder, index):
        with pytest.raises(MalformedCheckpointError, match=r"is not JSON|has no weight_map"):
            open_at(folder.all({INDEX: index}))

    @pytest.mark.parametrize(
        ("name", "shard", "found"),
        [("a", SHARDS[1], SHARDS[0]), ("missing", SHARDS[0], "no such tensor")],
    )
    def test_a_tensor_elsewhere(self, sharded, name, shard, found):
        index = json.loads((sharded / INDEX).read_bytes())
        index["weight_map"][name] = shard
        (sharded / INDEX).write_text(json.dumps(index))
        with pytest.raises(MalformedCheckpointError, match=f"misplaces tensor '{name}'.*{found}"):
            open_at(sharded)

    def test_a_tensor_twice(self, sharded):
        (sharded / SHARDS[1]).write_bytes(save(tensors("a", "c")))
        with pytest.raises(MalformedCheckpointError, match=r"'a' .* is in two files"):
            open_at(sharded)

    def test_tensors_that_the_index_leaves_out_count(self, sharded):
        # from_pretrained loads whole shards, whatever the index lists.
        (sharded / SHARDS[1]).write_bytes(save(tensors("c", "extra")))
        assert set(open_at(sharded).tensors) == {"a", "b", "c", "extra"}

    def test_a_malformed_shard(self, sharded):
        (sharded / SHARDS[1]).write_bytes(b"nonsense")
        with pytest.raises(MalformedCheckpointError, match=re.escape(SHARDS[1])):
            open_at(sharded)


class TestReading:
    def test_blocks_keep_their_order(self, sharded):
        checkpoint = open_at(sharded)
        wanted = tensors("a", "b") | tensors("c")
        blocks = [(name, start, start + 2) for start in (2, 0, 1) for name in "cab"] * 5
        for workers in (1, 8):
            for block, rows in zip(
                blocks, checkpoint.read_blocks(blocks, workers=workers), strict=True
            ):
                np.testing.assert_array_equal(rows, wanted[block[0]][block[1] : block[2]])
        assert checkpoint.read_blocks([]) == []

    def test_blocks_are_read_at_the_same_time(self, folder):
        checkpoint = open_at(folder.all({"model.safetensors": save(tensors("a"))}))
        reader = checkpoint._readers["model.safetensors"]
        barrier = threading.Barrier(4, timeout=10)

        class Meeting:
            name, size = reader.name, reader.size

            def read(self, start, stop):
                barrier.wait()
                return reader.read(start, stop)

        checkpoint._readers = {"model.safetensors": Meeting()}
        assert len(checkpoint.read_blocks([("a", 0, 1)] * 4, workers=4)) == 4

    def test_the_first_error_stops_the_rest(self, folder):
        checkpoint = open_at(folder.all({"model.safetensors": save(tensors("a"))}))
        started = []

        class Failing:
            name, size = "failing", 0

            def read(self, start, stop):
                started.append(start)
                time.sleep(0.01)
                raise CheckpointError("no")

        checkpoint._readers = {"model.safetensors": Failing()}
        with pytest.raises(CheckpointError, match="no"):
            checkpoint.read_blocks([("a", 0, 1)] * 500, workers=4)
        assert len(started) < 100

    @given(chunk=st.integers(1, 60))
    def test_bytes(self, chunk):
        import tempfile

        array = np.arange(12, dtype=np.float16).reshape(3, 4)
        with tempfile.TemporaryDirectory() as path:
            with open(f"{path}/model.safetensors", "wb") as file:
                file.write(save({"w": array, "x": np.ones(3)}))
            parts = list(open_at(path).iter_bytes("w", chunk=chunk))
        assert b"".join(parts) == array.tobytes()
        assert all(len(part) <= chunk for part in parts)

    def test_bytes_of_any_dtype(self, folder):
        array = np.arange(5, dtype=np.int64)
        checkpoint = open_at(folder.all({"model.safetensors": save({"w": array})}))
        digest = hashlib.sha256(b"".join(checkpoint.iter_bytes("w"))).hexdigest()
        assert digest == hashlib.sha256(array.tobytes()).hexdigest()
        with pytest.raises(CarrierError, match="got I64"):
            checkpoint.read_rows("w", 0, 1)
        with pytest.raises(CheckpointError, match="at least a byte"):
            next(checkpoint.iter_bytes("w", chunk=0))

    def test_bytes_read_counts_what_was_read(self, folder):
        raw = save(tensors("a", rows=100_000))
        checkpoint = open_at(folder.all({"model.safetensors": raw}))
        assert checkpoint.bytes_read == 32768
        checkpoint.read_rows("a", 5, 7)
        assert checkpoint.bytes_read == 32768 + 2 * 3 * 4
        assert checkpoint.bytes_total == len(raw)

    def test_a_missing_tensor(self, folder):
        checkpoint = open_at(folder.all({"model.safetensors": save(tensors("a"))}))
        with pytest.raises(CarrierMissingError, match="no tensor 'b'"):
            checkpoint.read_rows("b", 0, 1)
