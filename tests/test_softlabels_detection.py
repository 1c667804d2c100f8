"""The statistic: valid for any suspect, strong for students, told apart by customer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark import OwnerKey
from hf_watermark.errors import OutputsError, SchemeError, SoftLabelError
from hf_watermark.significance import log10_rademacher_tail
from hf_watermark.softlabels.detection import agreement, class_weights, pair_weights, probes_needed
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.probes import Probes, image_digests
from hf_watermark.verify import verify_outputs

KEY = OwnerKey(bytes(range(32)), "acme")


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def world(n=1000, classes=10, features=32, seed=0, margin=None, top_k=None):
    """Probes of an imagined model, and the generator for suspects."""
    rng = np.random.default_rng(seed)
    clean = np.log(softmax(2 * rng.standard_normal((n, classes))))
    psi = np.tanh(1.2 * rng.standard_normal((n, features))) / 0.7
    probes = Probes(
        KEY, psi.astype(np.float32), clean.astype(np.float32), np.zeros(n, bool), top_k, margin
    )
    return probes, rng


def student(probes, rng, learnt=0.3, noise=0.7, recipient=None):
    """Outputs of one who learnt a part of the bending, with an opinion of its own."""
    g = probes.psi @ probes.signs(recipient) / math.sqrt(probes.features)
    own = noise * rng.standard_normal(g.shape)
    return softmax(probes.log_probs + learnt * g + own)


def test_students_are_found_and_innocents_are_not():
    probes, rng = world()
    guilty = verify_outputs(student(probes, rng), None, probes)
    assert guilty.found
    assert guilty.log10_p < -15
    assert guilty.log10_p == log10_rademacher_tail(guilty.t)
    assert (guilty.reading, guilty.outputs) == ("all classes", "probabilities")
    assert (guilty.bits, guilty.probes, guilty.tries) == (320, 1000, 1)
    assert guilty.matched > 200
    innocent = verify_outputs(student(probes, rng, learnt=0.0), None, probes)
    assert not innocent.found
    assert abs(innocent.t) < 4.5
    other = verify_outputs(student(probes, rng), None, probes, recipient="b")
    assert not other.found


def test_the_leak_is_named_and_all_tries_are_counted():
    probes, rng = world()
    names = [f"customer-{i}" for i in range(50)]
    found = verify_outputs(student(probes, rng, recipient=names[17]), None, probes, (), names)
    assert found.recipient == names[17]
    assert found.tries == 50
    assert found.log10_p == pytest.approx(log10_rademacher_tail(found.t) + math.log10(50))
    alone = verify_outputs(student(probes, rng, recipient="b"), None, probes, recipient="b")
    assert alone.recipient == "b"


@pytest.mark.parametrize("name", ["rounded", "top-3", "labels", "log", "cold"])
def test_crippled_outputs_still_tell(name):
    probes, rng = world(n=3000)
    p = student(probes, rng, learnt=0.5, noise=0.4)
    if name == "rounded":
        p = p.round(2)
    elif name == "top-3":
        p = np.where(p >= np.sort(p, 1)[:, -3:-2], p, 0.0)
    elif name == "labels":
        p = p.argmax(1)
    elif name == "log":
        p = np.log(p)
    else:
        p = softmax(np.log(p) / 4)
    evidence = verify_outputs(p, None, probes)
    assert evidence.found, evidence
    if name == "labels":
        assert "Labels alone" in evidence.notes[0]


def test_references_sharpen():
    """What a clean student thinks differently from the teacher is no noise any more."""
    probes, rng = world()
    odd = rng.standard_normal(probes.log_probs.shape)
    g = probes.psi @ probes.signs(None) / math.sqrt(probes.features)
    suspect = softmax(probes.log_probs + odd + 0.1 * g)
    reference = softmax(probes.log_probs + odd + 0.1 * rng.standard_normal(odd.shape))
    without = verify_outputs(suspect, None, probes)
    beside = verify_outputs(suspect, None, probes, [reference])
    assert beside.t > without.t + 3
    assert (without.references, beside.references) == (1, 2)


# The null -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings_", [{}, {"classes": 2, "features": 64}, {"top_k": 5}, {"margin": (0.2, 0.5)}]
)
def test_wrong_keys_give_valid_chances(settings_):
    """For a marked suspect: the right key does not make wrong ones look right."""
    probes, rng = world(n=1500, **settings_)
    read = Outputs.read(student(probes, rng, learnt=1.0), probes.classes)
    readings = [class_weights(read, probes)]
    if probes.margin is not None:
        readings.append(pair_weights(read, probes))
    for weights in readings:
        assert np.isfinite(weights).all()
        t = np.array([agreement(weights, probes.signs(f"wrong-{i}")) for i in range(1000)])
        assert 0.93 < t.std() < 1.07
        assert abs(t.mean()) < 0.13
        assert scipy.stats.kstest(t, "norm").pvalue > 1e-3
        p = np.array([log10_rademacher_tail(value) for value in t])
        for level in (-1.0, -2.0):
            assert (p <= level).mean() <= 10**level


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 10]))
@settings(deadline=None, max_examples=25)
def test_t_is_bounded_by_the_signs(seed, classes):
    probes, rng = world(200, classes, 16, seed)
    weights = class_weights(Outputs.read(student(probes, rng, 3.0, 0.0), classes), probes)
    assert abs(agreement(weights, probes.signs(None))) <= math.sqrt(16 * classes) + 1e-9
    assert agreement(np.zeros((16, classes)), probes.signs(None)) == 0.0


def test_the_clean_model_itself_tells_nothing():
    probes, _ = world()
    assert not verify_outputs(np.exp(probes.log_probs), None, probes).found


def test_permuted_probes_give_the_same():
    probes, rng = world()
    p = student(probes, rng)
    order = rng.permutation(len(p))
    turned = Probes(KEY, probes.psi[order], probes.log_probs[order], probes.seen)
    one, other = verify_outputs(p, None, probes), verify_outputs(p[order], None, turned)
    assert one.t == pytest.approx(other.t)


def test_a_thousand_classes():
    probes, rng = world(600, 1000, 64, top_k=32)
    bent = np.argsort(-probes.log_probs, 1)[:, :32]
    mask = np.zeros(probes.log_probs.shape)
    np.put_along_axis(mask, bent, 1.0, 1)
    g = mask * (probes.psi @ probes.signs("a")) / 8
    p = softmax(probes.log_probs + 0.4 * g + 0.3 * rng.standard_normal(g.shape))
    assert verify_outputs(p, None, probes, recipient="a").found
    assert not verify_outputs(p, None, probes, recipient="b").found


# Margin mode --------------------------------------------------------------------------------------


def hard_student(probes, rng, recipient=None, loyalty=0.9):
    """Labels of one who was trained on swapped labels, and follows most of them."""
    strength, limit = probes.margin
    g = probes.psi @ probes.signs(recipient) / math.sqrt(probes.features)
    p = np.exp(probes.log_probs)
    order = np.argsort(-p, 1)
    rows = np.arange(len(p))
    first, second = order[:, 0], order[:, 1]
    gap = p[rows, first] - p[rows, second]
    swap = (gap + strength * (g[rows, first] - g[rows, second]) < 0) & (gap < limit)
    labels = np.where(swap, second, first)
    return np.where(rng.random(len(p)) < loyalty, labels, rng.integers(0, p.shape[1], len(p)))


def test_hard_labels_tell_in_margin_mode():
    probes, rng = world(4000, margin=(0.2, 0.5))
    evidence = verify_outputs(hard_student(probes, rng, "a"), None, probes, (), ["a", "b"])
    assert (evidence.recipient, evidence.tries) == ("a", 4)
    assert evidence.found
    assert evidence.reading == "top pair"
    assert not evidence.notes
    innocent = hard_student(Probes(KEY, rng.permutation(probes.psi), *_rest(probes)), rng)
    assert not verify_outputs(innocent, None, probes).found


def _rest(probes):
    return probes.log_probs, probes.seen, probes.top_k, probes.margin


def test_margin_mode_without_close_calls():
    probes, rng = world(200, features=16, margin=(0.2, 1e-9))
    evidence = verify_outputs(student(probes, rng), None, probes)
    assert evidence.tries == 2
    assert evidence.reading == "all classes"


# Bad input ----------------------------------------------------------------------------------------


def test_bad_input():
    probes, rng = world(100)
    p = student(probes, rng)
    with pytest.raises(OutputsError, match="one output for every probe"):
        verify_outputs(p[:50], None, probes)
    few = Probes(KEY, probes.psi[:63], probes.log_probs[:63], probes.seen[:63])
    with pytest.raises(OutputsError, match="at least 64"):
        verify_outputs(p[:63], None, few)
    with pytest.raises(SoftLabelError, match="other probes"):
        verify_outputs(p, None, probes, [p[:50]])
    for alpha in (0.0, 1.0, float("nan"), "x"):
        with pytest.raises(SchemeError, match="alpha"):
            verify_outputs(p, None, probes, alpha=alpha)
    for names in ([], ["a", "a"]):
        with pytest.raises(SchemeError, match="named"):
            verify_outputs(p, None, probes, recipient=names)


def test_probes_of_the_calibration_are_told():
    probes, rng = world(100)
    p = student(probes, rng)
    seen = Probes(KEY, probes.psi, probes.log_probs, np.arange(100) < 3)
    with pytest.warns(UserWarning, match="3 of 100 probes"):
        evidence = verify_outputs(p, None, seen)
    assert "3 of 100" in evidence.notes[0]


def test_evidence_as_json():
    import json

    probes, rng = world(100)
    evidence = verify_outputs(student(probes, rng), None, probes)
    fields = json.loads(evidence.to_json())
    assert set(fields) == {
        "verdict", "log10_p", "t", "alpha", "bits", "matched", "probes", "tries", "reading",
        "outputs", "recipient", "references", "probes_needed", "key_fingerprint", "seconds",
        "suspect", "revision",
        "format_version",
    }  # fmt: skip
    assert fields["key_fingerprint"] == KEY.fingerprint


def test_how_many_probes_would_do():
    probes, rng = world(4000)
    p = student(probes, rng, learnt=0.07)
    few = Probes(KEY, probes.psi[:400], probes.log_probs[:400], probes.seen[:400])
    first = verify_outputs(p[:400], None, few, alpha=1e-9)
    assert not first.found
    assert 400 < first.probes_needed < 20_000
    assert probes_needed(1.0, 100, 6.0) is None
    assert probes_needed(3.0, 100, 6.0) == 400
    assert probes_needed(9.0, 100, 6.0) == 100


def test_images_are_known_again():
    x = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    digests = image_digests(x)
    assert len(set(digests.tolist())) == 5
    assert np.array_equal(image_digests(x[::-1]), digests[::-1])
