"""WatermarkTrainer and a Hub: what is pushed, what becomes of the user's card, what fails how."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from test_trainer import (
    KEY,
    OTHER,
    SECRET,
    Images,
    arguments,
    every_log,  # noqa: F401
    resnet,
    traces_in,
    vit,
)
from threadpoolctl import threadpool_limits

from hf_watermark import OwnerKey, Scheme
from hf_watermark.card import BEGIN, END, read_card, without_watermark
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import check_digests
from hf_watermark.errors import CardError, NetworkGaveUpError, RepoMissingError
from hf_watermark.evidence import CLAIM_FILE, Claim
from hf_watermark.hub import HubFiles
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model

REPO = "demo/vit"
CARD = (
    "---\r\n"
    "# chosen by the lawyers\r\n"
    "license: apache-2.0   # not mit\r\n"
    "version: 1.10\r\n"
    "reviewed_by: null\r\n"
    "house_rules:\r\n"
    "  - {colour: teal, 'weight': 007}\r\n"
    "tags:\r\n"
    "- vision\r\n"
    "---\r\n"
    "\r\n"
    "# Our model\r\n"
    "\r\n"
    "Written by hand.\tWith a tab, trailing blanks  \r\n"
    "and --- dashes, and naïve ünicode ✓.\r\n"
)
FAILING = {"status": 503, "times": None, "header": {"retry-after": "0"}}


@pytest.fixture(autouse=True, scope="module")
def _cheap():
    """Small matrices gain nothing from threads, and accelerate collects garbage at every turn."""
    gc.collect()
    gc.freeze()
    with threadpool_limits(1):
        yield
    gc.unfreeze()


@pytest.fixture
def hub(loopback_hub):
    loopback_hub.create_repo(REPO)
    return loopback_hub


def trainer_for(folder: Path, make=vit, *, scheme: Scheme | None = None, **changes):
    settings = {"hub_model_id": REPO, **changes}
    carriers = settings.pop("watermark_carriers", None)
    return WatermarkTrainer(
        model=make(),
        args=arguments(folder, **settings),
        train_dataset=Images(),
        eval_dataset=Images(12),
        watermark_key=KEY,
        watermark_scheme=scheme,
        watermark_carriers=carriers,
    )


def pushed(folder: Path, **changes):
    """A trainer that has trained and pushed, and the commit of its weights."""
    trainer = trainer_for(folder, **changes)
    trainer.train()
    return trainer, trainer.push_to_hub()


def put_card(text: str = CARD, repo: str = REPO, **kwargs) -> str:
    operation = CommitOperationAdd("README.md", text.encode())
    return HfApi().create_commit(repo, [operation], commit_message="card", **kwargs).oid


def on_hub(path: str, repo: str = REPO, revision: str | None = None) -> bytes:
    return Path(hf_hub_download(repo, path, revision=revision)).read_bytes()


def card_on_hub(**kwargs) -> str:
    return on_hub("README.md", **kwargs).decode()


def head(repo: str = REPO) -> str:
    return HfApi().model_info(repo).sha


def commits(repo: str = REPO) -> list[str]:
    """Newest first."""
    return [commit.commit_id for commit in HfApi().list_repo_commits(repo)]


class TestPushing:
    def test_weights_claim_and_card_with_evidence(self, hub, tmp_path):
        before = commits()
        trainer, commit = pushed(tmp_path / "out")
        files = set(HfApi().list_repo_files(REPO))
        assert {"model.safetensors", "config.json", CLAIM_FILE, "README.md"} <= files
        # Weights, claim and card in one commit; the sha that was read only fits into the next.
        assert len(commits()) == len(before) + 2
        assert commits()[1] == commit.oid
        assert head() == commits()[0]

        evidence = verify_hub_model(REPO, KEY)
        assert (evidence.found, evidence.matched, evidence.bits) == (True, 64, 64)
        assert evidence.committed_at == commit.oid
        assert not verify_hub_model(REPO, OTHER).found
        claim = Claim.from_bytes(on_hub(CLAIM_FILE), REPO)
        claim.check(REPO)
        assert claim == trainer.claim
        assert check_digests(Checkpoint.open(HubFiles(REPO)), claim) == 4
        assert verify_hub_model(REPO).verdict == "not checked"

        text = card_on_hub()
        fields = read_card(text)
        assert fields["revision"] == commit.oid
        assert fields["log10_p"] < -150
        assert fields["commitment"] == KEY.commitment
        assert fields["public_key"] == KEY.public_key
        assert fields["scheme"] == Scheme().name
        assert fields["format"] == "hf-watermark/1"
        data = ModelCard(text).data
        assert {"generated_from_trainer", "watermark"} <= set(data.tags)
        assert text.count(BEGIN) == text.count(END) == 1
        assert (tmp_path / "out" / "README.md").read_bytes() == text.encode()
        assert "watermark" in HfApi().model_info(REPO).tags

    def test_pushing_twice(self, hub, tmp_path):
        trainer, _ = pushed(tmp_path / "out")
        again = trainer.push_to_hub()
        assert read_card(card_on_hub())["revision"] == again.oid
        trainer.train()
        third = trainer.push_to_hub(commit_message="Third")
        text = card_on_hub()
        assert read_card(text)["revision"] == third.oid
        assert text.count(BEGIN) == 1
        assert HfApi().list_repo_commits(REPO)[1].title == "Third"
        assert verify_hub_model(REPO, KEY).found
        for commit in (again, third):
            at = HubFiles(REPO, commit.oid)
            claim = Claim.from_bytes(at.read(CLAIM_FILE, 10**6), REPO)
            assert check_digests(Checkpoint.open(at), claim) == 4

    def test_a_new_repo(self, loopback_hub, tmp_path):
        trainer, commit = pushed(tmp_path / "new-vit", hub_model_id=None)
        assert trainer.hub_model_id == "demo/new-vit"
        assert verify_hub_model("demo/new-vit", KEY).committed_at == commit.oid

    def test_a_model_of_another_family(self, hub, tmp_path):
        pushed(tmp_path / "out", make=resnet)
        assert verify_hub_model(REPO, KEY).matched == 64

    def test_saving_pushes_where_trainer_does(self, hub, tmp_path):
        trainer = trainer_for(tmp_path / "out", push_to_hub=True)
        trainer.train()
        trainer.save_model()
        assert HfApi().list_repo_commits(REPO)[1].title == "Model save"
        assert verify_hub_model(REPO, KEY).found
        assert "revision" in read_card(card_on_hub())

    def test_not_blocking(self, hub, tmp_path):
        trainer = trainer_for(tmp_path / "out")
        trainer.train()
        commit = trainer.push_to_hub(blocking=False).result(30)
        assert head() == commit.oid
        assert verify_hub_model(REPO, KEY).found
        assert "revision" not in read_card(card_on_hub())
        assert read_card(card_on_hub())["commitment"] == KEY.commitment

    @pytest.mark.parametrize("how", ["argument", "arguments"])
    def test_another_branch(self, hub, tmp_path, how):
        put_card("# On main\n")
        HfApi().create_branch(REPO, branch="v2")
        put_card("# On v2\n", revision="v2")
        main = head()
        changes = {"hub_revision": "v2"} if how == "arguments" else {}
        trainer = trainer_for(tmp_path / "out", **changes)
        trainer.train()
        commit = trainer.push_to_hub(revision="v2" if how == "argument" else None)
        text = card_on_hub(revision="v2")
        assert without_watermark(text) == "# On v2\n"
        assert read_card(text)["revision"] == commit.oid
        assert verify_hub_model(REPO, KEY, revision="v2").found
        assert head() == main
        assert card_on_hub() == "# On main\n"

    def test_a_private_repo_and_a_token_that_nothing_else_knows(self, loopback_server, tmp_path):
        hub = loopback_server
        with hub.in_process(token=""):
            hub.create_repo(REPO, private=True)
            put_card(token=hub.token)
            trainer = trainer_for(tmp_path / "out")
            trainer.train()
            commit = trainer.push_to_hub(token=hub.token)
            files = HubFiles(REPO, token=hub.token)
            text = files.read("README.md", 10**6).decode()
            assert without_watermark(text) == CARD
            assert read_card(text)["revision"] == commit.oid
            assert verify_hub_model(REPO, KEY, token=hub.token).found
            with pytest.raises(RepoMissingError):
                verify_hub_model(REPO, KEY)
        assert hub.token.encode() not in hub.bytes_of()

    def test_before_any_training(self, hub, tmp_path):
        trainer = trainer_for(tmp_path / "out")
        with pytest.warns(UserWarning, match="mark was not found"):
            trainer.push_to_hub()
        assert not verify_hub_model(REPO, KEY).found
        text = card_on_hub()
        assert read_card(text)["log10_p"] > -6
        assert "not found" in text
        trainer.train()
        trainer.push_to_hub()
        assert verify_hub_model(REPO, KEY).found
        assert read_card(card_on_hub())["log10_p"] < -150

    def test_loads_where_this_package_is_not(self, hub, tmp_path):
        trainer, _ = pushed(tmp_path / "out")
        trainer.model.eval()
        pixels = Images(3).pixels
        with torch.no_grad():
            np.save(tmp_path / "logits.npy", trainer.model(pixel_values=pixels).logits.numpy())
        np.save(tmp_path / "pixels.npy", pixels.numpy())
        script = textwrap.dedent(
            f"""
            import sys

            class Blocker:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "hf_watermark":
                        raise ModuleNotFoundError("blocked")

            sys.meta_path.insert(0, Blocker())
            try:
                import hf_watermark
            except ModuleNotFoundError:
                pass
            else:
                raise SystemExit("it is importable")
            import numpy as np, torch
            from transformers import AutoModelForImageClassification
            model, report = AutoModelForImageClassification.from_pretrained(
                {REPO!r}, output_loading_info=True
            )
            assert not any(report.values()), report
            with torch.no_grad():
                logits = model(pixel_values=torch.from_numpy(np.load("pixels.npy"))).logits
            np.testing.assert_allclose(logits.numpy(), np.load("logits.npy"), atol=1e-5)
            assert not any(name.startswith("hf_watermark") for name in sys.modules)
            print("as before")
            """
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **hub.environment()},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.stdout.strip().endswith("as before"), done.stderr[-3000:]

    def test_named_carriers_are_not_told(self, hub, tmp_path):
        names = [f"vit.layers.{i}.mlp.fc2.weight" for i in (0, 2)]
        saved = [f"vit.encoder.layer.{i}.output.dense.weight" for i in (0, 2)]
        scheme = Scheme(bits=32)
        trainer, _ = pushed(tmp_path / "out", scheme=scheme, watermark_carriers=names)
        trainer.push_to_hub()
        assert [carrier.name for carrier in trainer.claim.carriers] == saved
        for revision in commits()[:-1]:
            files = HubFiles(REPO, revision)
            for path, size in files.sizes.items():
                if path == "model.safetensors":  # it names all tensors
                    continue
                content = files.read(path, size)
                assert not any(name.encode() in content for name in names + saved), path
        evidence = verify_hub_model(REPO, KEY, claim=trainer.claim)
        assert (evidence.found, evidence.matched) == (True, 32)
        assert read_card(card_on_hub())["log10_p"] < -20


class TestTheUsersCard:
    def test_survives_two_trainings_and_four_pushes(self, hub, tmp_path):
        put_card()
        for i in range(2):
            trainer, _ = pushed(tmp_path / str(i))
            last = trainer.push_to_hub()
            text = card_on_hub()
            assert without_watermark(text) == CARD
            assert read_card(text)["revision"] == last.oid
            assert text.count(BEGIN) == 1
            assert (tmp_path / str(i) / "README.md").read_bytes() == text.encode()
        for line in CARD.splitlines(keepends=True):
            assert line in text

    def test_edits_on_the_hub_between_pushes(self, hub, tmp_path):
        trainer, _ = pushed(tmp_path / "out")
        edited = card_on_hub().replace("## Model description", "## What it is\n\nA small ViT.")
        assert "A small ViT." in edited
        put_card(edited)
        trainer.train()
        trainer.push_to_hub()
        text = card_on_hub()
        assert without_watermark(text) == without_watermark(edited)
        assert text.count(BEGIN) == 1

    def test_edits_in_the_folder_between_pushes(self, hub, tmp_path):
        trainer, _ = pushed(tmp_path / "out")
        path = tmp_path / "out" / "README.md"
        edited = path.read_text().replace("## Model description", "## What it is\n\nA small ViT.")
        path.write_text(edited)
        last = trainer.push_to_hub()
        text = card_on_hub()
        assert without_watermark(text) == without_watermark(edited)
        assert "A small ViT." in text
        assert read_card(text)["revision"] == last.oid

    def test_a_card_in_the_folder_before_training(self, hub, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").write_bytes(CARD.encode())
        pushed(tmp_path / "out")
        assert without_watermark(card_on_hub()) == CARD

    def test_trainers_draft_is_renewed(self, hub, tmp_path):
        trainer, _ = pushed(tmp_path / "out", eval_strategy="epoch")
        first = card_on_hub()
        trainer.train()
        trainer.push_to_hub(tags=["renewed"])
        second = card_on_hub()
        assert "- renewed" in second
        assert "- renewed" not in first
        assert second.count(BEGIN) == 1

    def test_peft_writes_a_card_too(self, hub, tmp_path):
        """Saving an adapter leaves a template in the folder: no user wrote that."""
        peft = pytest.importorskip("peft")

        def adapted():
            config = peft.LoraConfig(r=16, target_modules=["fc1"])
            return peft.get_peft_model(vit(), config)

        carriers = [
            f"base_model.model.vit.layers.{i}.mlp.fc1.lora_A.default.weight" for i in range(4)
        ]
        settings = {"scheme": Scheme(bits=16), "watermark_carriers": carriers}
        trainer, _ = pushed(tmp_path / "1", make=adapted, **settings)
        first = card_on_hub()
        assert "### Training hyperparameters" in first
        assert "Developed by" not in first
        trainer.args.learning_rate = 0.0123
        trainer.train()
        trainer.push_to_hub()
        second = card_on_hub()
        assert "learning_rate: 0.0123" in second
        assert second.count(BEGIN) == 1
        assert verify_hub_model(REPO, KEY, claim=trainer.claim).matched == 16
        put_card()
        pushed(tmp_path / "2", make=adapted, **settings)
        assert without_watermark(card_on_hub()) == CARD

    @pytest.mark.parametrize("path", [r"/api/models/demo/vit\?blobs", r"/resolve/.*README\.md"])
    def test_a_hub_that_fails_is_no_missing_card(self, hub, tmp_path, path):
        put_card()
        trainer = trainer_for(tmp_path / "out")
        trainer.train()
        before, stored = head(), on_hub("README.md")
        fault = hub.faults.add(method="GET", path=path, **FAILING)
        with pytest.raises(NetworkGaveUpError):
            trainer.push_to_hub()
        assert fault.hits > 1
        hub.faults.clear()
        assert head() == before
        assert on_hub("README.md") == stored
        trainer.push_to_hub()
        assert without_watermark(card_on_hub()) == CARD

    def test_a_token_that_may_write_but_not_see(self, loopback_server, tmp_path):
        """A repo that answers 404 after it was created is no repo without a card."""
        hub = loopback_server
        with hub.in_process():
            hub.create_repo(REPO)
            put_card()
            trainer = trainer_for(tmp_path / "out")
            trainer.train()
            hub.faults.add(
                method="GET", path=r"/api/models/demo/vit\?blobs", status=404, times=None
            )
            before = head()
            with pytest.raises(RepoMissingError):
                trainer.push_to_hub()
            hub.faults.clear()
            assert head() == before

    @pytest.mark.parametrize(
        "card",
        ["---\nwatermark: visible, in the corner\n---\n", "---\ntags: [\n---\n", f"{BEGIN}\n# x\n"],
    )
    def test_a_card_that_cannot_be_edited(self, hub, tmp_path, card):
        before = put_card(card) if "[\n" not in card else None
        if before is None:  # the Hub refuses it, a folder does not
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "README.md").write_text(card)
            before = head()
        trainer = trainer_for(tmp_path / "out")
        trainer.train()
        with pytest.raises((CardError, ValueError)):
            trainer.push_to_hub()
        assert head() == before


class TestCheckpointPushes:
    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
    def test_every_commit_has_the_claim_of_its_weights(self, hub, tmp_path, strategy):
        trainer = trainer_for(
            tmp_path / "out",
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            push_to_hub=True,
            hub_strategy=strategy,
        )
        trainer.train()
        seen = self.check_history()
        assert seen == (0 if strategy == "end" else seen)
        assert (seen > 0) == (strategy != "end")
        files = set(HfApi().list_repo_files(REPO))
        if strategy == "checkpoint":
            assert f"last-checkpoint/{CLAIM_FILE}" in files
        if strategy == "all_checkpoints":
            assert f"checkpoint-2/{CLAIM_FILE}" in files
        assert (tmp_path / "out" / CLAIM_FILE).exists() == (strategy != "end")
        trainer.push_to_hub()
        self.check_history()
        assert verify_hub_model(REPO, KEY).found
        assert not traces_in(hub.bytes_of())

    def test_a_slow_push_is_not_mixed_with_the_next_checkpoint(self, hub, tmp_path):
        """Trainer skips checkpoints while one is under way; so must the claim."""
        hub.faults.add(method="POST", path="/preupload/", delay=0.4, times=None)
        trainer = trainer_for(
            tmp_path / "out",
            max_steps=8,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=1,
            push_to_hub=True,
        )
        trainer.train()
        assert self.check_history() < 8

    def check_history(self) -> int:
        """Every commit that holds weights holds the claim about just these; how many do."""
        seen = set()
        for revision in commits():
            files = HubFiles(REPO, revision)
            assert ("model.safetensors" in files.sizes) == (CLAIM_FILE in files.sizes)
            if CLAIM_FILE not in files.sizes:
                continue
            content = files.read(CLAIM_FILE, 10**6)
            claim = Claim.from_bytes(content, revision)
            claim.check(revision)
            assert check_digests(Checkpoint.open(files), claim) == 4
            seen.add(content)
        return len(seen)

    def test_weights_that_broke_take_no_older_claim(self, hub, tmp_path):
        trainer = trainer_for(
            tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True,
            hub_always_push=True,
        )  # fmt: skip
        trainer.train()
        assert (tmp_path / "out" / CLAIM_FILE).exists()
        with torch.no_grad():
            trainer.model.vit.layers[0].mlp.fc1.weight[0, 0] = float("nan")
        with pytest.warns(UserWarning, match="No claim was written"):
            trainer.train()
        assert not (tmp_path / "out" / CLAIM_FILE).exists()


class TestInterruptedPushes:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/preupload/"),
            ("POST", "/info/lfs/objects/batch"),
            ("PUT", "/lfs/"),
            ("POST", "/info/lfs/objects/verify"),
            ("POST", "/commit/"),
        ],
    )
    def test_the_old_state_stays_and_a_second_push_works(self, hub, tmp_path, method, path):
        pushed(tmp_path / "1")
        put_card(card_on_hub() + "\nBy hand.\n")
        before = head()
        old = {name: on_hub(name) for name in ("model.safetensors", CLAIM_FILE, "README.md")}
        trainer = trainer_for(tmp_path / "2", learning_rate=1e-2)
        trainer.train()
        fault = hub.faults.add(method=method, path=path, status=403, times=None)
        with pytest.raises((HfHubHTTPError, RuntimeError)):  # the latter around an upload's
            trainer.push_to_hub()
        assert fault.hits
        hub.faults.clear()
        assert head() == before
        assert {name: on_hub(name) for name in old} == old
        assert verify_hub_model(REPO, KEY).found
        commit = trainer.push_to_hub()
        assert on_hub("model.safetensors") != old["model.safetensors"]
        assert on_hub(CLAIM_FILE) == trainer.claim.to_bytes()
        assert "By hand." in card_on_hub()
        assert read_card(card_on_hub())["revision"] == commit.oid
        assert verify_hub_model(REPO, KEY).found

    @pytest.mark.parametrize(
        ("method", "path", "skip"),
        [("GET", r"/revision/[0-9a-f]{40}\?blobs", 0), ("POST", "/commit/", 1)],
        ids=["reading back", "the second commit"],
    )
    def test_what_follows_the_push_does_not_undo_it(
        self, hub, tmp_path, caplog, method, path, skip
    ):
        trainer = trainer_for(tmp_path / "out")
        trainer.train()
        fault = hub.faults.add(
            method=method, path=path, skip=skip, **{**FAILING, "status": 403 if skip else 503}
        )
        with caplog.at_level(logging.WARNING, "hf_watermark"):
            commit = trainer.push_to_hub()
        assert fault.hits
        hub.faults.clear()
        assert "verify_hub_model demo/vit --key FILE --write-card" in caplog.text
        assert head() == commit.oid
        assert verify_hub_model(REPO, KEY).found
        assert "revision" not in read_card(card_on_hub())
        again = trainer.push_to_hub()
        assert read_card(card_on_hub())["revision"] == again.oid

    def test_somebody_edits_the_card_at_the_same_moment(self, hub, tmp_path, caplog):
        trainer = trainer_for(tmp_path / "out")
        trainer.train()
        before = head()
        hub.faults.add(method="GET", path=r"/revision/[0-9a-f]{40}\?blobs", delay=1.5)
        edits = []

        def edit():
            until = time.monotonic() + 20
            while head() == before and time.monotonic() < until:
                time.sleep(0.02)
            edits.append(put_card(card_on_hub() + "\nA remark from elsewhere.\n"))

        other = threading.Thread(target=edit)
        other.start()
        with caplog.at_level(logging.WARNING, "hf_watermark"):
            trainer.push_to_hub()
        other.join(20)
        assert edits == [head()]
        assert "changed between reading and writing" in caplog.text
        assert "A remark from elsewhere." in card_on_hub()
        assert verify_hub_model(REPO, KEY).found
        trainer.push_to_hub()
        assert "A remark from elsewhere." in card_on_hub()


class TestSecrets:
    def test_nothing_of_the_key_reaches_the_hub(self, hub, tmp_path, capfd, every_log):  # noqa: F811
        put_card()
        trainer = trainer_for(
            tmp_path / "out",
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            push_to_hub=True,
            hub_strategy="all_checkpoints",
            log_level="debug",
        )
        trainer.train()
        trainer.push_to_hub(tags=["secret"])
        stored = hub.bytes_of()
        assert KEY.commitment.encode() in stored  # the search looks in the right place
        assert len(stored) > 10**6
        assert not traces_in(stored)
        recipient = KEY.for_recipient("customer-17")
        assert not traces_in(stored, recipient, KEY.stream("recipient/customer-17", 32))
        out, err = capfd.readouterr()
        assert not traces_in((out + err + every_log.text).encode())
        for path in (tmp_path / "out").rglob("*"):
            if path.is_file():
                assert not traces_in(path.read_bytes()), path
        for seen in hub.requests:
            assert not traces_in(seen.path.encode())

    def test_a_leak_would_be_found(self, hub, tmp_path):
        """The same search, over a repo into which someone pushed the key's file."""
        (tmp_path / "out").mkdir()
        KEY.save(tmp_path / "out" / "acme.key")
        HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "out")
        assert traces_in(hub.bytes_of())
        assert OwnerKey.load(tmp_path / "out" / "acme.key") == OwnerKey(SECRET)

    def test_config_and_arguments(self, hub, tmp_path):
        pushed(tmp_path / "out")
        config = json.loads(on_hub("config.json"))
        assert not any("watermark" in name for name in config)
        restored = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
        assert not any("watermark" in name for name in vars(restored))


def test_an_output_folder_of_the_repos_name(hub, tmp_path, monkeypatch):
    """`output_dir="demo/vit"` beside `hub_model_id="demo/vit"`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    _, commit = pushed(Path(REPO))
    assert read_card(card_on_hub())["revision"] == commit.oid
