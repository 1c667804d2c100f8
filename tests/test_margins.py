"""The least change that reaches the margins, against scipy and against explicitly built weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls

from hf_watermark.margins import TOLERANCE, growth, least_change, lift, responses_after

SEEDS = st.integers(0, 2**32 - 1)


def gram_of(rng: np.random.Generator, bits: int, dimensions: int) -> np.ndarray:
    directions = rng.standard_normal((bits, dimensions)) / np.sqrt(dimensions)
    return directions @ directions.T


class Carriers:
    """Small carriers with explicit weights, and the directions that T bits change them along."""

    def __init__(self, seed: int, bits: int, shapes: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(seed)
        total = sum(rows * columns for rows, columns in shapes)
        self.w = [rng.standard_normal(shape) * 10 ** rng.uniform(-3, 1) for shape in shapes]
        self.u = [rng.choice([-1.0, 1.0], (rows, bits)) for rows, _ in shapes]
        self.x = [
            rng.standard_normal((bits, columns)) * np.sqrt(rows / total) for rows, columns in shapes
        ]
        self.weights = np.array([float(w.size) for w in self.w])
        self.signs = rng.choice([-1.0, 1.0], bits)

    def responses(self, weights: list[np.ndarray]) -> np.ndarray:
        """(n, T), by the definition."""
        return np.stack(
            [
                np.array([u[:, t] @ w @ x[t] for t in range(len(x))])
                / (np.sqrt(np.mean(w * w)) * np.sqrt(len(w)))
                for w, u, x in zip(weights, self.u, self.x, strict=True)
            ]
        )

    @property
    def z(self) -> np.ndarray:
        return self.responses(self.w)

    @property
    def grams(self) -> np.ndarray:
        return np.stack(
            [(x @ x.T) * (u.T @ u) / len(u) for w, u, x in zip(self.w, self.u, self.x, strict=True)]
        )

    def changed(self, v: np.ndarray) -> list[np.ndarray]:
        """The weights changed by v and scaled back to the norms they had."""
        result = []
        for w, u, x in zip(self.w, self.u, self.x, strict=True):
            new = w + sum(v[t] * np.outer(u[:, t], x[t]) for t in range(len(v))) * np.sqrt(
                np.mean(w * w)
            ) / np.sqrt(len(w))
            result.append(new * np.linalg.norm(w) / np.linalg.norm(new))
        return result

    def lifted(self, margin: float) -> np.ndarray:
        margins = np.full(len(self.signs), margin)
        return lift(self.z, self.grams, self.weights, self.signs, margins)


SHAPES = st.lists(
    st.sampled_from([(8, 64), (64, 8), (24, 24), (16, 48), (32, 32)]), min_size=1, max_size=4
)


class TestLeastChange:
    @given(SEEDS, st.integers(1, 24), st.floats(-3.0, 3.0))
    @settings(max_examples=150, deadline=None)
    def test_conditions_of_optimality(self, seed, bits, shift):
        rng = np.random.default_rng(seed)
        gram = gram_of(rng, bits, 4 * bits + 4)
        deficit = rng.standard_normal(bits) * 3 + shift
        a = least_change(deficit, gram)
        given = gram @ a
        allowed = 1e-6 * max(1.0, np.abs(deficit).max())
        assert (a >= 0.0).all()
        assert (given >= deficit - allowed).all()
        assert np.abs((given - deficit)[a > 0.0]).max(initial=0.0) <= allowed

    @given(SEEDS, st.integers(1, 16), st.sampled_from([1.1, 1.5, 8.0]))
    @settings(max_examples=100, deadline=None)
    def test_against_scipy(self, seed, bits, room):
        """The dual is non-negative least squares: |L^T a - L^-1 d|^2 with gram = L L^T."""
        rng = np.random.default_rng(seed)
        gram = gram_of(rng, bits, int(room * bits) + 2)
        deficit = rng.standard_normal(bits) + 0.5
        lower = np.linalg.cholesky(gram)
        expected, _ = nnls(lower.T, np.linalg.solve(lower, deficit), maxiter=1000)
        got = least_change(deficit, gram)
        cost = got @ gram @ got
        assert cost == pytest.approx(expected @ gram @ expected, rel=1e-3, abs=1e-9)
        assert (gram @ got >= deficit - 1e-3 * max(1.0, np.abs(deficit).max())).all()

    def test_nothing_lacks(self):
        assert not least_change(np.array([-1.0, 0.0]), np.eye(2)).any()

    def test_alone(self):
        np.testing.assert_allclose(least_change(np.array([3.0]), np.array([[2.0]])), [1.5])

    @pytest.mark.parametrize("gram", [np.zeros((3, 3)), np.ones((3, 3)), np.diag([1.0, 0.0, 1.0])])
    def test_directions_that_cannot(self, gram):
        assert np.isfinite(least_change(np.array([1.0, 2.0, 3.0]), gram)).all()

    def test_thousands_of_bits(self):
        rng = np.random.default_rng(0)
        gram = gram_of(rng, 1500, 6000)
        a = least_change(np.full(1500, 4.0), gram)
        np.testing.assert_allclose((gram @ a)[a > 0.0], 4.0, rtol=1e-5)
        assert (gram @ a).min() >= 4.0 - 4e-5


class TestResponsesAfter:
    @given(SEEDS, st.integers(1, 12), SHAPES, st.floats(0.0, 8.0))
    @settings(max_examples=100, deadline=None)
    def test_against_the_weights(self, seed, bits, shapes, size):
        carriers = Carriers(seed, bits, shapes)
        v = np.random.default_rng(seed + 1).standard_normal(bits) * size
        z, grams, weights = carriers.z, carriers.grams, carriers.weights
        expected = carriers.responses(carriers.changed(v)).sum(axis=0)
        np.testing.assert_allclose(responses_after(v, z, grams, weights), expected, atol=1e-9)
        norms = [np.linalg.norm(w) for w in carriers.w]
        for factor, w, new, u, x, norm in zip(
            growth(v, z, grams, weights),
            carriers.w,
            carriers.changed(v),
            carriers.u,
            carriers.x,
            norms,
            strict=True,
        ):
            raw = w + (u * v) @ x * np.sqrt(np.mean(w * w)) / np.sqrt(len(w))
            assert np.linalg.norm(raw) == pytest.approx(factor * norm)
            assert np.linalg.norm(new) == pytest.approx(norm)

    def test_no_change(self):
        carriers = Carriers(0, 5, [(8, 64), (24, 24)])
        after = responses_after(np.zeros(5), carriers.z, carriers.grams, carriers.weights)
        np.testing.assert_array_equal(after, carriers.z.sum(axis=0))


class TestLift:
    @given(SEEDS, st.integers(1, 12), SHAPES, st.floats(0.02, 0.75))
    @settings(max_examples=150, deadline=None)
    def test_the_margins_hold_in_the_weights(self, seed, bits, shapes, distortion):
        carriers = Carriers(seed, bits, shapes)
        gram = carriers.grams.sum(axis=0) * np.outer(carriers.signs, carriers.signs)
        # The margin whose mark alone, on carriers of zero response, is this part of their size.
        needed = float(np.linalg.solve(gram, np.ones(bits)).sum())
        margin = distortion * np.sqrt(carriers.weights.sum() / needed)
        v = carriers.lifted(margin)
        new = carriers.changed(v)
        agreement = carriers.signs * carriers.responses(new).sum(axis=0)
        assert agreement.min() >= margin * (1.0 - 1.01 * TOLERANCE)
        assert agreement[v != 0.0].max(initial=0.0) <= margin * (1.0 + 2.01 * TOLERANCE)
        assert (carriers.signs * v >= 0.0).all()
        for w, changed in zip(carriers.w, new, strict=True):
            assert np.linalg.norm(changed) == pytest.approx(np.linalg.norm(w))

    @given(SEEDS, st.integers(1, 6), SHAPES, st.floats(0.02, 0.3))
    @settings(max_examples=40, deadline=None)
    def test_the_change_is_nearly_the_least(self, seed, bits, shapes, distortion):
        """Against SLSQP over v, scaling back included, by the size of what is added."""
        carriers = Carriers(seed, bits, shapes)
        z, grams, weights, signs = carriers.z, carriers.grams, carriers.weights, carriers.signs
        margin = distortion * np.sqrt(weights.sum() / bits)
        v = carriers.lifted(margin)
        total = grams.sum(axis=0)
        found = minimize(
            lambda v: v @ total @ v,
            v + 0.1 * margin * signs,
            jac=lambda v: 2.0 * total @ v,
            constraints={
                "type": "ineq",
                "fun": lambda v: signs * responses_after(v, z, grams, weights) - margin,
            },
            method="SLSQP",
            options={"maxiter": 300, "ftol": 1e-10},
        )
        if found.success:
            assert v @ total @ v <= found.fun * 1.02 + 1e-6

    @given(SEEDS, st.integers(1, 12), SHAPES)
    @settings(max_examples=50, deadline=None)
    def test_mirrored(self, seed, bits, shapes):
        carriers = Carriers(seed, bits, shapes)
        z, grams, weights = carriers.z, carriers.grams, carriers.weights
        margins = np.full(bits, 2.0)
        v = lift(z, grams, weights, carriers.signs, margins)
        np.testing.assert_allclose(lift(-z, grams, weights, -carriers.signs, margins), -v)

    @given(SEEDS, st.integers(1, 12), SHAPES)
    @settings(max_examples=50, deadline=None)
    def test_what_is_reached_is_left(self, seed, bits, shapes):
        carriers = Carriers(seed, bits, shapes)
        lowest = float((carriers.signs * carriers.z.sum(axis=0)).min())
        assert not carriers.lifted(lowest).any()
        carriers.w = carriers.changed(carriers.lifted(3.0))
        assert not carriers.lifted(3.0 * (1.0 - TOLERANCE)).any()

    def test_several_margins(self):
        carriers = Carriers(1, 3, [(32, 32)])
        margins = np.array([1.0, 4.0, 0.0])
        v = lift(carriers.z, carriers.grams, carriers.weights, carriers.signs, margins)
        agreement = carriers.signs * carriers.responses(carriers.changed(v)).sum(axis=0)
        assert (agreement >= margins * (1.0 - TOLERANCE) - 1e-9).all()

    @pytest.mark.parametrize("distortion", [0.99, 1.2, 50.0])
    def test_out_of_reach(self, distortion):
        carriers = Carriers(2, 8, [(24, 24), (8, 64)])
        margin = distortion * np.sqrt(carriers.weights.sum() / 8)
        v = carriers.lifted(margin)
        agreement = carriers.signs * carriers.responses(carriers.changed(v)).sum(axis=0)
        assert np.isfinite(v).all()
        assert 0.9 * min(margin, margin / distortion) < agreement.min()

    def test_matrices_may_be_made_anew(self):
        carriers = Carriers(3, 4, [(32, 32), (8, 64)])

        class Lazy:
            def __iter__(self):
                yield from carriers.grams

        args = (carriers.weights, carriers.signs, np.full(4, 3.0))
        np.testing.assert_array_equal(
            lift(carriers.z, Lazy(), *args), lift(carriers.z, carriers.grams, *args)
        )
