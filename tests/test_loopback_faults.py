"""Faults on demand, and how the real clients take them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

REPO = "demo/vit"
MIB = 1 << 20
WEIGHTS = bytes(range(256)) * (12 * MIB // 256)


@pytest.fixture
def api(loopback_hub):
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    loopback_hub.requests.clear()
    return api


def statuses(hub, method="GET"):
    return [(one.origin, one.status) for one in hub.requests if one.method == method]


def test_status_times_and_skip(loopback_hub, api):
    fault = loopback_hub.faults.add(path="/api/models/", status=503, times=2, skip=1)
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(api.model_info(REPO).id)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == [REPO, 503, 503, REPO]
    assert fault.hits == 2


def test_forever_until_cleared(loopback_hub, api):
    loopback_hub.faults.add(method="get", path="/api/models/", status=429, times=None)
    for _ in range(3):
        with pytest.raises(HfHubHTTPError, match="429"):
            api.model_info(REPO)
    loopback_hub.faults.clear()
    assert api.model_info(REPO).id == REPO


def test_cut_download_is_resumed(loopback_hub, api):
    fault = loopback_hub.faults.add(method="GET", path=r"/resolve/.*safetensors", cut_body=11 * MIB)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    first, second = (one for one in loopback_hub.requests if one.origin == "cdn")
    assert (first.fault, first.sent) == (fault, 11 * MIB)
    # The client keeps whole chunks of 10 MiB only.
    assert (second.range, second.status) == (f"bytes={10 * MIB}-", 206)
    assert second.sent == 2 * MIB


def test_body_faults_are_not_wasted_on_redirects(loopback_hub, api):
    loopback_hub.faults.add(path=r"/resolve/.*safetensors", ignore_range=True)
    url = hf_hub_url(REPO, "model.safetensors")
    whole = get_session().get(url, headers={"Range": "bytes=0-9"})
    assert (whole.status_code, len(whole.content)) == (200, len(WEIGHTS))
    assert "Content-Range" not in whole.headers
    assert get_session().get(url, headers={"Range": "bytes=0-9"}).content == WEIGHTS[:10]
    assert statuses(loopback_hub) == [("hub", 302), ("cdn", 200), ("hub", 302), ("cdn", 206)]


def test_body_faults_are_not_wasted_on_heads(loopback_hub, api):
    fault = loopback_hub.faults.add(path="resolve", cut_body=3)
    url = hf_hub_url(REPO, ".gitattributes")
    assert get_session().head(url).status_code == 200
    assert fault.hits == 0
    with pytest.raises(Exception, match="peer closed"):
        get_session().get(url)
    assert loopback_hub.requests[-1].sent == 3


def test_abandoned_uploads_leave_nothing(loopback_hub, api):
    def endless():
        yield b"0" * MIB
        raise KeyboardInterrupt

    batch = f"{loopback_hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    body = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 9 * MIB}]}
    headers = {"Authorization": f"Bearer {loopback_hub.token}"}
    (answer,) = get_session().post(batch, json=body, headers=headers).json()["objects"]
    with pytest.raises(KeyboardInterrupt):
        get_session().put(answer["actions"]["upload"]["href"], content=endless())
    while loopback_hub.requests[-1].status == 0:
        time.sleep(0.01)
    assert list((loopback_hub.folder / "uploads").iterdir()) == []


def test_headers_are_replaced_and_removed(loopback_hub, api):
    loopback_hub.faults.add(
        origin="cdn", header={"Content-Range": "bytes 5-14/99", "ETag": None, "X-More": "1"}
    )
    url = hf_hub_url(REPO, "model.safetensors")
    answer = get_session().get(url, headers={"Range": "bytes=0-9"})
    assert answer.headers["Content-Range"] == "bytes 5-14/99"
    assert "ETag" not in answer.headers
    assert answer.headers["X-More"] == "1"


def test_failed_upload_is_tried_again(loopback_hub, api):
    loopback_hub.faults.add(method="PUT", origin="cdn", status=500)
    data = WEIGHTS[::-1]
    api.upload_file(path_or_fileobj=data, path_in_repo="b.bin", repo_id=REPO)
    assert statuses(loopback_hub, "PUT") == [("cdn", 500), ("cdn", 200)]
    assert data in loopback_hub.bytes_of(REPO)


def test_delay_meets_the_clients_timeout(loopback_hub, api):
    loopback_hub.faults.add(path="/api/models/", delay=5)
    with pytest.raises(Exception, match="timed out"):
        api.model_info(REPO, timeout=0.1)
    assert api.model_info(REPO, timeout=1).id == REPO


def test_bytes_of_an_abandoned_download_are_counted_as_sent(loopback_hub, api):
    url = hf_hub_url(REPO, "model.safetensors")
    with get_session().stream("GET", url) as response:
        next(response.iter_bytes(1000))
    (served,) = (one for one in loopback_hub.requests if one.origin == "cdn")
    assert 1000 <= served.sent <= len(WEIGHTS)


def test_senseless_faults_are_refused(loopback_hub):
    with pytest.raises(ValueError, match="origin"):
        loopback_hub.faults.add(origin="elsewhere")
