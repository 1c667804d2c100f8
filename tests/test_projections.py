"""What a key reads: the same bytes on every machine, exact responses, exact gradients."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import Carrier
from hf_watermark.projections import Projection, standard_normal

KEY = OwnerKey(bytes(range(32)), "acme")
CARRIERS = (Carrier("a", (16, 12)), Carrier("b", (24, 4, 3, 3)))
SPREAD = Scheme()
SCHEMES = {
    "spread": Scheme(bits=16),
    "random": Scheme(statistic="mean", bits=16),
    "direct": Scheme(statistic="mean", key_matrix="direct", bits=16),
    "diff": Scheme(statistic="mean", key_matrix="diff", bits=16),
}

# SHA-256 of X and u (of each carrier) and b, little-endian, for KEY and CARRIERS. A change here
# makes every mark that was ever embedded unreadable.
PINNED = {
    "spread-random-64-projection-auto-soft": (
        (
            "1824afc6e2f287f4d80b95e6d44723a20539d5a2ed9e2bb79da432eeadc2bd8f",
            "2f37119d9afefa77d7215995d67bed156cae7c8428e2c754325547821ae5ac44",
        ),
        (
            "28934ded72dc049fd877b26e865c24068d0311d0bfed97e9fba638da3ffdca42",
            "ab01b294a66e8b1aff6a2ed82988d494bf1ed5334421d5c5be1544a05b10fe90",
        ),
        "2b143142af4f6d630ea6e5bedc440d040afd97d25ae58553dc352b9cca1f32c0",
    ),
    "spread-random-13-projection-auto-soft": (
        (
            "ef9bc8d9e1acefc8d429e63a42d0d2cf82c53d6410e40cfb63a3e240e7714622",
            "08dbab695114892c0aa8fcd3915aba6c6473cba6d8f7b1c00724f53d1bc1aebd",
        ),
        (
            "d7a08511417099b0701dc68e8743f29c8eb77e04d58ed0a975386bb50c153f3c",
            "728d85cf2b018c88f2ddf2d87979420ba2d7388fae1048341e49903653264f8e",
        ),
        "f81e9d8f79e114fa10c4a8656dde5e4dfaef6733f9b31985be232f5acee9ca20",
    ),
    "mean-random-20-projection-auto-soft": (
        (
            "6f06df2320f452d3130d674fb2a26f171c0f5de6bc3d6e7ce60235929b3215e9",
            "5042f8eacd53eb1aa737b03b7e3af34aebdab6780476ac37a3affab37ddc41bd",
        ),
        (
            "cc8cd41cef907c4d216069122c4b89936211361f9050a717a1e37ad1862e952f",
            "5b8b4d29020ea5b1bc427c40a0cab2bf944be057ec482110f1d12b68008cd286",
        ),
        "aabc98deb387680c4ac6ea83a3b49da04d1e101cf5d5a0ca8b6ddd2e518ac76d",
    ),
    "mean-direct-20-projection-auto-bits": (
        (
            "a83ee27118d4a38db9945a26b706f4678808d49f37ea1a76cbfca10c2bb0d4e2",
            "092d5efdd74a908b09b88a912be80736b587fb39d10bc51ba7d59531de0c1a9d",
        ),
        (
            "cc8cd41cef907c4d216069122c4b89936211361f9050a717a1e37ad1862e952f",
            "5b8b4d29020ea5b1bc427c40a0cab2bf944be057ec482110f1d12b68008cd286",
        ),
        "b635f11aaf588fee854a3b2cc9556aac4165be7635c215767128e4f4dce9415b",
    ),
    "mean-diff-20-projection-auto-bits": (
        (
            "ed13c6be07f4e38171dd612f5dd09f345b1a7b1236f851be077a749b43a7cdc1",
            "198df9e11754d6c333d6236fad16109c57cc321163fe2d377fd505c7ba71f0d8",
        ),
        (
            "cc8cd41cef907c4d216069122c4b89936211361f9050a717a1e37ad1862e952f",
            "5b8b4d29020ea5b1bc427c40a0cab2bf944be057ec482110f1d12b68008cd286",
        ),
        "f7b5d32626d4f273c52adc3fed396d597c3ef1802047e6ba0277770df136326c",
    ),
}


def digest(array: np.ndarray) -> str:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(5)
    return [rng.standard_normal(c.shape) * (0.3 + i) + 0.1 for i, c in enumerate(CARRIERS)]


# The same bytes everywhere ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PINNED)
def test_bytes_are_pinned(name):
    x, u, b = PINNED[name]
    projection = Projection(KEY, Scheme.from_name(name), CARRIERS)
    bits = projection.scheme.bits
    assert tuple(digest(projection.x(i)) for i in (0, 1)) == x
    assert tuple(digest(projection.row_signs(i)) for i in (0, 1)) == u
    assert digest(projection.message) == b
    assert [projection.x(i).shape for i in (0, 1)] == [(bits, 12), (bits, 36)]
    assert {projection.x(i).dtype for i in (0, 1)} == {np.dtype(np.float32)}
    width = bits if projection.scheme.statistic == "spread" else 1
    assert [projection.row_signs(i).shape for i in (0, 1)] == [(16, width), (24, width)]
    assert projection.message.shape == (bits,)


def test_the_message_is_pinned_where_people_can_read_it():
    message = "".join(map(str, Projection(KEY, SPREAD, CARRIERS).message))
    assert message == "1110100101010000101010100111111001100101110111100110011010011011"


def test_bytes_do_not_depend_on_the_processor():
    """All vector instructions that numpy may leave out are left out, in a process of its own."""
    optional = np._core._multiarray_umath.__cpu_dispatch__
    name = SPREAD.name
    script = (
        "from tests.test_projections import *\n"
        f"projection = Projection(KEY, Scheme.from_name({name!r}), CARRIERS)\n"
        "print(digest(projection.x(0)), digest(projection.x(1)))\n"
        "print(digest(standard_normal(np.arange(0, 2**32, 65521, dtype=np.uint32))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(optional)},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    here = digest(standard_normal(np.arange(0, 2**32, 65521, dtype=np.uint32)))
    assert done.stdout.split() == [*PINNED[name][0], here]


def prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


def stream(label: str, size: int) -> bytes:
    material = prefixed(b"hf-watermark/1") + prefixed(label.encode()) + bytes(range(32))
    return hashlib.shake_256(material).digest(size)


def test_bytes_from_hashlib_and_scipy_alone():
    bits, total = 16, 16 * 12 + 24 * 36
    projection = Projection(KEY, SCHEMES["spread"], CARRIERS)
    raw = stream("spread-random/message", 2)
    assert [int(bit) for bit in f"{int.from_bytes(raw, 'big'):016b}"] == [*projection.message]
    for i, (rows, columns) in enumerate([(16, 12), (24, 36)]):
        raw = stream(f"spread-random/signs/{i}", rows * 2)
        for row in range(rows):
            line = f"{int.from_bytes(raw[2 * row : 2 * row + 2], 'big'):016b}"
            assert [2 * int(bit) - 1 for bit in line] == [*projection.row_signs(i)[row]]
        raw = stream(f"spread-random/rows/{i}", 4 * bits * columns)
        integers = np.array(
            [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
        )
        expected = scipy.special.ndtri((integers + 0.5) / 2**32).reshape(bits, columns)
        expected *= math.sqrt(rows / total)
        np.testing.assert_allclose(projection.x(i), expected, rtol=3e-7)


# Normal numbers -----------------------------------------------------------------------------------


def ndtri(integers: np.ndarray) -> np.ndarray:
    return scipy.special.ndtri((integers.astype(np.float64) + 0.5) / 2**32)


EDGES = [0, 2**31 - 1, 2**31, 2**32 - 1]
SEAMS = [round(2**32 * p) for p in (0.075, 0.925)]  # where the centre gives way to the tails


@pytest.mark.parametrize("around", [*EDGES, *SEAMS, 12345678, 3 * 2**30])
def test_normal_numbers_are_accurate_and_rise(around):
    start = min(max(0, around - 2**15), 2**32 - 2**16)
    integers = np.arange(start, start + 2**16).astype(np.uint32)
    x, expected = standard_normal(integers), ndtri(integers)
    assert (np.abs(x - expected) <= np.spacing(np.abs(expected).astype(np.float32))).all()
    assert (np.diff(x) >= 0.0).all()
    assert x[-1] > x[0]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50))
@settings(deadline=None)
def test_normal_numbers_are_symmetric_and_monotone(values):
    integers = np.array(sorted(values), np.uint32)
    x = standard_normal(integers)
    assert (np.diff(x) >= 0.0).all()
    mirrored = standard_normal(np.uint32(2**32 - 1) - integers)
    np.testing.assert_array_equal(mirrored, -x)
    expected = ndtri(integers)
    assert (np.abs(x - expected) <= np.spacing(np.abs(expected).astype(np.float32))).all()


def test_normal_numbers_at_the_ends():
    x = standard_normal(np.array(EDGES, np.uint32))
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x, [-6.338, -2.918e-10, 2.918e-10, 6.338], rtol=1e-3)


def test_normal_numbers_have_the_moments_of_the_normal():
    """Over a grid of the whole range: the spacing leaves errors far below these bounds."""
    x = standard_normal(np.arange(2**11, 2**32, 2**12, dtype=np.uint32)).astype(np.float64)
    assert abs(x.mean()) < 1e-6
    assert abs(np.mean(x**2) - 1.0) < 1e-4
    assert abs(np.mean(x**4) - 3.0) < 1e-2


@pytest.mark.parametrize("size", [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
def test_normal_numbers_come_in_the_shape_asked_for(size):
    integers = np.random.default_rng(0).integers(0, 2**32, size, dtype=np.uint32)
    x = standard_normal(integers)
    assert x.shape == (size,)
    pieces = [standard_normal(integers[at : at + 1000]) for at in range(0, size, 1000)]
    np.testing.assert_array_equal(x, np.concatenate([*pieces, np.zeros(0, np.float32)]))
    even = integers[: size // 6 * 6].reshape(-1, 3, 2)
    expected = x[: even.size].reshape(-1, 3, 2).transpose(2, 0, 1)
    np.testing.assert_array_equal(standard_normal(even.transpose(2, 0, 1)), expected)


# What X, u and b depend on ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_names_strengths_and_embedding_do_not_matter(scheme):
    other = dataclasses.replace(scheme, strength=0.3, decides="bits", embedding="hinge", weight=0.5)
    renamed = [Carrier(f"x{i}", (c.rows, c.columns)) for i, c in enumerate(CARRIERS)]
    one, two = Projection(KEY, scheme, CARRIERS), Projection(KEY, other, renamed)
    for i in (0, 1):
        np.testing.assert_array_equal(one.x(i), two.x(i))
        np.testing.assert_array_equal(one.row_signs(i), two.row_signs(i))
    np.testing.assert_array_equal(one.message, two.message)


@pytest.mark.parametrize("key_matrix", ["spread", "random"])
def test_fewer_bits_are_the_first_ones(key_matrix):
    scheme = SCHEMES[key_matrix]
    few = Projection(KEY, Scheme(statistic=scheme.statistic, bits=5), CARRIERS)
    many = Projection(KEY, scheme, CARRIERS)
    np.testing.assert_array_equal(few.message, many.message[:5])
    for i in (0, 1):
        np.testing.assert_array_equal(few.x(i), many.x(i)[:5])


def test_other_carriers_change_the_scale_of_x_alone():
    first, other = Carrier("a", (16, 16)), Carrier("b", (16, 48))
    alone = Projection(KEY, SPREAD, [first])
    with_others = Projection(KEY, SPREAD, [first, other])
    with_many = Projection(KEY, SPREAD, [first, Carrier("c", (64, 32)), other, first, other])
    # Weights 256, 1,024, 4,096: the scales are powers of two, so equality is exact.
    np.testing.assert_array_equal(with_others.x(0) * 2, alone.x(0))
    np.testing.assert_array_equal(with_many.x(0) * 4, alone.x(0))
    np.testing.assert_array_equal(with_others.row_signs(0), alone.row_signs(0))
    # The position counts: the same shape at another place has other rows.
    assert (with_many.x(3) != with_many.x(0)).any()
    assert (with_many.row_signs(3) != with_many.row_signs(0)).any()


def test_spread_spends_the_same_distortion_on_every_carrier():
    carriers = [Carrier("a", (512, 16)), Carrier("b", (16, 512)), Carrier("c", (64, 64))]
    projection = Projection(KEY, Scheme(bits=256), carriers)
    for i, carrier in enumerate(carriers):
        expected = carrier.rows / sum(c.weights for c in carriers)
        square = float(np.mean(projection.x(i).astype(np.float64) ** 2))
        assert square == pytest.approx(expected, rel=5 * math.sqrt(2 / projection.x(i).size))


def test_keys_recipients_and_statistics_share_nothing():
    projections = [
        Projection(key, scheme, CARRIERS)
        for key in (KEY, KEY.for_recipient("a"), KEY.for_recipient("b"), OwnerKey(b"\1" * 32))
        for scheme in (SCHEMES["spread"], SCHEMES["random"])
    ]
    normal = [p.x(1) / p.x(1).std() for p in projections]
    for i, one in enumerate(normal):
        for other in normal[:i]:
            correlation = float(np.mean(one * other))
            assert abs(correlation) < 5 / math.sqrt(one.size)
    assert len({p.message.tobytes() for p in projections}) == len(projections)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 24))
@settings(deadline=None)
def test_direct_and_diff_take_every_column_once(secret, bits):
    carriers = [Carrier("a", (3, 7)), Carrier("b", (5, 41))]
    for key_matrix, taps in (("direct", [1.0]), ("diff", [-1.0, 1.0])):
        scheme = Scheme(statistic="mean", key_matrix=key_matrix, bits=bits)
        projection = Projection(OwnerKey(secret), scheme, carriers)
        x = np.concatenate([projection.x(i) for i in (0, 1)], axis=1)
        for row in x:
            assert sorted(row[row != 0.0]) == taps
        assert np.count_nonzero(x, axis=0).max() == 1
        assert np.linalg.matrix_rank(x) == bits  # every message can be written
        assert projection.taps == len(taps)


def test_signs_and_bits_are_balanced():
    projection = Projection(KEY, Scheme(bits=4096), [Carrier("a", (64, 8))])
    u = projection.row_signs(0)
    assert set(np.unique(u)) == {-1, 1}
    assert abs(u.mean()) < 5 / math.sqrt(u.size)
    assert abs(projection.message.mean() - 0.5) < 5 / (2 * math.sqrt(4096))
    np.testing.assert_array_equal(projection.message_signs, np.where(projection.message, 1.0, -1.0))


def test_mean_has_one_column_of_ones():
    projection = Projection(KEY, SCHEMES["random"], CARRIERS)
    assert (projection.row_signs(1) == np.ones((24, 1))).all()


def test_margin_is_the_schemes():
    projection = Projection(KEY, Scheme(bits=16, strength=0.9), CARRIERS)
    assert projection.weights == 16 * 12 + 24 * 36
    assert projection.margin == pytest.approx(0.9 * math.sqrt(1056 / 16))


# Responses ----------------------------------------------------------------------------------------


def naive_responses(projection: Projection, arrays: list[np.ndarray]) -> list[float]:
    """Sums in plain Python, from the definitions in `Scheme`."""
    scheme = projection.scheme
    xs = [projection.x(i).tolist() for i in range(len(arrays))]
    us = [projection.row_signs(i).tolist() for i in range(len(arrays))]
    ws = [np.asarray(a, np.float64).reshape(len(a), -1).tolist() for a in arrays]
    means = [[math.fsum(column) / len(w) for column in zip(*w, strict=True)] for w in ws]
    taps = {"random": sum(map(len, means)), "direct": 1, "diff": 2}[scheme.key_matrix]
    flat = [value for mean in means for value in mean]
    sigma = math.sqrt(taps * math.fsum(value * value for value in flat) / len(flat))
    z = []
    for t in range(scheme.bits):
        terms = []
        for x, u, w, mean in zip(xs, us, ws, means, strict=True):
            if scheme.statistic == "mean":
                terms += [a * b / sigma for a, b in zip(x[t], mean, strict=True)]
                continue
            count = len(w) * len(w[0])
            rms = math.sqrt(math.fsum(value * value for row in w for value in row) / count)
            for r, row in enumerate(w):
                terms += [
                    u[r][t] * x[t][c] * value / (math.sqrt(len(w)) * rms)
                    for c, value in enumerate(row)
                ]
        z.append(math.fsum(terms))
    return z


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_responses_against_a_naive_loop(scheme, dtype, weights):
    projection = Projection(KEY, scheme, CARRIERS)
    arrays = [array.astype(dtype) for array in weights]
    expected = naive_responses(projection, arrays)
    np.testing.assert_allclose(projection.responses(arrays), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_convolutions_are_read_as_matrices(scheme, weights):
    projection = Projection(KEY, scheme, CARRIERS)
    flat = [array.reshape(len(array), -1) for array in weights]
    strided = [np.asfortranarray(array) for array in weights]
    expected = projection.responses(weights)
    np.testing.assert_array_equal(projection.responses(flat), expected)
    np.testing.assert_allclose(projection.responses(strided), expected, rtol=1e-12)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_spread_does_not_see_the_scale_of_any_carrier(one, other):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(carrier.shape) for carrier in CARRIERS]
    projection = Projection(KEY, SCHEMES["spread"], CARRIERS)
    scaled = projection.responses([arrays[0] * one, arrays[1] * other])
    np.testing.assert_allclose(scaled, projection.responses(arrays), rtol=1e-9, atol=1e-12)


def test_a_carrier_turned_round_answers_the_opposite(weights):
    projection = Projection(KEY, SCHEMES["spread"], CARRIERS)
    nothing = [np.zeros(carrier.shape) for carrier in CARRIERS]
    parts = [
        projection.responses([weights[0], nothing[1]]),
        projection.responses([nothing[0], weights[1]]),
    ]
    np.testing.assert_allclose(projection.responses(weights), sum(parts), rtol=1e-12)
    turned = projection.responses([-weights[0], weights[1]])
    np.testing.assert_allclose(turned, parts[1] - parts[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("key_matrix", ["random", "direct", "diff"])
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_mean_does_not_see_the_scale_of_all_carriers(key_matrix, factor, weights):
    projection = Projection(KEY, SCHEMES[key_matrix], CARRIERS)
    scaled = projection.responses([array * factor for array in weights])
    np.testing.assert_allclose(scaled, projection.responses(weights), rtol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_carriers_of_zeros_say_nothing(scheme):
    projection = Projection(KEY, scheme, CARRIERS)
    nothing = [np.zeros(carrier.shape) for carrier in CARRIERS]
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(projection.responses(nothing), np.zeros(16))
        for gradient in projection.gradient(nothing, np.ones(16)):
            assert not gradient.any()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradient_against_finite_differences(scheme, weights):
    projection = Projection(KEY, scheme, CARRIERS)
    dz = np.random.default_rng(2).standard_normal(16)
    gradients = projection.gradient(weights, dz)
    step = 1e-5
    for i, gradient in enumerate(gradients):
        assert gradient.shape == weights[i].shape
        numeric = np.zeros_like(gradient)
        for at in np.ndindex(gradient.shape):
            moved = [array.copy() for array in weights]
            moved[i][at] += step
            up = dz @ projection.responses(moved)
            moved[i][at] -= 2 * step
            numeric[at] = (up - dz @ projection.responses(moved)) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradient_is_linear_and_does_not_change_sizes(scheme, weights):
    projection = Projection(KEY, scheme, CARRIERS)
    rng = np.random.default_rng(3)
    one, other = rng.standard_normal((2, 16))
    both = projection.gradient(weights, 2 * one - other)
    parts = zip(projection.gradient(weights, one), projection.gradient(weights, other), strict=True)
    for total, (g, h) in zip(both, parts, strict=True):
        np.testing.assert_allclose(total, 2 * g - h, rtol=1e-9, atol=1e-12)
    # Responses do not see sizes, so by Euler the gradient is orthogonal to the weights.
    inner = [float((g * w).sum()) for g, w in zip(both, weights, strict=True)]
    if scheme.statistic == "spread":
        np.testing.assert_allclose(inner, 0.0, atol=1e-10)
    assert sum(inner) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_arrays_are_left_alone(scheme, weights):
    projection = Projection(KEY, scheme, CARRIERS)
    before = [array.copy() for array in weights]
    projection.responses(weights)
    for gradient in projection.gradient(weights, np.ones(16)):
        gradient += 1.0  # the caller's own, not a view
    for array, old in zip(weights, before, strict=True):
        np.testing.assert_array_equal(array, old)
