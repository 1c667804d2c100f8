"""The owner's original, what of it is compared, and the aligned reading of whole verifications."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from disguised_models import DISGUISES, Model, carriers_of, marked, model, save
from disguises import disturbed
from marked_models import KEY, LAYERS, THIEF, evidence_of, push, refused, run, save_model, vit
from safetensors.torch import load_file, save_file

from hf_watermark import Claim
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim, reference_digests, reference_tensors
from hf_watermark.direct import embed_checkpoint
from hf_watermark.errors import CarrierError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.readings import Plan
from hf_watermark.scheme import Scheme
from hf_watermark.verify import verify_hub_model

PREFIXES = {"ViT": "vit.", "basic": "resnet.", "ConvNext": "convnext.", "Swin": "swin."}
FAMILIES = tuple(PREFIXES)


def steal(tmp_path, family: str, *, sigma: float = 0.05):
    """A disguised copy of lightly disturbed weights, without a claim."""
    owner = marked(family)
    copy = DISGUISES[family]["all"](disturbed(owner.tensors, sigma))
    return save(tmp_path / f"stolen-{family}", copy, owner.config)


def claim_of(owner: Model) -> Claim:
    claim = Claim.from_bytes((owner.folder / CLAIM_FILE).read_bytes(), "")
    claim.check("")
    return claim


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


class TestFound:
    def test_in_a_folder(self, tmp_path, family):
        stolen, owner = steal(tmp_path, family), marked(family)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
        assert evidence.found
        assert evidence.log10_p < -6
        assert evidence.reading == "aligned"
        assert set(evidence.carriers) <= {c.name for c in carriers_of(owner.tensors)}
        assert any("that was undone" in note for note in evidence.notes)
        assert outcome(stolen, owner.folder, align="never")[0] != "found"
        whole = verify_hub_model(stolen, KEY, claim=owner.folder, read="all")
        assert (whole.reading, whole.matched) == ("aligned", 64)
        assert whole.log10_p < -100

    def test_by_the_claims_file_in_the_owners_folder(self, tmp_path, family):
        stolen, owner = steal(tmp_path, family), marked(family)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder / CLAIM_FILE)
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")

    def test_by_the_few_tensors_that_are_compared(self, tmp_path, family):
        stolen, owner = steal(tmp_path, family), marked(family)
        names = [c.name for c in carriers_of(owner.tensors)]
        supports = reference_tensors({n: tuple(t.shape) for n, t in owner.tensors.items()}, names)
        few = {n: owner.tensors[n] for support in supports.values() for n in support}
        # The names of the carriers, not their weights, tell the layout.
        few |= {name: torch.zeros_like(owner.tensors[name]) for name in names}
        folder = tmp_path / "few"
        folder.mkdir()
        save_file(few, folder / "model.safetensors")
        shutil.copy(owner.folder / CLAIM_FILE, folder)
        assert verify_hub_model(stolen, KEY, claim=folder).reading == "aligned"

    def test_on_the_hub(self, loopback_hub, tmp_path, family):
        loopback_hub.create_repo("demo/original")
        push("demo/original", marked(family).folder)
        loopback_hub.create_repo("demo/copy")
        push("demo/copy", steal(tmp_path, family))
        evidence = verify_hub_model("demo/copy", KEY, claim="demo/original")
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")
        assert evidence.committed_at is not None
        assert outcome("demo/copy", "demo/original", align="never")[0] != "found"

    def test_from_the_command_line(self, loopback_hub, tmp_path):
        loopback_hub.create_repo("demo/original")
        push("demo/original", marked("ViT").folder)
        loopback_hub.create_repo("demo/copy")
        push("demo/copy", steal(tmp_path, "ViT"))
        KEY.save(tmp_path / "acme.key")
        options = ("demo/copy", "--key", tmp_path / "acme.key", "--claim", "demo/original")
        done = run(*options, "--json", hub=loopback_hub)
        assert done.returncode == 0, done.stderr
        assert evidence_of(done)["reading"] == "aligned"
        # Dummy neurons changed every carrier's shape: nothing is left to read raw.
        refused(run(*options, "--align", "never", hub=loopback_hub), "none of the carriers")
        done = run(*options, hub=loopback_hub)
        assert done.returncode == 0
        assert "put back into the order" in done.stdout
        assert "that was undone" in done.stdout

    def test_one_carrier_left(self, tmp_path):
        owner = marked("basic")
        names = [c.name for c in carriers_of(owner.tensors)]
        replaced = {n: torch.randn_like(owner.tensors[n]) for n in names[:-1]}
        copy = DISGUISES["basic"]["all"](owner.tensors | replaced)
        stolen = save(tmp_path / "stolen", copy, owner.config)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
        assert evidence.found
        assert evidence.reading.startswith("aligned")

    def test_under_another_prefix(self, tmp_path):
        owner = marked("ViT")
        copy = DISGUISES["ViT"]["all"](owner.tensors)
        copy = {name.removeprefix("vit."): tensor for name, tensor in copy.items()}
        stolen = save(tmp_path / "stolen", copy, owner.config)
        assert verify_hub_model(stolen, KEY, claim=owner.folder).reading == "aligned"

    @pytest.mark.parametrize("family", ["ViT", "basic", "bottleneck", "ConvNext", "Swin"])
    def test_under_another_librarys_names(self, tmp_path, family):
        owner = marked(family)
        copy = renamed(DISGUISES[family]["all"](owner.tensors))
        stolen = save(tmp_path / "stolen", copy, owner.config)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")
        assert all(name in copy for name in evidence.carriers)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_among_decoys(self, tmp_path, family):
        """Tensors that no library loads, under names that another family or tower would have."""
        owner = marked(family)
        copy = DISGUISES[family]["all"](owner.tensors)
        decoys = {}
        for other in FAMILIES:
            junk = {f"a.{n}": torch.randn_like(t.float()) for n, t in marked(other).tensors.items()}
            decoys |= junk | {n: t.clone() for n, t in renamed(junk).items() if n not in junk}
        prefix = PREFIXES[family]
        decoys[f"{prefix}pre_layrnorm.weight"] = torch.ones(64)
        decoys[f"{prefix}encoder.layer.0.mlp.fc1.weight"] = torch.randn(128, 64)
        decoys[f"{prefix}encoder.layer.0.mlp.fc2.weight"] = torch.randn(64, 128)
        decoys[f"{prefix}encoder.stages.0.layers.0.layer.7.convolution.weight"] = torch.ones(9, 9)
        merging = f"{prefix}encoder.layers.2.downsample."  # as if it stood before its stage
        decoys[f"{merging}norm.weight"] = torch.ones(128)
        decoys[f"{merging}reduction.weight"] = torch.randn(64, 128)
        for name, tensor in owner.tensors.items():
            for digits in OTHER_DIGITS:
                decoys[renumbered(name, digits)] = torch.randn_like(tensor.float())
        stolen = save(tmp_path / "stolen", decoys | copy, owner.config)
        evidence = verify_hub_model(stolen, KEY, claim=owner.folder)
        assert (evidence.verdict, evidence.reading) == ("found", "aligned")


OTHER_DIGITS = ("\uff10\uff11\uff12", ("00", "01", "02"))
"""What `int` takes for 0, 1 and 2, and no library writes."""


def renumbered(name, digits):
    return re.sub(r"(?<=\.)[0-2](?=\.)", lambda match: digits[int(match[0])], name)


TIMM = (
    (r"^vit\.encoder\.layer\.", "blocks."),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"(\d+)\.output\.dense", r"\1.mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^vit\.embeddings\.cls_token", "cls_token"),
    (r"^convnext\.embeddings\.patch_embeddings", "stem.0"),
    (r"^convnext\.encoder\.(stages\.\d+)\.layers", r"\1.blocks"),
    (r"^convnext\.encoder\.(stages\.\d+)\.downsampling_layer", r"\1.downsample"),
    (r"dwconv", "conv_dw"),
    (r"(blocks\.\d+)\.layernorm", r"\1.norm"),
    (r"pwconv(\d)", r"mlp.fc\1"),
    (r"layer_scale_parameter", "gamma"),
    (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "patch_embed.norm"),
    (r"^swin\.encoder\.(layers\.\d+\.blocks)", r"\1"),
    (r"^resnet\.embedder\.embedder\.convolution", "conv1"),
    (r"^resnet\.embedder\.embedder\.normalization", "bn1"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
)


def renamed(tensors):
    """The names of timm, which are those of torchvision for a ResNet."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in TIMM:
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(.*)", name):
            name = f"layer{int(match[1]) + 1}.{match[2]}.{match[3]}"
        if match := re.fullmatch(r"swin\.encoder\.layers\.(\d)\.downsample\.(.*)", name):
            name = f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
        if match := re.fullmatch(r"(layer\d\.\d)\.layer\.(\d)\.(\w+)\.(\w+)", name):
            part = {"convolution": "conv", "normalization": "bn"}[match[3]]
            name = f"{match[1]}.{part}{int(match[2]) + 1}.{match[4]}"
        found[name] = tensor
    return found


class TestNotFound:
    def test_an_innocent(self, tmp_path, family):
        innocent = model(family, seed=1)
        for name, disguise in DISGUISES[family].items():
            folder = save(tmp_path / name, disguise(innocent.tensors), innocent.config)
            evidence = verify_hub_model(folder, KEY, claim=marked(family).folder)
            assert evidence.verdict == "not found"
            assert evidence.log10_p > -4

    def test_another_key_with_a_claim_of_its_own(self, tmp_path, family):
        owner = marked(family)
        folder = tmp_path / "theirs"
        shutil.copytree(owner.folder, folder)
        names = [c.name for c in carriers_of(owner.tensors)]
        checkpoint = Checkpoint.open(FolderFiles(folder))
        references = reference_digests(checkpoint, names)
        claim = make_claim(checkpoint, THIEF, Scheme(), names, references=references)
        (folder / CLAIM_FILE).write_bytes(claim.to_bytes())
        evidence = verify_hub_model(steal(tmp_path, family), THIEF, claim=folder)
        assert evidence.verdict == "not found"
        assert evidence.log10_p > -4


class TestTries:
    def test_they_are_counted_before_anything_is_read(self, family):
        owner = marked(family)
        count = len(carriers_of(owner.tensors))
        shapes = {n: tuple(t.shape) for n, t in owner.tensors.items()}
        raw = Plan.make(carriers_of(owner.tensors), shapes)
        plan = Plan.make(carriers_of(owner.tensors), shapes, aligned=range(count))
        assert plan.aligned_looks[-1] == count
        assert plan.tries == raw.tries + len(plan.aligned_looks) + count
        whole = Plan.make(
            carriers_of(owner.tensors), shapes, aligned=range(count), progressive=False
        )
        assert whole.aligned_looks == (count,)

    def test_a_plain_copy_pays_for_them_too(self, tmp_path, family):
        owner = marked(family)
        copy = save(tmp_path / "copy", owner.tensors, owner.config)
        plain = verify_hub_model(copy, KEY, claim=owner.folder, align="never")
        counted = verify_hub_model(copy, KEY, claim=owner.folder)
        assert plain.reading == counted.reading == "raw"
        assert counted.tries > plain.tries
        assert counted.log10_p > plain.log10_p
        assert counted.bytes_read == plain.bytes_read  # the original stays closed

    def test_without_an_original_nothing_is_counted(self, tmp_path):
        folder = save_model(tmp_path / "own", vit())
        assert verify_hub_model(folder, KEY).tries == 1 + LAYERS


class TestClaims:
    def test_a_claim_fixes_what_is_compared(self, family):
        claim = claim_of(marked(family))
        assert all(len(claimed.reference) == 64 for claimed in claim.carriers)
        assert Claim.from_bytes(claim.to_bytes(), "") == claim

    def test_an_original_that_was_exchanged(self, tmp_path, family):
        """Whoever may choose the reference afterwards may fit it to the suspect."""
        owner, stolen = marked(family), steal(tmp_path, family)
        folder = tmp_path / "exchanged"
        shutil.copytree(owner.folder, folder)
        names = [c.name for c in carriers_of(owner.tensors)]
        supports = reference_tensors({n: tuple(t.shape) for n, t in owner.tensors.items()}, names)
        changed = {n: owner.tensors[n] * 1.001 for support in supports.values() for n in support}
        save_file(owner.tensors | changed, folder / "model.safetensors")
        verdict, notes = outcome(stolen, folder)
        assert verdict != "found"
        assert "not the claim's original" in notes

    def test_older_claims_are_read_raw(self, tmp_path):
        fields = json.loads((marked("basic").folder / CLAIM_FILE).read_bytes())
        assert all(carrier.pop("reference") for carrier in fields["carriers"])
        carriers = Claim.from_bytes(json.dumps(fields).encode(), "").carriers
        claim = Claim.make(KEY, Scheme(), carriers)
        folder = tmp_path / "original"
        shutil.copytree(marked("basic").folder, folder)
        (folder / CLAIM_FILE).write_bytes(claim.to_bytes())
        assert b"reference" not in claim.to_bytes()
        verdict, notes = outcome(steal(tmp_path, "basic"), folder)
        assert verdict == "not found"
        assert "the claim fixes nothing to compare" in notes

    def test_layers_that_were_trained_beside_the_mark_are_not_compared(self, tmp_path):
        """They know of it: see `references`."""
        owner = marked("ViT")
        names = [c.name for c in carriers_of(owner.tensors)]
        trained = disturbed({n: t for n, t in owner.tensors.items() if n not in names}, 0.01)
        folder = save(tmp_path / "trained", owner.tensors | trained, owner.config)
        for earlier in (True, False):
            again = tmp_path / f"again-{earlier}"
            if earlier:
                shutil.copy(owner.folder / CLAIM_FILE, folder)
            else:
                (folder / CLAIM_FILE).unlink()
            embed_checkpoint(folder, KEY, again)
            assert b"reference" not in (again / CLAIM_FILE).read_bytes()
        other = tmp_path / "another key"
        embed_checkpoint(folder, THIEF, other)
        assert b"reference" in (other / CLAIM_FILE).read_bytes()

    def test_marking_again_keeps_what_was_fixed(self, tmp_path):
        owner = marked("basic")
        embed_checkpoint(owner.folder, KEY, tmp_path / "again", recipient="customer-17")
        again = Claim.from_bytes((tmp_path / "again" / CLAIM_FILE).read_bytes(), "")
        fixed = [claimed.reference for claimed in claim_of(owner).carriers]
        assert [claimed.reference for claimed in again.carriers] == fixed

    def test_secret_carriers_stay_secret(self, tmp_path):
        owner = marked("ViT")
        names = [carriers_of(owner.tensors)[1].name]
        checkpoint = Checkpoint.open(FolderFiles(owner.folder))
        references = reference_digests(checkpoint, names)
        claim = make_claim(
            checkpoint, KEY, Scheme(), names, secret_carriers=True, references=references
        )
        assert claim.carriers[0].reference is not None
        assert b"reference" not in claim.public.to_bytes()


class TestNotes:
    def test_a_mark_that_was_trained(self, tmp_path):
        """The trainer's claims fix nothing to compare: the layers know of the mark."""
        owner = marked("basic")
        names = [c.name for c in carriers_of(owner.tensors)]
        folder = tmp_path / "trained"
        shutil.copytree(owner.folder, folder)
        claim = make_claim(Checkpoint.open(FolderFiles(folder)), KEY, Scheme(), names)
        (folder / CLAIM_FILE).write_bytes(claim.to_bytes())
        verdict, notes = outcome(steal(tmp_path, "basic"), folder)
        assert verdict == "not found"
        assert "hf-watermark embed, with another key" in notes

    def test_no_original(self, tmp_path, family):
        owner, stolen = marked(family), steal(tmp_path, family)
        for claim in (claim_of(owner), copied(owner.folder / CLAIM_FILE, tmp_path / "lonely")):
            verdict, notes = outcome(stolen, claim)
            assert verdict != "found"
            if verdict == "not found":
                assert "--claim" in notes

    def test_another_architecture(self, tmp_path):
        other = {f"blocks.{i}.conv.weight": torch.randn(64, 32, 3, 3) for i in range(2)}
        folder = save_model(tmp_path / "other", other)
        evidence = verify_hub_model(folder, KEY)
        assert evidence.verdict == "not found"
        assert any("disguises of this architecture" in note for note in evidence.notes)
        assert evidence.reading.startswith("raw")

    def test_a_relative_of_another_size(self, tmp_path):
        owner = marked("basic")
        folder = save(tmp_path / "other", model("bottleneck").tensors, model("bottleneck").config)
        verdict, notes = outcome(folder, owner.folder)
        assert verdict != "found"
        assert notes

    def test_a_found_mark_has_none_of_them(self, tmp_path):
        evidence = verify_hub_model(save_model(tmp_path / "m", vit()), KEY)
        assert not any("raw weights" in note for note in evidence.notes)


class TestHostile:
    def test_not_finite(self, tmp_path):
        owner = marked("basic")
        copy = DISGUISES["basic"]["all"](owner.tensors)
        copy["resnet.embedder.embedder.convolution.weight"][0, 0, 0, 0] = float("nan")
        stolen = save(tmp_path / "stolen", copy, owner.config)
        with pytest.raises(CarrierError, match="not finite"):
            verify_hub_model(stolen, KEY, claim=owner.folder)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tensors_left_out_or_reshaped(self, tmp_path, family):
        owner = marked(family)
        copy = DISGUISES[family]["all"](owner.tensors)
        names = [c.name for c in carriers_of(owner.tensors)]
        supports = reference_tensors({n: tuple(t.shape) for n, t in owner.tensors.items()}, names)
        for name in {n for support in supports.values() for n in support}:
            for changed in (None, copy[name].reshape(-1), copy[name][:1], torch.zeros(0, 3)):
                rest = {n: t for n, t in copy.items() if n != name}
                folder = tmp_path / "changed"
                folder.mkdir(exist_ok=True)
                added = {} if changed is None else {name: changed.contiguous()}
                save_file(rest | added, folder / "model.safetensors")
                verdict, _ = outcome(folder, owner.folder)
                assert verdict in ("found", "not found", "refused")


def copied(file, folder):
    folder.mkdir(exist_ok=True)
    return shutil.copy(file, folder)


def outcome(suspect, claim, **options) -> tuple[str, str]:
    """The verdict and what is said about it; `refused` if nothing could be read."""
    try:
        evidence = verify_hub_model(suspect, KEY, claim=claim, **options)
    except CarrierError as error:
        return "refused", str(error)
    return evidence.verdict, " ".join(evidence.notes)


def test_two_keys_stand_what_either_is_lost_to(tmp_path):
    """One mark in the default carriers, one by another key in every layer, kept secret."""
    owner = marked("ViT")
    both = embed_checkpoint(owner.folder, THIEF, tmp_path / "both", carriers=["*.layer.*.weight"])
    tensors = load_file(both.folder / "model.safetensors")
    disguised = save(tmp_path / "disguised", DISGUISES["ViT"]["all"](tensors), owner.config)
    evidence = verify_hub_model(disguised, KEY, claim=owner.folder)
    assert (evidence.verdict, evidence.reading[:7]) == ("found", "aligned")
    random = torch.Generator().manual_seed(0)
    anew = {
        carrier.name: torch.randn(carrier.shape, generator=random) * tensors[carrier.name].std()
        for carrier in carriers_of(tensors)
    }
    redrawn = save(tmp_path / "redrawn", tensors | anew, owner.config)
    assert not verify_hub_model(redrawn, KEY, claim=owner.folder).found
    assert verify_hub_model(redrawn, THIEF, claim=both.claim).found
