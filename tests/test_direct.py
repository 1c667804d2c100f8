"""Marks written into checkpoints on disk: what changes, what does not, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from marked_models import (
    KEY,
    THIEF,
    WEIGHTS,
    another_key,
    carriers_of,
    claim_about,
    fc1,
    push,
    save_model,
    vit,
)
from safetensors.torch import load_file, save_file

from hf_watermark import Claim, OwnerKey, Scheme
from hf_watermark import closed_form as closed_form_module
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.direct import Embedded, embed_checkpoint, scheme_for
from hf_watermark.errors import (
    CarrierError,
    CarrierMissingError,
    CheckpointError,
    ClaimError,
    HubError,
    KeyFileError,
    ModelTooSmallError,
    NotSafetensorsError,
    SchemeError,
    WatermarkError,
)
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.extraction import Extraction
from hf_watermark.files import FolderFiles
from hf_watermark.margins import TOLERANCE
from hf_watermark.projections import Projection
from hf_watermark.verify import verify_hub_model

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {"README.md": b"# A ViT\r\n", "sub/deep/notes.txt": b"\0\xff", "run.py": b"print()"}


@pytest.fixture
def source(tmp_path):
    return a_model(tmp_path / "source")


def a_model(folder: Path, dtype: str = "F32", shard: str | None = None) -> Path:
    """An unmarked ViT with other files beside it."""
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in vit(None).items()}
    save_model(folder, tensors, shard=shard)
    for path, content in OTHERS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def arrays_of(folder: Path, claim: Claim) -> list[np.ndarray]:
    tensors = tensors_of(folder)
    return [tensors[carrier.name].double().numpy() for carrier in claim.carriers]


def agreement(embedded: Embedded, key: OwnerKey = KEY) -> np.ndarray:
    """s_t z_t as a reader with all weights in float64 computes it."""
    claim = embedded.claim
    carriers = [claimed.carrier for claimed in claim.carriers]
    projection = Projection(key, Scheme.from_name(claim.scheme), carriers)
    return projection.message_signs * projection.responses(arrays_of(embedded.folder, claim))


def bytes_outside_carriers(folder: Path, names: list[str]) -> dict[str, bytes]:
    """All files but the claim, the carriers' bytes blanked."""
    checkpoint = Checkpoint.open(FolderFiles(folder))
    files = {path: bytearray(content) for path, content in contents(folder).items()}
    files.pop(CLAIM_FILE, None)
    for name in names:
        span = checkpoint.tensors[name]
        files[span.file][span.start : span.stop] = bytes(span.stop - span.start)
    return {path: bytes(content) for path, content in files.items()}


def found(folder: Path, key: OwnerKey = KEY, **options) -> float:
    """log10 p of a mark that must be found."""
    evidence = verify_hub_model(folder, key, **options)
    assert evidence.found, (evidence.log10_p, key)
    return evidence.log10_p


def alone(tmp_path: Path) -> set[str]:
    """What lies beside the source."""
    return {path.name for path in tmp_path.iterdir()} - {"source"}


class TestWhatChanges:
    @pytest.mark.parametrize("shard", [None, "60KB"], ids=["single", "sharded"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_carriers_bytes_only(self, tmp_path, dtype, shard):
        source = a_model(tmp_path / "source", dtype, shard)
        before = contents(source)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        names = [fc1(i) for i in range(6)]
        assert [claimed.name for claimed in embedded.claim.carriers] == names
        assert contents(source) == before
        assert set(contents(tmp_path / "out")) == {*before, CLAIM_FILE}
        assert bytes_outside_carriers(source, names) == bytes_outside_carriers(
            tmp_path / "out", names
        )
        old, new = tensors_of(source), tensors_of(tmp_path / "out")
        assert all(not torch.equal(old[name], new[name]) for name in names)
        assert (shard is None) == (WEIGHTS in before)
        assert not embedded.unchanged
        assert embedded.kept_claim is None
        assert embedded.unmarked == ()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_reported_is_there(self, tmp_path, dtype):
        source = a_model(tmp_path / "source", dtype)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        scheme = Scheme.from_name(embedded.claim.scheme)
        margin = scheme.margin(6 * 256 * 64)
        assert agreement(embedded).min() == pytest.approx(embedded.margin, abs=1e-4)
        assert embedded.margin >= margin * (1.0 - TOLERANCE)
        assert agreement(embedded).max() <= margin * 1.01
        changes = []
        for a, b in zip(
            arrays_of(source, embedded.claim),
            arrays_of(tmp_path / "out", embedded.claim),
            strict=True,
        ):
            changes.append(np.linalg.norm(b - a) / np.linalg.norm(a))
            assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=1e-3)
        assert embedded.largest_change == pytest.approx(max(changes), rel=1e-4)
        extraction = Extraction(
            Projection(KEY, scheme, [claimed.carrier for claimed in embedded.claim.carriers])
        )
        for i, w in enumerate(arrays_of(tmp_path / "out", embedded.claim)):
            extraction.add(i, 0, w)
        assert embedded.log10_p == pytest.approx(extraction.reading().log10_p, rel=1e-4)
        assert extraction.reading().matched == 64

    def test_it_is_found_and_nobody_else_s_is(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "out")
        assert found(tmp_path / "out", read="all") < -100
        assert verify_hub_model(tmp_path / "out", None).verdict == "not checked"
        (tmp_path / "out" / CLAIM_FILE).unlink()
        assert found(tmp_path / "out") < -6
        for folder, key in ((source, KEY), *((tmp_path / "out", another_key(i)) for i in range(5))):
            assert not verify_hub_model(folder, key).found

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_loads_and_answers_alike(self, tmp_path, dtype):
        from transformers import ViTForImageClassification

        source = a_model(tmp_path / "source", dtype)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        logits = []
        for folder in (source, tmp_path / "out"):
            model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                logits.append(model(pixel_values=images).logits)
        change = float((logits[1] - logits[0]).norm() / logits[0].norm())
        assert 0.0 < change < 3.0 * embedded.largest_change
        assert torch.nn.functional.cosine_similarity(*logits).min() > 0.9

    def test_convolutions_of_several_dtypes_in_folders(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        source = tmp_path / "source"
        (source / "parts").mkdir(parents=True)
        shapes = [(64, 16, 3, 3), (64, 64, 3, 3), (128, 64, 1, 1), (32, 16, 2, 3, 3)]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for i, (shape, dtype) in enumerate(
            zip(shapes, (*DTYPES.values(), torch.float32), strict=True)
        ):
            for name, size in ((f"s.{i}.conv.weight", shape), (f"s.{i}.bn.weight", shape[:1])):
                part = f"parts/{1 - i % 2}.safetensors"
                tensor = torch.randn(size, generator=generator).to(dtype)
                parts.setdefault(part, {})[name] = tensor
        for path, tensors in parts.items():
            save_file(tensors, source / path)
        where = {name: path for path, tensors in parts.items() for name in tensors}
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        embedded = embed_checkpoint(source, KEY, tmp_path / "out", scheme=Scheme(bits=32))
        names = [f"s.{i}.conv.weight" for i in range(4)]
        assert [claimed.name for claimed in embedded.claim.carriers] == names
        assert bytes_outside_carriers(source, names) == bytes_outside_carriers(
            tmp_path / "out", names
        )
        assert found(tmp_path / "out") < -6

    def test_the_same_bytes_twice(self, tmp_path, source):
        for out in ("a", "b"):
            embed_checkpoint(source, KEY, tmp_path / out, recipient="x")
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    @pytest.mark.skipif(importlib.util.find_spec("threadpoolctl") is None, reason="says how many")
    def test_the_same_bytes_from_any_number_of_threads(self, tmp_path, source):
        for threads in ("1", "2"):
            before = f"assert os.environ['OPENBLAS_NUM_THREADS'] == '{threads}'"
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads}
            done = in_a_process(source, tmp_path / threads, f"import os; {before}", environment)
            assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "1") == contents(tmp_path / "2")

    def test_without_threadpoolctl(self, tmp_path, source, monkeypatch):
        monkeypatch.setitem(sys.modules, "threadpoolctl", None)
        assert embed_checkpoint(source, KEY, tmp_path / "out").log10_p < -100

    def test_few_pieces_or_many(self, tmp_path, source, monkeypatch):
        """Blocks change the order of sums, hence the last bits, and nothing else."""
        first = embed_checkpoint(source, KEY, tmp_path / "a")
        monkeypatch.setattr(closed_form_module, "_PIECE", 1)
        second = embed_checkpoint(source, KEY, tmp_path / "b")
        assert second.margin == pytest.approx(first.margin, abs=1e-3)
        for a, b in zip(
            arrays_of(first.folder, first.claim),
            arrays_of(second.folder, second.claim),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-7)

    def test_other_files_with_weights_are_told(self, tmp_path, source):
        (source / "pytorch_model.bin").write_bytes(b"pickle")
        (source / "training_args.bin").write_bytes(b"pickle")
        (source / "checkpoint-7").mkdir()
        shutil.copy(source / WEIGHTS, source / "checkpoint-7" / WEIGHTS)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        assert set(embedded.unmarked) == {"pytorch_model.bin", f"checkpoint-7/{WEIGHTS}"}
        assert set(contents(tmp_path / "out")) == {*contents(source), CLAIM_FILE}


class TestRounding:
    """bfloat16 has 8 bits of mantissa: slight changes of weights on its grid may be swallowed."""

    def save(self, folder: Path, w: torch.Tensor) -> Path:
        folder.mkdir()
        save_file({"layers.0.dense.weight": w}, folder / WEIGHTS)
        return folder

    @pytest.mark.parametrize(("bits", "rows"), [(1, 4096), (4, 4096)])
    def test_more_is_asked_for_until_the_margin_holds(self, tmp_path, bits, rows, monkeypatch):
        """Weights of one size, on the grid: changes below half a step, .2% to .4%, vanish."""
        signs = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).sign()
        source = self.save(tmp_path / "source", signs.to(torch.bfloat16))
        rounds = []
        write = closed_form_module.ClosedForm._rewrite
        monkeypatch.setattr(
            closed_form_module.ClosedForm,
            "_rewrite",
            lambda *args: rounds.append(1) or write(*args),
        )
        scheme = Scheme(bits=bits, strength=1e-4)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out", scheme=scheme)
        assert len(rounds) > 1
        assert embedded.margin >= 4.0 * (1.0 - TOLERANCE)
        assert agreement(embedded).min() == pytest.approx(embedded.margin, abs=1e-3)
        assert embedded.largest_change < 0.03
        again = embed_checkpoint(tmp_path / "out", KEY, tmp_path / "again", scheme=scheme)
        assert again.unchanged

    def test_what_rounding_breaks_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(closed_form_module, "_ROUNDS", 0)
        signs = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)).sign()
        source = self.save(tmp_path / "source", signs.to(torch.bfloat16))
        with pytest.raises(CarrierError, match="cannot hold the margin") as caught:
            embed_checkpoint(source, KEY, tmp_path / "out", scheme=Scheme(bits=1, strength=1e-4))
        assert "expected every bit at 4.00 sigmas; got" in str(caught.value)
        assert alone(tmp_path) == set()

    def test_steps_next_to_zero(self, tmp_path):
        """Numbers of three steps at most above F16's zero: coarse, but the margin holds."""
        w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 6e-8
        source = self.save(tmp_path / "source", w.half())
        embedded = embed_checkpoint(source, KEY, tmp_path / "out", scheme=Scheme(strength=0.3))
        assert agreement(embedded).min() == pytest.approx(embedded.margin, abs=1e-3)
        assert embedded.margin >= 0.3 * 32 * (1.0 - TOLERANCE)

    @pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
    def test_numbers_next_to_infinity(self, tmp_path, dtype):
        top = torch.finfo(DTYPES[dtype]).max
        signs = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).sign()
        source = self.save(tmp_path / "source", (signs * top).to(DTYPES[dtype]))
        with pytest.raises(CarrierError, match="within the range of their dtype"):
            embed_checkpoint(source, KEY, tmp_path / "out")
        assert alone(tmp_path) == set()

    @pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
    def test_numbers_of_any_other_size(self, tmp_path, size):
        w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * size
        source = self.save(tmp_path / "source", w)
        assert embed_checkpoint(source, KEY, tmp_path / "out").log10_p < -100


class TestSeveralMarks:
    def test_again_changes_nothing(self, tmp_path, source):
        first = embed_checkpoint(source, KEY, tmp_path / "a")
        second = embed_checkpoint(tmp_path / "a", KEY, tmp_path / "b")
        assert second.unchanged
        assert second.largest_change == 0.0
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert second.claim == first.claim
        assert second.margin == pytest.approx(first.margin)
        assert second.log10_p == pytest.approx(first.log10_p)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_again_without_the_claim(self, tmp_path, dtype):
        embed_checkpoint(a_model(tmp_path / "source", dtype), KEY, tmp_path / "a")
        claim = (tmp_path / "a" / CLAIM_FILE).read_bytes()
        (tmp_path / "a" / CLAIM_FILE).unlink()
        second = embed_checkpoint(tmp_path / "a", KEY, tmp_path / "b")
        assert second.unchanged
        # But nobody knows any more that the other layers never felt the mark.
        kept = [
            dataclasses.replace(c, reference=None) for c in Claim.from_bytes(claim, "").carriers
        ]
        assert second.claim == Claim.make(KEY, Scheme.from_name(second.claim.scheme), tuple(kept))

    def test_a_trained_mark_is_recognised_with_its_scheme(self, tmp_path):
        tensors = vit(KEY)
        source = save_model(tmp_path / "source", tensors, claim_about(tensors))
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        assert embedded.unchanged
        assert embedded.claim.scheme == Scheme().name
        assert contents(source) == contents(tmp_path / "out")

    def test_more_strength_on_top(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "a", scheme=Scheme(strength=0.1))
        stronger = embed_checkpoint(
            tmp_path / "a", KEY, tmp_path / "b", scheme=Scheme(strength=0.2)
        )
        assert not stronger.unchanged
        assert agreement(stronger).min() == pytest.approx(stronger.margin, abs=1e-4)
        assert stronger.claim.scheme == Scheme(strength=0.2).name
        assert stronger.kept_claim is None

    def test_a_second_owner_and_a_third(self, tmp_path, source):
        keys = [KEY, THIEF, another_key(1)]
        before = source
        kept = []
        for i, key in enumerate(keys):
            embedded = embed_checkpoint(before, key, tmp_path / str(i))
            kept.append(embedded.kept_claim)
            before = tmp_path / str(i)
        assert kept == [None, *(f"watermark-{key.fingerprint}.json" for key in keys[:2])]
        for i, key in enumerate(keys):
            assert found(before, key, read="all") < -50
            if i < 2:
                original = (tmp_path / str(i) / CLAIM_FILE).read_bytes()
                assert (before / kept[i + 1]).read_bytes() == original
                assert found(before, key, claim=before / kept[i + 1], read="all") < -50
        assert Claim.from_bytes((before / CLAIM_FILE).read_bytes(), "").commits_to(keys[2])
        assert not verify_hub_model(before, another_key(2)).found

    def test_the_first_again_after_the_second(self, tmp_path, source):
        """Its scheme comes from where its claim was moved to; that file stays as it is."""
        scheme = Scheme(strength=0.2)
        embed_checkpoint(source, KEY, tmp_path / "a", scheme=scheme)
        embed_checkpoint(tmp_path / "a", THIEF, tmp_path / "b")
        third = embed_checkpoint(tmp_path / "b", KEY, tmp_path / "c")
        assert third.claim.scheme == scheme.name
        assert third.kept_claim == f"watermark-{THIEF.fingerprint}.json"
        moved = f"watermark-{KEY.fingerprint}.json"
        assert (tmp_path / "c" / moved).read_bytes() == (tmp_path / "a" / CLAIM_FILE).read_bytes()
        fourth = embed_checkpoint(tmp_path / "c", THIEF, tmp_path / "d")
        assert fourth.kept_claim == f"watermark-{KEY.fingerprint}-2.json"
        for key in (KEY, THIEF):
            assert found(tmp_path / "d", key, read="all") < -50

    def test_recipients(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "master")
        logs = {}
        for name in ("a", "b"):
            copy = tmp_path / name
            embedded = embed_checkpoint(tmp_path / "master", KEY, copy, recipient=name)
            assert not embedded.unchanged
            assert embedded.kept_claim is None
            assert agreement(embedded, KEY.for_recipient(name)).min() >= embedded.margin - 1e-4
            assert found(copy, read="all") < -50
            assert found(copy, recipient=name, read="all") < -50
            other = "b" if name == "a" else "a"
            assert not verify_hub_model(copy, KEY, recipient=other).found
            logs[name] = embedded.log10_p
            again = embed_checkpoint(copy, KEY, tmp_path / f"{name}2", recipient=name)
            assert again.unchanged
        assert max(logs.values()) < -50
        assert not verify_hub_model(tmp_path / "master", KEY, recipient="a").found

    def test_a_recipient_at_once(self, tmp_path, source):
        embedded = embed_checkpoint(source, KEY, tmp_path / "out", recipient="a")
        for key in (KEY, KEY.for_recipient("a")):
            assert agreement(embedded, key).min() >= embedded.margin - 1e-4
        assert embedded.claim.commits_to(KEY)

    def test_named_carriers_stay_secret(self, tmp_path, source):
        names = [fc1(4), "vit.encoder.layer.1.output.dense.weight", fc1(0)]
        embedded = embed_checkpoint(source, KEY, tmp_path / "a", carriers=names)
        assert [claimed.name for claimed in embedded.claim.carriers] == names
        published = (tmp_path / "a" / CLAIM_FILE).read_bytes()
        assert b"dense" not in published
        assert bytes_outside_carriers(source, names) == bytes_outside_carriers(
            tmp_path / "a", names
        )
        owners = tmp_path / "owners.json"
        owners.write_bytes(embedded.claim.to_bytes())
        assert found(tmp_path / "a", claim=owners, read="all") < -50
        with pytest.raises(CarrierError, match="carriers that its claim keeps secret"):
            embed_checkpoint(tmp_path / "a", KEY, tmp_path / "b")
        again = embed_checkpoint(tmp_path / "a", KEY, tmp_path / "b", carriers=names)
        assert again.unchanged
        assert (tmp_path / "b" / CLAIM_FILE).read_bytes() == published
        embed_checkpoint(tmp_path / "b", THIEF, tmp_path / "c")
        with pytest.raises(CarrierError, match="carriers that its claim keeps secret"):
            embed_checkpoint(tmp_path / "c", KEY, tmp_path / "d")
        assert found(tmp_path / "c", claim=owners, read="all") < -50


class TestClaimsThatAreThere:
    def test_no_claim(self, tmp_path, source):
        (source / CLAIM_FILE).write_bytes(b'{"theirs": 1}')
        with pytest.raises(ClaimError, match=r"cannot be kept.*Move it out"):
            embed_checkpoint(source, KEY, tmp_path / "out")
        assert alone(tmp_path) == set()

    def test_a_claim_of_a_newer_format(self, tmp_path, source):
        (source / CLAIM_FILE).write_bytes(b'{"format": "hf-watermark/2"}')
        with pytest.raises(ClaimError, match=r"got 'hf-watermark/2'.*newer"):
            embed_checkpoint(source, KEY, tmp_path / "out")

    def test_one_that_names_our_key_but_is_not_signed_by_it(self, tmp_path, source):
        """It gives neither scheme nor carriers, and is kept like a stranger's."""
        fields = claim_about(vit(KEY), names=[fc1(2)], scheme=Scheme(bits=8)).to_dict()
        forged = json.dumps({**fields, "owner": "somebody else"}).encode()
        (source / CLAIM_FILE).write_bytes(forged)
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        assert len(embedded.claim.carriers) == 6
        assert (tmp_path / "out" / embedded.kept_claim).read_bytes() == forged
        moved = f"watermark-{KEY.fingerprint}.json"
        assert embedded.kept_claim == moved
        again = embed_checkpoint(tmp_path / "out", KEY, tmp_path / "again")
        assert again.unchanged

    def test_a_broken_file_of_the_name_that_ours_would_move_to(self, tmp_path, source):
        (source / f"watermark-{KEY.fingerprint}.json").write_bytes(b"\xff")
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        assert embedded.kept_claim is None
        assert (tmp_path / "out" / f"watermark-{KEY.fingerprint}.json").read_bytes() == b"\xff"

    def test_ours_of_another_model(self, tmp_path, source):
        """Carriers that are not there give way to the rule; its claim is replaced."""
        tensors = {f"other.{name}": tensor for name, tensor in vit(None).items()}
        (source / CLAIM_FILE).write_bytes(claim_about(tensors).to_bytes())
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        assert [claimed.name for claimed in embedded.claim.carriers] == [fc1(i) for i in range(6)]

    def test_ours_of_a_scheme_that_only_training_embeds(self, tmp_path, source):
        uchida = Scheme(statistic="mean", embedding="hinge")
        claim = claim_about(vit(None), scheme=uchida)
        (source / CLAIM_FILE).write_bytes(claim.to_bytes())
        with pytest.raises(SchemeError, match=r"got mean-random.*Pass another scheme"):
            embed_checkpoint(source, KEY, tmp_path / "out")
        embed_checkpoint(source, KEY, tmp_path / "out", scheme=Scheme())

    def test_the_kept_name_is_the_rule_of_fingerprints(self):
        digest = hashlib.sha256(bytes.fromhex(KEY.public_key)).hexdigest()
        assert KEY.fingerprint == digest[:16]


class TestSources:
    def test_a_repo_of_the_hub(self, tmp_path, source, loopback_hub):
        loopback_hub.create_repo("demo/vit")
        files = contents(source)
        sha = push("demo/vit", files)
        push("demo/vit", {"config.json": b"{}"})
        embedded = embed_checkpoint("demo/vit", KEY, tmp_path / "out", revision=sha)
        names = [fc1(i) for i in range(6)]
        there = bytes_outside_carriers(tmp_path / "out", names)
        there.pop(".gitattributes", None)
        assert there == bytes_outside_carriers(source, names)
        assert embedded.log10_p < -100
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

    def test_a_repo_that_is_not_there(self, tmp_path, loopback_hub):
        with pytest.raises(HubError):
            embed_checkpoint("demo/none", KEY, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_revision_of_a_folder(self, tmp_path, source):
        with pytest.raises(HubError, match="has no revision"):
            embed_checkpoint(source, KEY, tmp_path / "out", revision="main")

    def test_a_snapshot_in_the_cache(self, tmp_path, source):
        """Read-only files, each a link to a blob; those stay as they are."""
        snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for i, path in enumerate(contents(source)):
            shutil.copy(source / path, blobs / str(i))
            (blobs / str(i)).chmod(0o444)
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path).symlink_to(blobs / str(i))
        before = contents(blobs)
        embed_checkpoint(snapshot, KEY, tmp_path / "out")
        assert contents(blobs) == before
        assert found(tmp_path / "out") < -6
        assert (tmp_path / "out" / WEIGHTS).stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("where", ["nothing", "./nothing/here", "a\0b"])
    def test_nothing_there(self, tmp_path, where, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(WatermarkError):
            embed_checkpoint(where, KEY, tmp_path / "out")
        assert alone(tmp_path) == set()

    def test_a_file(self, tmp_path, source):
        with pytest.raises(CheckpointError, match="is a file; expected the folder"):
            embed_checkpoint(source / WEIGHTS, KEY, tmp_path / "out")

    def test_pickles_only(self, tmp_path):
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(NotSafetensorsError, match="pickles are never opened"):
            embed_checkpoint(tmp_path / "source", KEY, tmp_path / "out")
        assert alone(tmp_path) == set()

    def test_a_broken_link_beside_the_weights(self, tmp_path, source):
        (source / "tokenizer.json").symlink_to("../blobs/gone")
        with pytest.raises(CheckpointError, match="got a broken link"):
            embed_checkpoint(source, KEY, tmp_path / "new" / "out")
        assert alone(tmp_path) == set()

    @pytest.mark.parametrize(
        ("value", "message"),
        [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "nothing but zeros")],
    )
    def test_carriers_that_hold_nothing(self, tmp_path, value, message):
        tensors = vit(None)
        if value == 0.0:
            tensors[fc1(3)].zero_()
        else:
            tensors[fc1(3)][200, 5] = value
        save_model(tmp_path / "source", tensors)
        with pytest.raises(CarrierError, match=message) as caught:
            embed_checkpoint(tmp_path / "source", KEY, tmp_path / "out")
        assert fc1(3) in str(caught.value)
        assert alone(tmp_path) == set()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
    def test_carriers_of_other_dtypes(self, tmp_path, dtype):
        tensors = vit(None)
        tensors[fc1(1)] = tensors[fc1(1)].to(dtype)
        save_model(tmp_path / "source", tensors)
        with pytest.raises(CarrierError, match=r"expected F32 or F16 or BF16; got [IF]"):
            embed_checkpoint(tmp_path / "source", KEY, tmp_path / "out")
        assert alone(tmp_path) == set()

    def test_carriers_that_are_absent(self, tmp_path, source):
        with pytest.raises(CarrierMissingError, match=r"'nope\.weight'"):
            embed_checkpoint(source, KEY, tmp_path / "out", carriers=[fc1(0), "nope.weight"])
        with pytest.raises(CarrierError, match="each once"):
            embed_checkpoint(source, KEY, tmp_path / "out", carriers=[])
        assert alone(tmp_path) == set()

    def test_a_model_that_is_too_small(self, tmp_path):
        (tmp_path / "source").mkdir()
        save_file({"layers.0.dense.weight": torch.randn(64, 96)}, tmp_path / "source" / WEIGHTS)
        for options, most in (({"scheme": Scheme(bits=97)}, 96), ({"recipient": "a"}, 48)):
            with pytest.raises(ModelTooSmallError, match=f"at most {most} bits"):
                embed_checkpoint(tmp_path / "source", KEY, tmp_path / "out", **options)
        assert alone(tmp_path) == set()
        embedded = embed_checkpoint(
            tmp_path / "source", KEY, tmp_path / "out", recipient="a", scheme=Scheme(bits=48)
        )
        assert embedded.margin >= 4.0 * (1.0 - TOLERANCE)

    @pytest.mark.parametrize(
        "scheme", [Scheme(embedding="hinge"), Scheme(embedding="bce"), Scheme(statistic="mean")]
    )
    def test_schemes_that_only_training_embeds(self, tmp_path, source, scheme):
        with pytest.raises(SchemeError, match="embeds the spread statistic by projection"):
            embed_checkpoint(source, KEY, tmp_path / "out", scheme=scheme)
        assert alone(tmp_path) == set()

    def test_more_than_the_carriers_can_hold(self, tmp_path, source):
        with pytest.raises(CarrierError, match="cannot hold the margin"):
            embed_checkpoint(source, KEY, tmp_path / "out", scheme=Scheme(strength=1.5))
        assert alone(tmp_path) == set()

    def test_no_key(self, tmp_path, source):
        with pytest.raises(KeyFileError, match="is no OwnerKey; got str"):
            embed_checkpoint(source, "acme.key", tmp_path / "out")

    def test_no_secret_is_written(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "out", recipient="customer-17")
        for content in contents(tmp_path / "out").values():
            assert KEY._secret not in content
            assert KEY._secret.hex().encode() not in content
            assert b"customer-17" not in content


class TestOutputs:
    def test_something_is_there(self, tmp_path, source):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_bytes(b"1")
        (tmp_path / "file").write_bytes(b"1")
        for out in (tmp_path / "out", tmp_path / "file", source):
            before = contents(tmp_path)
            with pytest.raises(CheckpointError, match="exists; expected a new or empty folder"):
                embed_checkpoint(source, KEY, out)
            assert contents(tmp_path) == before

    def test_in_the_source(self, tmp_path, source):
        (source / "empty").mkdir()
        (tmp_path / "link").symlink_to(source)
        for out in (source / "out", source / "empty", tmp_path / "link" / "a" / "b"):
            with pytest.raises(CheckpointError, match="lies in the source"):
                embed_checkpoint(source, KEY, out)
        (source / "empty").rmdir()
        assert contents(source).keys() == contents(a_model(tmp_path / "other")).keys()

    def test_beside_a_source_of_a_similar_name(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "source-marked")
        assert found(tmp_path / "source-marked") < -6

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs another user")
    def test_where_the_user_may_not_write(self, tmp_path, source):
        (tmp_path / "closed").mkdir(mode=0o555)
        done = in_a_process(source, tmp_path / "closed" / "out", "import os; os.setuid(65534)")
        if "ModuleNotFoundError" in done.stderr or "Fatal Python" in done.stderr:
            pytest.skip("another user cannot run this Python")
        assert done.returncode == 1
        assert "CheckpointError" in done.stderr
        assert not any((tmp_path / "closed").iterdir())

    @pytest.mark.parametrize("limit", [100, 100_000])
    def test_a_disk_that_is_full(self, tmp_path, source, limit):
        """The file grows to a limit and no further, as on a full disk."""
        before = (
            "import resource;"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"
        )
        done = in_a_process(source, tmp_path / "new" / "out", before)
        assert done.returncode == 1
        assert (
            done.stderr.strip().splitlines()[-1].startswith("hf_watermark.errors.CheckpointError")
        )
        assert "cannot be written; got File too large. Make room" in done.stderr
        assert alone(tmp_path) == set()

    @pytest.mark.parametrize("at", ["claim", "weights", "name"])
    def test_a_disk_that_is_full_at_last(self, tmp_path, source, monkeypatch, at):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        if at == "claim":
            monkeypatch.setattr(Path, "write_bytes", full)
        elif at == "weights":
            monkeypatch.setattr(closed_form_module.ClosedForm, "_rewrite", full)
        else:
            monkeypatch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match="No space left"):
            embed_checkpoint(source, KEY, tmp_path / "new" / "out")
        assert alone(tmp_path) == set()

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount")
    def test_a_file_system_that_is_full(self, tmp_path, source):
        (tmp_path / "small").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path / "small")]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount")
        try:
            with pytest.raises(CheckpointError, match="No space left"):
                embed_checkpoint(source, KEY, tmp_path / "small" / "out")
            assert not any((tmp_path / "small").iterdir())
        finally:
            subprocess.run(["umount", str(tmp_path / "small")], check=True)

    @pytest.mark.parametrize("carrier", [0, 4])
    def test_killed(self, tmp_path, source, carrier):
        """A hidden folder may stay; the name appears when all is there, and a rerun makes it so."""
        before = (
            "import os, hf_watermark.closed_form as c; r = c.ClosedForm._rewrite;"
            "c.ClosedForm._rewrite = lambda s, i, *a:"
            f" os.kill(os.getpid(), 9) if i == {carrier} else r(s, i, *a)"
        )
        done = in_a_process(source, tmp_path / "out", before)
        assert done.returncode == -signal.SIGKILL
        (left,) = alone(tmp_path)
        assert left.startswith(".out.")
        embed_checkpoint(source, KEY, tmp_path / "out")
        embed_checkpoint(source, KEY, tmp_path / "twin")
        assert contents(tmp_path / "out") == contents(tmp_path / "twin")
        assert alone(tmp_path) == {left, "out", "twin"}

    def test_interrupted(self, tmp_path, source):
        def interrupt(done: int, planned: int) -> None:
            if done > 0.75 * planned:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embed_checkpoint(source, KEY, tmp_path / "new" / "out", progress=interrupt)
        assert alone(tmp_path) == set()


def in_a_process(
    source: Path, out: Path, before: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from hf_watermark import OwnerKey;"
        "from hf_watermark.direct import embed_checkpoint\n"
        f"{before}\n"
        "embed_checkpoint(sys.argv[1], OwnerKey(bytes(range(32)), 'acme'), sys.argv[2])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestProgress:
    @pytest.mark.parametrize("piece", [1, 4096, 2**18])
    def test_it_grows_to_the_total(self, tmp_path, source, monkeypatch, piece):
        monkeypatch.setattr(closed_form_module, "_PIECE", piece)
        seen = []
        embed_checkpoint(source, KEY, tmp_path / "a", progress=lambda *at: seen.append(at))
        self.check(seen)
        assert len(seen) >= 12

    def test_where_nothing_is_to_do(self, tmp_path, source):
        embed_checkpoint(source, KEY, tmp_path / "a")
        seen = []
        embed_checkpoint(tmp_path / "a", KEY, tmp_path / "b", progress=lambda *at: seen.append(at))
        self.check(seen)

    def check(self, seen: list[tuple[int, int]]) -> None:
        done = [at for at, _ in seen]
        assert all(a < b for a, b in itertools.pairwise(done))
        assert {planned for _, planned in seen} == {2 * 6 * 256 * 64}
        assert done[-1] == seen[-1][1]


class TestMemory:
    def test_a_model_much_larger_than_its_carriers(self, tmp_path):
        """128 MiB of weights in carriers of 4 MiB: what is held does not grow with the model."""
        source = tmp_path / "source"
        source.mkdir()
        block = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
        save_file({f"layers.{i}.dense.weight": block.clone() for i in range(32)}, source / WEIGHTS)
        report = (
            "import atexit, pathlib;"
            "atexit.register(lambda: print(*(l for l in"
            " pathlib.Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in l)))"
        )
        done = in_a_process(source, tmp_path / "out", report)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[1]) < 90 * 1024  # 45 MiB are Python and numpy

    def test_no_more_files_are_open_than_a_few(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        names = [f"layers.{i}.dense.weight" for i in range(120)]
        for i, name in enumerate(names):
            save_file({name: torch.randn(32, 32)}, source / f"part-{i}.safetensors")
        index = {"weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(names)}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        before = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, {hard}))"
        done = in_a_process(source, tmp_path / "out", before)
        assert done.returncode == 0, done.stderr


class TestSchemeFor:
    def test_gentle_where_the_size_allows(self):
        assert scheme_for(3 * 10**5).strength == 0.05
        assert scheme_for(10**8) == Scheme()
        assert scheme_for(5_000) == Scheme()
        assert scheme_for(3 * 10**5, 128).bits == 128

    @pytest.mark.parametrize("exponent", range(4, 11))
    def test_never_stronger_than_training(self, exponent):
        weights = 10**exponent
        assert scheme_for(weights).margin(weights) <= Scheme().margin(weights)

    def test_carriers_are_the_default_ones(self, tmp_path, source):
        embedded = embed_checkpoint(source, KEY, tmp_path / "out")
        carriers = carriers_of(vit(None))
        assert tuple(claimed.carrier for claimed in embedded.claim.carriers) == carriers


def test_the_first_owners_moved_claim_says_what_to_read(tmp_path):
    """Its scheme is not the default, so without its claim the first mark would not be found."""
    from hf_watermark import OwnerKey
    from hf_watermark.verify import verify_hub_model

    generator = torch.Generator().manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        f"encoder.layer.{i}.dense.weight": torch.randn(256, 128, generator=generator)
        for i in range(3)
    }
    save_file(tensors, source / "model.safetensors")
    first, second = OwnerKey(bytes([1]) * 32, "first"), OwnerKey(bytes([2]) * 32, "second")
    embed_checkpoint(source, first, tmp_path / "one", scheme=Scheme(bits=128))
    done = embed_checkpoint(tmp_path / "one", second, tmp_path / "two")
    assert done.kept_claim == f"watermark-{first.fingerprint}.json"
    for key, bits in ((first, 128), (second, 64)):
        evidence = verify_hub_model(tmp_path / "two", key)
        assert (evidence.verdict, evidence.bits, evidence.matched) == ("found", bits, bits)
