"""Which readings are tried, how many that makes, and what is fetched for them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from marked_models import (
    KEY,
    LAYERS,
    all_but_one_replaced,
    another_key,
    carriers_of,
    claim_about,
    fc1,
    identity_layer_first,
    like_timm,
    marked_arrays,
    other_head,
    renumbered,
    save_model,
    shuffled_names,
    vit,
    without_prefix,
)

from hf_watermark import Scheme
from hf_watermark.carriers import Carrier
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import CarrierError, CarrierMissingError
from hf_watermark.extraction import Extraction
from hf_watermark.files import FolderFiles
from hf_watermark.projections import Projection
from hf_watermark.readings import Plan, read_suspect
from hf_watermark.significance import log10_normal_tail

ALPHA = 1e-6

# A residual network: the second convolutions are the carriers, the first ones have their shapes.
RESNET = {
    f"layers.{i}.conv{j}.weight": (side, side, 3, 3)
    for i, side in enumerate((32, 32, 64))
    for j in (1, 2)
}
# Four carriers of 2^18 weights each: four looks before the whole.
LARGE = {f"blocks.{i}.mlp.fc1.weight": (1024, 256) for i in range(4)}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def plan_for(suspect, **options):
    return Plan.make(carriers_of(vit()), shapes_of(suspect), **options)


class TestTries:
    """Every number is counted by hand: looks x assignments + carriers alone + replacements."""

    @pytest.mark.parametrize(
        ("suspect", "assignments", "pairs", "tries"),
        [
            # Under their own names: one pooled reading, six carriers alone.
            (vit, 1, 0, 1 + 6),
            (lambda: other_head(vit()), 1, 0, 1 + 6),
            # Under other names in the same order: the rule and the order give one and the same
            # assignment; beside it six tensors in place of each of six carriers.
            (lambda: like_timm(vit()), 1, 36, 1 + 6 + 36),
            (lambda: without_prefix(vit()), 1, 36, 1 + 6 + 36),
            # In no order: the rule finds no carriers, but there are six places for six tensors.
            (lambda: shuffled_names(vit()), 1, 36, 1 + 6 + 36),
            # Three of six layers, numbers kept: three alone; three tensors in place of six
            # carriers, but for the three that were read under their own name.
            (
                lambda: renumbered(vit(), lambda i: i if i % 2 == 0 else None),
                1,
                15,
                1 + 3 + 15,
            ),
            # The same, renumbered: the names 0, 1 and 2 are there, and are not to be trusted.
            (
                lambda: renumbered(vit(), lambda i: i // 2 if i % 2 else None),
                1,
                15,
                1 + 3 + 15,
            ),
            # Seven layers: every name is there, but the default rule leads to one more.
            (lambda: identity_layer_first(vit()), 1, 36, 1 + 6 + 36),
            # One layer left: a single carrier is not read alone once more.
            (lambda: renumbered(vit(), lambda i: i if i == 2 else None), 1, 5, 1 + 5),
        ],
        ids=["same", "head", "timm", "prefix", "shuffled", "half", "half, renumbered",
             "inserted", "one layer"],
    )  # fmt: skip
    def test_layouts_of_a_vit(self, suspect, assignments, pairs, tries):
        plan = plan_for(suspect())
        assert len(plan.assignments) == assignments
        assert len(plan.pairs) == len(set(plan.pairs)) == pairs
        assert plan.tries == tries
        assert plan.looks == (1.0,)

    def test_a_resnet_under_its_own_names(self):
        carriers = tuple(Carrier(name, RESNET[name]) for name in RESNET if "conv2" in name)
        plan = Plan.make(carriers, RESNET)
        assert plan.pairs == ()  # though the first convolutions have the carriers' shapes
        assert plan.tries == 1 + 3

    def test_a_renamed_resnet(self):
        carriers = tuple(Carrier(name, RESNET[name]) for name in RESNET if "conv2" in name)
        suspect = {f"net.{name.replace('conv', 'c')}": shape for name, shape in RESNET.items()}
        plan = Plan.make(carriers, suspect)
        # Two carriers of side 32 with four tensors of that shape, one of side 64 with two. By order
        # alone nothing can be told (four tensors for two places); by the rule it can.
        assert [list(a.values()) for a in plan.assignments] == [
            [f"net.layers.{i}.c2.weight" for i in range(3)]
        ]
        assert len(plan.pairs) == 2 * 4 + 1 * 2
        assert plan.tries == 1 + 3 + 10

    def test_two_ways_to_guess(self):
        # Fused names hide the first carriers from the rule; what order says differs from it.
        carriers = (Carrier("a.0.x.weight", (32, 16)), Carrier("a.1.x.weight", (32, 16)))
        suspect = {"b.0.q.weight": (32, 16), "b.1.y.weight": (32, 16)}
        plan = Plan.make(carriers, suspect)
        assert [dict(a) for a in plan.assignments] == [{0: "b.0.q.weight", 1: "b.1.y.weight"}]
        suspect["b.2.y.weight"] = (32, 16)
        plan = Plan.make(carriers, suspect)
        assert [dict(a) for a in plan.assignments] == [{0: "b.1.y.weight", 1: "b.2.y.weight"}]
        assert plan.tries == 1 + 2 + 2 * 3

    def test_looks_count(self):
        carriers = tuple(Carrier(name, shape) for name, shape in LARGE.items())
        plan = Plan.make(carriers, LARGE)
        # The first look is 2^18 of 2^20 weights; each is sqrt(2) larger; below 3/4, then the whole.
        assert plan.looks == pytest.approx((0.25, 0.25 * 2**0.5, 0.5, 0.5 * 2**0.5, 1.0))
        assert plan.tries == 5 + 4
        assert Plan.make(carriers, LARGE, progressive=False).tries == 1 + 4
        renamed = {name.replace("blocks", "layer"): shape for name, shape in LARGE.items()}
        assert Plan.make(carriers, renamed).tries == 5 + 4 + 4 * 4

    def test_the_evidence_is_corrected_by_them(self, tmp_path):
        # A wrong key on a renamed model, so that everything that was planned is read.
        tensors = vit()
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", like_timm(tensors))))
        wrong = another_key(0)
        plan = Plan.make(carriers_of(tensors), checkpoint.shapes())
        projection = Projection(wrong, Scheme(), plan.carriers)
        finding = read_suspect(checkpoint, projection, plan, ALPHA)
        assert finding.log10_p == pytest.approx(
            min(0.0, finding.reading.log10_p + math.log10(43)), abs=1e-12
        )


class TestAllThatIsPlannedIsTried:
    @pytest.mark.parametrize(
        "suspect",
        [
            vit,
            lambda: like_timm(vit()),
            lambda: renumbered(vit(), lambda i: i // 2 if i % 2 else None),
        ],
    )
    def test_every_reading_is_one_of_the_tries(self, tmp_path, monkeypatch, suspect):
        made = []
        real = Extraction.reading
        monkeypatch.setattr(
            Extraction,
            "reading",
            lambda self, carrier=None: made.append(carrier) or real(self, carrier),
        )
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", suspect())))
        plan = Plan.make(carriers_of(vit()), checkpoint.shapes())
        read_suspect(checkpoint, Projection(another_key(0), Scheme(), plan.carriers), plan, 1e-300)
        assert len(made) == plan.tries

    def test_the_best_of_them_is_told(self, tmp_path):
        # Only carrier 3 is left: the pooled reading says less than that one alone.
        tensors = all_but_one_replaced(vit())
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", tensors)))
        plan = Plan.make(carriers_of(tensors), checkpoint.shapes())
        projection = Projection(KEY, Scheme(), plan.carriers)
        # So strict that nothing passes.
        finding = read_suspect(checkpoint, projection, plan, 1e-300)
        assert (finding.how, finding.carriers) == ("raw, one carrier", (fc1(3),))
        # At the usual limit either may have passed; both see the mark.
        assert read_suspect(checkpoint, projection, plan, ALPHA).log10_p < -6


class TestNoCarriers:
    def test_other_shapes(self):
        with pytest.raises(CarrierMissingError, match="none of the carriers") as caught:
            plan_for({"model.0.weight": torch.zeros(8, 8)})
        assert "6 tensors such as" in str(caught.value)
        assert "[256, 64]" in str(caught.value)

    def test_transposed(self):
        # Row signs and projections cannot be told apart from the shape: refused, not guessed.
        with pytest.raises(CarrierMissingError):
            plan_for({fc1(i): torch.zeros(64, 256) for i in range(LAYERS)})

    def test_names_are_not_enough(self):
        plan = plan_for({fc1(0): torch.zeros(64, 256), "other": torch.zeros(256, 64)})
        assert plan.assignments == ()
        assert plan.pairs == tuple((i, "other") for i in range(LAYERS))


class TestReadInPlaceOf:
    """What stands where a carrier was, in a copy whose layers were deleted or inserted."""

    def read(self, tmp_path, tensors, key=KEY):
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", tensors)))
        plan = Plan.make(carriers_of(vit()), checkpoint.shapes())
        return read_suspect(checkpoint, Projection(key, Scheme(), plan.carriers), plan, ALPHA)

    @pytest.mark.parametrize(
        "theft",
        [
            lambda t: renumbered(t, lambda i: i - 1 if i else None),
            lambda t: renumbered(t, lambda i: i // 2 if i % 2 else None),
            identity_layer_first,
        ],
        ids=["the first deleted", "every other deleted", "one inserted"],
    )
    def test_renumbered_layers(self, tmp_path, theft):
        finding = self.read(tmp_path, theft(vit()))
        assert finding.how == "renamed, one carrier"
        assert finding.log10_p < -15
        assert self.read(tmp_path, theft(vit()), another_key(1)).log10_p > -3

    @pytest.mark.parametrize(
        "planted", [torch.full((256, 64), math.nan), torch.zeros(256, 64).to(torch.int8)]
    )
    @pytest.mark.parametrize("name", ["a.0.lin.weight", "z.9.lin.weight"])
    def test_a_planted_tensor_does_not_hide_the_mark(self, tmp_path, planted, name):
        finding = self.read(tmp_path, like_timm(vit()) | {name: planted})
        assert finding.log10_p < -15

    def test_nor_does_it_let_it_pass_for_absent(self, tmp_path):
        planted = {"a.0.lin.weight": torch.full((256, 64), math.inf)}
        with pytest.raises(CarrierError, match="not finite"):
            self.read(tmp_path, like_timm(vit(None)) | planted)


class TestProgressive:
    def read(self, tmp_path, tensors, key, *, progressive, progress=None):
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", tensors)))
        asked = []
        real = checkpoint.read_rows
        checkpoint.read_rows = lambda *block: asked.append(block) or real(*block)
        plan = Plan.make(carriers_of(tensors), checkpoint.shapes(), progressive=progressive)
        projection = Projection(key, Scheme(), plan.carriers)
        finding = read_suspect(checkpoint, projection, plan, ALPHA, progress)
        return finding, asked, checkpoint.bytes_read

    def test_stops_early_with_the_same_verdict(self, tmp_path):
        tensors = marked_arrays(LARGE, KEY)
        early, _, few = self.read(tmp_path, tensors, KEY, progressive=True)
        full, _, many = self.read(tmp_path, tensors, KEY, progressive=False)
        assert few < 0.4 * many
        assert full.log10_p < early.log10_p < -6
        assert early.how == full.how == "raw"
        # Half of the carriers' rows were read, at about half of the signal's square.
        assert full.reading.soft / early.reading.soft == pytest.approx(2.0, rel=0.25)

    def test_reads_everything_before_it_says_not_found(self, tmp_path):
        tensors = marked_arrays(LARGE, None)
        finding, asked, read = self.read(tmp_path, tensors, KEY, progressive=True)
        assert finding.log10_p > -3
        rows = {name: sorted(block[1:] for block in asked if block[0] == name) for name in LARGE}
        for name, blocks in rows.items():  # each row once
            # A look's fraction of 1024 rows, rounded up (twice sqrt 2 is a hair more than 2).
            assert [start for start, _ in blocks] == [0, 256, 363, 513, 725], name
            assert blocks[-1][1] == 1024
            assert all(a[1] == b[0] for a, b in pairwise(blocks))
        assert read > 2**22

    def test_the_schedule_depends_on_shapes_alone(self, tmp_path):
        _, first, _ = self.read(tmp_path, marked_arrays(LARGE, None), KEY, progressive=True)
        second_weights = {n: t * 100 + 5 for n, t in marked_arrays(LARGE, None, seed=1).items()}
        _, second, _ = self.read(tmp_path, second_weights, another_key(2), progressive=True)
        _, marked, _ = self.read(tmp_path, marked_arrays(LARGE, KEY), KEY, progressive=True)
        assert sorted(first) == sorted(second)
        assert 0 < len(marked) < len(first)
        assert set(marked) < set(first)

    def test_pieces_are_small(self, tmp_path):
        # However large a look is, eight pieces of 2^19 weights are under way at a time.
        shapes = {f"blocks.{i}.mlp.fc1.weight": (4096, 512) for i in range(2)}
        _, asked, _ = self.read(tmp_path, marked_arrays(shapes, None), KEY, progressive=False)
        assert max(stop - start for _, start, stop in asked) * 512 <= 2**19

    def test_progress(self, tmp_path):
        seen = []
        tensors = marked_arrays(LARGE, None)
        self.read(tmp_path, tensors, KEY, progressive=True, progress=lambda *n: seen.append(n))
        assert seen[-1] == (2**20, 2**20)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})

    def test_carriers_of_few_rows(self, tmp_path):
        # A fraction of 8 rows is rounded up: every carrier is in the first look, no row is in two.
        shapes = {"blocks.0.a.weight": (8, 100_000), "blocks.1.a.weight": (1000, 700)}
        tensors = marked_arrays(shapes, None)
        _, asked, _ = self.read(tmp_path, tensors, KEY, progressive=True)
        few = [block[1:] for block in asked if block[0] == "blocks.0.a.weight"]
        assert few == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 8)]


class TestStatistic:
    """The reading against the textbook formula, from the whole tensors, in float64."""

    @pytest.mark.parametrize("key", [KEY, another_key(3)])
    def test_soft(self, tmp_path, key):
        tensors = vit()
        checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", tensors)))
        carriers = carriers_of(tensors)
        projection = Projection(key, Scheme(), carriers)
        plan = Plan.make(carriers, checkpoint.shapes())
        finding = read_suspect(checkpoint, projection, plan, 1e-300)
        z = projection.responses([tensors[c.name].double().numpy() for c in carriers])
        signs = projection.message_signs
        if key is KEY:
            assert finding.how == "raw"
            assert finding.reading.matched == np.count_nonzero(signs * z > 0) == 64
        y = [
            projection.row_signs(i).T.astype(float) @ tensors[c.name].double().numpy()
            / (tensors[c.name].double().square().mean().sqrt().item() * math.sqrt(c.rows))
            for i, c in enumerate(carriers)
        ]  # fmt: skip
        variance = sum((part**2).sum() * 256 / (6 * 256 * 64) for part in y)
        soft = float(signs @ z) / math.sqrt(variance)
        pooled = log10_normal_tail(soft) + math.log10(plan.tries)
        assert finding.log10_p <= pooled + 1e-3 * abs(pooled)
        if key is KEY:
            assert finding.log10_p == pytest.approx(pooled, rel=1e-5)


def test_a_claim_lists_the_carriers_in_the_keys_order(tmp_path):
    # The position, not the name, binds a carrier to the key. Where names come in another order than
    # by the default rule, the rule's order is tried beside theirs, and counted.
    tensors = vit()
    claim = claim_about(tensors, names=[fc1(i) for i in reversed(range(LAYERS))])
    checkpoint = Checkpoint.open(FolderFiles(save_model(tmp_path / "m", tensors)))
    carriers = tuple(claimed.carrier for claimed in claim.carriers)
    assert [c.name for c in carriers] == [fc1(i) for i in reversed(range(LAYERS))]
    plan = Plan.make(carriers, checkpoint.shapes())
    finding = read_suspect(checkpoint, Projection(KEY, Scheme(), carriers), plan, ALPHA)
    assert [dict(a) for a in plan.assignments] == [
        {i: fc1(LAYERS - 1 - i) for i in range(LAYERS)},
        {i: fc1(i) for i in range(LAYERS)},
    ]
    assert plan.tries == 2 * (1 + 6) + 30
    assert (finding.how, finding.reading.matched) == ("renamed", 64)
