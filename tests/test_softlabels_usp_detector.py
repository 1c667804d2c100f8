"""The trained detector: better than the paired test on processed answers, its null exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from soft_models import KEY
from test_softlabels_distillation import answers, blends, labelled_digits, trained

from hf_watermark import OwnerKey
from hf_watermark.errors import OutputsError, SoftLabelError
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.usp import Pair, paired_test
from hf_watermark.softlabels.usp_detector import UspDetector, detect, train_detector


@pytest.fixture(scope="module")
def case():
    """A watermark of the digits, a detector, inputs, a student and a clean one."""
    x, y = labelled_digits()
    teacher = trained(0, x[:900], y[:900], 12)
    served = SoftLabelWatermark(teacher, KEY, count=32).calibrate(blends(x[:900], 1200, 1))
    told = []
    detector = train_detector(
        served, blends(x[:900], 1500, 11), steps=800, progress=lambda *pair: told.append(pair)
    )
    assert told[-1] == (800, 800)
    queries, probes = blends(x[900:], 2500, 2), blends(x[:900], 800, 3)
    return {
        "detector": detector,
        "pair": Pair.of(served, probes),
        "student": answers(trained(5, queries, answers(served, queries), 8), probes).numpy(),
        "clean": answers(trained(6, queries, answers(teacher, queries), 8), probes).numpy(),
    }


def balanced(case, change):
    """Of the network and of the paired test, on marked and clean answers."""
    pair = case["pair"]
    found = []
    for log_probs in (pair.marked, pair.clean):
        p = change(np.exp(log_probs))
        one = detect(case["detector"], p, pair, 1).marked.mean()
        found.append((one, paired_test(p, None, pair).marked.mean()))
    (net, paired), (net_clean, paired_clean) = found
    return 0.5 * (net + 1 - net_clean), 0.5 * (paired + 1 - paired_clean)


def test_single_outputs(case):
    net, paired = balanced(case, lambda p: p)
    assert min(net, paired) > 0.9868
    assert balanced(case, lambda p: p.round(4))[0] > 0.97


def test_processed_outputs(case):
    net, paired = balanced(case, lambda p: p**0.5 / (p**0.5).sum(1, keepdims=True))
    assert net > 0.7  # measured: .8
    assert paired < 0.55


def test_students_as_a_set(case):
    found = detect(case["detector"], case["student"], case["pair"], 999)
    assert found.p == 0.001
    assert found.score > found.fresh.max()
    assert detect(case["detector"], case["clean"], case["pair"], 199).p > 0.01


@pytest.mark.parametrize("suspect", ["student", "clean"])
def test_the_null(case, suspect):
    """Keys that bent nothing, each ranked among fresh ones: every rank is as likely."""
    pair = case["pair"]
    few = replace(pair, clean=pair.clean[:100], marked=pair.marked[:100], psi=pair.psi[:100])
    ranks = []
    for i in range(120):
        signs = chip_signs(OwnerKey(bytes([i] * 31 + [9])), *pair.signs.shape)
        wrong = replace(few, signs=signs)
        ranks.append(detect(case["detector"], case[suspect][:100], wrong, 39).p)
    assert min(ranks) >= 1 / 40
    assert scipy.stats.kstest(ranks, "uniform").pvalue > 0.005


def test_saved_and_loaded(case, tmp_path):
    path = tmp_path / "usp.safetensors"
    case["detector"].save(path)
    again = UspDetector.load(path)
    inputs = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again(*inputs), case["detector"](*inputs))
    assert KEY._secret not in path.read_bytes()
    with pytest.raises(SoftLabelError, match="No such file"):
        UspDetector.load(tmp_path / "nowhere")
    path.write_bytes(b"nothing")
    with pytest.raises(SoftLabelError, match="cannot be read"):
        UspDetector.load(path)


def test_labels_alone(case):
    with pytest.raises(OutputsError, match="Labels alone"):
        detect(case["detector"], case["clean"].argmax(1), case["pair"])
