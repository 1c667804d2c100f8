"""The paired detector: verdicts on single outputs, and a set's chance that holds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from soft_models import KEY
from test_softlabels_detection import softmax
from test_softlabels_distillation import answers, blends, labelled_digits, trained

from hf_watermark import OwnerKey
from hf_watermark.errors import OutputsError, SchemeError
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.usp import Pair, paired_accuracy, paired_test


@pytest.fixture(scope="module")
def case():
    """A real model of the digits, its watermark, and inputs it has never seen."""
    x, y = labelled_digits()
    teacher = trained(0, x[:900], y[:900], 12)
    served = SoftLabelWatermark(teacher, KEY, count=32).calibrate(blends(x[:900], 1200, 1))
    return {
        "x": x,
        "y": y,
        "teacher": teacher,
        "served": served,
        "pair": Pair.of(served, x[900:]),
    }


@pytest.mark.parametrize(
    ("decimals", "least"), [(None, 0.9868), (6, 0.9868), (4, 0.9868), (3, 0.93), (2, 0.7)]
)
def test_single_outputs(case, decimals, least):
    """The paper's 98.68% (Chien & Shen 2022), at no loss of accuracy instead of .59 points."""
    told = paired_accuracy(case["pair"], decimals=decimals)
    assert told.images == 897
    assert told.balanced >= least, told
    assert told.clean == 1.0
    assert told.flips == 0
    assert told.marked >= 1.0 - told.undecided - 0.02


@pytest.mark.parametrize("decimals", [None, 4])
def test_what_is_really_served(case, decimals):
    """Answers of the wrapper in other batches, not those that the test recomputes itself."""
    x, y = case["x"][900:], case["y"][900:]
    marked, clean = answers(case["served"], x).numpy(), answers(case["teacher"], x).numpy()
    assert np.array_equal(marked.argmax(1), clean.argmax(1))
    assert (marked.argmax(1) == y.numpy()).mean() == (clean.argmax(1) == y.numpy()).mean()
    if decimals is not None:
        marked, clean = marked.round(decimals), clean.round(decimals)
    of_marked, of_clean = (paired_test(one, x, case["served"]) for one in (marked, clean))
    assert 0.5 * (of_marked.marked.mean() + 1 - of_clean.marked.mean()) >= 0.9868
    assert of_clean.marked.mean() == 0.0
    assert of_marked.found
    assert of_marked.log10_p < -40
    assert not of_clean.found
    ten = paired_test(marked[:10], x[:10], case["served"])
    assert ten.log10_p < -9
    assert ten.marked.mean() >= 0.9


def test_models_that_have_nothing_to_do_with_it(case):
    x, y = case["x"], case["y"]
    other = trained(7, x[:900], y[:900], 12)
    told = paired_test(answers(other, x[900:]).numpy(), None, case["pair"])
    assert told.marked.mean() < 0.02  # measured: .003
    assert not told.found
    assert abs(told.t) < 4.5


def test_the_chance_of_a_set_is_not_flattering(case):
    """Marked answers and others against 400 keys that bent nothing: t is standard normal."""
    pair = case["pair"]
    unrelated = softmax(np.random.default_rng(0).normal(size=(897, 10)))
    for suspect in (np.exp(pair.marked), np.exp(pair.marked).round(3), unrelated):
        t = np.array([paired_test(suspect, None, with_key(pair, i)).t for i in range(1, 401)])
        assert 0.88 < t.std() < 1.12
        assert scipy.stats.kstest(t, "norm").pvalue > 0.01
        assert t.max() < 4.5


def with_key(pair, i):
    signs = chip_signs(OwnerKey(bytes([i % 256, i // 256] * 16)), pair.psi.shape[1], 10)
    return Pair(pair.clean, pair.marked, pair.psi, signs)


def test_only_the_best_few_were_shown(case):
    p = np.exp(case["pair"].marked)
    few = np.where(p >= np.sort(p, 1)[:, -3:-2], p, 0.0)
    told = paired_test(few, None, case["pair"])
    assert told.outputs.startswith("probabilities, top 3")
    assert told.marked.mean() > 0.9
    assert told.found


def test_logarithms_and_customers(case):
    pair = case["pair"]
    assert paired_test(pair.marked, None, pair).marked.mean() > 0.9868
    view = case["served"].for_recipient("b")
    x = case["x"][900:950]
    told = paired_test(answers(view, x).numpy(), x, view)
    assert told.marked.mean() > 0.95
    assert paired_test(answers(view, x).numpy(), x, case["served"]).marked.mean() < 0.1


def test_bad_input(case):
    pair = case["pair"]
    p = np.exp(pair.clean)
    with pytest.raises(OutputsError, match="Labels alone"):
        paired_test(p.argmax(1), None, pair)
    with pytest.raises(OutputsError, match="one answer for every input"):
        paired_test(p[:-1], None, pair)
    with pytest.raises(OutputsError, match="inputs are missing"):
        paired_test(p, None, case["served"])
    with pytest.raises(SchemeError, match="alpha"):
        paired_test(p, None, pair, alpha=0.0)
