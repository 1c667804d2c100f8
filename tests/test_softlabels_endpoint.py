"""A suspect behind real HTTP: asked patiently, within bounds, and never twice."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
from answering_server import answering
from PIL import Image
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from test_softlabels_detection import KEY, student, world
from test_softlabels_files import run

from hf_watermark.connection import Patience
from hf_watermark.errors import NetworkGaveUpError, OutputsError, SoftLabelError
from hf_watermark.softlabels.endpoint import Endpoint
from hf_watermark.softlabels.output_files import read_output_file
from hf_watermark.softlabels.probe_images import ProbeImages

N, NAMES = 30, [f"class {i}" for i in range(10)]
PATIENCE = Patience(tries=4, first_wait=0.01, total=5.0, timeout=1.0)


def picture(i):
    """An image whose pixels say its number."""
    return Image.fromarray(np.full((4, 4, 3), (i % 256, i // 256, 7), np.uint8))


def number(content):
    red, green, _ = Image.open(io.BytesIO(content)).getpixel((0, 0))
    return red + 256 * green


def folder_of_images(folder, n=N):
    folder.mkdir()
    for i in range(n):
        picture(i).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return ProbeImages(folder_of_images(tmp_path / "images"))


@pytest.fixture
def server():
    def classify(content):
        return [{"label": NAMES[number(content) % 10], "score": 0.9}]

    with answering(classify) as handler:
        yield handler


def expected(n=N):
    return [[{"label": NAMES[i % 10], "score": 0.9}] for i in range(n)]


def busy(status=503, retry_after=None):
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return JSONResponse({"error": "loading"}, status, headers)


# Asking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bytes", "json"])
def test_every_image_is_answered(server, images, form):
    told = []
    ask = Endpoint(
        server.url, form=form, token="secret", top_k=10, progress=lambda *pair: told.append(pair)
    )
    assert ask(images) == expected()
    assert told == [(i + 1, N) for i in range(N)]
    first = server.requests[0]
    assert first["headers"]["authorization"] == "Bearer secret"
    assert first["headers"]["accept-encoding"] == "identity"
    if form == "json":
        assert first["json"]["parameters"] == {"top_k": 10}
    else:
        assert first["headers"]["content-type"] == "image/png"


def test_no_token_of_the_environment_is_sent(server, images, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Endpoint(server.url)(images)
    assert all("authorization" not in one["headers"] for one in server.requests)


def test_patience(server, images):
    server.faults = {
        3: busy(),
        4: busy(429, retry_after="0"),
        9: Response("gone", 500),
        12: JSONResponse({"error": "Model is loading", "estimated_time": 1.0}),
        15: busy(503, retry_after="1"),
    }
    started = time.monotonic()
    assert Endpoint(server.url, patience=PATIENCE)(images) == expected()
    assert time.monotonic() - started > 1.0
    assert len(server.requests) == N + 5


def test_failing_midway_and_going_on(server, images, tmp_path):
    log = tmp_path / "answers.jsonl"
    server.faults = lambda place: busy() if place >= 12 else None
    with pytest.raises(NetworkGaveUpError) as caught:
        Endpoint(server.url, log=log, patience=PATIENCE)(images)
    said = str(caught.value)
    assert "image 12 of 30" in said
    assert f"12 answers so far, kept in {log}" in said
    assert "HTTP 503" in said
    assert len(server.requests) == 16
    with log.open("a") as file:  # and a crash in the middle of a line
        file.write('{"image": "abc", "ans')
    server.faults, server.requests = {}, []
    assert Endpoint(server.url, log=log)(images) == expected()
    assert len(server.requests) == N - 12
    server.requests = []
    assert Endpoint(server.url, log=log)(images) == expected()
    assert server.requests == []
    head, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert head == {"format": "hf-watermark-answers/1", "endpoint": server.url}
    assert len(lines) == N
    with pytest.raises(OutputsError, match="by image"):
        read_output_file(log)


def test_a_server_that_died(server, images, tmp_path):
    dead = server.url.replace("/classify", "").rpartition(":")[0] + ":9"
    with pytest.raises(NetworkGaveUpError, match=r"after 4 tries.*--answers"):
        Endpoint(dead, patience=PATIENCE)(images)


def test_waiting_is_bounded(server, images):
    server.faults = {0: busy(429, retry_after="3600")}
    started = time.monotonic()
    with pytest.raises(NetworkGaveUpError, match="wait 3600 seconds"):
        Endpoint(server.url, patience=PATIENCE)(images)
    assert time.monotonic() - started < 2.0


def test_a_slow_server(server, images):
    async def trickle():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.1)

    server.faults = lambda place: StreamingResponse(trickle())
    patience = Patience(tries=2, first_wait=0.01, total=5.0, timeout=0.4)
    with pytest.raises(NetworkGaveUpError, match="takes longer"):
        Endpoint(server.url, patience=patience)(images)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(b"x" * 5000), "too much"),
        (Response(b"{}", headers={"content-encoding": "gzip"}), "too much.*gzip"),
        (Response(b"<html>"), "no JSON.*<html>"),
        (Response("no", 401), "refuses image 0.*HTTP 401 'no'"),
        (RedirectResponse("http://127.0.0.1:9/"), "HTTP 307"),
    ],
)
def test_answers_that_are_refused(server, images, response, message):
    server.faults = {0: response}
    with pytest.raises(OutputsError, match=message):
        Endpoint(server.url, limit=4096, patience=PATIENCE)(images)
    assert len(server.requests) == 1


def test_bad_input(server, images, tmp_path):
    for url in ("ftp://host/x", "https://", "model"):
        with pytest.raises(OutputsError, match="no URL"):
            Endpoint(url)
    with pytest.raises(OutputsError, match="form"):
        Endpoint(server.url, form="xml")
    log = tmp_path / "a.jsonl"
    Endpoint(server.url, log=log)(images)
    with pytest.raises(OutputsError, match="another endpoint"):
        Endpoint(server.url + "/other", log=log)
    for content in ('{"format": "x", "endpoint": "y"}\n', "[]\n", "\xff\n", "precious"):
        log.write_text(content, encoding="latin-1")
        with pytest.raises(OutputsError, match="no file of answers"):
            Endpoint(server.url, log=log)
        assert log.read_text(encoding="latin-1") == content
    log.write_text('{"format": "hf-wat')
    assert Endpoint(server.url, log=log)(images) == expected()


def test_secrets_of_the_url_are_not_kept(server, images, tmp_path):
    url = server.url.replace("http://", "http://me:password@") + "?token=hidden"
    log = tmp_path / "a.jsonl"
    ask = Endpoint(url, log=log)
    ask(images)
    assert ask.name == server.url
    assert "password" not in log.read_text()
    assert "hidden" not in log.read_text()


# Images -------------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    folder = folder_of_images(tmp_path / "images", 5)
    saved = datasets.Dataset.from_dict(
        {"image": [str(folder / f"{i:05d}.png") for i in range(5)], "label": list(range(5))}
    ).cast_column("image", datasets.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    content = [(folder / f"{i:05d}.png").read_bytes() for i in range(5)]
    plain = datasets.Dataset.from_dict({"image": content})
    for source in (folder, str(folder), saved, tmp_path / "saved", tmp_path / "a.parquet", plain):
        images = ProbeImages(source)
        assert len(images) == 5
        assert [number(images.encoded(i)) for i in range(5)] == list(range(5))
        assert images.picture(3).getpixel((0, 0)) == (3, 0, 7)
        assert [len(batch) for batch in images.batches(2)] == [2, 2, 1]
    other = saved.rename_column("image", "other").select_columns(["other"])
    two = datasets.concatenate_datasets([saved, other], axis=1)
    with pytest.raises(SoftLabelError, match=r"which column.*image, label, other"):
        ProbeImages(two)
    assert len(ProbeImages(two, "other")) == 5


def test_what_holds_no_images(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path / "a.txt"):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(SoftLabelError, match="cannot be read"):
            ProbeImages(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SoftLabelError, match="no images"):
        ProbeImages(tmp_path / "empty")
    with pytest.raises(SoftLabelError, match="no dataset"):
        ProbeImages([1, 2])
    with pytest.raises(SoftLabelError, match="which column"):
        ProbeImages(datasets.Dataset.from_dict({"x": [1]}))
    with pytest.raises(SoftLabelError, match="holds no images"):
        ProbeImages(datasets.Dataset.from_dict({"x": [1]}), "x")
    broken = ProbeImages(datasets.Dataset.from_dict({"image": [b"no image"]}))
    with pytest.raises(SoftLabelError, match="Image 0 cannot be decoded"):
        broken.picture(0)


# The command --------------------------------------------------------------------------------------


def test_a_leak_behind_http_is_named(tmp_path):
    n = 400
    probes, rng = world(n)
    KEY.save(tmp_path / "acme.key")
    replace(probes, labels=tuple(NAMES)).save(tmp_path / "acme.probes")
    images = folder_of_images(tmp_path / "images", n)
    p = student(probes, rng, recipient="b")

    def classify(content):
        row = p[number(content)]
        return [{"label": NAMES[i], "score": round(row[i], 4)} for i in np.argsort(-row)]

    with answering(classify) as server:
        command = (
            "verify-outputs", server.url, "--key", tmp_path / "acme.key", "--probes",
            tmp_path / "acme.probes", "--recipient", "a", "--recipient", "b", "--json",
            "--answers", tmp_path / "thief.jsonl",
        )  # fmt: skip
        done = run(*command)
        assert done.returncode == 2
        assert "--images" in done.stderr
        server.faults = lambda place: Response("no", 403) if place >= 150 else None
        done = run(*command, "--images", images)
        assert done.returncode == 2
        assert "refuses image 150" in done.stderr
        assert done.stderr.count("\n") == 1
        server.faults, server.requests = {}, []
        done = run(*command, "--images", images, "--form", "json")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(server.requests) == 250
    fields = json.loads(done.stdout)
    assert (fields["verdict"], fields["recipient"]) == ("found", "b")
    assert fields["outputs"] == "probabilities, rounded to 4 decimals"
