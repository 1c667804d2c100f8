"""The paper's benchmark: its network, its images and its pruning, and what the records say."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from hf_watermark.errors import ModelTooSmallError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def uchida(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("uchida")


def record(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def test_the_network_is_that_of_the_paper_and_holds_as_many_bits(uchida):
    model = uchida.fresh(0, "cpu")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for group, columns in (("conv2", 576), ("conv3", 1152), ("conv4", 2304)):
        watermark = uchida.mark(model, 0, bits=columns, group=group)
        assert watermark.carriers[0].columns == columns
        watermark.detach()
        with pytest.raises(ModelTooSmallError):
            uchida.mark(model, 0, bits=columns + 1, group=group)


def test_images_are_flipped_and_shifted_each_in_its_own_way(uchida):
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1.0
    changed = uchida.augmented(images, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    ways = set()
    for before, after in zip(padded, changed, strict=True):
        (way,) = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(
                before[:, y : y + 16, x : x + 16].flip(-1)
                if flip
                else before[:, y : y + 16, x : x + 16],
                after,
            )
        ]
        ways.add(way)
    assert len(ways) > 20


@pytest.mark.parametrize("how", ["embedded layer", "embedded layer, at random", "every layer"])
def test_pruning_takes_the_share_it_says_and_leaves_the_rest(uchida, how):
    model = uchida.fresh(0, "cpu")
    after = dict(uchida.pruned(model, how, 65, seed=0).named_parameters())
    for name, weight in model.named_parameters():
        kept = after[name] != 0
        assert torch.equal(after[name][kept], weight[kept])
        if name == "conv2.second.weight" or (how == "every layer" and weight.dim() > 1):
            assert int((~kept).sum()) == round(0.65 * weight.numel())
            if "random" not in how:
                assert weight[~kept].abs().max() <= weight[kept].abs().min()
        else:
            assert torch.equal(after[name], weight)


def test_the_record_has_the_whole_mark_after_the_papers_pruning():
    found = record("uchida")
    (row,) = (
        row
        for row in found["results"]["pruning"]["random, long"]["embedded layer"]
        if row["percent"] == found["paper"]["pruned_without_an_error"]
    )
    assert row["ber"] == 0.0


def test_wrong_keys_raise_as_many_false_alarms_as_a_binomial():
    found = record("wrong_keys")
    low, high = binom.interval(0.99, found["settings"]["keys"], 1e-3)
    for rows in found["results"].values():
        for row in rows.values():
            assert low <= row["alphas"]["0.001"]["count"] <= high
