"""Outputs are told apart by what they are, and refused when they are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark.errors import OutputsError
from hf_watermark.softlabels.outputs import Outputs


def distributions(n=200, classes=10, seed=0, sharp=3.0):
    z = sharp * np.random.default_rng(seed).standard_normal((n, classes))
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def top(p, k):
    shown = np.argsort(-p, 1)[:, :k]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, shown, np.take_along_axis(p, shown, 1), 1)
    return kept


P = distributions()
CASES = [
    (P, "probabilities"),
    (P.astype(np.float32), "probabilities"),
    (P.astype(np.float16), "probabilities"),
    (np.log(P), "log-probabilities"),
    (np.log(P).astype(np.float32), "log-probabilities"),
    (P.round(2), "probabilities, rounded to 2 decimals"),
    (P.round(4).astype(np.float32), "probabilities, rounded to 4 decimals"),
    (top(P, 3), "probabilities, top 3 only"),
    (top(P, 3) / top(P, 3).sum(1, keepdims=True), "probabilities, top 3 only"),
    (top(distributions(sharp=1.0), 3).round(2), "probabilities, top 3 only, rounded to 2 decimals"),
    (P.argmax(1), "labels only"),
    (np.eye(10)[P.argmax(1)], "labels only"),
    (np.eye(10, dtype=int)[P.argmax(1)], "labels only"),
]


@pytest.mark.parametrize(("values", "kind"), CASES)
def test_kinds_are_told(values, kind):
    read = Outputs.read(values, 10)
    assert read.kind == kind
    assert read.log_probs.shape == (200, 10)
    assert np.isfinite(read.log_probs).all()
    assert read.labels_only == (kind == "labels only")
    if "rounded" not in kind:
        truth = values if values.ndim == 1 else values.argmax(1)
        assert np.array_equal(read.labels, truth)


def test_a_silent_logarithm():
    with np.errstate(divide="ignore"):
        read = Outputs.read(np.log(top(P, 3)), 10)
    assert read.kind == "log-probabilities, top 3 only"
    assert np.allclose(read.log_probs, Outputs.read(top(P, 3), 10).log_probs)


@given(st.integers(2, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_full_precision_is_kept(classes, seed):
    p = distributions(64, classes, seed, 2.0)
    read = Outputs.read(p, classes)
    assert np.allclose(read.log_probs, np.log(np.maximum(p, 1e-6)))
    assert np.allclose(Outputs.read(np.log(p), classes).log_probs, read.log_probs)


def test_floors():
    rounded = Outputs.read(P.round(2), 10).log_probs
    assert rounded.min() == pytest.approx(np.log(0.005))
    shown = top(P, 3)
    read = np.exp(Outputs.read(shown, 10).log_probs)
    missing, smallest = 1 - shown.sum(1), np.where(shown > 0, shown, 1).min(1)
    expected = np.maximum(np.minimum(missing / 7, smallest), 1e-6)
    assert np.allclose(np.where(shown > 0, 1, read).min(1), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (P[:, :9], "number of classes"),
        (P * 2, "no probabilities"),
        (P * 0.5, "no probabilities"),
        (np.log(P) + 1.0, "no probabilities"),
        (np.log(P) - 1.0, "no probabilities"),
        (10 * P - 5, "no probabilities"),
        (np.where(P.max() == P, np.nan, P), "NaN in 1 rows"),
        (np.zeros((5, 10)), "no probabilities"),
        (np.array([1, 10]), "does not exist"),
        (np.array([-1, 1]), "does not exist"),
        (np.array([0.5, 1.5]), "wrong shape"),
        (np.zeros((0, 10)), "wrong shape"),
        (np.full((2, 10), "a"), "wrong shape"),
        (P[None], "wrong shape"),
    ],
)
def test_what_is_no_output(values, message):
    with pytest.raises(OutputsError, match=message):
        Outputs.read(values, 10)
