"""A scheme's name loses nothing; what makes no sense is refused; margins and capacity."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pickle
import re
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hf_watermark import Scheme
from hf_watermark.errors import SchemeError

STATISTICS = ("spread", "mean")
KEY_MATRICES = ("random", "direct", "diff")
EMBEDDINGS = ("projection", "hinge", "bce")
DECIDES = ("soft", "bits")

positive = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False, allow_nan=False)


@st.composite
def schemes(draw) -> Scheme:
    statistic = draw(st.sampled_from(STATISTICS))
    key_matrix = "random" if statistic == "spread" else draw(st.sampled_from(KEY_MATRICES))
    embedding = draw(st.sampled_from(EMBEDDINGS))
    return Scheme(
        statistic=statistic,
        key_matrix=key_matrix,
        bits=draw(st.integers(1, 4096)),
        embedding=embedding,
        strength=draw(st.none() | positive),
        weight=None if embedding == "projection" else draw(st.none() | positive),
        decides=draw(st.sampled_from(DECIDES if key_matrix == "random" else ("bits",))),
    )


# The name -----------------------------------------------------------------------------------------


def test_names_are_pinned():
    assert Scheme().name == "spread-random-64-projection-auto-soft"
    assert (
        Scheme(statistic="mean", key_matrix="diff", bits=1, embedding="bce", strength=1e-5).name
        == "mean-diff-1-bce@0.01-s1e-05-bits"
    )
    assert (
        Scheme(bits=4096, embedding="hinge", weight=5e-324, strength=1e22, decides="bits").name
        == "spread-random-4096-hinge@5e-324-s1e+22-bits"
    )


@given(schemes())
@example(Scheme(strength=sys.float_info.max))
@example(Scheme(strength=5e-324, embedding="hinge", weight=sys.float_info.max))
@example(Scheme(strength=0.1 + 0.2))
@settings(deadline=None)
def test_name_is_lossless(scheme):
    again = Scheme.from_name(scheme.name)
    assert again == scheme
    assert dataclasses.astuple(again) == dataclasses.astuple(scheme)
    assert hash(again) == hash(scheme)
    assert len(scheme.name) < 100


@given(schemes(), schemes())
@settings(deadline=None)
def test_different_schemes_have_different_names(one, other):
    assert (one == other) == (one.name == other.name)


@given(schemes(), st.data())
@settings(deadline=None)
def test_every_field_is_in_the_name(scheme, data):
    other = data.draw(schemes())
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(scheme)]))
    try:
        changed = dataclasses.replace(scheme, **{field: getattr(other, field)})
    except SchemeError:
        assume(False)
    assert (changed == scheme) == (changed.name == scheme.name)
    assert Scheme.from_name(changed.name) == changed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "spread",
        " spread-random-64-projection-auto-soft",
        "spread-random-64-projection-auto-soft\n",
        "Spread-random-64-projection-auto-soft",
        "spread-random-64-projection-auto",
        "spread-random-64-projection-auto-soft-soft",
        "spread-random--64-projection-auto-soft",
        "spread-random-64.0-projection-auto-soft",
        "spread-random-0-projection-auto-soft",
        "spread-random-4097-projection-auto-soft",
        "spread-random-99999-projection-auto-soft",
        "spread-random-640000000-projection-auto-soft",
        "spread-direct-64-projection-auto-bits",
        "mean-direct-64-projection-auto-soft",
        "spread-random-64-projection@0.01-auto-soft",
        "spread-random-64-projection-s0.0-soft",
        "spread-random-64-projection-s-1.0-soft",
        "spread-random-64-projection-snan-soft",
        "spread-random-64-projection-sinf-soft",
        "spread-random-64-projection-s1e999-soft",
        "spread-random-64-projection-s1e-999-soft",
        "spread-random-64-hinge@1e999-auto-soft",
        # other spellings of what some scheme's name says
        "spread-random-064-projection-auto-soft",
        "spread-random-٦٤-projection-auto-soft",
        "spread-random-64-projection-s0.10-soft",
        "spread-random-64-projection-s1e-2-soft",
        "spread-random-64-projection-s1-soft",
        "spread-random-64-projection-s٠.١-soft",
        "spread-random-64-hinge-auto-soft",
        "spread-random-64-projection-s0." + "1" * 200 + "-soft",
        None,
        5,
        b"spread-random-64-projection-auto-soft",
        ["spread"],
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(SchemeError):
        Scheme.from_name(name)


@given(st.from_regex(re.compile(r"(spread|mean)-\w{1,8}-\d{1,6}-\w{1,12}(@[\d.e+-]{1,9})?-.{1,9}")))
@settings(deadline=None)
def test_from_name_gives_its_inverse_or_refuses(name):
    with contextlib.suppress(SchemeError):
        assert Scheme.from_name(name).name == name


@given(schemes(), st.data())
@settings(deadline=None)
def test_no_edit_of_a_name_gives_the_same_scheme(scheme, data):
    at = data.draw(st.integers(0, len(scheme.name)))
    edited = scheme.name[:at] + data.draw(st.sampled_from("0.- e1s@é")) + scheme.name[at:]
    with contextlib.suppress(SchemeError):
        assert Scheme.from_name(edited) != scheme


# What makes sense ---------------------------------------------------------------------------------


def test_every_combination_is_a_scheme_or_refused_for_a_reason():
    for statistic, key_matrix, embedding, decides in itertools.product(
        STATISTICS, KEY_MATRICES, EMBEDDINGS, (None, *DECIDES)
    ):
        sensible = key_matrix == "random" or (statistic == "mean" and decides != "soft")
        arguments = {
            "statistic": statistic,
            "key_matrix": key_matrix,
            "embedding": embedding,
            "decides": decides,
        }
        if not sensible:
            with pytest.raises(SchemeError, match=r"Gaussian"):
                Scheme(**arguments)
            continue
        scheme = Scheme(**arguments)
        assert scheme.decides == decides or (
            decides is None and scheme.decides == ("soft" if key_matrix == "random" else "bits")
        )
        assert scheme.weight == (None if embedding == "projection" else 0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"statistic": "median"}, "spread or mean"),
        ({"statistic": None}, "spread or mean"),
        ({"key_matrix": "Random"}, "random or direct or diff"),
        ({"embedding": ""}, "projection or hinge or bce"),
        ({"embedding": ["hinge"]}, "projection or hinge or bce"),
        ({"decides": "both"}, "soft or bits"),
        ({"bits": 0}, "1 to 4096"),
        ({"bits": -1}, "1 to 4096"),
        ({"bits": 4097}, "1 to 4096"),
        ({"bits": 64.0}, "whole number"),
        ({"bits": "64"}, "whole number"),
        ({"bits": True}, "whole number"),
        ({"bits": None}, "whole number"),
        ({"bits": np.int64(64)}, "whole number"),
        ({"strength": 0}, "number > 0"),
        ({"strength": 0.0}, "number > 0"),
        ({"strength": -0.1}, "number > 0"),
        ({"strength": math.inf}, "number > 0"),
        ({"strength": math.nan}, "number > 0"),
        ({"strength": 10**400}, "number > 0"),
        ({"strength": "auto"}, "not a number"),
        ({"strength": True}, "not a number"),
        ({"strength": np.float32(0.1)}, "not a number"),
        ({"weight": 0.1}, "weight=None"),
        ({"embedding": "bce", "weight": 0}, "number > 0"),
        ({"embedding": "bce", "weight": math.nan}, "number > 0"),
        ({"embedding": "hinge", "weight": "0.1"}, "not a number"),
        ({"statistic": "spread", "key_matrix": "diff"}, "key_matrix='random'"),
        ({"statistic": "mean", "key_matrix": "direct", "decides": "soft"}, "decides='bits'"),
    ],
)
def test_refusals(arguments, expected):
    with pytest.raises(SchemeError, match=re.escape(expected)) as refused:
        Scheme(**arguments)
    assert isinstance(refused.value, ValueError)


def test_numbers_are_plain_floats():
    scheme = Scheme(strength=np.float64(0.25), embedding="hinge", weight=1)
    assert type(scheme.strength) is type(scheme.weight) is float
    assert scheme.name == "spread-random-64-hinge@1.0-s0.25-soft"


def test_a_scheme_is_a_value():
    scheme = Scheme()
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bits = 8
    with pytest.raises(TypeError):
        Scheme("spread")
    assert {scheme, Scheme(decides="soft")} == {scheme}
    assert pickle.loads(pickle.dumps(scheme)) == scheme


# Margin and capacity ------------------------------------------------------------------------------

weights = st.integers(1, 10**11)


@given(weights, st.integers(1, 4096))
@settings(deadline=None)
def test_automatic_margin(n, bits):
    margin = Scheme(bits=bits).margin(n)
    assert margin >= 4.0
    distortion = margin / math.sqrt(n / bits)  # inverted: m = d sqrt(N / T)
    if margin > 4.0:
        assert 0.01 * (1 - 1e-12) <= distortion <= 0.10 * (1 + 1e-12)
        soft = distortion * math.sqrt(n)
        if n <= 250_000:
            assert distortion == pytest.approx(0.10)
            assert soft <= 50.0 * (1 + 1e-12)
        elif n <= 25_000_000:
            assert soft == pytest.approx(50.0)
        else:
            assert distortion == pytest.approx(0.01)
            assert soft >= 50.0 * (1 - 1e-12)


@pytest.mark.parametrize(
    ("n", "margin"),
    [
        (64, 4.0),
        (102_400, 4.0),
        (250_000, 6.25),
        (1_000_000, 6.25),
        (25_000_000, 6.25),
        (100_000_000, 12.5),
        (10**10, 125.0),
    ],
)
def test_automatic_margin_by_example(n, margin):
    assert Scheme().margin(n) == pytest.approx(margin, rel=1e-12)


@given(weights, st.integers(1, 4096), positive)
@settings(deadline=None)
def test_margin_of_a_given_distortion(n, bits, distortion):
    expected = distortion * math.sqrt(n / bits)
    assert Scheme(bits=bits, strength=distortion).margin(n) == max(4.0, expected)


@given(weights, positive)
@settings(deadline=None)
def test_margin_of_mean_is_the_strength_itself(n, strength):
    assert Scheme(statistic="mean").margin(n) == 1.0
    assert Scheme(statistic="mean", strength=strength).margin(n) == strength


@given(weights, st.integers(1, 10**6))
@settings(deadline=None)
def test_capacity(n, columns):
    assert Scheme().capacity(n, columns) == n // 64
    for key_matrix, expected in (("random", columns), ("direct", columns), ("diff", columns // 2)):
        assert Scheme(statistic="mean", key_matrix=key_matrix).capacity(n, columns) == expected
