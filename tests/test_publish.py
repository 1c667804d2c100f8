"""Evidence written into cards, over HTTP, by the command and in process; all that can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from huggingface_hub import HfApi
from marked_models import (
    KEY,
    THIEF,
    WEIGHTS,
    claim_about,
    command,
    fc1,
    push,
    refused,
    run,
    save_model,
    vit,
)

from hf_watermark.card import BEGIN, END, without_watermark
from hf_watermark.errors import AccessDeniedError, CardConflictError, NetworkGaveUpError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.hub import HubFiles
from hf_watermark.publish import CARD_FILE, read_card_text, write_card, write_file
from hf_watermark.verify import verify

# Everything that a round trip through a YAML library would lose.
CARD = (
    "---\r\n"
    "license: mit  # ours\r\n"
    "version: 1.10\r\n"
    "nothing:\r\n"
    "tags: [vision, vit]\r\n"
    "---\r\n"
    "# My model\r\n\r\n"
    "Text of mine, with trailing blanks   \r\n"
)


@pytest.fixture
def hub(loopback_hub, tmp_path):
    loopback_hub.create_repo("demo/vit")
    own = save_model(tmp_path / "own", vit(), claim_about(vit()))
    (own / CARD_FILE).write_bytes(CARD.encode())
    push("demo/vit", own)
    KEY.save(tmp_path / "acme.key")
    THIEF.save(tmp_path / "thief.key")
    return loopback_hub


def card_of(repo="demo/vit", revision=None) -> str:
    text = read_card_text(HubFiles(repo, revision))
    assert text is not None
    return text


def head(repo="demo/vit") -> str:
    return HfApi().model_info(repo).sha


def history(repo="demo/vit") -> list[str]:
    return HubFiles(repo).commits()


class TestTheCommand:
    def write(self, hub, tmp_path, *options, key="acme", repo="demo/vit", **more):
        return run(repo, "--key", tmp_path / f"{key}.key", *options, "--format", "quiet", hub=hub,
                   **more)  # fmt: skip

    def test_writes_into_the_card_and_nothing_else(self, hub, tmp_path):
        before = head()
        done = self.write(hub, tmp_path, "--write-card")
        assert (done.returncode, done.stdout) == (0, "found\n")
        assert done.stderr.startswith("The card is in http://127.0.0.1:")
        text = card_of()
        assert without_watermark(text) == CARD
        assert text.count(BEGIN) == text.count(END) == 1
        assert before in text
        assert KEY.commitment in text
        assert "\n" not in text.replace("\r\n", "")
        after = {
            s.rfilename: s.blob_id
            for s in HfApi().model_info("demo/vit", files_metadata=True).siblings
        }
        then = {
            s.rfilename: s.blob_id
            for s in HfApi().model_info("demo/vit", revision=before, files_metadata=True).siblings
        }
        assert {n for n in after if after[n] != then.get(n)} == {CARD_FILE}
        assert history()[1] == before

    def test_a_second_run_replaces_the_section_only(self, hub, tmp_path):
        self.write(hub, tmp_path, "--write-card")
        first, read = card_of(), head()
        edited = first.replace("Text of mine", "More text of mine") + "\r\nAn epilogue.\r\n"
        push("demo/vit", {CARD_FILE: edited.encode()})
        read = head()
        assert self.write(hub, tmp_path, "--write-card").returncode == 0
        second = card_of()
        assert second.count(BEGIN) == 1
        assert read in second
        outside = [text[: text.index(BEGIN)].split("watermark:")[0] + text[text.index(END) :]
                   for text in (edited, second)]  # fmt: skip
        assert outside[0] == outside[1]
        assert "An epilogue." in second

    def test_opens_a_pull_request(self, hub, tmp_path):
        before = head()
        for options in (("--create-pr",), ("--write-card", "--create-pr")):
            done = self.write(hub, tmp_path, *options)
            assert done.returncode == 0
            assert "/demo/vit/discussions/" in done.stderr
        assert head() == before
        assert card_of() == CARD
        details = [HfApi().get_discussion_details("demo/vit", number) for number in (1, 2)]
        assert [(d.is_pull_request, d.status) for d in details] == [(True, "open")] * 2
        assert without_watermark(card_of(revision="refs/pr/1")) == CARD
        HfApi().merge_pull_request("demo/vit", 1)
        assert BEGIN in card_of()

    def test_a_stranger_may_open_one(self, hub, tmp_path):
        # An arbiter has the key's file and an account, but no rights to the repo.
        token = hub.add_user("arbiter")
        before = head()
        done = self.write(hub, tmp_path, "--create-pr", token=token)
        assert done.returncode == 0, done.stderr
        assert head() == before
        assert BEGIN in card_of(revision="refs/pr/1")

    def test_writes_to_the_branch_that_was_read(self, hub, tmp_path):
        before = head()
        HfApi().create_branch("demo/vit", branch="b1")
        done = self.write(hub, tmp_path, "--write-card", "--revision", "b1")
        assert done.returncode == 0, done.stderr
        assert head() == before
        assert BEGIN in card_of(revision="b1")
        push("demo/vit", {"notes.md": b"x"}, create_pr=True)
        done = self.write(hub, tmp_path, "--write-card", "--revision", "refs/pr/1")
        assert done.returncode == 0, done.stderr
        assert BEGIN in card_of(revision="refs/pr/1")
        assert head() == before

    def test_what_is_no_branch_cannot_be_written_to(self, hub, tmp_path):
        before = head()
        HfApi().create_tag("demo/vit", tag="v1")
        for option in ("--write-card", "--create-pr"):
            done = self.write(hub, tmp_path, option, "--revision", before)
            refused(done, "expected a branch", before, "Leave the revision out", stdout="found\n")
        done = self.write(hub, tmp_path, "--write-card", "--revision", "v1")
        refused(done, "'demo/vit' at 'v1'", "Not a branch", stdout="found\n", advice=False)
        assert (head(), card_of()) == (before, CARD)

    def test_not_found_writes_nothing(self, hub, tmp_path):
        before = head()
        hub.requests.clear()
        for option in ("--write-card", "--create-pr"):
            done = self.write(hub, tmp_path, option, key="thief")
            assert (done.returncode, done.stdout) == (1, "not found\n")
            assert "Nothing was written" in done.stderr
        assert head() == before
        assert not any("/commit/" in one.path for one in hub.requests)
        assert list(HfApi().get_repo_discussions("demo/vit")) == []

    @pytest.mark.parametrize("who", ["a reader", "a stranger", "nobody"])
    def test_no_rights(self, hub, tmp_path, who):
        token = {
            "a reader": hub.add_user("demo", role="read"),
            "a stranger": hub.add_user("stranger"),
            "nobody": "",
        }[who]
        before = head()
        done = self.write(hub, tmp_path, "--write-card", token=token)
        line = refused(done, "demo/vit", stdout="found\n")
        assert "rights" in line or "private" in line
        assert not token or token not in line
        assert (head(), card_of()) == (before, CARD)

    def test_no_card_yet(self, hub, tmp_path):
        hub.create_repo("demo/bare")
        push("demo/bare", {WEIGHTS: (tmp_path / "own" / WEIGHTS).read_bytes()})
        assert self.write(hub, tmp_path, "--write-card", repo="demo/bare").returncode == 0
        text = card_of("demo/bare")
        assert text.startswith("---\n")
        assert BEGIN in text

    @pytest.mark.parametrize(
        ("card", "words"),
        [
            (b"---\ntags: [\n---\n", ("YAML", "invalid")),
            (b"\xff\xfe# not text", ("UTF-8", "Save it")),
            (f"# x\n{BEGIN}\n".encode(), ("markers", "damaged")),
            (b"---\nwatermark: mine\n---\n", ("`watermark`", "Rename that key")),
        ],
    )
    def test_a_card_that_cannot_be_edited(self, hub, tmp_path, card, words):
        hub.create_repo("demo/odd")
        # Past the Hub's own check of cards, as a push through git would be.
        push("demo/odd", {WEIGHTS: (tmp_path / "own" / WEIGHTS).read_bytes(), "x": b""})
        hub._on_loop(lambda: put(hub, "demo/odd", CARD_FILE, card))
        before = head("demo/odd")
        done = self.write(hub, tmp_path, "--write-card", repo="demo/odd")
        refused(done, *words, stdout="found\n")
        assert head("demo/odd") == before
        assert HubFiles("demo/odd").read(CARD_FILE, 1000) == card

    def test_the_card_changes_meanwhile(self, hub, tmp_path):
        # Somebody saves the card after it was read and before ours is written.
        hub.faults.add(method="POST", path="/preupload/", delay=1.5)
        process = subprocess.Popen(
            command(
                "demo/vit", "--key", tmp_path / "acme.key", "--write-card", "--format", "quiet"
            ),
            env=os.environ | hub.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        before = len(hub.requests)
        while not any("/preupload/" in one.path for one in hub.requests[before:]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        theirs = push("demo/vit", {CARD_FILE: CARD.replace("mine", "ours").encode()})
        stdout, stderr = process.communicate(timeout=30)
        done = subprocess.CompletedProcess((), process.returncode, stdout, stderr)
        refused(done, "changed between reading and writing", "Run it again", stdout="found\n")
        assert (head(), card_of()) == (theirs, CARD.replace("mine", "ours"))
        # It says to run it again: then it works, and their words are kept.
        assert self.write(hub, tmp_path, "--write-card").returncode == 0
        assert without_watermark(card_of()) == CARD.replace("mine", "ours")

    @pytest.mark.parametrize("status", [500, 503])
    def test_a_commit_that_fails(self, hub, tmp_path, status):
        before = head()
        hub.faults.add(method="POST", path="/commit/", status=status, times=None)
        done = self.write(hub, tmp_path, "--write-card")
        refused(done, f"HTTP {status}", stdout="found\n")
        assert (head(), card_of()) == (before, CARD)
        hub.faults.clear()
        assert self.write(hub, tmp_path, "--write-card").returncode == 0

    def test_a_foreign_claim_is_not_put_into_the_card(self, hub, tmp_path):
        push("demo/vit", {CLAIM_FILE: claim_about(vit(), THIEF).to_bytes()})
        assert self.write(hub, tmp_path, "--write-card").returncode == 0
        text = card_of()
        assert THIEF.commitment not in text
        assert THIEF.public_key not in text
        assert KEY.fingerprint in text

    def test_secret_carriers_stay_secret(self, hub, tmp_path):
        names = [fc1(0)]
        claim = claim_about(vit(), names=names, secret_carriers=True)
        push("demo/vit", {CLAIM_FILE: claim.public.to_bytes()})
        (tmp_path / "claim.json").write_bytes(claim.to_bytes())
        done = self.write(hub, tmp_path, "--write-card", "--claim", tmp_path / "claim.json")
        assert done.returncode == 0, done.stderr
        text = card_of()
        assert names[0] not in text
        assert "kept secret" in text
        assert names[0].encode() not in HubFiles("demo/vit").read(CLAIM_FILE, 10**6)


def put(hub, repo_id, path, content):
    """Commit past every check."""
    repo = hub._find(repo_id, "model")
    base = repo.resolve("main")
    files = dict(base.files) | {path: repo.add_blob(content)}
    made = hub._store.add_commit(repo, (base.id,), "put", "", "demo", files)
    repo.branches["main"] = made.id
    repo.save()


class TestFolders:
    def write(self, folder, tmp_path, *options, **more):
        if not (tmp_path / "acme.key").exists():
            KEY.save(tmp_path / "acme.key")
        return run(folder, "--key", tmp_path / "acme.key", *options, "--format", "quiet", **more)

    @pytest.fixture
    def folder(self, tmp_path):
        folder = save_model(tmp_path / "m", vit(), claim_about(vit()))
        (folder / CARD_FILE).write_bytes(CARD.encode())
        return folder

    def test_written(self, folder, tmp_path):
        for _ in range(2):
            done = self.write(folder, tmp_path, "--write-card")
            assert (done.returncode, done.stdout) == (0, "found\n")
            assert done.stderr == f"The card is in {folder / CARD_FILE}\n"
            text = (folder / CARD_FILE).read_bytes().decode()
            assert without_watermark(text) == CARD
            assert text.count(BEGIN) == 1
            assert str(tmp_path) not in text  # a path of this machine is nobody's business
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            (CARD_FILE, CLAIM_FILE, "config.json", WEIGHTS)
        )

    def test_relative_and_home(self, folder, tmp_path):
        assert self.write("m", tmp_path, "--write-card", cwd=tmp_path).returncode == 0
        assert BEGIN in (folder / CARD_FILE).read_text()
        (folder / CARD_FILE).write_text("# plain\n")
        home = {"HOME": str(tmp_path)}
        done = self.write("~/m", tmp_path, "--write-card", environment=home)
        assert done.returncode == 0, done.stderr
        assert BEGIN in (folder / CARD_FILE).read_text()

    def test_no_pull_requests(self, folder, tmp_path):
        done = self.write(folder, tmp_path, "--create-pr")
        refused(done, "no pull requests", "--write-card", stdout="found\n")
        assert (folder / CARD_FILE).read_bytes() == CARD.encode()

    def test_a_single_file_has_no_card(self, folder, tmp_path):
        done = self.write(folder / WEIGHTS, tmp_path, "--write-card")
        refused(done, "single file", "Give the folder", stdout="found\n")
        assert (folder / CARD_FILE).read_bytes() == CARD.encode()

    def test_not_found(self, folder, tmp_path):
        THIEF.save(tmp_path / "acme.key")
        done = self.write(folder, tmp_path, "--write-card")
        assert done.returncode == 1
        assert (folder / CARD_FILE).read_bytes() == CARD.encode()

    def test_a_card_that_is_a_folder(self, folder, tmp_path):
        (folder / CARD_FILE).unlink()
        (folder / CARD_FILE).mkdir()
        done = self.write(folder, tmp_path, "--write-card")
        refused(done, "README.md", "cannot be written", stdout="found\n")
        assert [p.name for p in folder.iterdir() if "tmp" in p.name] == []

    def test_write_file_is_all_or_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "README.md"
        path.write_bytes(b"before")

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(Exception, match="No space left on device"):
            write_file(path, b"after")
        assert path.read_bytes() == b"before"
        assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


class TestInProcess:
    """`write_card` itself: what the trainer uses too."""

    def test_a_push_between_read_and_write(self, hub):
        done = verify("demo/vit", KEY)
        theirs = push("demo/vit", {CARD_FILE: b"# theirs\n"})
        with pytest.raises(CardConflictError, match="changed between reading and writing"):
            write_card(done.files, done.evidence, done.claim)
        assert (head(), card_of()) == (theirs, "# theirs\n")

    def test_any_push_counts(self, hub):
        # The evidence is about weights that may have changed.
        done = verify("demo/vit", KEY)
        theirs = push("demo/vit", {"notes.md": b"x"})
        with pytest.raises(CardConflictError):
            write_card(done.files, done.evidence, done.claim)
        assert head() == theirs
        # A pull request is made for the commit that was read, so it may still be opened.
        page = write_card(done.files, done.evidence, done.claim, create_pr=True)
        assert page.endswith("/discussions/1")

    def test_the_same_again_makes_no_commit(self, hub):
        done = verify("demo/vit", KEY)
        write_card(done.files, done.evidence, done.claim)
        after = head()
        files = HubFiles("demo/vit")
        assert "as it was" in write_card(files, done.evidence, done.claim)
        assert head() == after

    def test_no_rights(self, hub):
        done = verify("demo/vit", KEY)
        with pytest.raises(AccessDeniedError):
            write_card(done.files, done.evidence, done.claim, token=hub.add_user("x"))
        assert card_of() == CARD

    def test_a_failing_hub(self, hub):
        done = verify("demo/vit", KEY)
        hub.faults.add(method="POST", path="/commit/", status=503, times=None)
        with pytest.raises(NetworkGaveUpError):
            write_card(done.files, done.evidence, done.claim)
        hub.faults.clear()
        assert card_of() == CARD

    def test_the_card_read_back_fails(self, hub):
        # A card that cannot be read is not a missing card: it is never replaced by a new one.
        from hf_watermark.connection import Patience

        done = verify("demo/vit", KEY)
        files = HubFiles("demo/vit", patience=Patience(tries=2, first_wait=0.01))
        hub.faults.add(path=r"/resolve/.*README\.md", status=503, times=None)
        with pytest.raises(NetworkGaveUpError):
            write_card(files, done.evidence, done.claim)
        hub.faults.clear()
        assert card_of() == CARD

    def test_folder_files(self, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        done = verify(folder, KEY)
        assert write_card(FolderFiles(folder), done.evidence, None) == str(folder / CARD_FILE)
        assert read_card_text(FolderFiles(folder)).startswith("---\n")


PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id="demo/vit", folder_path=sys.argv[1], commit_message="new weights")
"""


class TestInterruptedPush:
    def test_killed_between_two_files(self, hub, tmp_path):
        # Shards go up one after the other; the commit, claim and card with them, comes last.
        before = head()
        new = save_model(
            tmp_path / "new", vit(THIEF), claim_about(vit(THIEF), THIEF), shard="600KB"
        )
        (new / CARD_FILE).write_text("# new\n")
        assert len(list(new.glob("model-*.safetensors"))) >= 2
        hub.faults.add(method="PUT", skip=1, delay=20, times=None)
        seen = len(hub.requests)
        process = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(new)],
            env=os.environ | hub.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while sum(one.method == "PUT" for one in hub.requests[seen:]) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        hub.faults.clear()
        assert (head(), card_of()) == (before, CARD)
        done = run("demo/vit", "--key", tmp_path / "acme.key", hub=hub)
        assert done.returncode == 0, done.stderr
        assert run("demo/vit", hub=hub).stdout.startswith("NOT CHECKED")

    def test_files_pushed_one_by_one(self, hub, tmp_path):
        # Somebody who does not push in one commit: every state in between is told as what it is.
        hub.create_repo("demo/parts")
        new = save_model(tmp_path / "new", vit(), claim_about(vit()), shard="600KB")
        arguments = ("demo/parts", "--key", tmp_path / "acme.key")
        parts = sorted(path.name for path in new.glob("model-*.safetensors"))
        index = "model.safetensors.index.json"
        push("demo/parts", {CLAIM_FILE: (new / CLAIM_FILE).read_bytes()})
        refused(run(*arguments, hub=hub), "no weights")
        push("demo/parts", {index: (new / index).read_bytes()})
        refused(run(*arguments, hub=hub), f"shard '{parts[0]}'", "missing", "Upload")
        for name in parts[:-1]:
            push("demo/parts", {name: (new / name).read_bytes()})
        refused(run(*arguments, hub=hub), f"shard '{parts[-1]}'", "missing", "Upload")
        push("demo/parts", {parts[-1]: (new / parts[-1]).read_bytes()})
        assert run(*arguments, hub=hub).returncode == 0

    def test_new_weights_beside_the_old_claim(self, hub, tmp_path):
        weights = save_model(tmp_path / "new", vit(THIEF)) / WEIGHTS
        push("demo/vit", {WEIGHTS: weights.read_bytes()})
        refused(run("demo/vit", hub=hub), "The weights are not those claimed", "Verify with --key")
        assert run("demo/vit", "--key", tmp_path / "acme.key", hub=hub).returncode == 1
