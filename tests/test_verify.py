"""The whole verification, in process: what it says, what it fetches, how often it is wrong."""

from __future__ import annotations

import inspect
import json
import math
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import CommitOperationDelete, HfApi
from marked_models import (
    KEY,
    LAYERS,
    THIEF,
    WEIGHTS,
    another_key,
    claim_about,
    fc1,
    like_timm,
    marked_arrays,
    push,
    save_model,
    vit,
)
from scipy.stats import binom

from hf_watermark import Claim, Evidence, OwnerKey, Scheme
from hf_watermark.errors import (
    CarrierError,
    CarrierMissingError,
    ClaimError,
    HubError,
    KeyFileError,
    SchemeError,
)
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.verify import verify, verify_hub_model

KEYS = [
    "repo", "revision", "verdict", "log10_p", "alpha", "bits", "matched", "tries", "reading",
    "scheme", "carriers", "key_fingerprint", "committed_at", "bytes_read", "bytes_total", "seconds",
    "format_version",
]  # fmt: skip
LARGE = {f"blocks.{i}.mlp.fc1.weight": (1024, 256) for i in range(4)}


@pytest.fixture
def hub(loopback_hub, tmp_path):
    loopback_hub.create_repo("demo/vit")
    push("demo/vit", save_model(tmp_path / "own", vit(), claim_about(vit())))
    loopback_hub.requests.clear()
    return loopback_hub


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", vit())


def paths(hub):
    found = [re.search(r"/resolve/[^/]+/([^?]*)", one.path) for one in hub.requests]
    return {match[1] for match in found if match is not None}


class TestContract:
    def test_the_signature(self):
        parameters = inspect.signature(verify_hub_model).parameters
        assert list(parameters)[:2] == ["repo", "key"]
        assert {n: parameters[n].default for n in ("claim", "recipient", "alpha")} == {
            "claim": None,
            "recipient": None,
            "alpha": 1e-6,
        }

    def test_the_call(self, hub):
        evidence = verify_hub_model("demo/vit", KEY, claim=None, recipient=None, alpha=1e-6)
        assert isinstance(evidence, Evidence)
        assert evidence.found is True
        assert evidence.log10_p < -15
        assert (evidence.bits, evidence.matched, evidence.tries) == (64, 64, 1 + LAYERS)

    def test_the_keys(self, hub):
        evidence = verify_hub_model("demo/vit", KEY)
        fields = json.loads(evidence.to_json())
        assert list(fields) == KEYS
        assert fields == evidence.to_dict()
        head = HfApi().model_info("demo/vit").sha
        assert {**fields, "log10_p": 0, "seconds": 0, "bytes_read": 0} == {
            "repo": "demo/vit",
            "revision": head,
            "verdict": "found",
            "log10_p": 0,
            "alpha": 1e-6,
            "bits": 64,
            "matched": 64,
            "tries": 7,
            "reading": "raw",
            "scheme": "spread-random-64-projection-auto-soft",
            "carriers": [fc1(i) for i in range(LAYERS)],
            "key_fingerprint": KEY.fingerprint,
            "committed_at": head,
            "bytes_read": 0,
            "bytes_total": len(hub_file("demo/vit", WEIGHTS)),
            "seconds": 0,
            "format_version": 1,
        }
        assert type(fields["log10_p"]) is float
        assert type(fields["seconds"]) is float

    def test_not_found(self, hub):
        evidence = verify_hub_model("demo/vit", THIEF)
        assert evidence.found is False
        assert evidence.verdict == "not found"
        assert -6 < evidence.log10_p <= 0
        assert 10 < evidence.matched < 54
        assert evidence.key_fingerprint == THIEF.fingerprint
        assert list(evidence.to_dict()) == KEYS

    @pytest.mark.parametrize("where", ["str", "Path", "file", "trailing slash"])
    def test_folders(self, folder, where):
        given = {
            "str": str(folder),
            "Path": folder,
            "file": folder / WEIGHTS,
            "trailing slash": f"{folder}/",
        }[where]
        evidence = verify_hub_model(given, KEY)
        assert evidence.found
        assert (evidence.revision, evidence.committed_at) == (None, None)
        assert evidence.bytes_total == (folder / WEIGHTS).stat().st_size
        assert evidence.repo == str(given)

    def test_the_limit_is_what_decides(self, folder):
        p = verify_hub_model(folder, KEY, read="all").log10_p
        assert p > -300
        assert verify_hub_model(folder, KEY, alpha=10 ** (p + 0.01)).verdict == "found"
        assert verify_hub_model(folder, KEY, alpha=10 ** (p - 0.01)).verdict == "not found"

    @pytest.mark.parametrize(
        "alpha", [0, 1, -1, 2, math.nan, math.inf, "1e-6", None, True, 10**400, 1j]
    )
    def test_a_limit_that_is_none(self, folder, alpha):
        with pytest.raises(SchemeError, match="alpha is out of range; expected a number between"):
            verify_hub_model(folder, KEY, alpha=alpha)

    @pytest.mark.parametrize("option", [{"align": "always"}, {"read": "some"}, {"read": None}])
    def test_options_that_are_none(self, folder, option):
        with pytest.raises(SchemeError, match="Unknown"):
            verify_hub_model(folder, KEY, **option)

    @pytest.mark.parametrize("key", ["acme.key", b"x" * 32, object()])
    def test_a_key_that_is_none(self, folder, key):
        with pytest.raises(KeyFileError, match="no OwnerKey") as caught:
            verify_hub_model(folder, key)
        assert "xxxx" not in str(caught.value)

    def test_read_and_align(self, folder):
        first = verify_hub_model(folder, KEY).to_dict()
        for options in ({"align": "never"}, {"read": "all"}):
            other = verify_hub_model(folder, KEY, **options).to_dict()
            assert {**other, "seconds": 0} == {**first, "seconds": 0}


class TestWhatToRead:
    def test_other_schemes(self, tmp_path):
        for scheme in (
            Scheme(bits=16),
            Scheme(decides="bits"),
            Scheme(statistic="mean", bits=32, strength=3.0),
            Scheme(statistic="mean", key_matrix="diff", bits=32, strength=3.0),
        ):
            tensors = vit(KEY, scheme)
            claim = claim_about(tensors, scheme=scheme)
            stolen = save_model(tmp_path / "stolen", tensors)
            evidence = verify_hub_model(stolen, KEY, claim=claim)
            assert evidence.found, scheme.name
            assert (evidence.scheme, evidence.bits) == (scheme.name, scheme.bits)
            own = verify_hub_model(save_model(tmp_path / "own", tensors, claim), KEY)
            assert (own.found, own.scheme) == (True, scheme.name)
            wrong = verify_hub_model(
                stolen, THIEF, claim=claim_about(tensors, THIEF, scheme=scheme)
            )
            assert not wrong.found

    def test_a_claim_as_object_file_folder_and_repo(self, hub, tmp_path):
        claim = claim_about(vit())
        own = save_model(tmp_path / "own", vit(), claim)
        stolen = save_model(tmp_path / "stolen", like_timm(vit()))
        for given in (claim, own / CLAIM_FILE, str(own / CLAIM_FILE), own, str(own), "demo/vit"):
            evidence = verify_hub_model(stolen, KEY, claim=given)
            assert evidence.found
            assert evidence.reading == "renamed"
            assert (evidence.committed_at is not None) == (given == "demo/vit")

    def test_a_given_claim_counts_more_than_the_suspects_own(self, tmp_path):
        # The suspect's own claim is a valid one of the same key, about another model.
        other = claim_about(vit(), names=[fc1(0)], scheme=Scheme(bits=8))
        stolen = save_model(tmp_path / "stolen", vit(), other)
        evidence = verify_hub_model(stolen, KEY, claim=claim_about(vit()))
        assert (evidence.found, evidence.bits) == (True, 64)

    def test_a_claim_of_another_key(self, folder):
        with pytest.raises(ClaimError, match="does not belong to this key") as caught:
            verify_hub_model(folder, KEY, claim=claim_about(vit(), THIEF))
        assert KEY.commitment[:16] in str(caught.value)

    def test_a_public_copy_that_hides_the_carriers(self, tmp_path):
        claim = claim_about(vit(), names=[fc1(i) for i in range(LAYERS)], secret_carriers=True)
        own = save_model(tmp_path / "own", vit(), claim)
        with pytest.raises(ClaimError, match="does not name its carriers"):
            verify_hub_model(own, KEY)
        assert verify_hub_model(own, KEY, claim=claim).found

    def test_an_owners_copy_with_other_carriers(self, tmp_path):
        claim = claim_about(vit(), names=[fc1(0)], secret_carriers=True)
        swapped = claim_about(vit(), names=[fc1(1)], secret_carriers=True)
        edited = tmp_path / "claim.json"
        fields = json.loads(claim.to_bytes())
        fields["carriers"] = json.loads(swapped.to_bytes())["carriers"]
        edited.write_text(json.dumps(fields))
        with pytest.raises(ClaimError, match="other carriers than it committed to"):
            verify_hub_model(save_model(tmp_path / "m", vit()), KEY, claim=edited)

    def test_a_foreign_claim_is_not_shown_as_the_evidences(self, tmp_path):
        # A card written from this would carry the thief's commitment.
        stolen = save_model(tmp_path / "stolen", vit(), claim_about(vit(), THIEF))
        done = verify(stolen, KEY)
        assert done.evidence.found
        assert done.claim is None
        assert verify(stolen, KEY, claim=claim_about(vit())).claim == claim_about(vit())


class TestRecipients:
    SEVENTEEN = KEY.for_recipient("customer-17")

    @pytest.fixture(params=["no claim", "the owner's claim", "the copy's own claim"])
    def copy(self, request, tmp_path):
        tensors = vit(self.SEVENTEEN)
        claim = {
            "no claim": None,
            "the owner's claim": claim_about(vit()),
            "the copy's own claim": claim_about(tensors, self.SEVENTEEN),
        }[request.param]
        return save_model(tmp_path / "copy", tensors, claim)

    def test_named(self, copy):
        evidence = verify_hub_model(copy, KEY, recipient="customer-17")
        assert evidence.found
        assert evidence.key_fingerprint == self.SEVENTEEN.fingerprint
        assert any("customer-17" in note for note in evidence.notes)
        for other in ("customer-18", "Customer-17", "customer-17 "):
            assert not verify_hub_model(copy, KEY, recipient=other).found
        assert not verify_hub_model(copy, KEY).found
        assert not verify_hub_model(copy, THIEF, recipient="customer-17").found

    def test_the_owners_own_copy_is_nobody_elses(self, folder):
        assert not verify_hub_model(folder, KEY, recipient="customer-17").found

    def test_with_a_claim_given(self, tmp_path):
        scheme = Scheme(bits=16)
        tensors = vit(self.SEVENTEEN, scheme)
        stolen = save_model(tmp_path / "copy", like_timm(tensors))
        for key in (KEY, self.SEVENTEEN):
            claim = claim_about(tensors, key, scheme=scheme)
            evidence = verify_hub_model(stolen, KEY, claim=claim, recipient="customer-17")
            assert (evidence.found, evidence.bits) == (True, 16)

    def test_nobody(self, folder):
        with pytest.raises(KeyFileError, match="needs a name"):
            verify_hub_model(folder, KEY, recipient="")


class TestRevisions:
    def test_branches_tags_shas_and_pull_requests(self, hub, tmp_path):
        api = HfApi()
        marked = api.model_info("demo/vit").sha
        api.create_tag("demo/vit", tag="v1")
        api.create_branch("demo/vit", branch="old")
        unmarked = save_model(tmp_path / "unmarked", vit(None))
        now = push("demo/vit", unmarked)
        weights = {WEIGHTS: (tmp_path / "own" / WEIGHTS).read_bytes()}
        proposed = push("demo/vit", weights, create_pr=True)
        for revision, sha, verdict in (
            (None, now, "not found"),
            ("main", now, "not found"),
            ("v1", marked, "found"),
            ("old", marked, "found"),
            ("refs/heads/old", marked, "found"),
            (marked, marked, "found"),
            ("refs/pr/1", proposed, "found"),
        ):
            evidence = verify_hub_model("demo/vit", KEY, revision=revision)
            assert (evidence.revision, evidence.verdict) == (sha, verdict), revision

    def test_a_push_during_the_read_changes_nothing(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/large")
        marked, plain = (
            save_model(tmp_path / name, marked_arrays(LARGE, key))
            for name, key in (("marked", KEY), ("plain", None))
        )
        for first, second, verdict in ((plain, marked, "not found"), (marked, plain, "found")):
            pinned = push("demo/large", first)
            pushed = []

            def push_once(*_, pushed=pushed, second=second):
                if not pushed:
                    pushed.append(push("demo/large", second))

            evidence = verify_hub_model("demo/large", KEY, read="all", progress=push_once)
            assert pushed
            assert (evidence.verdict, evidence.revision) == (verdict, pinned)
            assert verify_hub_model("demo/large", KEY).revision == pushed[0]

    def test_a_folder_has_none(self, folder):
        with pytest.raises(HubError, match="has no revision"):
            verify_hub_model(folder, KEY, revision="main")


class TestCommittedAt:
    def test_the_first_commit_with_the_claim(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/vit")
        own = save_model(tmp_path / "own", vit(), claim_about(vit()))
        claim = (own / CLAIM_FILE).read_bytes()
        push("demo/vit", {"notes.md": b"before"})
        push("demo/vit", {WEIGHTS: (own / WEIGHTS).read_bytes()})
        assert verify_hub_model("demo/vit", KEY).committed_at is None
        first = push("demo/vit", {CLAIM_FILE: claim})
        assert verify_hub_model("demo/vit", KEY).committed_at == first
        for text in (b"1", b"2", b"3"):
            push("demo/vit", {"notes.md": text})
        # A later claim of the same key, about a second training: still the first counts.
        again = claim_about(vit(), scheme=Scheme(decides="soft", strength=0.3))
        push("demo/vit", {CLAIM_FILE: again.to_bytes()})
        evidence = verify_hub_model("demo/vit", KEY)
        assert evidence.committed_at == first != evidence.revision
        # As it was then, and with the claim in a repo of its own.
        assert verify_hub_model("demo/vit", KEY, revision=first).committed_at == first
        stolen = save_model(tmp_path / "stolen", vit())
        assert verify_hub_model(stolen, KEY, claim="demo/vit").committed_at == first
        # Without a key too: who was first is for everybody to see.
        push("demo/vit", {CLAIM_FILE: claim})
        assert verify_hub_model("demo/vit").committed_at == first

    def test_claims_of_others_do_not_count(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/vit")
        own = save_model(tmp_path / "own", vit(), claim_about(vit()))
        claim = json.loads((own / CLAIM_FILE).read_bytes())
        broken = {**claim, "owner": "somebody"}
        push("demo/vit", {CLAIM_FILE: claim_about(vit(), THIEF).to_bytes()})
        push("demo/vit", {CLAIM_FILE: json.dumps(broken).encode()})
        push("demo/vit", {CLAIM_FILE: b"no claim"})
        first = push("demo/vit", own)
        assert verify_hub_model("demo/vit", KEY).committed_at == first
        api = HfApi()
        operations = [CommitOperationDelete(CLAIM_FILE)]
        api.create_commit("demo/vit", operations, commit_message="x")
        evidence = verify_hub_model("demo/vit", KEY)
        assert (evidence.found, evidence.committed_at) == (True, None)

    def test_nor_does_the_claim_right_before(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/vit")
        own = save_model(tmp_path / "own", vit(), claim_about(vit()))
        push("demo/vit", {CLAIM_FILE: claim_about(vit(), THIEF).to_bytes()})
        first = push("demo/vit", own)
        assert verify_hub_model("demo/vit", KEY).committed_at == first
        assert verify_hub_model("demo/vit").committed_at == first

    def test_a_thiefs_claim_has_no_date_for_the_owner(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("thief/vit")
        stolen = save_model(tmp_path / "stolen", vit(), claim_about(vit(), THIEF))
        push("thief/vit", stolen, token=loopback_hub.add_user("thief"))
        evidence = verify_hub_model("thief/vit", KEY)
        assert (evidence.found, evidence.committed_at) == (True, None)

    def test_folders_have_none(self, tmp_path):
        own = save_model(tmp_path / "own", vit(), claim_about(vit()))
        for options in ({}, {"claim": own}, {"claim": own / CLAIM_FILE}):
            evidence = verify_hub_model(own, KEY, **options)
            assert (evidence.found, evidence.committed_at) == (True, None)


class TestWithoutAKey:
    def test_what_anyone_can_check(self, hub):
        evidence = verify_hub_model("demo/vit")
        assert evidence.verdict == "not checked"
        assert evidence.found is False
        assert (evidence.log10_p, evidence.matched, evidence.reading) == (None, None, None)
        assert (evidence.key_fingerprint, evidence.tries) == (None, 0)
        assert evidence.committed_at == evidence.revision
        assert evidence.carriers == tuple(fc1(i) for i in range(LAYERS))
        assert list(evidence.to_dict()) == KEYS
        said = " ".join(evidence.notes)
        assert "All 6 claimed tensors are here, unchanged" in said
        assert "Ownership was not tested" in said

    def test_weights_that_changed(self, hub, tmp_path):
        changed = vit()
        changed[fc1(2)][0, 0] += 1e-3
        push("demo/vit", {WEIGHTS: (save_model(tmp_path / "x", changed) / WEIGHTS).read_bytes()})
        with pytest.raises(ClaimError, match="The weights are not those claimed") as caught:
            verify_hub_model("demo/vit")
        assert fc1(2) in str(caught.value)
        assert "sha256" in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: {n: v for n, v in t.items() if n != fc1(0)}, "no such tensor"),
            (lambda t: t | {fc1(0): t[fc1(0)].half()}, "F16 [256, 64]"),
            (lambda t: t | {fc1(0): torch.zeros(256, 65)}, "[256, 65]"),
        ],
    )
    def test_tensors_that_changed(self, tmp_path, change, words):
        folder = save_model(tmp_path / "m", change(vit()), claim_about(vit()))
        with pytest.raises(ClaimError) as caught:
            verify_hub_model(folder)
        assert words in str(caught.value)

    def test_secret_carriers(self, tmp_path):
        claim = claim_about(vit(), names=[fc1(0)], secret_carriers=True)
        evidence = verify_hub_model(save_model(tmp_path / "own", vit(), claim))
        assert "secret, so their digests were not checked" in " ".join(evidence.notes)
        assert evidence.carriers == ()

    def test_a_claim_given(self, folder, hub):
        for claim in (claim_about(vit()), "demo/vit"):
            assert verify_hub_model(folder, claim=claim).verdict == "not checked"

    def test_nothing_to_check(self, folder):
        with pytest.raises(ClaimError, match="nothing to check"):
            verify_hub_model(folder)


class TestNull:
    """False alarms of the whole procedure, over keys: related models are no independent samples."""

    SHAPES = {f"blocks.{i}.mlp.fc1.weight": (128, 48) for i in range(4)}  # noqa: RUF012
    KEYS = 300
    ALPHA = 0.05

    @pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
    @pytest.mark.parametrize(
        ("renamed", "tries"), [(False, 6 + 4), (True, 6 + 4 + 16)], ids=["direct", "renamed"]
    )
    def test_wrong_keys(self, tmp_path, monkeypatch, marked, renamed, tries):
        # Six looks at so small a model, as at a large one.
        monkeypatch.setattr("hf_watermark.readings._FIRST_LOOK", 2**12)
        tensors = marked_arrays(self.SHAPES, KEY if marked else None, strength=0.3)
        template = claim_about(tensors)
        new = "layer" if renamed else "blocks"
        stolen = {name.replace("blocks", new): tensor for name, tensor in tensors.items()}
        folder = save_model(tmp_path / "m", stolen)
        right = verify_hub_model(folder, KEY, claim=template)
        assert right.found is marked
        assert right.tries == tries
        outcomes = []
        for number in range(self.KEYS):
            key = another_key(number)
            claim = Claim.make(key, Scheme(), template.carriers)
            outcomes.append(verify_hub_model(folder, key, claim=claim, alpha=self.ALPHA))
        p = np.array([evidence.log10_p for evidence in outcomes])
        # Bonferroni: at most alpha. One such test in a thousand would fail here by chance.
        alarms = sum(evidence.found for evidence in outcomes)
        assert alarms == np.count_nonzero(p <= math.log10(self.ALPHA))
        assert alarms <= binom.ppf(0.999, self.KEYS, self.ALPHA)
        assert p.min() > math.log10(0.001 / self.KEYS)
        # Nor is it conservative for nothing: looks and carriers overlap, so less than alpha, but
        # of so many keys some come close.
        assert np.mean(p < math.log10(0.5)) > 0.05
        assert p.min() < math.log10(self.ALPHA)

    def test_the_right_key_among_them(self, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        best = min(verify_hub_model(folder, another_key(n)).log10_p for n in range(50))
        assert verify_hub_model(folder, KEY).log10_p < best - 100


class TestWhatIsFetched:
    ALLOWED = re.compile(
        r"/api/models/demo/(vit|large)(/revision/[\w%.-]+)?\?blobs=true"
        r"|/api/models/demo/(vit|large)/commits/[0-9a-f]{40}\?limit=\d+"
        r"|/demo/(vit|large)/resolve/[0-9a-f]{40}/"
        r"(watermark\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?)"
        r"|/cdn/models/demo/(vit|large)/resolve/[0-9a-f]{40}/model[\w-]*\.safetensors\?signature=.*"
    )

    def check(self, hub):
        assert hub.requests
        for one in hub.requests:
            assert one.method == "GET"
            assert self.ALLOWED.fullmatch(one.path), one.path
            if ".safetensors" in one.path and "index" not in one.path:
                assert re.fullmatch(r"bytes=\d+-\d+", one.range or ""), one.path
                assert one.sent <= 4 * 2**20

    def test_ranges_and_nothing_else(self, hub):
        for key in (KEY, THIEF):
            evidence = verify_hub_model("demo/vit", key)
            assert 0 < evidence.bytes_read < evidence.bytes_total / 2
        self.check(hub)

    def test_no_code_is_fetched_and_none_is_run(self, hub, tmp_path):
        trap = tmp_path / "trap"
        code = f"open({str(trap)!r}, 'w').write('executed')\n".encode()
        config = {
            "architectures": ["Evil"],
            "auto_map": {"AutoModel": "modeling_evil.Evil", "AutoConfig": "configuration_evil.E"},
            "model_type": "evil",
            "custom_pipelines": {"x": {"impl": "pipeline_evil.P"}},
        }
        pickle = b"cbuiltins\nexec\n(S'" + code.replace(b"'", b'"').strip() + b"'\ntR."
        push(
            "demo/vit",
            {
                "config.json": json.dumps(config).encode(),
                "modeling_evil.py": code,
                "configuration_evil.py": code,
                "pipeline_evil.py": code,
                "__init__.py": code,
                "setup.py": code,
                "pytorch_model.bin": pickle,
                "training_args.bin": pickle,
                "preprocessor_config.json": b'{"image_processor_type": "Evil"}',
            },
        )
        hub.requests.clear()
        assert verify_hub_model("demo/vit", KEY).found
        assert verify_hub_model("demo/vit", claim="demo/vit").verdict == "not checked"
        self.check(hub)
        assert not trap.exists()
        local = tmp_path / "local"
        local.mkdir()
        for name in (
            "config.json",
            "modeling_evil.py",
            "__init__.py",
            "pytorch_model.bin",
            WEIGHTS,
        ):
            content = hub_file("demo/vit", name)
            (local / name).write_bytes(content)
        assert verify_hub_model(local, KEY).found
        assert not trap.exists()

    def test_shards_that_hold_no_carrier_are_read_no_further_than_their_header(
        self, loopback_hub, tmp_path
    ):
        loopback_hub.create_repo("demo/large")
        push("demo/large", save_model(tmp_path / "m", vit(), shard="100KB"))
        loopback_hub.requests.clear()
        evidence = verify_hub_model("demo/large", KEY)
        assert evidence.found
        self.check(loopback_hub)
        seen = [one for one in loopback_hub.requests if one.origin == "cdn"]
        assert sum(one.sent for one in seen) <= evidence.bytes_read

    def test_bytes_read_are_those_that_were_sent(self, hub):
        evidence = verify_hub_model("demo/vit", THIEF)
        sent = sum(
            one.sent for one in hub.requests if "/resolve/" in one.path and one.status in (200, 206)
        )
        assert evidence.bytes_read == sent
        hub.requests.clear()
        hub.create_repo("demo/other")
        claim = {CLAIM_FILE: claim_about(vit()).to_bytes()}
        push("demo/other", claim)
        hub.requests.clear()
        evidence = verify_hub_model("demo/vit", KEY, claim="demo/other")
        sent = sum(
            one.sent for one in hub.requests if "/resolve/" in one.path and one.status in (200, 206)
        )
        assert evidence.bytes_read == sent
        assert CLAIM_FILE in paths(hub)

    def test_early_stop(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/large")
        push("demo/large", save_model(tmp_path / "m", marked_arrays(LARGE, KEY)))
        loopback_hub.requests.clear()
        auto = verify_hub_model("demo/large", KEY)
        everything = verify_hub_model("demo/large", KEY, read="all")
        assert auto.verdict == everything.verdict == "found"
        assert auto.bytes_read < 0.45 * everything.bytes_read
        assert auto.log10_p > everything.log10_p
        wrong = [verify_hub_model("demo/large", THIEF, read=read) for read in ("auto", "all")]
        assert [evidence.verdict for evidence in wrong] == ["not found"] * 2
        assert wrong[0].bytes_read == wrong[1].bytes_read
        self.check(loopback_hub)

    def test_the_schedule_depends_on_shapes_alone(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/large")
        asked = []
        for seed, key in ((1, THIEF), (2, another_key(0))):
            push("demo/large", save_model(tmp_path / "m", marked_arrays(LARGE, None, seed=seed)))
            loopback_hub.requests.clear()
            assert not verify_hub_model("demo/large", key).found
            asked.append(sorted(one.range for one in loopback_hub.requests if one.origin == "cdn"))
        assert len(asked[0]) > 8
        assert asked[0] == asked[1]


def hub_file(repo, path):
    from hf_watermark.hub import HubFiles

    return HubFiles(repo).read(path, 10**8)


MEASURE = """
import pathlib, re, sys
from hf_watermark import OwnerKey
from hf_watermark.errors import WatermarkError
from hf_watermark.verify import verify_hub_model
import hf_watermark.checkpoint, hf_watermark.readings, hf_watermark.hub
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024
before = peak()
key = OwnerKey(bytes(range(32)))
try:
    print(verify_hub_model(sys.argv[1], key, read="all").verdict)
except WatermarkError as error:
    print(type(error).__name__, error)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and makes sparse files")
class TestMemory:
    def measured(self, where, hub=None):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(where)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin"} | (hub.environment() if hub else {}),
            # A machine without this limit would swap for minutes before it failed.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said, grown = done.stdout.strip().rsplit("\n", 1)
        return said, int(grown)

    def sparse(self, path, shapes, dtype="F32", width=4):
        header, at = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape) * width
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
        return path

    @pytest.mark.parametrize(
        "shape",
        [(8, 2**31), (2**31, 8), (2**35, 8), (64, 2**10, 2**10, 2**8)],
        ids=str,
    )
    def test_a_giant_tensor(self, tmp_path, shape):
        # The file is really that long, and nearly empty on the disk.
        path = self.sparse(tmp_path / WEIGHTS, {"layers.0.weight": shape})
        said, grown = self.measured(path)
        assert said.startswith("CarrierError The suspect's layers are too large")
        assert "--claim" in said
        assert grown < 50

    def test_many_large_tensors(self, tmp_path):
        shapes = {f"layers.{i}.weight": (8, 100_000) for i in range(400)}
        said, grown = self.measured(self.sparse(tmp_path / WEIGHTS, shapes))
        assert "too large" in said
        assert grown < 50

    def test_a_giant_header_is_only_declared(self, tmp_path):
        for length in (2**62, 2**40, 15 * 2**20):
            (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
            said, grown = self.measured(tmp_path / WEIGHTS)
            assert said.startswith("MalformedCheckpointError")
            assert grown < 20

    def test_giant_neighbours_of_the_carriers(self, tmp_path):
        # A vocabulary of 64 GiB beside ordinary layers: never touched.
        shapes = {"embed.weight": (2**24, 2**10)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (512, 128) for i in range(4)}
        said, grown = self.measured(self.sparse(tmp_path / WEIGHTS, shapes))
        assert said == "not found"
        assert grown < 60

    def test_carriers_are_read_piece_by_piece(self, loopback_hub, tmp_path):
        shapes = {f"blocks.{i}.mlp.fc1.weight": (4096, 2048) for i in range(4)}
        path = save_model(tmp_path / "m", marked_arrays(shapes, None)) / WEIGHTS
        size = path.stat().st_size >> 20
        assert size >= 128
        said, grown = self.measured(path)
        assert said == "not found"
        assert grown < 100
        loopback_hub.create_repo("demo/large")
        push("demo/large", {WEIGHTS: path.read_bytes()})
        said, grown = self.measured("demo/large", loopback_hub)
        assert said == "not found"
        assert grown < 120


class TestCarriersThatCannotBeRead:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_not_finite(self, tmp_path, value, dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in vit().items()}
        tensors[fc1(4)][17, 3] = value
        folder = save_model(tmp_path / "m", tensors)
        for options in ({}, {"read": "all"}, {"claim": claim_about(vit())}):
            with pytest.raises(CarrierError, match="not finite") as caught:
                verify_hub_model(folder, KEY, **options)
            assert fc1(4) in str(caught.value)
        with pytest.raises(CarrierError):
            verify_hub_model(folder, THIEF)

    def test_not_finite_elsewhere(self, tmp_path):
        # A head that diverged is none of our business.
        tensors = vit() | {"classifier.weight": torch.full((10, 64), math.nan)}
        assert verify_hub_model(save_model(tmp_path / "m", tensors), KEY).found

    def test_zeros(self, tmp_path):
        tensors = {name: torch.zeros_like(tensor) for name, tensor in vit().items()}
        evidence = verify_hub_model(save_model(tmp_path / "m", tensors), KEY)
        assert (evidence.verdict, evidence.log10_p) == ("not found", 0.0)

    @pytest.mark.parametrize("scale", [1e-30, 1e30, 3e37])
    def test_weights_of_strange_size(self, tmp_path, scale):
        tensors = {name: tensor * scale for name, tensor in vit().items()}
        folder = save_model(tmp_path / "m", tensors)
        assert verify_hub_model(folder, KEY).log10_p < -100
        assert not verify_hub_model(folder, THIEF).found

    def test_quantised(self, tmp_path):
        tensors = {
            name: (tensor * 127).to(torch.int8) if "dense.weight" in name else tensor
            for name, tensor in vit().items()
        }
        with pytest.raises(CarrierError, match="before it was quantised"):
            verify_hub_model(save_model(tmp_path / "m", tensors), KEY)

    def test_missing(self, tmp_path):
        tensors = {name: tensor for name, tensor in vit().items() if "intermediate" not in name}
        with pytest.raises(CarrierMissingError, match="none of the carriers"):
            verify_hub_model(save_model(tmp_path / "m", tensors), KEY, claim=claim_about(vit()))


def test_the_key_is_unchanged(tmp_path, hub):
    KEY.save(tmp_path / "acme.key")
    before = (tmp_path / "acme.key").read_bytes()
    verify_hub_model("demo/vit", OwnerKey.load(tmp_path / "acme.key"))
    assert (tmp_path / "acme.key").read_bytes() == before
