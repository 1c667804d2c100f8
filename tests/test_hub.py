"""Repos on a loopback Hub, over HTTP, with everything that can go wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from safetensors.numpy import save

from hf_watermark.checkpoint import Checkpoint
from hf_watermark.connection import FileMissingError, Patience, TooLongError, refusal
from hf_watermark.connection import Target as RequestTarget
from hf_watermark.errors import (
    AccessDeniedError,
    CardConflictError,
    CheckpointError,
    HubError,
    NetworkGaveUpError,
    NotSafetensorsError,
    RepoMissingError,
    RevisionMissingError,
)
from hf_watermark.files import FolderFiles
from hf_watermark.hub import HubFiles, first_commit, open_files
from hf_watermark.transfers import commit_files

QUICK = Patience(first_wait=0.01, total=5.0, timeout=2.0)
WEIGHTS = np.arange(60_000, dtype=np.float32).reshape(1000, 60)
SIZE = len(save({"w": WEIGHTS}))
CARD = b"---\ntags:\n- watermark\n---\n"
RESOLVE = r"/resolve/.*model\.safetensors"


def push(repo: str, files: dict[str, bytes], **kwargs) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return HfApi().create_commit(repo, operations, commit_message="push", **kwargs).oid


@pytest.fixture
def hub(loopback_hub):
    loopback_hub.create_repo("demo/vit")
    push("demo/vit", {"model.safetensors": save({"w": WEIGHTS}), "config.json": b"{}"})
    loopback_hub.requests.clear()
    return loopback_hub


def message_of(kind: type[Exception], function, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


class TestReading:
    def test_rows_by_ranges(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", patience=QUICK))
        np.testing.assert_array_equal(checkpoint.read_rows("w", 10, 12), WEIGHTS[10:12])
        assert checkpoint.bytes_read == 32768 + 2 * 60 * 4
        assert checkpoint.bytes_total == SIZE
        # The listing, then the header and the rows, each at the Hub and where it redirects to.
        assert [(seen.origin, seen.status) for seen in hub.requests] == [
            ("hub", 200), ("hub", 302), ("cdn", 206), ("hub", 302), ("cdn", 206)
        ]  # fmt: skip
        start = checkpoint.tensors["w"].start + 10 * 240
        assert hub.requests[-1].range == f"bytes={start}-{start + 479}"

    def test_blocks_at_the_same_time(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", patience=QUICK))
        blocks = [("w", start, start + 10) for start in range(0, 400, 10)]
        hub.faults.add(path=RESOLVE, origin="cdn", delay=0.1, times=None)
        begun = time.monotonic()
        for (_, start, stop), rows in zip(blocks, checkpoint.read_blocks(blocks), strict=True):
            np.testing.assert_array_equal(rows, WEIGHTS[start:stop])
        assert time.monotonic() - begun < 2.5

    def test_all_bytes(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", patience=QUICK))
        assert b"".join(checkpoint.iter_bytes("w", chunk=100_000)) == WEIGHTS.tobytes()

    def test_the_listing(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        assert files.name == "demo/vit"
        assert re.fullmatch("[0-9a-f]{40}", files.revision)
        assert files.sizes["config.json"] == 2
        assert files.sizes["model.safetensors"] == SIZE

    def test_small_files(self, hub):
        push("demo/vit", {"empty": b"", "café/ä b?#.json": b"1234"})
        files = HubFiles("demo/vit", patience=QUICK)
        assert files.read("café/ä b?#.json", 4) == b"1234"
        assert files.bytes_read == 4
        before = len(hub.requests)
        assert files.read("empty", 4) == b""
        assert files.reader("config.json").read(1, 1) == b""
        assert len(hub.requests) == before

    def test_a_whole_large_file(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        assert files.read("model.safetensors", 10**6) == save({"w": WEIGHTS})
        assert message_of(CheckpointError, files.read, "model.safetensors", 10) == (
            "'model.safetensors' of 'demo/vit' is too large to be what its name says; expected at"
            f" most 10 bytes; got {SIZE}"
        )

    @pytest.mark.parametrize("branch", ["main", "refs/pr/1", "b1"])
    def test_revisions(self, hub, branch):
        api = HfApi()
        if branch == "b1":
            api.create_branch("demo/vit", branch="b1")
        if branch == "refs/pr/1":
            api.create_pull_request("demo/vit", title="Pull request")
        sha = push("demo/vit", {"a": b"1"}, revision=branch)
        files = HubFiles("demo/vit", branch, patience=QUICK)
        assert files.revision == sha
        assert files.read("a", 1) == b"1"
        assert HubFiles("demo/vit", sha, patience=QUICK).revision == sha

    def test_a_push_in_the_middle_changes_nothing(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", "main", patience=QUICK))
        before = checkpoint.files.revision
        sha = push("demo/vit", {"model.safetensors": save({"w": -WEIGHTS[::-1]})})
        np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 5), WEIGHTS[:5])
        assert checkpoint.files.revision == before != sha

    def test_a_deleted_file_is_still_read(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        operations = [CommitOperationDelete("config.json")]
        HfApi().create_commit("demo/vit", operations, commit_message="x")
        assert files.read("config.json", 10) == b"{}"

    def test_no_safetensors(self, hub):
        hub.create_repo("demo/old")
        push("demo/old", {"pytorch_model.bin": b"\x80\x04."})
        files = HubFiles("demo/old", patience=QUICK)
        assert "never opened" in message_of(NotSafetensorsError, Checkpoint.open, files)


class TestRefusals:
    def test_a_missing_repo(self, hub):
        message = message_of(RepoMissingError, HubFiles, "demo/none", patience=QUICK)
        assert "'demo/none'" in message
        assert "Check the spelling; for a private repo pass --token or set HF_TOKEN" in message

    def test_a_private_repo(self, hub):
        hub.create_repo("demo/secret", private=True)
        assert HubFiles("demo/secret", patience=QUICK).sizes is not None
        assert HubFiles("demo/secret", token=hub.token, patience=QUICK)
        other = hub.add_user("other")
        for token in (False, other):
            message = message_of(
                RepoMissingError, HubFiles, "demo/secret", token=token, patience=QUICK
            )
            assert "HF_TOKEN" in message

    def test_a_gated_repo(self, hub):
        hub.create_repo("demo/gated", gated=True)
        push("demo/gated", {"model.safetensors": save({"w": WEIGHTS})})
        assert Checkpoint.open(HubFiles("demo/gated", patience=QUICK)).tensors
        other = hub.add_user("other")
        for token in (False, other):
            files = HubFiles("demo/gated", token=token, patience=QUICK)
            message = message_of(AccessDeniedError, Checkpoint.open, files)
            assert "is gated" in message
            assert "accept its conditions" in message.lower()
        hub.grant_access("demo/gated", "other")
        assert Checkpoint.open(HubFiles("demo/gated", token=other, patience=QUICK)).tensors

    def test_a_missing_revision(self, hub):
        for revision in ("none", "0" * 40, "../main", "\udcff"):
            message = message_of(
                RevisionMissingError, HubFiles, "demo/vit", revision, patience=QUICK
            )
            assert "expected a branch, a tag" in message

    def test_a_missing_file(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        for read in (files.reader, lambda path: files.read(path, 10)):
            assert "'none' of 'demo/vit'" in message_of(FileMissingError, read, "none")

    @pytest.mark.parametrize("repo", ["a/b/c", "", "a b", "-a/b", "a/..", "a/b.git", "x" * 300])
    def test_malformed_repo_ids(self, hub, repo):
        assert "expected org/name" in message_of(HubError, HubFiles, repo, patience=QUICK)
        assert not hub.requests

    @pytest.mark.parametrize("token", ["hf_secret\nX: y", "hf_sécret", "hf_secret\x00"])
    def test_a_token_that_is_none(self, hub, token):
        message = message_of(AccessDeniedError, HubFiles, "demo/vit", token=token)
        assert "cret" not in message

    def test_a_wrong_token_is_not_shown(self, hub):
        with pytest.raises(HubError) as caught:
            HubFiles("demo/vit", token="hf_wrong", patience=QUICK)
        assert "hf_wrong" not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "code", "message", "file", "kind"),
        [
            (401, "", "Invalid credentials in Authorization header", None, AccessDeniedError),
            (401, "", "Invalid username or password.", None, RepoMissingError),
            (401, "RepoNotFound", "", "f", RepoMissingError),
            (404, "RepoNotFound", "", "f", RepoMissingError),
            (404, "", "", None, RepoMissingError),
            (404, "", "", "f", FileMissingError),
            (404, "EntryNotFound", "", "f", FileMissingError),
            (404, "RevisionNotFound", "", "f", RevisionMissingError),
            (403, "GatedRepo", "", "f", AccessDeniedError),
            (403, "", "Access to this resource is disabled.", "f", AccessDeniedError),
            (403, "", "Forbidden", "f", AccessDeniedError),
            (400, "", "The title must have 3 characters", None, HubError),
            (418, "", "", "f", NetworkGaveUpError),
        ],
    )
    def test_by_status(self, status, code, message, file, kind):
        headers = {"x-error-code": code, "x-error-message": message}
        assert type(refusal(status, headers, RequestTarget("a/b", None, file))) is kind


class TestFailures:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_one_failure_then_fine(self, hub, status):
        fault = hub.faults.add(method="GET", status=status, times=1)
        files = HubFiles("demo/vit", patience=QUICK)
        for origin in ("hub", "cdn"):
            hub.faults.add(method="GET", path=RESOLVE, origin=origin, status=status, times=1)
        np.testing.assert_array_equal(Checkpoint.open(files).read_rows("w", 0, 1), WEIGHTS[:1])
        assert fault.hits == 1

    def test_a_storm(self, hub, caplog):
        caplog.set_level(logging.DEBUG)
        files = HubFiles("demo/vit", patience=QUICK)
        fault = hub.faults.add(path=RESOLVE, status=503, times=None)
        message = message_of(NetworkGaveUpError, files.reader("model.safetensors").read, 5, 10)
        assert message.startswith(
            "gave up on bytes 5 to 10 of 'model.safetensors' of 'demo/vit' at"
            f" '{files.revision}' after 5 tries; got HTTP 503."
        )
        assert fault.hits == 5
        assert hub.token not in message + caplog.text

    def test_a_storm_lasts_no_longer_than_patience(self, hub):
        hub.faults.add(status=503, times=None)
        begun = time.monotonic()
        message_of(
            NetworkGaveUpError,
            HubFiles,
            "demo/vit",
            patience=Patience(tries=100, first_wait=0.1, total=1.0),
        )
        assert time.monotonic() - begun < 1.5

    def test_the_default_patience(self):
        patience = Patience()
        waits = [patience.first_wait * 2**n for n in range(patience.tries - 1)]
        assert sum(waits) < patience.total <= 15

    def test_a_request_to_wait_is_obeyed(self, hub):
        hub.faults.add(status=429, header={"Retry-After": "1"}, times=1)
        begun = time.monotonic()
        HubFiles("demo/vit", patience=QUICK)
        assert time.monotonic() - begun >= 1

    @pytest.mark.parametrize("header", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}])
    def test_a_request_to_wait_for_an_hour_is_not(self, hub, header):
        hub.faults.add(status=429, header=header, times=None)
        begun = time.monotonic()
        message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=QUICK)
        assert "got HTTP 429 and a request to wait 3600 seconds" in message
        assert time.monotonic() - begun < 1

    def test_a_body_cut_once(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", patience=QUICK))
        before = checkpoint.bytes_read
        fault = hub.faults.add(path=RESOLVE, cut_body=1000, times=1)
        np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 20), WEIGHTS[:20])
        assert fault.hits == 1
        assert checkpoint.bytes_read - before == 1000 + 20 * 240

    def test_a_body_cut_for_ever(self, hub):
        checkpoint = Checkpoint.open(HubFiles("demo/vit", patience=QUICK))
        fault = hub.faults.add(path=RESOLVE, cut_body=1000, times=None)
        message = message_of(NetworkGaveUpError, checkpoint.read_rows, "w", 0, 20)
        assert "after 5 tries; got RemoteProtocolError" in message
        assert fault.hits == 5

    def test_a_listing_cut(self, hub):
        hub.faults.add(path="/api/models/", cut_body=20, times=1)
        assert HubFiles("demo/vit", patience=QUICK).sizes

    def test_a_file_cut(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        hub.faults.add(path="config", cut_body=1, times=1)
        assert files.read("config.json", 100) == b"{}"

    def test_an_ignored_range(self, hub):
        raw = save({"w": np.zeros((2_000_000, 8), np.float32)})
        push("demo/vit", {"model.safetensors": raw})
        files = HubFiles("demo/vit", patience=QUICK)
        hub.faults.add(path=RESOLVE, ignore_range=True, times=None)
        message = message_of(NetworkGaveUpError, Checkpoint.open, files)
        assert "ignored the range" in message
        assert "nothing was downloaded" in message
        assert files.bytes_read == 0
        assert sum(seen.status == 200 for seen in hub.requests if "resolve" in seen.path) == 1

    @pytest.mark.parametrize(
        "found",
        [
            None,
            f"bytes 0-4/{SIZE}",
            f"bytes 5-8/{SIZE}",
            f"bytes 5-9/{SIZE - 1}",
            f"bytes */{SIZE}",
            "5-9",
            "bytes=5-9",
        ],
    )
    def test_a_wrong_content_range(self, hub, found):
        reader = HubFiles("demo/vit", patience=QUICK).reader("model.safetensors")
        hub.faults.add(path=RESOLVE, origin="cdn", header={"Content-Range": found})
        message = message_of(NetworkGaveUpError, reader.read, 5, 10)
        assert f"expected bytes 5-9/{SIZE}; got '{found or 'no Content-Range'}'" in message

    def test_an_unknown_total_will_do(self, hub):
        reader = HubFiles("demo/vit", patience=QUICK).reader("model.safetensors")
        hub.faults.add(path=RESOLVE, origin="cdn", header={"Content-Range": "bytes 5-9/*"})
        assert len(reader.read(5, 10)) == 5

    def test_a_compressed_answer(self, hub):
        reader = HubFiles("demo/vit", patience=QUICK).reader("model.safetensors")
        hub.faults.add(path=RESOLVE, origin="cdn", header={"Content-Encoding": "gzip"})
        assert "expected a plain body" in message_of(NetworkGaveUpError, reader.read, 5, 10)

    def test_a_file_longer_than_listed(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        files.sizes = {"config.json": 1}
        assert "at most 1 bytes" in message_of(TooLongError, files.read, "config.json", 100)

    def test_a_file_shorter_than_listed(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        files.sizes = {"config.json": 3}
        message = message_of(NetworkGaveUpError, files.read, "config.json", 100)
        assert "a body cut after 2 of 3 bytes" in message

    def test_no_answer(self, hub):
        hub.faults.add(delay=5, times=None)
        patience = Patience(tries=2, first_wait=0.01, timeout=0.2)
        begun = time.monotonic()
        message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=patience)
        assert "no answer in time (ReadTimeout)" in message
        assert time.monotonic() - begun < 2

    def test_connection_refused(self, loopback_hub, monkeypatch):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setattr(
                constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}"
            )
            message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=QUICK)
        assert "ConnectError" in message
        assert "Check the connection" in message

    @pytest.mark.parametrize("endpoint", ["ftp://x", "http://", "nonsense", "http://a b"])
    def test_a_broken_endpoint(self, loopback_hub, monkeypatch, endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=QUICK)
        assert loopback_hub.token not in message

    def test_offline(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=QUICK)
        assert "unset HF_HUB_OFFLINE" in message.replace("Unset", "unset")


class TestToken:
    def test_it_stays_at_the_hub(self, hub):
        hub.create_repo("demo/secret", private=True)
        push("demo/secret", {"model.safetensors": save({"w": WEIGHTS})})
        hub.requests.clear()
        Checkpoint.open(HubFiles("demo/secret", patience=QUICK)).read_rows("w", 0, 1)
        sent = {(seen.origin, seen.authorization) for seen in hub.requests}
        assert sent == {("hub", f"Bearer {hub.token}"), ("cdn", None)}
        assert all(seen.range for seen in hub.requests if seen.origin == "cdn")

    def test_it_is_not_in_a_repr(self, hub):
        files = HubFiles("demo/vit", token=hub.token, patience=QUICK)
        for thing in (files, files._connection, files.reader("config.json")):
            assert hub.token not in repr(thing)

    def test_the_next_page_of_another_origin_is_not_asked(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        hub.faults.add(path="/commits/", header={"Link": f'<{hub.cdn_endpoint}/x>; rel="next"'})
        assert "the same origin" in message_of(NetworkGaveUpError, files.commits)
        assert all(seen.origin == "hub" for seen in hub.requests)

    def test_without_a_saved_one(self, hub, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        assert HubFiles("demo/vit", patience=QUICK)
        message_of(AccessDeniedError, HubFiles, "demo/vit", token=True)


@pytest.fixture
def strange_server(loopback_hub, monkeypatch):
    """A server that answers whatever `answer` says, with the clients pointed at it."""

    class Handler(BaseHTTPRequestHandler):
        answer: tuple[bytes, dict[str, str]] = (b"", {})
        trickle = False

        def do_GET(self):
            body, headers = self.answer
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for byte in body if self.trickle else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            if not self.trickle:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Handler
    server.shutdown()
    server.server_close()


class TestNonsense:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            b"\xff",
            b"[" * 100_000,
            b"[]",
            b"null",
            b"{}",
            b'{"sha": "0123", "siblings": []}',
            b'{"sha": 1, "siblings": []}',
            json.dumps({"sha": "0" * 40, "siblings": [1]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a"}]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a", "size": None}]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a", "size": True}]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a", "size": -1}]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": [], "size": 1}]}).encode(),
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": 1, "size": 1}]}).encode(),
        ],
    )
    def test_a_listing(self, strange_server, body):
        strange_server.answer = (body, {})
        assert "makes no sense" in message_of(
            NetworkGaveUpError, HubFiles, "demo/vit", patience=QUICK
        )

    def test_an_endless_listing(self, strange_server):
        strange_server.answer = (b"", {"Content-Length": str(10**12)})
        with pytest.raises(NetworkGaveUpError, match="is too long"):
            HubFiles("demo/vit", patience=QUICK)

    def test_a_trickle(self, strange_server, monkeypatch):
        monkeypatch.setattr("hf_watermark.connection._STALL_SECONDS", 0.2)
        strange_server.answer = (b"x" * 200, {})
        strange_server.trickle = True
        patience = Patience(tries=2, first_wait=0.01)
        message = message_of(NetworkGaveUpError, HubFiles, "demo/vit", patience=patience)
        assert "trickles" in message


class TestOpenFiles:
    def test_a_repo(self, hub):
        files = open_files("demo/vit", "main", hub.token, patience=QUICK)
        assert isinstance(files, HubFiles)

    def test_a_folder_wins(self, hub, tmp_path, monkeypatch):
        (tmp_path / "demo" / "vit").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        for where in ("demo/vit", "./demo/vit", tmp_path / "demo", str(tmp_path), "."):
            assert isinstance(open_files(where), FolderFiles)
        assert not hub.requests

    def test_a_revision_means_the_repo(self, hub, tmp_path, monkeypatch):
        (tmp_path / "demo" / "vit").mkdir(parents=True)
        (tmp_path / "demo" / "vit.safetensors").write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        files = open_files("demo/vit", "main", hub.token, patience=QUICK)
        assert isinstance(files, HubFiles)
        hub.requests.clear()
        # None of these can be a repo: paths by their first character or type, a name alone, a file.
        paths = ("./demo/vit", f"{tmp_path}/demo", tmp_path / "demo", Path("demo/vit"), "demo", ".")
        for where in (*paths, "demo/vit.safetensors"):
            with pytest.raises(HubError, match="has no revision 'main'"):
                open_files(where, "main")
        assert not hub.requests

    @pytest.mark.parametrize("where", ["./demo/vit", "../demo", "/nowhere", "~/none/none"])
    def test_a_path_is_never_a_repo(self, hub, where):
        with pytest.raises(CheckpointError, match="nothing there"):
            open_files(where)
        assert not hub.requests

    @pytest.mark.parametrize(
        "where", ["", "name", "a/b/c", "https://huggingface.co/a/b", "a\0b/c", "ä/b", "a/b\n"]
    )
    def test_neither(self, hub, where):
        with pytest.raises(HubError, match="neither a repo nor a folder"):
            open_files(where)
        assert not hub.requests


class TestFirstCommit:
    def accept(self, content: bytes) -> bool:
        return content == b"good"

    @pytest.mark.parametrize(
        ("history", "expected"),
        [
            (["good"], 0),
            (["", "good"], 1),
            (["bad", "good"], 1),
            (["", "bad", "", "good", "good2", "good", ""], None),
            (["", "", "good", "", "", "", "", ""], 2),
            (["bad", "good", "bad"], None),
            (["", ""], None),
        ],
    )
    def test_histories(self, hub, history, expected):
        # An empty entry commits something else.
        shas = []
        for step, content in enumerate(history):
            files = {"watermark.json": content.rstrip("2").encode()} if content else {}
            shas.append(push("demo/vit", files | {"step": str(step).encode()}))
        found = first_commit(HubFiles("demo/vit", patience=QUICK), "watermark.json", self.accept)
        if history[3:5] == ["good", "good2"]:
            assert found == shas[3]
        else:
            assert found == (None if expected is None else shas[expected])

    def test_in_few_requests(self, hub):
        for step in range(40):
            push("demo/vit", {"watermark.json" if step >= 11 else "other": b"good",
                              "step": str(step).encode()})  # fmt: skip
        files = HubFiles("demo/vit", patience=QUICK)
        hub.requests.clear()
        found = first_commit(files, "watermark.json", self.accept)
        assert len(hub.requests) <= 8
        assert files.read_at("watermark.json", found, 10) == b"good"
        parent = files.commits()[files.commits().index(found) + 1]
        assert files.read_at("watermark.json", parent, 10) is None

    def test_starts_from_the_pinned_commit(self, hub):
        files = HubFiles("demo/vit", patience=QUICK)
        push("demo/vit", {"watermark.json": b"good"})
        assert first_commit(files, "watermark.json", self.accept) is None

    def test_a_version_that_is_too_long_does_not_count(self, hub):
        push("demo/vit", {"watermark.json": b"x" * 100})
        sha = push("demo/vit", {"watermark.json": b"good"})
        files = HubFiles("demo/vit", patience=QUICK)
        assert first_commit(files, "watermark.json", lambda raw: True, limit=10) == sha
        assert first_commit(files, "watermark.json", lambda raw: True, limit=3) is None

    def test_pages(self, hub):
        hub._site.page_size = 3
        shas = [push("demo/vit", {"step": str(step).encode()}) for step in range(8)]
        files = HubFiles("demo/vit", patience=QUICK)
        assert files.commits()[:8] == shas[::-1]

    def test_a_failure_is_not_an_absence(self, hub):
        push("demo/vit", {"watermark.json": b"good"})
        files = HubFiles("demo/vit", patience=QUICK)
        hub.faults.add(path="watermark.json", skip=1, status=503, times=None)
        with pytest.raises(NetworkGaveUpError):
            first_commit(files, "watermark.json", self.accept)


class TestCommit:
    def test_it_is_read_back(self, hub):
        head = HubFiles("demo/vit", patience=QUICK).revision
        done = commit_files(
            "demo/vit", {"watermark.json": b"{}", "README.md": CARD}, "Add", parent_commit=head
        )
        files = HubFiles("demo/vit", patience=QUICK)
        assert files.revision == done.oid
        assert files.commits()[1] == head
        assert files.read("watermark.json", 10) == b"{}"
        assert done.oid in done.url
        assert done.pull_request_url is None

    def test_a_pull_request(self, hub):
        head = HubFiles("demo/vit", patience=QUICK).revision
        done = commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=head, create_pr=True)
        assert done.pull_request_url.endswith("/demo/vit/discussions/1")
        assert HubFiles("demo/vit", patience=QUICK).revision == head
        assert HubFiles("demo/vit", "refs/pr/1", patience=QUICK).revision == done.oid

    def test_a_branch(self, hub):
        HfApi().create_branch("demo/vit", branch="b1")
        done = commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None, revision="b1")
        assert HubFiles("demo/vit", "b1", patience=QUICK).revision == done.oid

    def test_a_head_that_moved(self, hub):
        head = HubFiles("demo/vit", patience=QUICK).revision
        moved = push("demo/vit", {"README.md": CARD})
        with pytest.raises(CardConflictError, match="changed between reading and writing"):
            commit_files("demo/vit", {"README.md": CARD + b"ours"}, "Add", parent_commit=head)
        assert HubFiles("demo/vit", patience=QUICK).revision == moved

    def test_no_rights(self, hub):
        reader = hub.add_user("reader", role="read")
        for token in (reader, hub.add_user("other")):
            with pytest.raises(AccessDeniedError, match="no rights"):
                commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None, token=token)

    def test_refusals(self, hub):
        with pytest.raises(RepoMissingError):
            commit_files("demo/none", {"a": b"1"}, "Add", parent_commit=None)
        with pytest.raises(RevisionMissingError):
            commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None, revision="none")
        with pytest.raises(HubError, match="neither a repo"):
            commit_files("a/b/c", {"a": b"1"}, "Add", parent_commit=None)
        with pytest.raises(AccessDeniedError, match="characters"):
            commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None, token="a\nb")

    def test_a_card_that_the_hub_refuses(self, hub):
        card = b"---\ntags: 1: 2: [\n---\n"
        with pytest.raises(HubError, match="is refused"):
            commit_files("demo/vit", {"README.md": card}, "Add", parent_commit=None)

    def test_failures(self, hub):
        hub.faults.add(method="POST", path="/commit/", status=503, times=None)
        with pytest.raises(NetworkGaveUpError, match="HTTP 503"):
            commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None)
        hub.faults.clear()
        hub.faults.add(method="POST", path="/commit/", cut_body=0, times=None)
        with pytest.raises(NetworkGaveUpError, match="look what arrived"):
            commit_files("demo/vit", {"a": b"1"}, "Add", parent_commit=None)


READ_PATH = """
import sys
from hf_watermark import hub
assert not any(name.startswith(("huggingface_hub", "httpx2", "torch")) for name in sys.modules)
from hf_watermark.checkpoint import Checkpoint
checkpoint = Checkpoint.open(hub.open_files("demo/vit"))
assert checkpoint.read_rows("w", 0, 2).shape == (2, 60)
assert hub.first_commit(checkpoint.files, "config.json", lambda raw: True) is not None
heavy = {"huggingface_hub.hf_api", "huggingface_hub.file_download", "torch", "transformers",
         "safetensors", "requests"} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_imports_no_more_than_it_needs(hub):
    child = subprocess.run(
        [sys.executable, "-c", READ_PATH],
        env=os.environ | hub.environment() | {"HF_HUB_DISABLE_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert all("demo/vit" in seen.path for seen in hub.requests)  # nothing phones anywhere else
