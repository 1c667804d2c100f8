"""Stolen copies: claim and config deleted, tensors renamed, cast, re-sharded, replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from marked_models import (
    KEY,
    LAYERS,
    THIEF,
    all_but_one_replaced,
    another_key,
    claim_about,
    evidence_of,
    fc1,
    identity_layer_first,
    like_timm,
    marked_arrays,
    noisy,
    other_head,
    push,
    refused,
    renumbered,
    run,
    save_model,
    shuffled_names,
    vit,
    vit_config,
    without_prefix,
)

from hf_watermark import Scheme
from hf_watermark.errors import CarrierError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.verify import verify_hub_model


def cast(dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def half_deleted(tensors):
    return renumbered(tensors, lambda number: number if number % 2 == 0 else None)


def half_deleted_renumbered(tensors):
    return renumbered(tensors, lambda number: number // 2 if number % 2 else None)


# What is done -> how it is read with the owner's claim; whether the key alone finds it (None: it
# may or may not, one layer in three is where the key expects it).
THEFTS = {
    "stripped": (lambda tensors: tensors, "raw", True),
    "bf16": (cast(torch.bfloat16), "raw", True),
    "fp16": (cast(torch.float16), "raw", True),
    "fp64": (cast(torch.float64), "raw", True),
    "timm's names": (like_timm, "renamed", True),
    "no prefix": (without_prefix, "renamed", True),
    "another head": (other_head, "raw", True),
    "noise": (lambda tensors: noisy(tensors, 0.2), "raw", True),
    "all but one replaced": (all_but_one_replaced, "raw, one carrier", True),
    "shuffled names": (shuffled_names, "renamed, one carrier", CarrierError),
    "half the layers": (half_deleted, "raw", None),
    "half the layers, renumbered": (half_deleted_renumbered, "renamed, one carrier", False),
    "a layer in front": (identity_layer_first, "renamed, one carrier", False),
    "timm's names, bf16": (
        lambda tensors: cast(torch.bfloat16)(like_timm(tensors)),
        "renamed",
        True,
    ),
    "timm's names, all but one replaced": (
        lambda tensors: like_timm(all_but_one_replaced(tensors)),
        "renamed, one carrier",
        True,
    ),
}


@pytest.fixture(params=THEFTS.values(), ids=THEFTS)
def theft(request):
    return request.param


class TestFound:
    def test_with_the_claim(self, tmp_path, theft):
        steal, reading, _ = theft
        folder = save_model(tmp_path / "stolen", steal(vit()))
        evidence = verify_hub_model(folder, KEY, claim=claim_about(vit()))
        assert evidence.found
        assert evidence.log10_p < -8
        assert evidence.reading == reading
        assert evidence.committed_at is None

    def test_with_the_key_alone(self, tmp_path, theft):
        steal, _, found = theft
        folder = save_model(tmp_path / "stolen", steal(vit()))
        if found is CarrierError:
            with pytest.raises(CarrierError, match="No tensor can carry a mark"):
                verify_hub_model(folder, KEY)
        elif found is not None:
            assert verify_hub_model(folder, KEY).found is found

    @pytest.mark.parametrize("wrong", [THIEF, another_key(1), KEY.for_recipient("x")])
    def test_with_a_wrong_key(self, tmp_path, theft, wrong):
        steal, _, found = theft
        folder = save_model(tmp_path / "stolen", steal(vit()))
        # A wrong key with a claim of its own over the same tensors: all the tries of a right one.
        evidence = verify_hub_model(folder, wrong, claim=claim_about(vit(), wrong))
        assert evidence.verdict == "not found"
        assert evidence.log10_p > -3
        if found is True:
            assert verify_hub_model(folder, wrong).log10_p > -3

    def test_an_unmarked_model_treated_alike(self, tmp_path, theft):
        steal, _, _ = theft
        folder = save_model(tmp_path / "stolen", steal(vit(None)))
        evidence = verify_hub_model(folder, KEY, claim=claim_about(vit()))
        assert evidence.verdict == "not found"
        assert evidence.log10_p > -3


class TestMustShow:
    """The line of the issue, over real HTTP, in a process of its own."""

    @pytest.fixture
    def hub(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/vit")
        push("demo/vit", save_model(tmp_path / "own", vit(), claim_about(vit())))
        loopback_hub.add_user("thief")
        loopback_hub.create_repo("thief/nice-model")
        KEY.save(tmp_path / "acme.key")
        THIEF.save(tmp_path / "thief.key")
        (tmp_path / "claim.json").write_bytes(claim_about(vit()).to_bytes())
        return loopback_hub

    def publish(self, hub, folder):
        """What the thief publishes: no claim, no card, no config."""
        (folder / "config.json").unlink()
        assert not (folder / CLAIM_FILE).exists()
        push("thief/nice-model", folder, token=hub.add_user("thief"))

    def test_renamed_cast_and_resharded(self, hub, tmp_path):
        stolen = cast(torch.bfloat16)(like_timm(other_head(vit())))
        folder = save_model(tmp_path / "stolen", stolen, shard="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 4
        self.publish(hub, folder)
        for claim in (tmp_path / "claim.json", "demo/vit"):
            done = run("thief/nice-model", "--key", tmp_path / "acme.key", "--claim", claim,
                       "--json", hub=hub)  # fmt: skip
            assert done.returncode == 0, done.stderr
            evidence = evidence_of(done)
            assert evidence["verdict"] == "found"
            assert evidence["log10_p"] < -15
            assert evidence["reading"] == "renamed"
            assert evidence["carriers"] == [f"blocks.{i}.mlp.fc1.weight" for i in range(LAYERS)]
            assert (evidence["committed_at"] is None) == (claim != "demo/vit")
        wrong = run("thief/nice-model", "--key", tmp_path / "thief.key", "--json", hub=hub)
        assert wrong.returncode == 1
        assert evidence_of(wrong)["verdict"] == "not found"

    def test_merely_stripped(self, hub, tmp_path):
        self.publish(hub, save_model(tmp_path / "stolen", vit()))
        done = run("thief/nice-model", "--key", tmp_path / "acme.key", "--json", hub=hub)
        assert done.returncode == 0, done.stderr
        evidence = evidence_of(done)
        assert evidence["log10_p"] < -15
        assert evidence["reading"] == "raw"
        assert evidence["committed_at"] is None

    def test_sharded_by_transformers(self, hub, tmp_path):
        from transformers import ViTForImageClassification

        model = ViTForImageClassification.from_pretrained(save_model(tmp_path / "own", vit()))
        model.to(torch.float16).save_pretrained(tmp_path / "stolen", max_shard_size="300KB")
        assert (tmp_path / "stolen" / "model.safetensors.index.json").exists()
        self.publish(hub, tmp_path / "stolen")
        done = run("thief/nice-model", "--key", tmp_path / "acme.key", hub=hub)
        assert done.returncode == 0, done.stderr
        assert "FOUND" in done.stdout


class TestThievesClaims:
    """What a thief may put in place of the claim."""

    def verified(self, tmp_path, content: bytes, key=KEY, **options):
        folder = save_model(tmp_path / "stolen", vit())
        (folder / CLAIM_FILE).write_bytes(content)
        return verify_hub_model(folder, key, **options)

    def test_a_valid_claim_of_the_thief(self, tmp_path):
        evidence = self.verified(tmp_path, claim_about(vit(), THIEF).to_bytes())
        assert evidence.found
        assert evidence.reading == "raw"
        assert any("another key" in note for note in evidence.notes)
        # Nor does the claim make the thief's key fit.
        assert not verify_hub_model(tmp_path / "stolen", THIEF).found

    def test_a_thief_who_hides_the_carriers(self, tmp_path):
        claim = claim_about(vit(), THIEF, secret_carriers=True).public
        assert self.verified(tmp_path, claim.to_bytes()).found

    def test_a_claim_over_other_tensors(self, tmp_path):
        names = [fc1(i).replace("intermediate", "attention.output") for i in range(LAYERS)]
        claim = claim_about(vit(), THIEF, names=names, scheme=Scheme(bits=8))
        assert self.verified(tmp_path, claim.to_bytes()).found

    def test_the_owners_commitment_under_the_thiefs_signature(self, tmp_path):
        # Anyone can copy a commitment; nobody else can sign for its key.
        import dataclasses

        ours = claim_about(vit())
        draft = dataclasses.replace(ours, public_key=THIEF.public_key, signature="")
        forged = dataclasses.replace(draft, signature=THIEF.sign(draft._signed_bytes()))
        forged.check("here")  # well-formed and signed, but by another
        assert self.verified(tmp_path, forged.to_bytes()).found
        evidence = self.verified(tmp_path, forged.to_bytes(), THIEF)
        assert evidence.verdict == "not found"
        for key in (KEY, THIEF):
            with pytest.raises(Exception, match="does not belong to this key"):
                verify_hub_model(tmp_path / "stolen", key, claim=forged)


class TestDisguises:
    def test_a_decoy_of_the_same_shape(self, tmp_path):
        # An unused tensor, ignored on loading, that moves every default carrier by one place.
        stolen = vit() | {"vit.encoder.layer.00.x.weight": torch.randn(256, 64)}
        folder = save_model(tmp_path / "stolen", stolen)
        assert verify_hub_model(folder, KEY, claim=claim_about(vit())).found

    def test_noise_as_large_as_the_weights(self, tmp_path):
        folder = save_model(tmp_path / "stolen", noisy(vit(), 1.0))
        assert verify_hub_model(folder, KEY).log10_p < -15

    def test_all_carriers_replaced_is_told_as_not_found(self, tmp_path):
        stolen = all_but_one_replaced(vit()) | {fc1(3): torch.randn(256, 64)}
        evidence = verify_hub_model(
            save_model(tmp_path / "stolen", stolen), KEY, claim=claim_about(vit())
        )
        assert evidence.verdict == "not found"
        assert evidence.log10_p > -3

    def test_secret_carriers_are_read_from_the_owners_copy(self, tmp_path):
        names = [f"vit.encoder.layer.{i}.output.dense.weight" for i in (1, 4, 5)]
        tensors = vit(None)
        from hf_watermark.carriers import named_carriers
        from hf_watermark.projections import Projection

        carriers = named_carriers({n: tuple(t.shape) for n, t in tensors.items()}, names)
        projection = Projection(KEY, Scheme(), carriers)
        for i, carrier in enumerate(carriers):
            u = projection.row_signs(i).astype(np.float32) * projection.message_signs
            change = torch.from_numpy((u @ projection.x(i)).astype(np.float32))
            w = tensors[carrier.name]
            tensors[carrier.name] = w + change * (0.15 * w.norm() / change.norm())
        claim = claim_about(tensors, names=names, secret_carriers=True)
        folder = save_model(tmp_path / "own", tensors, claim)
        assert not any(name.encode() in (folder / CLAIM_FILE).read_bytes() for name in names)
        assert verify_hub_model(folder, KEY, claim=claim).carriers == tuple(names)
        for steal in (like_timm, half_deleted_renumbered, shuffled_names):
            stolen = save_model(tmp_path / "stolen", steal(tensors))
            assert verify_hub_model(stolen, KEY, claim=claim).found
        theirs = claim_about(tensors, THIEF, names=names)
        assert not verify_hub_model(stolen, THIEF, claim=theirs).found

    def test_reshaped_into_a_large_repo(self, tmp_path):
        # Progressive reading of a copy whose shards hold other things too.
        shapes = {f"blocks.{i}.mlp.fc1.weight": (1024, 256) for i in range(4)}
        tensors = marked_arrays(shapes, KEY) | {"tokens": torch.zeros(1000, 100)}
        folder = save_model(tmp_path / "stolen", tensors, shard="1500KB")
        evidence = verify_hub_model(folder, KEY)
        assert evidence.found
        assert evidence.bytes_read < 0.6 * evidence.bytes_total


def test_a_pickle_of_the_stolen_weights_is_refused(tmp_path):
    folder = tmp_path / "stolen"
    folder.mkdir()
    torch.save(vit(), folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes(vit_config())
    KEY.save(tmp_path / "acme.key")
    refused(run(folder, "--key", tmp_path / "acme.key"), "pickles are never opened", "Convert")
