"""Tails against scipy and mpmath, and words that never promise more than was found."""

from __future__ import annotations

import itertools
import math
import re
import time

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_watermark.errors import SchemeError
from hf_watermark.significance import (
    corrected,
    log10_binomial_tail,
    log10_normal_tail,
    log10_rademacher_tail,
    odds_in_words,
)

LN10 = math.log(10.0)


def exact_normal_tail(t: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        return mpmath.log10(mpmath.erfc(mpmath.mpf(t) / mpmath.sqrt(2)) / 2)


def exact_binomial_tail(matched: int, bits: int) -> mpmath.mpf:
    with mpmath.workdps(60):
        ways = sum(math.comb(bits, k) for k in range(matched, bits + 1))
        return mpmath.log10(mpmath.mpf(ways)) - bits * mpmath.log10(2)


# The normal tail ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t",
    [-1e9, -40.0, -8.3, -3.0, -1e-300, 0.0, 1e-9, 0.5, 3.0, 5.0, 12.0, 24.0, 24.999999999999996],
)
def test_normal_tail_where_erfc_serves(t):
    assert log10_normal_tail(t) == pytest.approx(float(exact_normal_tail(t)), rel=1e-14, abs=1e-16)


@pytest.mark.parametrize(
    "t", [25.0, 25.000000000000004, 26.0, 30.0, 37.5, 37.9, 38.4, 38.6, 50.0, 100.0, 1e3]
)
def test_normal_tail_beyond_the_range_of_floats(t):
    assert log10_normal_tail(t) == pytest.approx(float(exact_normal_tail(t)), rel=1e-14)


@pytest.mark.parametrize("t", [1e4, 1e6, 1e10, 1e100])
def test_normal_tail_far_out(t):
    """Where mpmath gives up: log Q(t) lies between log phi(t)/t and log phi(t) t/(1 + t^2)."""
    with mpmath.workdps(400):
        x = mpmath.mpf(t)
        density = -x * x / 2 - mpmath.log(2 * mpmath.pi) / 2
        upper = (density - mpmath.log(x)) / mpmath.log(10)
        lower = (density + mpmath.log(x / (1 + x * x))) / mpmath.log(10)
    assert float(upper - lower) <= 1e-8
    assert log10_normal_tail(t) == pytest.approx(float(upper), rel=1e-14)


@given(st.floats(-50.0, 1e6))
@settings(deadline=None)
def test_normal_tail_is_scipys(t):
    expected = float(scipy.special.log_ndtr(-t)) / LN10
    assert log10_normal_tail(t) == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_normal_tail_is_continuous_where_the_method_changes():
    below, above = math.nextafter(25.0, 0.0), 25.0
    slope = -25.04 / LN10  # -phi/Q
    step = log10_normal_tail(above) - log10_normal_tail(below)
    assert abs(step - slope * (above - below)) < 1e-13
    assert log10_normal_tail(above) == pytest.approx(log10_normal_tail(below), rel=1e-15)


@given(st.floats(-1e3, 1e9), st.floats(-1e3, 1e9))
@settings(deadline=None)
def test_normal_tail_falls(t, other):
    if t > other:
        t, other = other, t
    assert log10_normal_tail(t) >= log10_normal_tail(other)


def test_normal_tail_falls_across_the_seam():
    t = np.linspace(24.9, 25.1, 20_001)
    tails = np.array([log10_normal_tail(x) for x in t])
    assert (np.diff(tails) < 0.0).all()


@given(st.floats(allow_nan=False))
@settings(deadline=None)
def test_normal_tail_is_a_logarithm_of_a_chance(t):
    assert log10_normal_tail(t) <= 0.0


def test_normal_tail_at_the_ends():
    assert log10_normal_tail(math.inf) == -math.inf
    assert log10_normal_tail(-math.inf) == 0.0
    assert log10_normal_tail(0.0) == math.log10(0.5)
    with pytest.raises(SchemeError, match="not a number"):
        log10_normal_tail(math.nan)


# The Rademacher tail ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12).filter(any))
@settings(deadline=None)
def test_rademacher_tail_bounds_every_sum_of_signs(weights):
    """Against all 2^n sums, at each of their values."""
    a = np.array(weights) / np.linalg.norm(weights)
    sums = np.sort(np.array(list(itertools.product((-1.0, 1.0), repeat=len(a)))) @ a)
    exceeding = np.arange(len(sums), 0, -1) / len(sums)
    for t, p in zip(sums, exceeding, strict=True):
        assert log10_rademacher_tail(t - 1e-12) >= math.log10(p) - 1e-9


def test_rademacher_tail_is_tight_where_its_source_says():
    """(e_1 + e_2) / sqrt 2 reaches sqrt 2 with chance 1/4."""
    assert log10_rademacher_tail(math.sqrt(2.0)) == pytest.approx(math.log10(0.25), rel=1e-14)


def test_rademacher_tail_by_monte_carlo():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(640)
    a /= np.linalg.norm(a)
    sums = rng.choice((-1.0, 1.0), (20_000, 640)) @ a
    for t in (0.0, 1.0, 2.0, 3.0):
        p, bound = float((sums >= t).mean()), 10 ** log10_rademacher_tail(t)
        assert p <= bound <= 4.0 * p + 0.6 * (t == 0.0)


@given(st.floats(-50.0, 1e6), st.floats(-50.0, 1e6))
@settings(deadline=None)
def test_rademacher_tail_falls_and_is_never_below_the_normal(t, other):
    t, other = min(t, other), max(t, other)
    assert 0.0 >= log10_rademacher_tail(t) >= log10_rademacher_tail(other)
    assert log10_rademacher_tail(t) >= log10_normal_tail(t)


def test_rademacher_tail_at_the_ends():
    assert log10_rademacher_tail(-math.inf) == 0.0
    assert log10_rademacher_tail(math.inf) == -math.inf
    with pytest.raises(SchemeError, match="not a number"):
        log10_rademacher_tail(math.nan)


# The binomial tail --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 7, 64, 255])
def test_binomial_tail_is_exact(bits):
    for matched in range(bits + 1):
        expected = float(exact_binomial_tail(matched, bits))
        assert log10_binomial_tail(matched, bits) == pytest.approx(expected, rel=1e-14, abs=1e-16)


@pytest.mark.parametrize("bits", [256, 1000, 1023, 1024, 1025, 4096])
def test_binomial_tail_beyond_the_range_of_floats(bits):
    for matched in (bits // 2 + 1, bits * 5 // 8, bits - 1):
        expected = float(exact_binomial_tail(matched, bits))
        assert log10_binomial_tail(matched, bits) == pytest.approx(expected, rel=1e-14, abs=1e-16)
    assert log10_binomial_tail(bits, bits) == pytest.approx(-bits * math.log10(2.0), rel=1e-14)


@given(st.integers(1, 600), st.data())
@settings(deadline=None)
def test_binomial_tail_is_scipys(bits, data):
    matched = data.draw(st.integers(0, bits))
    expected = float(scipy.stats.binom.logsf(matched - 1, bits, 0.5)) / LN10
    if expected > -290.0:  # scipy's logarithm is of a float
        assert log10_binomial_tail(matched, bits) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(1, 500))
@settings(deadline=None)
def test_binomial_tail_falls_from_certainty(bits):
    tails = [log10_binomial_tail(matched, bits) for matched in range(bits + 1)]
    assert tails[0] == 0.0
    assert all(one >= other for one, other in itertools.pairwise(tails))
    assert all(tail <= 0.0 for tail in tails)


@pytest.mark.parametrize("bits", [*range(1, 4097, 61), 4096])
def test_certainty_is_exact(bits):
    assert log10_binomial_tail(0, bits) == 0.0
    assert -1.0 / bits < log10_binomial_tail(1, bits) <= 0.0


@given(st.integers(1, 300), st.data())
@settings(deadline=None)
def test_binomial_tails_of_both_sides_add_up(bits, data):
    """P(B >= k) + P(B <= k - 1) = 1, and P(B <= k - 1) = P(B >= bits - k + 1) by symmetry."""
    matched = data.draw(st.integers(1, bits))
    both = 10 ** log10_binomial_tail(matched, bits) + 10 ** log10_binomial_tail(
        bits - matched + 1, bits
    )
    assert both == pytest.approx(1.0, abs=1e-12)


def test_binomial_tail_of_many_bits_is_fast():
    started = time.perf_counter()
    log10_binomial_tail(0, 4096)
    assert time.perf_counter() - started < 0.2  # comb() for every count takes a second


@pytest.mark.parametrize(("matched", "bits"), [(0, 0), (-1, 8), (9, 8), (0, -1), (1, 0)])
def test_counts_that_make_no_sense(matched, bits):
    with pytest.raises(SchemeError, match=re.escape(f"matched={matched}, bits={bits}")):
        log10_binomial_tail(matched, bits)


# Correction and words -----------------------------------------------------------------------------


@given(st.floats(-1e6, 0.0), st.integers(1, 10**9))
@settings(deadline=None)
def test_correction_multiplies_and_never_helps(log10_p, tries):
    result = corrected(log10_p, tries)
    assert log10_p <= result <= 0.0
    assert result == min(0.0, log10_p + math.log10(tries))
    assert corrected(log10_p, tries + 1) >= result
    assert corrected(log10_p, 1) == log10_p


def test_correction_at_the_ends():
    assert corrected(-6.0, 10) == pytest.approx(-5.0)
    assert corrected(-0.5, 1000) == 0.0
    assert corrected(-math.inf, 10**30) == -math.inf
    assert corrected(-5.0, 10**400) == 0.0
    for tries in (0, -3):
        with pytest.raises(SchemeError, match="tries >= 1"):
            corrected(-6.0, tries)


@pytest.mark.parametrize(
    ("log10_p", "words"),
    [
        (0.0, "about 1 in 1"),
        (-0.0, "about 1 in 1"),
        (math.log10(0.7), "about 1 in 1"),
        (math.log10(0.6), "about 1 in 1"),
        (math.log10(0.5), "about 1 in 2"),
        (math.log10(0.26), "about 1 in 3"),
        (math.log10(0.105), "about 1 in 9"),
        (-1.0, "1 in 10"),
        (math.log10(1 / 259), "1 in 250"),
        (-3.0, "1 in 1,000"),
        (-5.0, "1 in 100,000"),
        (-5.5, "1 in 310,000"),
        (-5.999999, "1 in 990,000"),
        (-6.0, "1 in 10^6"),
        (-18.27, "1 in 10^18"),
        (-19.265919722494797, "1 in 10^19"),
        (-882.0, "1 in 10^882"),
        (-math.inf, "0"),
    ],
)
def test_words_by_example(log10_p, words):
    assert odds_in_words(log10_p) == words


def stated(words: str) -> mpmath.mpf:
    """log10 of the odds that the words give."""
    match = re.fullmatch(r"(?:about )?1 in (?:10\^(\d+)|([\d,]+))", words)
    assert match, words
    if match[1]:
        return mpmath.mpf(int(match[1]))
    return mpmath.log10(int(match[2].replace(",", "")))


chances = st.integers(1, 10**7).map(lambda odds: -math.log10(odds))


@given(st.floats(-1e9, 0.0) | st.floats(-8.0, 0.0) | chances)
@example(-math.log10(1.99))
@example(-math.log10(9.7))
@example(math.nextafter(-6.0, 0.0))
@example(math.nextafter(-3.0, 0.0))
@example(math.nextafter(-1.0, 0.0))
@settings(deadline=None)
def test_words_never_overstate_and_stay_near(log10_p):
    with mpmath.workdps(40):
        said, found = stated(odds_in_words(log10_p)), -mpmath.mpf(log10_p)
        assert said <= found + mpmath.mpf(2) ** -50  # pow() rounds
        assert found - said <= (1.0 if log10_p <= -6.0 else math.log10(2.0) + 1e-12)
