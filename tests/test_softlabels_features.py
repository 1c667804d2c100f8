"""The features: white, alike on every machine, blind to what the outputs alone tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_models import KEY, images

from hf_watermark import OwnerKey
from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels.chips import chip_signs, rotation
from hf_watermark.softlabels.features import FeatureMap, context_of, images_needed
from hf_watermark.softlabels.lens import image_values
from hf_watermark.softlabels.perturbation import psi_of


def views(n=3000, width=80, classes=10, seed=0):
    """Features whose first directions the logits tell, and an image."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((n, width)) * np.geomspace(5.0, 0.5, width) + 3.0
    head = rng.standard_normal((width, classes)) / 6.0
    return own, own @ head, rng.standard_normal((n, 24))


@given(st.integers(1, 70), st.integers(2, 20))
@settings(deadline=None, max_examples=20)
def test_signs_are_signs_and_differ_by_customer(features, classes):
    ours = chip_signs(KEY, features, classes)
    assert ours.shape == (features, classes)
    assert set(np.unique(ours)) <= {-1, 1}
    other = chip_signs(KEY.for_recipient("a"), features, classes)
    if features * classes > 64:
        assert not np.array_equal(ours, other)
        assert abs(ours.mean()) < 6 / np.sqrt(ours.size)


def test_signs_never_change():
    """The stream is part of the format: what was served years ago must still be found."""
    assert chip_signs(KEY, 2, 8).tolist() == [
        [-1, -1, -1, -1, 1, -1, -1, 1],
        [1, -1, -1, 1, -1, 1, 1, 1],
    ]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_rotation_is_orthogonal_and_keyed(size):
    q = rotation(KEY, size)
    assert np.allclose(q @ q.T, np.eye(size), atol=1e-12)
    assert np.array_equal(q, rotation(KEY, size))
    if size > 1:
        assert not np.allclose(q, rotation(OwnerKey(bytes(32)), size))


@pytest.mark.parametrize("kind", ["H", "M"])
@pytest.mark.parametrize("classes", [2, 10])
def test_features_are_white_and_unknown_to_the_outputs(kind, classes):
    own, logits, image = views(classes=classes)
    fitted = FeatureMap.fit(KEY, kind, 64, own, logits, image)
    assert (fitted.count, fitted.width, fitted.classes) == (64, 80, classes)
    psi = fitted.psi(own, logits, image)
    u = np.arctanh(psi * 0.7) / 1.2
    assert np.allclose(np.cov(u.T), np.eye(64), atol=0.01)
    assert np.abs(psi).max() <= 1 / 0.7
    assert 0.8 < psi.var() < 1.2
    context = context_of(logits)
    explained = np.linalg.lstsq(np.column_stack([np.ones(len(u)), context]), u, rcond=None)[0]
    left = u - np.column_stack([np.ones(len(u)), context]) @ explained
    assert (u.var(0) - left.var(0)).max() < 1e-4


def test_another_key_turns_them():
    own, logits, _ = views()
    ours, theirs = (
        FeatureMap.fit(key, "H", 64, own, logits).psi(own, logits)
        for key in (KEY, OwnerKey(bytes(32)))
    )
    across = np.abs(np.corrcoef(ours.T, theirs.T)[:64, 64:])
    assert across.max() < 0.7
    assert across.mean() < 0.15


@pytest.mark.parametrize("kind", ["H", "M"])
def test_torch_says_the_same(kind):
    own, logits, image = views()
    fitted = FeatureMap.fit(KEY, kind, 64, own, logits, image)
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in (own, logits, image)]
    weights = tuple(
        torch.from_numpy(x) for x in (fitted.own, fitted.context, fitted.image, fitted.offset)
    )
    if kind == "H":
        tensors[2] = None
    ours = psi_of(*tensors, weights).numpy()
    assert np.allclose(ours, fitted.psi(own, logits, image), atol=1e-4)


def test_more_classes_than_features_leave_something():
    """ImageNet on a ViT: 1,000 classes, 768 features; residuals on all logits would be empty."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal((2000, 96))
    fitted = FeatureMap.fit(KEY, "H", 64, own, own @ rng.standard_normal((96, 300)))
    assert fitted.count >= 40


def test_features_that_the_outputs_tell_are_refused():
    score = np.random.default_rng(0).standard_normal((500, 1))
    with pytest.raises(SoftLabelError, match="hold nothing"):
        FeatureMap.fit(KEY, "H", 64, score * np.arange(8.0), score * [1.0, -1.0])


def test_images_needed_grow_with_what_is_fitted():
    assert images_needed(512, 10, 64) == 4 * (1 + 20 + 64)
    assert images_needed(48, 10, 64) == 4 * (1 + 20 + 48)
    assert images_needed(768, 1000, 64) == 4 * (1 + 384 + 64)


def test_the_image_is_blind_to_mirrors():
    x = images(4, size=20)
    assert image_values(x).shape == (4, 24)
    assert torch.allclose(image_values(x), image_values(x.flip(3)), atol=1e-6)
