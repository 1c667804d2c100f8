"""Directions, sums and rounding against their definitions; the bound on memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark import OwnerKey, Scheme, margins
from hf_watermark.carriers import Carrier
from hf_watermark.closed_form import Mark, Sums, rounded, square_sum
from hf_watermark.extraction import Extraction
from hf_watermark.margins import Grams
from hf_watermark.projections import Projection

KEY = OwnerKey(bytes(range(32)))
CARRIERS = (
    Carrier("a.weight", (48, 40)),
    Carrier("b.weight", (16, 12, 3, 3)),
    Carrier("c.weight", (64, 32)),
)


def weights_of(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((c.rows, c.columns), np.float32) * np.float32(10.0**-i)
        for i, c in enumerate(CARRIERS)
    ]


def mark_of(keys: int = 2, bits: int = 24) -> Mark:
    others = [KEY.for_recipient(str(i)) for i in range(keys - 1)]
    return Mark([KEY, *others], Scheme(bits=bits), CARRIERS)


class TestMark:
    def test_one_message_of_all_keys(self):
        mark = mark_of()
        projections = [
            Projection(key, Scheme(bits=24), CARRIERS) for key in (KEY, KEY.for_recipient("0"))
        ]
        np.testing.assert_array_equal(mark.signs[mark.own], projections[0].message_signs)
        np.testing.assert_array_equal(mark.signs[24:], projections[1].message_signs)
        assert mark.margin == projections[0].margin
        for i in range(len(CARRIERS)):
            directions = mark.directions(i)
            for k, projection in enumerate(projections):
                part = slice(24 * k, 24 * k + 24)
                np.testing.assert_array_equal(directions.u[:, part], projection.row_signs(i))
                np.testing.assert_array_equal(directions.x[part], projection.x(i))

    def test_gram_is_inner_products_of_the_directions(self):
        mark = mark_of(1, 7)
        for i, w in enumerate(weights_of()):
            directions = mark.directions(i)
            rms = float(np.sqrt(np.mean(w.astype(np.float64) ** 2)))
            each = [
                (directions.scaled(unit, rms) @ directions.x).ravel() / rms for unit in np.eye(7)
            ]
            expected = [[float(a @ b) for b in each] for a in each]
            np.testing.assert_allclose(directions.gram(), expected, rtol=1e-4, atol=1e-3)

    def test_without_room_the_matrices_are_the_same(self, monkeypatch):
        mark = mark_of()
        made: list[int] = []

        def make(i):
            made.append(i)
            return mark.directions(i).gram()

        kept = Grams(len(CARRIERS), 48, make)
        first = list(kept)
        assert list(map(id, kept)) == list(map(id, first))
        assert len(made) == len(CARRIERS)
        monkeypatch.setattr(margins, "_ROOM", 8 * 48**2)
        few = Grams(len(CARRIERS), 48, make)
        for _ in range(2):
            for a, b in zip(first, few, strict=True):
                np.testing.assert_array_equal(a, b)
        assert len(made) == 2 * len(CARRIERS) + len(CARRIERS) - 1


class TestSums:
    @given(st.integers(0, 1000), st.integers(1, 50))
    @settings(max_examples=20, deadline=None)
    def test_as_a_reader_sees_it(self, seed, step):
        mark, weights = mark_of(1), weights_of(seed)
        projection = Projection(KEY, Scheme(bits=24), CARRIERS)
        extraction = Extraction(projection)
        z, variance = np.zeros(24), np.zeros(24)
        for i, w in enumerate(weights):
            extraction.add(i, 0, w)
            sums = Sums(mark.directions(i))
            for start in range(0, len(w), step):
                sums.add(start, w[start : start + step])
            response = sums.response()
            z += response.z
            variance += response.variance
            assert response.rms == pytest.approx(float(np.sqrt(np.mean(w.astype(float) ** 2))))
        np.testing.assert_allclose(z, projection.responses(weights), atol=1e-4)
        soft = float(mark.signs @ z) / np.sqrt(variance.sum())
        assert soft == pytest.approx(extraction.reading().soft, abs=1e-4)

    @pytest.mark.parametrize("value", [0.0, 3e38, np.inf, np.nan])
    def test_weights_that_say_nothing(self, value):
        sums = Sums(mark_of().directions(0))
        sums.add(0, np.full((48, 40), value, np.float32))
        assert sums.response() is None

    @pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-19, 1e-12, 1.0, 1e14, 1e18, 1e37])
    def test_square_sum(self, size):
        w = (np.random.default_rng(0).uniform(0.5, 3.0, (32, 800)) * size).astype(np.float32)
        expected = float((w.astype(np.float64) ** 2).sum())
        assert square_sum(w) == pytest.approx(expected, rel=1e-5, abs=0.0)


class TestRounded:
    @given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
    @settings(max_examples=200, deadline=None)
    def test_as_torch_rounds(self, values):
        w = np.array([values], np.float32)
        for dtype, theirs in (
            ("F32", torch.float32),
            ("F16", torch.float16),
            ("BF16", torch.bfloat16),
        ):
            stored, read = rounded(w.copy(), dtype)
            expected = torch.from_numpy(w).to(theirs)
            assert stored.tobytes() == expected.view(torch.uint8).numpy().tobytes()
            np.testing.assert_array_equal(read, expected.float().numpy())

    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    def test_what_is_on_the_grid_stays(self, dtype):
        _, once = rounded(weights_of()[1], dtype)
        _, twice = rounded(once.copy(), dtype)
        np.testing.assert_array_equal(once, twice)
