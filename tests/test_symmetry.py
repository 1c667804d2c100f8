"""Function-preserving disguises: they keep the function, hide the mark, and are undone."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from disguised_models import (
    DISGUISES,
    HARMLESS,
    MODELS,
    aligned,
    carriers_of,
    marked,
    model,
    reading,
    shapes_of,
    side,
)
from disguises import disturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from marked_models import another_key
from scipy.stats import kstest

from hf_watermark.carriers import choose_carriers
from hf_watermark.claims import reference_tensors
from hf_watermark.scheme import Scheme
from hf_watermark.symmetry import Alignment, layout_of
from hf_watermark.symmetry.matching import equalised, match, rotation

CASES = [(family, name) for family, named in DISGUISES.items() for name in named]
FAMILIES = list(DISGUISES)


@pytest.mark.parametrize(("family", "name"), CASES)
class TestDisguises:
    def test_the_function_is_kept(self, family, name):
        owner = marked(family)
        disguised = DISGUISES[family][name](owner.tensors)
        before, after = owner.logits(owner.tensors), owner.logits(disguised)
        assert (before - after).abs().max() < 1e-4
        assert before.std() > 0.05  # there is something to keep

    def test_the_raw_reading_is_lost_and_the_aligned_one_is_not(self, family, name):
        owner = marked(family)
        disguised = DISGUISES[family][name](owner.tensors)
        raw = {c.name: disguised[c.name].numpy() for c in carriers_of(owner.tensors)}
        same = all(raw[c.name].shape == c.shape for c in carriers_of(owner.tensors))
        if same:
            soft = reading(owner.tensors, raw).soft
            assert soft > 25.0 if name in HARMLESS else soft < 10.0
        found = reading(owner.tensors, aligned(owner.tensors, disguised))
        assert found.soft > 30.0
        assert found.matched == 64

    @pytest.mark.parametrize("sigma", [0.05, 0.2])
    def test_of_a_disturbed_copy(self, family, name, sigma):
        owner = marked(family)
        copy = DISGUISES[family][name](disturbed(owner.tensors, sigma))
        assert reading(owner.tensors, aligned(owner.tensors, copy)).soft > 20.0

    def test_an_innocent_is_not_found(self, family, name):
        owner = marked(family)
        innocent = DISGUISES[family][name](model(family, seed=1).tensors)
        found = reading(owner.tensors, aligned(owner.tensors, innocent))
        assert abs(found.soft) < 4.5


@pytest.mark.parametrize("family", FAMILIES)
class TestNull:
    def test_what_is_where_depends_on_no_carrier(self, family):
        """`aligned` lets nobody read the reference's carriers; the suspect's do not matter."""
        owner, suspect = marked(family).tensors, model(family, seed=1).tensors
        negated = {carrier.name: -suspect[carrier.name] for carrier in carriers_of(owner)}
        first, second = aligned(owner, suspect), aligned(owner, suspect | negated)
        for name in negated:
            np.testing.assert_array_equal(first[name], -second[name])

    def test_an_unmarked_reference_aligns_alike(self, family):
        """The mark is in the carriers alone: it has no way into the alignment."""
        suspect = DISGUISES[family]["all"](model(family, seed=2).tensors)
        by_marked = aligned(marked(family).tensors, suspect)
        by_unmarked = aligned(model(family).tensors, suspect)
        for name, w in by_marked.items():
            np.testing.assert_array_equal(w, by_unmarked[name])

    def test_p_values_are_uniform(self, family):
        owner = marked(family).tensors
        suspects = [DISGUISES[family]["all"](model(family, seed=s).tensors) for s in (1, 2)]
        found = [aligned(owner, suspect) for suspect in (*suspects, owner)]
        scheme = Scheme(bits=16)
        soft = [
            reading(owner, arrays, another_key(1000 + number), scheme).soft
            for number in range(300)
            for arrays in found
        ]
        assert kstest(soft, "norm").pvalue > 0.01


def owner_key(tensors, name):
    return layout_of(shapes_of(tensors)).key(name)


def as_timm_names_it(name, ahead):
    for pattern, new in SWIN_IN_TIMM:
        name = re.sub(pattern, new, name)
    return re.sub(
        r"layers\.(\d)(?=\.downsample)", lambda match: f"layers.{int(match[1]) + ahead}", name
    )


SWIN_IN_TIMM = (
    (r"^swin(v2)?\.(encoder\.)?", ""),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"(?<!attention\.)intermediate\.dense", "mlp.fc1"),
    (r"(?<!attention\.)output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
)


class TestMatching:
    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 40), st.integers(0, 10), st.integers(0, 2**32 - 1), st.floats(0.0, 0.3))
    def test_a_permutation_is_found_among_strangers(self, n, extra, seed, noise):
        rng = np.random.default_rng(seed)
        reference = rng.standard_normal((n, 64))
        strangers = rng.standard_normal((extra, 64))
        order = rng.permutation(n + extra)
        suspect = np.concatenate([reference, strangers])[order]
        suspect = suspect * rng.uniform(0.1, 10.0, (n + extra, 1))
        suspect += (
            noise * np.abs(suspect).mean(axis=1, keepdims=True) * rng.standard_normal(suspect.shape)
        )
        np.testing.assert_array_equal(match(reference, suspect), np.argsort(order)[:n])

    def test_each_row_once_and_none_for_zeros(self):
        reference = np.eye(6)
        reference[2] = 0.0
        suspect = np.concatenate([np.eye(6)[:3], np.zeros((5, 6))])
        found = match(reference, suspect)
        assert found.tolist() == [0, 1, -1, 2, -1, -1] or set(found[found >= 0]) <= {0, 1, 2}
        assert found[2] == -1
        assert len(set(found[found >= 0])) == np.count_nonzero(found >= 0)

    def test_nothing(self):
        assert match(np.zeros((0, 3)), np.zeros((2, 3))).tolist() == []
        assert match(np.ones((2, 3)), np.zeros((0, 3))).tolist() == [-1, -1]
        assert match(np.zeros((2, 3)), np.zeros((4, 3))).tolist() == [-1, -1]

    def test_too_many_to_compare(self):
        wide = np.broadcast_to(np.ones((1, 1)), (2**14, 1))
        assert (match(wide, wide) == -1).all()

    def test_a_rotation_is_found(self):
        rng = np.random.default_rng(0)
        q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
        x = rng.standard_normal((12, 40))
        np.testing.assert_allclose(rotation(x, q @ x), q, atol=1e-12)
        assert rotation(np.zeros((4, 3)), np.zeros((4, 3))) is not None
        assert rotation(np.full((2, 2), np.nan), np.ones((2, 2))) is None

    @settings(deadline=None, max_examples=50)
    @given(
        arrays(np.float64, (5, 4, 2), elements=st.floats(-3.0, 3.0)),
        arrays(np.float64, (5, 1, 1), elements=st.floats(-30.0, 30.0)),
        arrays(np.float64, (1, 4, 1), elements=st.floats(-30.0, 30.0)),
    )
    def test_scales_are_balanced_out(self, w, rows, columns):
        w = w + np.sign(w) + (w == 0.0)
        scaled = w * 10.0**rows * 10.0**columns
        np.testing.assert_allclose(equalised(scaled), equalised(w), rtol=0.2, atol=0.2)
        assert np.isfinite(equalised(scaled)).all()

    def test_zeros_stay(self):
        w = np.ones((3, 3, 1))
        w[1] = w[:, 2] = 0.0
        balanced = equalised(w)
        assert not balanced[1].any()
        assert not balanced[:, 2].any()
        assert not equalised(np.zeros((2, 2, 1))).any()


class TestLayouts:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_default_carrier_can_be_aligned_without_carriers(self, family):
        shapes = shapes_of(model(family).tensors)
        layout = layout_of(shapes)
        names = [carrier.name for carrier in choose_carriers(shapes)]
        for name in names:
            support = layout.support(layout.key(name), names)
            assert support
            assert set(support) <= set(shapes) - set(names)

    def test_others_have_none(self):
        assert layout_of({}) is None
        assert layout_of({"model.layers.0.mlp.fc1.weight": (8, 8)}) is None
        clip = {
            "vision_model.pre_layrnorm.weight": (8,),
            "vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
            "vision_model.encoder.layers.0.layer_norm2.weight": (8,),
            "vision_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
            "vision_model.encoder.layers.0.mlp.fc2.weight": (8, 16),
        }
        assert layout_of(clip) is None
        del clip["vision_model.pre_layrnorm.weight"]
        assert layout_of(clip) is not None

    @pytest.mark.parametrize("ahead", [1, 0])
    def test_a_swin_as_timm_names_it(self, ahead):
        """Older files name a merging after the stage before it, newer ones after that behind."""
        saved = shapes_of(model("Swin").tensors)
        renamed = {as_timm_names_it(name, ahead): shape for name, shape in saved.items()}
        ours, theirs = layout_of(saved), layout_of(renamed)
        assert theirs.family == "Swin Transformer"
        assert theirs.axes == ours.axes
        for key, layer in ours.layers.items():
            names = tuple(as_timm_names_it(name, ahead) for name in layer.names)
            assert theirs.layers[key].names == names

    def test_the_streams_of_a_swin(self):
        """The first is fixed by its LayerNorm's gains, the others start with a free layer."""
        layout = layout_of(shapes_of(model("Swin").tensors))
        turns = {name: axis.turns for name, axis in layout.axes.items() if "stream" in name}
        assert turns == {"stream.0": False, "stream.1": True, "stream.2": True}

    def test_a_merging_that_carries_tells_nothing(self):
        shapes = shapes_of(model("Swin").tensors)
        layout = layout_of(shapes)
        merging = next(
            name for name in shapes if name.endswith("layers.0.downsample.reduction.weight")
        )
        names = [carrier.name for carrier in choose_carriers(shapes)]
        supports = [layout.support(layout.key(name), [*names, merging]) for name in names]
        assert [support is None for support in supports] == [False, True, True, True]
        assert layout.support(layout.key(merging), [merging]) is None

    def test_swin_v2_is_no_swin(self):
        config = transformers.Swinv2Config(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 1, 2], num_heads=[2, 2, 4]
        )
        network = transformers.Swinv2ForImageClassification(config)
        shapes = shapes_of(dict(network.named_parameters()))  # the same names as of a Swin's module
        names = [carrier.name for carrier in choose_carriers(shapes)]
        assert any(name.endswith("layers.1.downsample.reduction.weight") for name in shapes)
        renamed = {as_timm_names_it(name, 1): shape for name, shape in shapes.items()}
        assert layout_of(shapes) is None
        assert layout_of(renamed) is None
        assert reference_tensors(shapes, names) == {}

    def test_the_names_of_a_module_lead_to_the_same_layers(self):
        """Sealing goes by them."""
        for family, build in MODELS.items():
            module = layout_of(shapes_of(dict(build().named_parameters())))
            saved = layout_of(shapes_of(model(family).tensors))
            assert module.layers.keys() == saved.layers.keys()
            assert module.axes == saved.axes

    def test_carriers_that_nothing_fixes(self):
        shapes = shapes_of(model("ViT").tensors)
        layout = layout_of(shapes)
        both = [
            n for n in shapes if n.endswith(("intermediate.dense.weight", "output.dense.weight"))
        ]
        fc1 = next(n for n in both if "intermediate" in n)
        assert layout.support(layout.key(fc1), both) is None


class TestHostile:
    """What cannot be compared is told: no crash, whatever a header declares."""

    @pytest.mark.parametrize("family", ["ViT", "basic", "Swin"])
    @pytest.mark.parametrize("change", ["zero", "wide", "narrow", "flat", "huge", "tiny"])
    def test_any_tensor(self, family, change):
        owner = marked(family).tensors
        names = [carrier.name for carrier in carriers_of(owner)]
        support = layout_of(shapes_of(owner)).support(owner_key(owner, names[-1]), names)
        for name in (*support, names[-1]):
            t = owner[name]
            changed = {
                "zero": torch.zeros_like(t),
                "wide": torch.cat([t, t], dim=-1),
                "narrow": t[..., :1],
                "flat": t.reshape(-1),
                "huge": t * 1e38,
                "tiny": t * 1e-38,
            }[change]
            if layout_of(shapes_of(owner | {name: changed})) is None:
                continue  # the merging of a Swin tells it by its shape
            alignment = Alignment(side(owner, tuple(names)), side(owner | {name: changed}), names)
            with np.errstate(over="raise", invalid="raise", divide="raise"):
                w = alignment.carrier(names[-1])
            assert w is None or np.isfinite(w).all()
            assert w is None or w.shape == (len(owner[names[-1]]), owner[names[-1]][0].numel())

    def test_a_declared_monster_is_not_read(self):
        owner = marked("ViT").tensors
        names = [carrier.name for carrier in carriers_of(owner)]
        suspect = side(owner)
        shapes = suspect.shapes | {names[0]: (2**20, 2**20)}
        unread = Alignment(side(owner), type(suspect)(suspect.layout, shapes, suspect.read), names)
        assert unread.carrier(names[0]) is None
