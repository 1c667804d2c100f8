"""Reading in blocks is reading at once, and what was never marked reads as chance.

The null tests draw keys, never weights: the weights are fixed and nasty, and each key reads all of
them. Seeds are fixed, so that a failure is a change of the code.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import Carrier
from hf_watermark.errors import CarrierError
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.projections import Projection
from hf_watermark.significance import log10_binomial_tail, log10_normal_tail

KEY = OwnerKey(bytes(range(32)), "acme")
CARRIERS = (Carrier("a", (12, 8)), Carrier("b", (8, 4, 3, 3)), Carrier("c", (20, 10)))
SPREAD = Scheme(bits=24)
RANDOM = Scheme(statistic="mean", bits=24)
DIRECT = Scheme(statistic="mean", key_matrix="direct", bits=24)
DIFF = Scheme(statistic="mean", key_matrix="diff", bits=24)
SCHEMES = [SPREAD, RANDOM, DIRECT, DIFF]
ids = [f"{scheme.statistic}-{scheme.key_matrix}" for scheme in SCHEMES]


def matrices(carriers=CARRIERS, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((c.rows, c.columns)).astype(np.float32) for c in carriers]


def read(projection: Projection, arrays) -> Extraction:
    extraction = Extraction(projection)
    for i, array in enumerate(arrays):
        extraction.add(i, 0, array)
    return extraction


# Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_a_whole_reading_is_that_of_the_responses(scheme):
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    z, signs = projection.responses(arrays), projection.message_signs
    reading = read(projection, arrays).reading()
    assert reading.matched == int((z * signs > 0).sum())
    assert (reading.bits, reading.decides) == (24, scheme.decides)
    if scheme.statistic == "mean":  # z is in natural sigmas already
        assert reading.soft == pytest.approx(float(signs @ z) / math.sqrt(24), rel=1e-5)
        return
    variances = np.zeros(24)
    for i, array in enumerate(arrays):
        w = array.astype(np.float64)
        y = projection.row_signs(i).T.astype(np.float64) @ (w / math.sqrt(float(np.mean(w * w))))
        variances += (y * y).sum(axis=1) / projection.weights
    assert reading.soft == pytest.approx(float(signs @ z / np.sqrt(variances.sum())), rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_partial_rows_are_the_rows_alone(scheme):
    """Rows never read count for nothing, not as zeros."""
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    extraction = Extraction(projection)
    extraction.add(1, 2, arrays[1][2:5])
    extraction.add(2, 0, arrays[2][:7])
    signs = projection.message_signs
    z, v = np.zeros(24), 0.0
    for i, rows in [(1, slice(2, 5)), (2, slice(0, 7))]:
        w, x = arrays[i][rows].astype(np.float64), projection.x(i).astype(np.float64)
        u = projection.row_signs(i)[rows].astype(np.float64)
        if scheme.statistic == "mean":
            y = np.tile(w.mean(axis=0), (24, 1))
        else:
            y = u.T @ w / math.sqrt(float(np.mean(w * w)) * len(w))
        z += (x * y).sum(axis=1)
        scale = projection.rows[i] / projection.weights if scheme is SPREAD else 1.0
        v += float((y * y).sum()) * scale
    reading = extraction.reading()
    assert reading.matched == int((z * signs > 0).sum())
    if scheme.decides == "soft":
        assert reading.soft == pytest.approx(float(signs @ z) / math.sqrt(v), rel=1e-5)


@st.composite
def partitions(draw) -> list[tuple[int, int, int]]:
    """Blocks (carrier, start, stop) that hold every row once, in any order."""
    blocks = []
    for i, carrier in enumerate(CARRIERS):
        cuts = draw(st.sets(st.integers(1, carrier.rows - 1)))
        edges = [0, *sorted(cuts), carrier.rows]
        blocks += [(i, a, b) for a, b in itertools.pairwise(edges)]
    return draw(st.permutations(blocks))


@given(partitions(), st.sampled_from(SCHEMES), st.integers(0, 5))
@settings(deadline=None)
def test_blocks_in_any_order_are_read_as_one(blocks, scheme, seed):
    """Whole numbers, whose sums are exact in any order: so equality is exact too."""
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(-9, 10, (c.rows, c.columns)).astype(np.float32) for c in CARRIERS]
    projection = Projection(KEY, scheme, CARRIERS)
    whole = read(projection, arrays)
    extraction = Extraction(projection)
    for i, start, stop in blocks:
        extraction.add(i, start, arrays[i][start:stop])
    assert extraction.reading() == whole.reading()
    for i in range(len(CARRIERS)):
        assert extraction.reading(i) == whole.reading(i)


@given(partitions(), st.sampled_from(SCHEMES))
@settings(deadline=None)
def test_blocks_of_real_weights_agree_to_rounding(blocks, scheme):
    arrays = matrices()
    projection = Projection(KEY, scheme, CARRIERS)
    extraction = Extraction(projection)
    for i, start, stop in blocks:
        extraction.add(i, start, arrays[i][start:stop])
    assert extraction.reading().soft == pytest.approx(read(projection, arrays).reading().soft, 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_one_carrier_is_read_as_if_it_were_the_only_one_added(scheme):
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    whole = read(projection, arrays)
    for i, array in enumerate(arrays):
        alone = Extraction(projection)
        alone.add(i, 0, array)
        assert whole.reading(i) == alone.reading() == alone.reading(i)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_reading_changes_nothing(scheme):
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    extraction = Extraction(projection)
    before = [array.copy() for array in arrays]
    for i, array in enumerate(arrays):
        extraction.reading()
        extraction.add(i, 0, array[:4])
        extraction.reading(i)
        extraction.add(i, 4, array[4:])
    assert extraction.reading() == extraction.reading()
    assert extraction.reading().matched == read(projection, arrays).reading().matched
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_convolutions_and_other_precisions():
    projection, arrays = Projection(KEY, SPREAD, CARRIERS), matrices()
    expected = read(projection, arrays).reading()
    folded = [arrays[0], arrays[1].reshape(8, 4, 3, 3), np.asfortranarray(arrays[2])]
    assert read(projection, folded).reading().soft == pytest.approx(expected.soft, rel=1e-6)
    double = [array.astype(np.float64) for array in arrays]
    assert read(projection, double).reading() == expected
    half = [array.astype(np.float16) for array in arrays]
    widened = [array.astype(np.float32) for array in half]
    assert read(projection, half).reading() == read(projection, widened).reading()


@pytest.mark.parametrize("exponent", [-130, -60, 60, 120])
def test_sizes_do_not_matter_however_extreme(exponent):
    projection, arrays = Projection(KEY, SPREAD, CARRIERS), matrices()
    scaled = [np.ldexp(array, exponent + i).astype(np.float32) for i, array in enumerate(arrays)]
    one, other = read(projection, arrays).reading(), read(projection, scaled).reading()
    assert other.matched == one.matched
    assert other.soft == pytest.approx(one.soft, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.filterwarnings("error")
def test_weights_at_the_end_of_the_range_are_read(scheme):
    """Their sums leave float32; a stranger must not turn a reading into NaN so easily."""
    rng = np.random.default_rng(0)
    top = float(np.finfo(np.float32).max)
    signs = [rng.choice([-1.0, 1.0], (c.rows, c.columns)) for c in CARRIERS]
    projection = Projection(KEY, scheme, CARRIERS)
    huge = read(projection, [(top * s).astype(np.float32) for s in signs]).reading()
    unit = read(projection, [s.astype(np.float32) for s in signs]).reading()
    assert huge.matched == unit.matched
    assert huge.soft == pytest.approx(unit.soft, rel=1e-5)
    assert math.isfinite(huge.log10_p)


# What cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_are_refused(scheme, bad, dtype):
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    extraction = Extraction(projection)
    extraction.add(2, 0, arrays[2][:10])
    before = extraction.reading()
    block = arrays[2][10:].astype(dtype)
    block[3, 4] = bad
    with pytest.raises(CarrierError, match="not finite"):
        extraction.add(2, 10, block)
    assert extraction.reading() == before  # the bad block left nothing behind
    extraction.add(2, 10, arrays[2][10:])
    assert math.isfinite(extraction.reading().soft)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_doubles_beyond_float32_are_refused():
    extraction = Extraction(Projection(KEY, SPREAD, CARRIERS))
    block = np.ones((12, 8))
    block[0, 0] = 1e39
    with pytest.raises(CarrierError, match="not finite"):
        extraction.add(0, 0, block)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.filterwarnings("error")
def test_zeros_say_nothing(scheme):
    projection, arrays = Projection(KEY, scheme, CARRIERS), matrices()
    nothing = [np.zeros_like(array) for array in arrays]
    reading = read(projection, nothing).reading()
    assert (reading.soft, reading.matched) == (0.0, 0)
    assert reading.log10_p > -0.302  # no better than even
    assert Extraction(projection).reading() == reading
    for i in range(len(CARRIERS)):
        assert read(projection, nothing).reading(i) == reading
    mixed = read(projection, [nothing[0], arrays[1], nothing[2]]).reading()
    assert math.isfinite(mixed.soft)
    if scheme is SPREAD:
        assert mixed == read(projection, [nothing[0], arrays[1], nothing[2]]).reading(1)


def test_ties_are_not_matches():
    """A pruned column answers 0 to its bit: that is no agreement."""
    projection = Projection(KEY, DIRECT, CARRIERS)
    arrays = [np.zeros_like(array) for array in matrices()]
    arrays[0][:] = 1.0
    touched = int((projection.x(0) != 0.0).any(axis=1).sum())
    assert 0 < touched < 24
    assert read(projection, arrays).reading().matched <= touched


# A mark is read -----------------------------------------------------------------------------------


def marked(projection: Projection, arrays: list[np.ndarray], margin: float) -> list[np.ndarray]:
    """W_i += sum_t c s_t u_it x_it^T rms(W_i) / sqrt(out_i): every response rises by about c."""
    result = []
    for i, array in enumerate(arrays):
        w = array.astype(np.float64)
        size = math.sqrt(float(np.mean(w * w))) / math.sqrt(projection.rows[i])
        u, x = projection.row_signs(i).astype(np.float64), projection.x(i).astype(np.float64)
        change = (u * (margin * projection.message_signs)) @ x * size
        result.append((w + change).astype(np.float32))
    return result


def test_a_mark_is_read_by_its_key_alone():
    carriers = [Carrier("a", (96, 64)), Carrier("b", (64, 48))]
    scheme = Scheme(bits=64, strength=0.1)
    projection = Projection(KEY, scheme, carriers)
    clean = matrices(carriers)
    arrays = marked(projection, clean, projection.margin + 4.0)
    reading = read(projection, arrays).reading()
    assert reading.matched == 64
    assert reading.soft > 25.0
    assert reading.log10_p == log10_normal_tail(reading.soft) < -130.0
    # S^2 is about d^2 n for n weights read: half the rows, 1 / sqrt(2) of S.
    half = Extraction(projection)
    for i, array in enumerate(arrays):
        half.add(i, 0, array[: len(array) // 2])
    assert half.reading().soft == pytest.approx(reading.soft / math.sqrt(2.0), rel=0.15)
    others = [KEY.for_recipient("x"), OwnerKey(b"\1" * 32), KEY]
    for other, weights in zip(others, [arrays, arrays, clean], strict=True):
        foreign = read(Projection(other, scheme, carriers), weights).reading()
        assert abs(foreign.soft) < 4.0
        assert foreign.log10_p > -4.5
    # A carrier in another's place is not read.
    swapped = [Carrier("b", (64, 48)), Carrier("a", (96, 64))]
    foreign = read(Projection(KEY, scheme, swapped), arrays[::-1]).reading()
    assert abs(foreign.soft) < 4.0


def test_the_scheme_decides_what_the_p_value_is_of():
    soft, bits = Reading(9.5, 60, 64, "soft"), Reading(9.5, 60, 64, "bits")
    assert soft.log10_p == log10_normal_tail(9.5)
    assert bits.log10_p == log10_binomial_tail(60, 64)
    assert Reading(-9.5, 4, 64, "soft").log10_p == pytest.approx(0.0, abs=1e-12)


# The null -----------------------------------------------------------------------------------------

NULL_CARRIERS = (Carrier("a", (24, 40)), Carrier("b", (32, 6, 2, 2)))
NULL_SCHEMES = {"spread": Scheme(bits=32), "random": Scheme(statistic="mean", bits=32)}
PARTIAL = (slice(3, 12), slice(0, 5))
# Columns of zeros, and of equal weights under as many + as -, answer 0 to some bits. A tie is no
# match: the count is then smaller than binomial, which is never flattering.
TIED = ("constant", "one weight", "sparse")


def nasty_weights(carriers=NULL_CARRIERS) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(20240607)
    normal = rng.standard_normal

    def outlier_rows(shape):
        w = normal(shape)
        w[::7] *= 100.0
        return w

    makers = {
        "normal": normal,
        "column means of 3 sigma": lambda s: normal(s) + 3.0 * normal((1, s[1])),
        "one mean of 5 sigma": lambda s: normal(s) + 5.0,
        "rank one": lambda s: np.outer(normal(s[0]), normal(s[1])),
        "heavy tails": lambda s: rng.standard_t(1.2, s),
        "outlier rows": outlier_rows,
        "sparse": lambda s: normal(s) * (rng.random(s) < 0.03),
        "constant": np.ones,
        "one weight": lambda s: np.eye(*s) * (np.arange(s[1]) == 3),
    }
    return {
        name: [make((c.rows, c.columns)).astype(np.float32) for c in carriers]
        for name, make in makers.items()
    }


def null_readings(count: int, scheme: Scheme, carriers=NULL_CARRIERS, seed: int = 0):
    """What `count` keys read of all nasty weights and parts: soft and matched, (count,) each."""
    soft: dict[tuple[str, str], list[float]] = {}
    matched: dict[tuple[str, str], list[int]] = {}
    weights, secrets = nasty_weights(carriers), np.random.default_rng(seed)
    for _ in range(count):
        projection = Projection(OwnerKey(secrets.bytes(32)), scheme, carriers)
        signs = [projection.row_signs(i) for i in range(len(carriers))]
        projection.row_signs = signs.__getitem__  # made once for all weights
        for name, arrays in weights.items():
            whole, part = read(projection, arrays), Extraction(projection)
            for i, rows in enumerate(PARTIAL):
                part.add(i, rows.start, arrays[i][rows])
            for how, reading in (
                ("all rows", whole.reading()),
                ("one carrier", whole.reading(0)),
                ("some rows", part.reading()),
            ):
                soft.setdefault((name, how), []).append(reading.soft)
                matched.setdefault((name, how), []).append(reading.matched)
    return soft, matched


def check_null(soft, matched, bits: int) -> None:
    """S is N(0, 1), the matches are Binomial(T, 1/2), and 1 in 100 readings has p <= .01."""
    least_p = 0.01 / len(soft)  # Bonferroni: a chance of 1% that any of the cases fails
    for case, values in soft.items():
        assert scipy.stats.kstest(values, "norm").pvalue > least_p, case
        false = sum(log10_normal_tail(value) <= -2.0 for value in values)
        assert scipy.stats.binomtest(false, len(values), 0.01).pvalue > least_p, case
    tails = scipy.stats.binom.sf(np.arange(-1, bits), bits, 0.5)
    level = tails[tails <= 0.01].max()  # counts are coarse: the level that 1 in 100 comes down to
    edges = scipy.stats.binom.ppf([0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95], bits, 0.5)
    chances = np.diff([0.0, *scipy.stats.binom.cdf(edges, bits, 0.5), 1.0])
    for case, values in matched.items():
        false = sum(log10_binomial_tail(value, bits) <= -2.0 for value in values)
        tied = case[0] in TIED
        side = "greater" if tied else "two-sided"
        assert scipy.stats.binomtest(false, len(values), level, side).pvalue > least_p, case
        if not tied:
            groups = np.searchsorted(edges, values)  # edges[k - 1] < matched <= edges[k]
            observed = np.bincount(groups, minlength=len(chances))
            assert scipy.stats.chisquare(observed, chances * len(values)).pvalue > least_p, case


@pytest.mark.parametrize("name", NULL_SCHEMES)
def test_unmarked_weights_read_as_chance(name):
    scheme = NULL_SCHEMES[name]
    check_null(*null_readings(2_000, scheme), scheme.bits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NULL_SCHEMES)
def test_unmarked_weights_read_as_chance_by_20_000_keys(name):
    carriers = (Carrier("a", (24, 20)), Carrier("b", (32, 2, 2, 3)))
    scheme = NULL_SCHEMES[name]
    check_null(*null_readings(20_000, scheme, carriers, seed=1), scheme.bits)
