"""Every line of the list of bad input, over real HTTP and with real files: exit 2 and one line.

The parts have tests of their own (test_safetensors_ranges, test_checkpoint, test_hub, test_key,
test_evidence); here it is the command that is run, as a user runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import time

import pytest
import torch
from marked_models import (
    KEY,
    QUICK,
    THIEF,
    WEIGHTS,
    claim_about,
    evidence_of,
    fc1,
    marked_arrays,
    push,
    refused,
    run,
    save_model,
    vit,
)

from hf_watermark.errors import ClaimError, MalformedCheckpointError, WatermarkError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.hub import HubFiles
from hf_watermark.key import FILE_FORMAT
from hf_watermark.verify import verify_hub_model

INDEX = "model.safetensors.index.json"
SECRETS = (bytes(range(32)).hex(), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")


@pytest.fixture
def owner(tmp_path):
    """The owner's key file, which nothing may change."""
    KEY.save(tmp_path / "acme.key")
    before = (tmp_path / "acme.key").read_bytes()
    yield tmp_path / "acme.key"
    assert (tmp_path / "acme.key").read_bytes() == before
    assert stat.S_IMODE((tmp_path / "acme.key").stat().st_mode) == 0o600


@pytest.fixture
def hub(loopback_hub, tmp_path):
    loopback_hub.create_repo("demo/vit")
    push("demo/vit", save_model(tmp_path / "own", vit(), claim_about(vit())))
    loopback_hub.requests.clear()
    return loopback_hub


@pytest.fixture
def published(loopback_hub, owner, tmp_path):
    """Publish files as a repo and verify it: returns a function that gives the error's line."""
    loopback_hub.create_repo("demo/bad")

    def verify(files, *words, claim=None, advice=True):
        if not isinstance(files, dict):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        head = push("demo/bad", files)
        options = () if claim is None else ("--claim", claim)
        line = refused(
            run("demo/bad", "--key", owner, *options, hub=loopback_hub), *words, advice=advice
        )
        assert HubFiles("demo/bad").revision == head
        # The same files in a folder are told the same way.
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        for name, content in files.items():
            (tmp_path / "bad" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "bad" / name).write_bytes(content)
        with pytest.raises(WatermarkError) as caught:
            verify_hub_model(tmp_path / "bad", KEY, claim=claim)
        assert all(word in str(caught.value) for word in words)
        for secret in SECRETS:
            assert secret not in line
        return line

    return verify


class TestRepos:
    def test_missing(self, hub, owner):
        line = refused(run("demo/none", "--key", owner, hub=hub), "no repo 'demo/none'")
        assert "Check the spelling" in line
        refused(run("demo/none", "--key", owner, hub=hub, token=""), "or it is private")

    @pytest.mark.parametrize("who", ["nobody", "another user"])
    def test_private(self, hub, owner, tmp_path, who):
        hub.create_repo("demo/secret", private=True)
        push("demo/secret", tmp_path / "own")
        token = "" if who == "nobody" else hub.add_user("other")
        line = refused(run("demo/secret", "--key", owner, hub=hub, token=token), "it is private")
        assert "--token" in line
        assert not token or token not in line

    @pytest.mark.parametrize("who", ["nobody", "another user"])
    def test_gated(self, hub, owner, tmp_path, who):
        hub.create_repo("demo/gated", gated=True)
        push("demo/gated", tmp_path / "own")
        token = "" if who == "nobody" else hub.add_user("other")
        line = refused(run("demo/gated", "--key", owner, hub=hub, token=token), "is gated")
        assert "Accept its conditions" in line
        if token:
            hub.grant_access("demo/gated", "other")
            assert run("demo/gated", "--key", owner, hub=hub, token=token).returncode == 0

    @pytest.mark.parametrize("revision", ["v9", "0" * 40, "refs/pr/1", "../main", "a b", "-x"])
    def test_revision_missing(self, hub, owner, revision):
        done = run("demo/vit", "--key", owner, f"--revision={revision}", hub=hub)
        expected = "expected a branch, a tag, refs/pr/N or a full commit sha"
        refused(done, "'demo/vit'", expected, advice=False)

    def test_of_the_claim(self, hub, owner):
        for claim, words in (("demo/none", "no repo 'demo/none'"), ("demo/empty", "no claim in")):
            if claim == "demo/empty":
                hub.create_repo("demo/empty")
            refused(run("demo/vit", "--key", owner, "--claim", claim, hub=hub), words)

    def test_no_network(self, hub, owner):
        environment = hub.environment() | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        done = run("demo/vit", "--key", owner, environment=environment, patience=QUICK)
        refused(done, "'demo/vit'", "after 5 tries", "Check the connection")
        offline = run("demo/vit", "--key", owner, environment={"HF_HUB_OFFLINE": "1"})
        refused(offline, "offline mode", "HF_HUB_OFFLINE")


class TestNoSafetensors:
    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "model.pt", "model.pth", "tf_model.h5", "flax_model.msgpack"]
    )
    def test_only_pickles(self, published, name):
        line = published({name: b"\x80\x04.", "config.json": b"{}"}, "pickles are never opened")
        assert name in line
        assert "save_pretrained" in line
        assert "https://huggingface.co/spaces/safetensors/convert" in line

    def test_nothing(self, published):
        published({"config.json": b"{}"}, "has no weights", "expected model.safetensors")

    def test_in_a_folder_below(self, published, tmp_path):
        weights = (save_model(tmp_path / "m", vit()) / WEIGHTS).read_bytes()
        published({f"unet/{WEIGHTS}": weights}, "has no weights", "in folders below")

    def test_several(self, published, tmp_path):
        weights = (save_model(tmp_path / "m", vit()) / WEIGHTS).read_bytes()
        files = {"a.safetensors": weights, "b.safetensors": weights}
        published(files, "not clear which file", "a.safetensors", "b.safetensors")


def header(entries: object, data: int = 0, *, length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    "an empty file": (b"", "no safetensors file"),
    "seven bytes": (b"1234567", "no safetensors file"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
        "Git LFS pointer",
    ),
    "an error page": (b"<!doctype html><html><body>Not found</body></html>", "error page"),
    "length zero": (header(b"", length=0), "length field of 0"),
    "length beyond the file": (header({"a": entry()}, 16, length=10**6), "length field of 1000000"),
    "length of exabytes": (header({"a": entry()}, 16, length=2**63), f"length field of {2**63}"),
    "no JSON": (header(b"{'a': 1}"), "not the JSON"),
    "no UTF-8": (header(b'{"\xff": 1}'), "not UTF-8"),
    "an array": (header(b"[1, 2]"), "does not start with a brace"),
    "NaN": (header(b'{"a": NaN}'), "only integers"),
    "a key twice": (header(b'{"a": {}, "a": {}}'), "twice"),
    "metadata": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "fields missing": (header({"a": {"dtype": "F32"}}), "exactly dtype, shape and data_offsets"),
    "an unknown dtype": (header({"a": entry(dtype="F31")}, 16), "'F31'"),
    "a dtype that is a list": (header({"a": entry(dtype=["F32"])}, 16), "a dtype"),
    "a negative side": (header({"a": entry(shape=(-2, -2))}, 16), "natural numbers"),
    "a broken side": (header({"a": entry(shape=(2.0, 2))}, 16), "only integers"),
    "a giant shape": (header({"a": entry(shape=(2**62, 4))}, 16), "2**63 elements"),
    "a shape that is not the bytes": (header({"a": entry(shape=(2, 3))}, 16), "24 bytes"),
    "offsets backwards": (header({"a": entry(offsets=(16, 0))}, 16), "two growing"),
    "offsets beyond the file": (header({"a": entry()}, 8), "is truncated"),
    "overlap": (
        header({"a": entry(), "b": entry(offsets=(8, 24))}, 24),
        "overlaps another",
    ),
    "a hole": (header({"a": entry(), "b": entry(offsets=(20, 36))}, 36), "leaves a hole"),
    "bytes left over": (header({"a": entry()}, 20), "after its last tensor"),
    "a name for the terminal": (header({"\x1b[2J\nfound": entry(dtype="F31")}, 16), "malformed"),
}


class TestMalformed:
    @pytest.mark.parametrize(("content", "words"), MALFORMED.values(), ids=MALFORMED)
    def test_headers(self, published, content, words):
        line = published({WEIGHTS: content}, words)
        assert WEIGHTS in line
        assert "\x1b" not in line
        assert len(line) < 700

    def test_nesting(self, owner, tmp_path):
        content = header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)
        (tmp_path / WEIGHTS).write_bytes(content)
        refused(run(tmp_path / WEIGHTS, "--key", owner), "nested too deeply")

    @pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
    def test_truncated(self, published, tmp_path, keep):
        content = (save_model(tmp_path / "m", vit()) / WEIGHTS).read_bytes()
        line = published({WEIGHTS: content[: int(keep * len(content))]}, "truncated")
        assert f"got {int(keep * len(content))}" in line
        assert f"expected {len(content)} bytes" in line

    def test_truncated_in_the_header(self, published, tmp_path):
        content = (save_model(tmp_path / "m", vit()) / WEIGHTS).read_bytes()
        published({WEIGHTS: content[:200]}, "is truncated or no safetensors file")

    def test_a_shard(self, published, tmp_path):
        folder = save_model(tmp_path / "m", vit(), shard="400KB")
        shards = sorted(folder.glob("model-*"))
        shards[1].write_bytes(shards[1].read_bytes()[:-4])
        published(folder, shards[1].name, "is truncated")


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path):
        return save_model(tmp_path / "m", vit(), shard="400KB")

    @pytest.mark.parametrize(
        "path",
        [
            "../../../etc/passwd",
            "../demo/model.safetensors",
            "/etc/hosts.safetensors",
            "a/../../x.safetensors",
            "..\\x.safetensors",
            "C:x.safetensors",
            "https://evil.example/x.safetensors",
            "x\0.safetensors",
            "pytorch_model.bin",
            "",
        ],
    )
    def test_a_path_outside(self, published, sharded, path):
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][fc1(0)] = path
        (sharded / INDEX).write_text(json.dumps(index))
        published(sharded, "points outside the repo or at no safetensors file", "Do not load")

    def test_no_request_leaves_the_repo(self, loopback_hub, published, sharded):
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][fc1(0)] = "../../other/repo/resolve/main/model.safetensors"
        (sharded / INDEX).write_text(json.dumps(index))
        published(sharded, "points outside")
        assert not [one for one in loopback_hub.requests if "other" in one.path]

    def test_a_shard_missing(self, published, sharded):
        gone = sorted(sharded.glob("model-*"))[1]
        gone.unlink()
        published(sharded, f"shard '{gone.name}'", "is missing", "Upload the whole model again")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is not JSON"),
            (b"{", "is not JSON"),
            (b"[" * 100_000, "is not JSON"),
            (b"[]", "has no weight_map"),
            (b'{"weight_map": {}}', "has no weight_map"),
            (b'{"weight_map": {"a": 1}}', "has no weight_map"),
        ],
    )
    def test_an_index_that_is_none(self, published, sharded, content, words):
        (sharded / INDEX).write_bytes(content)
        published(sharded, INDEX, words, advice="JSON" in words)

    def test_an_index_that_lies(self, published, sharded):
        index = json.loads((sharded / INDEX).read_text())
        shards = sorted(set(index["weight_map"].values()))
        right = index["weight_map"][fc1(0)]
        index["weight_map"][fc1(0)] = next(name for name in shards if name != right)
        (sharded / INDEX).write_text(json.dumps(index))
        published(sharded, "misplaces tensor", fc1(0), right)

    def test_a_tensor_in_two_shards(self, published, sharded):
        shards = sorted(sharded.glob("model-*"))
        shutil.copy(shards[0], shards[1])
        published(sharded, "is in two files")


class TestCarriers:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, published, tmp_path, value):
        tensors = vit()
        tensors[fc1(1)][3, 5] = value
        folder = save_model(tmp_path / "m", tensors)
        line = published(folder, fc1(1), "not finite", "1 of ")
        assert "Use a checkpoint from before" in line

    def test_missing(self, published, tmp_path):
        (tmp_path / "claim.json").write_bytes(claim_about(vit()).to_bytes())
        folder = save_model(
            tmp_path / "m", {n: t for n, t in vit().items() if "intermediate" not in n}
        )
        line = published(folder, "none of the carriers", "[256, 64]",
                         claim=tmp_path / "claim.json")  # fmt: skip
        assert "Check that this is a copy" in line

    def test_no_carriers_at_all(self, published, tmp_path):
        tensors = {"norm.weight": torch.ones(64), "head.weight": torch.ones(64, 64)}
        published(save_model(tmp_path / "m", tensors), "No tensor can carry a mark")

    def test_quantised(self, published, tmp_path):
        tensors = {
            n: (t * 127).to(torch.int8) if "dense.weight" in n else t for n, t in vit().items()
        }
        published(save_model(tmp_path / "m", tensors), "cannot carry a mark", "quantised")


def edited(**changes) -> bytes:
    fields = json.loads(claim_about(vit()).to_bytes())
    for key, value in changes.items():
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    return json.dumps(fields).encode()


def with_another_carrier() -> bytes:
    fields = json.loads(claim_about(vit()).to_bytes())
    fields["carriers"][0]["name"] = fc1(5)
    return json.dumps(fields).encode()


UNREADABLE = {
    "empty": (b"", "no JSON"),
    "no JSON": (b"{", "no JSON"),
    "no text": (b"\x80\x04\x95", "no JSON"),
    "nesting": (b"[" * 100_000, "no JSON"),
    "a list": (b"[]", "JSON that is no claim"),
    "another file": (b'{"architectures": ["ViT"]}', "JSON that is no claim"),
    "a newer format": (edited(format="hf-watermark/2"), "of another format", "pip install -U"),
    "a field missing": (edited(commitment=None), "fields that are missing or of the wrong type"),
    "a field of another type": (edited(carriers={"a": 1}), "fields that are missing"),
    "a carrier of another type": (edited(carriers=[{"name": 1}]), "fields that are missing"),
    "an unknown scheme": (edited(scheme="magic-64"), "fields that are missing"),
    "a signature that is none": (edited(signature="00" * 63), "fields that are missing"),
    "a name for the terminal": (edited(owner="\x1b[2J\nFOUND"), "The claim in"),
    "half a sign": (json.dumps({"format": "hf-watermark/1", "owner": "\ud800"}).encode(), "claim"),
    "the owner edited": (edited(owner="thief"), "was edited", "expected a signature"),
    "the scheme edited": (edited(scheme="spread-random-32-projection-auto-soft"), "was edited"),
    "the commitment edited": (edited(commitment=THIEF.commitment), "was edited"),
    "a foreign public key": (edited(public_key=THIEF.public_key), "was edited"),
    "a public key that is no point": (edited(public_key="ff" * 32), "was edited"),
    "the signature edited": (edited(signature="00" * 64), "was edited"),
    "the carriers edited": (with_another_carrier(), "was edited"),
}


class TestClaims:
    @pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
    def test_the_repos_own(self, published, tmp_path, case):
        content, *words = case
        folder = save_model(tmp_path / "m", vit())
        (folder / CLAIM_FILE).write_bytes(content)
        line = published(folder, *words)
        assert "\x1b" not in line
        # With the owner's copy the model is read all the same; without a key there is nothing else.
        assert verify_hub_model(folder, KEY, claim=claim_about(vit())).found
        with pytest.raises(ClaimError):
            verify_hub_model(folder)

    @pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
    def test_given(self, owner, tmp_path, case):
        content, *words = case
        folder = save_model(tmp_path / "m", vit(), claim_about(vit()))
        (tmp_path / "claim.json").write_bytes(content)
        line = refused(
            run(folder, "--key", owner, "--claim", tmp_path / "claim.json"), *words, "claim.json"
        )
        assert "\x1b" not in line

    def test_given_from_a_repo(self, hub, owner, tmp_path):
        hub.create_repo("demo/claims")
        stolen = save_model(tmp_path / "stolen", vit())
        for content, *words in (UNREADABLE["the owner edited"], UNREADABLE["no JSON"]):
            push("demo/claims", {CLAIM_FILE: content})
            done = run(stolen, "--key", owner, "--claim", "demo/claims", hub=hub)
            refused(done, *words, "demo/claims")

    def test_too_large(self, published, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        (folder / CLAIM_FILE).write_bytes(b" " * (5 * 2**20))
        published(folder, CLAIM_FILE, "too large", advice=False)

    def test_a_file_that_is_not_there(self, owner, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        for claim in (tmp_path / "none.json", "./none.json", "none.json"):
            done = run(folder, "--key", owner, "--claim", claim, cwd=tmp_path)
            refused(done, "none.json")

    def test_a_path_that_no_file_has(self, owner, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        refused(run(folder, "--key", owner, "--claim", "x" * 5000))

    def test_a_file_that_cannot_be_read(self, owner, tmp_path):
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        folder = save_model(tmp_path / "m", vit())
        (tmp_path / "claim.json").write_bytes(claim_about(vit()).to_bytes())
        (tmp_path / "claim.json").chmod(0)
        done = run(folder, "--key", owner, "--claim", tmp_path / "claim.json")
        refused(done, "cannot be read", "Permission denied")

    def test_of_another_key(self, owner, tmp_path):
        folder = save_model(tmp_path / "m", vit())
        (tmp_path / "claim.json").write_bytes(claim_about(vit(), THIEF).to_bytes())
        done = run(folder, "--key", owner, "--claim", tmp_path / "claim.json")
        refused(done, "does not belong to this key", KEY.commitment[:16], THIEF.commitment[:16])

    def test_a_public_copy_that_hides_the_carriers(self, owner, tmp_path):
        claim = claim_about(vit(), names=[fc1(0)], secret_carriers=True)
        folder = save_model(tmp_path / "m", vit(), claim)
        refused(run(folder, "--key", owner), "does not name its carriers", "--claim FILE")
        folder = save_model(tmp_path / "m", vit())
        (tmp_path / "claim.json").write_bytes(claim.public.to_bytes())
        done = run(folder, "--key", owner, "--claim", tmp_path / "claim.json")
        refused(done, "does not name its carriers")


def key_file(**changes) -> bytes:
    fields = {
        "format": FILE_FORMAT,
        "owner": "acme",
        "fingerprint": KEY.fingerprint,
        "secret": SECRETS[1],
    } | changes
    return json.dumps({k: v for k, v in fields.items() if v is not None}).encode()


BAD_KEYS = {
    "empty": (b"", "garbled", "an empty file"),
    "blank": (b" \n\n", "garbled", "an empty file"),
    "no JSON": (b"my key", "garbled", "no JSON"),
    "no text": (b"\x00\xff" * 40, "garbled"),
    "nesting": (b"[" * 50_000, "garbled"),
    "half of it": (key_file()[:60], "garbled", "no JSON"),
    "a list": (b"[]", "garbled", "no key"),
    "another file": (claim_about(vit()).to_bytes(), "garbled", "another format"),
    "a newer version": (key_file(format="hf-watermark-key/2"), "version 1", "'2'", "pip install"),
    "no secret": (key_file(secret=None), "garbled", "fields"),
    "a short secret": (key_file(secret="AAEC"), "garbled", "wrong size"),
    "a secret that is none": (key_file(secret="%%%"), "garbled"),
    "another secret": (key_file(secret="A" * 43 + "="), "garbled", "fingerprint"),
    "a number": (key_file(secret=5), "garbled"),
    "sealed with nothing": (key_file(encrypted={}), "fields"),
    "sealed beyond all memory": (
        key_file(
            encrypted={"kdf": "scrypt", "cipher": "chacha20-poly1305", "n": 2**40, "r": 8, "p": 1,
                       "salt": "", "nonce": "", "sealed": ""}
        ),
        "unknown way of encrypting",
    ),
    "sealed with infinity": (
        key_file(encrypted={"kdf": "scrypt", "cipher": "chacha20-poly1305", "n": float("inf"),
                            "r": 8, "p": 1, "salt": "", "nonce": "", "sealed": ""}),
        "unknown way of encrypting",
    ),
    "too large": (key_file() + b" " * 100_000, "garbled", "too large"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good model, for bad keys."""
    return save_model(tmp_path_factory.mktemp("m") / "m", vit(), claim_about(vit()))


class TestKeys:
    @pytest.mark.parametrize("case", BAD_KEYS.values(), ids=BAD_KEYS)
    def test_files(self, folder, tmp_path, case):
        content, *words = case
        path = tmp_path / "bad.key"
        path.write_bytes(content)
        path.chmod(0o600)
        environment = {"HF_WATERMARK_PASSPHRASE": "x"} if b"encrypted" in content else {}
        line = refused(run(folder, "--key", path, environment=environment), *words, "bad.key")
        assert path.read_bytes() == content
        for secret in SECRETS:
            assert secret not in line
            assert secret[:20] not in line

    def test_missing(self, folder, tmp_path):
        refused(run(folder, "--key", tmp_path / "none.key"), "does not exist", "keygen")
        refused(run(folder, "--key", tmp_path), "cannot be read", "directory", advice=False)

    def test_a_wrong_passphrase(self, folder, tmp_path):
        path = tmp_path / "sealed.key"
        KEY.save(path, "right")
        before = path.read_bytes()
        refused(run(folder, "--key", path), "is encrypted", "got none", "HF_WATERMARK_PASSPHRASE")
        for given in ("qwertz", ""):
            done = run(folder, "--key", path, environment={"HF_WATERMARK_PASSPHRASE": given})
            line = refused(done, "does not open", "expected its passphrase", advice=False)
            assert "qwertz" not in line
        right = {"HF_WATERMARK_PASSPHRASE": "right"}
        assert run(folder, "--key", path, environment=right).returncode == 0
        assert path.read_bytes() == before

    def test_sealed_and_renamed(self, folder, tmp_path):
        path = tmp_path / "sealed.key"
        KEY.save(path, "right")
        fields = json.loads(path.read_bytes())
        path.write_text(json.dumps(fields | {"owner": "thief"}))
        done = run(folder, "--key", path, environment={"HF_WATERMARK_PASSPHRASE": "right"})
        refused(done, "does not open", "a file that was changed", advice=False)


class TestServer:
    """A server that fails, as the command meets it."""

    @pytest.fixture
    def arguments(self, owner):
        return ("demo/vit", "--key", owner, "--json")

    def test_a_range_answered_with_everything(self, hub, arguments, tmp_path):
        fault = hub.faults.add(path=r"/resolve/.*safetensors", ignore_range=True, times=None)
        line = refused(run(*arguments, hub=hub), "ignored the range", "expected HTTP 206")
        assert "HTTP 200" in line
        assert "proxy" in line
        assert fault.hits == 1  # no use to ask again

    @pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
    @pytest.mark.parametrize("where", ["/api/models/", r"/resolve/.*safetensors", "/commits/"])
    def test_storms(self, hub, arguments, status, where):
        hub.faults.add(path=where, status=status, times=None)
        done = run(*arguments, hub=hub, patience=QUICK)
        refused(done, f"HTTP {status}", "after 5 tries", "run it again")

    def test_a_storm_with_the_real_patience(self, hub, arguments):
        fault = hub.faults.add(path=r"/resolve/.*safetensors", status=503, times=None)
        begun = time.monotonic()
        refused(run(*arguments, hub=hub), "gave up", "HTTP 503", "after 5 tries")
        assert 7 < time.monotonic() - begun < 25
        assert fault.hits == 5

    def test_a_squall(self, hub, arguments):
        for status in (503, 429, 500):
            hub.faults.add(path=r"/resolve/.*safetensors", status=status, times=1)
        done = run(*arguments, hub=hub, patience=QUICK)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("bytes_sent", [0, 100, 40_000])
    def test_a_body_cut_once(self, hub, arguments, bytes_sent):
        whole = evidence_of(run(*arguments, hub=hub))
        fault = hub.faults.add(path=r"/resolve/.*safetensors", cut_body=bytes_sent, skip=2)
        done = run(*arguments, hub=hub, patience=QUICK)
        assert (done.returncode, done.stderr) == (0, "")
        assert fault.hits == 1
        evidence = evidence_of(done)
        assert evidence["log10_p"] == whole["log10_p"]
        # What was sent for nothing is counted too.
        assert whole["bytes_read"] <= evidence["bytes_read"] <= whole["bytes_read"] + bytes_sent

    @pytest.mark.parametrize("where", ["/api/models/", r"/resolve/.*safetensors", CLAIM_FILE])
    def test_a_body_cut_for_ever(self, hub, arguments, where):
        hub.faults.add(path=where, cut_body=50, times=None)
        done = run(*arguments, hub=hub, patience=QUICK)
        refused(done, "gave up", "after 5 tries", "run it again")

    def test_silence(self, hub, arguments):
        hub.faults.add(path=r"/resolve/.*safetensors", delay=10, times=None)
        done = run(*arguments, hub=hub, patience="tries=2, first_wait=0.01, timeout=0.5")
        refused(done, "no answer in time", "after 2 tries")

    def test_a_wrong_range(self, hub, arguments):
        hub.faults.add(
            path="safetensors", origin="cdn", header={"Content-Range": "bytes 0-1/2"}, times=None
        )
        refused(run(*arguments, hub=hub), "makes no sense", "bytes 0-1/2")

    def test_other_bytes_in_the_middle(self, hub, owner, tmp_path):
        # Weights that change under a pinned commit can only be a broken mirror: read as they are.
        push("demo/vit", {WEIGHTS: (save_model(tmp_path / "p", vit(None)) / WEIGHTS).read_bytes()})
        done = run("demo/vit", "--key", owner, hub=hub)
        assert done.returncode == 1
        refused(run("demo/vit", hub=hub), "The weights are not those claimed")

    def test_no_token_in_any_message(self, hub, arguments):
        for fault in (
            {"status": 500}, {"status": 403}, {"status": 404}, {"cut_body": 3},
            {"header": {"Content-Range": hub.token}, "origin": "cdn"},
        ):  # fmt: skip
            hub.faults.clear()
            hub.faults.add(path="safetensors", times=None, **fault)
            done = run(*arguments, "--token", hub.token, hub=hub, patience=QUICK)
            assert done.returncode == 2
            if "header" not in fault:
                assert hub.token not in done.stderr + done.stdout


def test_strange_files_in_a_folder(owner, tmp_path):
    folder = save_model(tmp_path / "m", vit())
    os.mkfifo(folder / CLAIM_FILE)
    os.symlink("/dev/zero", folder / "zero.safetensors")
    os.symlink(folder, folder / "loop")
    (folder / "unreadable").mkdir(mode=0)
    assert run(folder, "--key", owner).returncode == 0
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(run(folder, "--key", owner), "has no weights")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    shapes = {f"blocks.{i}.mlp.fc1.weight": (1024, 256) for i in range(4)}
    folder = save_model(tmp_path / "m", marked_arrays(shapes, None))
    size = (folder / WEIGHTS).stat().st_size

    def shrink(*_):
        os.truncate(folder / WEIGHTS, size // 2)

    with pytest.raises(MalformedCheckpointError, match="changed while it was read"):
        verify_hub_model(folder, KEY, progress=shrink)
