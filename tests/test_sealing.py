"""Seals: trained marks whose disguised copies are found, by keys that no training saw."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from disguised_models import (
    DISGUISES,
    MODELS,
    Model,
    _loaded,
    aligned,
    carriers_of,
    model,
    reading,
    save,
)
from disguises import disturbed
from marked_models import KEY, THIEF, another_key
from scipy.stats import kstest
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_watermark import Claim, Scheme
from hf_watermark.direct import embed_checkpoint, seal_scheme
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import AttachError, CarrierMissingError, ClaimError
from hf_watermark.evidence import CLAIM_FILE, Seal
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model

FAMILIES = ("ViT", "basic", "ConvNext", "Swin")


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(16, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (16,), generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def arguments(folder: Path, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | changes
    )


def trainer_of(network: nn.Module, folder: Path, *, key=KEY, seal=True, scheme=None, **changes):
    return WatermarkTrainer(
        model=network,
        args=arguments(folder, **changes),
        train_dataset=Images(),
        watermark_key=key,
        watermark_seal=seal,
        watermark_scheme=scheme,
    )


def new(family: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[family]()


@cache
def sealed(family: str) -> Model:
    """What the trainer saves, with its claim; checkpoint-2 in it is of the middle of training."""
    folder = Path(tempfile.mkdtemp())
    trainer = trainer_of(new(family), folder, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return _loaded(folder)


def claim_in(folder: Path) -> Claim:
    claim = Claim.from_bytes((folder / CLAIM_FILE).read_bytes(), "")
    claim.check("")
    return claim


def steal(folder: Path, owner: Model, family: str) -> Path:
    """A disguised copy of lightly disturbed weights, without a claim."""
    return save(folder, DISGUISES[family]["all"](disturbed(owner.tensors)), owner.config)


def found_raw(folder: Path, **options) -> bool:
    with contextlib.suppress(CarrierMissingError):  # dummy neurons leave nothing to read raw
        return verify_hub_model(folder, KEY, align="never", **options).found
    return False


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


class TestTrainer:
    def test_a_disguised_copy_is_found(self, tmp_path, family):
        owner = sealed(family)
        stolen = steal(tmp_path / "stolen", owner, family)
        assert not found_raw(stolen, claim=owner.folder)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")
        assert evidence.key_fingerprint == KEY.fingerprint
        seal = claim_in(owner.folder).seal
        assert evidence.scheme == seal.scheme
        assert evidence.bits == Scheme.from_name(seal.scheme).bits
        whole = verify_hub_model(stolen, KEY, claim=owner.folder, read="all")
        assert whole.matched == whole.bits
        assert whole.log10_p < -15

    def test_another_key_does_not_find_it(self, tmp_path, family):
        owner = sealed(family)
        stolen = steal(tmp_path / "stolen", owner, family)
        theirs = tmp_path / "theirs"
        shutil.copytree(owner.folder, theirs)
        claim = claim_in(theirs)
        claim = Claim.make(THIEF, Scheme.from_name(claim.scheme), claim.carriers, seal=claim.seal)
        (theirs / CLAIM_FILE).write_bytes(claim.to_bytes())
        evidence = verify_hub_model(stolen, THIEF, claim=theirs)
        assert evidence.verdict == "not found"
        assert evidence.log10_p > -3

    def test_the_trained_mark_keeps_its_margin(self, family):
        owner = sealed(family)
        evidence = verify_hub_model(owner.folder, KEY, read="all")
        assert (evidence.reading, evidence.matched, evidence.bits) == ("raw", 64, 64)
        names = [c.name for c in carriers_of(owner.tensors)]
        arrays = {name: owner.tensors[name].numpy() for name in names}
        before = load(owner.folder / "checkpoint-4")
        unsealed = {name: before[name].numpy() for name in names}
        now, then = (reading(owner.tensors, ws) for ws in (arrays, unsealed))
        assert now.soft > 0.995 * then.soft

    def test_a_checkpoint_on_the_way_claims_nothing_to_compare(self, tmp_path, family):
        owner = sealed(family)
        claim = claim_in(owner.folder / "checkpoint-2")
        assert claim.seal is None
        assert not any(carrier.reference for carrier in claim.carriers)
        assert found_raw(owner.folder / "checkpoint-2")

    def test_without_a_seal(self, tmp_path):
        trainer = trainer_of(new("ViT"), tmp_path / "own", seal=False)
        trainer.train()
        trainer.save_model()
        claim = claim_in(tmp_path / "own")
        assert claim.seal is None
        assert not any(carrier.reference for carrier in claim.carriers)
        stolen = steal(tmp_path / "stolen", _loaded(tmp_path / "own"), "ViT")
        assert not found_raw(stolen, claim=tmp_path / "own")

    def test_training_on_makes_another_seal(self, tmp_path):
        """The old one's key knows what trained beside it: nothing is claimed for that any more."""
        trainer = trainer_of(new("basic"), tmp_path / "own")
        trainer.train()
        trainer.save_model(str(tmp_path / "1"))
        trainer.train()
        trainer.save_model(str(tmp_path / "2"))
        first, second = claim_in(tmp_path / "1"), claim_in(tmp_path / "2")
        assert first.seal.nonce != second.seal.nonce
        for number, claim in ((1, first), (2, second)):
            owner = _loaded(tmp_path / str(number))
            stolen = steal(tmp_path / f"stolen-{number}", owner, "basic")
            evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
            assert (evidence.verdict, evidence.reading) == ("found", "aligned")
            arrays = {c.name: owner.tensors[c.name].numpy() for c in claim.carriers}
            scheme = Scheme.from_name(second.seal.scheme)
            late = reading(owner.tensors, arrays, KEY.sealed(second.seal.nonce), scheme)
            assert (late.soft > 10) is (number == 2)
            assert abs(late.soft) < 4 or number == 2
        (tmp_path / "2" / CLAIM_FILE).write_bytes(first.to_bytes())
        notes = verify_hub_model(stolen, KEY, claim=tmp_path / "2").notes
        assert any("not the claim's original" in note for note in notes)

    def test_training_on_with_something_else(self, tmp_path):
        trainer = trainer_of(new("ViT"), tmp_path)
        trainer.train()
        Trainer(trainer.model, arguments(tmp_path), train_dataset=Images()).train()
        trainer.save_model()
        claim = claim_in(tmp_path)
        assert claim.seal is None
        assert not any(carrier.reference for carrier in claim.carriers)

    def test_the_same_training_makes_the_same_seal(self, tmp_path):
        for name in "12":
            trainer = trainer_of(new("ViT"), tmp_path / name)
            trainer.train()
            trainer.save_model()
        assert claim_in(tmp_path / "1") == claim_in(tmp_path / "2")

    @pytest.mark.parametrize(
        "scheme",
        [
            Scheme(bits=32, embedding="hinge", weight=0.3),
            Scheme(bits=32, statistic="mean", embedding="bce"),
        ],
        ids=lambda scheme: scheme.name,
    )
    def test_marks_of_the_loss_are_sealed_too(self, tmp_path, scheme):
        trainer = trainer_of(new("ViT"), tmp_path / "own", scheme=scheme, max_steps=20)
        trainer.train()
        trainer.save_model()
        assert Scheme.from_name(claim_in(tmp_path / "own").scheme) == scheme
        stolen = steal(tmp_path / "stolen", _loaded(tmp_path / "own"), "ViT")
        evidence = verify_hub_model(stolen, KEY, claim=tmp_path / "own")
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")


def load(folder: Path):
    return _loaded(folder).tensors


class TestLoop:
    """`WatermarkLoss.seal` and `claim`, without Trainer."""

    def trained(self, family="ViT", scheme=None, network=None, **settings) -> WatermarkLoss:
        network = (network or new(family)).train()
        watermark = WatermarkLoss(network, KEY, scheme, **settings)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-3)
        for _ in range(3):
            images = Images()
            loss = network(pixel_values=images.pixels, labels=images.labels).loss
            optimizer.zero_grad()
            watermark(loss).backward()
            optimizer.step()
            watermark.step()
        watermark.project()
        return watermark

    def test_both_marks_have_their_margins(self, family):
        watermark = self.trained(family)
        norms = [weight.norm().item() for weight in watermark.weights()]
        before = [weight.clone() for weight in watermark.weights()]
        seal = watermark.seal()
        assert watermark.measure().margin >= 0.998 * watermark.projection.margin
        for weight, norm, old in zip(watermark.weights(), norms, before, strict=True):
            assert weight.norm().item() == pytest.approx(norm, rel=1e-3)
            assert 0.0 < (weight - old).norm() < 0.15 * old.norm()
        assert Scheme.from_name(seal.scheme) == seal_scheme(watermark.projection.weights)

    def test_twice(self):
        watermark = self.trained()
        first = watermark.seal()
        weights = [weight.clone() for weight in watermark.weights()]
        assert watermark.seal() == first
        watermark.detach()
        assert all(map(torch.equal, weights, watermark.weights()))
        with pytest.raises(AttachError):
            watermark.seal()

    def test_the_claim(self, tmp_path):
        watermark = self.trained()
        watermark.seal()
        watermark.detach()
        watermark.model.save_pretrained(tmp_path / "own")
        claim = watermark.claim(tmp_path / "own")
        (tmp_path / "own" / CLAIM_FILE).write_bytes(claim.public.to_bytes())
        stolen = steal(tmp_path / "stolen", _loaded(tmp_path / "own"), "ViT")
        assert verify_hub_model(stolen, KEY, claim=tmp_path / "own").reading == "aligned"

    def test_a_step_voids_it(self, tmp_path):
        watermark = self.trained()
        first = watermark.seal()
        watermark.step()
        watermark.model.save_pretrained(tmp_path)
        assert watermark.claim(tmp_path).seal is None
        assert watermark.seal() != first

    def test_named_carriers_stay_secret(self, tmp_path):
        names = ["vit.layers.0.mlp.fc2.weight", "vit.layers.1.mlp.fc2.weight"]
        watermark = self.trained(scheme=Scheme(bits=16), carriers=names)
        seal = watermark.seal()
        watermark.model.save_pretrained(tmp_path / "own")
        claim = watermark.claim(tmp_path / "own")
        claim.check_secret_carriers(KEY, "")
        assert claim.public.seal == seal
        assert b"reference" not in claim.public.to_bytes()
        public = Claim.from_bytes(claim.public.to_bytes(), "")
        public.check("")
        file = tmp_path / "own" / "owners.json"
        file.write_bytes(claim.to_bytes())
        stolen = steal(tmp_path / "stolen", _loaded(tmp_path / "own"), "ViT")
        assert verify_hub_model(stolen, KEY, claim=file).reading == "aligned"

    def test_frozen_carriers_stay_as_they_are(self):
        network = new("ViT")
        frozen = network.vit.layers[0].mlp.fc1.weight.requires_grad_(False)
        before = frozen.detach().clone()
        watermark = self.trained(network=network)
        assert watermark.seal() is not None
        assert torch.equal(frozen, before)
        assert watermark.measure().margin >= 0.998 * watermark.projection.margin

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, tmp_path, dtype):
        network = new("ViT").to(dtype).train()
        watermark = WatermarkLoss(network, KEY)
        watermark.project()
        assert watermark.seal() is not None
        assert watermark.measure().margin >= 0.99 * watermark.projection.margin
        network.save_pretrained(tmp_path)
        assert watermark.claim(tmp_path).seal is not None


class TestNotSealed:
    def refused(self, network: nn.Module, caplog, *words: str, scheme=None) -> None:
        watermark = WatermarkLoss(network.train(), KEY, scheme)
        watermark.project()
        before = [weight.clone() for weight in watermark.weights()]
        with caplog.at_level(logging.INFO, "hf_watermark"):
            assert watermark.seal() is None
        (said,) = [record.getMessage() for record in caplog.records]
        assert all(word in said for word in words), said
        for one, other in zip(before, watermark.weights(), strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        watermark.release()

    def test_an_architecture_without_an_aligned_reading(self, caplog):
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(256, 64), nn.Linear(64, 64)])

        self.refused(Plain(), caplog, "cannot be undone")

    def test_no_room(self, caplog):
        room = 24576 // 64
        self.refused(new("ViT"), caplog, "no room", scheme=Scheme(bits=room - 4))

    def test_weights_that_are_not_finite(self, caplog):
        network = new("ViT")
        with torch.no_grad():
            network.vit.layers[0].mlp.fc1.weight[0, 0] = math.nan
        self.refused(network, caplog, "cannot hold the margin")


class TestNull:
    """Under a seal's key, what was trained beside the mark says nothing."""

    def test_wrong_keys(self, family):
        """They read the owner's disguised copy as he does himself."""
        owner = sealed(family)
        arrays = aligned(owner.tensors, DISGUISES[family]["all"](disturbed(owner.tensors)))
        seal = claim_in(owner.folder).seal
        scheme = Scheme.from_name(seal.scheme)
        softs = [
            reading(owner.tensors, arrays, another_key(i).sealed(seal.nonce), scheme).soft
            for i in range(200)
        ]
        assert kstest(softs, "norm").pvalue > 0.01
        assert max(map(abs, softs)) < 5
        assert reading(owner.tensors, arrays, KEY.sealed(seal.nonce), scheme).soft > 8
        # The trained mark is there as well, for whoever trained with it to see: not to be read so.
        assert reading(owner.tensors, arrays).soft > 8

    def test_owners_who_read_innocents(self):
        """Each trains with a key of his own, seals, and aligns an innocent with his model."""
        innocent = DISGUISES["basic"]["channels permuted"](model("basic", seed=1).tensors)
        softs = []
        for i in range(40):
            key, network = another_key(5000 + i), new("basic").train()
            watermark = WatermarkLoss(network, key, every=1)
            optimizer = torch.optim.SGD(network.parameters(), 0.05)
            images = Images()
            for _ in range(3):
                loss = network(pixel_values=images.pixels, labels=images.labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                watermark.step()
            seal = watermark.seal()
            tensors = {n: t.detach().clone() for n, t in network.state_dict().items()}
            arrays = aligned(tensors, innocent)
            scheme = Scheme.from_name(seal.scheme)
            softs.append(reading(tensors, arrays, key.sealed(seal.nonce), scheme).soft)
        assert kstest(softs, "norm").pvalue > 0.01


class TestClaims:
    SEAL = Seal(Scheme(bits=8).name, "0123456789abcdef" * 2)

    def claim(self, **changes) -> Claim:
        carriers = claim_in(sealed("ViT").folder).carriers
        return dataclasses.replace(Claim.make(KEY, Scheme(), carriers, seal=self.SEAL), **changes)

    def test_round_trip(self):
        claim = self.claim()
        claim.check("")
        assert Claim.from_bytes(claim.to_bytes(), "") == claim
        assert json.loads(claim.to_bytes())["seal"] == dataclasses.asdict(self.SEAL)

    def test_the_signature_covers_it(self):
        for seal in (None, Seal(self.SEAL.scheme, "0" * 32), Seal(Scheme().name, self.SEAL.nonce)):
            with pytest.raises(ClaimError, match="edited"):
                self.claim(seal=seal).check("")

    def test_claims_without_it_are_as_they_were(self):
        claim = Claim.make(KEY, Scheme(), self.claim().carriers)
        assert b"seal" not in claim.to_bytes()
        assert Claim.from_bytes(claim.to_bytes(), "").seal is None
        claim.check("")

    @pytest.mark.parametrize(
        "seal",
        [
            None,
            "x",
            [],
            {},
            {"scheme": Scheme().name},
            {"scheme": Scheme().name, "nonce": "../x"},
            {"scheme": Scheme().name, "nonce": 1},
            {"scheme": "spread", "nonce": "0" * 32},
            {"scheme": 1, "nonce": "0" * 32},
        ],
    )
    def test_garbled(self, seal):
        fields = json.loads(self.claim().to_bytes()) | {"seal": seal}
        with pytest.raises(ClaimError, match="unreadable"):
            Claim.from_bytes(json.dumps(fields).encode(), "")


class TestMarkingOnDisk:
    """`embed_checkpoint` on a sealed model, with the same key."""

    def test_a_recipients_copy(self, tmp_path):
        owner = sealed("ViT")
        source = tmp_path / "source"
        shutil.copytree(owner.folder, source, ignore=shutil.ignore_patterns("checkpoint-*"))
        embed_checkpoint(source, KEY, tmp_path / "copy", recipient="r")
        claim = claim_in(tmp_path / "copy")
        assert claim.seal == claim_in(source).seal
        assert [c.reference for c in claim.carriers] == [
            c.reference for c in claim_in(source).carriers
        ]
        assert verify_hub_model(tmp_path / "copy", KEY, recipient="r").found
        stolen = steal(tmp_path / "stolen", _loaded(tmp_path / "copy"), "ViT")
        assert verify_hub_model(stolen, KEY, claim=tmp_path / "copy").reading == "aligned"
        # Beside whose mark it was trained is not known: the recipient's is read raw.
        moved = save(tmp_path / "moved", DISGUISES["ViT"]["stream turned"](owner.tensors),
                     owner.config)  # fmt: skip
        evidence = verify_hub_model(moved, KEY, claim=tmp_path / "copy", recipient="r")
        assert evidence.verdict == "not found"
        assert any("the seal is its owner's" in note for note in evidence.notes)

    def test_other_carriers(self, tmp_path):
        """A seal is read in the carriers that it was put in: with others there is none."""
        owner = sealed("ViT")
        source = tmp_path / "source"
        shutil.copytree(owner.folder, source, ignore=shutil.ignore_patterns("checkpoint-*"))
        names = [c.name for c in carriers_of(owner.tensors)][:2]
        embed_checkpoint(source, KEY, tmp_path / "fewer", carriers=names, scheme=Scheme(bits=16))
        claim = Claim.from_bytes((tmp_path / "fewer" / CLAIM_FILE).read_bytes(), "")
        assert claim.seal is None
