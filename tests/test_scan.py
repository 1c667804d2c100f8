"""Whose copy: every recipient's statistic is the one that verifying by itself would take."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
from disguised_models import DISGUISES, marked, save
from marked_models import KEY, THIEF, another_key, claim_about, marked_arrays, push, save_model
from safetensors.torch import load_file
from threadpoolctl import threadpool_info

from hf_watermark import Scheme, scan
from hf_watermark.carriers import Carrier, choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.direct import embed_checkpoint
from hf_watermark.errors import CarrierError, ClaimError, KeyFileError, SchemeError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.extraction import Extraction
from hf_watermark.files import FolderFiles
from hf_watermark.found_claims import find_claim
from hf_watermark.projections import Projection
from hf_watermark.references import aligner_of
from hf_watermark.scan import Lineup, trace
from hf_watermark.significance import corrected, log10_normal_tail
from hf_watermark.verify import verify_hub_model

SHAPES = {f"blocks.{i}.mlp.fc1.weight": (128, 64) for i in range(4)}
NAMES = [f"customer-{i}" for i in range(40)]
HIDING = [name for name in DISGUISES["ViT"] if name not in ("constants shifted", "gains moved")]
FIRST = 128 * 64 + 50 * 64  # the first look takes one carrier and 50 rows of the next


@pytest.fixture(autouse=True)
def _two_looks(monkeypatch):
    monkeypatch.setattr(scan, "_FIRST_LOOK", FIRST)


@pytest.fixture
def copy(tmp_path):
    """The copy of customer-17, marked for the owner too."""
    source = save_model(tmp_path / "source", marked_arrays(SHAPES, None))
    return embed_checkpoint(source, KEY, tmp_path / "copy", recipient="customer-17").folder


@pytest.fixture
def plain(tmp_path):
    return save_model(tmp_path / "plain", marked_arrays(SHAPES, None))


def lineup(folder, names=NAMES, key=KEY) -> Lineup:
    checkpoint = Checkpoint.open(FolderFiles(folder))
    return Lineup(checkpoint, key, names, Scheme(), choose_carriers(checkpoint.shapes()))


def looks_of(folder, names=NAMES, key=KEY) -> list[np.ndarray]:
    with ThreadPoolExecutor(2) as pool:
        return list(lineup(folder, names, key).looks(pool))


def alone(folder, name: str, look: dict[int, int]) -> float:
    """One recipient's soft statistic from the first rows of some carriers."""
    checkpoint = Checkpoint.open(FolderFiles(folder))
    carriers = choose_carriers(checkpoint.shapes())
    extraction = Extraction(Projection(KEY.for_recipient(name), Scheme(), carriers))
    for i, rows in look.items():
        extraction.add(i, 0, checkpoint.read_rows(carriers[i].name, 0, rows))
    return extraction.reading().soft


class TestStatistics:
    @pytest.mark.parametrize("which", ["copy", "plain"])
    def test_each_is_the_recipients_own_reading(self, which, request):
        folder = request.getfixturevalue(which)
        first, everything = looks_of(folder)
        for i, name in enumerate(NAMES):
            assert first[i] == pytest.approx(alone(folder, name, {0: 128, 1: 50}), rel=1e-6)
            whole = alone(folder, name, dict.fromkeys(range(4), 128))
            assert everything[i] == pytest.approx(whole, rel=1e-6)

    def test_a_carrier_of_zeros_says_nothing(self, tmp_path):
        tensors = marked_arrays(SHAPES, None)
        first = dict(list(tensors.items())[:2])
        zeros = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
        (nothing, something) = looks_of(save_model(tmp_path / "z", tensors | zeros))
        assert not nothing.any()
        assert something.all()

    def test_strangers_are_chance(self, plain):
        """Fixed weights, keys of nobody: independent and N(0, 1) in every look."""
        softs = [looks_of(plain, NAMES, another_key(i)) for i in range(50)]
        for look in zip(*softs, strict=True):
            assert scipy.stats.kstest(np.concatenate(look), "norm").pvalue > 0.01

    def test_every_byte_is_fetched_once(self, plain):
        suspect = lineup(plain)
        files = suspect._checkpoint.files
        before = files.bytes_read
        with ThreadPoolExecutor(2) as pool:
            read = [files.bytes_read - before for _ in suspect.looks(pool)]
        assert read == [4 * FIRST, 4 * 4 * 128 * 64]

    def test_one_look_where_it_is_all(self, plain, monkeypatch):
        monkeypatch.setattr(scan, "_FIRST_LOOK", 4 * 128 * 64)
        assert lineup(plain).tries == 40
        assert len(looks_of(plain)) == 1


class TestTrace:
    def test_the_right_one(self, copy):
        found = trace(copy, KEY, NAMES)
        assert (found.recipient, found.found, found.revision) == ("customer-17", True, None)
        assert found.tries == 80
        soft = alone(copy, "customer-17", {0: 128, 1: 50})
        assert found.log10_p == pytest.approx(corrected(log10_normal_tail(soft), 80), rel=1e-6)
        assert found.log10_p < -20
        assert -6 < found.runner_up_log10_p <= 0
        assert trace(copy, KEY, NAMES[17:18]).runner_up_log10_p is None

    def test_nobody(self, copy, plain):
        for folder, key, names in (
            (plain, KEY, NAMES),
            (copy, KEY, NAMES[:17]),
            (copy, THIEF, NAMES),  # another owner's customers of the same names
        ):
            found = trace(folder, key, names)
            assert (found.recipient, found.found) == (None, False)
            assert found.log10_p > -6
            assert found.to_dict()["verdict"] == "not found"

    def test_alpha_is_the_limit(self, copy):
        log10_p = trace(copy, KEY, NAMES, alpha=1e-5).log10_p
        for firmer in (0.9, 0.99):  # the second look is firmer than the first
            assert trace(copy, KEY, NAMES, alpha=10 ** (log10_p * firmer)).found
        assert not trace(copy, KEY, NAMES, alpha=1e-307).found

    def test_the_owners_claim_says_what_to_read(self, copy, tmp_path):
        (copy / CLAIM_FILE).rename(tmp_path / "claim.json")
        assert trace(copy, KEY, NAMES, claim=tmp_path / "claim.json").recipient == "customer-17"
        foreign = claim_about(marked_arrays(SHAPES, None), THIEF)
        with pytest.raises(ClaimError, match="does not belong to this key"):
            trace(copy, KEY, NAMES, claim=foreign)

    def test_from_the_hub(self, copy, loopback_hub):
        loopback_hub.create_repo("demo/copy")
        sha = push("demo/copy", copy)
        found = trace("demo/copy", KEY, NAMES, token=loopback_hub.token)
        assert (found.recipient, found.revision) == ("customer-17", sha)
        # The first look's weights, 32 KiB that hold the header, the claim: not the file.
        assert 4 * FIRST < found.bytes_read < 4 * FIRST + 2**15 + 2000 < 4 * 4 * 128 * 64

    def test_the_same_from_any_executor(self, copy):
        seen = set()
        for workers in (1, 3):
            with ThreadPoolExecutor(workers) as pool:
                found = trace(copy, KEY, NAMES, executor=pool)
                seen.add((found.recipient, found.log10_p, found.runner_up_log10_p))
                pool.submit(int)  # it was not shut down
        assert len(seen) == 1

    def test_threads_are_as_before(self, copy):
        def threads():
            return [pool["num_threads"] for pool in threadpool_info()]

        before, running = threads(), []
        count = threading.active_count()
        trace(copy, KEY, NAMES, progress=lambda *_: running.append(threads()))
        blas = [p["user_api"] == "blas" for p in threadpool_info()]
        assert all(n == 1 for n, is_blas in zip(running[0], blas, strict=True) if is_blas)
        assert (threads(), threading.active_count()) == (before, count)

    @pytest.mark.parametrize("which", ["copy", "plain"])
    def test_progress_grows(self, which, request):
        seen: list[tuple[int, int]] = []
        trace(request.getfixturevalue(which), KEY, NAMES, progress=lambda *a: seen.append(a))
        assert len({planned for _, planned in seen}) == 1
        done = [done for done, _ in seen]
        assert done == sorted(set(done))
        assert (done[-1] == seen[-1][1]) == (which == "plain")


@pytest.fixture(scope="module")
def leak(tmp_path_factory):
    """The copy of customer-17 of a ViT, in every disguise that a raw reading is lost to."""
    place = tmp_path_factory.mktemp("leak")
    owner = marked("ViT")
    handed = embed_checkpoint(owner.folder, KEY, place / "handed", recipient="customer-17")
    tensors = load_file(handed.folder / "model.safetensors")
    for name in HIDING:
        save(place / name, DISGUISES["ViT"][name](tensors), owner.config)
    return place


class TestDisguised:
    """Weights that were reordered, widened or turned."""

    @pytest.mark.parametrize("disguise", HIDING)
    def test_it_is_named(self, leak, disguise):
        original = marked("ViT").folder
        found = trace(leak / disguise, KEY, NAMES, claim=original)
        assert (found.recipient, found.reading, found.note) == ("customer-17", "aligned", "")
        assert found.log10_p < -20
        assert found.tries % len(NAMES) == 0
        others = trace(leak / disguise, KEY, NAMES[:17], claim=original)
        assert (others.recipient, others.note) == (None, "")
        assert trace(leak / disguise, THIEF, NAMES, align="never").recipient is None

    def test_without_the_original_nobody_is(self, leak):
        every = leak / "hidden units permuted"
        found = trace(every, KEY, NAMES)
        assert (found.recipient, found.reading) == (None, "raw")
        assert "pass the repo or folder of the owner's original" in found.note
        strict = trace(every, KEY, NAMES, claim=marked("ViT").folder, align="never")
        assert (strict.recipient, strict.note) == (None, "")
        assert trace(every, KEY, NAMES, claim=marked("ViT").folder).tries > strict.tries
        with pytest.raises(SchemeError, match="Unknown align"):
            trace(every, KEY, NAMES, align="please")

    def test_the_aligned_look_is_chance_for_strangers(self, leak):
        names = [f"stranger-{i}" for i in range(400)]
        checkpoint = Checkpoint.open(FolderFiles(leak / "hidden units permuted"))
        found = find_claim(checkpoint.files, marked("ViT").folder, None, KEY.fingerprint)
        aligner, _ = aligner_of(checkpoint, KEY, found, marked("ViT").folder)
        carriers = tuple(claimed.carrier for claimed in found.claim.carriers)
        scheme = Scheme.from_name(found.claim.scheme)
        line = Lineup(checkpoint, KEY, names, scheme, carriers, aligner)
        with ThreadPoolExecutor(2) as pool:
            *raw, aligned = line.looks(pool)
        assert line.is_aligned
        assert line.tries == 400 * (len(raw) + 1)
        assert scipy.stats.kstest(aligned, "norm").pvalue > 0.01


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "message"), [([], "No recipients"), (["a", "b", "a"], "'a' 2 times")]
    )
    def test_names(self, plain, names, message):
        with pytest.raises(SchemeError, match=message):
            trace(plain, KEY, names)
        with pytest.raises(KeyFileError, match="needs a name"):
            trace(plain, KEY, ["a", ""])

    @pytest.mark.parametrize("alpha", [0, 1, -1, math.nan, math.inf, "1e-6"])
    def test_alpha(self, plain, alpha):
        with pytest.raises(SchemeError, match="alpha is out of range"):
            trace(plain, KEY, NAMES, alpha=alpha)

    def test_no_key(self, plain):
        for key in (None, b"x" * 32):
            with pytest.raises(KeyFileError):
                trace(plain, key, NAMES)

    def test_weights_that_are_not_finite(self, tmp_path):
        tensors = marked_arrays(SHAPES, None)
        tensors["blocks.3.mlp.fc1.weight"][5, 5] = math.nan
        with pytest.raises(CarrierError, match="not finite"):
            trace(save_model(tmp_path / "nan", tensors), KEY, NAMES)

    def test_bits_do_not_name_anyone(self, plain):
        checkpoint = Checkpoint.open(FolderFiles(plain))
        carriers = [Carrier(name, shape) for name, shape in SHAPES.items()]
        with pytest.raises(SchemeError, match="by the soft statistic"):
            Lineup(checkpoint, KEY, NAMES, Scheme(decides="bits"), carriers)


def test_verifying_a_named_recipient_agrees(copy):
    for name, found in (("customer-17", True), ("customer-18", False)):
        assert verify_hub_model(copy, KEY, recipient=name).found == found
