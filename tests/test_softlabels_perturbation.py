"""Soft labels are bent as far as the top class allows, for any logits, shift and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels.perturbation import Bend, Margin, bend, bent, swapped

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def batches(draw, most_classes: int = 40):
    """Logits of any sharpness and a shift, with ties now and then."""
    classes = draw(st.integers(2, most_classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]))
    offset = draw(st.sampled_from([0.0, -40.0, 100.0]))
    logits = scale * torch.randn(64, classes, generator=generator) + offset
    if draw(st.booleans()):
        logits = logits.round()
    return logits, draw(st.sampled_from([0.1, 1.0, 3.0])) * torch.randn(
        64, classes, generator=generator
    )


@given(batches(), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 1.0, 4.0]))
@settings(deadline=None, max_examples=150)
def test_the_top_class_stays_and_the_rest_is_a_distribution(batch, dtype, eps):
    logits, g = batch[0].to(dtype), batch[1]
    served, broken = bend(logits, g, Bend(eps))
    assert served.dtype == dtype
    assert not broken.any()
    assert torch.equal(served.argmax(1), logits.argmax(1))
    top = logits.topk(2, dim=1).values
    strict = top[:, 0] > top[:, 1]
    after = served.topk(2, dim=1).values
    assert (after[strict, 0] > after[strict, 1]).all()
    assert torch.equal(served[~strict], logits[~strict])
    if dtype in (torch.float32, torch.float64):
        mass = torch.logsumexp(served.double(), 1) - torch.logsumexp(logits.double(), 1)
        assert mass.abs().max() < 1e-4
    if eps == 0.0:
        assert torch.equal(served, logits)


@given(batches(), st.sampled_from([0.3, 1.0]))
@settings(deadline=None, max_examples=60)
def test_served_lies_on_the_segment_from_clean_to_tilted(batch, eps):
    """served = p + a (q - p), one a in [0, 1] a row, and 1 where q itself keeps the top class."""
    logits, g = batch[0].double(), batch[1].double()
    p, q = logits.softmax(1), (logits.log_softmax(1) + eps * g).softmax(1)
    served = bend(logits, g, Bend(eps))[0].softmax(1)
    a = ((served - p) * (q - p)).sum(1) / ((q - p) ** 2).sum(1).clamp(min=1e-300)
    top = logits.topk(2, dim=1).values
    clear = ((q - p).abs().amax(1) > 1e-6) & (top[:, 0] - top[:, 1] > 1e-6)
    assert ((a > -1e-6) & (a < 1 + 1e-6))[clear].all()
    assert torch.allclose((p + a[:, None] * (q - p))[clear], served[clear], atol=1e-8)
    kept = q.argmax(1) == logits.argmax(1)
    lead = q.topk(2, dim=1).values
    kept &= lead[:, 0] > 1.001 * lead[:, 1]
    assert torch.allclose(a[clear & kept], torch.ones_like(a[clear & kept]), atol=1e-5)
    short = clear & (q.argmax(1) != logits.argmax(1))
    after = served.topk(2, dim=1).values
    assert ((after[:, 0] / after[:, 1])[short] < 1 + 1e-6).all()  # the largest a: nothing is left


@given(batches(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_rows_do_not_know_of_each_other(batch, seed):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    served = bend(*batch, Bend(1.0))[0]
    assert torch.allclose(bend(batch[0][order], batch[1][order], Bend(1.0))[0], served[order])


@pytest.mark.parametrize("classes", [33, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_leaves_the_others_alone(classes, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(512, classes, generator=generator)).to(dtype)
    g = torch.randn(512, classes, generator=generator)
    served, _ = bend(logits, g, Bend(1.0, top_k=32))
    assert torch.equal(served.argmax(1), logits.argmax(1))
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside.scatter_(1, logits.float().topk(32, dim=1).indices, True)
    assert torch.equal(served[~inside], logits[~inside])
    assert (served[inside] != logits[inside]).float().mean() > 0.6  # bfloat16 has ties
    if dtype == torch.float64:
        before, after = logits.softmax(1), served.softmax(1)
        mass = (before * inside).sum(1) - (after * inside).sum(1)
        assert mass.abs().max() < 1e-12


@given(batches(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_margin_mode_swaps_the_top_two_exactly_as_said(batch, dtype):
    logits, g = batch[0].to(dtype), batch[1]
    margin = Margin(0.2, 0.3)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    exchanged = swapped(wide, g.to(wide.dtype), margin)
    p = wide.softmax(1)
    top = wide.topk(2, dim=1)
    first, second = top.indices.T
    rows = torch.arange(64)
    gap = p[rows, first] - p[rows, second]
    rule = (gap + 0.2 * (g[rows, first] - g[rows, second]) < 0) & (gap < 0.3)
    edge = ((gap + 0.2 * (g[rows, first] - g[rows, second])).abs() < 1e-4) | (
        (gap - 0.3).abs() < 1e-4
    )
    strict = (top.values[:, 0] > top.values[:, 1]) & ~edge
    assert torch.equal((exchanged.argmax(1) == second)[strict], rule[strict])
    assert torch.equal(exchanged.sort(1).values, wide.sort(1).values)
    served, _ = bend(logits, g, Bend(1.0, margin=margin))
    expected = torch.where(rule, second, first)
    assert torch.equal(served.argmax(1)[strict], expected[strict])


def test_broken_rows_pass_through_and_are_counted():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    logits[1, 2], logits[3, 0], logits[4, 4] = float("nan"), float("inf"), -float("inf")
    g = torch.ones(6, 5).cumsum(1) - 3
    logits.requires_grad_()
    served, broken = bend(logits, g, Bend(1.0))
    assert broken.tolist() == [False, True, False, True, True, False]
    assert torch.equal(served[broken].nan_to_num(), logits[broken].nan_to_num())
    assert torch.isfinite(served[~broken]).all()
    served[~broken].square().sum().backward()
    assert torch.isfinite(logits.grad[~broken]).all()


def test_gradients_flow_and_are_right():
    logits = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    g.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: bent(x, y, Bend(0.7), 1e-12), (logits, g))


def test_near_ties_of_neighbouring_floats():
    for dtype in DTYPES:
        one = torch.tensor(7.0, dtype=dtype)
        step = torch.finfo(dtype).eps * 4
        logits = torch.stack([one, one + step, one - step, one]).repeat(50, 1)
        g = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        assert (bend(logits, g, Bend(4.0))[0].argmax(1) == 1).all()


@pytest.mark.parametrize("eps", [-0.1, 9.0, float("nan")])
def test_eps_out_of_range(eps):
    with pytest.raises(SoftLabelError, match="eps"):
        Bend(eps)


@pytest.mark.parametrize("margin", [(0.0, 0.3), (0.2, 0.0), (0.2, 1.1), (float("nan"), 0.3)])
def test_margins_that_make_no_sense(margin):
    with pytest.raises(SoftLabelError, match="margin"):
        Margin(*margin)


def test_top_k_needs_two():
    with pytest.raises(SoftLabelError, match="top_k"):
        Bend(1.0, top_k=1)
