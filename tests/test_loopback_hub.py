"""The loopback Hub, seen through the real clients."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_watermark.testing import LoopbackHub

REPO = "demo/vit"
WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def api(loopback_hub):
    return HfApi()


@pytest.fixture
def repo(api):
    api.create_repo(REPO)
    api.create_commit(
        REPO,
        [
            CommitOperationAdd("model.safetensors", WEIGHTS),
            CommitOperationAdd("config.json", b'{"model_type": "vit"}'),
            CommitOperationAdd("sub/deep/notes.txt", b"notes"),
        ],
        commit_message="weights",
    )
    return REPO


def fetch(url, token=None, **headers):
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return get_session().get(url, headers=headers)


class TestReading:
    def test_whoami(self, api, loopback_hub):
        token = loopback_hub.add_user("alice", orgs=["acme"])
        assert api.whoami()["name"] == "demo"
        whoami = api.whoami(token=token)
        assert (whoami["name"], whoami["orgs"][0]["name"]) == ("alice", "acme")

    def test_files_come_back_as_pushed(self, repo):
        assert Path(hf_hub_download(repo, "model.safetensors")).read_bytes() == WEIGHTS
        folder = Path(snapshot_download(repo))
        assert (folder / "sub" / "deep" / "notes.txt").read_text() == "notes"
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS

    def test_info(self, api, repo):
        info = api.model_info(repo, files_metadata=True)
        weights = next(one for one in info.siblings if one.rfilename == "model.safetensors")
        assert weights.size == weights.lfs.size == len(WEIGHTS)
        assert info.sha == api.list_repo_commits(repo)[0].commit_id
        assert api.model_info(repo, revision=info.sha[:8]).sha == info.sha
        assert api.model_info(repo, expand=["sha"]).siblings is None

    def test_tree_and_paths(self, api, repo):
        flat = {item.path for item in api.list_repo_tree(repo)}
        assert flat == {".gitattributes", "config.json", "model.safetensors", "sub"}
        deep = {item.path: item for item in api.list_repo_tree(repo, "sub", recursive=True)}
        assert set(deep) == {"sub/deep", "sub/deep/notes.txt"}
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo)
        titles = {
            item.path: item.last_commit.title for item in api.list_repo_tree(repo, expand=True)
        }
        assert titles[".gitattributes"] == "initial commit"
        assert titles["sub"] == titles["model.safetensors"] == "weights"
        assert titles["config.json"].startswith("Upload config.json")
        infos = api.get_paths_info(repo, ["sub", "config.json", "missing"])
        assert [info.path for info in infos] == ["sub", "config.json"]

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_ranges(self, loopback_hub, repo, name):
        url, token = hf_hub_url(repo, name), loopback_hub.token
        whole = fetch(url, token)
        size = len(whole.content)
        assert whole.headers["Accept-Ranges"] == "bytes"
        part = fetch(url, token, Range="bytes=3-9")
        assert (part.status_code, part.content) == (206, whole.content[3:10])
        assert part.headers["Content-Range"] == f"bytes 3-9/{size}"
        assert fetch(url, token, Range="bytes=-4").content == whole.content[-4:]
        assert fetch(url, token, Range=f"bytes=5-{10 * size}").content == whole.content[5:]
        beyond = fetch(url, token, Range=f"bytes={size}-")
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert sum(served.sent for served in loopback_hub.requests if served.range) < size + 200

    def test_no_token_is_sent_to_the_second_origin(self, loopback_hub, repo):
        hf_hub_download(repo, "model.safetensors")
        fetch(hf_hub_url(repo, "model.safetensors"), loopback_hub.token)
        seen = [served for served in loopback_hub.requests if served.origin == "cdn"]
        assert {served.method for served in seen} == {"PUT", "GET"}
        assert all(served.authorization is None for served in seen)
        assert all(loopback_hub.token not in served.path for served in seen)
        assert loopback_hub.token not in repr(loopback_hub.requests)

    def test_second_origin_wants_a_signature(self, loopback_hub, repo):
        url = hf_hub_url(repo, "model.safetensors")
        redirect = get_session().get(url, follow_redirects=False)
        location = redirect.headers["Location"]
        assert location.startswith(loopback_hub.cdn_endpoint)
        assert redirect.headers["X-Linked-Size"] == str(len(WEIGHTS))
        assert get_session().get(location).content == WEIGHTS
        assert get_session().get(location.replace("model", "other")).status_code == 403

    def test_listing_filters_and_pages(self, tmp_path):
        with LoopbackHub(tmp_path, page_size=2) as hub, hub.in_process():
            api = HfApi()
            for i in range(5):
                hub.create_repo(f"demo/m{i}")
                card = f"---\ntags: [watermark, n{i}]\nbase_model: x/base\n---\n"
                api.upload_file(
                    path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=f"demo/m{i}"
                )
            hub.create_repo("demo/hidden", private=True)
            hub.create_repo("other/m")
            assert len(list(api.list_models())) == 7
            assert len(list(HfApi(token=False).list_models())) == 6
            assert len(list(api.list_models(author="demo", search="Demo/M"))) == 5
            assert [m.id for m in api.list_models(filter=["watermark", "n3"])] == ["demo/m3"]
            derived = api.list_models(filter="base_model:finetune:x/base", full=True, cardData=True)
            assert next(iter(derived)).card_data["base_model"] == "x/base"
            assert len(list(api.list_models(filter="base_model:x/base", limit=3))) == 3
            with pytest.raises(HfHubHTTPError, match="num_parameters"):
                list(api.list_models(num_parameters="min:6B"))
            for i in range(4):
                api.create_branch("demo/m0", branch=f"b{i}")
            assert len(api.list_repo_files("demo/m0")) == 2
            assert len(api.list_repo_commits("demo/m0")) == 2


class TestRefusals:
    def test_missing_things(self, api, repo):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("demo/nothing")
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=False).model_info("demo/nothing")
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision="nowhere")
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(repo, "nothing.txt")
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(repo, "config.json", revision="nowhere")
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(repo, "nothing"))

    def test_private_gated_and_bad_tokens(self, api, loopback_hub):
        alice = loopback_hub.add_user("alice")
        api.create_repo("demo/private", private=True)
        loopback_hub.create_repo("demo/gated", gated=True)
        for token in (alice, False):
            with pytest.raises(RepositoryNotFoundError) as caught:
                api.model_info("demo/private", token=token)
            assert not isinstance(caught.value, GatedRepoError)
            with pytest.raises(GatedRepoError):
                hf_hub_download("demo/gated", ".gitattributes", token=token)
            with pytest.raises(GatedRepoError):
                api.auth_check("demo/gated", token=token)
        assert api.model_info("demo/gated", token=alice).gated == "auto"
        hf_hub_download("demo/gated", ".gitattributes")
        loopback_hub.grant_access("demo/gated", "alice")
        hf_hub_download("demo/gated", ".gitattributes", token=alice)
        with pytest.raises(HfHubHTTPError) as caught:
            api.model_info("demo/gated", token="hf_wrong")
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)

    def test_writing_needs_rights(self, api, repo, loopback_hub):
        reader = loopback_hub.add_user("demo", role="read")
        alice = loopback_hub.add_user("alice", orgs=["acme"])
        for token in (reader, alice):
            with pytest.raises(HfHubHTTPError) as caught:
                api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, token=token)
            assert caught.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("someone/else")
        assert caught.value.response.status_code == 403
        assert api.create_repo("acme/vit", token=alice).repo_id == "acme/vit"

    @pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", ".git/config", "a//b", ""])
    def test_hostile_paths(self, loopback_hub, repo, path):
        line = '{"key": "header", "value": {"summary": "s"}}\n'
        line += f'{{"key": "file", "value": {{"path": "{path}", "content": "x"}}}}\n'
        url = f"{loopback_hub.endpoint}/api/models/{repo}/commit/main"
        headers = {"Authorization": f"Bearer {loopback_hub.token}"}
        assert get_session().post(url, content=line, headers=headers).status_code == 400

    @pytest.mark.parametrize("name", ["..", "a..b", "a/b", ".hidden", "x.git", ""])
    def test_hostile_names(self, loopback_hub, name):
        url = f"{loopback_hub.endpoint}/api/repos/create"
        headers = {"Authorization": f"Bearer {loopback_hub.token}"}
        for body in ({"name": name}, {"name": "a", "organization": name or "."}):
            answer = get_session().post(url, json=body, headers=headers)
            assert answer.status_code in (400, 403)
        with pytest.raises(ValueError, match="Invalid repo"):
            loopback_hub.create_repo(f"demo/{name}")

    def test_what_it_does_not_have_is_a_404(self, loopback_hub, repo):
        for path in ("/", f"/{repo}", f"/api/models/{repo}/xet-write-token/main", "/api/jobs/demo"):
            assert fetch(loopback_hub.endpoint + path).status_code == 404
        assert fetch(loopback_hub.cdn_endpoint + "/api/whoami-v2").status_code == 404


class TestWriting:
    def test_repos(self, api):
        api.create_repo(REPO)
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo(REPO)
        assert caught.value.response.status_code == 409
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
        assert api.create_repo(REPO, repo_type="dataset").repo_type == "dataset"
        assert api.create_repo(REPO, repo_type="space", space_sdk="static").repo_type == "space"
        api.update_repo_settings(REPO, private=True, gated="manual")
        info = api.model_info(REPO)
        assert (info.private, info.gated) == (True, "manual")
        api.delete_repo(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.delete_repo(REPO)
        assert api.dataset_info(REPO).id == REPO

    def test_commit_operations(self, api, repo):
        api.create_commit(
            repo,
            [
                CommitOperationCopy("model.safetensors", "copy.safetensors"),
                CommitOperationCopy("config.json", "copy.json"),
                CommitOperationDelete("config.json"),
                CommitOperationDelete("sub/", is_folder=True),
            ],
            commit_message="moves",
        )
        expected = [".gitattributes", "copy.json", "copy.safetensors", "model.safetensors"]
        assert sorted(api.list_repo_files(repo)) == expected
        with pytest.raises(EntryNotFoundError):
            api.delete_file("config.json", repo)

    def test_parent_commit(self, api, repo):
        head = api.model_info(repo).sha
        add = [CommitOperationAdd("a.txt", b"a")]
        first = api.create_commit(repo, add, commit_message="a", parent_commit=head)
        add = [CommitOperationAdd("b.txt", b"b")]
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_commit(repo, add, commit_message="b", parent_commit=head)
        assert caught.value.response.status_code == 412
        api.create_commit(repo, add, commit_message="b", parent_commit=first.oid[:7])

    def test_large_files_are_uploaded_once(self, api, repo, loopback_hub):
        def uploads():
            return [one for one in loopback_hub.requests if one.method == "PUT"]

        assert [one.received for one in uploads()] == [len(WEIGHTS)]
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="again.bin", repo_id=repo)
        assert len(uploads()) == 1
        names = [path.name for path in loopback_hub.folder_of(repo).glob("blobs/*")]
        assert len(names) == len(set(names)) == 4

    def test_corrupt_uploads_are_refused(self, api, repo, loopback_hub):
        batch = f"{loopback_hub.endpoint}/{repo}.git/info/lfs/objects/batch"
        body = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 3}]}
        headers = {"Authorization": f"Bearer {loopback_hub.token}"}
        (answer,) = get_session().post(batch, json=body, headers=headers).json()["objects"]
        assert get_session().put(answer["actions"]["upload"]["href"], content=b"abc").is_error
        verify = answer["actions"]["verify"]["href"]
        assert get_session().post(verify, json=body["objects"][0], headers=headers).is_error
        assert list((loopback_hub.folder / "uploads").iterdir()) == []

    def test_refs(self, api, repo):
        sha = api.model_info(repo).sha
        api.create_branch(repo, branch="feature/x")
        api.create_tag(repo, tag="v1", tag_message="first")
        for again in (
            lambda: api.create_branch(repo, branch="feature/x"),
            lambda: api.create_tag(repo, tag="v1"),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                again()
            assert caught.value.response.status_code == 409
        api.create_branch(repo, branch="feature/x", exist_ok=True)
        add = {"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_id": repo}
        api.upload_file(**add, revision="feature/x")
        assert "x.txt" in api.list_repo_files(repo, revision="feature/x")
        assert Path(hf_hub_download(repo, "x.txt", revision="feature/x")).read_text() == "x"
        assert "x.txt" not in api.list_repo_files(repo)
        assert api.model_info(repo, revision="v1").sha == sha
        refs = api.list_repo_refs(repo)
        assert {ref.name for ref in refs.branches} == {"main", "feature/x"}
        assert refs.tags[0].target_commit == sha
        api.delete_branch(repo, branch="feature/x")
        api.delete_tag(repo, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision="v1")

    def test_pull_request_from_a_commit(self, api, repo, loopback_hub):
        alice = loopback_hub.add_user("alice")
        add = [CommitOperationAdd("README.md", b"# Hi\n")]
        commit = api.create_commit(repo, add, commit_message="card", create_pr=True, token=alice)
        assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
        assert (
            Path(hf_hub_download(repo, "README.md", revision="refs/pr/1")).read_text() == "# Hi\n"
        )
        assert "README.md" not in api.list_repo_files(repo)
        details = api.get_discussion_details(repo, 1)
        assert (details.status, details.author, details.conflicting_files) == ("open", "alice", [])
        assert "+# Hi" in details.diff
        with pytest.raises(HfHubHTTPError):
            api.merge_pull_request(repo, 1, token=alice)
        api.upload_file(
            path_or_fileobj=b"more",
            path_in_repo="more.txt",
            repo_id=repo,
            revision="refs/pr/1",
            token=alice,
        )
        api.merge_pull_request(repo, 1, comment="thanks")
        assert {"README.md", "more.txt"} <= set(api.list_repo_files(repo))
        details = api.get_discussion_details(repo, 1)
        assert details.status == "merged"
        assert details.merge_commit_oid == api.model_info(repo).sha
        kinds = [event.type for event in details.events]
        assert kinds == ["comment", "commit", "commit", "comment", "status-change"]

    def test_pull_request_with_conflicts(self, api, repo):
        add = [CommitOperationAdd("config.json", b"{}")]
        api.create_commit(repo, add, commit_message="theirs", create_pr=True)
        api.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=repo)
        assert api.get_discussion_details(repo, 1).conflicting_files == ["config.json"]
        with pytest.raises(HfHubHTTPError, match="conflicts"):
            api.merge_pull_request(repo, 1)

    def test_discussions(self, api, repo):
        pull = api.create_pull_request(repo, title="A draft")
        talk = api.create_discussion(repo, title="A question", description="Is it yours?")
        assert (pull.status, talk.status) == ("draft", "open")
        assert api.comment_discussion(repo, 2, "Yes").content == "Yes"
        assert api.rename_discussion(repo, 2, "An answer").new_title == "An answer"
        assert api.change_discussion_status(repo, 2, "closed").new_status == "closed"
        assert [one.num for one in api.get_repo_discussions(repo)] == [2, 1]
        drafts = api.get_repo_discussions(repo, discussion_type="pull_request")
        assert [one.title for one in drafts] == ["A draft"]
        with pytest.raises(HfHubHTTPError, match="draft"):
            api.merge_pull_request(repo, 1)
        api.change_discussion_status(repo, 1, "open")
        add = {"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_id": repo}
        api.upload_file(**add, revision="refs/pr/1")
        api.merge_pull_request(repo, 1)
        assert "x.txt" in api.list_repo_files(repo)

    def test_cards(self, api, repo):
        card = ModelCard(
            "---\nlicense: mit\ntags:\n- watermark\nwatermark:\n  format: x/1\n---\n# A\n"
        )
        card.push_to_hub(repo)
        loaded = ModelCard.load(repo)
        assert loaded.data.watermark == {"format": "x/1"}
        assert str(loaded) == str(card)
        assert {"watermark", "license:mit", "safetensors"} <= set(api.model_info(repo).tags)
        with pytest.raises(ValueError, match="license"):
            ModelCard("---\nlicense: {a: b}\n---\n").push_to_hub(repo)


class TestServer:
    def test_everything_stored_can_be_searched(self, api, repo, loopback_hub):
        api.upload_file(
            path_or_fileobj=b"the s3cret",
            path_in_repo="a.txt",
            repo_id=repo,
            commit_message="mürks",
        )
        api.delete_file("a.txt", repo)
        api.create_discussion(repo, title="Hello", description="in a discussion")
        stored = loopback_hub.bytes_of(repo)
        for needle in (b"the s3cret", WEIGHTS, "mürks".encode(), b"in a discussion"):
            assert needle in stored
        assert loopback_hub.token.encode() not in loopback_hub.bytes_of()
        with pytest.raises(KeyError):
            loopback_hub.bytes_of("demo/nothing")

    def test_restart_serves_what_was_there(self, tmp_path):
        shas = set()
        for run in range(2):
            with LoopbackHub(tmp_path) as hub:
                api = HfApi(endpoint=hub.endpoint, token=hub.token)
                api.create_repo(REPO, exist_ok=True)
                api.create_repo(f"demo/run{run}")
                shas |= {commit.commit_id for commit in api.list_repo_commits(f"demo/run{run}")}
                assert len(list(api.list_models())) == run + 2
        assert len(shas) == 2

    def test_starts_and_stops_fast_with_open_connections(self, tmp_path):
        began = time.perf_counter()
        hub = LoopbackHub(tmp_path).start()
        assert HfApi(endpoint=hub.endpoint, token=hub.token).whoami()["name"] == "demo"
        hub.faults.add(path="whoami", delay=30)
        command = f"import urllib.request as r; r.urlopen('{hub.endpoint}/api/whoami-v2')"
        with subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL) as child:
            while len(hub.requests) < 2:
                time.sleep(0.01)
            stopping = time.perf_counter()
            hub.stop()
            assert time.perf_counter() - stopping < 1
            assert child.wait(10) != 0
        assert time.perf_counter() - began < 10
        with pytest.raises(RuntimeError, match="not running"):
            _ = hub.endpoint
        with hub:
            assert hub.endpoint

    def test_in_process_leaves_no_trace(self, tmp_path):
        before = dict(vars(constants)), dict(os.environ)
        with LoopbackHub(tmp_path) as hub:
            with hub.in_process():
                assert hub.endpoint == constants.ENDPOINT
                assert HfApi().whoami()["name"] == "demo"
            assert (dict(vars(constants)), dict(os.environ)) == before
            assert HfApi().endpoint == before[0]["ENDPOINT"]

    def test_children_need_the_environment_only(self, loopback_server):
        program = (
            "from huggingface_hub import HfApi, create_repo, hf_hub_download, upload_file\n"
            "create_repo('demo/vit')\n"
            "upload_file(path_or_fileobj=b'1' * 9999, path_in_repo='a.bin', repo_id='demo/vit')\n"
            "print(len(open(hf_hub_download('demo/vit', 'a.bin')).read()))\n"
        )
        environment = {**os.environ, **loopback_server.environment()}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout == "9999\n", done.stderr

    def test_it_is_silent(self, tmp_path):
        program = (
            "import sys\n"
            "from hf_watermark.testing import LoopbackHub\n"
            "from urllib.request import urlopen\n"
            "with LoopbackHub(sys.argv[1]) as hub:\n"
            "    hub.faults.add(cut_body=3)\n"
            "    hub.create_repo('demo/vit')\n"
            "    for _ in range(2):\n"
            "        try: urlopen(hub.endpoint + '/api/models/demo/vit').read()\n"
            "        except OSError: pass\n"
            "        except Exception as error: assert 'IncompleteRead' in repr(error), error\n"
            "    assert [r.sent for r in hub.requests][0] == 3\n"
            "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
        assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)
